"""Whether a model computes the same after its export to an engine's format: by the likelihoods that it gives to texts."""

from collections.abc import Sequence
from pathlib import Path

from compress import engines, gptq
from compress.engines import Engine, Opening, Piece, random_prompts
from compress.errors import BrokenPromise
from compress.methods import Context
from compress.model.source import Source
from compress.prompts import Prompts
from compress.recipe import PLAIN, Runtime

LOOKED_AT = 4  # examples
TOKENS = 64  # of each
# nats a token, times one plus transformers' own, by which both may differ: by rounding; by what 8 bits and rounded inputs cost
FLOATS, INTEGERS = 0.01, 0.2


def check(before: Source, exported: Source, form: str, device: str, context: Context) -> None:
    """Check that the engine that opens a format finds texts as likely as transformers does with the model before the export.

    Raises BrokenPromise where it doesn't, and what `Engine.open` raises where the engine can't open it.
    """
    name = next((name for name in engines.names() if engines.find(name).ABOUT.opens == form), None)
    if name is None:
        context.say("no engine here opens it, so it was not tried")
        return
    if missing := engines.find(name).ABOUT.missing():
        context.say(f"it was not tried: {', '.join(missing)}, which opens it, isn't installed here")
        return
    if not engines.find(name).ABOUT.likelihoods:
        context.say(f"{name} opened it; what it says was not compared, for it gives no likelihoods")
        _opened(name, exported, device)
        return
    with gptq.readable(before, Path(exported.id).parent) as read:
        plain = _opened(PLAIN, read, device)
    pieces = _pieces(plain, context)
    theirs, tokens = _nats(plain, pieces)
    del plain
    engine = _opened(name, exported, device)
    ours, _ = _nats(engine, pieces)
    rounded = "int" in engine.traits.dtype or "q" in engine.traits.dtype.lower()
    if not abs(ours - theirs) <= (INTEGERS if rounded else FLOATS) * (1 + theirs):
        raise BrokenPromise(
            f"export: {form}: {name} has {ours:.3f} nats a token for {tokens} tokens where transformers has {theirs:.3f} of the same model:"
            " the engine doesn't read it as it was meant; nothing was kept"
        )
    context.say(f"opened by {name}: {ours:.3f} nats a token for {tokens} tokens, {theirs:.3f} in transformers")


def _opened(name: str, source: Source, device: str) -> Engine:
    import torch

    module = engines.require(name)
    engine = module.make(Opening(source, device, torch.get_num_threads(), Runtime(), module.Settings()))
    engine.open()
    return engine


def _nats(engine: Engine, pieces: Sequence[Piece]) -> tuple[float, int]:
    """Nats a token, and the number of tokens."""
    rows = engine.read(list(pieces), lambda *_: None)
    tokens = sum(row.tokens for row in rows)
    return sum(row.nats for row in rows) / max(1, tokens), int(tokens)


def _pieces(engine: Engine, context: Context) -> list[Piece]:
    """The stage's examples, or random tokens where it has none."""
    traits, few = engine.traits, context.examples[:LOOKED_AT]
    prompts = Prompts(engine.tokenizer, context.chat)
    limit = min(TOKENS, context.max_tokens, traits.context or TOKENS)
    rows = [prompts.read(example, limit)[0] for example in few]
    answers = [prompts.target((example.references or [example.prompt])[0], special=True)[:limit] for example in few]
    if not few:
        rows = random_prompts(min(traits.vocabulary, len(engine.tokenizer)), None, LOOKED_AT, min(16, limit))
        answers = rows
    if traits.encodes:
        return [Piece(0, row, answer) for row, answer in zip(rows, answers, strict=True)]
    return [Piece(0, row, [-100, *row[1:]]) for row in rows if len(row) > 1]
