"""Mistakes in a recipe, collected and put in plain words: where, what, and what was perhaps meant."""

import difflib
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from compress import yamlfile
from compress.errors import RecipeError
from compress.methods import Settings

T = TypeVar("T", bound=Settings)


class Problems:
    """A list of mistakes that grows as a recipe is read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, document: yamlfile.Document, place: yamlfile.Place, message: str, where: str | None = None) -> None:
        where = yamlfile.dotted(place) if where is None else where
        self.lines.append(f"{document.at(place)}: {where}: {message}")

    def validate(self, kind: type[T], data: Any, document: yamlfile.Document, place: yamlfile.Place, prefix: str | None = None) -> T | None:
        """The block as `kind`, or None with its mistakes noted. `prefix` is how messages call the block."""
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            for loc, message in _explained(kind, [dict(item) for item in error.errors()]):
                inner = tuple(part for part in loc if part != "[key]")
                where = None if prefix is None else f"{prefix}: {yamlfile.dotted(inner)}" if inner else prefix
                self.add(document, (*place, *inner), message, where)
            return None

    def end(self) -> None:
        if self.lines:
            raise RecipeError("\n".join(self.lines))


def suggest(word: str, allowed: list[str] | tuple[str, ...]) -> str:
    """`; did you mean 'bits'?`, or the list of what is allowed."""
    close = difflib.get_close_matches(str(word), allowed, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; supported: {', '.join(allowed)}"


def _explained(kind: type[Settings], errors: list[dict[str, Any]]) -> list[tuple[yamlfile.Place, str]]:
    """Place and message of each mistake. Where a key takes several forms, of the form that was meant, or one message for all."""
    mistakes: list[tuple[yamlfile.Place, str]] = []
    forms: dict[yamlfile.Place, list[dict[str, Any]]] = {}
    for error in errors:
        depth = _union(kind, error["loc"])
        if depth is None:
            mistakes.append((error["loc"], _explain(kind, error)))
        else:
            forms.setdefault(error["loc"][:depth], []).append(error)
    for place, tried in forms.items():
        depth = len(place)
        meant = [
            error for error in tried if len(error["loc"]) > depth + 1 or not error["type"].endswith(("_type", "_parsing", "literal_error"))
        ]
        for error in meant:
            mistakes.append(((*place, *error["loc"][depth + 1 :]), _explain(kind, error)))
        if not meant:
            value = _short(tried[0]["input"])
            expected = [_explain(kind, error).removeprefix(f"{value} is not ") for error in tried]
            mistakes.append((place, f"{value} is not {', nor '.join(expected)}"))
    return mistakes


def _union(kind: type[Settings], loc: tuple[str | int, ...]) -> int | None:
    """How many parts of an error's place lead to a key, or an entry of a list, that takes several forms; None where none does.

    The part after them is pydantic's name for a form.
    """
    block: Any = kind
    for depth, part in enumerate(loc):
        forms = _forms(block, part)
        if not forms:
            return None
        if len(forms) > 1:
            return depth + 1
        block = forms[0]
    return None


def _forms(block: Any, part: str | int) -> list[Any]:
    """What may stand at a key of a block, or in a list or a mapping: each form but null."""
    if get_origin(block) is Annotated:
        block = get_args(block)[0]
    if get_origin(block) in (list, dict):
        value = get_args(block)[-1]
    elif (field := getattr(block, "model_fields", {}).get(part)) is not None:
        value = field.annotation
    else:
        return []
    return [form for form in get_args(value) if form is not NoneType] if get_origin(value) in (Union, UnionType) else [value]


def _explain(kind: type[Settings], error: dict[str, Any]) -> str:
    value, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            keys = _keys(kind, error["loc"][:-1])
            return f"unknown key {_short(error['loc'][-1])}{suggest(error['loc'][-1], keys)}"
        case "missing":
            return "is missing"
        case "literal_error":
            allowed = context["expected"].replace(" or ", ", ").replace("'", "")
            close = difflib.get_close_matches(str(value), allowed.split(", "), n=1)
            return f"{_short(value)} is not {'one of ' * (', ' in allowed)}{allowed}" + (f"; did you mean {close[0]!r}?" if close else "")
        case "value_error":
            return str(context["error"])
        case "bool_parsing" | "bool_type":
            return f"{_short(value)} is not true or false"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"{_short(value)} is not a whole number"
        case "float_parsing" | "float_type":
            return f"{_short(value)} is not a number"
        case "string_type":
            return f"{_short(value)} is not text; put it in quotes"
        case "greater_than_equal":
            return f"{value!r} is less than {context['ge']}"
        case "greater_than":
            return f"{value!r} is not above {context['gt']}"
        case "less_than_equal":
            return f"{_short(value)} is too large; at most {context['le']} is allowed"
        case "less_than":
            return f"{_short(value)} is too large; it must be below {context['lt']}"
        case "finite_number":
            return f"{value!r} is not a finite number"
        case "int_parsing_size":
            return f"{_short(value)} is too large"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{_short(value)} is not a mapping of keys to values"
        case "list_type":
            return f"{_short(value)} is not a list"
        case "too_short":
            return "is empty; at least one entry is expected"
        case "string_too_short":
            return "is empty"
        case "invalid_key":
            return f"{error['loc'][-1]!r} is not a key; keys are text"
        case _:
            return f"{_short(value)}: {error['msg'].removeprefix('Input ')}"


def _short(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _keys(kind: type[Settings], place: tuple[str | int, ...]) -> list[str]:
    """The keys of the block at `place` in `kind`, walking through nested blocks, lists, and pydantic's names for forms."""
    block: Any = kind
    for part in place:
        forms = _forms(block, part)
        block = next((form for form in forms if hasattr(form, "model_fields")), forms[0] if forms else block)
    return list(getattr(block, "model_fields", {}))
