"""Training for every family: Hugging Face's Trainer over the calibration's batches, checkpoints that outlive a kill, zeros that stay."""

import inspect
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import barrier, broadcast
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from compress.architecture import label_number
from compress.calibration.stream import Inputs, padded, without_cache
from compress.errors import DataError, RunError
from compress.methods import Context, Example, Optimisation, TuneSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINT_SECONDS = 60.0  # what a kill costs at most, where a checkpoint is quickly written
CHECKPOINT_SHARE = 0.05  # the share of the time that checkpoints may take where it isn't
CURVE = 200  # points of the loss that are kept
IGNORED = -100  # the label of a position that counts for nothing
WHOLE = "whole"  # the file that says that a checkpoint was written to its end
WEIGHTS = "trained.safetensors"

Row = tuple[Example, list[int], list[int]]  # as `calibration.stream.encoded` gives them
Step = Callable[[int, int], None]  # steps done, all steps
Rewrite = Callable[[list[Row], int], list[Row]]  # the rows of a batch, steps done -> what is learned from in their place


@dataclass(frozen=True)
class Batch:
    """What a loss is worked out on.

    inputs   what the model is called with
    wanted   what each position of the logits should give, `IGNORED` where it counts for nothing; of a classifier one label an example
    numbers  the examples' places among the rows that `train` was given
    """

    inputs: Inputs
    wanted: Tensor
    numbers: list[int]

    @property
    def targets(self) -> Tensor:
        """What the positions that count should give."""
        return self.wanted[self.wanted != IGNORED]

    def counted(self, logits: Tensor) -> Tensor:
        """Logits in float32 of the positions that count, (positions, vocabulary); a classifier's all, (examples, labels)."""
        return logits[self.wanted != IGNORED].float()

    def logits_of(self, model: Any) -> Tensor:
        """A model's logits as `counted` gives them. The head is spared what it can be: prompts may be many times the targets."""
        if self.wanted.ndim == 1 or not _can_leave_out(type(getattr(model, "module", model)).forward):
            return self.counted(model(**self.inputs).logits)
        real = self.wanted != IGNORED
        places = real.any(dim=0).nonzero()[:, 0]
        logits: Tensor = model(**self.inputs, logits_to_keep=places).logits
        return logits[real[:, places]].float()


Loss = Callable[[Any, Batch], Tensor]  # model, batch -> the loss summed over the positions that count


@cache
def _can_leave_out(forward: Callable[..., Any]) -> bool:
    """Whether a model can be told which positions want logits."""
    return "logits_to_keep" in inspect.signature(forward).parameters


