"""What people see in a terminal: progress bars with time left on stderr, tables on stdout."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from compress import process
from compress.errors import printable
from compress.forecast.plan import Plan
from compress.inspection.findings import NORMAL, Inspection, Part, grouped
from compress.report import times
from compress.report.compare import as_text, decisive, gates, rows
from compress.report.history import FEWEST, Line, Run
from compress.report.layers import line
from compress.report.markdown import Row, either, shown
from compress.report.numbers import change, count, duration, figure, percent, scaled, verdict_words
from compress.report.table import fitted, room
from compress.results.report import Report

COLOURS = {"pass": "green", "fail": "red", "cannot_tell": "yellow"}
WIDE = 110  # characters from which on all columns of an inspection fit


@contextmanager
def bars() -> Iterator[process.Progress]:
    """Progress on stderr: a bar a step with the time left; plain lines where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    layout = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*layout, console=Console(stderr=True)) as display:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            step = what.partition(";")[0]
            if step not in tasks:
                tasks[step] = display.add_task(what, total=total)
            elif done == 0:  # the same step in a new round
                display.reset(tasks[step], total=total)
            display.update(tasks[step], description=what, completed=done, total=total)

        yield progress


def _lines() -> process.Progress:
    """One line when a step begins, for logs."""
    begun: set[str] = set()

    def progress(what: str, done: int, total: int) -> None:
        step = what.partition(";")[0]
        if step not in begun:
            begun.add(step)
            print(step, file=sys.stderr, flush=True)

    return progress


def show_report(report: Report) -> None:
    """Figures, gates, what the stages did to the layers, and the verdict of a report, in each of its engines."""
    for part in report.parts:
        _show_part(part)


def _show_part(report: Report) -> None:
    console, colour = _Console(), COLOURS[report.verdict]
    if report.gates:
        gates = _table("verdict", "gate")
        for gate in report.gates:
            gates.add_row(f"[{COLOURS[gate.verdict]}]{verdict_words(gate.verdict)}[/]", _shown(gate.sentence))
    figures = _table("figure", "baseline", "candidate", f"change ({percent(report)} interval)", right=(1, 2))
    unmeasured = dict[str, str]()
    for (batch, prompt), point in groupby(shown(report), _point):
        entries, name = list(point), f"batch {batch}, prompt {prompt}"
        if batch is not None and all(side is None or side.value is None for row in entries for side in row[:2]):
            unmeasured[name] = "; ".join(dict.fromkeys(side.reason or "-" for side in entries[0][:2] if side is not None))
            continue
        if batch is not None:
            figures.add_section()
            figures.add_row(f"[bold]{name}[/]")
        for row in entries:
            theirs, ours, compared = row
            figures.add_row(either(row).metric, _shown(figure(theirs)), _shown(figure(ours)), change(compared))
    console.print(figures)
    for name, reason in unmeasured.items():
        console.print(_shown(f"{name}: not measured: {reason}"), style="yellow")
    if report.gates:
        console.print(gates)
    for record in report.stages:
        if record.layers:
            console.print(_shown(f"{record.name}: {line(record.layers)}"))
        if record.account:
            console.print(_shown(f"{record.name}: {record.account.sentence}"))
    if report.phases:
        console.print(_shown(times.sentence(report)), style="dim")
    for note in [*(f for side in report.sides for f in side.failures), *report.notes]:
        console.print(_shown(note), style="yellow")
    for sentence in report.cautions:
        console.print(_shown(f"{sentence}."), style="bold yellow")
    console.print(f"{_shown(report.recipe)}{report.inside}: [bold {colour}]{verdict_words(report.verdict)}[/]: {_shown(report.decided_by)}")
    if report.stages:
        console.print(f"artifact  {_shown(report.stages[-1].artifact)}", soft_wrap=True)
    console.print(f"report    {_shown(str(report.folder))}", soft_wrap=True)


def _point(row: Row) -> tuple[int | None, int | None]:
    """Batch size and prompt tokens of a report's row."""
    return either(row).batch_size, either(row).prompt_tokens


