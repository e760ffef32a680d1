"""Print the JSON schema of a recipe, for editors.

Example:  compress schema > recipe.schema.json
"""

from argparse import ArgumentParser, Namespace

from compress.verbs._answer import print_json


def arguments(parser: ArgumentParser) -> None:
    """No arguments of its own."""


def call(options: Namespace) -> int:
    from compress import recipe

    print_json(recipe.schema())
    return 0
