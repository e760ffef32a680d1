"""Look for the best recipe under gates, among values of some of its keys; write it as a recipe.

Optuna proposes. A recipe is given up if its whole interval breaks a gate on quality on a few examples already; the others are measured in
full. The best of those that keep every gate, the recipe's own included, is the one with the lowest value of what is minimised. Started
again, an interrupted search goes on where it was.

A gate is METRIC:CHANGE, the change in the metric's unit or in per cent: rougeL:-1.0 may be lower by a point, latency_p50:+5% higher by 5 %.

Exit status: 0 found, 1 no recipe keeps the gates, 2 bad input, 3 none could be measured, 4 the data cannot tell yet.

Example:  compress search quickstart-rtn --keep rougeL:-2.0 --minimise file_bytes --over stages.0.bits=2,3,4,8
"""

import gc
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from compress.errors import InputError
from compress.verbs._answer import print_json
from compress.verbs._arguments import measuring, spreading

if TYPE_CHECKING:
    from compress.search import Tried


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    parser.add_argument("--keep", action="append", default=[], metavar="METRIC:CHANGE", help="a gate: how much a metric may change")
    parser.add_argument("--minimise", required=True, metavar="METRIC", help="the metric to minimise, such as file_bytes")
    parser.add_argument(
        "--over", action="append", required=True, metavar="KEY=VALUES",
        help="what may be chosen: bits=2,3,4,8 of these, 0.1..0.7 any between, 1e-5..1e-3:log any power of ten as often",
    )  # fmt: skip
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="recipes to try, including those of earlier starts (20)")
    measuring(parser)
    spreading(parser)


def call(options: Namespace) -> int:
    gc.enable()  # which `main` turned off, for verbs that answer at once
    if options.trials < 1:
        raise InputError(f"--trials {options.trials}: must be 1 or more")
    from dataclasses import asdict

    from compress import terminal
    from compress.cluster import cluster
    from compress.metrics import METRICS
    from compress.results.report import read_report
    from compress.search import Search

    search = Search(options.recipe, options.keep, options.minimise, options.over, options.set)
    with terminal.bars() as progress, cluster() if options.on == "ray" else nullcontext() as workers:
        outcome = search.run(options.out, options.trials, options.device, progress, options.strict, workers)
    best, verdicts = outcome.best, [trial.verdict for trial in outcome.tried]
    if options.json:
        print_json(
            {
                "best": best and {**asdict(best), "recipe": str(outcome.file)},
                "tried": [{**asdict(trial), **_judged(trial)} for trial in outcome.tried],
            }
        )
    else:
        if reports := [read_report(trial.report, figures_only=True) for trial in outcome.tried if trial.report]:
            terminal.show_comparison(reports, options.minimise)
        if left := [(search.variant(trial.choice).name, trial.reason) for trial in outcome.tried if trial.reason]:
            terminal.show_reasons("left out", left)
        if best is None:
            print("no recipe was shown to keep the gates")
        else:
            name = search.variant(best.choice).name
            change = f"x{best.value:.3f}" if METRICS[options.minimise].kind != "quality" else f"{best.value:+.3g}"
            print(f"best: {name}, {options.minimise} {change}\nrecipe    {outcome.file}\nreport    {best.report}")
    return 0 if best else 4 if "cannot_tell" in verdicts else 1 if "fail" in verdicts else 3


def _judged(tried: "Tried") -> dict[str, Any]:
    """What decided of a recipe that was measured, and each of its gates."""
    from compress.results.report import read_report

    if tried.report is None:
        return {}
    report = read_report(tried.report, figures_only=True)
    return {"decided_by": report.decided_by, "gates": [gate.model_dump(mode="json") for gate in report.gates]}
