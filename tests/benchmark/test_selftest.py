"""The harness measured by itself, as far as it takes seconds: predictions are made, and what was damaged is told from what wasn't."""

import pytest

from compress import recipe
from compress.benchmark import selftest
from compress.methods import quiet

POINT = "batch_sizes: [1], prompt_tokens: [8], new_tokens: 2"


@pytest.fixture
def loaded():
    return recipe.load(selftest.RECIPE, ["generation.max_new_tokens=24", f"benchmark={{threads: 1, warmup: 0, {POINT}}}"])


def test_damaged_texts_are_regressions_and_whole_ones_are_not(loaded, monkeypatch):
    monkeypatch.setattr(selftest, "EXAMPLES", 60)
    monkeypatch.setattr(selftest, "POINTS", 4.0)
    assert selftest.damages(loaded, 2, quiet) == {"damaged": 2, "as they were": 0}


def test_what_was_measured_is_not_measured_again(tmp_path):
    file = tmp_path / "part.json"
    assert selftest._kept(file, lambda: {"a": 1}) == {"a": 1}
    assert selftest._kept(file, lambda: pytest.fail("made again")) == {"a": 1}
