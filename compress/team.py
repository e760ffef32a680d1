"""Working processes that do one request together, by torch.distributed; and the copies that a launcher made of this process."""

import os
import select
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from compress import phases
from compress.errors import CompressError, InputError
from compress.process import Bars, Child, Progress, inherited, raised

SETTLE_S = 0.5  # time in which the end of a process shows


class Team:
    """Working processes that get the same request at once and do it together; used like a `Child`, as a context too.

    Each has in its environment what torch.distributed needs. Only the first one's progress and answer count.

    log   the first one's; the others' output is appended when they end
    """

    def __init__(self, module: str, log: Path, progress: Progress, processes: int):
        self._progress = progress
        self._logs = [log, *(log.with_name(f"{log.name}.{rank}") for rank in range(1, processes))]
        self._children: list[Child] = []
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        threads = None if "OMP_NUM_THREADS" in inherited() else max(1, len(os.sched_getaffinity(0)) // processes)
        try:
            for rank, file in enumerate(self._logs):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self._children.append(Child(module, file, progress, threads, own))
        except BaseException:
            self.close()
            raise

    def ask(self, request: str, **arguments: Any) -> Any:
        """The first process's answer to a request, when all have answered.

        Raises what went wrong first in any of them; the others may wait for it forever, so nothing more can be asked.
        """
        began = time.monotonic()
        for child in self._children:
            child.tell(request, arguments)
        first, working, answer, bars = self._children[0], list(self._children), None, Bars(self._progress)
        while working:
            for child in [child for child in working if child.has_spoken] or select.select(working, [], [])[0]:
                message = child.hear(request)
                if "error" in message:
                    raise self._cause(raised(message))
                if "answer" in message:
                    working.remove(child)
                    if child is first:
                        answer = message["answer"]
                        phases.told(message["spent"], time.monotonic() - began)
                elif child is first:
                    bars(*message["progress"])
        bars.end()
        return answer

    def close(self) -> None:
        """End all of them and all that they started."""
        for child in self._children:
            child.close()
        with self._logs[0].open("ab") as whole:
            for log in self._logs[1:]:
                if log.exists():
                    whole.write(log.read_bytes())
                    log.unlink()

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _cause(self, error: CompressError) -> CompressError:
        """The error, or why a process ended: one that ends makes the others fail, and their errors may arrive first."""
        time.sleep(SETTLE_S)
        return next((child.died() for child in self._children if child.has_ended), error)


def launched() -> tuple[int, int] | None:
    """This process's rank among the copies that torchrun or accelerate launch started, and their number; None without a launcher.

    Raises InputError where they are on several machines, in the first copy only. Raises it also where accelerate launch was asked for what
    it, or this package, doesn't do.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
            raise InputError(
                "accelerate launch started a single process, as it does on a CPU and with a single GPU; run compress without accelerate and"
                " give --processes, or use torchrun"
            )
        return None
    rank, processes, here = (_number_in(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if rank == 0 and here != processes:
        raise InputError(f"{processes} processes were launched, {here} of them on this machine; all must be on one")
    for strategy in ("FSDP", "DEEPSPEED"):
        if rank == 0 and os.environ.get(f"ACCELERATE_USE_{strategy}", "").lower() == "true":
            raise InputError(f"accelerate launch is configured for {strategy}, which isn't used here; launch without it")
    return rank, processes


def _number_in(name: str) -> int:
    value = os.environ.get(name, "1")  # a launcher sets all; where something else sets some, there is one process on each machine
    if not value.isdecimal():
        raise InputError(
            f"{name}={value} in the environment: a number is expected, as torchrun sets it; unset it to run without a launcher"
        )
    return int(value)


def _free_port() -> int:
    with socket.socket() as endpoint:
        endpoint.bind(("127.0.0.1", 0))
        return int(endpoint.getsockname()[1])
