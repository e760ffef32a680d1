"""Hugging Face's Trainer with a loss that is right when batches are accumulated or shared, and checkpoints that survive a kill."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from torch.distributed import barrier, broadcast
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from compress.calibration.stream import Inputs, Row
from compress.errors import RunError
from compress.methods import Context
from compress.training.material import Batch, Loss

CHECKPOINT_SECONDS = 60.0  # what a kill costs at most, where a checkpoint is quickly written
CHECKPOINT_SHARE = 0.05  # the share of the time that checkpoints may take where it isn't
WHOLE = "whole"  # the file that marks a checkpoint as complete
WEIGHTS = "trained.safetensors"
BEST = "best-"  # and the steps it took

Step = Callable[[int, int], None]  # steps done, all steps


class Learner(Trainer):  # type: ignore[misc]
    """The Trainer with a loss that is right when batches are accumulated, and checkpoints that hold only what is trained.

    look      returns the metric on the validation split.
    patience  looks without a better value after which training ends.
    batch     makes the inputs from the numbers of the rows, this process's share of them. The loader yields only numbers, because it runs
              one batch ahead: what a model writes for a step must be written by the weights of that step.
    """

    def __init__(
        self, loss: Loss, batch: Callable[[list[int]], Inputs], rows: list[Row], look: Callable[[], float], patience: int,
        *arguments: Any, **keywords: Any,
    ):  # fmt: skip
        super().__init__(*arguments, **keywords)
        self._loss, self._batch, self._rows, self._look, self._patience = loss, batch, rows, look, patience
        self._seen: list[int] = []  # the examples of this step
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by all positions of a step; the Trainer must not divide again

    def get_train_dataloader(self) -> Any:
        """Batches of what all processes take together; the Trainer's own way to share them out would repeat rows to fill them up."""
        size = self.args.train_batch_size * self.args.world_size
        loader = DataLoader(self.train_dataset, size, sampler=self._get_train_sampler(), collate_fn=self.data_collator)
        return prepare_data_loader(loader, num_processes=1, process_index=0, use_seedable_sampler=True)

    def get_batch_samples(self, epoch_iterator: Iterator[list[int]], num_batches: int, device: Any) -> Any:
        return super().get_batch_samples(map(self._batch, epoch_iterator), num_batches, device)

    def compute_loss(self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels, numbers = inputs.pop("labels"), inputs.pop("numbers")
        del inputs["shift_labels"]
        # gradients are averaged over processes, while the positions were counted over all
        loss = self._loss(model, Batch(inputs, labels, numbers)) / num_items_in_batch * self.args.world_size
        if not loss.isfinite():
            self._stop(f"the loss became {loss.item()}", numbers)
        self._seen.extend(numbers)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):  # one more step, and no weight would be a number
            self._stop(f"the gradient's norm became {float(norm)}", self._seen)
        self._seen.clear()
        return norm

    def _stop(self, what: str, numbers: list[int]) -> NoReturn:
        """Raises RunError that names step and examples."""
        step, ids = self.state.global_step + 1, ", ".join(self._rows[number][0].id for number in numbers)
        why = f"learning_rate {self.args.learning_rate:g} may be too high for this model, lower it"
        if step == 1:
            why = "nothing was learned yet, so it comes from model, teacher or examples; a wider dtype (bfloat16, float32) may help"
        raise RunError(f"training: {what} in step {step} of {self.state.max_steps}, on the examples {ids}; {why}")

    @property
    def takes_part(self) -> bool:
        """Whether this process evaluates on the validation split, and writes what is trained."""
        return bool(self.is_world_process_zero())

    def own(self, file: Path) -> Path:
        """Where this process writes and reads a file of what is trained."""
        return file

    def trained(self) -> dict[str, torch.Tensor]:
        """What is trained, by name, as it is here."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        self.model.eval()
        value = torch.tensor(self._look() if self.takes_part else 0.0, dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            broadcast(value, 0)
        metrics = {"eval_validation": value.item()}
        self.log(metrics)
        self.control.should_evaluate = False
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = bool(super()._determine_best_metric(metrics, trial))
        if better:
            self.state.best_global_step = self.state.global_step
            if self.takes_part:
                self._save(str(self._best()))
        elif self.state.global_step - (self.state.best_global_step or 0) >= self._patience * self.args.eval_steps:
            self.control.should_training_stop = True
        return better

    def _best(self) -> Path:
        """Where the weights with the best metric on the validation split are."""
        return Path(self.args.output_dir) / f"{BEST}{self.state.best_global_step}"

    def take_best(self) -> None:
        if self.args.world_size > 1:
            barrier()  # then they are written
        self._load_from_checkpoint(str(self._best()))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.trained().items()}, self.own(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(self.own(Path(resume_from_checkpoint) / WEIGHTS))
        for name, tensor in self.trained().items():
            tensor.copy_(saved[name])


class Watch(TrainerCallback):  # type: ignore[misc]
    """Reports the progress, and decides when to write a checkpoint.

    folder   where checkpoints go, None for none
    """

    def __init__(self, context: Context, folder: Path | None, each_step: Step):
        self._context, self._folder, self._each_step = context, folder, each_step
        self._pause, self._last, self._begun = CHECKPOINT_SECONDS, time.monotonic(), 0.0
        self._since, self._loss = (0.0, 0), ""
        self._shared, self._first = context.processes > 1, context.rank == 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._since = time.monotonic(), state.num_input_tokens_seen
        self._each_step(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._each_step(state.global_step, state.max_steps)
        seconds, tokens = time.monotonic() - self._since[0], state.num_input_tokens_seen - self._since[1]
        status = f"training; {self._loss}{tokens / seconds:,.0f} tokens/s"
        self._context.progress(status, state.global_step, state.max_steps)
        if self._folder and state.global_step < state.max_steps and self._is_due(args.device):
            control.should_save, self._begun = True, time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if "loss" in state.log_history[-1]:
            self._loss = f"loss {state.log_history[-1]['loss']:.3g}, "

    def _is_due(self, device: torch.device) -> bool:
        """Whether to write a checkpoint now. The first process's clock decides, since all write one together, each its random state."""
        due = time.monotonic() - self._last >= self._pause
        if not self._shared:
            return due
        decision = torch.tensor(due, device=device)
        broadcast(decision, 0)
        return bool(decision)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        assert self._folder
        checkpoint = self._folder / f"checkpoint-{state.global_step}"
        if self._shared:
            barrier()  # then all have written
        if self._first:
            (checkpoint / WHOLE).touch()
            needed = {checkpoint, self._folder / f"{BEST}{state.best_global_step}"}
            for other in [*self._folder.glob("checkpoint-*"), *self._folder.glob(f"{BEST}*")]:
                if other not in needed:
                    shutil.rmtree(other)
        self._last = time.monotonic()
        self._pause = max(CHECKPOINT_SECONDS, (self._last - self._begun) / CHECKPOINT_SHARE)


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; what a kill left half-written is deleted."""
    whole: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            whole[int(path.name.rsplit("-", 1)[-1])] = path
        else:
            shutil.rmtree(path)
    return str(whole[max(whole)]) if whole else None
