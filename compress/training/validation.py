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
def lost(model: "PreTrainedModel", rows: list[Row], numbers: list[int], size: int, loss: Loss, needs_targets: bool) -> float:
    """The loss a position over some of the rows. Raises RunError where it is not finite."""
    total, count = 0.0, 0
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        batch = batch_of(model, [rows[number] for number in part], part, needs_targets)
        batch_loss = loss(model, batch).item()
        if not math.isfinite(batch_loss):
            ids = ", ".join(rows[number][0].id for number in part)
            raise RunError(f"early_stopping: the loss became {batch_loss} on the examples {ids} of the validation split; look at these")
        total, count = total + batch_loss, count + int((batch.labels != IGNORED).sum())
    return total / count


def rouge_of(model: "PreTrainedModel", material: Material, numbers: list[int], size: int) -> float:
    """ROUGE-L in points of what a model writes greedily, as many tokens as the longest target has, over some of the rows.

    Raises RunError where no target has a letter.
    """
    all_rows = material.rows
    rows = sorted((all_rows[number] for number in numbers), key=lambda row: len(row[1]))
    longest, texts = max(len(answer) for _, _, answer in rows), list[str]()
    room = context_length(model.config, material.tokenizer) or math.inf
    for start in range(0, len(rows), size):
        prompts = [prompt_of(model, row) for row in rows[start : start + size]]
        taken = 1 if model.config.is_encoder_decoder else max(map(len, prompts))
        answers = write(model, prompts, max(1, int(min(longest, room - taken))), num_beams=1, temperature=None)
        texts += [material.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    references = [example.references for example, _, _ in rows]
    scores = rouge(texts, references, choose(Tokenizers(), references).rouge)["rougeL"]
    figures = [row[0] for row in scores if isinstance(row, list)]
    if not figures:
        raise RunError("early_stopping: ROUGE-L finds no letter in the validation split's targets; take the loss, metric: loss")
    return sum(figures) / len(figures)
