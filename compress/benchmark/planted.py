"""A measuring process with a fault of known size, for the selftest: what is planted must be found."""

import time
from typing import Any

from compress.benchmark.worker import Worker
from compress.process import Progress, serve


class Planted(Worker):
    """A worker whose model is slower, or whose process holds more, than the same model's."""

    def plant(self, progress: Progress, slowdown: float, resident_bytes: int) -> None:
        """What `load` adds: every step of the model takes this share longer, and so many bytes stay resident."""
        self._slowdown, self._resident_bytes = slowdown, resident_bytes

    def load(
        self, progress: Progress, source: dict[str, Any], device: str, threads: int | None, runtime: dict[str, bool]
    ) -> dict[str, Any]:
        found = super().load(progress, source, device, threads, runtime)
        forward = self.model.forward

        def slower(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            made = forward(*args, **kwargs)
            end = time.perf_counter()
            while time.perf_counter() < end + self._slowdown * (end - start):
                pass
            return made

        if self._slowdown:
            self.model.forward = slower
        self._held = bytearray(b"\1") * self._resident_bytes
        return found


if __name__ == "__main__":
    worker = Planted()
    serve({"plant": worker.plant, "load": worker.load, "warm_up": worker.warm_up, "turn": worker.turn, "quality": worker.quality})
