"""X-MOD: RoBERTa with adapters by language."""

from compress.architectures import Architecture

ARCHITECTURE = Architecture(behind=True)
