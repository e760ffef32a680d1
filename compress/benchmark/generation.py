"""What a model writes to prompts, batch by batch, and whether it writes the same to one alone.

Sampling takes no random numbers from a generator that the batching would share out: each row's logits get Gumbel noise that seed, example
and position determine, and the likeliest token is then a draw from the distribution (Gumbel 1954; Maddison et al. 2014). So the draws are
the same in every batch, on every device, and on both sides, which makes their difference less noisy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.modeling_outputs import BaseModelOutput

from compress.benchmark.batching import WRITTEN, Batches
from compress.benchmark.quality import Reader, Texts
from compress.errors import DataError

CHECKED = 8  # examples that are written once more, alone
ENCODED = 1024  # tokens of prompts that an encoder on a CPU is given at once: what it computes of more is too much for the caches
ENDED = 0.25  # of a batch's rows, when the others go on without them; a row that has ended costs as much as one that has not
WARPERS = {  # what bends a distribution before a draw, in transformers' order, with the value that changes nothing
    "temperature": (TemperatureLogitsWarper, 1.0),
    "top_k": (TopKLogitsWarper, 0),
    "top_p": (TopPLogitsWarper, 1.0),
    "min_p": (MinPLogitsWarper, 0.0),
    "typical_p": (TypicalLogitsWarper, 1.0),
}
# relative errors that torch.testing takes for rounding
ROUNDING = {torch.float32: 1.3e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}


class GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Adds to every row's scores (rows, vocabulary) noise of its own: Philox keyed by seed and example, counted by position.

    start   the tokens that stand before the first that is written
    """

    def __init__(self, seed: int, examples: list[int], start: int):
        self._seed, self._examples, self._start = seed, examples, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position, size = input_ids.shape[1] - self._start, scores.shape[1]
        drawn = [self._exponential(example, position, size) for example in self._examples]
        return scores.float() - torch.from_numpy(np.stack(drawn)).to(scores.device).log()

    def _exponential(self, example: int, position: int, size: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
        stream = np.random.Philox(key=[self._seed, example], counter=[0, 0, 0, position])
        return np.random.Generator(stream).standard_exponential(size, dtype=np.float32)


class Ended(StoppingCriteria):  # type: ignore[misc]
    """Stops all rows when a part of them has written one of these tokens; `rows` says which have."""

    def __init__(self, ends: set[int]):
        self._ends, self.rows = torch.tensor(sorted(ends)), torch.zeros(1, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.rows = self.rows.to(input_ids.device) | torch.isin(input_ids[:, -1], self._ends.to(input_ids.device))
        return (self.rows.float().mean() >= ENDED).expand(len(input_ids))


@dataclass(frozen=True)
class Recheck:
    """What became of examples that were written once more, alone.

    differ   came out otherwise than in their batch
    ties     those of them whose outputs part at two tokens with scores within rounding of each other; None where beams were searched
    """

    checked: int
    differ: int
    ties: int | None

    @property
    def sentence(self) -> str:
        """What the report says."""
        if not self.differ:
            return f"{self.checked} examples were written once more, each alone: all came out as in their batch"
        why = "" if self.ties is None else f", {self.ties} of them where two tokens' scores were within rounding of each other"
        return f"{self.checked} examples were written once more, each alone: {self.differ} came out otherwise than in their batch{why}"


class Writer:
    """Writes to prompts as `settings` (a recipe's generation block) say; what these leave None is as the model's generation config has it.

    Decoder-only models are padded on the left.
    """

    def __init__(self, reader: Reader, prompts: Texts, settings: dict[str, Any]):
        model, both = reader.model, reader.model.config.is_encoder_decoder
        self._reader, self._both, self._new_tokens, self._seed = reader, both, settings["max_new_tokens"], settings["seed"]
        if reader.context is not None and self._new_tokens >= reader.context:
            raise DataError(f"generation.max_new_tokens: {self._new_tokens} does not fit the model's context of {reader.context} tokens")
        self._encoded = reader.read(prompts, room=0 if both else self._new_tokens, unended=not both)
        self._warpers = _warpers(model.generation_config, settings) if settings["do_sample"] else None
        self._beams = settings["num_beams"]
        self._settings = {
            key: value
            for key, value in settings.items()
            if value is not None and key not in ("max_new_tokens", "seed", "do_sample", *WARPERS)
        }
        ends = model.generation_config.eos_token_id
        self._stop = {reader.tokenizer.pad_token_id, *(ends if isinstance(ends, list) else [])} | (
            {ends} if isinstance(ends, int) else set()
        )

    def write(self, batches: Batches) -> list[list[int]]:
        """The tokens that the model adds to each prompt, without padding and end tokens, in the order of the prompts."""
        outputs: list[list[int]] = [[] for _ in self._encoded]

        def work(examples: list[int]) -> None:
            rows = self._leaving(examples) if self._beams == 1 else zip(examples, self._rows(examples)[0], strict=True)
            for example, row in rows:
                outputs[example] = self._until_end(row)

        batches.each([self._beams * (len(row) + self._new_tokens) for row in self._encoded], work, "generating", WRITTEN)
        return outputs

    def recheck(self, outputs: list[list[int]]) -> Recheck:
        """Write a sample of the prompts once more, each alone."""
        chosen = range(0, len(outputs), max(1, len(outputs) // CHECKED))[:CHECKED]
        explained = [tie for example in chosen if (tie := self._parts_by_tie(example, outputs[example])) is not None]
        return Recheck(len(chosen), len(explained), sum(explained) if self._beams == 1 else None)

    def _parts_by_tie(self, example: int, batched: list[int]) -> bool | None:
        """Whether a tie is why an example alone gives other tokens than the batch; None where it gives the same."""
        rows, steps = self._rows([example], scores=self._beams == 1)
        alone = self._until_end(rows[0])
        if alone == batched:
            return None
        if self._beams > 1:
            return False
        part = next((n for n, (a, b) in enumerate(zip(alone, batched, strict=False)) if a != b), min(len(alone), len(batched)))
        scores = steps[part][0].float()
        theirs = batched[part : part + 1] or sorted(self._stop)  # the batch's may have come to its end
        gap, size = scores.max() - scores[theirs].max(), scores[scores.isfinite()].abs().max()
        return bool(gap <= ROUNDING.get(self._reader.model.dtype, ROUNDING[torch.float32]) * size)

    def _leaving(self, examples: list[int]) -> Iterator[tuple[int, list[int]]]:
        """What is written to these prompts, as they come to their ends: whenever a part of them has, the others go on without."""
        given, start = self._inputs(examples)
        if self._both:
            given["encoder_outputs"] = BaseModelOutput(self._encode(given))
        last = start + self._new_tokens
        while examples:
            ended = Ended(self._stop)
            found = self._generate(examples, given, start, stopping_criteria=StoppingCriteriaList([ended]))
            rows, over = found.sequences, ended.rows | (found.sequences.shape[1] >= last)
            for row in over.nonzero().flatten().tolist():
                yield examples[row], rows[row, start:].tolist()
            left = (~over).nonzero().flatten()
            examples = [examples[row] for row in left.tolist()]
            given = self._going_on(given, found.past_key_values, rows, left)

    def _encode(self, given: dict[str, Any]) -> Tensor:
        """The encoder's states (rows, tokens, width), on a CPU worked out a few rows at a time, longest first; pads are zeros."""
        ids, mask = given["input_ids"], given["attention_mask"]
        lengths = mask.sum(dim=1).clamp(min=1).tolist()
        found, start = [], 0
        while start < len(ids):
            few = len(ids) if ids.is_cuda else max(1, ENCODED // lengths[start])
            rows, longest = slice(start, start + few), max(lengths[start : start + few])
            with torch.inference_mode():
                states = self._reader.model.get_encoder()(input_ids=ids[rows, :longest], attention_mask=mask[rows, :longest])
            found.append(torch.nn.functional.pad(states.last_hidden_state, (0, 0, 0, ids.shape[1] - longest)))
            start += few
        return torch.cat(found)

    def _going_on(self, given: dict[str, Any], cache: Any, rows: Tensor, left: Tensor) -> dict[str, Any]:
        """The inputs with which the rows that are left are continued where they are."""
        if cache is not None:
            cache.batch_select_indices(left)
        mask = given["attention_mask"][left]
        written = mask.new_ones(len(left), rows.shape[1] - (0 if self._both else mask.shape[1]))
        if not self._both:
            return {"input_ids": rows[left], "attention_mask": torch.cat([mask, written], dim=1), "past_key_values": cache}
        return {
            "input_ids": given["input_ids"][left], "attention_mask": mask, "past_key_values": cache,
            "encoder_outputs": BaseModelOutput(given["encoder_outputs"].last_hidden_state[left]),
            "decoder_input_ids": rows[left], "decoder_attention_mask": written,
        }  # fmt: skip

    def _rows(self, examples: list[int], scores: bool = False) -> tuple[list[list[int]], tuple[Tensor, ...]]:
        """What is written to these prompts, up to the longest's end; the scores (rows, vocabulary) of each step where they are wanted."""
        given, start = self._inputs(examples)
        found = self._generate(examples, given, start, output_scores=scores)
        return found.sequences[:, start:].tolist(), found.scores or ()

    def _inputs(self, examples: list[int]) -> tuple[dict[str, Any], int]:
        """The prompts as a batch, and how many tokens stand before the first that is written."""
        inputs = self._reader.batch([self._encoded[i] for i in examples], left=not self._both)
        return inputs, 1 if self._both else inputs["input_ids"].shape[1]

    def _generate(self, examples: list[int], given: dict[str, Any], start: int, **wanted: Any) -> Any:
        """transformers' generation of the tokens that are yet to be written."""
        drawing = None if self._warpers is None else LogitsProcessorList([*self._warpers, GumbelNoise(self._seed, examples, start)])
        least = self._reader.model.generation_config.min_new_tokens  # transformers counts them from where a continuation begins
        before = given.get("decoder_input_ids", given["input_ids"]).shape[1] if "past_key_values" in given else start
        with torch.inference_mode():
            return self._reader.model.generate(
                **given, **wanted, **self._settings, max_new_tokens=start + self._new_tokens - before, do_sample=False,
                min_new_tokens=least and max(0, least - (before - start)),
                logits_processor=drawing, pad_token_id=self._reader.tokenizer.pad_token_id, return_dict_in_generate=True,
            )  # fmt: skip

    def _until_end(self, tokens: list[int]) -> list[int]:
        return tokens[: next((index for index, token in enumerate(tokens) if token in self._stop), len(tokens))]


def _warpers(usual: GenerationConfig, settings: dict[str, Any]) -> list[LogitsProcessor]:
    """What the settings, or else the model's own generation config, bend its distributions by."""
    wanted = ((kind, settings.get(name) or getattr(usual, name), neutral) for name, (kind, neutral) in WARPERS.items())
    return [kind(value) for kind, value, neutral in wanted if value not in (None, neutral)]
