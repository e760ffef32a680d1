"""Which distributions are installed here, by their metadata; nothing is imported."""

from collections.abc import Iterable
from importlib import metadata

OR = " or "  # between those of which one is enough


def alternatives(packages: Iterable[str]) -> list[str]:
    """The names in packages, of `one or another` both."""
    return [name for package in packages for name in package.split(OR)]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    installed = {}
    for name in alternatives(packages):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def lacking(packages: Iterable[str]) -> list[str]:
    """Those that aren't installed."""
    return [package for package in packages if not versions([package])]
