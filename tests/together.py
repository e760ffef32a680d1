"""The working process of tests in which several train together: stages on toy models, and ways to fail."""

import os
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from compress import stage
from compress.distill import sequence
from compress.methods import Context, find
from compress.model.source import Source
from compress.process import serve
from compress.training import learner, loop
from tests.blocks import bundle, examples
from tests.conftest import TASKS

LOSSES: list[float] = []
HELD: dict[str, int] = {}


def train(progress, family, method, kind, folder, out, settings, original=None, count=6, scratch=None, processes=2, device="cpu", often=False, kill=None, nan=None, watched=0):  # fmt: skip
    """A stage's method; what it said, loss and gradient's length of every step as the Trainer logs them, and how many elements of weights and
    optimiser states this process held. The first process leaves the weights in `out`.

    often   a checkpoint after every step
    kill    (rank, step): that process is killed when that step is done, before a checkpoint of it
    nan     a rank in which the model gives no numbers; weights are the first one's in all
    watched so many examples of the validation split
    """
    if processes > 1 and not torch.distributed.is_initialized():
        stage._join(device, int(os.environ["WORLD_SIZE"]))
    rank = int(os.environ.get("RANK", "0"))
    learner.CHECKPOINT_SECONDS, learner.CHECKPOINT_SHARE = (0.0, float("inf")) if often else (60.0, 0.05)

    def told(what, done, total):
        if what.startswith("training") and kill == [rank, done]:
            os.kill(os.getpid(), signal.SIGKILL)
        progress(what, done, total)

    LOSSES.clear()
    bundled, chosen = bundle(folder, kind), find(family, method)
    context = Context(
        device, told, examples(count, label=kind == "bert"), 32, scratch=Path(scratch) if scratch else None, processes=processes, rank=rank,
        validation=examples(watched),
    )  # fmt: skip
    if original:
        context.models["original"] = Source(original, TASKS[kind], "float32")
    if nan == rank:
        bundled.model.register_forward_hook(lambda model, inputs, out: type(out)(logits=out.logits * float("nan")))
    model = chosen.apply(bundled, chosen.Settings(**settings), context).model
    if rank == 0:
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, out)
    norms = [point["grad_norm"] for point in context.curve if point["grad_norm"] is not None]
    return {"said": context.said, "losses": LOSSES, "norms": norms, "held": HELD}


def written(progress, folder, scratch):
    """What `distill: sequence` has the teacher write; as every process has it."""
    if not torch.distributed.is_initialized():
        stage._join("cpu", 2)
    rank = int(os.environ["RANK"])
    context = Context("cpu", progress, examples(), 32, scratch=Path(scratch), processes=2, rank=rank)
    taught = sequence.written(bundle(folder, "llama"), sequence.Settings(batch_size=2, max_new_tokens=8), context)
    texts = [example.references for example in taught]
    every: list = [None, None]
    torch.distributed.all_gather_object(every, texts)
    assert every[0] == every[1]
    return texts


def held(tensor):
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


class Noted:
    def log(self, logs, *arguments, **named):
        if "loss" in logs:
            LOSSES.append(logs["loss"])
            states = [value for state in self.optimizer.state.values() for value in state.values()]
            HELD["weights"], HELD["states"] = (sum(map(held, tensors)) for tensors in (self.model.parameters(), states))
        super().log(logs, *arguments, **named)


loop.Learner = type("NotedLearner", (Noted, loop.Learner), {})
loop.ShardedLearner = type("NotedShardedLearner", (Noted, loop.ShardedLearner), {})

if __name__ == "__main__":
    serve({"train": train, "written": written})
