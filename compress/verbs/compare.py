"""One table over reports: a row a model, baselines first, and beside each figure how it compares with the model's own baseline.

A recipe, as a file or by its name, means its newest report under --out. Reports that were not measured alike (examples, generation,
benchmark, machine) are refused unless --unlike is given; the table then says which differ, and in what. A report that can't be read is
named on stderr, and the others go on.

Exit status: 0 compared, 2 bad input.

Example:  compress compare reports/quickstart other-recipe --columns rougeL weight_bytes --pareto
"""

from argparse import ArgumentParser, Namespace

from compress.verbs._answer import complain
from compress.verbs._arguments import of_reports

FORMATS = ("table", "md", "csv", "json", "latex", "html")


def arguments(parser: ArgumentParser) -> None:
    of_reports(parser)
    parser.add_argument("--columns", nargs="+", default=[], metavar="FIGURE", help="the figures to show: rougeL weight_bytes latency_p50")
    parser.add_argument("--sort", metavar="FIGURE", help="the best in this figure first; FIGURE:reverse turns that round")
    parser.add_argument("--pareto", action="store_true", help="only models that no other beats on the figures shown")
    parser.add_argument("--unlike", action="store_true", help="compare reports that were not measured alike too, and show what differs")
    parser.add_argument("--format", choices=FORMATS, default="table")


def call(options: Namespace) -> int:
    from compress.report import compare
    from compress.report.frame import find_reports, read_reports
    from compress.report.table import room

    reports, damaged = read_reports(find_reports(options.reports, options.out))
    complain(damaged)
    rows = compare.rows([part for report in reports for part in report.parts])
    if not options.unlike:
        compare.require_alike(rows)
    figures = compare.labels(rows, options.columns)
    if options.sort:
        rows = compare.ranked(rows, options.sort)
    if options.pareto:
        rows = compare.unbeaten(rows, figures)
    print(compare.as_text(rows, figures, "json" if options.json else options.format, room()))
    return 0
