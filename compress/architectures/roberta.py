"""RoBERTa: BERT with places for positions that no token gets, and a classifier of two layers."""

from dataclasses import replace

from compress.architectures.bert import ARCHITECTURE as BERT

ARCHITECTURE = replace(BERT, shape=None, tasks=(), behind=True)
