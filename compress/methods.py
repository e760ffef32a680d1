"""What a compression method is, and where they are.

The folder is the registry: `quantize: bnb_nf4` in a recipe is the file compress/quantize/bnb_nf4.py. A file whose name
starts with an underscore is shared by the methods of its folder and is no method itself. A method file has

    the docstring     what it does, the paper, what it needs; its first line is shown by `compress methods`
    ABOUT             an `About`: what must hold before anything is loaded
    Settings          a child of `Settings`: the keys a recipe may give, unknown ones refused
    apply             (bundle, settings, context) -> bundle, and no other way to change a model

and imports torch and its backend inside its functions, since recipes are validated where neither is installed.
"""

import hashlib
import importlib
import math
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import MissingPackage
from compress.extras import install_line
from compress.packages import lacking, versions

if TYPE_CHECKING:
    from compress.model.loading import Bundle
    from compress.model.source import Source

Task = Literal["seq2seq", "causal-lm", "sequence-classification"]
TASKS: tuple[Task, ...] = get_args(Task)
LEFT_OUT = "left out: "  # begins the remark on a layer that stays as it was; behind it stands why
HEAD = "a head"
ASKED = ("named under ignore", "no pattern of bits names it", "its shape did not change")  # reasons that are the recipe's
FAMILIES = ("quantize", "prune", "finetune", "distill", "export")
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
TUNE_BATCH = 8  # examples a step, where quantised layers are tuned end to end


class Settings(BaseModel):
    """A strict, frozen block of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)

    def why_not_first(self) -> str | None:
        """Why a stage with these settings can't be the first of a recipe; None where it can."""
        return None

    def why_not_behind(self, stage: str, before: "Settings", columns: Collection[int] = ()) -> str | None:
        """Why a stage with these settings can't follow `stage`, whose settings are `before`; None where it can.

        columns   of the model's layers, as far as its config tells
        """
        return None

    def readers(self) -> dict[str, str]:
        """Packages that transformers needs to read the artifact, besides the method's own, and the extra that installs each."""
        return {}

    def needs(self) -> dict[str, str]:
        """Packages that these settings need besides the method's own, and the extra of this package that installs each."""
        return {}

    def models(self) -> "dict[str, OtherModel]":
        """Models that these settings name besides the stage's own, by the names that the method has for them (`Context.models`)."""
        return {}

    def needs_examples(self) -> bool:
        """Whether the method needs examples of the train split with these settings, though it needs none with others."""
        return False

    def about_shapes(self, weights: Mapping[int, int]) -> list[str]:
        """Remarks on these settings for layers of these shapes; `weights` has the number of weights by the columns of their layer."""
        return []

    def sharded(self) -> bool:
        """Whether the models are split over the stage's processes; if so they are loaded into main memory."""
        return False


class OtherModel(Settings):
    """A model besides the stage's own; it serves the recipe's task."""

    id: str = Field(min_length=1, description="hub id, folder (relative to the recipe), or builtin")
    dtype: Dtype = Field("auto", description="the dtype that it is loaded in; auto is the stored one")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    bits: Literal[4, 8] | None = Field(
        None, description="bits to hold its weights in while it is used, by bitsandbytes, to save memory; heads stay; null packs nothing"
    )


class LayerSettings(Settings):
    """Settings of every method that works on linear layers."""

    ignore: list[str] | None = Field(None, description="layers to leave out; null leaves out the heads")

    @property
    def why_ignored(self) -> str:
        """Why a layer that is ignored is."""
        return HEAD if self.ignore is None else ASKED[0]


class TrainSettings(Settings):
    """Settings of every method that trains, about its data, which is the train split."""

    samples: int | None = Field(None, ge=1, description="rows of the train split; null takes all")
    max_tokens: int = Field(512, ge=1, description="each example's longest input")
    seed: int = Field(0, ge=0, lt=2**32, description="draws the rows and their order")


