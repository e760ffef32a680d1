"""Runs as tasks of a Ray cluster: one GPU a run where there are GPUs, else one run a machine, since two would disturb each other.

The cluster is the one that RAY_ADDRESS names or that `ray start` began here, else one of this machine only. Recipes, models and the folder
of reports must have the same paths on all of its machines.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from compress.errors import CompressError, MissingPackage, RunError
from compress.extras import install_line


class Workers(Protocol):
    """Where runs are done.

    room   how many at once
    """

    room: int

    def start(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """A task."""

    def first(self, tasks: list[Any]) -> tuple[Any, Any]:
        """The task that ended first, and what it returned or the CompressError that it raised."""


class Here:
    """This process, which does a task when somebody waits for it."""

    room = 1

    def start(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return lambda: _tried(work, *arguments)

    def first(self, tasks: list[Any]) -> tuple[Any, Any]:
        return tasks[0], tasks[0]()


class Cluster:
    """The workers of a Ray cluster."""

    def __init__(self, ray: Any):
        self._ray = ray
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(resources.get("GPU", 0)) for resources in machines)
        cores = [resources["CPU"] for resources in machines if resources.get("CPU")]
        shares = [max(1, resources["CPU"] // resources["GPU"]) for resources in machines if resources.get("GPU") and resources.get("CPU")]
        self._needs = {"num_gpus": 1, "num_cpus": min(shares, default=1)} if gpus else {"num_cpus": min(cores)}  # as many threads
        self.room = gpus or len(cores)

    def start(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return self._ray.remote(max_retries=0, **self._needs)(_tried).remote(work, *arguments)

    def first(self, tasks: list[Any]) -> tuple[Any, Any]:
        task = self._ray.wait(tasks)[0][0]
        try:
            return task, self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error  # what a task raised, or what Ray says of one that is lost
            return task, RunError(f"its Ray task ended: {type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}")


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A Ray cluster. Raises MissingPackage without Ray, RunError where its cluster can't be reached."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        import ray
    except ImportError:
        raise MissingPackage(f"--on ray: Ray isn't installed here. Install with: {install_line('ray')}") from None
    try:
        ray.init(log_to_driver=False, logging_level="error", configure_logging=True)
    except (ConnectionError, OSError, RuntimeError) as error:
        raise RunError(f"--on ray: the cluster can't be reached: {error}") from None
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def _tried(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return work(*arguments)
    except CompressError as error:
        return error
