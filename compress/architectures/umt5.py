"""UMT5: T5 in many languages, each of whose blocks has a bias of positions of its own."""

from dataclasses import replace

from compress.architectures.t5 import ARCHITECTURE as T5

ARCHITECTURE = replace(T5, shape=None, wide=False)
