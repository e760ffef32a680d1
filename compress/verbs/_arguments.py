"""Arguments that several verbs take."""

from argparse import Action, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from compress import trackers


def on_a_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes the GPU where there is one")


def of_reports(parser: ArgumentParser) -> None:
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="report folders, folders of reports, patterns, or recipes")
    parser.add_argument("--out", type=Path, default=Path("reports"), metavar="DIR", help="where recipes' reports are (reports)")


def overriding(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe: --set stages.0.bits=3"
    )


class _Engine(Action):
    """`--engine NAME` is `--set engine=NAME`."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, value: Any, option: str | None = None) -> None:
        namespace.set = [*namespace.set, f"engine={value}"]


def telling(parser: ArgumentParser) -> None:
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the gates as JUnit XML, a test case each")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write verdict, gates and figures as Markdown")


def measuring(parser: ArgumentParser) -> None:
    overriding(parser)
    parser.add_argument("--engine", action=_Engine, metavar="NAME", help="what both models are measured in: see `compress engines`")
    parser.add_argument("--out", type=Path, default=Path("reports"), metavar="DIR", help="where reports and artifacts go (reports)")
    parser.add_argument("--strict", action="store_true", help="refuse to measure on a GPU that another process uses")
    on_a_device(parser)


def tracking(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--log", action="append", default=[], choices=trackers.names(), help="log the report there too, as that tracker is set up"
    )


def spreading(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--on", choices=("here", "ray"), default="here", help="ray: every recipe is a task of its cluster, with a GPU of its own (here)"
    )
