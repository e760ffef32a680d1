"""What says that a folder holds a model for an engine of its own: an ordinary Hugging Face folder but for the weights, which lie beside a
record of what they are."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.errors import ModelError

FILE = "compress_export.json"


@dataclass(frozen=True)
class Export:
    """A model in an engine's format.

    format      the `export` method that wrote it
    files       that hold weights, relative to the folder
    weights     what most of them are: float32, int8 ...
    parameters  how many numbers they stand for
    """

    format: str
    files: list[str]
    weights: str
    parameters: int

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Export | None:
    """The record of a folder; None where it holds an ordinary model. Raises ModelError where it, or a file that it names, is damaged."""
    file = folder / FILE
    try:
        export = Export(**json.loads(file.read_text(encoding="utf-8")))
        whole = all((folder / name).is_file() for name in export.files)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError, OSError):
        raise ModelError(f"{file}: damaged") from None
    if not whole or not export.files:
        raise ModelError(f"{file}: names {', '.join(export.files) or 'no files'}, of which not all are there")
    return export


def require(folder: Path, form: str, engine: str) -> Export:
    """The record of a folder that an engine opens. Raises ModelError where it is in another format, or damaged."""
    export = read(folder)
    if export is None or export.format != form:
        raise ModelError(f"engine: {engine}: {folder} holds nothing in the format that it opens, which `export: {form}` writes")
    return export
