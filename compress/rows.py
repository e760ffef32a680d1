"""Files of rows: jsonl, json, csv and parquet beside a recipe, or a data set of the hub. Without torch.

`read` reads a whole file, `head` only its beginning.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

from compress.errors import CompressError, DataError, MissingPackage, in_a_line
from compress.extras import install_line
from compress.model.source import user_path
from compress.recipe import Data

BUILTIN = Path(__file__).parent / "builtin" / "dialogues"
ENDINGS = ("jsonl", "json", "csv", "parquet")
HEAD_BYTES = 2**22  # of a json file, whose rows can't be read one by one
LAST_BYTES = 2**16  # in which a jsonl file's last line is looked for
LONGEST_CELL = 2**31 - 1  # characters, of a csv file's cell; Python's own limit is 131,072
BETWEEN = " \t\r\n,"  # what stands between the objects of a list
Row = dict[str, Any]


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set on the hub."""

    id: str
    subset: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.id} ({self.split})"


Place = Path | HubSplit


@dataclass(frozen=True)
class Table:
    """The rows of a place.

    columns   every field that a row has, in order of appearance
    whole     whether these are all rows
    sha256    of the file, hexadecimal; None where it wasn't read whole or comes from the hub
    """

    place: Place
    rows: list[Row]
    columns: list[str]
    whole: bool = True
    sha256: str | None = None


def locate(data: Data, folder: Path, split: str) -> Place:
    """Where a split's rows are. Raises DataError where they can be nowhere."""
    place = BUILTIN if data.source == "builtin" else folder / user_path(data.source)
    try:
        return _locate(place, data, split)
    except OSError as error:  # a name that is too long, a folder that can't be looked into
        raise DataError(f"{str(place)[:200]}: {error.strerror}") from None


def _locate(place: Path, data: Data, split: str) -> Place:
    if place.is_dir():
        files = [place / f"{split}.{ending}" for ending in ENDINGS]
        if (file := next((file for file in files if file.is_file()), None)) is not None:
            return file
        if (folder := next((path for path in [*files, place / split] if path.is_dir()), None)) is not None:
            raise DataError(f"{place}: its split {split!r} is a folder, {folder.name}; a file of jsonl, json, csv or parquet is expected")
        there = sorted({file.stem for file in place.iterdir() if file.suffix[1:] in ENDINGS and file.is_file()})
        raise DataError(f"{place}: has no split {split!r} ({split}.jsonl, .json, .csv or .parquet); it has {', '.join(there) or 'none'}")
    if place.is_file():
        if place.suffix[1:] not in ENDINGS:
            raise DataError(f"{place}: is none of jsonl, json, csv and parquet, by the ending of its name")
        return place
    if data.source.startswith((".", "/", "~")) or place.suffix[1:] in ENDINGS:
        raise DataError(f"there is no file or folder {place}")
    return HubSplit(data.source, data.subset, split)


def read(place: Place) -> Table:
    """All rows of a place.

    Raises DataError for a file that can't be read, holds anything but rows or changes meanwhile, and for what the hub doesn't have. Raises
    MissingPackage where a hub id needs one.
    """
    if isinstance(place, HubSplit):
        rows, columns = _from_hub(place)
        return Table(place, rows, columns)
    with _damage(place):
        before, digest = _stamp(place), file_digest(place)
        rows = list(_rows(place))
        if _stamp(place) != before:
            raise DataError(f"{place}: was changed while it was read; run again once it is written")
        return Table(place, rows, _columns(place, rows), True, digest)


def head(file: Path, count: int) -> Table:
    """The first rows of a file, `count` or fewer. The last row of a jsonl file is checked, too: there a truncated file is damaged.

    Raises DataError as `read` does.
    """
    with _damage(file):
        if file.suffix == ".json" and file.stat().st_size > HEAD_BYTES:
            rows = list(islice(_first_objects(file), count))
            return Table(file, rows, _columns(file, rows), False)
        rows = list(islice(_rows(file), count + 1))
        whole = len(rows) <= count
        if file.suffix == ".jsonl" and not whole:
            _check_last_line(file)
        return Table(file, rows[:count], _columns(file, rows[:count]), whole)


