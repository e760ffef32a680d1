"""Rows of a data set become examples: a prompt with its references, a text, or an input with its label.

Read once, in the parent, without torch; both sides then get the very same examples.
"""

import csv
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from compress.errors import CompressError, DataError, MissingPackage
from compress.extras import install_line
from compress.methods import Example
from compress.model import user_path
from compress.recipe import Data, digest, fields

BUILTIN = Path(__file__).parent / "builtin" / "dialogues"
ENDINGS = ("jsonl", "json", "csv", "parquet")
Row = dict[str, Any]


def examples(data: Data, folder: Path, purpose: str, samples: int | None, seed: int) -> list[Example]:
    """The examples of one purpose (train, validation, evaluation), `samples` of them drawn with `seed`, in the data's order.

    Those of the evaluation stand behind `data.shots` of the train split, where there are to be any.

    Raises DataError.
    """
    split = data.splits.get(purpose)  # type: ignore[call-overload]
    if split is None:
        raise DataError(f"data.splits: names no split for {purpose}; it has {', '.join(data.splits)}")
    where, rows = _rows(data, folder, split)
    if not rows:
        raise DataError(f"{where}: has no rows")
    picked = range(len(rows))
    if samples is not None and samples < len(rows):
        picked = sorted(random.Random(seed).sample(range(len(rows)), samples))  # type: ignore[assignment]
    found = [_example(data, rows[number], number, where) for number in picked]
    return _after_shots(data, folder, found) if data.shots and purpose == "evaluation" else found


def _after_shots(data: Data, folder: Path, found: list[Example]) -> list[Example]:
    """The examples, each behind the same few of the train split with their targets; one that is the example itself gives way to another."""
    drawn = examples(data, folder, "train", None, data.seed)
    random.Random(data.seed).shuffle(drawn)
    after = []
    for example in found:
        others = list(islice((shot for shot in drawn if shot.prompt != example.prompt), data.shots))
        if len(others) < data.shots:
            raise DataError(f"data.shots: {data.shots} are wanted and the train split has {len(others)} other examples")
        shots = "".join(f"{_joined(shot.prompt, shot.references[0])}{data.shot_separator}" for shot in others)
        after.append(replace(example, prompt=shots + example.prompt))
    return after


def _joined(prompt: str, target: str) -> str:
    """A prompt with its target, a blank between them where neither brings white space."""
    return f"{prompt}{target}" if prompt[-1:].isspace() or target[:1].isspace() else f"{prompt} {target}"


def examples_digest(found: Sequence[Example]) -> str:
    """Names the examples, so that two reports can tell whether they were measured on the same ones."""
    return digest([asdict(example) for example in found])


def _example(data: Data, row: Row, number: int, where: str) -> Example:
    where = f"{where}, row {number + 1}"
    name = str(row.get("id") if row.get("id") is not None else number)
    if data.text is not None:
        return Example(name, _fill(data.text, row, where, "text"), [])
    assert data.prompt is not None
    targets = [data.target] if isinstance(data.target, str) else data.target or []
    references = [text for target in targets for text in _references(target, row, where)]
    if targets and not any(text.strip() for text in references):
        raise DataError(f"{where}: the target is empty")
    return Example(name, _fill(data.prompt, row, where, "prompt"), references)


def _references(template: str, row: Row, where: str) -> list[str]:
    """The texts of a target; a template that is one field alone may name a list of them."""
    names = fields(template)
    if len(names) == 1 and template == f"{{{names[0]}}}" and isinstance(row.get(names[0]), list):
        return [_text(text, True, f"{where}: a reference in {names[0]!r}", row) for text in row[names[0]]]
    return [_fill(template, row, where, "target")]


def _fill(template: str, row: Row, where: str, what: str) -> str:
    return template.format(
        **{name: _text(row.get(name), name in row, f"{where}: the field {name!r} that the {what} names", row) for name in fields(template)}
    )


def _text(value: Any, there: bool, what: str, row: Row) -> str:
    """A cell as text: a string, or a number or a truth value written out."""
    if not there:
        raise DataError(f"{what} isn't there; the row has {', '.join(map(str, row))}")
    if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN is how tables say that nothing stands there
        raise DataError(f"{what} is empty")
    if not isinstance(value, str | int | float | bool):
        raise DataError(f"{what} holds {type(value).__name__}, text is wanted: {str(value)[:60]}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} is not valid Unicode: {text[:60]!a}") from None
    return text


def _rows(data: Data, folder: Path, split: str) -> tuple[str, list[Row]]:
    """The rows of a split and what they are called in messages."""
    if data.source == "builtin":
        place = BUILTIN
    else:
        place = folder / user_path(data.source)
    try:
        return _rows_at(place, data, split)
    except OSError as error:  # a name that is too long, a folder that can't be looked into
        raise DataError(f"data.source: {str(place)[:200]}: {error.strerror}") from None


def _rows_at(place: Path, data: Data, split: str) -> tuple[str, list[Row]]:
    if place.is_dir():
        found = [place / f"{split}.{ending}" for ending in ENDINGS if (place / f"{split}.{ending}").is_file()]
        if not found:
            there = sorted(f.stem for f in place.iterdir() if f.suffix[1:] in ENDINGS)
            raise DataError(
                f"{place}: has no split {split!r} ({split}.jsonl, .json, .csv or .parquet); it has {', '.join(there) or 'none'}"
            )
        place = found[0]
    if place.is_file():
        return str(place), _read(place)
    if data.source.startswith((".", "/", "~")) or place.suffix[1:] in ENDINGS:
        raise DataError(f"data.source: there is no file or folder {place}")
    return f"{data.source} ({split})", _from_hub(data, split)


def _read(file: Path) -> list[Row]:
    if file.suffix == ".jsonl":
        return _read_lines(file)
    try:
        if file.suffix == ".json":
            rows = json.loads(file.read_text(encoding="utf-8-sig"))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise DataError(f"{file}: a list of objects is wanted")
            return rows
        if file.suffix == ".csv":
            return _read_csv(file)
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(file).to_pylist())
    except CompressError:
        raise
    except Exception as error:  # each reader raises its own kinds for a damaged file
        raise DataError(f"{file}: can't be read: {type(error).__name__}: {str(error)[:300]}") from None


def _read_csv(file: Path) -> list[Row]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                cells = len(row) - (None in row) + len(row.get(None, [])) - list(row.values()).count(None)
                raise DataError(f"{file}:{reader.line_num}: {cells} cells where the header has {len(reader.fieldnames or [])}")
            rows.append(dict(row))
    return rows


def _read_lines(file: Path) -> list[Row]:
    rows, number = [], 1
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{file}:{number}: an object is wanted on each line")
                    rows.append(row)
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}:{number}: not JSON: {getattr(error, 'msg', error)}") from None
    except OSError as error:
        raise DataError(f"{file}: can't be read: {error.strerror}") from None
    return rows


def _from_hub(data: Data, split: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise MissingPackage(
            f"data.source {data.source!r} is no file or folder here, and a hub id needs datasets. Install with: {install_line('hub')}"
        ) from None
    datasets.disable_progress_bars()
    try:
        return [dict(row) for row in datasets.load_dataset(data.source, data.subset, split=split)]
    except Exception as error:  # no network, no such id, no such split, gated ...
        raise DataError(
            f"data.source {data.source!r}: neither a file or folder here nor loadable from the hub: {str(error).splitlines()[0]}"
        ) from None
