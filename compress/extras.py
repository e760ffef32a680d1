"""What the extras of this package install, as a line for people who lack one.

The line names the extra's own requirements and never this package, which is on no package index. So it is right for a clone, an editable
install and a wheel alike, and fetches nobody else's package by mistake.
"""

import shlex
import tomllib
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "compress-workbench"  # `compress` on the package index is another project
PROJECT = Path(__file__).parent.parent / "pyproject.toml"  # of a clone; not there in an installed wheel


def install_line(*extras: str) -> str:
    """pip install 'compressed-tensors>=0.15'"""
    packages = dict.fromkeys(requirement for extra in extras for requirement in requirements(extra))
    return f"pip install {' '.join(shlex.quote(requirement) for requirement in packages)}"


def line_into(python: str, packages: Iterable[str]) -> str:
    """../env/bin/python -m pip install transformers"""
    return f"{python} -m pip install {' '.join(map(shlex.quote, packages))}"


def line_out_of(python: str, packages: Iterable[str]) -> str:
    """../env/bin/python -m pip uninstall -y torchvision"""
    return f"{python} -m pip uninstall -y {' '.join(map(shlex.quote, packages))}"


def line_apart(packages: str, unwanted: Sequence[str] = ()) -> str:
    """The line that makes an environment beside this one, without what is unwanted, and what to do with it."""
    python = "engine-env/bin/python"
    out = f" && {line_out_of(python, unwanted)}" if unwanted else ""
    return f"python -m venv engine-env && {line_into(python, packages.split())}{out}; and give `python: {python}` beside its name"


def requirements(extra: str) -> list[str]:
    """What an extra installs besides the package: compressed-tensors>=0.15.

    Raises KeyError for an extra that doesn't exist.
    """
    from packaging.requirements import Requirement

    declared = [Requirement(line) for line in _declared(extra)]
    if not declared:
        raise KeyError(extra)
    return [f"{requirement.name}{requirement.specifier}" for requirement in declared]


def _declared(extra: str) -> list[str]:
    """Requirement lines, of a clone by its pyproject.toml, which may be newer than what was installed from it."""
    from packaging.requirements import Requirement

    if PROJECT.is_file():
        project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
        if project["name"] == DISTRIBUTION:
            return list(project["optional-dependencies"].get(extra, []))
    # a marker that holds with the extra and not without is the extra's
    lines = [(line, Requirement(line).marker) for line in metadata.requires(DISTRIBUTION) or []]
    return [line for line, marker in lines if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})]
