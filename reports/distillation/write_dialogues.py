"""Write dialogues by the grammar of the builtin corpus that are in none of its splits, and its own test and validation splits beside them.

    python reports/distillation/write_dialogues.py FOLDER [--rows 12000]

A small student trained on the 4,000 dialogues of the package learns them by heart; the package's model was trained on 60,000.
"""

import argparse
import json
import shutil
from pathlib import Path

from compress.builtin.corpus import SPLITS, rows
from compress.data import BUILTIN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=12_000)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    held_out = set()
    for split in SPLITS:
        lines = (BUILTIN / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        held_out |= {json.loads(line)["dialogue"] for line in lines}
    found = {row["dialogue"]: row for row in rows(2 * given.rows, "builtin distillation") if row["dialogue"] not in held_out}
    with (given.folder / "train.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in list(found.values())[: given.rows])
    for split in ("test", "validation"):
        shutil.copy(BUILTIN / f"{split}.jsonl", given.folder)


if __name__ == "__main__":
    main()
