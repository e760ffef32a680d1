"""Examples that a side has no statistics of: which count as lost, how many are left out, and the notes on them."""

from collections.abc import Sequence

from compress.metrics import GROUPS, METRICS, Missing
from compress.results.sides import Measurement, Side

Rows = list[list[float]]
MOST = 0.05  # of the examples may be left out of a pass: fewer bias little, so the rule of thumb of trials (Schulz and Grimes, Lancet 2002)
NAMED = 5  # examples in a sentence


def together(theirs: Measurement, ours: Measurement) -> tuple[Rows, Rows]:
    """The statistics of the examples that both sides have, of as many on either side."""
    both = [(a, b) for a, b in zip(theirs.samples, ours.samples, strict=True) if isinstance(a, list) and isinstance(b, list)]
    return [a for a, _ in both], [b for _, b in both]


def lost(theirs: Measurement | None, ours: Measurement) -> dict[Missing, int]:
    """How many examples have no number of the candidate's, by what stands in its place, where the baseline has one or is missing."""
    before = theirs.samples if theirs is not None and len(theirs.samples) == len(ours.samples) else [[0.0]] * len(ours.samples)
    counts: dict[Missing, int] = {}
    for a, b in zip(before, ours.samples, strict=True):
        if isinstance(b, Missing) and b.is_broken and not (isinstance(a, Missing) and a.is_broken):
            counts[b] = counts.get(b, 0) + 1
    return counts


def notes(sides: Sequence[Side], ids: Sequence[str]) -> list[str]:
    """A sentence on each reason for which each side has no statistics, with the examples. `ids` are theirs, in order."""
    places: dict[tuple[str, Missing, tuple[int, ...]], dict[str, int]] = {}
    for side in sides:
        for m in side.measurements:
            if METRICS[m.metric].kind == "quality":
                for reason in dict.fromkeys(row for row in m.samples if isinstance(row, Missing)):
                    where = tuple(place for place, row in enumerate(m.samples) if row is reason)
                    places.setdefault((_group(m.metric), reason, where), {})[side.role] = len(m.samples)
    sentences = []
    for (group, reason, where), of in places.items():
        total = max(of.values())
        who = " and ".join(of).capitalize()
        names = [ids[place] if len(ids) == total else f"number {place + 1}" for place in where[:NAMED]]
        more = f" and {len(where) - NAMED:,} more" if len(where) > NAMED else ""
        number = f"{len(where):,} of {total:,} examples ({100 * len(where) / total:.3g} %)"
        sentences.append(f"{who}: {number} have no {group} ({reason}) and are left out of it: {', '.join(names)}{more}.")
    return sentences


def _group(metric: str) -> str:
    return next((group for group, figures in GROUPS.items() if metric in figures), metric)
