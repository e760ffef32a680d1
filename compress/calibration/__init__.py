"""The calibration pass that quantisation and pruning share: a model gone through block by block on examples of its own task."""
