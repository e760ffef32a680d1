"""Run many recipes, or one with every combination of some values; one table and one page of all.

All are checked before anything runs. Stages that several have in common are made once, and candidates take turns with one baseline. Each
gets a report of its own; one that fails is named with its reason, and the others go on. Reports of an earlier sweep in the same folder are
used again: an interrupted sweep goes on where it was, and further values may be added. The page of all lies in DIR/sweeps.

Exit status: 0 all were measured, 2 bad input, 3 some could not be.

Example:  compress sweep quickstart-rtn --grid stages.0.bits=3,4,8 --grid stages.0.group_size=32,64
"""

import gc
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext

from compress.verbs._answer import log, print_json
from compress.verbs._arguments import measuring, spreading, tracking


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="recipe files, or names of shipped ones")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=VALUE,...", help="values of a key of each recipe; several keys are combined"
    )
    measuring(parser)
    tracking(parser)
    spreading(parser)


def call(options: Namespace) -> int:
    gc.enable()  # which `main` turned off, for verbs that answer at once
    from compress import sweep, terminal, trackers
    from compress.cluster import cluster

    trackers.require(options.log)
    recipes = sweep.expand(options.recipes, options.grid, options.set)
    with terminal.bars() as progress, cluster() if options.on == "ray" else nullcontext() as workers:
        outcomes = sweep.run(recipes, options.out, options.device, progress, options.strict, workers)
    reports = [outcome.report for outcome in outcomes if outcome.report]
    failed = [(outcome.recipe.name, outcome.reason) for outcome in outcomes if outcome.reason]
    for report in reports:
        log(report, options.log)
    if options.json:
        page = sweep.page(outcomes, options.out)
        failures = [{"recipe": name, "reason": reason} for name, reason in failed]
        shown = [{"recipe": report.recipe, **report.as_json()} for report in reports]
        print_json({"reports": shown, "failed": failures, "page": page and str(page)})
        return 3 if failed else 0
    if reports:
        terminal.show_comparison(reports)
    if failed:
        terminal.show_reasons("failed", failed)
    if page := sweep.page(outcomes, options.out):
        print(f"page      {page}")
    return 3 if failed else 0
