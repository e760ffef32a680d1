"""Train the builtin model: a small T5 of FLAN-T5's kind (gated GELU, unscaled head) on the builtin dialogues.

    python -m compress.builtin.train OUT [--steps 1800]        # about half an hour on two CPU cores

The training rows come from the same grammar as the shipped ones, but from a seed of their own. No shipped test or
validation dialogue is among them. The model is stored in float16, which halves the package.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from compress.builtin.corpus import SPLITS, rows

PROMPT = "summarize: "


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 pieces with T5's special tokens at T5's places."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet))
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512)


def model() -> T5ForConditionalGeneration:
    """3.4 million parameters, freshly drawn. T5's own initial embedding is so wide that AdamW learns nothing for long."""
    config = T5Config(
        vocab_size=1024, d_model=256, d_kv=32, num_heads=8, d_ff=512, num_layers=2, num_decoder_layers=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    network = T5ForConditionalGeneration(config)
    torch.nn.init.normal_(network.shared.weight, std=config.d_model**-0.5)
    return network


class Rows(Dataset[dict[str, list[int]]]):
    """Tokenised rows; dialogue in, summary out."""

    def __init__(self, data: list[dict[str, str]], words: PreTrainedTokenizerFast):
        prompts = words([PROMPT + row["dialogue"] for row in data])["input_ids"]
        targets = words([row["summary"] for row in data])["input_ids"]
        self.examples = [{"input_ids": p, "labels": t} for p, t in zip(prompts, targets, strict=True)]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


def main(out: Path, steps: int) -> None:
    set_seed(0)
    held_out = {row["dialogue"] for split in ("test", "validation") for row in rows(SPLITS[split] * 2, f"builtin {split}")}
    data = [row for row in rows(60_000, "builtin training") if row["dialogue"] not in held_out]
    words = tokenizer([PROMPT + row["dialogue"] + "\n" + row["summary"] for row in data[:10_000]])
    network = model()
    trainer = Seq2SeqTrainer(
        model=network,
        args=Seq2SeqTrainingArguments(
            output_dir=str(out / "checkpoints"), max_steps=steps, per_device_train_batch_size=48, learning_rate=7e-4,
            warmup_steps=100, lr_scheduler_type="cosine", weight_decay=0.01, adam_beta2=0.98, train_sampling_strategy="group_by_length",
            logging_steps=50, disable_tqdm=True, save_strategy="no", report_to=[], seed=0, use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Rows(data, words),
        data_collator=DataCollatorForSeq2Seq(words, model=network),
    )  # fmt: skip
    trainer.train()
    network.generation_config.max_new_tokens = 48
    network.to(torch.float16).save_pretrained(out)
    words.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1800)
    arguments = parser.parse_args()
    main(arguments.out, arguments.steps)
