"""What verbs answer with: a report with its exit status, one JSON document."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, InputError, printable

if TYPE_CHECKING:
    from compress.results.report import Report

EXIT = {"pass": 0, "fail": 1, "cannot_tell": 4}
WORST_FIRST = (1, 3, 4, 0)  # exit statuses


def refuse(options: Namespace) -> None:
    """Check before any work that `tell` can write its files. Raises InputError."""
    for flag, file in (("--junit", options.junit), ("--markdown", options.markdown)):
        if file and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
            raise InputError(f"{flag} {file}: can't be written to")
    if options.junit and options.junit == options.markdown:
        raise InputError(f"--junit and --markdown are both {options.junit}; name two files")


def tell(reports: Sequence["Report"], options: Namespace) -> None:
    """Tell a pipeline: the files of `_arguments.telling`, and on GitHub's runners annotations, which they read on stderr too."""
    from compress.files import write_whole
    from compress.report import ci, markdown

    if options.junit:
        write_whole(options.junit, ci.junit(reports))
    if options.markdown:
        write_whole(options.markdown, "\n\n".join(map(markdown.brief, reports)) + "\n")
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in (line for report in reports for line in ci.annotations(report)):
            print(line, file=sys.stderr)


def finish(reports: Sequence["Report"], as_json: bool, measured_only: bool = False) -> int:
    """Show reports, several as JSON in one list; returns the exit status, of several the worst."""
    from compress import terminal

    try:
        if as_json:
            documents = [report.as_json() for report in reports]
            print_json(documents if len(documents) > 1 else documents[0])
        else:
            for report in reports:
                terminal.show_report(report)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, and the exit status still counts
        ignore_stdout()
    statuses = {_status(part, measured_only) for report in reports for part in report.parts}
    return next(status for status in WORST_FIRST if status in statuses)


def _status(report: "Report", measured_only: bool) -> int:
    failed = any(side.failures for side in report.sides)
    return 3 if failed else 0 if measured_only else EXIT[report.verdict]


def log(report: "Report", tracker_names: Sequence[str]) -> None:
    """Log a report that was shown. A tracker that fails is named on stderr, with no other effect."""
    from compress import trackers

    for tracker in tracker_names:
        try:
            with redirect_stdout(sys.stderr):  # where --json has a document
                trackers.log(report, tracker)
        except CompressError as error:
            print(f"compress: --log {tracker}: {printable(str(error))}", file=sys.stderr)


def complain(messages: Iterable[str]) -> None:
    """Print a warning for each thing that is passed over."""
    for message in messages:
        print(f"compress: {printable(message)}; it is passed over", file=sys.stderr)


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def ignore_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
