"""gradual: the schedule against its formula, the sparsity along the steps, zeros that never come back, kills."""

import pytest
import torch
from pydantic import ValidationError
from transformers.pytorch_utils import Conv1D

from compress.errors import DataError, InputError
from compress.methods import Context, Example, Optimisation, find
from compress.model.loading import load_model
from compress.model.source import Source
from compress.prune import gradual
from compress.training import learner
from tests.blocks import bundle, context, examples, run
from tests.conftest import TASKS
from tests.finetune.loops import adamw, calm, doubled, lost

HOW = {"steps": 20, "batch_size": 3, "learning_rate": 1e-2}


class Killed(Exception):
    """The process ends here."""


def linear(model):
    """The weights of the linear layers that are no heads."""
    layers = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)}
    return {name: part.weight for name, part in layers.items() if name not in ("lm_head", "classifier")}


def pruned(folder, kind, look=lambda model, done: None, dtype="float32", scratch=None, told=None, seen=None, **settings):
    """A pruned model; look(model, steps done) is called after every step."""
    toy = bundle(folder, kind, dtype)
    seen = seen or examples(label=kind == "bert")
    told = told or Context("cpu", lambda what, done, total: look(toy.model, done), seen, 32, scratch=scratch)
    return gradual.apply(toy, gradual.Settings(**{**HOW, **settings}), told).model


