"""Training as every family does it: Hugging Face's Trainer over the calibration's batches."""
