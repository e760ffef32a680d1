"""What differs between types of model: a file each, named as transformers names the type. One without a file is treated as most are."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from compress.errors import ModelError
from compress.shape import Config, Shape

WIDTH, HEADS, CHANNELS = "width", "heads", "channels"
DIMENSIONS = (WIDTH, HEADS, CHANNELS)


@dataclass(frozen=True)
class Axis:
    """An axis of a weight that counts units of a dimension, so many times over: queries of all heads, then keys, then values."""

    dimension: str
    copies: int = 1


HIDDEN, HEAD, CHANNEL = Axis(WIDTH), Axis(HEADS), Axis(CHANNELS)
Axes = tuple[Axis | None, ...]  # None for tokens, positions and labels


@dataclass(frozen=True)
class Architecture:
    """A type of model.

    shape    adds up the weights that transformers makes of a config.json for one of the `tasks`; None where they can't be foretold
    endless  its positions set no bound on the tokens of an input, whatever its config says
    behind   its positions begin behind the index of the padding token: no token gets that one or one before it
    wide     its hidden size can be cut on its own: nothing depends on it but the model's weights and norms
    layers   what the outputs and inputs of each kind of layer count, by a regular expression for the end of its name; the first that
             matches holds. Stated where the config ties the number of heads to the hidden size: changing one of them shows neither.
    alike    plain transformers reads its packed weights only where all layers are packed alike: it looks at them while the model is built
    """

    tasks: tuple[str, ...] = ()
    shape: Callable[[Config, str], Shape] | None = None
    endless: bool = False
    behind: bool = False
    wide: bool = False
    layers: Mapping[str, Axes] | None = None
    alike: bool = False


WRITES, LABELS = ("seq2seq", "sequence-classification"), ("causal-lm", "sequence-classification")


def of(kind: str) -> Architecture:
    """What is particular to a `model_type`."""
    name = kind.replace("-", "_")
    if not name.isidentifier() or importlib.util.find_spec(f"{__name__}.{name}") is None:
        return Architecture()
    architecture: Architecture = importlib.import_module(f"{__name__}.{name}").ARCHITECTURE
    return architecture


def shaped() -> dict[str, Architecture]:
    """The types whose shape follows from their config, by name."""
    types = {module.name: of(module.name) for module in pkgutil.iter_modules(__path__)}
    return {name: architecture for name, architecture in types.items() if architecture.shape is not None}


def read(config: Config, task: str) -> Shape:
    """The shape that a config.json describes when it serves a task.

    Raises ModelError for a type or task that isn't supported, and for a config that lacks a number.
    """
    kind = str(config.get("model_type"))
    architecture = of(kind)
    if architecture.shape is None:
        raise ModelError(f"model_type {kind!r}: its sizes can't be told from its config; supported: {', '.join(shaped())}")
    if task not in architecture.tasks:
        raise ModelError(f"model_type {kind!r} isn't known here with task {task}; known with it are {', '.join(architecture.tasks)}")
    try:
        return architecture.shape(config, task)
    except KeyError as error:
        raise ModelError(f"the config.json of a {kind} has to give {error}, and this one doesn't") from None
    except (TypeError, ZeroDivisionError) as error:
        raise ModelError(f"the config.json of this {kind} holds something that is no size: {error}") from None
