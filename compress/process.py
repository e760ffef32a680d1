"""Working processes: all that needs torch runs in one, and the parent stays small and alive.

The parent starts `python -m MODULE REQUEST_FD REPLY_FD`, or a copy of a process that has imported (compress/nursery.py). It sends one
request at a time. Requests and answers are lines of JSON over two pipes of their own, so that nothing a library prints can be mistaken for
an answer. While it works, the child sends progress. A child whose parent dies is killed by the kernel; a child that dies leaves the parent
a `ChildDied` with the reason.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from compress import errors, phases
from compress.errors import ChildDied, CompressError, Killed, RunError, is_disk_full, is_out_of_memory
from compress.interpreter import spawned
from compress.quiet import QUIET

Progress = Callable[[str, int, int], None]  # a step, with its state after a semicolon; done, total
ENVIRONMENT = {
    **QUIET,
    "OMP_WAIT_POLICY": "passive",  # a spinning thread on a shared core makes the other side's turn many times slower
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # else a repository of pickles makes transformers ask a service to convert it
}
LAUNCHER = (  # what torchrun and accelerate launch set for their copies; our processes get their own
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_")


class Process(Protocol):
    """What a child needs to know of its process; `subprocess.Popen` is one."""

    pid: int

    def wait(self) -> int: ...


Start = Callable[[str, tuple[int, int], Path, Mapping[str, str]], Process]  # a module, its ends of pipes, a log, variables


def fresh(module: str, pipes: tuple[int, int], log: Path, environment: Mapping[str, str]) -> Process:
    """A new process that runs a module with these ends of pipes."""
    return spawned([sys.executable, "-m", module], pipes, log, environment)


def environment_of(threads: int | None) -> dict[str, str]:
    """The variables of a working process."""
    limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**inherited(), **ENVIRONMENT, **limit}


class Child:
    """A working process. Use it as a context; leaving it ends the process and its children.

    module       a module that calls `serve`
    log          a file for whatever the child prints
    threads      CPU threads for torch, None for all that the process may use
    environment  more variables for it
    start        what starts the process
    """

    def __init__(
        self, module: str, log: Path, progress: Progress, threads: int | None = None, environment: Mapping[str, str] | None = None,
        start: Start = fresh,
    ):  # fmt: skip
        self._log, self._progress = log, progress
        request_read, self._request = os.pipe()
        self._reply, reply_write = os.pipe()
        try:
            with phases.phase("imports"):  # a copy begins when what it copies has imported
                self._process = start(module, (request_read, reply_write), log, {**environment_of(threads), **(environment or {})})
        except BaseException:
            os.close(self._request)
            os.close(self._reply)
            raise
        finally:
            os.close(request_read)
            os.close(reply_write)
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: str, limit_s: float | None = None, **arguments: Any) -> Any:
        """The child's answer to a request.

        Raises what the child raised, or ChildDied when it ended or took longer than `limit_s` seconds.
        """
        began = time.monotonic()
        self.tell(request, arguments)
        deadline = None if limit_s is None else began + limit_s
        bars = Bars(self._progress)
        while "progress" in (message := self.hear(request, deadline)):
            bars(*message["progress"])
        phases.told(message["spent"], time.monotonic() - began)
        answer = _answer(message)
        bars.end()
        return answer

    def ask_in_slices(self, request: str, limit_s: float, **arguments: Any) -> Generator[float, None, Any]:
        """The child's answer, as `ask` has it. Yields the share that is done after each progress, while the child waits.

        limit_s   for all slices together
        """
        self.tell(request, arguments, paced=True)
        deadline = time.monotonic() + limit_s
        while "progress" in (message := self.hear(request, deadline)):
            _, done, total = message["progress"]
            left = deadline - time.monotonic()
            yield done / total
            deadline = time.monotonic() + left
            self._write(b"\n")
        return _answer(message)

    def tell(self, request: str, arguments: dict[str, Any], paced: bool = False) -> None:
        """Ask without waiting for the answer; a `paced` child waits after each progress for a line. Raises ChildDied."""
        self._write(json.dumps({"request": request, "arguments": arguments, "paced": paced}).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._request, line) :]
        except BrokenPipeError:
            raise self.died() from None

    def hear(self, request: str, deadline: float | None = None) -> dict[str, Any]:
        """The child's next message on a request. Raises ChildDied."""
        while not self.has_spoken:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reply], [], [], wait)[0]:
                self.close()
                raise ChildDied(f"{request} took longer than the limit and was stopped")
            chunk = os.read(self._reply, 1 << 20)
            if not chunk:
                raise self.died()
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return dict(json.loads(line))

    @property
    def has_spoken(self) -> bool:
        """Whether a message is here that `hear` gives at once."""
        return b"\n" in self._buffer

    @property
    def has_ended(self) -> bool:
        """Whether the child has ended; what it sent before can still be heard."""
        while select.select([self._reply], [], [], 0)[0]:
            chunk = os.read(self._reply, 1 << 20)
            if not chunk:
                return True
            self._buffer += chunk
        return False

    def fileno(self) -> int:
        """What `select` waits on for messages."""
        return self._reply

    def close(self) -> None:
        """End the child and all that it started."""
        with contextlib.suppress(ProcessLookupError):  # it may be gone already
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._request, self._reply):
            if pipe >= 0:
                os.close(pipe)
        self._request = self._reply = -1

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def died(self) -> ChildDied:
        """The error for a child that has ended, with the reason."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return Killed(
                f"the working process was killed (signal 9), most often because the machine ran out of memory{self._last_words()}"
            )
        if code < 0:
            reason = f"was ended by signal {-code} ({signal.Signals(-code).name})"
        else:
            reason = f"ended with exit code {code}"
        return ChildDied(f"the working process {reason}{self._last_words()}")

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"; its last line: {lines[-1].strip()[:300]}" if lines else ""


class Bars:
    """Passes progress on, and ends every step with the answer: training may end early, and some loops report only their beginnings."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._open: dict[str, tuple[str, int]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        self._progress(what, done, total)
        step = what.partition(";")[0]
        if done < total:
            self._open[step] = (what, total)
        else:
            self._open.pop(step, None)

    def end(self) -> None:
        for what, total in self._open.values():
            self._progress(what, total, total)


