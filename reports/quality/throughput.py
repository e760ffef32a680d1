"""How long writing the evaluation's outputs takes: the harness against two plain loops over transformers' own generation.

    python reports/quality/throughput.py quickstart --set data.samples=200 [--set data.source=FOLDER] [--threads 1] [--repeats 3]

A recipe's model writes to its examples in three ways. One example at a time; eight at a time in the data's order, padded; and the harness:
longest first, by tokens, rows leaving when they have ended. They take turns in a random order in one process, after a warm-up of each on a
few examples. Outputs that differ from those of one at a time are counted.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from compress import data, recipe, terminal
from compress.benchmark.quality import Reader
from compress.engines.transformers.batching import Batches
from compress.engines.transformers.generation import Writer
from compress.hardware import pick_device
from compress.methods import quiet
from compress.model.loading import Bundle
from compress.model.source import Source, locate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = recipe.load(arguments.recipe, arguments.set)
    source = Source(locate(loaded.model.id, loaded.folder), loaded.model.task, loaded.model.dtype)
    bundle = Bundle(source, pick_device("auto"))
    examples = data.examples(loaded.data, loaded.folder, "evaluation", loaded.data.samples, loaded.data.seed)
    prompts = [example.prompt for example in examples]
    reader, settings = Reader(bundle.model, bundle.tokenizer, max_tokens=loaded.data.max_tokens), loaded.generation.model_dump()

    def harness(texts: list[str]) -> list[list[int]]:
        return Writer(reader, texts, settings).write(Batches(bundle.model, None, quiet))

    def plain(texts: list[str], size: int) -> list[list[int]]:
        writer, token_rows = Writer(reader, texts, settings), []
        for start in range(0, len(texts), size):
            chosen = list(range(start, min(start + size, len(texts))))
            token_rows += [writer._until_end(row) for row in writer._rows(chosen)[0]]
        return token_rows

    ways: dict[str, Callable[[list[str]], list[list[int]]]] = {
        "one at a time": lambda texts: plain(texts, 1), "eights in order": lambda texts: plain(texts, 8), "harness": harness,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    for way in ways.values():
        way(prompts[:16])
    with terminal.bars() as progress:
        for number in range(arguments.repeats):
            for name in random.sample(list(ways), len(ways)):
                progress(name, number, arguments.repeats)
                start = time.perf_counter()
                outputs[name] = ways[name](prompts)
                seconds[name].append(time.perf_counter() - start)
    tokens = [len(ids) for ids in bundle.tokenizer(prompts)["input_ids"]]
    written = [len(row) for row in outputs["harness"]]
    print(f"{Path(source.id).name}, {len(prompts)} examples, threads {arguments.threads}")
    for what, counts in (("of a prompt", tokens), ("written", written)):
        print(f"tokens {what}: median {statistics.median(counts):g}, most {max(counts)}")
    for name, taken in seconds.items():
        other = sum(a != b for a, b in zip(outputs[name], outputs["one at a time"], strict=True))
        ratios = ", ".join(f"x{a / b:.2f}" for a, b in zip(taken, seconds["harness"], strict=True))
        times = ", ".join(f"{duration:.1f}" for duration in taken)
        print(f"{name}: {times} s; {ratios} of the harness's; {other} outputs differ from one at a time")


if __name__ == "__main__":
    main()
