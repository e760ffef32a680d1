"""Longformer: RoBERTa whose attention has a window."""

from compress.architectures import Architecture

ARCHITECTURE = Architecture(behind=True)
