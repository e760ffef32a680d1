"""Training written out in float64 without the Trainer, batches or padding, for the tests of what trains."""

import math

import torch
from torch.nn.functional import cross_entropy

from compress.methods import find
from compress.model.loading import load_model
from tests.blocks import bundle, context, examples, lively, saved


def calm(kind, folder, **changes):
    """A folder with a lively model that has no dropout, so that there is nothing random in its training."""

    def change(config):
        for key, value in vars(config).items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        for key, value in changes.items():
            setattr(config, key, value)

    return saved(lively(kind, change), folder / kind)


def tune(toy, method, told=None, **settings):
    """The model after `finetune: method`."""
    module = find("finetune", method)
    seen = examples(label=toy.source.task == "sequence-classification")
    return module.apply(toy, module.Settings(**settings), told or context(examples=seen)).model


def halved(folder, kind, dtype="float32", **settings):
    """A bundle, half of the weights of its linear layers zero."""
    magnitude = find("prune", "magnitude")
    return magnitude.apply(bundle(folder, kind, dtype), magnitude.Settings(**settings), context())


def lost(model, tokenizer, example):
    """The summed cross-entropy of one example, and how many tokens or labels that is."""
    end, answer = tokenizer.eos_token_id, example.references[0] if example.references else None
    ids = tokenizer(example.prompt, add_special_tokens=False).input_ids
    if model.config.model_type == "bert":
        return cross_entropy(model(input_ids=torch.tensor([[*ids, end]])).logits, torch.tensor([int(answer)]), reduction="sum"), 1
    target = [*tokenizer(answer, add_special_tokens=False).input_ids, end] if answer is not None else None
    if model.config.is_encoder_decoder:
        decoder_ids = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
        logits = model(input_ids=torch.tensor([[*ids, end]]), decoder_input_ids=decoder_ids).logits[0]
    else:
        whole = [*ids, end] if target is None else [*ids, *target]
        target = whole[1:] if target is None else target
        logits = model(input_ids=torch.tensor([whole])).logits[0, -1 - len(target) : -1]
    return cross_entropy(logits, torch.tensor(target), reduction="sum"), len(target)


def rate(step, steps, how):
    """The learning rate of a step, counted from zero."""
    rise = round(how.warmup * steps)
    if step < rise:
        return how.learning_rate * step / rise
    share = (step - rise) / (steps - rise)
    return how.learning_rate * {"constant": 1, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[how.schedule]


def adamw(model, tokenizer, rows, how, trained, gone=None):
    """`how.steps` steps over all rows at once, in place.

    trained   the tensors that are trained, by name
    gone      which elements are zero from the end of the first step on, and count for nothing from then on, by name

    Gives the loss of each step, and for each tensor its elements' smallest gradient: AdamW divides by it, so where it is no more than the
    rounding of float32, no two programs agree.
    """
    first = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    least = {name: torch.full_like(tensor, torch.inf) for name, tensor in trained.items()}
    losses = []
    for step in range(how.steps):
        parts = [lost(model, tokenizer, row) for row in rows]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        slopes = {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(trained.items(), gradients, strict=True)}
        if step:
            slopes = {name: slope.masked_fill(gone[name], 0) if gone else slope for name, slope in slopes.items()}
        norm = math.sqrt(sum(float((slope**2).sum()) for slope in slopes.values()))
        now = rate(step, how.steps, how)
        for name, tensor in trained.items():
            slope = slopes[name] * min(1, how.max_grad_norm / norm)
            least[name] = torch.minimum(least[name], slope.abs())
            first[name] = 0.9 * first[name] + 0.1 * slope
            second[name] = 0.999 * second[name] + 0.001 * slope**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            decay = how.weight_decay if tensor.ndim > 1 else 0  # biases and norms don't decay
            with torch.no_grad():
                tensor.mul_(1 - now * decay).sub_(now * mean / (square.sqrt() + 1e-8))
                if gone:
                    tensor.masked_fill_(gone[name], 0)
    return losses, least


def doubled(toy):
    """The bundle's model as it lies in its folder, in float64, to be trained by hand."""
    return load_model(toy.source, "cpu").double().train().requires_grad_(True)
