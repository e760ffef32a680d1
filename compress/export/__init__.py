"""Formats that engines read, each a file: a model is carried over as it is, packed weights with their own integers."""
