"""What the methods of fine-tuning share."""

from pydantic import Field

from compress.methods import About, Optimisation, TrainSettings

TUNED = About(at_run_time="the model runs as before", calibrated=True, smaller=False)


class TuneSettings(TrainSettings, Optimisation):
    """What every method of fine-tuning can be told."""

    keep_zeros: bool = Field(True, description="weights of linear layers that are zero stay zero, as after pruning")
