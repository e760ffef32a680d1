"""One table over reports: a row a model, baselines first, ratios beside figures.

Example:  compress compare reports/quickstart --format md
"""

from argparse import ArgumentParser, Namespace


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="report folders, folders of reports, or patterns")
    parser.add_argument("--format", choices=("table", "md", "csv", "json"), default="table")


def call(given: Namespace) -> int:
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
