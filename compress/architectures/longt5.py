"""LongT5: T5 whose encoder attends to what is near, or to blocks."""

from dataclasses import replace

from compress.architectures.t5 import ARCHITECTURE as T5

ARCHITECTURE = replace(T5, shape=None, wide=False)
