"""Which distributions are installed here, by their metadata; nothing is imported."""

from collections.abc import Iterable
from importlib import metadata

OR = " or "  # between packages of which one is enough


def alternatives(packages: Iterable[str]) -> list[str]:
    """The names of packages, both of them for `x or y`."""
    return [name for package in packages for name in package.split(OR)]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of the packages that are installed."""
    installed = {}
    for name in alternatives(packages):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def lacking(packages: Iterable[str]) -> list[str]:
    """The packages that aren't installed."""
    return [package for package in packages if not versions([package])]
