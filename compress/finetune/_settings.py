"""What the methods of fine-tuning share."""

from compress.methods import About

TUNED = About(at_run_time="the model runs as before", calibrated=True, smaller=False, trains=True)
