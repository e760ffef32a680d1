"""Whole experts go by what they give to the tokens that are routed to them, counted by hand."""

import pytest
import torch

from compress.errors import InputError, ModelError
from compress.model.loading import Bundle, load_model
from compress.model.source import Source
from compress.prune import experts as method
from tests.blocks import context, examples, run, saved
from tests.mixtures import MIXTURES, mixture, routed

KEPT = [name for name in MIXTURES if name != "JambaForCausalLM"]


def bundle(folder):
    return Bundle(Source(str(folder), "causal-lm", "float32"), "cpu")


def by_hand(toy, told):
    """For each layer and expert, of every token that was routed to it, its weight times the norm of its output."""
    norms = {}

    def note(path, module, states, chosen, weights):
        for number in range(len(module.down_proj)):
            tokens, place = torch.where(chosen == number)
            gate, up = (states[tokens] @ module.gate_up_proj[number].T).chunk(2, dim=-1)
            out = (module.act_fn(gate) * up) @ module.down_proj[number].T
            norms.setdefault((path, number), []).append(weights[tokens, place] * out.norm(dim=-1))

    routed(toy, told, note)
    return {key: torch.cat(rows) for key, rows in norms.items()}


@pytest.mark.parametrize("by", ["activation", "frequency"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM"])
def test_those_go_that_give_least(name, by, tmp_path):
    toy, told = bundle(saved(mixture(name), tmp_path / "m")), context(examples=examples(40))
    scores = {key: float(rows.mean()) if by == "activation" else len(rows) for key, rows in by_hand(toy, told).items()}
    before = {key: value.clone() for key, value in toy.model.state_dict().items()}
    smaller = method.apply(toy, method.Settings(drop=1, by=by), told).model
    for path in {path for path, _ in scores}:
        numbers = sorted(range(4), key=lambda number, path=path: scores[path, number])
        kept = sorted(numbers[1:])
        for leaf in ("gate_up_proj", "down_proj"):
            assert torch.equal(smaller.state_dict()[f"{path}.{leaf}"], before[f"{path}.{leaf}"][kept])
        gate = path.replace(".experts", ".gate.weight")
        assert torch.equal(smaller.state_dict()[gate], before[gate][kept])


@pytest.mark.parametrize("name", KEPT)
def test_what_is_left_reloads_as_its_config_says(name, tmp_path):
    seen = [{"id": e.id, "prompt": e.prompt, "references": e.references} for e in examples(12)]
    folder = run("prune", "experts", saved(mixture(name), tmp_path / "m"), "llama", tmp_path / "made", seen=seen, drop=2)
    again = load_model(Source(str(folder), "causal-lm"), "cpu")
    inside = [value for key, value in again.named_parameters() if ".experts." in key and value.ndim == 3]
    assert inside
    assert {len(value) for value in inside} == {2}


def test_too_few_would_be_left(tmp_path):
    toy = bundle(saved(mixture("MixtralForCausalLM"), tmp_path / "m"))
    with pytest.raises(InputError, match=r"drop: 3 of 4 experts would leave 1, and the model needs 2; at most 2"):
        method.apply(toy, method.Settings(drop=3), context())


def test_a_model_without_experts_is_refused(toys):
    with pytest.raises(ModelError, match="has no experts"):
        method.apply(bundle(toys["llama"]), method.Settings(drop=1), context())


def test_as_many_go_of_each_group(tmp_path):
    """Of DeepSeek's experts, of which a token is led to some groups first."""
    model = mixture("DeepseekV3ForCausalLM")
    config = type(model.config)(**{**model.config.to_dict(), "n_routed_experts": 8, "n_group": 2})
    torch.manual_seed(0)
    toy, told = bundle(saved(type(model)(config), tmp_path / "m")), context(examples=examples(20))
    with pytest.raises(InputError, match="each of the 2 groups has to lose as many and keep two"):
        method.apply(toy, method.Settings(drop=1), told)
    before = toy.model.state_dict()["model.layers.1.mlp.gate.weight"].clone()
    left = method.apply(toy, method.Settings(drop=2), told).model.state_dict()["model.layers.1.mlp.gate.weight"]
    places = [next(index for index, row in enumerate(before) if torch.equal(row, kept)) for kept in left]
    assert sum(place < 4 for place in places) == 3
