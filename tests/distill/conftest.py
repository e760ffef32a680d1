"""What the tests of distillation watch."""

import pytest

from compress import training
from tests.test_training import often  # noqa: F401 - a fixture


@pytest.fixture
def losses(monkeypatch):
    """The loss of every batch as the Trainer has it."""
    seen, plain = [], training._Learner.compute_loss

    def compute_loss(self, *given, **named):
        seen.append((loss := plain(self, *given, **named)).item())
        return loss

    monkeypatch.setattr(training._Learner, "compute_loss", compute_loss)
    return seen
