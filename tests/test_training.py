"""Training that was killed goes on from its last checkpoint and ends as if it had never stopped."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from compress import artifacts, methods, recipe, stage
from compress.border import answering
from compress.errors import RunError
from compress.execution import Execution
from compress.methods import Context
from compress.model.source import Source
from compress.requests import Make
from compress.training import learner
from compress.training.weights import zeros_kept
from tests.blocks import bundle, examples
from tests.conftest import recipe_for
from tests.finetune.loops import halved, tune

STEPS = 7


class Killed(Exception):
    """The process ends here."""


@pytest.fixture
def often(monkeypatch):
    """A checkpoint after every step."""
    monkeypatch.setattr(learner, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(learner, "CHECKPOINT_SHARE", float("inf"))


def until(step, seen):
    """A progress callback that notes the steps, and ends the process when a step is done but not yet in a checkpoint."""

    def progress(what, done, total):
        if what.startswith("training"):
            seen.append(done)
            if done == step:
                raise Killed

    return progress


def trained(bundled, method, scratch, kill=None, label=False, **settings):
    """What training ends with, and the steps it took."""
    seen: list = []
    told = Context("cpu", until(kill, seen), examples(label=label), 32, scratch=scratch)
    try:
        model = tune(bundled, method, told, **{"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, **settings})
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, seen, told.said
    except Killed:
        return None, seen, told.said


def checkpoints(scratch):
    return sorted(path.name for path in scratch.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("method", "kind", "kill", "settings"),
    [
        ("full", "t5", 2, {}),  # with dropout, which draws numbers; three steps an epoch, killed in the first
        ("full", "t5", 4, {}),  # at the end of one
        ("lora", "gpt2", 6, {"rank": 4, "dropout": 0.2}),
        ("full", "bert", 5, {"batch_size": 1, "accumulate": 2}),
    ],
)
def test_a_killed_training_ends_as_if_it_had_not_been(toys, tmp_path, often, method, kind, kill, settings):
    label = kind == "bert"
    whole, steps, sentences = trained(halved(toys[kind], kind), method, None, label=label, **settings)
    assert steps == list(range(1, STEPS + 1))
    nothing, steps, _ = trained(halved(toys[kind], kind), method, tmp_path, kill, label=label, **settings)
    assert nothing is None
    assert checkpoints(tmp_path) == [f"checkpoint-{kill - 1}"], "one is kept"
    weights, steps, again = trained(halved(toys[kind], kind), method, tmp_path, label=label, **settings)
    assert steps == list(range(kill, STEPS + 1)), "it goes on where it stopped"
    assert again == sentences
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_a_training_can_be_killed_again_and_again(toys, tmp_path, often):
    whole, _, _ = trained(bundle(toys["llama"], "llama"), "full", None)
    for kill in (3, 6):
        assert trained(bundle(toys["llama"], "llama"), "full", tmp_path, kill)[0] is None
    weights, steps, _ = trained(bundle(toys["llama"], "llama"), "full", tmp_path)
    assert steps == [6, 7]
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_a_half_written_checkpoint_is_passed_over_and_removed(toys, tmp_path, often):
    whole, _, _ = trained(bundle(toys["llama"], "llama"), "full", None)
    trained(bundle(toys["llama"], "llama"), "full", tmp_path, 4)
    half = tmp_path / "checkpoint-5"
    shutil.copytree(tmp_path / "checkpoint-3", half)
    (half / learner.WHOLE).unlink()
    (half / learner.WEIGHTS).write_bytes(b"cut off")
    weights, steps, _ = trained(bundle(toys["llama"], "llama"), "full", tmp_path)
    assert steps[0] == 4
    assert not half.exists()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_without_a_place_for_checkpoints_none_are_written(toys, tmp_path, often, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(bundle(toys["llama"], "llama"), "full", None)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_a_minute_apart(toys, tmp_path):
    trained(bundle(toys["llama"], "llama"), "full", tmp_path)
    assert checkpoints(tmp_path) == []


def test_a_loss_that_is_no_number_is_named_with_its_step(toys):
    bundled = bundle(toys["llama"], "llama")
    with torch.no_grad():
        bundled.model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(
        RunError,
        match=r"training: the loss became nan in step 1 of 7, on the examples \d, \d; nothing was learned yet, so it comes from model",
    ):
        trained(bundled, "full", None)


def test_a_gradient_that_is_no_number_is_named_before_it_is_a_weight(toys, monkeypatch):
    """The loss is fine, its gradient isn't: the step that it arises in is named, not the next."""
    bundled, plain, calls = bundle(toys["llama"], "llama"), learner.Learner.compute_loss, []

    def compute_loss(self, model, inputs, **named):
        calls.append([self._rows[number][0].id for number in inputs["numbers"]])
        loss = plain(self, model, inputs, **named)
        if len(calls) == 3:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(learner.Learner, "compute_loss", compute_loss)
    with pytest.raises(RunError) as raised:
        trained(bundled, "full", None)
    assert "the gradient's norm became nan in step 3 of 7" in str(raised.value)
    assert f"on the examples {', '.join(calls[2])}; learning_rate 0.01 may be too high" in str(raised.value)
    assert all(parameter.isfinite().all() for parameter in bundled.model.parameters())


def test_elements_have_no_gradient_while_they_are_zero():
    weight = torch.nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))
    with zeros_kept([weight]):
        (3 * weight).sum().backward()
        assert weight.grad.tolist() == [0, 3, 3]
        weight.data[2] = 0
        (3 * weight).sum().backward()
        assert weight.grad.tolist() == [0, 6, 3]
    (3 * weight).sum().backward()
    assert weight.grad.tolist() == [3, 9, 6]


class Here:
    """A working process's child that works in this one, as `process.Child` is asked."""

    def __init__(self, module, log, progress, start=None):
        self.progress = progress

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, what, **named):
        return answering({Make: stage.run})[what](progress=self.progress, **named)


def test_a_run_killed_in_recovery_goes_on_from_its_last_checkpoint(toys, rows, write_recipe, tmp_path, often, monkeypatch):
    """Pruning is not done again, the artifacts' names are the same, and so are the weights."""
    monkeypatch.setattr(artifacts, "Child", Here)
    stages = [{"prune": "magnitude"}, {"finetune": "full", "steps": 5, "batch_size": 4, "learning_rate": 1e-2}]
    loaded = recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, stages=stages)))
    source = Source(str(toys["llama"]), "causal-lm", "float32")

    def make(folder, progress=methods.quiet):
        return artifacts.make(loaded, source, folder, Execution("cpu", tmp_path / "log", progress))

    whole = make(tmp_path / "whole")
    folder, seen = tmp_path / "killed", []
    with pytest.raises(Killed):
        make(folder, until(4, seen))
    (scratch,) = folder.glob(".*.scratch")
    assert checkpoints(scratch) == ["checkpoint-3"]
    records = make(folder, until(None, seen))
    assert seen == [1, 2, 3, 4, 4, 5]
    assert [record.reused for record in records] == [True, False]
    assert not scratch.exists()
    for record, other in zip(records, whole, strict=True):
        names = [folder_of.rsplit("/", 1)[-1] for folder_of in (record.artifact, other.artifact)]
        assert names[0] == names[1], "named by the digest of all that went into it"
        weights = [load_file(f"{folder_of}/model.safetensors") for folder_of in (record.artifact, other.artifact)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
        assert record.said == other.said
