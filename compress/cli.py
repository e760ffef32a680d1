"""The verbs of the command line. Each imports what it needs when it is called, so that help and validation answer at once."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
import typer.core

from compress.errors import CompressError, printable

EXIT = {"pass": 0, "fail": 1, "cannot_tell": 4}


class Program(typer.core.TyperGroup):
    """The group of verbs; errors become one line and an exit status, an interrupt becomes 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CompressError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted; nothing half-written is left", 130)
        except BrokenPipeError:  # the reader of a pipe has enough, as `head` does
            _ignore_stdout()
            sys.exit(0)
        except OSError as error:
            _fail(f"{error.filename or 'standard output'}: {error.strerror or error}", 3)
        except (typer.Exit, SystemExit):
            raise
        except Exception as error:
            if type(error).__module__.startswith("typer."):  # a wrong option or argument, which typer explains
                raise
            _fail(f"unexpected {type(error).__name__}: {error} (a fault of this program, not of yours)", 3)


# Validation answers at once only if pydantic doesn't search every installed package for plugins, of which we have none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

app = typer.Typer(
    cls=Program,
    help="Make a language model smaller, measure both alike, and learn whether the smaller one may replace the bigger.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to work; auto takes the GPU where there is one.")]
Out = Annotated[Path, typer.Option(help="The folder for reports and artifacts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set stages.0.double_quant=false")
]


@app.command()
def run(recipe: RecipeFile, set_: Overrides = None, out: Out = Path("reports"), device: Device = "auto", as_json: AsJson = False) -> None:
    """Run a recipe: stages, benchmark of both sides, report and verdict.

    Exit status: 0 pass, 1 a gate failed, 2 bad input, 3 the run failed, 4 the data cannot tell yet.

    Example:  compress run recipes/quickstart.yaml --set data.samples=100
    """
    from compress import pipeline, terminal
    from compress.recipe import load

    loaded = load(recipe, set_ or [])
    with terminal.bars() as progress:
        report = pipeline.run(loaded, out, device, progress)
    _finish(report, as_json)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or builtin.")],
    recipe: Annotated[str, typer.Option(help="Data, metrics and benchmark are taken from this recipe.")],
    set_: Overrides = None, out: Out = Path("reports"), device: Device = "auto", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure one model with the harness alone; no stages, no baseline.

    Exit status: 0 measured, 2 bad input, 3 the run failed.

    Example:  compress bench ./my-model --recipe recipes/quickstart.yaml
    """
    from compress import pipeline, terminal
    from compress.recipe import load

    loaded = load(recipe, set_ or [])
    with terminal.bars() as progress:
        report = pipeline.bench(model, loaded, out, device, progress)
    _finish(report, as_json, measured_only=True)


@app.command()
def validate(recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...")], as_json: AsJson = False) -> None:
    """Read recipes and say all that is wrong with each, without loading anything.

    Exit status: 0 all are right, 2 some are not.

    Example:  compress validate recipes/*.yaml
    """
    from compress.recipe import load

    mistakes: dict[str, list[str]] = {}
    for recipe in recipes:
        try:
            load(recipe)
            mistakes[recipe] = []
        except CompressError as error:
            mistakes[recipe] = str(error).split("\n")
    if as_json:
        _print_json({"valid": not any(mistakes.values()), "recipes": mistakes})
    for recipe, lines in mistakes.items():
        for line in lines:
            typer.echo(printable(line), err=True)
        if not lines and not as_json:
            typer.echo(f"{printable(recipe)}: a valid recipe")
    if any(mistakes.values()):
        raise typer.Exit(2)


@app.command()
def compare(
    reports: Annotated[list[str], typer.Argument(metavar="REPORT...", help="Report folders, folders of reports, or patterns.")],
    format: Annotated[Literal["table", "md", "csv", "json"], typer.Option(help="How to print.")] = "table",
    as_json: AsJson = False,
) -> None:
    """One table over reports: a row a model, baselines first, ratios beside figures.

    Example:  compress compare reports/quickstart --format md
    """
    from compress import terminal
    from compress.report.compare import as_text
    from compress.report.frame import find_reports
    from compress.results import read_report

    found = [read_report(file) for file in find_reports(reports)]
    style = "json" if as_json else format
    if style == "table":
        terminal.show_comparison(found)
    else:
        typer.echo(as_text(found, style))


@app.command()
def check(
    report: Annotated[str, typer.Argument(metavar="REPORT", help="A report folder or its report.json.")],
    against: Annotated[str | None, typer.Option(metavar="REPORT", help="Take this report's candidate as the baseline.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the gates of a report again, or one report against another.

    Exit status: 0 pass, 1 a gate failed, 2 bad input, 4 the data cannot tell yet.

    Example:  compress check reports/quickstart/20261120-101500-ab12cd --against reports/quickstart/20261101-090000-ab12cd
    """
    from compress import pipeline
    from compress.results import read_report

    _finish(pipeline.check(read_report(report), read_report(against) if against else None), as_json)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List every method: family, what it needs, whether that is installed here, on which devices it works.

    Example:  compress methods
    """
    from compress import terminal
    from compress.methods import everyone

    found = [
        {
            "family": family, "method": name, "about": (method.__doc__ or "").split("\n")[0], "packages": list(method.ABOUT.packages),
            "extra": method.ABOUT.extra, "installed": not method.ABOUT.missing(), "devices": list(method.ABOUT.devices),
            "packs": method.ABOUT.packs, "at_run_time": method.ABOUT.at_run_time,
        }
        for family, name, method in everyone()
    ]  # fmt: skip
    if as_json:
        _print_json(found)
    else:
        terminal.show_methods(found)


@app.command()
def schema(as_json: AsJson = False) -> None:
    """Print the JSON schema of a recipe, for editors.

    Example:  compress schema > recipe.schema.json
    """
    from compress import recipe

    _print_json(recipe.schema())


def main() -> None:
    """The program."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_signal)
    app()


def _on_signal(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _finish(report: Any, as_json: bool, measured_only: bool = False) -> None:
    """Show a report and leave with its exit status."""
    from compress import terminal

    failed = any(side.failures for side in report.sides)
    try:
        if as_json:
            _print_json(report.as_json())
        else:
            terminal.show_report(report)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, and the exit status still counts
        _ignore_stdout()
    raise typer.Exit(3 if failed else 0 if measured_only else EXIT[report.verdict])


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1, allow_nan=False))


def _ignore_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"compress: {printable(message)}", err=True)
    sys.exit(code)