@pytest.mark.parametrize(
    ("steps", "until", "every", "last", "times"),
    [(100, 0.7, 10, 70, 7), (20, 0.7, None, 14, 14), (9, 1.0, 4, 9, 3), (1000, 0.5, None, 500, 50), (3, 0.01, 7, 1, 1)],
)
def test_the_schedule_is_that_of_the_paper(steps, until, every, last, times):
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 with s_i = 0, t_0 = 0 and n dt = last."""
    settings = gradual.Settings(sparsity=0.8, until=until, every=every)
    due = [step for step in range(steps + 1) if gradual.is_due(step, steps, settings)]
    assert len(due) == times
    assert due[-1] == last
    apart = every or max(1, last // 50)
    assert due[:-1] == list(range(apart, last, apart))
    for step in range(steps + 1):
        expected = 0.8 + (0.0 - 0.8) * (1 - step / last) ** 3 if step < last else 0.8
        assert gradual.sparsity_at(step, steps, settings) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", TASKS)
def test_sparsity_rises_with_the_schedule_and_zeros_never_come_back(toys, kind):
    shares, gone = {}, {}

    def look(model, done):
        for name, weight in linear(model).items():
            zero = weight == 0
            if name in gone:
                assert zero[gone[name]].all(), f"{name}, step {done}"
            shares[name, done], gone[name] = int(zero.sum()), zero

    toy = bundle(toys[kind], kind)
    told = Context("cpu", lambda what, done, total: look(toy.model, done), examples(label=kind == "bert"), 32)
    start = {name: weight.detach().clone() for name, weight in linear(toy.model).items()}
    natural = {name: int((weight == 0).sum()) for name, weight in start.items()}
    sparse = gradual.apply(toy, gradual.Settings(sparsity=0.6, every=3, weight_decay=0.1, **HOW), told).model
    counts = {done: 0.6 * (1 - (1 - min(done, 14) / 14) ** 3) for done in (3, 6, 9, 12, 14)}
    for name, weight in linear(sparse).items():
        now = 0.0
        for done in range(1, 21):
            now = counts.get(done, now)
            assert shares[name, done] == max(round(now * weight.numel()), natural[name]), f"{name}, step {done}"
        assert (weight != start[name])[weight != 0].double().mean() > 0.9, "the others were trained"
    noted = {row["name"]: row for row in told.layers if row["sparsity"] is not None}
    assert noted.keys() == linear(sparse).keys()
    assert all(noted[name]["sparsity"] == round(0.6 * weight.numel()) / weight.numel() for name, weight in linear(sparse).items())
    assert all(row["bits"] == 32 for row in noted.values())
    assert not sparse.training


def test_what_goes_is_what_is_nearest_to_zero_just_then(toys):
    """The first pruning by hand: the same training without any pruning gives the weights that it chose from."""
    full, kept = find("finetune", "full"), {}

    def look(model, done):
        if done == 4:
            kept.update({name: weight.detach().clone() for name, weight in linear(model).items()})

    told = Context("cpu", lambda what, done, total: look(plain.model, done), examples(), 32)
    plain = bundle(toys["llama"], "llama")
    full.apply(plain, full.Settings(**HOW), told)
    unpruned = dict(kept)
    pruned(toys["llama"], "llama", look, every=4, sparsity=0.5)
    share = 0.5 * (1 - (1 - 4 / 14) ** 3)
    for name, weight in unpruned.items():
        limit = weight.abs().flatten().sort().values[round(share * weight.numel()) - 1]
        assert torch.equal(kept[name], weight.masked_fill(weight.abs() <= limit, 0)), name


def test_what_is_zero_counts_for_nothing_in_the_steps_that_follow(tmp_path):
    """Against a loop in float64 where the gradients that are left are shortened together, and moments of what is gone move nothing."""
    toy, how = bundle(calm("llama", tmp_path), "llama"), {"steps": 4, "learning_rate": 1e-2, "warmup": 0.0}
    weights = dict(pruned(toy.source.id, "llama", sparsity=0.7, until=0.25, batch_size=6, **how).named_parameters())
    model = doubled(toy)
    zero = {name: weights[name] == 0 for name in weights}
    assert sum(int(gone.sum()) for gone in zero.values()) > 0.5 * sum(gone.numel() for gone in zero.values())
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    _, least = adamw(model, toy.tokenizer, examples(), Optimisation(**how), dict(model.named_parameters()), zero)
    for name, expected in model.named_parameters():
        apart, sure = (weights[name].double() - expected).detach().abs(), least[name] > 1e-5
        assert sure.any(), name
        assert (apart[sure] <= 1e-2 * (expected - start[name]).detach()[sure].abs().max()).all(), name


def test_over_all_layers_the_smallest_of_all_go(toys):
    told = context()
    weights = linear(pruned(toys["llama"], "llama", told=told, scope="global", sparsity=0.5))
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == round(0.5 * sum(weight.numel() for weight in weights.values()))
    assert len({row["sparsity"] for row in told.layers if row["sparsity"]}) > 4


@pytest.mark.parametrize(("kind", "dtype"), [("t5", "float16"), ("llama", "bfloat16")])
def test_dtypes_stay_and_layers_left_out_do_not_lose_weights(toys, kind, dtype):
    name = {"t5": "SelfAttention.q", "llama": "q_proj"}[kind]
    before = bundle(toys[kind], kind, dtype).model.state_dict()
    model = pruned(toys[kind], kind, dtype=dtype, ignore=["lm_head", name], steps=4, every=1)
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == {key: tensor.dtype for key, tensor in before.items()}
    for layer, weight in linear(model).items():
        assert ((weight == 0).double().mean() == 0.5) == (not layer.endswith(name)), layer


def test_zeros_of_an_earlier_stage_stay(toys):
    """Those of layers left out now as well."""
    toy, magnitude = bundle(toys["gpt2"], "gpt2"), find("prune", "magnitude")
    magnitude.apply(toy, magnitude.Settings(sparsity=0.3), context())
    zeros = {name: weight == 0 for name, weight in linear(toy.model).items()}
    ignored = [name for name in zeros if name.endswith("c_fc")]
    model = gradual.apply(toy, gradual.Settings(ignore=["lm_head", *ignored], **HOW), context()).model
    for name, weight in linear(model).items():
        assert (weight == 0)[zeros[name]].all(), name
        if name in ignored:
            assert torch.equal(weight == 0, zeros[name])


def test_a_killed_training_ends_as_if_it_had_not_been(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(learner, "CHECKPOINT_SHARE", float("inf"))
    whole = pruned(toys["t5"], "t5", every=3).state_dict()
    for kill in (4, 9):  # its last checkpoint lies at a pruning, or between two
        seen = []

        def end(model, done, kill=kill, seen=seen):
            seen.append(done)
            if seen == [*range(1, kill + 1)]:
                raise Killed

        with pytest.raises(Killed):
            pruned(toys["t5"], "t5", end, scratch=tmp_path / str(kill), every=3)
        resumed = pruned(toys["t5"], "t5", end, scratch=tmp_path / str(kill), every=3).state_dict()
        assert seen == [*range(1, kill + 1), *range(kill, 21)]
        assert all(torch.equal(resumed[name], whole[name]) for name in whole), kill


def test_less_is_lost_than_by_pruning_at_once(tmp_path):
    """At 80 %, on the texts that the model has learned by heart before."""
    seen = [Example(e.id, e.prompt, []) for e in examples()]
    toy, full, magnitude = bundle(calm("llama", tmp_path), "llama"), find("finetune", "full"), find("prune", "magnitude")
    full.apply(toy, full.Settings(steps=30, batch_size=6, learning_rate=5e-3), context(examples=seen))
    toy.save(tmp_path / "learned")
    once = bundle(tmp_path / "learned", "llama")
    magnitude.apply(once, magnitude.Settings(sparsity=0.8), context())
    slow = pruned(tmp_path / "learned", "llama", seen=seen, sparsity=0.8, steps=30, batch_size=6, learning_rate=5e-3)

    def loss(model):
        with torch.no_grad():
            parts = [lost(model, toy.tokenizer, row) for row in seen]
        return float(sum(part for part, _ in parts)) / sum(count for _, count in parts)

    assert loss(toy.model) < 0.5
    assert loss(slow) < 0.5 * loss(once.model)


def test_the_artifact_is_an_ordinary_model_with_so_many_zeros(toys, tmp_path):
    folder = run("prune", "gradual", toys["gpt2"], "gpt2", tmp_path / "made", sparsity=0.7, steps=4, batch_size=3)
    for weight in linear(load_model(Source(str(folder), TASKS["gpt2"]), "cpu")).values():
        assert int((weight == 0).sum()) == round(0.7 * weight.numel())


def test_a_sparsity_that_would_empty_a_layer_is_refused_before_training(toys):
    def never(model, done):
        raise AssertionError("it trained")

    with pytest.raises(InputError, match=r"sparsity: 0.99999 would empty model\.layers\.0\."):
        pruned(toys["llama"], "llama", never, sparsity=0.99999)


def test_no_targets_are_refused(toys):
    with pytest.raises(DataError, match="has a target"):
        pruned(toys["t5"], "t5", seen=[Example(e.id, e.prompt, []) for e in examples()])


@pytest.mark.parametrize("chosen", [{"pattern": "2:4"}, {"until": 0}, {"until": 1.1}, {"every": 0}, {"sparsity": 1.0}])
def test_settings_that_make_no_sense_are_refused(chosen):
    with pytest.raises(ValidationError):
        gradual.Settings(**chosen)
