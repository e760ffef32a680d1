"""Weights are trained on the recipe's targets, to recover what earlier stages lost or to learn the task. One file a method."""
