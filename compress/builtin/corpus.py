"""The builtin corpus: short dialogues with summaries, written by the grammar in scenarios.yaml.

Everything in it is made up here, so it may be shipped. Every row can be written again from its seed:

    python -m compress.builtin.corpus            # writes train, validation and test beside this file

Each dialogue is a scenario with its slots filled, and small talk around it that no summary mentions. Now and then an
ending reverses the matter. So a summary has to copy the right names, days and places.
"""

import json
import random
import re
from pathlib import Path

import yaml

HERE = Path(__file__).parent
SPLITS = {"train": 4000, "validation": 250, "test": 500}
SLOT = re.compile(r"\{([a-z]+)(\d?)\}")


class Grammar:
    """The scenarios file, ready to write dialogues from."""

    def __init__(self, path: Path = HERE / "scenarios.yaml"):
        rules = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.slots, self.chat, self.scenarios = rules["slots"], rules["chat"], rules["scenarios"]

    def dialogue(self, rng: random.Random) -> dict[str, str]:
        """One row: {"dialogue": lines "Name: words", "summary": one or two sentences}."""
        scenario = rng.choice(self.scenarios)
        ending = rng.choice(scenario["endings"])
        turns = [rng.choice(step) for step in scenario["steps"] + ending["steps"]]
        for place in (0, len(turns)):
            if rng.random() < 0.4:
                turns[place:place] = rng.choice(self.chat)
        summary = rng.choice(ending["summaries"])

        filled = self._fill(rng)
        spoken = [self._render(turn, filled) for turn in turns]
        lines = [f"{filled[turn[0]]}: {_capital(turn[3:])}" for turn in spoken]
        return {"dialogue": "\n".join(lines), "summary": _capital(self._render(summary, filled))}

    def _fill(self, rng: random.Random) -> dict[str, str]:
        """A word for every slot; numbered draws of one list differ from each other."""
        a, b, person = rng.sample(self.slots["person"], 3)
        filled = {"a": a, "b": b, "person": person}
        for slot, words in self.slots.items():
            if slot != "person":
                for number, word in zip(("", "2", "3"), rng.sample(words, 3), strict=True):
                    filled[slot + number] = word
        return filled

    @staticmethod
    def _render(text: str, filled: dict[str, str]) -> str:
        return SLOT.sub(lambda match: filled[match[1] + match[2]], text)


def rows(count: int, seed: str) -> list[dict[str, str]]:
    """`count` different rows; the same seed gives the same rows on every machine."""
    rng, grammar = random.Random(seed), Grammar()
    seen: dict[str, dict[str, str]] = {}
    while len(seen) < count:
        row = grammar.dialogue(rng)
        seen.setdefault(row["dialogue"], row)
    return list(seen.values())


def write(folder: Path) -> None:
    """The three splits as JSON lines. No dialogue stands in two of them."""
    taken: set[str] = set()
    for split in ("test", "validation", "train"):
        fresh = [row for row in rows(SPLITS[split] * 2, f"builtin {split}") if row["dialogue"] not in taken]
        chosen = fresh[: SPLITS[split]]
        taken.update(row["dialogue"] for row in chosen)
        text = "".join(json.dumps({"id": f"{split}-{n}", **row}) + "\n" for n, row in enumerate(chosen))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    write(HERE / "dialogues")
