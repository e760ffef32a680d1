"""Plain transformers on torch, eager or with compiled steps: every artifact is first measured here."""

from typing import TYPE_CHECKING

from compress.engines import About
from compress.methods import Settings as _Settings

if TYPE_CHECKING:
    from compress.engines import Engine, Opening

ABOUT = About(reads="Hugging Face folders, packed by any method of this package")


class Settings(_Settings):
    """None: benchmark.runtime has the settings of this engine."""


def make(opening: "Opening", batch_tokens: int | None = None) -> "Engine":
    from compress.engines.transformers.engine import Transformers

    return Transformers(opening, batch_tokens)
