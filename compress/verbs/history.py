"""A metric over runs in time order, with the commit of each and where it changed.

A recipe, as a file or by its name, means all of its reports under --out. Only runs that were measured alike are one line: the same
recipe, examples, benchmark and machine. Reports that can't be read are named on stderr and passed over.

Exit status: 0 shown, 2 bad input.

Example:  compress history reports --metric rougeL --recipe quickstart
"""

from argparse import ArgumentParser, Namespace

from compress.verbs._answer import complain, print_json
from compress.verbs._arguments import of_reports


def arguments(parser: ArgumentParser) -> None:
    of_reports(parser)
    parser.add_argument("--metric", required=True, metavar="METRIC", help="rougeL, weight_bytes, latency_p50, 'ttft [batch 1, prompt 64]'")
    parser.add_argument("--recipe", metavar="NAME", help="only this recipe's runs")


def call(options: Namespace) -> int:
    from dataclasses import asdict

    from compress import terminal
    from compress.report import history
    from compress.report.frame import find_reports, read_reports

    reports, damaged = read_reports(find_reports(options.reports, options.out, newest_only=False))
    complain(damaged)
    lines = history.lines(reports, options.metric, options.recipe)
    if options.json:
        print_json({"metric": options.metric, "lines": [asdict(line) for line in lines], "damaged": damaged})
    else:
        terminal.show_history(lines)
    return 0
