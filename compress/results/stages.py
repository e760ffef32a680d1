"""Records of what stages did to a model."""

from typing import Any

from pydantic import Field

from compress.results.record import Record

NOTES = "compress_notes.json"  # in an artifact: what a stage did to each layer, and its remarks


class Layer(Record):
    """What a stage did to one layer.

    bits      of a weight; None where the layer stays in full precision, and `remark` then says why
    error     how far the layer's output changes, mean square over the calibration tokens, as a share of the output's; None if not measured
    sparsity  the share of its weights that are zero; None where that was not the aim
    """

    name: str
    bits: int | None = None
    error: float | None = None
    sparsity: float | None = None
    remark: str | None = None


class Point(Record):
    """A point of a training curve; a figure is None where it was not taken there.

    step           steps done
    tokens         read by then, without padding
    loss           the method's own, nats a position for cross-entropy; the mean since the point before
    learning_rate, grad_norm
    validation     the figure for early stopping: loss, or ROUGE-L in points
    """

    step: int
    tokens: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    validation: float | None = None


class Cut(Record):
    """How many prompts were longer than their limit.

    where   evaluation, or the stage's name
    limit   in tokens
    key     the recipe's key for the limit; None where it is the model's own context
    """

    where: str
    cut: int
    all: int
    limit: int
    key: str | None

    @property
    def share(self) -> float:
        return self.cut / self.all if self.all else 0.0

    @property
    def sentence(self) -> str:
        more = f", more of which {self.key} lets in" if self.key else ", which is the model's context"
        return f"{self.cut:,} of the {self.all:,} prompts of {self.where} ({self.share:.1%}) were cut to {self.limit:,} tokens{more}"


class Account(Record):
    """What became of a model's parameters in a stage, each counted once.

    worked      in layers that the stage worked on; if it trains or removes parts, all that it changed or removed
    heads       unchanged ones that map the last hidden state to tokens or labels
    routers     unchanged ones that send tokens to the experts of a mixture
    vectors     of one dimension: norms and biases
    asked       left out as the recipe says
    left_out    matrices left out for another reason, which the layers' remarks give
    """

    worked: int = 0
    heads: int = 0
    embeddings: int = 0
    routers: int = 0
    vectors: int = 0
    asked: int = 0
    left_out: int = 0

    @property
    def share(self) -> float:
        """The share that was worked on of what was to be; 1 where there was nothing to do."""
        return self.worked / (self.worked + self.left_out) if self.worked + self.left_out else 1.0

    @property
    def sentence(self) -> str:
        """78.9% of 134,515,008 parameters were worked on; 21.0% are embeddings, 0.1% are norms and biases"""
        total = sum(getattr(self, name) for name in Account.model_fields)
        words = {
            "embeddings": "embeddings",
            "heads": "heads",
            "routers": "routers",
            "vectors": "norms and biases",
            "asked": "left out as asked",
            "left_out": "left out",
        }
        others = [f"{getattr(self, name) / total:.1%} are {word}" for name, word in words.items() if getattr(self, name)]
        return f"{self.worked / total:.1%} of {total:,} parameters were worked on; " + ", ".join(others)


class StageRecord(Record):
    """What one stage did, as read from the saved artifact. `said` are its remarks."""

    stage: dict[str, Any]
    artifact: str
    seconds: float
    reused: bool
    layers: list[Layer] = Field([], repr=False)
    account: Account | None = None
    said: list[str] = Field([])
    curve: list[Point] = Field([], repr=False)
    cut: Cut | None = None

    @property
    def sentences(self) -> list[str]:
        """The account, where there is one, and the stage's remarks."""
        return [*([self.account.sentence] if self.account else []), *self.said]

    @property
    def name(self) -> str:
        """quantize: gptq"""
        return ": ".join(map(str, next(iter(self.stage.items()))))
