"""What a model writes to prompts, batch by batch, and whether it writes the same to a single one."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutput

from compress import decoding
from compress.engines.transformers.batching import WRITTEN, Batches
from compress.engines.transformers.draws import WARPERS, GumbelNoise, at_edge, warpers
from compress.engines.transformers.reading import padded
from compress.errors import RunError
from compress.recipe import Generation
from compress.runtime import Int8Linear

CHECKED = 8  # examples that are written again singly, many times slower: a tenth of fewer than 80, but four at least
ENCODED = 1024  # tokens that an encoder on a CPU reads at once; the caches don't hold what it computes of more
ENDED = 0.25  # when this share of a batch's rows has ended, the others go on without them; until then they cost as much
# relative errors that torch.testing ascribes to rounding
ROUNDING = {torch.float32: 1.3e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
APART = 4  # times the model's noise, by which two scores may differ: twice since both are off, and twice since it is a single sample


class Ended(StoppingCriteria):  # type: ignore[misc]
    """Stops all rows once the share `ENDED` of them has written an end token; `rows` says which have."""

    def __init__(self, ends: set[int]):
        self._ends, self.rows = torch.tensor(sorted(ends)), torch.zeros(1, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.rows = self.rows.to(input_ids.device) | torch.isin(input_ids[:, -1], self._ends.to(input_ids.device))
        return (self.rows.float().mean() >= ENDED).expand(len(input_ids))


class Parted(StoppingCriteria):  # type: ignore[misc]
    """Stops a single row at the first token after `start` that isn't the expected one; after all of these an end is expected."""

    def __init__(self, expected: list[int], start: int, ends: set[int]):
        self._expected, self._start, self._ends = expected, start, ends

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        place, token = input_ids.shape[1] - self._start - 1, int(input_ids[0, -1])
        is_expected = token == self._expected[place] if place < len(self._expected) else token in self._ends
        return torch.tensor([not is_expected], device=input_ids.device)


@dataclass(frozen=True)
class Parting:
    """Where the output of an example alone differs from the one in its batch.

    position  of the first token that differs, from 0
    single    the token there as messages name it, alone; `batched` in the batch
    gap       between the scores of the two tokens, computed alone; `noise` is how far rounding moves the model's scores
    is_tie    whether the gap is within the noise
    """

    example: int
    position: int
    single: str
    batched: str
    gap: float
    noise: float
    is_tie: bool

    @property
    def sentence(self) -> str:
        return (
            f"example {self.example + 1} of those drawn comes out otherwise in a batch than alone: its token {self.position + 1} is"
            f" {self.batched} and not {self.single}. Their scores are {self.gap:.3g} apart, and rounding moves scores by {self.noise:.2g}"
        )


@dataclass(frozen=True)
class Recheck:
    """The outcome of examples that were written again, each alone.

    differ   came out otherwise than in their batch
    ties     those of them whose outputs part at two tokens with scores within the model's noise; None where beams were searched
    reason   why the model's outputs depend on the batch, if they do
    """

    checked: int
    differ: int
    ties: int | None
    reason: str | None = None

    @property
    def sentence(self) -> str:
        """The remark for the report."""
        outcome = "all came out as in their batch"
        if self.differ:
            outcome = f"{self.differ} came out otherwise than in their batch"
        if self.differ and self.ties is not None:
            outcome += f", {self.ties} of them where two tokens' scores were within rounding of each other"
        return "; ".join(filter(None, [f"{self.checked} examples were done once more, each alone: {outcome}", self.reason]))


