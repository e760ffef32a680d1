"""What keeps libraries from talking: variables that they look at when they are imported, and what tells their makers what is done."""

import sys

QUIET = {  # they say what went wrong, and nothing else
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "TOKENIZERS_PARALLELISM": "false",  # of which tokenizers warn after a fork
}


def silence(package: str) -> None:
    """Have a package that tells others what is done not be there for those that import it from now on."""
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]
