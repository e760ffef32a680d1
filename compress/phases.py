"""Where a run's time goes, by phase: a clock that always runs for a single phase, the innermost.

The parent keeps the clock: what it does and what it waits for count for its current phase. A working process adds to each answer how long
it was in phases of its own, and that time is taken from the phase in which the parent waited.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

REST = "the rest"
_watch: "ContextVar[Watch | None]" = ContextVar("watch", default=None)  # of this thread


@dataclass(frozen=True)
class Phase:
    """Seconds of wall time that went into one kind of work.

    name   imports, stages, loading, generating, timing ...
    side   baseline or candidate, where the work was for one of them
    """

    name: str
    seconds: float
    side: str | None = None


class Watch:
    """A clock with a hand for each phase, of which one moves at a time."""

    def __init__(self) -> None:
        self._spent: dict[tuple[str, str | None], float] = {}
        self._now: tuple[str, str | None] = (REST, None)
        self._since = time.monotonic()

    def turn_to(self, name: str, side: str | None) -> tuple[str, str | None]:
        """Time counts for this phase from now on. Returns the phase that it counted for."""
        now = time.monotonic()
        before, self._now = self._now, (name, side)
        self.add(*before, now - self._since)
        self._since = now
        return before

    def add(self, name: str, side: str | None, seconds: float) -> None:
        self._spent[name, side] = self._spent.get((name, side), 0.0) + seconds

    @property
    def now(self) -> tuple[str, str | None]:
        """The phase that time counts for."""
        return self._now

    def phases(self) -> list[Phase]:
        """All phases so far, in the order in which they began; the time outside of them comes last."""
        self.turn_to(*self._now)
        rest = self._spent.get((REST, None), 0.0)
        named = [Phase(name, seconds, side) for (name, side), seconds in self._spent.items() if name != REST]
        return [*named, Phase(REST, rest)]

    def spent(self) -> dict[str, float]:
        """What a working process tells: seconds by name."""
        return {phase.name: round(phase.seconds, 3) for phase in self.phases() if phase.name != REST}


@contextmanager
def watching() -> Iterator[Watch]:
    """A watch for the block; one that runs already stands still meanwhile."""
    watch = Watch()
    outer = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(outer)


@contextmanager
def phase(name: str, side: str | None = None) -> Iterator[None]:
    """The time of the block counts for this phase, where a watch runs."""
    watch = _watch.get()
    if watch is None:
        yield
        return
    before = watch.turn_to(name, side)
    try:
        yield
    finally:
        watch.turn_to(*before)


def told(spent: dict[str, float], waited: float) -> None:
    """Book the seconds that a working process spent in phases of its own, at most as many as the parent waited for it."""
    watch, whole = _watch.get(), sum(spent.values())
    if watch is None or not whole:
        return
    (name, side), most = watch.now, min(1.0, waited / whole)
    for own, seconds in ((own, most * seconds) for own, seconds in spent.items()):
        watch.add(own, side, seconds)
        watch.add(name, side, -seconds)


def since_start() -> float:
    """The age of this process in seconds."""
    fields = open("/proc/self/stat").read().rpartition(")")[2].split()  # noqa: SIM115, PTH123
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def merged(*parts: list[Phase]) -> list[Phase]:
    """The phases of several watches, one after another, as those of a single watch."""
    whole = Watch()
    for phase in (phase for part in parts for phase in part):
        whole.add(phase.name, phase.side, phase.seconds)
    rest = whole._spent.pop((REST, None), 0.0)
    return [*(Phase(name, seconds, side) for (name, side), seconds in whole._spent.items()), Phase(REST, rest)]
