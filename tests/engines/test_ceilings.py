"""What the machine can do: the arithmetic of the figures, by a clock that is made to say what it says. No test asserts a speed."""

import pytest
import torch

from compress.engines.transformers import ceilings


def test_a_copy_counts_bytes_read_and_written_and_the_best_timing(monkeypatch):
    took = iter([3.0, 2.0, 4.0, 5.0])
    monkeypatch.setattr(ceilings, "COPIED_BYTES", 1000)
    monkeypatch.setattr(ceilings, "_seconds", lambda work, device: next(took))
    assert ceilings.copy_bytes_per_second("cpu") == 1000


def test_a_product_counts_two_operations_each_and_the_best_size_and_layout(monkeypatch):
    """Kernels of bfloat16 without instructions for it were six times as fast at a weight turned round, so that layers beat the ceiling."""
    took, layouts = iter([1.0] * 8 + [5.0] * 4 + [2.0] * 4), []
    monkeypatch.setattr(ceilings, "SIDES", (8, 16))
    monkeypatch.setattr(ceilings, "_seconds", lambda work, device: layouts.append(work.args[1].is_contiguous()) or next(took))
    assert ceilings.flops_per_second("cpu", torch.float32) == 2 * 16**3 / 2
    assert layouts == 2 * ([True] * 4 + [False] * 4)


def test_a_slow_machine_is_spared_large_products(monkeypatch):
    monkeypatch.setattr(ceilings, "SIDES", (8, 10**9))
    monkeypatch.setattr(ceilings, "ENOUGH_S", 0.0)
    assert ceilings.flops_per_second("cpu", torch.float32) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_are_measured_on_this_machine(dtype, monkeypatch):
    monkeypatch.setattr(ceilings, "SIDES", (64,))
    assert ceilings.copy_bytes_per_second("cpu") > 0
    assert ceilings.flops_per_second("cpu", dtype) > 0


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock():
    assert ceilings.copy_bytes_per_second("cuda") > 1e10
    assert ceilings.flops_per_second("cuda", torch.float16) > 1e12
