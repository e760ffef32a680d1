"""Training in several processes: the same steps as one with as large a batch, the same ends, and one reason where it fails."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from compress import methods, pipeline, process, recipe
from compress.errors import ChildDied, DataError, InputError, RunError
from compress.methods import Optimisation, everyone, quiet
from compress.model import Source
from compress.process import Child, Team
from tests import together
from tests.blocks import bundle, context
from tests.conftest import recipe_for
from tests.distill.pairs import two
from tests.finetune.loops import calm, tune

STEPS = 5
HOW = {"steps": STEPS, "learning_rate": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def path():
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield


@pytest.fixture(scope="module")
def pair(path, tmp_path_factory):
    """Two processes that train together; each test leaves them ready for the next."""
    with Team("tests.together", tmp_path_factory.mktemp("pair") / "log", quiet, 2) as team:
        yield team


@pytest.fixture
def another(tmp_path):
    """Two that fail in the test."""
    with Team("tests.together", tmp_path / "log", quiet, 2) as team:
        yield team


def close(found, expected):
    """Weights of two trainings that differ in the order of sums alone.

    AdamW divides by a gradient's size, so where that is near the rounding of float32, no two programs agree.
    """
    for name, tensor in expected.items():
        apart = (found[name] - tensor).abs()
        assert (apart > 1e-4).double().mean() < 0.01, name
        assert apart.max() < 3e-2, name


CASES = [
    ("finetune", "full", "t5", {"batch_size": 2}, 8),
    ("finetune", "full", "llama", {"batch_size": 1, "accumulate": 2}, 8),
    ("finetune", "full", "llama", {"batch_size": 2}, 7),  # three for the last step of an epoch
    ("finetune", "full", "bert", {"batch_size": 2}, 5),  # one, so that the second process has none
    ("finetune", "full", "t5", {"batch_size": 2, "accumulate": 2, "steps": None, "epochs": 3}, 9),
    ("finetune", "lora", "gpt2", {"batch_size": 2, "rank": 4}, 8),
    ("distill", "logits", "llama", {"batch_size": 2}, 9),
    ("distill", "hidden", "t5", {"batch_size": 1, "accumulate": 2, "attention_weight": 0.5}, 5),
    ("prune", "gradual", "llama", {"batch_size": 2, "sparsity": 0.5, "every": 1}, 7),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "kind", "settings", "count"), CASES)
def test_two_processes_take_the_steps_of_one_with_twice_the_batch(pair, tmp_path, family, method, kind, settings, count):
    original, folder = two(kind, tmp_path) if family == "distill" else (None, calm(kind, tmp_path))
    given = {"family": family, "method": method, "kind": kind, "folder": str(folder), "original": str(original) if original else None, "count": count}
    shared = pair.ask("train", out=str(tmp_path / "two"), settings={**HOW, **settings}, **given)
    twice = {**HOW, **settings, "batch_size": 2 * settings["batch_size"]}
    alone = together.train(quiet, out=tmp_path / "one", settings=twice, processes=1, **given)
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert len(shared["losses"]) == (STEPS if twice["steps"] else 6)
    said = alone["said"][-1] if family == "prune" else alone["said"][0]
    size = twice["batch_size"] * settings.get("accumulate", 1)
    start = f"trained {len(shared['losses'])} steps of {size} on {count} examples"
    assert alone["said"][0].startswith(f"{start}, "), said
    assert shared["said"][0].startswith(f"{start} in 2 processes, ")
    close(load_file(tmp_path / "two"), load_file(tmp_path / "one"))
