"""Small random decoders with tokenizers of their own, of the kinds that other engines read."""

from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from compress.export._gguf_tokenizer import SPACE, WORDS

SIZE = 384  # embeddings, of which the tokenizer has fewer
TEXTS = [
    "the cat sat on a mat in 1984",
    "don't they'll we're HELLO Hello hello",
    "caf\u00e9 \u4f60\u597d, world!",
    "a\n\n  b\tc ... 12345",
] * 4
TYPES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def tokenizer(split: str = "gpt2") -> PreTrainedTokenizerFast:
    """Byte-level BPE behind a way to split texts, or SentencePiece's BPE, trained on a few lines."""
    special = ["<s>", "</s>", "<unk>"]
    if split == "sentencepiece":
        return _sentencepiece(special)
    words = Tokenizer(models.BPE(ignore_merges=split == "llama3"))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt2", "digits"))
    first = {
        "gpt2": [],
        "digits": [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": [pre_tokenizers.Split(Regex(WORDS % r"\p{N}"), "isolated")],
        "llama3": [pre_tokenizers.Split(Regex(WORDS % r"\p{N}{1,3}"), "isolated")],
    }[split]
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # so that it learns tokens across any split
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    words.pre_tokenizer = pre_tokenizers.Sequence([*first, by_bytes])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def _sentencepiece(special: list[str]) -> PreTrainedTokenizerFast:
    """As Llama 2's is written down: bytes to fall back on, a space before each text, a bos token; merges are listed for each token made."""
    merged = ["th", "at", "ta", "the", SPACE + "the", SPACE + "c", SPACE + "cat", SPACE + "a", "ll", "he", "hell", "hello"]
    letters = sorted({letter for text in TEXTS for letter in text if letter.isascii() and not letter.isspace()} | {SPACE})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *merged, *letters]
    vocabulary = {token: number for number, token in enumerate(names)}
    pairs = [(t[:n], t[n:]) for t in merged for n in range(1, len(t)) if t[:n] in vocabulary and t[n:] in vocabulary]
    words = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    words.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    words.add_special_tokens(special)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def decoder(folder: Path, kind: str = "llama", split: str = "gpt2", dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A folder with a model of 2 layers, none of whose biases is zero and none of whose norms is one."""
    config, model_class = TYPES[kind]
    own = tokenizer(split)
    settings = {
        "vocab_size": SIZE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "tie_word_embeddings": True, "sliding_window": None,
        "bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id, "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = model_class(config(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(std=0.2) if name.endswith("bias") else parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder
