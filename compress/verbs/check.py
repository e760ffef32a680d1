"""Check the gates of a report again, or one report against another.

Exit status: 0 pass, 1 a gate failed, 2 bad input, 4 the data cannot tell yet.

Example:  compress check reports/quickstart/20261120-101500-ab12cd --against reports/quickstart/20261101-090000-ab12cd
"""

from argparse import ArgumentParser, Namespace

from compress.verbs._answer import finish


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("report", metavar="REPORT", help="a report folder or its report.json")
    parser.add_argument("--against", metavar="REPORT", help="take this report's candidate as the baseline")


def call(given: Namespace) -> int:
    from compress import pipeline
    from compress.results import read_report

    against = read_report(given.against) if given.against else None
    return finish(pipeline.check(read_report(given.report), against), given.json)
