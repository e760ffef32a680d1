"""Tables of Markdown that show what they are given as text, whatever it holds."""

import html
import re

from compress.errors import printable


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; cells are shown as they are, whatever they hold."""
    lines = [[cell(text) for text in header], ["---"] * len(header), *([cell(text) for text in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text as Markdown shows it literally: no markup, no links, no pictures, no line breaks but <br>."""
    return re.sub(r"([\\`*_\[\]!#|~])", r"\\\1", html.escape(printable(text), quote=False)).replace("\n", "<br>")
