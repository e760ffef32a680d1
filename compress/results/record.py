"""What every block of a report is."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Role = Literal["baseline", "candidate", "original"]  # of a report's sides the first two


class Record(BaseModel):
    """A block of a report."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
