"""One table over reports: a row a model, baselines first, and beside each figure how it compares with the model's own baseline.

A recipe, as a file or by its name, means its newest report under --out. Reports that were not measured alike (examples, generation,
benchmark, machine) are refused unless --unlike is given; the table then says which differ, and in what. A report that can't be read is
named on stderr, and the others go on.

Exit status: 0 compared, 2 bad input.

Example:  compress compare reports/quickstart other-recipe --columns rougeL weight_bytes --pareto
"""

import glob
from argparse import ArgumentParser, Namespace
from pathlib import Path

from compress.errors import ReportError
from compress.verbs._answer import complain

FORMATS = ("table", "md", "csv", "json", "latex", "html")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="report folders, folders of reports, patterns, or recipes")
    parser.add_argument("--out", type=Path, default=Path("reports"), metavar="DIR", help="where recipes' reports are (reports)")
    parser.add_argument("--columns", nargs="+", default=[], metavar="FIGURE", help="the figures to show: rougeL weight_bytes latency_p50")
    parser.add_argument("--sort", metavar="FIGURE", help="the best in this figure first; FIGURE:reverse turns that round")
    parser.add_argument("--pareto", action="store_true", help="only models that no other beats on the figures shown")
    parser.add_argument("--unlike", action="store_true", help="compare what was not measured alike too, and say what differs")
    parser.add_argument("--format", choices=FORMATS, default="table")


def call(given: Namespace) -> int:
    from compress.report import compare
    from compress.report.frame import find_reports, read_reports
    from compress.report.table import room

    reports, damaged = read_reports(find_reports(_place(place, given.out) for place in given.reports))
    complain(damaged)
    found = compare.rows(reports)
    if not given.unlike:
        compare.require_alike(found)
    figures = compare.labels(found, given.columns)
    if given.sort:
        found = compare.ranked(found, given.sort)
    if given.pareto:
        found = compare.unbeaten(found, figures)
    print(compare.as_text(found, figures, "json" if given.json else given.format, room()))
    return 0


def _place(place: str, out: Path) -> str | Path:
    """A place of reports as it is; for a recipe that of its newest report."""
    is_recipe = place.endswith((".yaml", ".yml"))
    if not is_recipe and (glob.glob(place, recursive=True) or Path(place).name != place):
        return place
    from compress.report.frame import newest

    found = newest(place, out)
    if found is None:
        raise ReportError(f"{place}: there is no report here, and none of such a recipe in {out / Path(place).stem}; name --out, or run it")
    return found
