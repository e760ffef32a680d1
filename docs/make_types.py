"""Writes docs/types.csv and docs/types.md: which methods work on which types of model, found out by trying each on a small random one.

python docs/make_types.py [CLASS...]     from the repository's root, with the extra `test`; classes that aren't named keep their rows
"""

import sys
import tempfile
from pathlib import Path

import pandas as pd

sys.path.insert(0, ".")
from tests.architectures import BOTH_SIDES, CLASSIFIERS, DECODERS, made
from tests.test_matrix import cells

ROWS, PAGE = Path("docs/types.csv"), Path("docs/types.md")
HEAD = """# Types of model

What each method does with a small random model of each type, by `python docs/make_types.py`. *Made* means that plain transformers loads
the artifact in a process of its own with equal logits, and that all weights are accounted for. Otherwise the method refuses in a sentence,
before anything is changed. The sentences stand below.
"""


def main(names: list[str]) -> None:
    rows = pd.read_csv(ROWS).to_dict("records") if ROWS.exists() else []
    for name in names or [*DECODERS, *BOTH_SIDES, *CLASSIFIERS]:
        rows = [row for row in rows if row["type"] != name] + [tried(name)]
        table = pd.DataFrame(rows).set_index("type")
        table = table.loc[[n for n in (*DECODERS, *BOTH_SIDES, *CLASSIFIERS) if n in table.index]]
        table.to_csv(ROWS)
        PAGE.write_text(page(table), encoding="utf-8")
        print(name, flush=True)


def tried(name: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as place:
        outcomes = cells(name, made(name, Path(place) / "model"), Path(place))
    return {"type": name, **{method: text.replace(place, "").removeprefix("/") for method, text in outcomes.items()}}


def page(table: pd.DataFrame) -> str:
    reasons = list(dict.fromkeys(shortened(str(text)) for text in table.to_numpy().ravel() if text != "made"))
    marks = table.map(lambda text: "made" if text == "made" else f"[{1 + reasons.index(shortened(str(text)))}]")
    parts = [HEAD]
    for title, names in (("Decoders", DECODERS), ("Encoder-decoders", BOTH_SIDES), ("Classifiers", CLASSIFIERS)):
        part = marks.loc[[name for name in names if name in marks.index]]
        parts.append(f"## {title}\n\n{part.to_markdown()}\n")
        shares = ", ".join(f"`{method}` {share:.0%}" for method, share in (part == "made").mean().items())
        parts.append(f"Made: {shares}.\n")
    parts.append("## Why not\n\n" + "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)) + "\n")
    return "\n".join(parts)


def shortened(reason: str) -> str:
    """A sentence without the name of the type, which the row has."""
    return reason.split(": ", 1)[1] if ": " in reason and " " not in reason.split(": ", 1)[0] else reason


if __name__ == "__main__":
    main(sys.argv[1:])
