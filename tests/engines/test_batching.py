"""Progress of batches: it moves while one is written, in rows, never back, and ends at its end."""

import torch
from torch import nn

from compress.engines.transformers import batching
from compress.engines.transformers.batching import Batches


class Stepper(nn.Module):
    """A model of which each call is a step."""

    device = torch.device("cpu")

    def forward(self, x):
        return x


def told(lengths, steps, calls):
    """What is told where each batch calls the model so many times."""
    model, seen = Stepper(), []
    batches = Batches(model, 20, lambda *step: seen.append(step))
    with batches.stepwise(steps):
        batches.each(lengths, lambda _: [model(torch.zeros(1)) for _ in range(calls)], "writing")
    model(torch.zeros(1))
    return seen


def test_a_batch_moves_with_each_step():
    seen = told([10, 10, 5, 5], steps=4, calls=4)  # of two rows each
    assert [done for _, done, _ in seen] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert {(what, total) for what, _, total in seen} == {("writing", 4)}


def test_rows_that_end_early_or_come_in_parts_never_move_it_back():
    early, parts = ([done for _, done, _ in told([10, 10, 5, 5], 4, calls)] for calls in (1, 11))
    assert early == [0, 0, 2, 2, 4]
    assert parts == sorted(parts)
    assert (parts[0], parts[-1], max(parts)) == (0, 4, 4)


def test_on_a_cpu_no_row_is_padded_to_more_than_twice_its_length(monkeypatch):
    monkeypatch.setattr(batching, "_fitting", lambda *_: 100)
    batches = []
    Batches(Stepper(), None, lambda *_: None).each([3, 10, 5, 4, 9, 2, 1], batches.append, "reading")
    assert batches == [[1, 4, 2], [3, 0, 5], [6]]


def test_few_rows_go_along_where_steps_of_their_own_cost_more_than_padding(monkeypatch):
    monkeypatch.setattr(batching, "_fitting", lambda *_: 10_000)
    parts = []
    batches = Batches(Stepper(), None, lambda *_: None)
    with batches.stepwise(3):
        batches.each([100, 20, 90, 99], parts.append, "writing")
        batches.each([100, 20, 90, 9], parts.append, "writing")
    assert parts == [[0, 3, 2, 1], [0, 2], [1, 3]]
