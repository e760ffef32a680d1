"""YAML that remembers on which line each key stands, so that a mistake can be named by file and line."""

from pathlib import Path
from typing import Any

import yaml

from compress.errors import RecipeError

Place = tuple[str | int, ...]
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast and just as safe


class Document:
    """A YAML mapping, its data plain dicts and lists.

    name   the file's name in messages
    data   its content
    """

    def __init__(self, name: str, text: str):
        self.name = name
        self._lines: dict[Place, int] = {(): 1}
        self._overridden: set[Place] = set()
        try:
            self._refuse_aliases(text)
            loader = Loader(text)
            node = loader.get_single_node()
            self._walk(node, ())
            data = loader.construct_document(node) if node is not None else None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise RecipeError(f"{name}:{line}: not YAML: {error.problem}") from None
        except RecipeError:
            raise
        except Exception as error:  # the constructors of odd tags raise whatever they come upon
            line = text.count("\n", 0, getattr(error, "position", 0)) + 1
            raise RecipeError(f"{name}:{line}: not YAML: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"{name}:1: a mapping of keys to values is expected, this is {_kind(data)}")
        self.data: dict[str, Any] = data

    def override(self, assignment: str) -> None:
        """Set one key: `stages.0.bits=4`. The value is read as YAML; mappings on the way are made."""
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise RecipeError(f"{assignment}: a key and a value are expected, as in stages.0.bits=4")
        place = located(path)
        value = Document(assignment[:200], f"value: {text}" if text.strip() else "value: null").data["value"]
        spot: Any = self.data
        key: Any
        for depth, key in enumerate(place):
            if isinstance(spot, list) and not (isinstance(key, int) and key < len(spot)):
                raise RecipeError(
                    f"{assignment}: {dotted(place[:depth])} has {len(spot)} entries, numbered from 0; {key!r} is none of them"
                )
            if not isinstance(spot, dict | list):
                raise RecipeError(f"{assignment}: {dotted(place[:depth])} is {_kind(spot)} and has no key {key!r}")
            if depth == len(place) - 1:
                spot[key] = value
            elif isinstance(spot, dict) and spot.get(key) is None:
                spot[key] = {}
            spot = spot[key]
        self._overridden.add(place)

    def at(self, place: Place) -> str:
        """Where a key stands: `file:line`, or that an override wrote it."""
        for length in range(len(place), -1, -1):
            if place[:length] in self._overridden:
                return f"{self.name} with {dotted(place[:length])} overridden"
            if place[:length] in self._lines:
                return f"{self.name}:{self._lines[place[:length]]}"
        return self.name

    def _refuse_aliases(self, text: str) -> None:
        """Refuse aliases: a few lines of them can stand for gigabytes of data, and a recipe has no use for them."""
        for event in yaml.parse(text, Loader=Loader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise RecipeError(f"{self.name}:{line}: aliases (*name) are not read; write the value out")

    def _walk(self, node: yaml.Node | None, place: Place) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key_node, value_node in node.value:
                line, key = key_node.start_mark.line + 1, str(key_node.value)
                if key in seen:
                    raise RecipeError(f"{self.name}:{line}: {dotted((*place, key))} stands twice, first on line {seen[key]}")
                seen[key] = line
                self._child(value_node, (*place, key), line)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._child(item, (*place, index), item.start_mark.line + 1)

    def _child(self, node: yaml.Node, place: Place, line: int) -> None:
        if len(place) > 20:
            raise RecipeError(f"{self.name}:{line}: nested more than 20 deep")
        self._lines[place] = line
        self._walk(node, place)


def read(path: Path) -> Document:
    """The document in a file.

    Raises RecipeError when the file is missing, unreadable or not a YAML mapping.
    """
    try:
        return Document(str(path), path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: this is a folder; a recipe is a YAML file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8 text, so not a recipe") from None
    except OSError as error:
        raise RecipeError(f"{path}: can't be read: {error.strerror}") from None


def located(path: str) -> Place:
    """The place that `stages.0.bits` means."""
    return tuple(int(part) if part.isdecimal() else part for part in path.strip().split("."))


def dotted(place: Place) -> str:
    """A place as people write it: stages[1].bits."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the recipe"


def _kind(value: object) -> str:
    kinds: list[tuple[type, str]] = [(dict, "a mapping"), (list, "a list"), (str, "text"), (bool, "true or false")]
    return "empty" if value is None else next((name for kind, name in kinds if isinstance(value, kind)), f"{value!r}")
