"""Measure one model with the harness: no stages, no baseline.

Exit status: 0 measured, 2 bad input, 3 the run failed.

Example:  compress bench ./my-model --recipe recipes/quickstart.yaml
"""

import gc
from argparse import ArgumentParser, Namespace

from compress.verbs._answer import finish, log
from compress.verbs._arguments import measuring, tracking


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model folder, a hub id, or builtin")
    parser.add_argument("--recipe", required=True, metavar="RECIPE", help="data, metrics and benchmark are taken from this recipe")
    measuring(parser)
    tracking(parser)


def call(options: Namespace) -> int:
    gc.enable()  # which `main` turned off, for verbs that answer at once
    from compress import pipeline, terminal, trackers
    from compress.recipe import load

    trackers.require(options.log)
    loaded = load(options.recipe, options.set)
    with terminal.bars() as progress:
        report = pipeline.bench(options.model, loaded, options.out, options.device, progress, options.strict)
    status = finish([report], options.json, measured_only=True)
    log(report, options.log)
    return status
