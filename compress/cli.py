"""The verbs of the command line. Each imports what it needs when it is called, so that help and validation answer at once.

That is also why argparse does the parsing: the libraries that are nicer to write for take a fifth of the time that validation may take.
"""

import argparse
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from compress.errors import CompressError, InputError, printable

EXIT = {"pass": 0, "fail": 1, "cannot_tell": 4}

# Validation answers at once only if pydantic doesn't search every installed package for plugins, of which we have none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

Arguments = argparse.Namespace


def run(given: Arguments) -> int:
    """Run a recipe: stages, benchmark of both sides, report and verdict.

    Stages that train do so in --processes of them, each on a GPU of its own where there are GPUs. Under torchrun or accelerate launch there
    are as many as were launched; the first copy runs the recipe, the others end at once.

    Exit status: 0 pass, 1 a gate failed, 2 bad input, 3 the run failed, 4 the data cannot tell yet.

    Example:  compress run recipes/quickstart.yaml --set data.samples=100
    """
    from compress import pipeline, terminal
    from compress.process import launched
    from compress.recipe import load

    copy, processes = launched() or (0, 1 if given.processes is None else given.processes)
    if copy > 0:
        return 0
    if given.processes not in (None, processes):
        raise InputError(f"--processes {given.processes}: {processes} were launched; leave one of the two out")
    loaded = load(given.recipe, given.set)
    with terminal.bars() as progress:
        report = pipeline.run(loaded, given.out, given.device, progress, processes, given.strict)
    return _finish(report, given.json)


def bench(given: Arguments) -> int:
    """Measure one model with the harness alone; no stages, no baseline.

    Exit status: 0 measured, 2 bad input, 3 the run failed.

    Example:  compress bench ./my-model --recipe recipes/quickstart.yaml
    """
    from compress import pipeline, terminal
    from compress.recipe import load

    loaded = load(given.recipe, given.set)
    with terminal.bars() as progress:
        report = pipeline.bench(given.model, loaded, given.out, given.device, progress, given.strict)
    return _finish(report, given.json, measured_only=True)


def inspect(given: Arguments) -> int:
    """Look at a model: where its parameters are, how many are near zero, where the time of a forward pass goes.

    Exit status: 0 looked at, 2 bad input, 3 the work failed.

    Example:  compress inspect ./my-model --picture my-model.png
    """
    from compress import pipeline, terminal

    if given.picture:
        from compress.inspection import picture

        picture.refuse(given.picture)
    with terminal.bars() as progress:
        found = pipeline.inspect(given.model, given.task, given.device, given.batch_size, given.tokens, progress)
    if given.picture:
        picture.draw(found, given.picture)
    if given.json:
        _print_json(found.as_json())
    else:
        terminal.show_inspection(found, given.all)
    return 0


def plan(given: Arguments) -> int:
    """Foretell what a recipe takes, from its model's config.json alone: memory at each point and dtype, time and disk.

    Nothing is loaded. Sizes are told for this machine, or for a GPU of a known kind.

    Exit status: 0 foretold, 2 bad input.

    Example:  compress plan recipes/quickstart.yaml --gpu h100-80gb
    """
    from compress import terminal
    from compress.forecast import machine, plan
    from compress.recipe import load

    loaded = load(given.recipe, given.set)
    place = machine.named(given.gpu) if given.gpu else machine.here(loaded.benchmark.threads)
    found = plan.plan(loaded, place)
    if given.json:
        _print_json(found.as_json())
    else:
        terminal.show_plan(found)
    return 0


def validate(given: Arguments) -> int:
    """Read recipes and say all that is wrong with each, without loading anything.

    Exit status: 0 all are right, 2 some are not.

    Example:  compress validate recipes/*.yaml
    """
    from compress.recipe import load

    mistakes: dict[str, list[str]] = {}
    for recipe in given.recipes:
        try:
            load(recipe)
            mistakes[recipe] = []
        except CompressError as error:
            mistakes[recipe] = str(error).split("\n")
    if given.json:
        _print_json({"valid": not any(mistakes.values()), "recipes": mistakes})
    for recipe, lines in mistakes.items():
        for line in lines:
            print(printable(line), file=sys.stderr)
        if not lines and not given.json:
            print(f"{printable(recipe)}: a valid recipe")
    return 2 if any(mistakes.values()) else 0


def compare(given: Arguments) -> int:
    """One table over reports: a row a model, baselines first, ratios beside figures.

    Example:  compress compare reports/quickstart --format md
    """
    from compress import terminal
    from compress.report.compare import as_text
    from compress.report.frame import find_reports
    from compress.results import read_report

    found = [read_report(file) for file in find_reports(given.reports)]
    style = "json" if given.json else given.format
    if style == "table":
        terminal.show_comparison(found)
    else:
        print(as_text(found, style))
    return 0


def check(given: Arguments) -> int:
    """Check the gates of a report again, or one report against another.

    Exit status: 0 pass, 1 a gate failed, 2 bad input, 4 the data cannot tell yet.

    Example:  compress check reports/quickstart/20261120-101500-ab12cd --against reports/quickstart/20261101-090000-ab12cd
    """
    from compress import pipeline
    from compress.results import read_report

    against = read_report(given.against) if given.against else None
    return _finish(pipeline.check(read_report(given.report), against), given.json)


