"""How a model reads: the likelihood of texts, their divergence from an original's, and labels, batch by batch."""

from typing import TYPE_CHECKING, Any

import torch

from compress.engines import Piece
from compress.engines.transformers.batching import Batches
from compress.scores import Likelihood
from compress.structure import decoder_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AT_ONCE = 256  # tokens whose distributions are compared together; one over 150,000 tokens takes 600 kB, several times


def padded(tokenizer: "PreTrainedTokenizerBase", rows: list[list[int]], device: torch.device, left: bool = False) -> Any:
    """Rows of ids as padded tensors."""
    tokenizer.padding_side = "left" if left else "right"
    return tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(device)


def likelihoods(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", pieces: list[Piece], batches: Batches,
    original: "PreTrainedModel | None" = None,
) -> list[Likelihood]:  # fmt: skip
    """The likelihood of each piece; `original` is the model from which this one diverges."""
    both = model.config.is_encoder_decoder
    rows = [Likelihood()] * len(pieces)

    def work(batch: list[int]) -> None:
        inputs = padded(tokenizer, [pieces[i].ids for i in batch], model.device)
        labels = _labels([pieces[i].labels for i in batch]).to(model.device)
        if both:
            inputs["decoder_input_ids"] = decoder_inputs(model, labels)
        else:
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        with torch.no_grad():
            ours = model(**inputs).logits
            theirs = ours if original is None else original(**inputs).logits
            computed = [
                _likelihood(ours[row][real], theirs[row][real], label[real], pieces[i].begins)
                for row, (i, label) in enumerate(zip(batch, labels, strict=True))
                for real in [label != -100]
            ]
        for index, likelihood in zip(batch, computed, strict=True):  # all of a batch or, where memory ran out, nothing
            rows[index] = likelihood

    batches.each([len(piece.ids) + (len(piece.labels) if both else 0) for piece in pieces], work, "reading")
    return rows


def _likelihood(ours: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor, begins: bool) -> Likelihood:
    """The likelihood of labels (tokens,) by logits (tokens, vocabulary).

    theirs   the original's logits; of two vocabularies the shorter counts
    begins   whether the first label is the first of its text
    """
    nats = torch.nn.functional.cross_entropy(ours.float(), labels, reduction="none").double().sum().item()
    if theirs is ours:
        return Likelihood(nats, len(labels), equal=len(labels))
    size = min(ours.shape[-1], theirs.shape[-1])
    parts = zip(ours[:, :size].split(AT_ONCE), theirs[:, :size].split(AT_ONCE), strict=True)  # type: ignore[no-untyped-call]
    compared = [_divergence(*part) for part in parts]
    divergence = torch.cat([apart for apart, _ in compared])
    first = divergence[0].item() if begins and len(labels) else 0.0
    return Likelihood(nats, len(labels), divergence.sum().item(), sum(equal for _, equal in compared), first)


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Of logits (tokens, vocabulary): each token's divergence, float64 (tokens,), and at how many tokens both have the same top choice."""
    q, p = ours.float().log_softmax(dim=-1), theirs.float().log_softmax(dim=-1)
    shares = p.exp()
    divergence = torch.where(shares > 0, shares * (p - q), 0).sum(dim=-1, dtype=torch.float64)
    return divergence, (p.argmax(dim=-1) == q.argmax(dim=-1)).sum().item()


def classify(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", encoded: list[list[int]], batches: Batches
) -> list[int | None]:  # fmt: skip
    """The label that the model gives each input; None where its scores are NaN."""
    labels: list[int | None] = [None] * len(encoded)

    def work(batch: list[int]) -> None:
        inputs = padded(tokenizer, [encoded[i] for i in batch], model.device)
        with torch.no_grad():
            logits = model(**inputs).logits
        best, broken = logits.argmax(dim=-1).tolist(), logits.isnan().any(dim=-1).tolist()
        for index, label, none in zip(batch, best, broken, strict=True):
            labels[index] = None if none else label

    batches.each([len(row) for row in encoded], work, "classifying")
    return labels


def _labels(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-100] * (width - len(row)) for row in rows])
