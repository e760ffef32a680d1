"""The record of a folder with a model in an engine's own format.

It is an ordinary Hugging Face folder except for the weights; the record lies beside them and says what they are.
"""

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
    weights     the dtype of most of them: float32, int8 ...
    parameters  how many weights the model has
    """

    format: str
    files: list[str]
    weights: str
    parameters: int

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Export | None:
    """The record of a folder; None for an ordinary model. Raises ModelError where it is damaged, or a file that it names is missing."""
    file = folder / FILE
    try:
        export = Export(**json.loads(file.read_text(encoding="utf-8")))
        whole = all((folder / name).is_file() for name in export.files)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError, OSError):
        raise ModelError(f"{file}: damaged") from None
    if not whole or not export.files:
        raise ModelError(f"{file}: names {', '.join(export.files) or 'no files'}, and not all of them exist")
    return export


def require(folder: Path, form: str, engine: str) -> Export:
    """The record of a folder that an engine opens. Raises ModelError where it is in another format, or damaged."""
    export = read(folder)
    if export is None or export.format != form:
        raise ModelError(f"engine: {engine}: {folder} is not in the format that it opens, which `export: {form}` writes")
    return export
