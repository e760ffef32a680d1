"""Working processes: all that needs torch runs in one, and the parent stays light and whole.

The parent starts `python -m MODULE REQUEST_FD REPLY_FD` and asks it one thing at a time, a JSON line each way over two
pipes of their own, so that nothing a library prints can be mistaken for an answer. While it works, the child sends progress.
A child whose parent dies is killed by the kernel; a child that dies leaves the parent a `ChildDied` with the reason.
"""

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from compress import errors
from compress.errors import ChildDied, CompressError, RunError

Progress = Callable[[str, int, int], None]  # what, and behind a semicolon how it goes; done, total
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # a spinning thread on a shared core makes the other side's turn many times slower
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # else a repository of pickles makes transformers ask a service to convert it
    "BITSANDBYTES_NOWELCOME": "1",
}


class Child:
    """A working process. Use it as a context; leaving it ends the process and its children.

    module    a module that calls `serve`
    log       a file for whatever the child prints
    threads   CPU threads for torch, None for all that the process may use
    """

    def __init__(self, module: str, log: Path, progress: Progress, threads: int | None = None):
        self._log, self._progress = log, progress
        request_read, self._request = os.pipe()
        self._reply, reply_write = os.pipe()
        environment = {**os.environ, **ENVIRONMENT}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(request_read), str(reply_write)],
                pass_fds=(request_read, reply_write), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=environment, start_new_session=True,
            )  # fmt: skip
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
        line = json.dumps({"request": request, "arguments": arguments}).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._request, line) :]
        except BrokenPipeError:
            raise self._died() from None
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while True:
            message = self._read(deadline, request)
            if "progress" in message:
                self._progress(*message["progress"])
            elif "error" in message:
                raise _error(message)
            else:
                return message["answer"]

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

    def _read(self, deadline: float | None, request: str) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reply], [], [], wait)[0]:
                self.close()
                raise ChildDied(f"{request} took longer than the limit and was stopped")
            chunk = os.read(self._reply, 1 << 20)
            if not chunk:
                raise self._died()
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return dict(json.loads(line))

    def _died(self) -> ChildDied:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            reason = "was killed (signal 9), most often because the machine ran out of memory"
        elif code < 0:
            reason = f"was ended by signal {-code} ({signal.Signals(-code).name})"
        else:
            reason = f"ended with exit code {code}"
        return ChildDied(f"the working process {reason}{self._last_words()}")

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"; its last line: {lines[-1].strip()[:300]}" if lines else ""


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """The child's side: answer requests until the parent closes the pipe or dies.

    A handler is called as handler(progress=..., **arguments) and gives plain data back.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan goes on computing
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = os.fdopen(int(sys.argv[1]), "r"), os.fdopen(int(sys.argv[2]), "w")

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    def progress(what: str, done: int, total: int) -> None:
        send({"progress": [what, done, total]})

    for line in requests:
        message = json.loads(line)
        try:
            answer = handlers[message["request"]](progress=progress, **message["arguments"])
        except Exception as error:
            traceback.print_exc()
            send(_as_message(error))
        else:
            send({"answer": answer})


def _as_message(error: Exception) -> dict[str, Any]:
    if isinstance(error, CompressError):
        return {"error": type(error).__name__, "message": str(error)}
    if is_out_of_memory(error):
        return {"error": "OutOfMemory", "message": f"memory ran out: {str(error).splitlines()[0] if str(error) else 'MemoryError'}"}
    if is_disk_full(error):
        return {"error": "NoSpace", "message": f"the disk is full: {error}"}
    return {"error": "RunError", "message": f"{type(error).__name__}: {error}"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on the host (torch raises a plain RuntimeError) or on a GPU."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in said for words in ("can't allocate memory", "out of memory", "cublas_status_alloc_failed"))
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that there is no space; safetensors wraps the system's error in its own."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _error(message: dict[str, Any]) -> CompressError:
    kind = getattr(errors, message["error"], RunError)
    return kind(message["message"]) if issubclass(kind, CompressError) else RunError(message["message"])
