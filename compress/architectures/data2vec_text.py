"""data2vec on text: RoBERTa, taught otherwise."""

from compress.architectures import Architecture

ARCHITECTURE = Architecture(behind=True)
