"""The command line: a verb is a file of `compress/verbs`, whose docstring is its help.

A verb imports what it needs when it is called, so that help and validation answer at once. That is also why argparse does the parsing: the
libraries that are nicer to write for take a fifth of the time that validation may take.
"""

import argparse
import gc
import importlib
import os
import shutil
import signal
import sys
import textwrap
import warnings
from typing import NoReturn

from compress.errors import CompressError, printable
from compress.quiet import QUIET
from compress.verbs._answer import ignore_stdout

# in the order that help has them
VERBS = (
    "run", "sweep", "search", "bench", "inspect", "plan", "validate", "compare", "check", "history", "publish", "methods", "engines",
    "schema",
)  # fmt: skip

# Validation answers at once only if pydantic doesn't search every installed package for plugins, of which we have none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def parser() -> argparse.ArgumentParser:
    """Every verb with its arguments."""
    program = argparse.ArgumentParser(
        "compress",
        description="Make a language model smaller, measure both alike, and learn whether the smaller one may replace the bigger.",
    )
    verbs = program.add_subparsers(title="verbs", required=True, metavar="VERB")
    for name in VERBS:
        verb = importlib.import_module(f"compress.verbs.{name}")
        text = (verb.__doc__ or "").strip()
        added = verbs.add_parser(
            name, help=text.split("\n")[0], description=wrapped(text), formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )  # fmt: skip
        added.set_defaults(call=verb.call)
        added.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
        verb.arguments(added)
    return program


def wrapped(text: str) -> str:
    """A text whose paragraphs fit the terminal; examples, which are to be copied, stay as they are."""
    width = shutil.get_terminal_size().columns - 2
    paragraphs = text.split("\n\n")
    return "\n\n".join(part if part.startswith((" ", "Example")) else textwrap.fill(" ".join(part.split()), width) for part in paragraphs)


def main() -> NoReturn:
    """The program: errors become one line and an exit status, an interrupt becomes 130."""
    _quiet()
    gc.disable()  # imports make many objects and no rubbish: a tenth of the time that validation takes
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_signal)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 for as long as the program runs
        getattr(sys, name).reconfigure(errors="replace")  # an encoding without a sign must not cost the rest
    try:
        arguments = parser().parse_args()
        code = arguments.call(arguments)
        sys.stdout.flush()
        sys.exit(code)
    except CompressError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written is left", 130)
    except BrokenPipeError:  # the reader of a pipe has enough, as `head` does
        ignore_stdout()
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'standard output'}: {error.strerror or error}", 3)
    except Exception as error:
        _fail(f"unexpected {type(error).__name__}: {error} (a fault of this program, not of yours)", 3)


def _quiet() -> None:
    """Keep libraries' messages off the terminal; PYTHONWARNINGS brings warnings back, the libraries' own variables the rest."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _on_signal(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    print(f"compress: {printable(message)}", file=sys.stderr)
    sys.exit(code)
