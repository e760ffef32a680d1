"""Rows of a data set become examples: a prompt with its references, a text, or an input with its label.

Read once, in the parent, without torch; every stage and both sides then get the very same examples, whatever becomes of the files.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any

from compress import rows
from compress.errors import DataError
from compress.methods import Example
from compress.mistakes import suggest
from compress.recipe import Data, digest, fields
from compress.results.report import Split
from compress.rows import Place, Row, Table

HEAD = 200  # rows of a split that `look` reads


def examples(data: Data, folder: Path, purpose: str, samples: int | None, seed: int) -> list[Example]:
    """The examples for one purpose, as `Dataset.examples` returns them."""
    return Dataset(data, folder).examples(purpose, samples, seed)


def examples_digest(examples: Sequence[Example]) -> str:
    """A name for these examples, so that two reports can tell whether they were measured on the same ones."""
    return digest([{"id": example.id, "prompt": example.prompt, "references": example.references} for example in examples])


@dataclass(frozen=True)
class Selection:
    """The rows of a table that are examples.

    numbers   their places among all rows, from 0
    filtered  how many `data.where` leaves out
    empty     the places of those that are empty; `why` says why the first of them is
    """

    table: Table
    numbers: list[int]
    filtered: int
    empty: list[int]
    why: str | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.table.place)


class Dataset:
    """A recipe's data. Each file is read once, when one of its splits is first asked for."""

    def __init__(self, data: Data, folder: Path):
        self._data, self._folder = data, folder
        self._selections: dict[Place, Selection] = {}
        self._drawn_from: set[Place] = set()

    def examples(self, purpose: str, samples: int | None, seed: int) -> list[Example]:
        """The examples for one purpose (train, validation, evaluation), `samples` of them drawn with `seed`, in the data's order.

        Rows that `data.where` leaves out, and empty ones, are never drawn. With `data.shots`, examples of the evaluation follow so many of
        the train split. With `data.join` there is a single example, the text of all rows.

        Raises DataError, and MissingPackage where a hub id needs a package.
        """
        split = self._data.splits.get(purpose)  # type: ignore[call-overload]
        if split is None:
            raise DataError(f"data.splits: names no split for {purpose}; it has {', '.join(self._data.splits)}")
        place = rows.locate(self._data, self._folder, split)
        selection = self._selection(place)
        if self._data.join is not None and purpose == "evaluation":
            return [_joined_rows(self._data, self._data.join, selection, split)]
        _refuse_empty(self._data, selection)
        self._drawn_from.add(place)
        numbers = selection.numbers
        if samples is not None and samples < len(numbers):
            numbers = [numbers[place] for place in sorted(random.Random(seed).sample(range(len(numbers)), samples))]
        examples = [_example(self._data, selection, number) for number in numbers]
        return self._after_shots(examples) if self._data.shots and purpose == "evaluation" else examples

    def splits(self) -> list[Split]:
        """What was read so far."""
        return [self._split(place, selection) for place, selection in self._selections.items()]

    def _split(self, place: Place, selection: Selection) -> Split:
        empty = len(selection.empty) if place in self._drawn_from else 0  # in a stream they are part of the text
        return Split(
            name=place.name if isinstance(place, Path) else str(place), path=place if isinstance(place, Path) else None,
            rows=len(selection.table.rows), filtered=selection.filtered, empty=empty, why_empty=selection.why if empty else None,
            sha256=selection.table.sha256,
        )  # fmt: skip

    def _selection(self, place: Place) -> Selection:
        if place not in self._selections:
            self._selections[place] = select(self._data, rows.read(place))
        return self._selections[place]

    def _after_shots(self, examples: list[Example]) -> list[Example]:
        """The examples, each after the same few of the train split with their targets. One that is the example itself is replaced."""
        data = self._data
        drawn = self.examples("train", None, data.seed)
        random.Random(data.seed).shuffle(drawn)
        after = []
        for example in examples:
            others = list(islice((shot for shot in drawn if shot.prompt != example.prompt), data.shots))
            if len(others) < data.shots:
                raise DataError(f"data.shots: {data.shots} examples are needed, and the train split has only {len(others)} others")
            shots = "".join(f"{_joined(shot.prompt, shot.references[0])}{data.shot_separator}" for shot in others)
            end = example.content[1] if example.content else len(example.prompt)
            after.append(replace(example, prompt=shots + example.prompt, content=(0, len(shots) + end)))
        return after


