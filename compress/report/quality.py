"""What there is to say of how the examples were answered, in a sentence each."""

from collections.abc import Sequence

from compress.benchmark.statistics import mcnemar
from compress.report.verdict import Pair
from compress.results import Side


def notes(sides: Sequence[Side], compared: Sequence[Pair]) -> list[str]:
    """What the sides said themselves, and for right and wrong answers McNemar's test."""
    said = [f"{side.role.capitalize()}: {sentence}." for side in sides for sentence in side.said]
    return said + [_discordant(pair) for pair in compared if pair.ours.metric == "accuracy"]


def _discordant(pair: Pair) -> str:
    lost, won, p = mcnemar(pair.theirs.samples, pair.ours.samples)
    return f"{lost} labels are right with the baseline alone, {won} with the candidate alone: p = {p:.3g} by McNemar's exact test."
