"""Qwen2: built as Llama is, with biases of queries, keys and values."""

from compress.architectures.llama import ARCHITECTURE

__all__ = ["ARCHITECTURE"]