def methods(given: Arguments) -> int:
    """List every method: family, what it needs, whether that is installed here, on which devices it works.

    Example:  compress methods
    """
    from compress import terminal
    from compress.methods import everyone

    found = [
        {
            "family": family, "method": name, "about": (method.__doc__ or "").split("\n")[0], "packages": list(method.ABOUT.packages),
            "extra": method.ABOUT.extra, "installed": not method.ABOUT.missing(), "devices": list(method.ABOUT.devices),
            "packs": method.ABOUT.packs, "calibrated": method.ABOUT.calibrated, "at_run_time": method.ABOUT.at_run_time,
        }
        for family, name, method in everyone()
    ]  # fmt: skip
    if given.json:
        _print_json(found)
    else:
        terminal.show_methods(found)
    return 0


def schema(given: Arguments) -> int:
    """Print the JSON schema of a recipe, for editors.

    Example:  compress schema > recipe.schema.json
    """
    from compress import recipe

    _print_json(recipe.schema())
    return 0


def parser() -> argparse.ArgumentParser:
    """Every verb with its arguments; a verb's help is its docstring."""
    program = argparse.ArgumentParser(
        "compress",
        description="Make a language model smaller, measure both alike, and learn whether the smaller one may replace the bigger.",
    )
    verbs = program.add_subparsers(title="verbs", required=True, metavar="VERB")

    def add(verb: Callable[[Arguments], int]) -> argparse.ArgumentParser:
        text = (verb.__doc__ or "").replace("\n    ", "\n").strip()
        added = verbs.add_parser(
            verb.__name__,
            help=text.split("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(verb=verb)
        added.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
        return added

    def on_a_device(verb: argparse.ArgumentParser) -> None:
        verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes the GPU where there is one")

    def overriding(verb: argparse.ArgumentParser) -> None:
        verb.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe: --set stages.0.bits=3"
        )

    def measuring(verb: argparse.ArgumentParser) -> None:
        overriding(verb)
        verb.add_argument("--out", type=Path, default=Path("reports"), metavar="DIR", help="where reports and artifacts go (reports)")
        verb.add_argument("--strict", action="store_true", help="refuse to measure on a GPU that another process uses")
        on_a_device(verb)

    verb = add(run)
    verb.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    measuring(verb)
    verb.add_argument("--processes", type=int, metavar="N", help="train in so many processes, whose batches make one step (1)")
    verb = add(bench)
    verb.add_argument("model", metavar="MODEL", help="a model folder, a hub id, or builtin")
    verb.add_argument("--recipe", required=True, metavar="RECIPE", help="data, metrics and benchmark are taken from this recipe")
    measuring(verb)
    verb = add(inspect)
    verb.add_argument("model", metavar="MODEL", help="a model folder, a hub id, or builtin")
    verb.add_argument(
        "--task", metavar="TASK", help="seq2seq, causal-lm or sequence-classification; told from the model's config where left out"
    )
    verb.add_argument("--batch-size", type=int, default=1, metavar="N", help="inputs in the forward pass that is timed (1)")
    verb.add_argument("--tokens", type=int, metavar="N", help="tokens in each, on both sides of an encoder-decoder (128, or all that fit)")
    verb.add_argument("--all", action="store_true", help="a row for every layer, not one for layers that differ in numbers only")
    verb.add_argument("--picture", type=Path, metavar="FILE", help="draw it as well, into a .png or .svg (needs compress[plot])")
    on_a_device(verb)
    verb = add(plan)
    verb.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    overriding(verb)
    verb.add_argument("--gpu", metavar="NAME", help="a kind of GPU, such as h100-80gb; this machine's own, or its CPU, where left out")
    add(validate).add_argument("recipes", nargs="+", metavar="RECIPE")
    verb = add(compare)
    verb.add_argument("reports", nargs="+", metavar="REPORT", help="report folders, folders of reports, or patterns")
    verb.add_argument("--format", choices=("table", "md", "csv", "json"), default="table")
    verb = add(check)
    verb.add_argument("report", metavar="REPORT", help="a report folder or its report.json")
    verb.add_argument("--against", metavar="REPORT", help="take this report's candidate as the baseline")
    add(methods)
    add(schema)
    return program


def main() -> NoReturn:
    """The program: errors become one line and an exit status, an interrupt becomes 130."""
    gc.disable()  # imports make many objects and no rubbish: a tenth of the time that validation takes
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_signal)
    try:
        given = parser().parse_args()
        if given.verb in (run, bench):
            gc.enable()
        code = given.verb(given)
        sys.stdout.flush()
        sys.exit(code)
    except CompressError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written is left", 130)
    except BrokenPipeError:  # the reader of a pipe has enough, as `head` does
        _ignore_stdout()
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'standard output'}: {error.strerror or error}", 3)
    except Exception as error:
        _fail(f"unexpected {type(error).__name__}: {error} (a fault of this program, not of yours)", 3)


def _on_signal(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _finish(report: Any, as_json: bool, measured_only: bool = False) -> int:
    """Show a report; returns its exit status."""
    from compress import terminal

    try:
        if as_json:
            _print_json(report.as_json())
        else:
            terminal.show_report(report)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, and the exit status still counts
        _ignore_stdout()
    failed = any(side.failures for side in report.sides)
    return 3 if failed else 0 if measured_only else EXIT[report.verdict]


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def _ignore_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> NoReturn:
    print(f"compress: {printable(message)}", file=sys.stderr)
    sys.exit(code)
