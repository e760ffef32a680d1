"""Every method on every type of model: made, and all weights accounted for; or refused in a sentence before any work. No third kind."""

import json
import os
import pickle

import pytest
import torch
import transformers

from compress.errors import CompressError
from compress.model.loading import AUTO, load_model
from compress.model.source import Source
from compress.results.stages import NOTES
from tests import blocks
from tests.architectures import ALL, BOTH_SIDES, CLASSIFIERS, made, task_of
from tests.blocks import examples
from tests.conftest import out_of_the_collectors_way

METHODS = {
    "rtn": ("quantize", {}),
    "gptq": ("quantize", {}),
    "int8_dynamic": ("quantize", {}),
    "wanda": ("prune", {}),
    "lora": ("finetune", {"rank": 4, "steps": 1, "batch_size": 2}),
    "structured": ("prune", {"keep": 0.9, "multiple": 2}),
    "depth": ("prune", {"drop": 1}),
}


def cells(name: str, folder, place) -> dict[str, str]:
    """By method `made`, or the sentence that refuses; anything else that happens is an error. What is made lies in `place`, a folder a method."""
    outcomes = {method: made_or_refused(name, method, folder, place / method) for method in METHODS}
    targets = [place / method for method, outcome in outcomes.items() if outcome == "made"]
    inputs = {"input_ids": torch.arange(2, 12)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    if name in BOTH_SIDES:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    for target, there in zip(targets, elsewhere(task_of(name), targets, inputs), strict=True):
        with torch.no_grad():
            here = load_model(Source(str(target), task_of(name)), "cpu")(**inputs).logits
        torch.testing.assert_close(there, here, msg=lambda message, target=target: f"{target.name}: {message}")
    return outcomes


def made_or_refused(name: str, method: str, folder, target) -> str:
    family, settings = METHODS[method]
    if method == "depth" and name in BOTH_SIDES:
        settings = {"drop": {"decoder": 1}}
    told: list[tuple[str, int, int]] = []
    source = Source(str(folder), task_of(name), "float32")
    try:
        seen = examples(12, label=name in CLASSIFIERS)
        blocks.made(source, family, method, settings, target, seen, progress=lambda *step: told.append(step))
    except CompressError as refusal:
        assert "\n" not in str(refusal)
        assert not [step for step in told if step[1] > 0], f"{refusal}, after {told[-1]}"
        return str(refusal)
    account = json.loads((target / NOTES).read_text())["account"]
    if account is not None:
        assert sum(account.values()) == sum(p.numel() for p in load_model(source, "cpu").parameters())
    return "made"


def elsewhere(task, folders, inputs):
    """What plain transformers has for these inputs, a folder at a time, in a process of its own."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)  # others stay behind at a fork
            with torch.no_grad(), os.fdopen(write, "wb") as answer:
                models = (getattr(transformers, AUTO[task]).from_pretrained(folder, dtype="auto").eval() for folder in folders)
                pickle.dump([model(**inputs).logits for model in models], answer)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        message = answer.read()
    os.waitpid(child, 0)
    return pickle.loads(message)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_method_makes_it_or_refuses_it_before_any_work(name, tmp_path):
    out_of_the_collectors_way()  # each type brings modules of its own
    cells(name, made(name, tmp_path / "model"), tmp_path)
