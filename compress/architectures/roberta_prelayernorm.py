"""RoBERTa with norms before its layers."""

from compress.architectures import Architecture

ARCHITECTURE = Architecture(behind=True)
