"""This package's quantisers beside other tools': what is lost, time and memory, on one decoder or encoder.

    python reports/peers/compare.py MODEL CALIBRATION TEST --out FOLDER --peers autoround=PYTHON gptqmodel:searched=PYTHON [--rounds 0 1 2]

CALIBRATION and TEST are JSON lines with a `text` each, or one text, of which rows are cut. Every tool runs in its own environment (a peer
NAME is the file by_NAME.py). Each round, grid and tool has a fresh process, in random order. All get the same rows of token ids, drawn anew
for each round. A tool's dequantised weights are put into the original model here and measured by one function (outputs.py). Runs where this
package is installed. Writes FOLDER/results.csv, a line as soon as a run ends, and FOLDER/results.md from all lines there. A run whose line
is in the file isn't repeated, so a table can be made in several goes; delete the line to run it again.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from outputs import Decoder, Encoder, Original, put
from peer import Job
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

HERE = Path(__file__).parent
STEP_TOKENS = 2048  # of this package's methods that learn, so of the others' too
RUN = ["bits", "grid", "tool", "round"]


@dataclass(frozen=True)
class Tool:
    name: str
    python: str
    script: str
    method: str


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    _, test = _rows(arguments.test, tokenizer, arguments.test_rows, arguments.test_tokens, None)
    scratch = tempfile.TemporaryDirectory()
    if "ForCausalLM" in AutoConfig.from_pretrained(arguments.model).architectures[0]:
        original, folder, task = Decoder(arguments.model, test), arguments.model, "causal-lm"
    else:
        original, folder, task = Encoder(arguments.model, test), Path(scratch.name), "sequence-classification"
        original.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(original.about, flush=True)

    tools = [Tool(f"compress {method}", arguments.ours, "by_us.py", method) for method in arguments.methods]
    for peer in arguments.peers:
        name, python = peer.split("=", 1)
        package, _, method = name.partition(":")
        tools.append(Tool(name.replace(":", " "), python, f"by_{package}.py", method or "plain"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "results.csv"
    every = list(itertools.product(arguments.bits, arguments.grids, tools))
    for turn in arguments.rounds:
        texts, rows = _rows(arguments.calibration, tokenizer, arguments.rows, arguments.tokens, turn)
        for bits, grid, tool in random.Random(turn).sample(every, len(every)):
            run = {"bits": bits, "grid": grid, "tool": tool.name, "round": turn}
            runs = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=RUN)  # another process may have added to it
            if (runs[RUN] == pd.Series(run)).all(axis=1).any():
                continue
            with tempfile.TemporaryDirectory() as out:
                job = Job(
                    str(folder.resolve()), task, tool.method, bits, grid == "symmetric", arguments.group_size, rows, texts,
                    arguments.tokens, arguments.steps, max(1, STEP_TOKENS // arguments.tokens), out,
                )  # fmt: skip
                run |= _in_turn(tool, job, arguments.threads)
                if "failed" not in run:
                    put(original.model, Path(out) / "weights.safetensors")
                    run |= original.figures()
            print(
                ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in run.items()), flush=True
            )
            runs = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=RUN)
            pd.concat([runs, pd.DataFrame([run])]).to_csv(file, index=False)
    text = "\n".join([*_header(arguments, original), "", *_markdown(_table(pd.read_csv(file)))])
    (arguments.out / "results.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "test"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=["gptq"], help="this package's methods, with settings behind a colon: gptq:tune=50")
    parser.add_argument("--peers", nargs="+", default=[], metavar="NAME[:METHOD]=PYTHON")
    parser.add_argument("--ours", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--grids", nargs="+", choices=["symmetric", "asymmetric"], default=["symmetric", "asymmetric"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a calibration row, at most")
    parser.add_argument("--steps", type=int, default=100, help=f"steps of methods that learn, each of {STEP_TOKENS} tokens")
    parser.add_argument("--test-rows", type=int, default=60)
    parser.add_argument("--test-tokens", type=int, default=512, help="tokens of a test row, at most")
    parser.add_argument("--rounds", type=int, nargs="+", default=[0, 1, 2], help="seeds, each of which draws its own calibration rows")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _rows(file: Path, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, seed: int | None) -> tuple[list[str], list[list[int]]]:
    """`count` texts and their token ids, drawn with a seed; without one the first, or evenly spread over a single text."""
    if file.suffix == ".jsonl":
        texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
        drawn = texts[:count] if seed is None else random.Random(seed).sample(texts, count)
        return drawn, [tokenizer(text, truncation=True, max_length=tokens).input_ids for text in drawn]
    pieces = list(itertools.islice(_pieces(tokenizer, file.read_text(encoding="utf-8"), count, tokens, seed), count))
    return [text for text, _ in pieces], [ids for _, ids in pieces]


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, count: int, tokens: int, seed: int | None) -> Iterator[tuple[str, list[int]]]:
    """Pieces of `tokens` tokens, special ones included, that tokenise to themselves, so that a tool reads the same from the text."""
    ids, draw = tokenizer(text, add_special_tokens=False, verbose=False).input_ids, random.Random(seed)
    own = len(tokenizer("").input_ids)
    for number in itertools.count():
        start = number * (len(ids) // count) if seed is None else draw.randrange(len(ids) - tokens)
        part = ids[start : start + tokens - own]
        piece = tokenizer.decode(part)
        if seed is None or tokenizer(piece, add_special_tokens=False).input_ids == part:
            yield piece, tokenizer(piece, truncation=True, max_length=tokens).input_ids if own else part


def _in_turn(tool: Tool, job: Job, threads: int) -> dict[str, str | float]:
    """What a tool's worker measured, or the last line of its error."""
    file = Path(job.out) / "job.json"
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [tool.python, HERE / tool.script, file], env=environment, cwd=job.out, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        return {"failed": (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]}
    return json.loads((Path(job.out) / "result.json").read_text(encoding="utf-8"))


