"""What a model holds, told without a list of its parameters, against counts by hand and against what is resident."""

import pytest
import torch
from torch import nn

from compress import held
from compress.engines.transformers import timing
from compress.runtime import Int8Linear
from tests.blocks import run
from tests.conftest import TASKS, make_model
from tests.measuring import loaded


class State:
    def __init__(self, tensor):
        self.scales = {"first": [tensor]}


def test_tensors_count_wherever_they_hang_and_views_of_one_memory_once():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    expected = 4 * (8 * 4 + 4 + 4 * 4 + 4)
    assert held.weight_bytes(model) == expected
    model[0].kept = torch.zeros(100)  # neither parameter nor buffer
    model[0].weight.state = State(torch.zeros(10, dtype=torch.int8))
    model[1].again = model[0].weight[1:3, 2:5]
    model[1].turned = model[0].kept.view(10, 10).t()
    assert held.weight_bytes(model) == expected + 400 + 10
    model[1].held_bytes = 1000
    assert held.weight_bytes(model) == expected + 1410


def test_a_cache_is_no_weight():
    model = make_model("llama")
    before = held.weight_bytes(model)
    model.generate(torch.arange(3, 9)[None], max_new_tokens=3, cache_implementation="static", disable_compile=True)
    assert held.weight_bytes(model) == before


def test_a_kernels_own_layout_counts_as_the_process_holds_it():
    """FBGEMM pads columns to multiples of 512: 8 layers of 1536 x 576 (whose rows are a multiple of 8 and of 48, to which it pads these)."""
    integers, scale = torch.randint(-128, 128, (1536, 576), dtype=torch.int8), torch.rand(1536)
    Int8Linear(integers, scale, None, None)
    layers = nn.ModuleList(Int8Linear(integers, scale, None, None) for _ in range(8))
    assert held.weight_bytes(layers) == pytest.approx(8 * 1536 * 1024, rel=0.03)


@pytest.mark.parametrize(("kind", "method"), [("llama", "rtn"), ("t5", "gptq"), ("t5", "bnb_int8")])
def test_weights_are_counted_as_they_lie_after_the_first_step(toys, tmp_path, kind, method):
    """What is unpacked at the first step is counted unpacked, 172 columns in groups of 128 too; a second step changes nothing."""
    settings = {"bits": 4, "group_size": 128} if method == "rtn" else {"bits": 4, "group_size": 32} if method == "gptq" else {}
    folder = run("quantize", method, toys[kind], kind, tmp_path / "made", **settings)
    worker, told = loaded(folder, TASKS[kind])
    model, weight_bytes = worker.engine.model, told.weights.weight_bytes
    tensors = [t for t in everything(model) if not hasattr(t, "__tensor_flatten__")]
    places = {(t.untyped_storage().data_ptr(), t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}
    assert weight_bytes == pytest.approx(sum(places.values()), rel=0.01)
    timing.step(model)
    assert held.weight_bytes(model) == weight_bytes
    if method != "bnb_int8":
        assert weight_bytes > 0.99 * held.weight_bytes(make_model(kind))


def everything(model):
    """All tensors under the modules of a model, by name, in their attributes and in these's."""
    for module in model.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        for value in vars(module).values():
            yield from (v for v in [value, *vars(value).values()] if isinstance(v, torch.Tensor)) if hasattr(value, "__dict__") else ()