class Optimisation(Settings):
    """How weights are trained: AdamW (Loshchilov and Hutter 2019) over the examples in random order."""

    learning_rate: float = Field(1e-4, gt=0, description="the highest, which the warmup ends at")
    batch_size: int = Field(8, ge=1, description="examples a step and process; a step takes batch_size x accumulate x processes")
    accumulate: int = Field(1, ge=1, description="batches whose gradients make one step; needs less memory than a larger batch")
    epochs: float | None = Field(None, gt=0, description="passes over the examples; 1 where steps isn't given either")
    steps: int | None = Field(None, ge=1, description="instead of epochs")
    warmup: float = Field(0.05, ge=0, lt=1, description="the share of the steps in which the learning rate rises from zero")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the learning rate falls after the warmup")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are shortened to this")

    @model_validator(mode="after")
    def _one_length(self) -> "Optimisation":
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"give either epochs or steps, not both; these are {self.epochs:g} and {self.steps}")
        return self


class EarlyStopping(Settings):
    """Training ends when the validation split has shown nothing better for a while, and the best weights are kept."""

    metric: Literal["loss", "rougeL"] = Field(
        "loss",
        description="the method's own loss on the split's targets, or ROUGE-L of what the model writes, greedy; rougeL is for"
        " `distill: sequence` and `on_policy`, whose texts aren't the targets",
    )
    every: int | None = Field(None, ge=1, description="steps between evaluations; null evaluates 20 times in all")
    patience: int = Field(3, ge=1, description="evaluations in a row without a better value after which training ends")
    samples: int | None = Field(200, ge=1, description="examples of the validation split, drawn with the seed; null takes all")


class TuneSettings(TrainSettings, Optimisation):
    """Settings of every method that trains the model for its purpose."""

    early_stopping: EarlyStopping | None = Field(None, description="null trains all steps; else data.splits.validation is needed")
    keep_zeros: bool = Field(True, description="weights of linear layers that are zero stay zero, as after pruning")


class ShardSettings(TuneSettings):
    """Settings of every method that can train a model too large for one GPU."""

    shard: bool = Field(
        False,
        description="weights, gradients and optimiser states of what is trained, and weights of the teacher, are split over the"
        " processes (FSDP); needs --processes",
    )

    def sharded(self) -> bool:
        return self.shard

    @model_validator(mode="after")
    def _by_loss(self) -> "ShardSettings":
        if self.shard and self.early_stopping is not None and self.early_stopping.metric != "loss":
            raise ValueError(
                f"shard: true, and early_stopping looks at {self.early_stopping.metric}, which needs generated text;"
                " a model that is split can't generate, use metric: loss"
            )
        return self


@dataclass(frozen=True)
class About:
    """What a method needs and promises.

    at_run_time  what its model does at every step; the report says so where the model got no smaller or faster
    slows     whether that can make a step longer than the original's
    packages  distributions that must be installed
    extra     the extra of this package that installs them; None where the plain install has them
    devices   where the method itself can run
    calibrated  it needs examples of the train split
    measured    its layers' errors are measured on a few of them, where there are any
    packs     its output is packed, so no stage may follow
    smaller   it promises that the weights take fewer bytes than before
    trains    it trains weights, in several processes together where these are asked for
    tasks     the tasks whose models it works on
    experts   it works on the experts of a mixture, each a matrix of its own
    holds     bits of a linear weight while plain transformers runs its model; None where they are as many as before
    """

    at_run_time: str
    slows: bool = False
    packages: tuple[str, ...] = ()
    extra: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    calibrated: bool = False
    measured: bool = False
    packs: bool = False
    smaller: bool = True
    trains: bool = False
    tasks: tuple[Task, ...] = TASKS
    experts: bool = False
    holds: int | None = None

    @property
    def install_line(self) -> str:
        """The line that installs the packages."""
        return install_line(self.extra) if self.extra else f"pip install {' '.join(self.packages)}"

    def missing(self) -> list[str]:
        """The packages that aren't installed here. Looks at metadata only; nothing is imported."""
        return lacking(self.packages)


