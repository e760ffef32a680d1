"""CamemBERT: RoBERTa in French."""

from compress.architectures import roberta

ARCHITECTURE = roberta.ARCHITECTURE
