"""How a model does on the validation split: the loss, or ROUGE-L of what it writes."""

import math
from typing import TYPE_CHECKING

import torch

from compress.calibration.stream import Row
from compress.errors import RunError
from compress.scores import rouge
from compress.scripts import Tokenizers, choose
from compress.structure import context_length
from compress.training.material import IGNORED, Loss, Material, batch_of
from compress.writing import prompt_of, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def lost(model: "PreTrainedModel", rows: list[Row], numbers: list[int], size: int, loss: Loss, known: bool) -> float:
    """The loss a position over some of the rows. Raises RunError where it is no number."""
    total, count = 0.0, 0
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        batch = batch_of(model, [rows[number] for number in part], part, known)
        found = loss(model, batch).item()
        if not math.isfinite(found):
            ids = ", ".join(rows[number][0].id for number in part)
            raise RunError(f"early_stopping: the loss became {found} on the examples {ids} of the validation split; look at these")
        total, count = total + found, count + int((batch.wanted != IGNORED).sum())
    return total / count


def rouge_of(model: "PreTrainedModel", material: Material, numbers: list[int], size: int) -> float:
    """ROUGE-L in points of what a model writes greedily, as many tokens as the longest target has, over some of the rows.

    Raises RunError where no target has a letter.
    """
    every = material.rows
    rows = sorted((every[number] for number in numbers), key=lambda row: len(row[1]))
    longest, said = max(len(answer) for _, _, answer in rows), list[str]()
    room = context_length(model.config, material.tokenizer) or math.inf
    for start in range(0, len(rows), size):
        prompts = [prompt_of(model, row) for row in rows[start : start + size]]
        taken = 1 if model.config.is_encoder_decoder else max(map(len, prompts))
        found = write(model, prompts, max(1, int(min(longest, room - taken))), num_beams=1, temperature=None)
        said += [material.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found]
    references = [example.references for example, _, _ in rows]
    scores = rouge(said, references, choose(Tokenizers(), references).rouge)["rougeL"]
    there = [row[0] for row in scores if isinstance(row, list)]
    if not there:
        raise RunError("early_stopping: ROUGE-L finds no letter in the validation split's targets; take the loss, metric: loss")
    return sum(there) / len(there)
