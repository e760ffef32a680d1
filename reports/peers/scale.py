"""Time and peak memory of `gptq` on randomly initialised Llamas: is more than a block of weights in memory, and is time linear in depth?

    python reports/peers/scale.py WORK_FOLDER [--width 2048 --layers 22] [--samples 16 --tokens 128]

Prints a line for every depth asked for. It has the seconds of the calibration pass and the highest resident memory while it ran, above that
of the process with all libraries imported. Beside it stands what the packed model, a block in float32 and the hidden states of all examples
take.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

VOCABULARY = 32_000


def make(folder: Path, width: int, layers: int) -> None:
    """A random Llama in bfloat16 on disk, and a tokenizer that splits at spaces."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(width // 512, 1), tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1").save_pretrained(folder)  # noqa: S106


def memory(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def solve(folder: Path, samples: int, tokens: int) -> None:
    """Run gptq and print what it took as JSON."""
    from compress.held import weight_bytes
    from compress.methods import Context, Example, find
    from compress.model.loading import Bundle
    from compress.model.source import Source
    from compress.quantize import _calibrated, _gptq, _pack  # noqa: F401 - their imports are no part of the measurement

    gptq = find("quantize", "gptq")
    draw = random.Random(0)
    examples = [Example(str(n), " ".join(str(draw.randrange(2, VOCABULARY)) for _ in range(tokens)), []) for n in range(samples)]
    marks = []

    def progress(what: str, done: int, total: int) -> None:
        marks.append((done, time.monotonic() - start))
        print(done, total, f"{marks[-1][1]:.0f} s", f"{memory('VmHWM') / 2**20:.0f} MiB", file=sys.stderr, flush=True)

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = memory("VmRSS"), time.monotonic()
    bundle = gptq.apply(
        Bundle(Source(str(folder), "causal-lm", "float32"), "cpu"), gptq.Settings(), Context("cpu", progress, examples, tokens)
    )
    seconds, peak = time.monotonic() - start, memory("VmHWM")
    layers = bundle.model.config.num_hidden_layers
    config = bundle.model.config
    block = 4 * (
        2 * config.hidden_size**2
        + 2 * config.hidden_size * 64 * config.num_key_value_heads
        + 3 * config.hidden_size * config.intermediate_size
    )
    figures = {
        "layers": layers, "parameters": sum(t.numel() for t in bundle.model.parameters()), "seconds": seconds, "seconds_by_block": marks,
        "grown_bytes": peak - before, "packed_bytes": weight_bytes(bundle.model), "block_bytes": block,
        "activation_bytes": 4 * samples * tokens * config.hidden_size,
    }  # fmt: skip
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, nargs="+", default=[22])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--solve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.solve:
        solve(arguments.work, arguments.samples, arguments.tokens)
        return
    for layers in arguments.layers:
        folder = arguments.work / f"llama-{arguments.width}-{layers}"
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, __file__, "--samples", str(arguments.samples), "--tokens", str(arguments.tokens)]
        subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; "
                        f"import scale; scale.make(Path({str(folder)!r}), {arguments.width}, {layers})"], check=True)  # fmt: skip
        done = subprocess.run([*command, "--solve", str(folder)], check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        sizes = {key: f"{value / 2**20:,.0f} MiB" for key, value in figures.items() if key.endswith("_bytes")}
        print(f"{layers} layers of width {arguments.width}: {figures['seconds']:.1f} s, {sizes}", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