def show_comparison(reports: Sequence[Report], minimised: str | None = None) -> None:
    """One table of reports, with the figures that their gates limit and the minimised one first.

    Below it is every gate, and why recipes didn't pass.
    """
    models = rows(reports)
    print(as_text(models, decisive(models, reports, minimised), "table", room()))
    if any(report.gates for report in reports):
        print("\n".join(["", *fitted(*gates(reports), room()), ""]))
    if doubtful := [report for report in reports if report.verdict != "pass"]:
        show_reasons("didn't pass", [(report.recipe, f"{verdict_words(report.verdict)}: {report.decided_by}") for report in doubtful])


def show_reasons(what: str, reasons: Sequence[tuple[str, str]]) -> None:
    """A row for each recipe without figures: its name, and why."""
    display = _table(what, "why")
    for name, reason in reasons:
        display.add_row(_shown(name), _shown(reason))
    _Console().print(display)


def show_history(lines: Sequence[Line]) -> None:
    """A table for each line, with a row for each run; below it where the level changed."""
    console = _Console()
    for series in lines:
        apart = f"; measured otherwise than the first line: {', '.join(series.apart)}" if series.apart else ""
        console.print(
            f"[bold]{_shown(series.recipe)}: {_shown(series.figure)}[/], better {series.better}; on {_shown(series.machine)}{apart}"
        )
        changed = [shift.first for shift in series.changes or []]
        display = _table("run at", "commit", series.figure.partition(" ")[0], "verdict", "report", right=(2,))
        for number, run in enumerate(series.runs):
            if number in changed:
                display.add_section()
            value = (run.reason or "-") if run.value is None else scaled(run.value, series.unit)
            verdict = f"[{COLOURS[run.verdict]}]{verdict_words(run.verdict)}[/]"
            display.add_row(_minute(run), _commit(run), _shown(value), verdict, _shown(Path(run.report).name))
        console.print(display)
        for shift in series.changes or []:
            run, before, since = series.runs[shift.first], scaled(shift.before, series.unit), scaled(shift.since, series.unit)
            console.print(f"a change at {_minute(run)}, commit {_commit(run)}: from {before} to {since} (medians)", style="yellow")
        if not series.changes:
            console.print("no change" if series.changes is not None else f"changes are looked for from {FEWEST} runs on", style="dim")
        console.print()


def show_plan(plan: Plan) -> None:
    """What a recipe will need: a row for each dtype and grid point, then time and disk."""
    console = _Console()
    console.print(f"[bold]{_shown(f'{plan.model}: {plan.architecture}, {count(plan.parameters)} parameters, stored in {plan.dtype}')}[/]")
    display = _table("dtype", "batch", "prompt", "weights", "cache", "activations", "slack", "peak", "fits", right=range(1, 8))
    display.padding = (0, 1, 0, 0)
    for number, row in enumerate(plan.rows):
        if number and row.dtype != plan.rows[number - 1].dtype:
            display.add_section()
        held = [] if row.held is None else [row.held.cache, row.held.activations, row.held.slack, row.held.peak]
        sizes = [f"{count(size)}B" for size in (row.weights, *held)] + ["-"] * (4 - len(held))
        fits = "[green]yes[/]" if row.fits else "[red]no[/]"
        display.add_row(row.dtype, str(row.batch_size), str(row.prompt_tokens), *sizes, fits)
    console.print(display)
    console.print(f"fits: on {_shown(plan.machine.name)}, {scaled(plan.machine.memory_bytes, 'bytes')}", style="dim")
    for what, seconds in plan.seconds.items():
        console.print(f"{_shown(what)}: about {duration(seconds)}")
    console.print(f"in all about {duration(sum(plan.seconds.values()))} (rough), and {scaled(plan.disk_bytes, 'bytes')} of disk")
    for sentence in plan.said:
        console.print(_shown(sentence), style="yellow")


def show_methods(methods: Sequence[dict[str, Any]]) -> None:
    """All methods: what each does, and what its model does in use: what is unpacked, and when."""
    display = _table("method", "what it does")
    for method in methods:
        name, devices = f"{method['family']}: {method['method']}", ", ".join(method["devices"])
        there = "installed" if method["installed"] else "not installed"
        told = [_shown(method["about"]), f"[dim]In use: {_shown(method['at_run_time'])}.[/]"]
        if not method["installed"]:
            told.append(f"[yellow]Install with: {_shown(method['install'])}[/]")
        display.add_row(f"{_shown(name)}\n[dim]{devices}; {there}[/]", "\n".join(told), end_section=True)
    _Console().print(display)


