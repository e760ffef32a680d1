"""mT5: T5 in many languages."""

from compress.architectures.t5 import ARCHITECTURE

__all__ = ["ARCHITECTURE"]
