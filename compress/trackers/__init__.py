"""Reports in experiment trackers.

The folder is the registry: `--log mlflow` is compress/trackers/mlflow.py. It imports the package of its own name, which the extra of that
name installs (`mlflow`). It has a function `log(report)`; the tracker's own settings (MLFLOW_TRACKING_URI, WANDB_PROJECT ...) say where to
log. A file with a leading underscore is shared.
"""

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from compress.errors import InputError, MissingPackage, RunError, in_a_line
from compress.extras import install_line

if TYPE_CHECKING:
    from compress.results.report import Report


def names() -> tuple[str, ...]:
    """The names of the trackers."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def require(trackers: Sequence[str]) -> None:
    """Raise InputError for an unknown tracker, or MissingPackage with the line that installs what one needs."""
    for name in trackers:
        if name not in names():
            raise InputError(f"log: there is no tracker {name!r}; allowed are {', '.join(names())}")
        if find_spec(name) is None:
            raise MissingPackage(f"log: {name} isn't installed here. Install with: {install_line(name)}")


def log(report: "Report", tracker: str) -> None:
    """Log a report that lies on disk into `mlflow`, `wandb` or `tensorboard`.

    The recipe's settings become parameters, the figures of both sides metrics with their units, gates and verdict tags. Training curves
    are logged step by step, and the report's files are added.

    Raises InputError or MissingPackage before anything is logged, RunError where the tracker refuses it.
    """
    require([tracker])
    try:
        import_module(f"compress.trackers.{tracker}").log(report)
    except Exception as error:  # each has errors of its own, and those of its network
        raise RunError(f"{tracker} did not take the report, which stands in {report.folder}: {in_a_line(error)}") from None
