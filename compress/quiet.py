"""What keeps libraries quiet: variables that they read on import, and packages that must not report usage to their makers."""

import sys

QUIET = {  # errors, and nothing else
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warn after a fork
}


def silence(package: str) -> None:
    """Hide a package that reports usage from all that import it from now on."""
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]