def file_digest(file: Path) -> str | None:
    """A file's SHA-256, hexadecimal; None where it can't be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Turn the errors of readers, each with classes of its own, into DataError."""
    try:
        yield
    except CompressError:
        raise
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8") from None
    except OSError as error:
        raise DataError(f"{file}: can't be read: {error.strerror or in_a_line(error)}") from None
    except Exception as error:
        raise DataError(f"{file}: can't be read: {type(error).__name__}: {in_a_line(error)}") from None


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _rows(file: Path) -> Iterable[Row]:
    """The rows of a file, one by one where its format allows it."""
    if file.suffix == ".jsonl":
        return _lines(file)
    if file.suffix == ".csv":
        return _csv(file)
    if file.suffix == ".json":
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{file}: a list of objects is expected")
        return rows
    import pyarrow.parquet

    batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
    return chain.from_iterable(batch.to_pylist() for batch in batches)


def _columns(file: Path, rows: list[Row]) -> list[str]:
    """The fields of the rows; of parquet files those of the schema, which are there without rows, too."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(file).names)
    return list(dict.fromkeys(str(name) for row in rows for name in row))


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        names = list(reader.fieldnames or [])
        if twice := [name for number, name in enumerate(names) if name in names[:number]]:
            raise DataError(f"{file}:1: its header has {twice[0]!r} twice")
        for row in reader:
            if None in row or None in row.values():
                cells = len(row) - (None in row) + len(row.get(None, [])) - list(row.values()).count(None)
                raise DataError(f"{file}:{reader.line_num}: {cells} cells where the header has {len(names)}")
            yield dict(row)


def _lines(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _object(line, f"{file}:{number}")


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: an object is expected on each line")
    return row


def _check_last_line(file: Path) -> None:
    """Raises DataError where the last line of a jsonl file is damaged; a line longer than `LAST_BYTES` isn't checked."""
    with file.open("rb") as stream:
        stream.seek(-min(LAST_BYTES, file.stat().st_size), os.SEEK_END)
        _, newline, last = stream.read().rstrip().rpartition(b"\n")
    if newline and last:
        _object(last.decode(), f"{file}: its last line")


def _first_objects(file: Path) -> Iterator[Row]:
    """The objects of a list that end within the first bytes of its file."""
    with file.open("rb") as stream:
        text = stream.read(HEAD_BYTES).decode("utf-8-sig", errors="ignore").lstrip()
    if not text.startswith("["):
        raise DataError(f"{file}: a list of objects is expected")
    decoder, place = json.JSONDecoder(), len(text) - len(text[1:].lstrip())
    while True:
        try:
            row, place = decoder.raw_decode(text, place)
        except ValueError:  # the bytes end here; damage shows when the whole file is read
            return
        if not isinstance(row, dict):
            raise DataError(f"{file}: a list of objects is expected")
        yield row
        place = next((at for at in range(place, len(text)) if text[at] not in BETWEEN), len(text))


def require_datasets(place: HubSplit) -> None:
    """Raises MissingPackage where the library that reads the hub's data sets isn't installed."""
    if find_spec("datasets") is None:
        raise MissingPackage(
            f"data.source {place.id!r} is no file or folder here, and a hub id needs datasets. Install with: {install_line('hub')}"
        )


def _from_hub(place: HubSplit) -> tuple[list[Row], list[str]]:
    require_datasets(place)
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(place.id, place.subset, split=place.split)
        return [dict(row) for row in dataset], list(dataset.column_names)
    except Exception as error:  # no network, no such id, no such split, gated ...
        raise DataError(f"data.source {place.id!r}: neither a file or folder here nor loadable from the hub: {in_a_line(error)}") from None
