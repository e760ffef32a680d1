"""What can go wrong, in words for a person.

    CompressError
    ├── InputError            the request can't be fulfilled: exit 2
    │   ├── RecipeError       a recipe with mistakes, all of them listed
    │   ├── DataError         a data file or a row of it
    │   ├── ModelError        a model folder, its weights or its kind
    │   ├── DeviceError       a device that isn't there or that a method can't use
    │   ├── MissingPackage    a method's backend isn't installed; the message has the line that installs it
    │   └── ReportError       a report that can't be read or compared
    └── RunError              the work itself failed: exit 3
        ├── BrokenPromise     a method's result lacks what the method promises
        ├── OutOfMemory       on the host or the device
        ├── NoSpace           the disk filled while something was written
        └── ChildDied         a working process ended without an answer
            └── Killed        by signal 9, most often the kernel's for want of memory

A message names the thing, its value, what is allowed, and the way out where there is one. Errors cross from a working process to the parent
by class name, so every class is made from nothing but its message.
"""

import errno
import re

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """Text from a file, a model or a command line, without control characters, which a terminal or a browser would act upon, and without
    what no encoding has."""
    return CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def in_a_line(error: BaseException) -> str:
    """What another library's error says, short; its name where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says; its name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


class CompressError(Exception):
    """Anything this package raises on purpose."""

    exit_code = 3


class InputError(CompressError):
    """The request can't be fulfilled as it stands."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe with mistakes; the message has one a line, each with file, line and key."""


class DataError(InputError):
    """A data file that is missing, empty or malformed, or a row without a field that was named."""


class ModelError(InputError):
    """A model folder without usable weights, or of a kind that the task or the method doesn't know."""


class DeviceError(InputError):
    """A device that isn't there, or that a method can't run on."""


class MissingPackage(InputError):
    """A package that a method needs isn't installed."""


class ReportError(InputError):
    """A report that is missing, damaged, of another version or measured differently."""


class RunError(CompressError):
    """The request was right, and the work failed."""


class BrokenPromise(RunError):
    """A method's result lacks what the method promises: no layer touched, a NaN, a file that didn't shrink."""


class OutOfMemory(RunError):
    """Host or device memory ran out."""


class NoSpace(RunError):
    """The disk filled while something was written; nothing half-written is left."""


class ChildDied(RunError):
    """A working process ended without an answer: killed, crashed or over its time."""


class Killed(ChildDied):
    """A working process was killed by signal 9, most often by the kernel for want of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on the host (torch raises a plain RuntimeError) or on a GPU."""
    message = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in message for words in ("can't allocate memory", "out of memory", "cublas_status_alloc_failed"))
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that there is no space; safetensors wraps the system's error in its own, SQLite has words of its own."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        words in str(error) for words in ("No space left on device", "database or disk is full")
    )
