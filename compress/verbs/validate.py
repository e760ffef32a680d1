"""Read recipes and say all that is wrong with each, without loading anything.

Where a model's config lies on this disk, what the settings do to layers of its shapes is said too.

Exit status: 0 all are right, 2 some are not.

Example:  compress validate recipes/*.yaml
"""

import sys
from argparse import ArgumentParser, Namespace

from compress.errors import CompressError, printable
from compress.verbs._answer import print_json


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")


def call(given: Namespace) -> int:
    from compress.forecast.plan import remarks
    from compress.recipe import load

    mistakes: dict[str, list[str]] = {}
    said: dict[str, list[str]] = {}
    for recipe in given.recipes:
        try:
            said[recipe] = remarks(load(recipe))
            mistakes[recipe] = []
        except CompressError as error:
            mistakes[recipe] = str(error).split("\n")
    if given.json:
        print_json({"valid": not any(mistakes.values()), "recipes": mistakes, "remarks": said})
    for recipe, lines in mistakes.items():
        for line in lines:
            print(printable(line), file=sys.stderr)
        if not lines and not given.json:
            print(f"{printable(recipe)}: a valid recipe")
            for sentence in said[recipe]:
                print(f"  {printable(sentence)}")
    return 2 if any(mistakes.values()) else 0
