"""Mistakes in a recipe, gathered as they are found and said as people say them: where, what, and what was perhaps meant."""

import difflib
from typing import Any, TypeVar

from pydantic import ValidationError

from compress import yamlfile
from compress.errors import RecipeError
from compress.methods import Settings

T = TypeVar("T", bound=Settings)


class Problems:
    """Mistakes as they are found."""

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
            for item in error.errors():
                inner = tuple(part for part in item["loc"] if part != "[key]")
                where = None if prefix is None else f"{prefix}: {yamlfile.dotted(inner)}" if inner else prefix
                self.add(document, (*place, *inner), _explain(kind, dict(item)), where)
            return None

    def end(self) -> None:
        if self.lines:
            raise RecipeError("\n".join(self.lines))


def suggest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean 'bits'?` or the list of what is known."""
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _explain(kind: type[Settings], error: dict[str, Any]) -> str:
    value, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            known = _keys(kind, error["loc"][:-1])
            return f"unknown key {_short(error['loc'][-1])}{suggest(error['loc'][-1], known)}"
        case "missing":
            return "is missing"
        case "literal_error":
            allowed = context["expected"].replace(" or ", ", ").replace("'", "")
            close = difflib.get_close_matches(str(value), allowed.split(", "), n=1)
            return f"{_short(value)} is not one of {allowed}" + (f"; did you mean {close[0]!r}?" if close else "")
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
        case "less_than_equal" | "less_than":
            return f"{_short(value)} is too large; at most {context.get('le', context.get('lt'))} is allowed"
        case "finite_number":
            return f"{value!r} is not a finite number"
        case "int_parsing_size":
            return f"{_short(value)} is too large"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{_short(value)} is not a mapping of keys to values"
        case "list_type":
            return f"{_short(value)} is not a list"
        case "too_short":
            return "is an empty list; at least one entry is wanted"
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
    """The keys of the block at `place` in `kind`, walking through nested blocks."""
    block: Any = kind
    for part in place:
        field = getattr(block, "model_fields", {}).get(part)
        if field is not None:
            block = field.annotation
            block = next((a for a in getattr(block, "__args__", ()) if hasattr(a, "model_fields")), block)
    return list(getattr(block, "model_fields", {}))