def compared(splits: Sequence[Split]) -> list[Split]:
    """What was read, compared with the files as they are now."""
    changed = [split.path is not None and rows.file_digest(split.path) != split.sha256 for split in splits]
    return [split.model_copy(update={"changed": other}) for split, other in zip(splits, changed, strict=True)]


def look(data: Data, table: Table, purpose: str) -> int:
    """Make examples of the first rows of a split, as `rows.head` reads them; returns how many there are. Raises DataError."""
    selection = select(data, table)
    if data.join is None or purpose != "evaluation":
        _refuse_empty(data, selection)
    return len([_example(data, selection, number) for number in selection.numbers])


def missing(data: Data, table: Table) -> Iterator[tuple[str, str]]:
    """Each field that is named and that no row has: the key that names it, and what is wrong."""
    named = {key: _fields(getattr(data, key)) for key in ("text", "prompt", "target")}
    for key, names in {**named, "where": list(data.where)}.items():
        for name in dict.fromkeys(names):
            if name not in table.columns:
                hint = suggest(name, table.columns).partition("; supported")[0]
                what = f"the field {name!r} that {'data.where' if key == 'where' else f'the {key}'} names isn't there"
                yield key, f"{table.place}: {what}; the columns are {', '.join(table.columns) or 'none'}{hint}"


def select(data: Data, table: Table) -> Selection:
    """The rows that are examples.

    Raises DataError where none is, and where a field is named that no row has.
    """
    if not table.rows:
        raise DataError(f"{table.place}: has no rows")
    for _, problem in missing(data, table):
        raise DataError(problem)
    kept = [number for number, row in enumerate(table.rows) if all(_is_among(row.get(name), data.where[name]) for name in data.where)]
    if not kept and table.whole:
        raise DataError(f"{table.place}: data.where leaves out all of its {len(table.rows):,} rows; {_there(data, table)}")
    numbers, empty, why = [], [], None
    named = {key: _fields(getattr(data, key)) for key in ("text", "prompt", "target")}
    for number in kept:
        lack = _lack(named, data, table.rows[number])
        if lack is None:
            numbers.append(number)
        else:
            why = why or f"row {number + 1}: {lack}"
            empty.append(number)
    if kept and not numbers and table.whole:
        raise DataError(f"{table.place}, {why}; all {len(kept):,} rows are empty")
    return Selection(table, numbers, len(table.rows) - len(kept), empty, why)


def _refuse_empty(data: Data, selection: Selection) -> None:
    """Raises DataError for the first empty row with `data.empty: refuse`."""
    if (part := len(selection.empty)) and data.empty == "refuse":
        many = f"{part:,} of {part + len(selection.numbers):,} rows {'is' if part == 1 else 'are'}"
        raise DataError(f"{selection.name}, {selection.why}; {many} empty, and data.empty is refuse")


def _fields(templates: str | list[str] | None) -> list[str]:
    return [name for template in ([templates] if isinstance(templates, str) else templates or []) for name in fields(template)]


def _lack(named: dict[str, list[str]], data: Data, row: Row) -> str | None:
    """Why a row is empty, or None. It is where a named cell is empty, or where all that a text, prompt or target names is blank."""
    for key, names in named.items():
        cells = [row.get(name) for name in names]
        if (place := next((place for place, cell in enumerate(cells) if _is_null(cell)), None)) is not None:
            return f"the field {names[place]!r} that the {key} names is empty"
        if cells and all(_is_blank(cell) for cell in cells):
            return f"the {key} is empty"
    return None


