"""What crosses the border to a working process: requests and answers.

A request is a frozen record that names the type of its answer. Both are validated on arrival. Either side imports the records; none of
them needs torch.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import is_dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import msgspec

from compress.errors import RunError
from compress.process import Progress

Answer = TypeVar("Answer")
Handler = Callable[[Progress, Any], Any]  # of a request


class Request(Generic[Answer]):
    """The base of requests, which are frozen dataclasses; `answer` is the type of what comes back."""

    answer: ClassVar[Any]


class Asked(Protocol):
    """A working process: `compress.process.Child` or `compress.team.Team`."""

    def ask(self, request: str, **arguments: Any) -> Any: ...


class AskedInSlices(Protocol):
    def ask_in_slices(self, request: str, limit_s: float, **arguments: Any) -> Generator[float, None, Any]: ...


def ask(process: Asked, request: Request[Answer], limit_s: float | None = None) -> Answer:
    """The process's answer to a request, as `Child.ask` has it. Raises RunError for an answer that isn't of its type."""
    limit = {} if limit_s is None else {"limit_s": limit_s}
    return _typed(request, process.ask(type(request).__name__, **limit, **plain(request)))


def ask_in_slices(process: AskedInSlices, request: Request[Answer], limit_s: float) -> Generator[float, None, Answer]:
    """As `Child.ask_in_slices` has it."""
    answer = yield from process.ask_in_slices(type(request).__name__, limit_s, **plain(request))
    return _typed(request, answer)


def answering(handlers: Mapping[type, Handler]) -> dict[str, Callable[..., Any]]:
    """Handlers of requests by their types, for `compress.process.serve`."""

    def taking(kind: type, handler: Handler) -> Callable[..., Any]:
        def handle(progress: Progress, **arguments: Any) -> Any:
            return plain(handler(progress, _decoded(arguments, kind)))

        return handle

    return {kind.__name__: taking(kind, handler) for kind, handler in handlers.items()}


def plain(record: Any) -> Any:
    """A record as JSON has it."""
    return msgspec.to_builtins(record)


def _typed(request: Request[Answer], answer: Any) -> Answer:
    decoded: Answer = _decoded(answer, type(request).answer)
    return decoded


def _decoded(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        name = kind.__name__ if is_dataclass(kind) and isinstance(kind, type) else kind
        raise RunError(f"the working process and this one don't know the same {name}: {error}; are both of one version?") from None
