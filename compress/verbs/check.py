"""Check the gates of reports again, gates of a file, or one report against another.

Reports are what `compare` takes: folders, folders of reports, patterns, recipes. Of several each is checked, and the worst decides; those
that can't be read are named on stderr. With --against, the candidate of another report is the baseline; the two must have been measured
alike. With --best, that report is chosen: of all in a place that passed and were measured alike, the one with the best figure.

On GitHub's runners (GITHUB_ACTIONS=true) every gate that doesn't pass becomes an annotation.

Exit status: 0 pass, 1 a gate failed, 2 bad input, 3 its run could not measure all, 4 the data cannot tell yet.

Example:  compress check reports/quickstart/20261120-101500-ab12cd --gates mlperf-99 --against reports/quickstart --best rougeL
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import InputError, ReportError
from compress.verbs._answer import complain, finish, refuse, tell
from compress.verbs._arguments import of_reports, telling

if TYPE_CHECKING:
    from compress.results.report import Report


def arguments(parser: ArgumentParser) -> None:
    of_reports(parser)
    parser.add_argument("--gates", metavar="FILE", help="limits by metric, as under a recipe's check; or mlperf-99, mlperf-99.9")
    parser.add_argument(
        "--against", metavar="REPORT", help="take this report's candidate as the baseline; with --best, a folder of reports"
    )
    parser.add_argument("--best", metavar="METRIC", help="against which of them: rougeL, weight_bytes, 'ttft [batch 1, prompt 64]'")
    telling(parser)


def call(options: Namespace) -> int:
    from compress import pipeline
    from compress.report import history
    from compress.report.frame import find_reports, read_reports
    from compress.results.report import read_report

    refuse(options)
    for flag, value in (("--against", options.against), ("--best", options.best), ("--gates", options.gates)):
        if value == "":
            raise InputError(f"{flag} '': it is empty, like a variable that isn't set")
    if options.best and not options.against:
        raise InputError("--best picks one of the reports under --against; give --against DIR with it")
    reports = _read(find_reports(options.reports, options.out))
    if options.best:
        others, damaged = read_reports(find_reports([options.against], options.out))
        complain(damaged)
        baselines: list[Report | None] = [read_report(history.best(report, others, options.best).folder) for report in reports]
    else:
        baselines = [*map(read_report, find_reports([options.against], options.out))] if options.against else [None]
        if len(baselines) > 1:
            raise InputError(f"--against {options.against}: {len(baselines)} reports lie there; name one, or give --best METRIC with it")
        baselines *= len(reports)
    checked = [pipeline.check(report, baseline, options.gates) for report, baseline in zip(reports, baselines, strict=True)]
    status = finish(checked, options.json)
    tell(checked, options)
    return status


def _read(files: list[Path]) -> "list[Report]":
    """Reports with all that they hold; those that can't be read are named. Raises ReportError where none can."""
    from compress.results.report import read_report

    reports, damaged = [], []
    for file in files:
        try:
            reports.append(read_report(file))
        except ReportError as error:
            damaged.append(str(error))
    if not reports:
        raise ReportError("\n".join(damaged[:10]))
    complain(damaged)
    return reports
