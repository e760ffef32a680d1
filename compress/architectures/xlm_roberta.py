"""XLM-RoBERTa: RoBERTa in a hundred languages."""

from compress.architectures import roberta

ARCHITECTURE = roberta.ARCHITECTURE
