"""Read recipes and list all that is wrong with each, with its model and data as far as they lie here, and with what is installed.

Nothing is loaded or fetched. Of a model's folder the config and the headers of the weights are read, of a data file the first rows. What
lies on the hub is named as not looked at. With --text-only only the recipe's text counts, for machines that lack model and data.

Where a model's config lies on this disk, it is also told what the settings do to layers of its shapes.

Exit status: 0 all are right, 2 some are not.

Example:  compress validate recipes/*.yaml
"""

import sys
from argparse import ArgumentParser, Namespace

from compress.errors import CompressError, printable
from compress.verbs._answer import print_json


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--text-only", action="store_true", help="look at nothing but the recipe's text")


def call(options: Namespace) -> int:
    from compress import preflight
    from compress.forecast.plan import remarks
    from compress.recipe import load

    mistakes: dict[str, list[str]] = {}
    seen: dict[str, list[str]] = {}
    unseen: dict[str, list[str]] = {}
    told: dict[str, list[str]] = {}
    for recipe in options.recipes:
        mistakes[recipe], seen[recipe], unseen[recipe] = [], [], []
        try:
            loaded = load(recipe)
            if not options.text_only:
                sight = preflight.look(loaded)
                mistakes[recipe], seen[recipe], unseen[recipe] = sight.mistakes, sight.seen, sight.unseen
                told[recipe] = remarks(loaded)
        except CompressError as error:
            mistakes[recipe] = str(error).split("\n")
    if options.json:
        print_json({"valid": not any(mistakes.values()), "recipes": mistakes, "looked_at": seen, "not_looked_at": unseen, "remarks": told})
    for recipe, lines in mistakes.items():
        for line in lines:
            print(printable(line), file=sys.stderr)
        if not options.json:
            if not lines:
                print(f"{printable(recipe)}: a valid recipe")
            for what, places in (("looked at", seen[recipe]), ("not looked at, for it is the hub's", unseen[recipe])):
                if places:
                    print(f"  {what}: {printable('; '.join(places))}")
            for sentence in told.get(recipe, []):
                print(f"  {printable(sentence)}")
    return 2 if any(mistakes.values()) else 0
