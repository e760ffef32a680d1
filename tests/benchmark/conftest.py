import pytest
import torch

from compress.model import Bundle, Source
from tests.conftest import TASKS


@pytest.fixture(params=["t5", "bart", "llama", "gpt2"])
def random_bundle(request, toys):
    """A random model that doesn't stop at once: weights drawn wider, so that prompts matter, and the end token made unlikely."""
    found = Bundle(Source(str(toys[request.param]), TASKS[request.param], "float32"), "cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in found.model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.15 * torch.randn_like(parameter))
    found.model.generation_config.suppress_tokens = [0, 1, 2]
    return found
