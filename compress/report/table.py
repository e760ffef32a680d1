"""Tables that show what they are given as text, whatever it holds: in Markdown, HTML, LaTeX and for a terminal."""

import html
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from compress.errors import printable

Grid = list[list[list[str]]]  # rows of cells of lines


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; cells are shown as they are, whatever they hold."""
    lines = [[cell(text) for text in header], ["---"] * len(header), *([cell(text) for text in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text as Markdown shows it literally: no markup, no links, no pictures, no line breaks but <br>."""
    return re.sub(r"([\\`*_\[\]!#|~])", r"\\\1", html.escape(printable(text), quote=False)).replace("\n", "<br>")


def html_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of HTML."""
    lines = [("th", header), *(("td", row) for row in rows)]
    shown = ["<tr>" + "".join(f"<{tag}>{html.escape(printable(text))}</{tag}>" for text in line) + "</tr>" for tag, line in lines]
    return "<table>\n" + "\n".join(shown) + "\n</table>"


def latex_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of LaTeX, for the package booktabs: the first two columns are flush left."""
    head, *body = (" & ".join(map(latex, line)) + r" \\" for line in [header, *rows])
    columns = ("ll" + "r" * len(header))[: len(header)]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])


LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "≈": r"$\approx$", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "\n": " ", "[": "{[}", "]": "{]}", **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def latex(text: str) -> str:
    """Text as LaTeX shows it literally."""
    return "".join(LATEX.get(sign, sign) for sign in printable(text))


def room() -> int | None:
    """Columns of the terminal; None in a pipe, where nothing is cut."""
    return shutil.get_terminal_size((0, 0)).columns or None


def fitted(header: list[str], rows: list[list[str]], width: int | None) -> tuple[list[str], list[str]]:
    """Lines for a terminal, and the header of the columns that were left out for want of room.

    A table that is too wide is turned on its side; where that is too wide as well, the first column is folded and the last ones are left
    out. (rich's own tables take two milliseconds a row.)
    """
    narrow = [re.sub(r" \[|, ", "\n", title).removesuffix("]") for title in header]
    grid = _grid([narrow, *rows])
    if width is None or _width(_widths(grid)) <= width:
        return _laid(grid, left=2), []
    turned = _grid([title.replace(" [", "\n["), *column] for title, column in zip(header, zip(*rows, strict=True), strict=True))
    if _width(_widths(turned)) <= width:
        return _laid(turned, left=1), []
    folded = _grid([narrow, *(["\n".join(textwrap.wrap(row[0], max(width // 3, 20))), *row[1:]] for row in rows)])
    widths, kept = _widths(folded), len(header)
    while kept > 3 and _width(widths[:kept]) > width:
        kept -= 1
    return _laid([row[:kept] for row in folded], left=2), header[kept:]


def _grid(rows: Iterable[Sequence[str]]) -> Grid:
    return [[printable(text).expandtabs(1).split("\n") for text in row] for row in rows]


def _widths(grid: Grid) -> list[int]:
    from rich.cells import cell_len

    return [max(cell_len(line) for lines in column for line in lines) for column in zip(*grid, strict=True)]


def _width(widths: list[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _laid(grid: Grid, left: int) -> list[str]:
    """The lines of a grid whose first row is a header and whose first `left` columns are flush left. Wide characters count as two."""
    from rich.cells import cell_len

    widths = _widths(grid)

    def line(cells: Sequence[str]) -> str:
        gaps = [" " * (width - cell_len(text)) for width, text in zip(widths, cells, strict=True)]
        return "  ".join(text + gap if n < left else gap + text for n, (text, gap) in enumerate(zip(cells, gaps, strict=True))).rstrip()

    head, *body = ([line(cells) for cells in zip_longest(*row, fillvalue="")] for row in grid)
    return [*head, "  ".join("─" * width for width in widths), *(laid for row in body for laid in row)]
