"""Peaks are seen, attributed to the right phase and set back."""

import time

import pytest
import torch

from compress.benchmark import memory

MB = 1_000_000


def test_a_passing_peak_is_seen_and_set_back():
    held = memory.resident()
    memory.reset_peak("cpu")
    block = torch.ones(64 * MB // 4)
    del block
    assert memory.peak("cpu", held)["peak"] == pytest.approx(64 * MB, rel=0.15)
    memory.reset_peak("cpu")
    assert memory.peak("cpu", held)["peak"] < 40 * MB


def test_the_interpreters_own_memory_is_taken_off():
    memory.reset_peak("cpu")
    assert memory.peak("cpu", memory.resident())["peak"] < 20 * MB


def test_where_the_mark_cannot_be_set_back_samples_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path)  # a folder can't be written, whoever asks
    assert not memory.can_reset()
    held = memory.resident()
    memory.reset_peak("cpu")
    block = torch.ones(64 * MB // 4)
    time.sleep(0.05)
    del block
    assert memory.peak("cpu", held)["peak"] == pytest.approx(64 * MB, rel=0.15)
    memory.reset_peak("cpu")
    time.sleep(0.05)
    assert memory.peak("cpu", held)["peak"] < 40 * MB


@pytest.mark.gpu
def test_the_gpus_peak_is_the_allocators():
    memory.reset_peak("cuda")
    before = memory.peak("cuda", 0)["peak"]
    block = torch.ones(64 * MB // 4, device="cuda")
    del block
    peak = memory.peak("cuda", 0)
    assert peak["peak"] - before == pytest.approx(64 * MB, rel=0.05)
    assert peak["reserved"] >= peak["peak"]
