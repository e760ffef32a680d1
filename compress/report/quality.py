"""Notes on how the examples were answered, a sentence each."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.benchmark.statistics import mcnemar
from compress.report import missing
from compress.report.verdict import USUAL, Pair
from compress.results.report import Split
from compress.results.sides import Side
from compress.scripts import FEW

ROUGE = {"words": "words of any script (characters where it has no spaces)", "characters": "characters"}


def notes(sides: Sequence[Side], compared: Sequence[Pair], ids: Sequence[str], environment: Mapping[str, Any]) -> list[str]:
    """The tokenizers of texts where they aren't the usual ones, the examples that are left out, the sides' own remarks, and McNemar's test
    of right and wrong answers.

    ids   of the examples, in order
    """
    remarks = [f"{side.role.capitalize()}: {sentence}." for side in sides for sentence in side.said]
    tests = [_discordant(pair) for pair in compared if pair.ours.metric == "accuracy"]
    return [*_tokenizers(sides, environment), *missing.notes(sides, ids), *remarks, *tests]


def _tokenizers(sides: Sequence[Side], environment: Mapping[str, Any]) -> list[str]:
    measured = {m.metric for side in sides for m in side.measurements}
    shares = environment.get("reference_scripts") or {}
    scripts = ", ".join(f"{100 * share:.0f} % {script}" for script, share in shares.items() if share >= FEW)
    sentences = []
    for name, metric, words in (("rouge_tokenizer", "rougeL", ROUGE), ("bleu_tokenizer", "bleu", {})):
        tokenizer = environment.get(name, USUAL[name])
        if metric in measured and tokenizer != USUAL[name]:
            of = f": the references' letters are {scripts}" if scripts else ""
            what = words.get(tokenizer, f"tokens as sacreBLEU's {tokenizer} cuts them")
            sentences.append(f"{metric.upper().rstrip('L')} counts {what}{of}.")
    return sentences


def left_out(splits: Sequence[Split]) -> list[str]:
    """Rows that were no examples, and files that aren't what they were."""
    sentences = []
    for split in splits:
        if split.filtered:
            sentences.append(f"{split.name}: {_share(split.filtered, split.rows)} by data.where.")
        if split.empty:
            sentences.append(f"{split.name}: {_share(split.empty, split.rows)} as empty; the first is {split.why_empty}.")
        if split.changed:
            sentences.append(f"{split.name} has changed since it was read, before the first stage; all figures are of what it was then.")
    return sentences


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} rows ({part / whole:.1%}) {'is' if part == 1 else 'are'} left out"


def _discordant(pair: Pair) -> str:
    lost, won, p = mcnemar(*missing.together(pair.theirs, pair.ours))
    return f"{lost} labels are right with the baseline only, {won} with the candidate only: p = {p:.3g} by McNemar's exact test."
