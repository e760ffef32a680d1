"""Qwen3: built as Llama is, with norms of queries and keys."""

from compress.architectures.llama import ARCHITECTURE

__all__ = ["ARCHITECTURE"]
