"""MPNet: RoBERTa with a bias of positions, too."""

from compress.architectures import Architecture

ARCHITECTURE = Architecture(behind=True)
