"""Tables that show their cells as text, whatever these hold: in Markdown, HTML, LaTeX and for a terminal."""

import html
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from compress.errors import printable

Grid = list[list[list[str]]]  # rows of cells of lines
NAMES = (200, 30, 20)  # columns that names are folded to, one after the other, until a table fits


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


def fitted(header: list[str], rows: list[list[str]], width: int | None) -> list[str]:
    """Lines for a terminal. Nothing is left out: a table that is too wide is turned on its side, its names folded. Where that is too wide
    as well, it comes in pieces below each other, each with the first column. (rich's own tables take two milliseconds a row.)
    """
    narrow = [re.sub(r" \[|, ", "\n", title).removesuffix("]") for title in header]
    grid = _grid([narrow, *rows])
    if width is None or _width(_widths(grid)) <= width:
        return _laid(grid, left=2)
    titles = [title.replace(" [", "\n[") for title in header]
    for most in NAMES if 10 * len(rows) <= width else ():  # a column is seldom narrower
        names, *cells = zip(*([_folded(row[0], most), *row[1:]] for row in rows), strict=True)
        turned = _grid([[titles[0], *names], *([title, *column] for title, column in zip(titles[1:], cells, strict=True))])
        if _width(_widths(turned)) <= width:
            return _laid(turned, left=1)
    folded = _grid([narrow, *([_folded(row[0], max(width // 3, NAMES[-1])), *row[1:]] for row in rows)])
    return "\n\n".join("\n".join(_laid(piece, left)) for piece, left in _pieces(folded, width)).split("\n")


def _folded(name: str, most: int) -> str:
    return "\n".join(textwrap.wrap(printable(name), most)) or name


def _pieces(grid: Grid, width: int) -> list[tuple[Grid, int]]:
    """A grid in pieces that fit, and how many of their columns are flush left; each has the first column."""
    widths, pieces = _widths(grid), [[0, 1]]
    for column in range(2, len(widths)):
        if _width([widths[place] for place in [*pieces[-1], column]]) > width and len(pieces[-1]) > 1:
            pieces.append([0])
        pieces[-1].append(column)
    return [([[row[place] for place in piece] for row in grid], 2 if piece[1] == 1 else 1) for piece in pieces]


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
