"""What keeps libraries from talking where a person would read it: variables that they look at when they are imported."""

QUIET = {  # they say what went wrong, and nothing else
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "TOKENIZERS_PARALLELISM": "false",  # of which tokenizers warn after a fork
}