@dataclass(frozen=True)
class Example:
    """One task for a model: complete `prompt` (references say how well), or read `prompt` as plain text (no references).

    content   first and end character of the part of the prompt that is cut when the whole is too long; None for all of it
    """

    id: str
    prompt: str
    references: list[str]
    content: tuple[int, int] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Context:
    """What a stage may use besides the model."""

    device: str
    progress: Callable[[str, int, int], None]  # what, done, total
    examples: list[Example] = field(default_factory=list)  # what a calibrated or training method may see
    max_tokens: int = 512  # each example's longest input
    chat: bool = False  # prompts are a user's turns
    models: "dict[str, Source]" = field(default_factory=dict)  # `original`, the recipe's model, and those that the settings name
    scratch: Path | None = None  # a folder that outlives a kill, for checkpoints; the same one when the same stage is run again
    validation: list[Example] = field(default_factory=list)  # what early stopping evaluates
    cache: Path | None = None  # a folder that runs share, for what is expensive to compute
    processes: int = 1  # how many do the stage together, each with a context of its own
    rank: int = 0  # which of them this is; only what the first says and makes counts
    said: list[str] = field(default_factory=list)  # for the report, by `say`
    cut: list[dict[str, int | bool]] = field(default_factory=list)  # for the report: each reading's `cut` prompts of `all`, the `limit`
    layers: list[dict[str, Any]] = field(default_factory=list)  # for the report, by `note` and `leave_out`
    curve: list[dict[str, float | int | None]] = field(default_factory=list)  # for the report: training, step by step
    remarks: dict[str, str] = field(default_factory=dict)  # for the report: what is odd about a layer

    def note(self, name: str, bits: int, error: float | None = None, sparsity: float | None = None) -> None:
        """A layer is stored in so many bits a weight.

        error     the share of its output that this changes on the calibration data
        sparsity  the share of its weights that are zero, where that was the aim
        """
        remark = self.remarks.get(name)
        if error is not None and not math.isfinite(error):
            error, remark = None, "; ".join(filter(None, [remark, "its error overflowed and could not be measured"]))
        self.layers.append({"name": name, "bits": bits, "error": error, "sparsity": sparsity, "remark": remark})

    def say(self, sentence: str) -> None:
        """Add a sentence about the stage as a whole to the report, unless it is there already."""
        if sentence not in self.said:
            self.said.append(sentence)

    def leave_out(self, name: str, why: str) -> None:
        """A layer stays as it was."""
        self.layers.append({"name": name, "bits": None, "error": None, "sparsity": None, "remark": f"{LEFT_OUT}{why}"})


class Method(Protocol):
    """The module of a method, as its users see it."""

    __doc__: str | None
    __name__: str
    ABOUT: About
    Settings: type[Settings]

    def apply(self, bundle: "Bundle", settings: Any, context: Context) -> "Bundle": ...


@cache
def names(family: str) -> tuple[str, ...]:
    """The methods of a family, by the files of its folder."""
    folder = Path(__file__).parent / family
    return tuple(sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_")))


def find(family: str, name: str) -> Method:
    """The method `family: name`. The caller has checked that `name` is one of `names(family)`."""
    return cast(Method, importlib.import_module(f"compress.{family}.{name}"))


def everyone() -> Iterator[tuple[str, str, Method]]:
    """Every method there is: family, name, module."""
    for family in FAMILIES:
        for name in names(family):
            yield family, name, find(family, name)


def require(family: str, name: str, settings: Settings) -> Method:
    """The method, whose packages and those of its settings are installed.

    Raises MissingPackage with the line that installs them.
    """
    method = find(family, name)
    line = ""
    if missing := method.ABOUT.missing():
        line = method.ABOUT.install_line
    elif missing := lacking(settings.needs()):
        line = install_line(*(settings.needs()[package] for package in missing))
    if missing:
        raise MissingPackage(f"{family}: {name} needs {', '.join(missing)}, not installed here. Install with: {line}")
    return method


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def made_with(method: Method) -> dict[str, str]:
    """What a method's output depends on besides model and settings: its code, and the versions of the libraries that it uses."""
    file, package = Path(cast(ModuleType, method).__file__ or ""), Path(__file__).parent
    shared = sorted(
        [
            *file.parent.glob("_*.py"),
            *(path for part in ("architectures", "calibration", "model", "training") for path in (package / part).glob("*.py")),
        ]
    )
    names = ("ao", "bnb", "decoding", "experts", "products", "prompts", "scores", "stage", "structure", "writing")
    code = [file, *shared, *(package / f"{name}.py" for name in names)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()
    return {"code": digest, **versions(("torch", "transformers", *method.ABOUT.packages))}
