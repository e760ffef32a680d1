"""List every engine that models can be measured in: what it opens, what it needs, whether that is installed here.

Example:  compress engines
"""

from argparse import ArgumentParser, Namespace

from compress.verbs._answer import print_json


def arguments(parser: ArgumentParser) -> None:
    """No arguments of its own."""


def call(options: Namespace) -> int:
    from compress import engines, terminal

    descriptions = [
        {
            "engine": name, "about": (module.__doc__ or "").split("\n")[0], "reads": module.ABOUT.reads, "export": module.ABOUT.opens,
            "tasks": list(module.ABOUT.tasks), "devices": list(module.ABOUT.devices), "packages": list(module.ABOUT.packages),
            "likelihoods": module.ABOUT.likelihoods, "installed": not module.ABOUT.missing(),
            "install": module.ABOUT.install_line if module.ABOUT.packages else None,
        }
        for name in engines.names()
        for module in [engines.find(name)]
    ]  # fmt: skip
    if options.json:
        print_json(descriptions)
    else:
        terminal.show_engines(descriptions)
    return 0
