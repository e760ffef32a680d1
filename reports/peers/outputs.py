"""How far a model has moved from the uncompressed one: a decoder by its next-token distributions, an encoder by its sentence embeddings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel


class Original(Protocol):
    """The uncompressed model's outputs on test rows, from which others' are measured.

    about  the model and the test texts in a line, for the table's head
    """

    model: PreTrainedModel
    about: str

    def figures(self) -> dict[str, float]:
        """Of the model with the weights that it now has: `divergence` is the mean, `median` and `worst` are of rows' means."""
        ...


class Decoder:
    """Mean divergence of the original's next-token distributions from the model's, in nats a token."""

    def __init__(self, folder: Path, rows: list[list[int]]):
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._rows = rows
        self._reference = [_logs(self.model, row) for row in rows]
        losses = self._losses()
        self.about = f"uncompressed perplexity {losses.perplexity:.4f} on {len(rows)} texts, {len(losses.row):,} tokens"

    def figures(self) -> dict[str, float]:
        """`first` and `rest` are the divergence at rows' first positions and all others."""
        losses = self._losses()
        return {
            "perplexity": losses.perplexity,
            "divergence": float(losses.divergence.mean()),
            "first": float(losses.divergence[losses.first].mean()),
            "rest": float(losses.divergence[~losses.first].mean()),
            "equal_top": float(losses.top.double().mean()),
        } | _spread(losses.divergence, losses.row)

    def _losses(self) -> "Losses":
        """Of each row every token but the first is predicted from those before it."""
        likelihood, divergence, top = [], [], []
        for row, reference in zip(self._rows, self._reference, strict=True):
            logs = _logs(self.model, row)
            likelihood.append(-logs.gather(1, torch.tensor(row[1:])[:, None])[:, 0].double())
            divergence.append((reference.exp() * (reference - logs)).double().sum(dim=1))
            top.append(reference.argmax(dim=1) == logs.argmax(dim=1))
        lengths = torch.tensor([len(row) - 1 for row in self._rows])
        first = torch.zeros(int(lengths.sum()), dtype=torch.bool)
        first[lengths.cumsum(0) - lengths] = True
        row = torch.arange(len(self._rows)).repeat_interleave(lengths)
        return Losses(torch.cat(likelihood), torch.cat(divergence), torch.cat(top), first, row)


@dataclass(frozen=True)
class Losses:
    """What each token of the test rows lost; nats, (tokens,), and to which row it belongs.

    likelihood  its negative log-likelihood.
    divergence  of the original's distribution from the model's.
    top         whether both have the same likeliest token.
    first       whether it is predicted from only a row's first token.
    """

    likelihood: Tensor
    divergence: Tensor
    top: Tensor
    first: Tensor
    row: Tensor

    @property
    def perplexity(self) -> float:
        return float(self.likelihood.mean().exp())


class Encoder:
    """Mean distance (one less the cosine) of a text's embedding, its last hidden states' mean, from the original's.

    The tools get the encoder in a classifier, since not all take a bare one; its head, drawn at random, is not looked at.
    """

    def __init__(self, folder: Path, rows: list[list[int]]):
        self.model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self._rows = rows
        self._reference = self._embeddings()
        self.about = f"an encoder, {len(rows)} texts of {sum(map(len, rows)):,} tokens"

    def figures(self) -> dict[str, float]:
        distance = 1 - torch.cosine_similarity(self._embeddings().double(), self._reference.double())
        return {"divergence": float(distance.mean())} | _spread(distance, torch.arange(len(distance)))

    def _embeddings(self) -> Tensor:
        return torch.stack([self.model.base_model(torch.tensor([row])).last_hidden_state[0].mean(dim=0) for row in self._rows])


def put(model: PreTrainedModel, file: Path) -> None:
    """Give a model the weights of a file, which must be those of all its blocks' linear layers and no others."""
    weights = load_file(file)
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = {f"{name}.weight" for name in linear if any(name.startswith(f"{stack}.") for stack in stacks)}
    assert weights.keys() == inside, "other layers than the blocks' linear ones were quantised"
    model.load_state_dict(weights, strict=False)


def _logs(model: PreTrainedModel, row: list[int]) -> Tensor:
    return model(torch.tensor([row])).logits[0, :-1].log_softmax(dim=-1)


def _spread(values: Tensor, row: Tensor) -> dict[str, float]:
    rows = pd.Series(values).groupby(row.numpy()).mean()
    return {"median": float(rows.median()), "worst": float(rows.max())}
