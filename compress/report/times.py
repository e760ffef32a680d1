"""Where a run's time went."""

from compress.phases import REST
from compress.report.numbers import duration
from compress.report.table import table
from compress.results.report import Report

HEAD = ["phase", "baseline", "candidate", "neither", "in all"]
SMALL = 0.005  # of the whole, below which a phase isn't named in the sentence


def totals(report: Report) -> dict[str, float]:
    """Seconds by phase, longest first; what was in none comes last."""
    by_phase: dict[str, float] = {}
    for phase in report.phases:
        by_phase[phase.name] = by_phase.get(phase.name, 0.0) + phase.seconds
    return dict(sorted(by_phase.items(), key=lambda item: (item[0] == REST, -item[1])))


def sentence(report: Report) -> str:
    """Where the 214 s went: generating 80 s, timing 75 s, stages 31 s, the rest 7 s."""
    by_phase = totals(report)
    whole = sum(by_phase.values())
    named = {name: seconds for name, seconds in by_phase.items() if name != REST and seconds >= SMALL * whole}
    parts = [*named.items(), (REST, whole - sum(named.values()))]
    return f"where the {duration(whole)} went: {', '.join(f'{name} {duration(seconds)}' for name, seconds in parts)}"


def rows(report: Report) -> list[list[str]]:
    """A row a phase under `HEAD`, longest first, and one of the whole."""
    by_side: dict[tuple[str, str | None], float] = {}
    for phase in report.phases:
        by_side[phase.name, phase.side] = by_side.get((phase.name, phase.side), 0.0) + phase.seconds
    body = []
    for name, seconds in totals(report).items():
        of_each = (by_side.get((name, side)) for side in ("baseline", "candidate", None))
        body.append([name, *("-" if of_one is None else f"{of_one:.1f} s" for of_one in of_each), f"{seconds:.1f} s"])
    return [*body, ["the whole", "-", "-", "-", f"{sum(totals(report).values()):.1f} s"]]


def section(report: Report) -> str:
    """The phases in Markdown."""
    return "## Time\n\n" + table(HEAD, rows(report)) if report.phases else ""
