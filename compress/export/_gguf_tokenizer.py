"""A tokenizer as GGUF holds it: byte-level BPE (GPT-2's kind), or SentencePiece's BPE with byte fallback (Llama 2's kind).

llama.cpp has a name for every way to split a text before BPE. So a tokenizer is written only where it splits in one of those ways.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how a text is split, step by step, and whether words of the vocabulary stay whole -> llama.cpp's name for it
SPLITS = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((WORDS % r"\p{N}",), False): "qwen2",
    ((WORDS % r"\p{N}{1,3}",), True): "llama-bpe",
}
SPACE = "\u2581"  # SentencePiece's
PLAIN, UNKNOWN, CONTROL, ADDED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of token (gguf's TokenType)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the terms of a GGUF file."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]  # those of bos, eos, unk and pad that exist
    begins: bool  # whether a text gets a bos token; `ends`: an eos token
    ends: bool
    template: str | None
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_first: bool = False

    def write(self, writer: "GGUFWriter") -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        writer.add_add_space_prefix(self.space_first)
        if self.template is not None:
            writer.add_chat_template(self.template)


def vocabulary(tokenizer: "PreTrainedTokenizerBase", size: int) -> Vocabulary:
    """The tokenizer of a model that has `size` embeddings.

    Raises ModelError for one that llama.cpp can't reproduce.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"a {type(tokenizer).__name__}, which has no tokenizer.json")
    held = json.loads(backend.to_str())
    model = held["model"]
    if model["type"] != "BPE":
        raise _refusal(f"{model['type']}")
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    names = {**model["vocab"], **{added["content"]: added["id"] for added in held["added_tokens"]}}
    if (most := max(names.values(), default=-1)) >= size:
        raise ModelError(f"export: gguf: the tokenizer has a token {most}, and the model {size:,} embeddings; remove the tokens beyond")
    tokens, types = [f"[PAD{n}]" for n in range(size)], [UNUSED] * size
    for token, number in names.items():
        tokens[number], types[number] = token, PLAIN
    for added in held["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else ADDED
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    special = {{"unk": "unknown", "pad": "padding"}.get(name, name): number for name, number in ids.items() if number is not None}
    sample, template = tokenizer("a").input_ids, tokenizer.chat_template
    common: dict[str, Any] = {
        "tokens": tokens, "types": types, "special": special, "template": template if isinstance(template, str) else None,
        "begins": sample[:1] == [ids["bos"]], "ends": sample[-1:] == [ids["eos"]],
    }  # fmt: skip
    if model.get("byte_fallback"):
        for byte in range(256):
            if (number := names.get(f"<0x{byte:02X}>")) is not None:
                types[number] = BYTE
        if ids["unk"] is not None:
            types[ids["unk"]] = UNKNOWN
        scores = _scores(pairs, names)
        return Vocabulary("llama", "default", scores=[scores.get(token, 0.0) for token in tokens], space_first=_space_first(held), **common)
    split = tuple(name for step in _steps(held["pre_tokenizer"]) if (name := _step(step)))
    if (held["normalizer"] or {}).get("type") not in (None, "NFC"):
        raise _refusal(f"BPE behind the normalizer {held['normalizer']['type']}")
    if (pre := SPLITS.get((split, bool(model.get("ignore_merges"))))) is None:
        raise _refusal(f"BPE of texts split by {', then '.join(split) or 'nothing'}")
    return Vocabulary("gpt2", pre, merges=[" ".join(pair) for pair in pairs], **common)


def _refusal(what: str) -> ModelError:
    splits = ", ".join(sorted(SPLITS.values()))
    return ModelError(
        f"export: gguf: the tokenizer is {what}; supported: byte-level BPE with the splits of {splits}, and SentencePiece's BPE with"
        " byte_fallback. export: ctranslate2 takes any"
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer or normalizer, its sequences laid out flat."""
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("normalizers")
    return [part] if inner is None else [step for each in inner for step in _steps(each)]


def _step(step: dict[str, Any]) -> str:
    """The name of a splitting step in `SPLITS`; empty where it splits nothing."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt2" if step["use_regex"] else ""
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", step["pattern"]))
    return str(step["type"])


def _space_first(held: dict[str, Any]) -> bool:
    """Whether SentencePiece's space is put before a text. Raises ModelError where the text is changed in other ways, but for its spaces."""
    prepends = False
    for step in [*_steps(held["normalizer"]), *_steps(held["pre_tokenizer"])]:
        replaces = step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prepends = True
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split", False):
            prepends = step["prepend_scheme"] != "never"
        elif not replaces:
            raise _refusal(f"SentencePiece's BPE with a {step['type']}")
    return prepends


def _scores(pairs: list[tuple[str, ...]], names: dict[str, int]) -> dict[str, float]:
    """Scores of tokens: minus the rank of the first merge that makes each. SentencePiece merges the highest first.

    Raises ModelError where merges of one token don't follow each other: then no score tells their order.
    """
    merged = ["".join(pair) for pair in pairs]
    turns = [token for n, token in enumerate(merged) if n == 0 or merged[n - 1] != token]
    if len(turns) != len(set(turns)):
        raise _refusal("BPE with byte_fallback whose merges have no order of tokens")
    ranks = {token: -float(rank) for rank, token in enumerate(turns)}
    return {**dict.fromkeys(names, -float(len(turns))), **ranks}
