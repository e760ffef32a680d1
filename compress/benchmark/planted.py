"""A measuring process with a fault of known size, for the selftest, which must detect it."""

import time
from dataclasses import dataclass
from typing import Any

from compress.benchmark.messages import Load, Loaded
from compress.benchmark.worker import Worker, serve_by
from compress.border import Request, answering
from compress.process import Progress


@dataclass(frozen=True)
class Plant(Request[None]):
    """The fault that the next `load` adds: every step takes this share longer, and this many bytes stay resident."""

    answer = None

    slowdown: float = 0.0
    resident_bytes: int = 0


class Planted(Worker):
    """A worker whose model is slower, or whose process holds more memory, than without the fault."""

    def plant(self, progress: Progress, request: Plant) -> None:
        self._fault = request

    def load(self, progress: Progress, request: Load) -> Loaded:
        from compress.engines.transformers.engine import Transformers

        loaded = super().load(progress, request)
        assert isinstance(self.engine, Transformers)
        model, slowdown = self.engine.model, self._fault.slowdown
        forward = model.forward

        def slower(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = forward(*args, **kwargs)
            end = time.perf_counter()
            while time.perf_counter() < end + slowdown * (end - start):
                pass
            return output

        if slowdown:
            model.forward = slower
        self._held = bytearray(b"\1") * self._fault.resident_bytes
        return loaded


if __name__ == "__main__":
    worker = Planted()
    serve_by(worker, answering({Plant: worker.plant}))
