"""What a compression method is, and how one is found.

The folder is the registry: `quantize: bnb_nf4` in a recipe is the file compress/quantize/bnb_nf4.py. A file whose name
starts with an underscore is shared by the methods of its folder and is none itself. A method file has

    the docstring     what it does, the paper, what it needs; its first line is shown by `compress methods`
    ABOUT             an `About`: what must hold before anything is loaded
    Settings          a child of `Settings`: the keys a recipe may give, unknown ones refused
    apply             (bundle, settings, context) -> bundle, and no other way to change a model

and imports torch and its backend inside its functions, because recipes are validated where neither is installed.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic import BaseModel, ConfigDict

from compress.errors import MissingPackage

if TYPE_CHECKING:
    from compress.model import Bundle

FAMILIES = ("quantize",)


class Settings(BaseModel):
    """A strict, frozen block of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


@dataclass(frozen=True)
class About:
    """What a method needs and promises.

    at_run_time  what happens at every step of the model it makes; told to people whose model got no faster
    packages  distributions that must be installed
    extra     the extra of this package that installs them; None where the plain install has them
    devices   where the method itself can run
    packs     its output is packed, so no stage may follow
    smaller   it promises that the weights take fewer bytes than before
    """

    at_run_time: str
    packages: tuple[str, ...] = ()
    extra: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    packs: bool = False
    smaller: bool = True

    def missing(self) -> list[str]:
        """The packages that aren't installed here. Looks at metadata only; nothing is imported."""
        return [name for name in self.packages if not _installed(name)]


@dataclass(frozen=True)
class Context:
    """What a stage may use besides the model."""

    device: str
    progress: Callable[[str, int, int], None]  # what, done, total


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


def require(family: str, name: str) -> Method:
    """The method, its packages being there.

    Raises MissingPackage with the line that installs them.
    """
    method = find(family, name)
    if missing := method.ABOUT.missing():
        line = f"pip install 'compress[{method.ABOUT.extra}]'" if method.ABOUT.extra else f"pip install {' '.join(missing)}"
        raise MissingPackage(f"{family}: {name} needs {', '.join(missing)}, not installed here. Install with: {line}")
    return method


def source(method: Method) -> bytes:
    """The method's own code, which is part of what its output depends on."""
    return Path(cast(ModuleType, method).__file__ or "").read_bytes()


def _installed(name: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