def inherited() -> dict[str, str]:
    """This process's environment without a launcher's variables."""
    variables = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith(LAUNCHER_PREFIXES)}
    if "RANK" in os.environ and variables.get("OMP_NUM_THREADS") == "1":
        del variables["OMP_NUM_THREADS"]  # launchers set it for their copies, of which only one works here
    return variables


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """The child's side: answer requests until the parent closes the pipe or dies.

    A handler is called as handler(progress=..., **arguments) and returns plain data. Where the request is paced, `progress` returns when
    the parent says so.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan goes on computing
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = os.fdopen(int(sys.argv[1]), "r"), os.fdopen(int(sys.argv[2]), "w")
    spent = {"imports": phases.since_start()}

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    def progress(what: str, done: int, total: int) -> None:
        send({"progress": [what, done, total]})
        if paced:
            requests.readline()

    for line in iter(requests.readline, ""):
        message = json.loads(line)
        paced = message["paced"]
        with phases.watching() as watch:
            try:
                reply = {"answer": handlers[message["request"]](progress=progress, **message["arguments"])}
            except Exception as error:
                traceback.print_exc()
                reply = _as_message(error)
        send({**reply, "spent": {**spent, **watch.spent()}})
        spent = {}


def _answer(message: dict[str, Any]) -> Any:
    if "error" in message:
        raise raised(message)
    return message["answer"]


def _as_message(error: Exception) -> dict[str, Any]:
    if isinstance(error, CompressError):
        return {"error": type(error).__name__, "message": str(error)}
    if is_out_of_memory(error):
        return {"error": "OutOfMemory", "message": f"memory ran out: {str(error).splitlines()[0] if str(error) else 'MemoryError'}"}
    if is_disk_full(error):
        return {"error": "NoSpace", "message": f"the disk is full: {error}"}
    return {"error": "RunError", "message": f"{type(error).__name__}: {error}"}


def raised(message: dict[str, Any]) -> CompressError:
    """The error that the child raised, from its message."""
    kind = getattr(errors, message["error"], RunError)
    return kind(message["message"]) if issubclass(kind, CompressError) else RunError(message["message"])
