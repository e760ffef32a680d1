"""A model on disk and in memory."""
