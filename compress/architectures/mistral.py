"""Mistral: built as Llama is."""

from compress.architectures.llama import ARCHITECTURE

__all__ = ["ARCHITECTURE"]