class Writer:
    """Writes to prompts of token ids, as `settings` say; what these leave None is as in the model's generation config.

    Prompts of decoder-only models are padded on the left.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: list[list[int]], settings: Generation
    ):  # fmt: skip
        both = model.config.is_encoder_decoder
        self._model, self._tokenizer, self._encoded, self._both = model, tokenizer, encoded, both
        self._new_tokens, self._seed = settings.max_new_tokens, settings.seed
        self._config = decoding.held(model.generation_config)
        for key in ("num_beams", "repetition_penalty", *WARPERS):
            if (value := getattr(settings, key, None)) is not None:
                setattr(self._config, key, value)
        self._warpers = warpers(self._config) if settings.do_sample else None
        self._beams = settings.num_beams
        batching = decoding.batching(self._config, encoder=both)
        self._batching = "whole" if batching == "leaving" and self._beams > 1 else batching
        self._takes_the_best = self._beams == 1 and self._warpers is None and decoding.takes_the_best(self._config)
        ends = model.generation_config.eos_token_id
        self._stop = {tokenizer.pad_token_id, *(ends if isinstance(ends, list) else [])} | ({ends} if isinstance(ends, int) else set())

    def write(self, batches: Batches) -> list[list[int]]:
        """The tokens that the model adds to each prompt, without padding and end tokens, in the order of the prompts."""
        outputs: list[list[int]] = [[] for _ in self._encoded]

        def work(examples: list[int]) -> None:
            for part in self._parts(examples):
                rows = self._leaving(part) if self._batching == "leaving" else zip(part, self._rows(part), strict=True)
                for example, row in rows:
                    outputs[example] = self._until_end(row)

        batches.each([self._beams * (len(row) + self._new_tokens) for row in self._encoded], work, "generating", WRITTEN)
        return outputs

    def recheck(self, outputs: list[list[int]]) -> Recheck:
        """Do a sample of the prompts once more, each alone. Those to which the model wouldn't write the same are written again.

        Raises RunError where an output differs for another reason than a tie or one that is known. Beams part where hypotheses tie, which
        can't be told step by step; so they are only counted.
        """
        checked = min(CHECKED, max(4, len(outputs) // 10))
        chosen = range(0, len(outputs), max(1, len(outputs) // checked))[:checked]
        partings = [parting for example in chosen if (parting := self._parting(example, outputs[example])) is not None]
        reason = _depends_on_batch(self._model)
        others = [parting for parting in partings if not parting.is_tie]
        if others and self._beams == 1 and reason is None:
            reason = _why_it_may_part(self._model)
        if others and self._beams == 1 and reason is None:
            raise RunError(
                f"{others[0].sentence}. Of {len(chosen)} examples that were checked {len(others)} do so, and figures of this model would"
                " depend on the batches; with benchmark.quality_batch_tokens: 1 every example is written alone"
            )
        return Recheck(len(chosen), len(partings), len(partings) - len(others) if self._beams == 1 else None, reason)

    def _parting(self, example: int, batched: list[int]) -> Parting | None:
        """Where an example alone parts from its output in the batch; None where it doesn't."""
        inputs, start = self._inputs([example])
        if self._takes_the_best and self._would_write(inputs, batched):
            return None
        greedy = self._beams == 1
        watch = {"stopping_criteria": StoppingCriteriaList([Parted(batched, start, self._stop)])} if greedy else {}
        output = self._generate([example], inputs, start, output_scores=greedy, output_logits=greedy, **watch)
        single = self._until_end(output.sequences[0, start:].tolist())
        if single == batched:
            return None
        part = next((n for n, (a, b) in enumerate(zip(single, batched, strict=False)) if a != b), min(len(single), len(batched)))
        mine, theirs = (self._name(tokens[part]) if part < len(tokens) else "its end" for tokens in (single, batched))
        if not greedy:
            return Parting(example, part, mine, theirs, 0.0, 0.0, is_tie=False)
        scores, logits = output.scores[part][0].float(), output.logits[part][0].float()
        others = torch.tensor(batched[part : part + 1] or sorted(self._stop), device=scores.device)  # the batch's row may have ended
        others = others[others < len(scores)]
        noise = self._noise(inputs, output.sequences[:, : start + part], torch.stack([step[0] for step in output.logits[: part + 1]]))
        size = scores[scores.isfinite()].abs().max().item()
        slack = max(APART * noise, ROUNDING.get(self._model.dtype, ROUNDING[torch.float32]) * size)
        gap = (scores.max() - scores[others].max()).item()
        is_tie = gap <= slack or (self._warpers is not None and at_edge(scores, logits, others, slack))
        return Parting(example, part, mine, theirs, gap, noise, is_tie)

    def _would_write(self, inputs: dict[str, Any], tokens: list[int]) -> bool:
        """Whether the model scores each of these tokens, and the end after them, highest after those before it.

        All are read at once, which takes a fraction of the time of writing them. Where rounding decides, writing may come out otherwise.
        """
        if self._both:
            start = getattr(self._config, "decoder_start_token_id", None)
            if start is None:
                return False  # transformers then looks elsewhere for one
            before = torch.tensor([[start]], device=inputs["input_ids"].device)
        else:
            before = inputs["input_ids"]
        ends = len(tokens) < self._new_tokens
        written = torch.cat([before, before.new_tensor([tokens])], dim=1)
        best = self._at_once(inputs, written, len(tokens) + 1).argmax(dim=-1).tolist()
        return best[: len(tokens)] == tokens and (not ends or best[-1] in self._stop)

    def _at_once(self, inputs: dict[str, Any], written: Tensor, last: int) -> Tensor:
        """The logits (positions, vocabulary) after each of the `last` tokens of a single prompt with what is written to it."""
        model = self._model
        if self._both:
            arguments = {**inputs, "decoder_input_ids": written}
        else:
            arguments = {"input_ids": written, "attention_mask": torch.ones_like(written)}
            if "logits_to_keep" in inspect.signature(model.forward).parameters:  # for the whole prompt they may be gigabytes
                arguments["logits_to_keep"] = last
        with torch.no_grad():
            logits: Tensor = model(**arguments).logits[0, -last:]
        return logits.float()

    def _noise(self, inputs: dict[str, Any], written: Tensor, stepwise: Tensor) -> float:
        """How far logits (steps, vocabulary) of the same tokens differ between computing them step by step and all at once.

        Both mean the same. So they differ by the rounding of this model: of its dtype, and of its layers' inputs where it rounds these.
        """
        at_once = self._at_once(inputs, written, len(stepwise))
        noise = (at_once - stepwise.float()).abs().max().item() / (self._config.temperature or 1.0 if self._warpers is not None else 1.0)
        return noise if np.isfinite(noise) else 0.0

    def _parts(self, examples: list[int]) -> list[list[int]]:
        """A batch as it is, or by the lengths of its prompts."""
        if self._batching != "equal":
            return [examples]
        return [list(part) for _, part in groupby(examples, key=lambda example: len(self._encoded[example]))]

    def _leaving(self, examples: list[int]) -> Iterator[tuple[int, list[int]]]:
        """What is written to these prompts, in the order in which they end. Whenever enough have, the others go on without them."""
        inputs, start = self._inputs(examples)
        if self._both:
            inputs["encoder_outputs"] = BaseModelOutput(self._encode(inputs))
        last = start + self._new_tokens
        while examples:
            ended = Ended(self._stop)
            output = self._generate(examples, inputs, start, stopping_criteria=StoppingCriteriaList([ended]))
            rows, over = output.sequences, ended.rows | (output.sequences.shape[1] >= last)
            for row in over.nonzero().flatten().tolist():
                yield examples[row], rows[row, start:].tolist()
            left = (~over).nonzero().flatten()
            examples = [examples[row] for row in left.tolist()]
            inputs = self._going_on(inputs, output.past_key_values, rows, left)

    def _encode(self, inputs: dict[str, Any]) -> Tensor:
        """The encoder's states (rows, tokens, width), on a CPU computed a few rows at a time, longest first; padding is zeros."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        lengths = mask.sum(dim=1).clamp(min=1).tolist()
        parts, start = [], 0
        while start < len(ids):
            few = len(ids) if ids.is_cuda else max(1, ENCODED // lengths[start])
            rows, longest = slice(start, start + few), max(lengths[start : start + few])
            with torch.no_grad():
                states = self._model.get_encoder()(input_ids=ids[rows, :longest], attention_mask=mask[rows, :longest])
            parts.append(torch.nn.functional.pad(states.last_hidden_state, (0, 0, 0, ids.shape[1] - longest)))
            start += few
        return torch.cat(parts)

    def _going_on(self, inputs: dict[str, Any], cache: Any, rows: Tensor, left: Tensor) -> dict[str, Any]:
        """The inputs with which the rows that are left go on."""
        if cache is not None:
            cache.reorder_cache(left)  # as beams do; every kind of cache can, with states of linear attention, too
        mask = inputs["attention_mask"][left]
        written = mask.new_ones(len(left), rows.shape[1] - (0 if self._both else mask.shape[1]))
        if not self._both:
            return {"input_ids": rows[left], "attention_mask": torch.cat([mask, written], dim=1), "past_key_values": cache}
        return {
            "input_ids": inputs["input_ids"][left], "attention_mask": mask, "past_key_values": cache,
            "encoder_outputs": BaseModelOutput(inputs["encoder_outputs"].last_hidden_state[left]),
            "decoder_input_ids": rows[left], "decoder_attention_mask": written,
        }  # fmt: skip

    def _rows(self, examples: list[int]) -> list[list[int]]:
        """What is written to these prompts, until all have ended."""
        inputs, start = self._inputs(examples)
        rows: list[list[int]] = self._generate(examples, inputs, start).sequences[:, start:].tolist()
        return rows

    def _inputs(self, examples: list[int]) -> tuple[dict[str, Any], int]:
        """The prompts as a batch, and how many tokens stand before the first new one."""
        inputs = padded(self._tokenizer, [self._encoded[i] for i in examples], self._model.device, left=not self._both)
        return inputs, 1 if self._both else inputs["input_ids"].shape[1]

    def _generate(self, examples: list[int], inputs: dict[str, Any], start: int, **options: Any) -> Any:
        """transformers' generation of the tokens that are still to be written."""
        model, tokenizer = self._model, self._tokenizer
        drawing = None if self._warpers is None else LogitsProcessorList([*self._warpers, GumbelNoise(self._seed, examples, start)])
        before = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1] if "past_key_values" in inputs else start
        strings = {"tokenizer": tokenizer} if self._config.stop_strings else {}
        with torch.no_grad(), decoding.generating_by(model, self._config):
            return model.generate(
                **inputs, **options, **strings, max_new_tokens=start + self._new_tokens - before, do_sample=False, num_beams=self._beams,
                logits_processor=drawing, pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True,
            )  # fmt: skip

    def _name(self, token: int) -> str:
        return repr(text) if (text := self._tokenizer.decode(token)) else f"number {token} of the vocabulary"

    def _until_end(self, tokens: list[int]) -> list[int]:
        return tokens[: next((index for index, token in enumerate(tokens) if token in self._stop), len(tokens))]


def _depends_on_batch(model: PreTrainedModel) -> str | None:
    """Why a model's outputs depend on the others of a batch; None where they shouldn't."""
    packing = getattr(model.config, "quantization_config", None)
    if packing is not None and getattr(packing, "load_in_8bit", False) and packing.llm_int8_threshold > 0:
        return "bitsandbytes holds a column in 16 bits when any input of a batch has an outlier there, so what is served together matters"
    return None


def _why_it_may_part(model: PreTrainedModel) -> str | None:
    """Why outputs may part beyond a tie: layers that round their inputs as they run. None where there are none.

    These are torchao's, FBGEMM's, and compressed-tensors' with a scheme for inputs.
    """
    rounds = any(
        isinstance(module, Int8Linear)
        or getattr(getattr(module, "weight", None), "act_quant_kwargs", None) is not None
        or getattr(getattr(module, "quantization_scheme", None), "input_activations", None) is not None
        for module in model.modules()
    )
    return "its layers round their inputs, which makes whole steps of what sums of a batch differ by" if rounds else None
