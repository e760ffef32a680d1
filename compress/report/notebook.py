"""A report as a notebook shows it."""

import html

from compress.errors import printable
from compress.report.markdown import sides
from compress.report.numbers import verdict_words
from compress.report.table import html_table
from compress.results.report import Report


def as_html(report: Report) -> str:
    """The verdict, the gates and the figures of both sides, in each of its engines."""
    return "\n".join(map(_part, report.parts))


def _part(report: Report) -> str:
    heading = f"{report.recipe}{report.inside} ({report.line or 'as it is'}): {verdict_words(report.verdict)}; {report.decided_by}"
    parts = [f"<p>{html.escape(printable(heading))}.</p>"]
    if report.gates:
        parts.append(html_table(["verdict", "gate"], [[verdict_words(gate.verdict), gate.sentence] for gate in report.gates]))
    return "\n".join([*parts, html_table(*sides(report))])
