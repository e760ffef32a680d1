"""What is learned from: the examples as rows, some of them as a batch, and the label of each position."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from compress.calibration.stream import Inputs, Row, encoded, padded
from compress.methods import Context
from compress.structure import label_number, labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # the label of a position that counts for nothing


@dataclass(frozen=True)
class Material:
    """The examples to learn from, and those of the validation split, that early stopping looks at."""

    train: list[Row]
    validation: list[Row]
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def rows(self) -> list[Row]:
        return [*self.train, *self.validation]


def read(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", context: Context) -> Material:
    """The examples that a context has. Raises what `calibration.stream.encoded` raises."""
    train = encoded(model, tokenizer, context)
    return Material(
        train, encoded(model, tokenizer, replace(context, examples=context.validation)) if context.validation else [], tokenizer
    )


@dataclass(frozen=True)
class Batch:
    """What a loss is worked out on.

    inputs   what the model is called with.
    labels   the token that each position of the logits should predict, `IGNORED` where it counts for nothing; of a classifier one label an
             example.
    numbers  the examples' places among the rows of the `Material`.
    """

    inputs: Inputs
    labels: Tensor
    numbers: list[int]

    @property
    def targets(self) -> Tensor:
        """The labels of the positions that count."""
        return self.labels[self.labels != IGNORED]

    def counted(self, logits: Tensor) -> Tensor:
        """Logits in float32 of the positions that count, (positions, vocabulary); a classifier's all, (examples, labels)."""
        return logits[self.labels != IGNORED].float()

    def logits_of(self, model: Any) -> Tensor:
        """A model's logits as `counted` gives them. The head is run on as few others as can be: prompts may be many times the targets."""
        if self.labels.ndim == 1 or not _can_leave_out(type(getattr(model, "module", model)).forward):
            return self.counted(model(**self.inputs).logits)
        real = self.labels != IGNORED
        places = real.any(dim=0).nonzero()[:, 0]
        logits: Tensor = model(**self.inputs, logits_to_keep=places).logits
        return logits[real[:, places]].float()


Loss = Callable[[Any, Batch], Tensor]  # model, batch -> the loss summed over the positions that count


def batch_of(model: "PreTrainedModel", rows: list[Row], numbers: list[int], needs_targets: bool) -> Batch:
    """Rows as a batch on the model's device."""
    inputs = padded(model, [(ids, answer) for _, ids, answer in rows])
    return Batch(inputs, labels(model, inputs, rows, needs_targets), numbers)


def labels(model: "PreTrainedModel", inputs: Inputs, rows: list[Row], needs_targets: bool = True) -> Tensor:
    """The token that each position of the logits should predict, `IGNORED` where it counts for nothing; for classifiers the label."""
    if not model.can_generate() and not needs_targets:  # any label will do to say that the position counts
        return torch.zeros(len(rows), dtype=torch.long, device=model.device)
    if not model.can_generate():
        names = labels_of(model.config)
        return torch.tensor([label_number(names, (example.references or [""])[0]) for example, _, _ in rows], device=model.device)
    both = model.config.is_encoder_decoder
    token_labels = torch.full_like(inputs["decoder_input_ids" if both else "input_ids"], IGNORED)
    for row, (_, ids, answer) in zip(token_labels, rows, strict=True):
        if both:
            row[: len(answer)] = torch.tensor(answer)
        else:  # position n gives token n + 1; plain texts are learned whole
            start = max(len(ids) - len(answer), 1) if answer else 1
            row[start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
    return token_labels


def targets_loss(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy with the targets, summed over the positions that count."""
    return cross_entropy(batch.logits_of(model), batch.targets, reduction="sum")


@cache
def _can_leave_out(forward: Callable[..., Any]) -> bool:
    """Whether a model can be told which positions need logits."""
    return "logits_to_keep" in inspect.signature(forward).parameters