def show_engines(engines: Sequence[dict[str, Any]]) -> None:
    """All engines: what each opens, for which tasks, and where."""
    display = _table("engine", "what it runs")
    for engine in engines:
        there = "installed" if engine["installed"] else "not installed"
        told = [_shown(engine["about"]), f"[dim]Opens {_shown(engine['reads'])}; {', '.join(engine['tasks'])}.[/]"]
        if not engine["installed"]:
            told.append(f"[yellow]Install with: {_shown(engine['install'])}[/]")
        name = f"{_shown(engine['engine'])}\n[dim]{', '.join(engine['devices'])}; {there}[/]"
        display.add_row(name, "\n".join(told), end_section=True)
    _Console().print(display)


def show_inspection(inspection: Inspection, every: bool) -> None:
    """Where a model's parameters, near-zero weights and time are: a row for each layer, or for layers that differ only in numbers."""
    console = _Console()
    wide = console.width >= WIDE
    header = ["layer", "params", "% of all", "size", "zero %", "<0.01 %", "<0.1 %", "<0.5 %", "time %"]
    hidden = () if wide else (header.index("size"), header.index("<0.01 %"))

    def cells(name: str, part: Part) -> list[str]:
        near = (part.zero, part.below_hundredth, part.below_tenth, part.below_half)
        row = [name, count(part.parameters), _percent(part.parameter_share), scaled(part.bytes, "bytes"), *map(_percent, near)]
        return [cell for number, cell in enumerate([*row, _percent(part.time_share)]) if number not in hidden]

    names = [name.replace(" ", "\n", 1) for number, name in enumerate(header) if number not in hidden]
    display = _table(*names, right=range(1, len(names)))
    display.padding = (0, 1, 0, 0)
    for part in inspection.parts if every else [row for row, _ in grouped(inspection.parts)]:
        display.add_row(*cells(_shown(_broken(part.name, console.width - (64 if wide else 44))), part))
    display.add_section()
    display.add_row(*cells("[bold]the whole model[/]", inspection.whole()))
    normal = ["[dim]a normal distribution[/]", "", "", "", "0", *(_percent(NORMAL[name]) for name in NORMAL), ""]
    display.add_row(*(cell for number, cell in enumerate(normal) if number not in hidden))
    size = f"{count(inspection.parameters)} parameters, {scaled(inspection.bytes, 'bytes')}"
    console.print(f"[bold]{_shown(f'{inspection.model}: {inspection.task}, {inspection.dtype}, {size}')}[/]")
    console.print(display)
    console.print(
        "zero, <0.1 and so on: the share of weights that are zero, or below that part of their layer's root mean square (rms)", style="dim"
    )
    for remark in inspection.remarks:
        console.print(_shown(remark), style="yellow")
    for sentence in inspection.said:
        console.print(_shown(sentence))


def _minute(run: Run) -> str:
    return _shown(run.created[:16].replace("T", " "))


def _commit(run: Run) -> str:
    """A commit in short: 4f2a9c1, 4f2a9c1-dirty."""
    return _shown(re.sub(r"^(\w{7})\w*", r"\1", str(run.commit or "-")))


def _percent(share: float | None) -> str:
    """A share in a column of percentages."""
    if share is None:
        return "-"
    return "<0.1" if 0 < share < 0.0005 else f"{100 * share:.1f}" if share else "0"


def _broken(name: str, width: int) -> str:
    """A layer's name on as many lines as it needs, broken after dots and before a bracket."""
    lines = [""]
    for piece in re.split(r"(?<=\.)|(?= \()", name):
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append("  " + piece.lstrip())
        else:
            lines[-1] += piece
    return "\n".join(lines)


def _shown(text: str) -> str:
    """Text as it is, safe from rich's markup and from control characters."""
    return escape(printable(text))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # the verb's exit status still counts; rich would end the program with 1


def _table(*header: str, right: Sequence[int] | range = ()) -> Table:
    display = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header):
        display.add_column(_shown(name), justify="right" if number in right else "left", overflow="fold")
    return display