def entropy(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy with the targets, summed over the positions that count."""
    return cross_entropy(batch.logits_of(model), batch.targets, reduction="sum")


def train(
    model: "PreTrainedModel", rows: list[Row], how: Optimisation, seed: int, context: Context, loss: Loss = entropy, known: bool = True,
    each_step: Step = lambda done, steps: None, rewrite: Rewrite = lambda rows, done: rows,
) -> None:  # fmt: skip
    """Train what wants a gradient, in place; goes on from the last checkpoint in `context.scratch`, and ends as if it had never stopped.

    loss       is divided by the number of positions that count in all batches of a step, so accumulated batches are one larger batch
    known      whether the targets are needed; without, examples that have none are learned from too
    each_step  called before the first step, which after a kill is the one behind the checkpoint, and after each, before its checkpoint
    rewrite    called for each batch before its step; draws no numbers from the global generators, whose state a kill loses there

    The processes of `context` train together: what one alone would take as a batch of `batch_size` x processes they share.

    Raises DataError where there is too little to learn from, RunError where the loss is no longer a number and where not all processes are
    there.
    """
    learnable = _learnable(model, rows) if known else list(range(len(rows)))
    processes, together = context.processes, how.batch_size * context.processes
    size = together * how.accumulate
    if len(learnable) < size:
        among = f" x {processes} processes" if processes > 1 else ""
        raise DataError(
            f"training: the train split gives {len(learnable)} examples to learn from, fewer than the {size} of one step"
            f" (batch_size {how.batch_size} x accumulate {how.accumulate}{among}); lower these or give more rows"
        )
    steps = how.steps or math.ceil((how.epochs or 1) * math.ceil(math.ceil(len(learnable) / together) / how.accumulate))

    def batch(shared: list[int]) -> Inputs:
        mine = shared[context.rank :: processes]
        numbers = mine or shared[:1]
        part = rewrite([rows[number] for number in numbers], learner.state.global_step)
        inputs = padded(model, [(ids, answer) for _, ids, answer in part])
        wanted = labels(model, inputs, part, known)
        if not mine:  # of an epoch's last rows none may be left, and all have to take part
            wanted.fill_(IGNORED)
        # the Trainer counts shift_labels where it knows them
        return {**inputs, "labels": wanted, "shift_labels": wanted, "numbers": numbers}

    on_gpu = model.device.type == "cuda"
    with _folder(context) as folder, without_cache(model):
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=how.batch_size, gradient_accumulation_steps=how.accumulate,
            learning_rate=how.learning_rate, lr_scheduler_type=_SCHEDULES[how.schedule], warmup_steps=round(how.warmup * steps),
            weight_decay=how.weight_decay, max_grad_norm=how.max_grad_norm, seed=seed,
            bf16=on_gpu and torch.cuda.is_bf16_supported(including_emulation=False), use_cpu=not on_gpu,
            remove_unused_columns=False, dataloader_pin_memory=False, include_num_input_tokens_seen="non_padding", save_strategy="no",
            logging_steps=max(1, steps // CURVE), logging_nan_inf_filter=False, report_to="none", disable_tqdm=True,
            ddp_find_unused_parameters=False,  # what a loss uses beside the model's own forward pass would pass for unused
        )  # fmt: skip
        if arguments.world_size != processes:
            raise RunError(f"training: {processes} processes were asked for, and {arguments.world_size} would train")
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # the model is on one of them; the Trainer would put copies on all
        watch = _Watch(context, folder if context.scratch else None, each_step)
        learner = _Learner(loss, batch, rows, model, arguments, list, train_dataset=learnable, callbacks=[watch])
        learner.remove_callback(PrinterCallback)
        with arguments.main_process_first(local=False):  # which removes what is half-written
            begun = _last_checkpoint(folder)
        learner.train(resume_from_checkpoint=begun)
        learner.accelerator.unwrap_model(learner.model_wrapped, keep_fp32_wrapper=False)  # 16 bits were for training
    model.zero_grad(set_to_none=True)
    model.eval()
    curve = [entry["loss"] for entry in learner.state.log_history if "loss" in entry]
    some = max(1, len(curve) // 10)
    first, last = (sum(part) / some for part in (curve[:some], curve[-some:]))
    among = f" in {processes} processes" if processes > 1 else ""
    context.say(
        f"trained {steps:,} steps of {size} on {len(learnable):,} examples{among}, {learner.state.num_input_tokens_seen:,} tokens read;"
        f" loss {first:.3g} to {last:.3g}"
    )
    if lacking := len(rows) - len(learnable):
        context.say(f"{lacking:,} of {len(rows):,} examples have no target and were left out")


def train_all(
    model: "PreTrainedModel", rows: list[Row], settings: TuneSettings, context: Context, loss: Loss = entropy, known: bool = True,
    rewrite: Rewrite = lambda rows, done: rows,
) -> None:  # fmt: skip
    """Train all weights in float32, in place, zeros kept where the settings say so; the rest is `train`'s."""
    model.requires_grad_(True)
    with in_float32(model), zeros_kept(pruned(model).values() if settings.keep_zeros else []):
        train(model, rows, settings, settings.seed, context, loss, known, rewrite=rewrite)


def labels(model: "PreTrainedModel", inputs: Inputs, rows: list[Row], known: bool = True) -> Tensor:
    """What each position of the logits should give, `IGNORED` where it counts for nothing; for classifiers one label an example."""
    if not model.can_generate() and not known:  # any label will do to say that the position counts
        return torch.zeros(len(rows), dtype=torch.long, device=model.device)
    if not model.can_generate():
        return torch.tensor([label_number(model.config, (example.references or [""])[0]) for example, _, _ in rows], device=model.device)
    both = model.config.is_encoder_decoder
    wanted = torch.full_like(inputs["decoder_input_ids" if both else "input_ids"], IGNORED)
    for row, (_, ids, answer) in zip(wanted, rows, strict=True):
        if both:
            row[: len(answer)] = torch.tensor(answer)
        else:  # position n gives token n + 1; plain texts are learned whole
            start = max(len(ids) - len(answer), 1) if answer else 1
            row[start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
    return wanted


@contextmanager
def in_float32(model: "PreTrainedModel") -> Iterator[None]:
    """The model's weights in float32, where steps of a small learning rate aren't rounded away; afterwards each as it was stored."""
    stored = {parameter: parameter.dtype for parameter in model.parameters()}
    for parameter in stored:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in stored.items():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def zeros_kept(weights: Iterable[Tensor]) -> Iterator[None]:
    """Elements that are zero get no gradient, so that AdamW leaves them there: zero times any weight decay is zero."""
    hooks = [weight.register_hook(_without_zeros(weight)) for weight in weights]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def pruned(model: "PreTrainedModel") -> dict[str, Tensor]:
    """The weights of the linear layers with at least one zero, by the layer's name.

    A head that is the embedding's own tensor is no layer that was pruned.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items() if f"{name}.weight" not in tied}
    return {name: weight for name, weight in weights.items() if (weight == 0).any()}


def _without_zeros(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(weight == 0, 0)


_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class _Learner(Trainer):  # type: ignore[misc]
    """The Trainer with a loss that is right when batches are accumulated, and checkpoints of what is trained alone.

    batch   makes the inputs from the numbers of the rows, this process's share of them. The loader gives numbers alone, because it runs
            one batch ahead: what a model writes for a step is to be written by the weights of that step.
    """

    def __init__(self, loss: Loss, batch: Callable[[list[int]], Inputs], rows: list[Row], *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._loss, self._batch, self._rows = loss, batch, rows
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by all positions of a step; the Trainer must not divide again

    def get_train_dataloader(self) -> Any:
        """Batches of what all processes take together. Those that the Trainer deals out to them are filled up with repeated rows."""
        size = self.args.train_batch_size * self.args.world_size
        loader = DataLoader(self.train_dataset, size, sampler=self._get_train_sampler(), collate_fn=self.data_collator)
        return prepare_data_loader(loader, num_processes=1, process_index=0, use_seedable_sampler=True)

    def get_batch_samples(self, epoch_iterator: Iterator[list[int]], num_batches: int, device: Any) -> Any:
        return super().get_batch_samples(map(self._batch, epoch_iterator), num_batches, device)

    def compute_loss(self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        wanted, numbers = inputs.pop("labels"), inputs.pop("numbers")
        del inputs["shift_labels"]
        # gradients are averaged over processes, while the positions were counted over all
        loss = self._loss(model, Batch(inputs, wanted, numbers)) / num_items_in_batch * self.args.world_size
        if not loss.isfinite():
            ids = (self._rows[number][0].id for number in numbers)
            raise RunError(
                f"training: the loss became {loss.item()} in step {self.state.global_step + 1} of {self.state.max_steps}, on the examples"
                f" {', '.join(ids)}; learning_rate {self.args.learning_rate:g} may be too high for this model, lower it"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(saved[name])


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Tells the progress, and says when to write a checkpoint.

    folder   where checkpoints go, None for none
    """

    def __init__(self, context: Context, folder: Path | None, each_step: Step):
        self._context, self._folder, self._each_step = context, folder, each_step
        self._pause, self._last, self._begun = CHECKPOINT_SECONDS, time.monotonic(), 0.0
        self._shared, self._first = context.processes > 1, context.rank == 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._each_step(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._each_step(state.global_step, state.max_steps)
        self._context.progress("training", state.global_step, state.max_steps)
        if self._folder and state.global_step < state.max_steps and self._is_due(args.device):
            control.should_save, self._begun = True, time.monotonic()

    def _is_due(self, device: torch.device) -> bool:
        """Whether to write a checkpoint now. The first process's clock decides for all: each writes the state of its random numbers."""
        due = torch.tensor(time.monotonic() - self._last >= self._pause, device=device)
        if self._shared:
            broadcast(due, 0)
        return bool(due)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        assert self._folder
        made = self._folder / f"checkpoint-{state.global_step}"
        if self._shared:
            barrier()  # then all have written
        if self._first:
            (made / WHOLE).touch()
            for other in self._folder.glob("checkpoint-*"):
                if other != made:
                    shutil.rmtree(other)
        self._last = time.monotonic()
        self._pause = max(CHECKPOINT_SECONDS, (self._last - self._begun) / CHECKPOINT_SHARE)


def _learnable(model: "PreTrainedModel", rows: list[Row]) -> list[int]:
    """The numbers of the examples that say what to learn: for a decoder all, its texts are targets themselves; else those with a target."""
    if model.can_generate() and not model.config.is_encoder_decoder:
        return list(range(len(rows)))
    found = [number for number, (example, _, _) in enumerate(rows) if any(example.references[:1])]
    if not found:
        raise DataError(f"training: none of the {len(rows)} examples of the train split has a target; look at data.target")
    return found


@contextmanager
def _folder(context: Context) -> Iterator[Path]:
    if context.scratch:
        context.scratch.mkdir(parents=True, exist_ok=True)
        yield context.scratch
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; what a kill left half-written goes."""
    whole: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            whole[int(path.name.rsplit("-", 1)[-1])] = path
        else:
            shutil.rmtree(path)
    return str(whole[max(whole)]) if whole else None
