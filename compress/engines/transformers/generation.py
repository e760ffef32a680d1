"""What a model writes to prompts, batch by batch, and whether it writes the same to one alone."""

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

CHECKED = 8  # examples that are done once more, alone: of fewer than 80 a tenth, four at least, for alone each takes many times as long
ENCODED = 1024  # tokens of prompts that an encoder on a CPU is given at once: what it computes of more is too much for the caches
ENDED = 0.25  # of a batch's rows, when the others go on without them; a row that has ended costs as much as one that has not
# relative errors that torch.testing takes for rounding
ROUNDING = {torch.float32: 1.3e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
APART = 4  # times the model's own noise: what two scores may differ by where each is off by it, and as much again for its being one sample


class Ended(StoppingCriteria):  # type: ignore[misc]
    """Stops all rows when a part of them has written one of these tokens; `rows` says which have."""

    def __init__(self, ends: set[int]):
        self._ends, self.rows = torch.tensor(sorted(ends)), torch.zeros(1, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.rows = self.rows.to(input_ids.device) | torch.isin(input_ids[:, -1], self._ends.to(input_ids.device))
        return (self.rows.float().mean() >= ENDED).expand(len(input_ids))


class Parted(StoppingCriteria):  # type: ignore[misc]
    """Stops a single row, whose first tokens up to `start` are given, at the first one that isn't as expected; behind all an end is."""

    def __init__(self, expected: list[int], start: int, ends: set[int]):
        self._expected, self._start, self._ends = expected, start, ends

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        place, token = input_ids.shape[1] - self._start - 1, int(input_ids[0, -1])
        is_expected = token == self._expected[place] if place < len(self._expected) else token in self._ends
        return torch.tensor([not is_expected], device=input_ids.device)


@dataclass(frozen=True)
class Parting:
    """Where an example that was done once more, alone, comes out otherwise than in its batch.

    position  of the first token that differs, from 0 on
    single    the token there, and `batched` that of the batch, as they are called in messages
    gap       between the scores of the two, as they are alone; `noise` is by how much the model's scores move where they mean the same
    is_tie    whether the gap is within that noise
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
            f" {self.batched} and not {self.single}, with scores {self.gap:.3g} apart where rounding moves them by {self.noise:.2g}"
        )


@dataclass(frozen=True)
class Recheck:
    """What became of examples that were done once more, alone.

    differ   came out otherwise than in their batch
    ties     those of them whose outputs part at two tokens with scores within the model's noise; None where beams were searched
    reason   why the model's outputs depend on what is in a batch, where they are known to
    """

    checked: int
    differ: int
    ties: int | None
    reason: str | None = None

    @property
    def sentence(self) -> str:
        """What the report says."""
        outcome = "all came out as in their batch"
        if self.differ:
            outcome = f"{self.differ} came out otherwise than in their batch"
        if self.differ and self.ties is not None:
            outcome += f", {self.ties} of them where two tokens' scores were within rounding of each other"
        return "; ".join(filter(None, [f"{self.checked} examples were done once more, each alone: {outcome}", self.reason]))


class Writer:
    """Writes to prompts, given as token ids, as `settings` say; what these leave None is as the model's generation config has it.

    Decoder-only models are padded on the left.
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
        """Do a sample of the prompts once more, each alone: look whether the model would write the same, and where not, have it write.

        Raises RunError where one comes out otherwise than in its batch for another reason than a tie, or one that is known. Beams part
        where hypotheses tie, which can't be told step by step, and are counted.
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
                f"{others[0].sentence}; so do {len(others)} of {len(chosen)} that were looked at. Figures of this model would depend on"
                " the batches; with benchmark.quality_batch_tokens: 1 every example is written alone"
            )
        return Recheck(len(chosen), len(partings), len(partings) - len(others) if self._beams == 1 else None, reason)

    def _parting(self, example: int, batched: list[int]) -> Parting | None:
        """Where an example alone parts from what the batch gave it; None where it doesn't."""
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
        others = torch.tensor(batched[part : part + 1] or sorted(self._stop), device=scores.device)  # the batch's may have come to its end
        others = others[others < len(scores)]
        noise = self._noise(inputs, output.sequences[:, : start + part], torch.stack([step[0] for step in output.logits[: part + 1]]))
        size = scores[scores.isfinite()].abs().max().item()
        slack = max(APART * noise, ROUNDING.get(self._model.dtype, ROUNDING[torch.float32]) * size)
        gap = (scores.max() - scores[others].max()).item()
        is_tie = gap <= slack or (self._warpers is not None and at_edge(scores, logits, others, slack))
        return Parting(example, part, mine, theirs, gap, noise, is_tie)

    def _would_write(self, inputs: dict[str, Any], tokens: list[int]) -> bool:
        """Whether each of these tokens, and the end behind them, is what the model scores highest after those before it.

        All are read at once, which takes a small part of writing them. What rounding alone changes may come out otherwise step by step.
        """
        if self._both:
            start = getattr(self._config, "decoder_start_token_id", None)
            if start is None:
                return False  # transformers looks for another one
            before = torch.tensor([[start]], device=inputs["input_ids"].device)
        else:
            before = inputs["input_ids"]
        ends = len(tokens) < self._new_tokens
        written = torch.cat([before, before.new_tensor([tokens])], dim=1)
        best = self._at_once(inputs, written, len(tokens) + 1).argmax(dim=-1).tolist()
        return best[: len(tokens)] == tokens and (not ends or best[-1] in self._stop)

    def _at_once(self, inputs: dict[str, Any], written: Tensor, last: int) -> Tensor:
        """The logits (positions, vocabulary) behind the `last` tokens of a prompt alone and what is written to it."""
        model = self._model
        if self._both:
            arguments = {**inputs, "decoder_input_ids": written}
        else:
            arguments = {"input_ids": written, "attention_mask": torch.ones_like(written)}
            if "logits_to_keep" in inspect.signature(model.forward).parameters:  # of the whole prompt they may be gigabytes
                arguments["logits_to_keep"] = last
        with torch.no_grad():
            logits: Tensor = model(**arguments).logits[0, -last:]
        return logits.float()

    def _noise(self, inputs: dict[str, Any], written: Tensor, stepwise: Tensor) -> float:
        """How far logits (steps, vocabulary) of the same tokens lie apart that were computed step by step and that are computed at once.

        Both mean the same, so what lies between them is the rounding of this model, in its dtype and with its inputs rounded or not.
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
        """What is written to these prompts, as they come to their ends: whenever a part of them has, the others go on without."""
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
        """The encoder's states (rows, tokens, width), on a CPU worked out a few rows at a time, longest first; pads are zeros."""
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
        """The inputs with which the rows that are left are continued where they are."""
        if cache is not None:
            cache.reorder_cache(left)  # as for beams, which every kind of cache knows; states of linear attention among them
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
        """What is written to these prompts, up to the longest's end."""
        inputs, start = self._inputs(examples)
        rows: list[list[int]] = self._generate(examples, inputs, start).sequences[:, start:].tolist()
        return rows

    def _inputs(self, examples: list[int]) -> tuple[dict[str, Any], int]:
        """The prompts as a batch, and how many tokens stand before the first that is written."""
        inputs = padded(self._tokenizer, [self._encoded[i] for i in examples], self._model.device, left=not self._both)
        return inputs, 1 if self._both else inputs["input_ids"].shape[1]

    def _generate(self, examples: list[int], inputs: dict[str, Any], start: int, **options: Any) -> Any:
        """transformers' generation of the tokens that are yet to be written."""
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
    """Why what a model writes depends on what is written beside it; None where it shouldn't."""
    packing = getattr(model.config, "quantization_config", None)
    if packing is not None and getattr(packing, "load_in_8bit", False) and packing.llm_int8_threshold > 0:
        return "bitsandbytes holds a column in 16 bits when any input of a batch has an outlier there, so what is served together matters"
    return None


def _why_it_may_part(model: PreTrainedModel) -> str | None:
    """Why outputs may part beyond a tie where they do: layers that round what they are given as they run, which are torchao's, FBGEMM's and
    compressed-tensors' with a scheme for inputs. None where there are none."""
    rounds = any(
        isinstance(module, Int8Linear)
        or getattr(getattr(module, "weight", None), "act_quant_kwargs", None) is not None
        or getattr(getattr(module, "quantization_scheme", None), "input_activations", None) is not None
        for module in model.modules()
    )
    return "its layers round their inputs, which makes whole steps of what sums of a batch differ by" if rounds else None
