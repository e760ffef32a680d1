"""Foretell what a recipe takes, from its model's config.json only: memory at each point and dtype, time and disk.

Nothing is loaded. Sizes are for this machine, or for a GPU of a known kind.

Exit status: 0 foretold, 2 bad input.

Example:  compress plan recipes/quickstart.yaml --gpu h100-80gb
"""

from argparse import ArgumentParser, Namespace

from compress.verbs._answer import print_json
from compress.verbs._arguments import overriding


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    overriding(parser)
    parser.add_argument("--gpu", metavar="NAME", help="a kind of GPU, such as h100-80gb; by default this machine's own, or its CPU")


def call(options: Namespace) -> int:
    from compress import terminal
    from compress.forecast import machine, plan
    from compress.recipe import load

    loaded = load(options.recipe, options.set)
    place = machine.named(options.gpu) if options.gpu else machine.here(loaded.benchmark.threads)
    forecast = plan.plan(loaded, place)
    if options.json:
        print_json(forecast.as_json())
    else:
        terminal.show_plan(forecast)
    return 0
