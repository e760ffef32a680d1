"""What the tests of distillation watch."""

import pytest

from compress.training.learner import Learner
from tests.test_training import often  # noqa: F401 - a fixture


@pytest.fixture
def losses(monkeypatch):
    """The loss of every batch as the Trainer has it."""
    seen, plain = [], Learner.compute_loss

    def compute_loss(self, *arguments, **keywords):
        seen.append((loss := plain(self, *arguments, **keywords)).item())
        return loss

    monkeypatch.setattr(Learner, "compute_loss", compute_loss)
    return seen