def _is_null(cell: Any) -> bool:
    """Whether a cell is empty; tables say so by NaN."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _is_blank(cell: Any) -> bool:
    return all(map(_is_blank, cell)) if isinstance(cell, list) else isinstance(cell, str) and not cell.strip()


def _is_among(cell: Any, allowed: Any) -> bool:
    """Whether a cell is one of the allowed values, compared as text: the 1 of a csv file is text."""
    return not _is_null(cell) and _written(cell) in map(_written, allowed if isinstance(allowed, list) else [allowed])


def _written(value: Any) -> str:
    """A plain value as text, in one way for all its forms: 1 for 1.0, true for True."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return text.lower() if isinstance(value, bool) or text in ("True", "False") else text


def _there(data: Data, table: Table) -> str:
    """What the fields of `data.where` hold instead, the commonest values of each."""
    counts = {name: Counter(str(row.get(name))[:40] for row in table.rows).most_common(5) for name in data.where}
    return "; ".join(f"{name} is {', '.join(f'{value!r} ({count:,})' for value, count in most)}" for name, most in counts.items())


def _joined(prompt: str, target: str) -> str:
    """A prompt with its target, a blank between them where neither brings white space."""
    return f"{prompt}{target}" if prompt[-1:].isspace() or target[:1].isspace() else f"{prompt} {target}"


def _joined_rows(data: Data, separator: str, selection: Selection, split: str) -> Example:
    """All rows that `data.where` keeps as one text. Empty rows stay in, as in published figures."""
    assert data.text is not None
    texts = dict.fromkeys(sorted([*selection.numbers, *selection.empty]), "")
    for number in texts:
        row = selection.table.rows[number]
        if not any(_is_null(row.get(name)) for name in fields(data.text)):
            texts[number] = _fill(data.text, row, f"{selection.name}, row {number + 1}", "text")
    return Example(split, separator.join(texts.values()), [])


def _example(data: Data, selection: Selection, number: int) -> Example:
    row, where = selection.table.rows[number], f"{selection.name}, row {number + 1}"
    name = str(row.get("id") if row.get("id") is not None else number)
    if data.text is not None:
        return Example(name, _fill(data.text, row, where, "text"), [])
    assert data.prompt is not None
    targets = [data.target] if isinstance(data.target, str) else data.target or []
    references = [text for target in targets for text in _references(target, row, where)]
    return Example(name, _fill(data.prompt, row, where, "prompt"), references, _content(data.prompt, row))


def _content(template: str, row: Row) -> tuple[int, int]:
    """The first character of the longest field in a filled template, and the one after its last."""
    start, spans = 0, []
    for literal, name, _, _ in Formatter().parse(template):
        start += len(literal)
        if name is not None:
            spans.append((start, start + len(str(row[name]))))
            start = spans[-1][1]
    return max(spans, key=lambda span: span[1] - span[0], default=(0, start))


def _references(template: str, row: Row, where: str) -> list[str]:
    """The texts of a target; a template that is a single field may name a list of them."""
    names = fields(template)
    if len(names) == 1 and template == f"{{{names[0]}}}" and isinstance(row.get(names[0]), list):
        return [_text(text, f"{where}: a reference in {names[0]!r}") for text in row[names[0]]]
    return [_fill(template, row, where, "target")]


def _fill(template: str, row: Row, where: str, what: str) -> str:
    return template.format(
        **{name: _text(row.get(name), f"{where}: the field {name!r} that the {what} names") for name in fields(template)}
    )


def _text(value: Any, what: str) -> str:
    """A cell as text: a string, or a number or a truth value written out."""
    if _is_null(value):
        raise DataError(f"{what} is empty")
    if not isinstance(value, str | int | float | bool):
        raise DataError(f"{what} holds {type(value).__name__}, text is expected: {str(value)[:60]}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} is not valid Unicode: {text[:60]!a}") from None
    return text
