"""How work is done, which no recipe says and no result depends on but for the device."""

import os
from dataclasses import dataclass
from pathlib import Path

from compress.methods import quiet
from compress.process import Progress


@dataclass(frozen=True)
class Execution:
    """On what and how openly a run is executed.

    device     auto, cpu or cuda
    log        a file for what working processes print
    progress   is told of every step
    strict     refuse to measure on a GPU that another process uses
    """

    device: str = "auto"
    log: Path = Path(os.devnull)
    progress: Progress = quiet
    strict: bool = False
