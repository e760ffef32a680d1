"""How work is done. No recipe says it, and only the device matters to the figures."""

import os
from dataclasses import dataclass
from pathlib import Path

from compress.methods import quiet
from compress.process import Progress


@dataclass(frozen=True)
class Execution:
    """On which device a run is executed, and what is told about it.

    device     auto, cpu or cuda
    log        a file for what working processes print
    progress   is told of every step
    strict     refuse to measure on a GPU that another process uses
    """

    device: str = "auto"
    log: Path = Path(os.devnull)
    progress: Progress = quiet
    strict: bool = False
