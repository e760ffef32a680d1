"""List every method: family, what it needs, whether that is installed here, on which devices it works.

Example:  compress methods
"""

from argparse import ArgumentParser, Namespace

from compress.verbs._answer import print_json


def arguments(parser: ArgumentParser) -> None:
    """No arguments of its own."""


def call(options: Namespace) -> int:
    from compress import terminal
    from compress.methods import everyone

    descriptions = [
        {
            "family": family, "method": name, "about": (method.__doc__ or "").split("\n")[0], "packages": list(method.ABOUT.packages),
            "extra": method.ABOUT.extra, "install": method.ABOUT.install_line if method.ABOUT.packages else None,
            "installed": not method.ABOUT.missing(), "devices": list(method.ABOUT.devices),
            "packs": method.ABOUT.packs, "calibrated": method.ABOUT.calibrated, "at_run_time": method.ABOUT.at_run_time,
        }
        for family, name, method in everyone()
    ]  # fmt: skip
    if options.json:
        print_json(descriptions)
    else:
        terminal.show_methods(descriptions)
    return 0
