"""What disturbed a benchmark, in a sentence or none."""

from collections import Counter
from collections.abc import Sequence

from compress.results import Turn


def disturbances(turns: Sequence[Turn]) -> list[str]:
    """How many turns were disturbed, by what most of all, and whether they count."""
    disturbed = [turn for turn in turns if turn.disturbed]
    if not disturbed:
        return []
    counted, again = sum(turn.kept for turn in disturbed), sum(not turn.kept for turn in turns)
    most, _ = Counter(turn.disturbed[0] for turn in disturbed).most_common(1)[0]
    count = f"{counted} of them count, since the machine never rested" if counted else "none of them counts"
    return [f"{len(disturbed)} of {len(turns)} turns were disturbed ({most}); {again} were taken again, {count}."]
