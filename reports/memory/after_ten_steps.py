"""What a model holds after ten steps in plain transformers, in a fresh process that knows nothing of this package.

    python reports/memory/after_ten_steps.py FOLDER... [--report REPORT.json ...]

For each folder of a causal model, in a process of its own: `from_pretrained`, ten tokens written after a prompt of 128, freed memory given
back. Printed is the resident memory that has been added since before the model was loaded. Of that, what is mapped from files, and what of
it is code of libraries. Then the bytes of all tensors that Python's garbage collector knows of, each stretch of memory once. Ten tokens
again give the high-water mark, where it can be set back. With `--report`, in the same order, a report's candidate stands beside each: its
weights, its peak while running, and how far off they are. Code is left out there, since it is no part of what a model takes.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

PROMPT, NEW = 128, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--report", nargs="*", default=[], type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(held(arguments.one)))
        return
    print("| model | resident | mapped from files | code | tensors | peak | report: weights | report: peak |\n" + 8 * "|---" + "|")
    for folder, report in zip(arguments.folders, [*arguments.report, *[None] * len(arguments.folders)], strict=False):
        # tensors have memory of their own, for the holes in a heap are chance
        apart = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
        run = subprocess.run([sys.executable, __file__, "--one", folder], check=True, capture_output=True, text=True, env=apart)
        lines = run.stdout.splitlines()
        sizes = json.loads(lines[-1])
        cells = [f"{sizes[name] / 1e6:.1f} MB" if sizes[name] else "-" for name in ("resident", "file", "code", "tensors", "peak")]
        cells += ["-", "-"] if report is None else beside(report, sizes)
        print(f"| {folder.name} | {' | '.join(cells)} |", flush=True)


def beside(report: Path, sizes: dict[str, int]) -> list[str]:
    sides = [side for side in json.loads(report.read_text())["sides"] if side["role"] == "candidate"]
    values = {m["metric"]: m["value"] for m in sides[-1]["measurements"] if m["batch_size"] is None}
    pairs = ((values["weight_bytes"], sizes["tensors"]), (values["peak_run_bytes"], sizes["peak"] - sizes["code"]))
    return [f"{ours / 1e6:.1f} MB" + (f" ({100 * (ours / plain - 1):+.1f} %)" if plain else "") for ours, plain in pairs]


def held(folder: Path) -> dict[str, int]:
    """Bytes that a model holds after ten steps."""
    import gc

    import torch
    import transformers

    torch.set_num_threads(1)
    packing = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
    if packing:  # code is no part of what a model holds
        __import__(packing.replace("-", "_"))
    ends = {"pad_token_id": 0, "eos_token_id": 1}
    toy = transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, **ends)
    generate(transformers.LlamaForCausalLM(toy))
    before = resident()
    tensors_before = {id(tensor) for tensor in tensors()}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    generate(model)
    gc.collect()
    after = resident()
    added = (tensor for tensor in tensors() if id(tensor) not in tensors_before)
    stretches = sorted(stretch(tensor) for tensor in added if not hasattr(tensor, "__tensor_flatten__"))
    total, end = 0, 0
    for first, last in stretches:
        total, end = total + max(0, last - max(first, end)), max(end, last)
    peak = 0
    try:
        Path("/proc/self/clear_refs").write_text("5")
        generate(model)
        peak = status("VmHWM") - before["VmRSS"]
    except OSError:
        pass
    names = {"resident": "VmRSS", "file": "RssFile", "code": "code"}
    return {**{name: after[key] - before[key] for name, key in names.items()}, "tensors": total, "peak": peak}


def generate(model):
    import torch

    ids = torch.randint(3, 64, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    model.generate(ids, attention_mask=torch.ones_like(ids), **how)


def tensors():
    import gc

    import torch

    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu"]


def stretch(tensor) -> tuple[int, int]:
    """First byte and the one after the last of a tensor in memory."""
    span = 0 if tensor.numel() == 0 else 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def resident() -> dict[str, int]:
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {**{key: status(key) for key in ("VmRSS", "RssFile")}, "code": code()}


def code() -> int:
    """Resident bytes of files that are libraries."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            counted = ".so" in line.rpartition("/")[2]
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


if __name__ == "__main__":
    main()
