"""Train the Llama (or GPT-2) that methods are measured on: widths in multiples of 128, 3.5 million weights, from texts in JSON lines.

    python reports/train_stories.py TRAIN.jsonl VALIDATION.jsonl TOKENIZER_FOLDER OUT [--type gpt2] [--minutes 20]

Each line of the data has a `text`. The model with the lowest validation loss is kept. CPU or GPU; reproducible up to the order of sums.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

LENGTH, BATCH, PEAK = 256, 16, 2e-3


def tokens(path: Path, tokenizer) -> torch.Tensor:
    """All texts in one row, each behind its start token."""
    ids = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids += [tokenizer.bos_token_id, *tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids]
    return torch.tensor(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "validation", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--type", choices=["llama", "gpt2"], default="llama")
    parser.add_argument("--minutes", type=float, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    train, held_out = tokens(arguments.train, tokenizer), tokens(arguments.validation, tokenizer)
    held_out = held_out[: len(held_out) // LENGTH * LENGTH].view(-1, LENGTH).to(device)
    ends = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if arguments.type == "llama":
        config = LlamaConfig(
            hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=512,
            tie_word_embeddings=False, attention_dropout=0.1, **ends,
        )  # fmt: skip
    else:
        config = GPT2Config(n_embd=256, n_layer=4, n_head=4, n_positions=512, **ends)
    model = AutoModelForCausalLM.from_config(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.1, betas=(0.9, 0.95))
    start, best, step = time.monotonic(), float("inf"), 0
    while (spent := (time.monotonic() - start) / 60 / arguments.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1, (step + 1) / 100) * (1 - spent)
        at = torch.randint(len(train) - LENGTH, (BATCH,))
        batch = torch.stack([train[i : i + LENGTH] for i in at.tolist()]).to(device)
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            model.eval()
            with torch.inference_mode():
                loss = sum(model(rows, labels=rows).loss.item() * len(rows) for rows in held_out.split(BATCH)) / len(held_out)
            model.train()
            print(f"step {step}, {spent:.0%} of the time: validation loss {loss:.4f}", flush=True)
            if loss < best:
                best = loss
                model.save_pretrained(arguments.out)
                tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
