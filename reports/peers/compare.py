"""GPTQ of this package beside gptqmodel's and llm-compressor's: perplexity, time and memory on one Llama.

    python reports/peers/compare.py MODEL TRAIN.jsonl TEST.jsonl --gptqmodel PYTHON --llmcompressor PYTHON [--rounds 3]

Each line of the data has a `text`. Every tool runs in its own environment, a fresh process for each round, grid and tool, in random
order, on the same rows of token ids, drawn anew for each round; its dequantised weights are put into the original model here and measured
by one function. Runs where this package is installed. Writes results.md (over all rounds) and results.csv (every run).
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from peer import Job
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
MAX_TOKENS = 512


@dataclass(frozen=True)
class Tool:
    name: str
    python: str
    script: str
    method: str


@dataclass(frozen=True)
class Losses:
    """Each text's negative log-likelihood, its divergence from the uncompressed model's distributions, and the number of its tokens."""

    sums: torch.Tensor
    divergences: torch.Tensor
    tokens: torch.Tensor

    @property
    def perplexity(self) -> float:
        return float((self.sums.sum() / self.tokens.sum()).exp())

    @property
    def divergence(self) -> float:
        """Mean Kullback-Leibler divergence of the uncompressed model's next-token distribution to this one's, nats a token."""
        return float(self.divergences.sum() / self.tokens.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "test"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--ours", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="left out where not given")
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="left out where not given")
    parser.add_argument("--methods", nargs="+", default=["gptq"], help="this package's; the others are compared with the first")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--grids", nargs="+", choices=["symmetric", "asymmetric"], default=["symmetric", "asymmetric"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    test = _ids(tokenizer, _texts(given.test))
    known = [_logs(model, row) for row in test]
    original = losses(model, test, known)
    print(f"uncompressed: perplexity {original.perplexity:.4f} on {int(original.tokens.sum()):,} tokens", flush=True)

    tools = [Tool(f"compress {method}", given.ours, "by_us.py", method) for method in given.methods]
    for name in ("gptqmodel", "llmcompressor"):
        if python := getattr(given, name):
            tools += [Tool(f"{name}{note}", python, f"by_{name}.py", method) for method, note in (("plain", ""), ("searched", " searched"))]
    runs = []
    every = list(itertools.product(given.bits, given.grids, tools))
    for turn in range(given.rounds):
        train = random.Random(given.seed + turn).sample(_texts(given.train), given.rows)
        rows = _ids(tokenizer, train)
        for bits, grid, tool in random.Random(turn).sample(every, len(every)):
            run = {"bits": bits, "grid": grid, "tool": tool.name, "round": turn}
            with tempfile.TemporaryDirectory() as out:
                job = Job(
                    str(given.model.resolve()), tool.method, bits, grid == "symmetric", given.group_size, rows, train, MAX_TOKENS, out
                )
                run |= _in_turn(tool, job, given.threads)
                if "failed" not in run:
                    made = losses(_holding(model, Path(out) / "weights.safetensors"), test, known)
                    run |= {"perplexity": made.perplexity, "divergence": made.divergence}
            runs.append(run)
            print(
                ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in run.items()), flush=True
            )
            pd.DataFrame(runs).to_csv(given.out / "results.csv", index=False)
    table = _table(pd.DataFrame(runs), [tool.name for tool in tools])
    text = "\n".join([*_header(given, original), "", *_markdown(table)])
    (given.out / "results.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)


def losses(model: PreTrainedModel, rows: list[list[int]], known: list[torch.Tensor]) -> Losses:
    """Of each row every token but the first is predicted from those before it.

    known   the uncompressed model's log-probabilities for each row, (tokens - 1, vocabulary)
    """
    found = []
    for row, wanted in zip(rows, known, strict=True):
        logs = _logs(model, row)
        likelihood = logs.gather(1, torch.tensor(row[1:])[:, None])
        found.append([-float(likelihood.double().sum()), float((wanted.exp() * (wanted - logs)).double().sum()), len(row) - 1])
    return Losses(*torch.tensor(found, dtype=torch.float64).unbind(dim=1))


def _logs(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    return model(torch.tensor([row])).logits[0, :-1].log_softmax(dim=-1)


def _texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, truncation=True, max_length=MAX_TOKENS).input_ids for text in texts]


def _in_turn(tool: Tool, job: Job, threads: int) -> dict[str, str | float]:
    """What the worker of a tool says of itself, or the last line of its complaint."""
    file = Path(job.out) / "job.json"
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [tool.python, HERE / tool.script, file], env=environment, cwd=job.out, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        return {"failed": (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]}
    return json.loads((Path(job.out) / "result.json").read_text(encoding="utf-8"))


def _holding(model: PreTrainedModel, file: Path) -> PreTrainedModel:
    """The model with the weights of a file in it, which must be those of all its blocks' linear layers and no others."""
    weights = load_file(file)
    layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert weights.keys() == {f"{name}.weight" for name in layers}, "other layers than the blocks' linear ones were quantised"
    model.load_state_dict(weights, strict=False)
    return model


def _table(runs: pd.DataFrame, tools: list[str]) -> list[dict[str, str]]:
    """A row for each grid and tool over all rounds: means of what the test texts gave, medians of time and memory; least and most."""
    found = []
    for (bits, grid), of_grid in runs.groupby(["bits", "grid"], sort=False):
        rounds = of_grid.pivot(index="round", columns="tool", values="perplexity")
        for tool in tools:
            same = of_grid[of_grid.tool == tool]
            row = {"bits": f"{bits}", "grid": str(grid), "tool": tool}
            if same.perplexity.isna().any():
                found.append(row | {"perplexity": "failed"})
                continue
            ratios = rounds[tool] / rounds[tools[0]]
            found.append(
                row
                | {
                    "perplexity": f"{same.perplexity.mean():.4f}",
                    f"x {tools[0]}": "1" if tool == tools[0] else _spread(ratios, ratios.mean(), ".4f"),
                    "divergence": _spread(same.divergence, same.divergence.mean(), ".5f"),
                    "seconds": _spread(same.seconds, same.seconds.median(), ".1f"),
                    "peak MiB": f"{same.peak_mib.median():.0f}",
                    "of it grown": f"{same.grown_mib.median():.0f}",
                    "version": str(same.version.iloc[0]),
                }
            )
    return sorted(found, key=lambda row: (-int(row["bits"]), row["grid"] != "symmetric", tools.index(row["tool"])))


def _spread(values: pd.Series, middle: float, form: str) -> str:
    """What stands for several rounds, with the least and the most of them."""
    return f"{middle:{form}}" + (f" ({values.min():{form}} to {values.max():{form}})" if len(values) > 1 else "")


def _header(given: argparse.Namespace, original: Losses) -> list[str]:
    return [
        f"`{given.model.name}`, uncompressed perplexity {original.perplexity:.4f} on {len(original.sums)} texts,"
        f" {int(original.tokens.sum()):,} tokens. Groups of {given.group_size}. {given.rows} calibration rows of at most"
        f" {MAX_TOKENS} tokens, drawn anew for each round. Rounds: {given.rounds}, threads: {given.threads}.",
    ]


def _markdown(table: list[dict[str, str]]) -> list[str]:
    keys = list(max(table, key=len))
    lines = [[row.get(key, "") for key in keys] for row in table]
    return [f"| {' | '.join(line)} |" for line in [keys, ["---"] * len(keys), *lines]]


if __name__ == "__main__":
    main()
