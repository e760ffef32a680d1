"""Run a recipe: stages, benchmark of both sides, report and verdict.

Stages that train do so in --processes of them, each on a GPU of its own where there are GPUs. Under torchrun or accelerate launch there
are as many as were launched; the first copy runs the recipe, the others end at once.

On GitHub's runners (GITHUB_ACTIONS=true) every gate that doesn't pass becomes an annotation.

Exit status: 0 pass, 1 a gate failed, 2 bad input, 3 the run failed, 4 the data cannot tell yet.

Example:  compress run recipes/quickstart.yaml --set data.samples=100
"""

import gc
import sys
from argparse import ArgumentParser, Namespace

from compress.errors import InputError, printable
from compress.verbs._answer import finish, log, refuse, tell
from compress.verbs._arguments import measuring, telling, tracking


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    measuring(parser)
    tracking(parser)
    telling(parser)
    parser.add_argument("--processes", type=int, metavar="N", help="train in so many processes, whose batches make one step (1)")


def call(options: Namespace) -> int:
    gc.enable()  # which `main` turned off, for verbs that answer at once
    from compress import pipeline, terminal, trackers
    from compress.forecast.plan import remarks
    from compress.recipe import load
    from compress.team import launched

    copy, processes = launched() or (0, 1 if options.processes is None else options.processes)
    if copy > 0:
        return 0
    if options.processes not in (None, processes):
        raise InputError(f"--processes {options.processes}: {processes} were launched; leave one of the two out")
    refuse(options)
    trackers.require(options.log)
    loaded = load(options.recipe, options.set)
    for sentence in remarks(loaded):
        print(printable(sentence), file=sys.stderr)
    with terminal.bars() as progress:
        report = pipeline.run(loaded, options.out, options.device, progress, processes, options.strict)
    status = finish([report], options.json)
    tell([report], options)
    log(report, options.log)
    return status
