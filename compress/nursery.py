"""A process that has imported what others need, and is copied for each of them.

A copy starts in a tenth of a second, while importing takes seconds. Whatever else a fresh process has, a copy has too: memory, threads and
handles of its own, and nothing of any model.

CUDA doesn't survive a copy made after its first use, and libraries may use it on import. So where there is a GPU, every process imports for
itself.

    python -m compress.nursery CHANNEL_FD MODULE...     starts one, as `Nursery` does
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType

from compress.hardware import has_gpu
from compress.process import Process, environment_of, fresh

PIPES = 2
IMPORTED = (
    "compress.benchmark.worker", "compress.stage", "compress.engines.transformers.engine",  # transformers itself, which takes the longest
    "compress.benchmark.scorer", "rouge_score.tokenizers",  # with NLTK, and that with scikit-learn
)  # fmt: skip
_current: "ContextVar[Nursery | None]" = ContextVar("nursery", default=None)  # of this thread


@contextmanager
def nursery() -> Iterator[None]:
    """In this block, or a function that it decorates, `copied` copies one process, which ends with the block. Inner blocks share it."""
    if _current.get() or has_gpu():
        yield
        return
    with Nursery() as current:
        token = _current.set(current)
        try:
            yield
        finally:
            _current.reset(token)


def copied(module: str, pipes: tuple[int, int], log: Path, environment: Mapping[str, str]) -> Process:
    """A process that runs a module with these ends of pipes: a copy, or a fresh one where none can be made.

    environment   of a fresh one; a copy has its nursery's, which differs only in the threads that torch begins with
    """
    current = _current.get()
    return (current and current.copy(module, pipes, log)) or fresh(module, pipes, log, environment)


class Copy:
    """A copied process, with what `compress.process.Process` asks of one."""

    def __init__(self, pid: int, nursery: "Nursery"):
        self.pid, self._nursery = pid, nursery
        self._code: int | None = None

    def wait(self) -> int:
        if self._code is None:
            self._code = self._nursery.ended(self.pid)
        return self._code


class Nursery:
    """The process that is copied. A context; leaving it ends the nursery and with it all of its copies."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *IMPORTED], pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment_of(None), start_new_session=True,
            )  # fmt: skip

    def copy(self, module: str, pipes: tuple[int, int], log: Path) -> Copy | None:
        """A copy that runs a module with these ends of pipes; None where this process has ended, as it does where it can't import."""
        with log.open("ab") as output:
            message = json.dumps({"module": module, "pipes": pipes}).encode()
            with contextlib.suppress(OSError):
                socket.send_fds(self._channel, [message], [*pipes, output.fileno()])
        answer = self._answer()
        return None if answer is None else Copy(answer, self)

    def ended(self, pid: int) -> int:
        """The exit code of a copy once it has ended, negative for a signal."""
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps({"wait": pid}).encode())
        answer = self._answer()
        return -signal.SIGKILL if answer is None else answer  # where this process has died, the kernel has killed its copies

    def _answer(self) -> int | None:
        with contextlib.suppress(OSError):
            if answer := self._channel.recv(64):
                return int(answer)
        return None

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._channel.close()


def main() -> None:
    """The nursery's own side: import, then copy itself whenever it is asked to, and say how copies ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    while True:
        message, handles, _, _ = socket.recv_fds(channel, 1 << 16, PIPES + 1)
        if not message:
            return
        asked = json.loads(message)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            channel.send(str(os.waitstatus_to_exitcode(status)).encode())
        elif os.fork() == 0:
            _become(asked["module"], handles, channel)
        for handle in handles:
            os.close(handle)


def _become(module: str, handles: list[int], channel: socket.socket) -> None:
    """In the copy: be the module's process."""
    code = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(handles[PIPES], stream)
        os.close(handles[PIPES])
        channel.send(str(os.getpid()).encode())
        channel.close()
        sys.argv = [module, *map(str, handles[:PIPES])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that the module is imported already
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for output in (sys.stdout, sys.stderr):
            output.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
