"""The examples of a page: both outputs of each, with what differs between them marked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from compress.errors import printable
from compress.metrics import METRICS
from compress.results.report import Prediction, Report

# words, between what both texts begin and end with: so many are compared exactly, so many with frequent ones passed over at first, which
# is fast whatever the text; beyond, time grows with their square
EXACTLY, COMPARED = 300, 1500


@dataclass
class Example:
    """An example with each report's prediction for it, None where a report lacks it."""

    prediction: Prediction
    by_report: list[Prediction | None] = field(default_factory=list)


def merged(reports: Sequence[Report]) -> tuple[dict[str, Any] | None, list[Example]]:
    """The score that examples have (its `name`, whether `lower` is better), and every example of any report once, in order."""
    by_key: dict[tuple[str, str], Example] = {}
    for number, report in enumerate(reports):
        for prediction in report.predictions:
            example = by_key.setdefault((prediction.id, prediction.prompt), Example(prediction, [None] * len(reports)))
            example.by_report[number] = prediction
    names = {report.score for report in reports if report.score}
    name = names.pop() if len(names) == 1 else None  # scores of several kinds can't be sorted together
    return ({"name": name, "lower": METRICS[name].better == "lower"} if name else None), list(by_key.values())


def ranked(examples: Sequence[Example], score: dict[str, Any] | None) -> list[int]:
    """The places of the examples, first those whose scores changed most on any candidate, then those whose outputs did."""

    def change(place: int) -> tuple[float, bool]:
        there = [p for p in examples[place].by_report if p]
        moved = [abs(p.candidate_score - p.baseline_score) for p in there if p.candidate_score is not None and p.baseline_score is not None]
        return max(moved, default=0.0) if score else 0.0, any(p.candidate != p.baseline for p in there)

    return sorted(range(len(examples)), key=change, reverse=True)


def compared(example: Example) -> dict[str, Any]:
    """The example as the page's script reads it. `outputs` has for each report the scores, the texts as `marked` returns them, and the
    share of words that changed."""
    outputs: list[dict[str, Any] | None] = []
    for p in example.by_report:
        if p is None:
            outputs.append(None)
            continue
        theirs, ours = (None if text is None else printable(text) for text in (p.baseline, p.candidate))
        both = marked(theirs, ours) if theirs is not None and ours is not None else None
        outputs.append({
            "scores": [p.baseline_score, p.candidate_score],
            "baseline": both[0] if both else theirs and [theirs], "candidate": both[1] if both else ours and [ours],
            "changed": both[2] if both else None,
        })  # fmt: skip
    first = example.prediction
    texts = {"id": printable(first.id), "prompt": printable(first.prompt), "references": [printable(text) for text in first.references]}
    return {**texts, "outputs": outputs}


def marked(theirs: str, ours: str) -> tuple[list[str], list[str], float]:
    """Both texts in pieces, of which every second differs from the other text, and the share of words that do (from 0).

    Words count, not the space between them. Joined, the pieces are the text. More than `COMPARED` words, between what both begin and end
    with, differ as one piece.
    """
    a, b = (re.findall(r"\w+\s*|[^\w\s]+\s*|^\s+", text) for text in (theirs, ours))
    head = _common(a, b)
    tail = _common(a[head:][::-1], b[head:][::-1])
    left, right = ["".join(a[:head])], ["".join(b[:head])]
    inner_a, inner_b = a[head : len(a) - tail], b[head : len(b) - tail]
    longest, matched = max(len(inner_a), len(inner_b)), head + tail
    if longest > COMPARED:
        left.append("".join(inner_a))
        right.append("".join(inner_b))
    elif longest:
        theirs_bare, ours_bare = ([word.strip() for word in inner] for inner in (inner_a, inner_b))
        matcher = SequenceMatcher(None, theirs_bare, ours_bare, autojunk=longest > EXACTLY)
        for tag, i1, i2, j1, j2 in matcher.get_opcodes():
            left.append("".join(inner_a[i1:i2]))
            right.append("".join(inner_b[j1:j2]))
            matched += i2 - i1 if tag == "equal" else 0
    if tail:
        left.append("".join(a[len(a) - tail :]))
        right.append("".join(b[len(b) - tail :]))
    return left, right, round(1 - 2 * matched / max(1, len(a) + len(b)), 4)


def _common(a: list[str], b: list[str]) -> int:
    """How many words both begin with."""
    return next((n for n, (left, right) in enumerate(zip(a, b, strict=False)) if left.strip() != right.strip()), min(len(a), len(b)))
