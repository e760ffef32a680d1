"""How the machine was while a benchmark ran, and what disturbed it."""

from collections import Counter
from collections.abc import Sequence

from compress.report.table import table
from compress.results.report import Report
from compress.results.sides import Turn

HEAD = ["round", "turns that count", "time", "waiting for a core", "stolen", "cores others used", "load"]


def disturbances(turns: Sequence[Turn]) -> list[str]:
    """How many turns were disturbed, by what most of all, and whether they count."""
    disturbed = [turn for turn in turns if turn.disturbed]
    if not disturbed:
        return []
    counted, again = sum(turn.kept for turn in disturbed), sum(not turn.kept for turn in turns)
    most, _ = Counter(turn.disturbed[0] for turn in disturbed).most_common(1)[0]
    count = f"{counted} of them count, since the machine never rested" if counted else "none of them counts"
    return [f"{len(disturbed)} of {len(turns)} turns were disturbed ({most}); {again} were taken again, {count}."]


def rows(report: Report) -> list[list[str]]:
    """How the machine was while the sides took turns, a row a round under `HEAD`: the most in any turn of it."""
    body = []
    for number in range(max((turn.round for turn in report.turns), default=-1) + 1):
        inside = [turn for turn in report.turns if turn.round == number]
        waiting = [turn.waiting for turn in inside if turn.waiting is not None]
        counted = sum(turn.kept for turn in inside)
        body.append([
            str(number + 1), f"{counted} of {len(inside)}", f"{sum(turn.seconds for turn in inside):.1f} s",
            f"{max(waiting):.1%}" if waiting else "-", f"{max(turn.steal for turn in inside):.1%}",
            f"{max(turn.others for turn in inside):.1f}", f"{max(turn.load for turn in inside):.1f}",
        ])  # fmt: skip
    return body


def section(report: Report) -> str:
    """The rounds in Markdown."""
    body = rows(report)
    return "## Machine\n\nThe most in any turn of a round; every turn is in report.json.\n\n" + table(HEAD, body) if body else ""
