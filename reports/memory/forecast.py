"""Hold the forecast of memory and the harness's readings against each other and against /usr/bin/time, on six random models on a CPU.

    python reports/memory/forecast.py [--out reports/memory]

For each model and batch size: the forecast from config.json, and what the harness measures (the process's own high-water mark, and samples
from outside). For each model at the largest batch: what GNU time reports of another process that does the same work and never sets a mark
back. What that held before the model is taken off. The models have other sizes than those that the forecast's constants were taken from.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from compress.benchmark.isolate import Subject
from compress.execution import Execution
from compress.forecast.footprint import footprint, weight_bytes
from compress.forecast.plan import read_config
from compress.model.source import Source
from compress.nursery import nursery
from compress.recipe import Benchmark, Data, Model, Recipe
from compress.shape import read

BATCHES, PROMPT, NEW = [1, 4, 16], 128, 24
ENDS = {"pad_token_id": 0, "eos_token_id": 1}
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
MODELS: dict[str, tuple[str, str, dict[str, object]]] = {  # name: task, transformers' model, what its config says
    "T5": ("seq2seq", "T5", {
        "vocab_size": 20000, "d_model": 384, "d_kv": 64, "num_heads": 6, "d_ff": 1536, "num_layers": 6,
        "decoder_start_token_id": 0, **ENDS}),
    "BART": ("seq2seq", "Bart", {
        "vocab_size": 30000, "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048,
        "encoder_attention_heads": 8, "decoder_attention_heads": 8, "max_position_embeddings": 512,
        "decoder_start_token_id": 1, "bos_token_id": 0, "forced_eos_token_id": None, **ENDS}),
    "Llama": ("causal-lm", "Llama", {
        "vocab_size": 24000, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10, "num_attention_heads": 10,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True, "bos_token_id": 1, **ENDS}),
    "GPT-2": ("causal-lm", "GPT2", {
        "vocab_size": 30000, "n_embd": 640, "n_layer": 8, "n_head": 10, "n_positions": 512, "bos_token_id": 1, **ENDS}),
    "BERT": ("sequence-classification", "Bert", {
        "vocab_size": 30522, "hidden_size": 640, "num_hidden_layers": 8, "num_attention_heads": 10, "intermediate_size": 2560,
        "pad_token_id": 0}),
    "wide Llama": ("causal-lm", "Llama", {
        "vocab_size": 16000, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 4, "num_attention_heads": 10,
        "num_key_value_heads": 10, "max_position_embeddings": 1024, "tie_word_embeddings": True, "bos_token_id": 1, **ENDS}),
}  # fmt: skip
CLASSES = {"seq2seq": "ForConditionalGeneration", "sequence-classification": "ForSequenceClassification"}
WORK = """
import sys
from compress.benchmark import memory
from compress.benchmark.worker import Worker
memory.reset_peak = lambda device: None  # GNU time reads that mark
worker, (folder, task, batch, prompt, new) = Worker(), sys.argv[1:]
worker.load(lambda *_: None, {"id": folder, "task": task, "dtype": "float32"}, "cpu", 1, {"cpu_int8": False, "sparse_24": False})
with memory.apart():  # as the harness reads a peak
    for batch in batch.split(","):
        memory.resident()
        worker._try(int(batch), int(prompt), int(new), 1)
print(worker.interpreter)
"""


def make(name: str, folder: Path) -> None:
    """A random model with a tokenizer of a few words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    task, kind, settings = MODELS[name]
    suffix = CLASSES.get(task, "LMHeadModel" if kind == "GPT2" else "ForCausalLM")
    torch.manual_seed(0)
    getattr(transformers, kind + suffix)(getattr(transformers, f"{kind}Config")(**settings)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(SPECIAL.values())}, SPECIAL["unk_token"]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL).save_pretrained(folder)


def measure(name: str, folder: Path) -> dict[int, dict[str, int]]:
    """The peaks at each batch size, as the harness takes them."""
    task = MODELS[name][0]
    benchmark = Benchmark(batch_sizes=BATCHES, prompt_tokens=[PROMPT], new_tokens=NEW, rounds=1, warmup=0, threads=1)
    recipe = Recipe(
        version=1, model=Model(id=str(folder), task=task), data=Data(source="builtin", prompt="{dialogue}"), benchmark=benchmark
    )
    with nursery():
        subject = Subject("candidate", Source(str(folder), task, "float32"), recipe, Execution("cpu", folder / "log"), folder)
        try:
            subject.start()
        finally:
            subject.stop()
    return {batch: subject.peaks[0][(batch, PROMPT)] for batch in BATCHES}


def by_time(name: str, folder: Path) -> int:
    """GNU time's maximum resident set of a process that does the same work, less what it held before the model; in bytes."""
    work = [sys.executable, "-c", WORK, str(folder), MODELS[name][0], ",".join(map(str, BATCHES)), str(PROMPT), str(NEW)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    answer = subprocess.run(["/usr/bin/time", "-v", *work], env=environment, capture_output=True, text=True, check=True)
    return int(re.search(r"Maximum resident set size \(kbytes\): (\d+)", answer.stderr)[1]) * 1024 - int(answer.stdout)


def rows(name: str) -> list[dict[str, object]]:
    """The rows of one model."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(name, folder)
        peaks = measure(name, folder)
        outside = by_time(name, folder)
        shape = read(read_config(folder), MODELS[name][0])
    table = []
    for batch, peak in peaks.items():
        foretold = footprint(weight_bytes(shape, "FP32"), shape, 4, batch, PROMPT, NEW, "cpu")
        row = {
            "model": name, "parameters": shape.parameters, "batch_size": batch, "peak_run_bytes": peak["peak"],
            "sampled_run_bytes": peak["sampled"], "slack": peak["slack"], "kv_cache_bytes": peak["cache"],
            "forecast_kv_cache_bytes": foretold.cache, "forecast_run_bytes": foretold.alive,
            "forecast_error_percent": round(100 * (foretold.alive / peak["peak"] - 1), 1),
        }  # fmt: skip
        if batch == BATCHES[-1]:
            row |= {"gnu_time_bytes": outside, "harness_against_time_percent": round(100 * (peak["peak"] / outside - 1), 2)}
        table.append(row)
        print(row, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    table = [row for name in MODELS for row in rows(name)]
    with (arguments.out / "forecast.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, max(table, key=len))
        writer.writeheader()
        writer.writerows(table)
    worst = max(abs(float(str(row["forecast_error_percent"]))) for row in table)
    furthest = max(abs(float(str(row.get("harness_against_time_percent", 0)))) for row in table)
    print(f"the forecast is off by at most {worst} %; the harness differs from GNU time by at most {furthest} %")


if __name__ == "__main__":
    main()