def _table(runs: pd.DataFrame) -> list[dict[str, str]]:
    """A row for each grid and tool over all rounds: means of the figures on the test texts, medians of time and memory; least and most."""
    order = list(dict.fromkeys(sorted(runs.tool, key=lambda tool: (not tool.startswith("compress"), tool))))
    table = []
    for (bits, grid, tool), same in runs.groupby(["bits", "grid", "tool"]):
        row = {"bits": f"{bits}", "grid": str(grid), "tool": str(tool)}
        if same.divergence.isna().any():
            table.append(row | {"divergence": "failed"})
            continue
        table.append(
            row
            | {
                "draws": f"{len(same)}",
                "divergence": _spread(same.divergence, same.divergence.mean(), ".4f"),
                "worst row / median": f"{(same.worst / same['median']).max():.1f}",
            }
            | {name: f"{same[name].mean():.3f}" for name in ("first", "perplexity", "equal_top") if name in same}
            | {
                "CPU seconds": _spread(same.cpu_seconds, same.cpu_seconds.median(), ".0f"),
                "peak MiB": f"{same.peak_mib.median():.0f}",
                "of it grown": f"{same.grown_mib.median():.0f}",
                "version": str(same.version.iloc[0]),
            }
        )
    return sorted(table, key=lambda row: (-int(row["bits"]), row["grid"] != "symmetric", order.index(row["tool"])))


def _spread(values: pd.Series, middle: float, form: str) -> str:
    """The figure for several rounds, with the least and the most of them."""
    return f"{middle:{form}}" + (f" ({values.min():{form}} to {values.max():{form}})" if len(values) > 1 else "")


def _header(arguments: argparse.Namespace, original: Original) -> list[str]:
    return [
        f"`{arguments.model.name}`: {original.about}. Groups of {arguments.group_size}. {arguments.rows} calibration rows of at most"
        f" {arguments.tokens} tokens, drawn anew for each round. {arguments.steps} steps of {STEP_TOKENS:,} tokens for methods that learn."
        f" Threads: {arguments.threads}.",
    ]


def _markdown(table: list[dict[str, str]]) -> list[str]:
    keys = list(max(table, key=len))
    lines = [[row.get(key, "") for key in keys] for row in table]
    return [f"| {' | '.join(line)} |" for line in [keys, ["---"] * len(keys), *lines]]


if __name__ == "__main__":
    main()
