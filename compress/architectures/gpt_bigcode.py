"""GPTBigCode: StarCoder, and what GPT-2 becomes once its layers are linear ones."""

from compress.architectures import Architecture

ARCHITECTURE = Architecture(alike=True)
