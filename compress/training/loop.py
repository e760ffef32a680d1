"""Training for every family: the trainer set up and run, and what the report gets of it."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerState, TrainingArguments

from compress.calibration.stream import Inputs, Row, without_cache
from compress.errors import DataError, RunError
from compress.methods import Context, EarlyStopping, Optimisation, TuneSettings
from compress.training.learner import Learner, Step, Watch, last_checkpoint
from compress.training.material import IGNORED, Loss, Material, batch_of, targets_loss
from compress.training.sharded import ShardedLearner, is_split, split_in_float32, zeros_kept_in_parts
from compress.training.validation import lost, rouge_of
from compress.training.weights import in_float32, pruned, zeros_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CURVE = 200  # points of the loss that are kept
LOOKS = 20  # at the validation split, where the recipe doesn't say how often
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}

Rewrite = Callable[[list[Row], int], list[Row]]  # the rows of a batch, steps done -> what is learned from in their place


def train(
    model: "PreTrainedModel", material: Material, how: Optimisation, seed: int, context: Context, loss: Loss = targets_loss,
    needs_targets: bool = True, each_step: Step = lambda done, steps: None, rewrite: Rewrite = lambda rows, done: rows,
    stopping: EarlyStopping | None = None,
) -> None:  # fmt: skip
    """Train every parameter that requires a gradient, in place.

    Goes on from the last checkpoint in `context.scratch`, and ends as if it had never stopped.

    loss           is divided by the number of positions that count in all batches of a step: accumulated batches are one larger batch.
    needs_targets  whether the loss needs targets. Without them examples that have none are learned from too.
    each_step      called before the first step, which after a kill is the one behind the checkpoint, and after each, before its checkpoint.
    rewrite        called for each batch of the train split before its step. It draws no numbers from the global generators, whose state a
                   kill loses there.
    stopping       looks at the validation split now and then, ends early and keeps the best weights.

    The processes of `context` train together: they share what a single one would take as a batch of `batch_size` x processes.

    Raises DataError where there is too little to learn from. Raises RunError where the loss is no longer a number, and where not all
    processes are there.
    """
    rows, train_numbers = material.rows, range(len(material.train))
    learnable = _learnable(model, rows, train_numbers, needs_targets)
    if not learnable:
        raise DataError(f"training: none of the {len(train_numbers)} examples of the train split has a target; look at data.target")
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
        padded_batch = batch_of(model, rewrite([rows[number] for number in numbers], learner.state.global_step), numbers, needs_targets)
        if not mine:  # no row of an epoch's last may be left for this process, and all have to take part
            padded_batch.labels.fill_(IGNORED)
        # the Trainer counts shift_labels where it knows them
        return {**padded_batch.inputs, "labels": padded_batch.labels, "shift_labels": padded_batch.labels, "numbers": numbers}

    validation_numbers = range(len(train_numbers), len(rows))
    watched = _learnable(model, rows, validation_numbers, needs_targets) if stopping else []
    if stopping and not watched:
        raise DataError(
            f"early_stopping: the validation split gives nothing to learn from (of {len(validation_numbers)} examples); look at data.target"
        )

    def look() -> float:
        if stopping and stopping.metric == "rougeL":
            return rouge_of(model, material, watched, how.batch_size)
        return lost(model, rows, watched, how.batch_size, loss, needs_targets)

    with _folder(context) as folder, without_cache(model):
        arguments = _arguments(how, seed, steps, folder, model.device.type == "cuda", stopping)
        if arguments.world_size != processes:
            raise RunError(f"training: {processes} processes were asked for, and {arguments.world_size} would train")
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # the model is on one of them; the Trainer would put copies on all
        watch = Watch(context, folder if context.scratch else None, each_step)
        patience = stopping.patience if stopping else 0
        learner = (ShardedLearner if is_split(model) else Learner)(
            loss, batch, rows, look, patience, model, arguments, data_collator=list, train_dataset=learnable,
            eval_dataset=watched or None, callbacks=[watch],
        )  # fmt: skip
        learner.remove_callback(PrinterCallback)
        with arguments.main_process_first(local=False):  # which removes what is half-written
            checkpoint = last_checkpoint(folder)
        learner.train(resume_from_checkpoint=checkpoint)
        learner.accelerator.unwrap_model(learner.model_wrapped, keep_fp32_wrapper=False)  # 16 bits were for training
        if stopping:
            learner.take_best()
    model.zero_grad(set_to_none=True)
    model.eval()
    _tell(context, learner.state, f"{size} on {len(learnable):,} examples{f' in {processes} processes' if processes > 1 else ''}")
    if stopping:
        _tell_best(context, learner.state, f"{stopping.metric} on {len(watched):,} examples of the validation split")
    if lacking := len(train_numbers) - len(learnable):
        context.say(f"{lacking:,} of {len(train_numbers):,} examples have no target and were left out")


def _arguments(how: Optimisation, seed: int, steps: int, folder: Path, on_gpu: bool, stopping: EarlyStopping | None) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=how.batch_size, gradient_accumulation_steps=how.accumulate,
        learning_rate=how.learning_rate, lr_scheduler_type=SCHEDULES[how.schedule], warmup_steps=round(how.warmup * steps),
        weight_decay=how.weight_decay, max_grad_norm=how.max_grad_norm, seed=seed,
        bf16=on_gpu and torch.cuda.is_bf16_supported(including_emulation=False), use_cpu=not on_gpu,
        remove_unused_columns=False, dataloader_pin_memory=False, include_num_input_tokens_seen="non_padding", save_strategy="no",
        logging_steps=max(1, steps // CURVE), logging_nan_inf_filter=False, report_to="none", disable_tqdm=True,
        eval_strategy="steps" if stopping else "no", eval_steps=stopping.every or max(1, steps // LOOKS) if stopping else None,
        metric_for_best_model="eval_validation", greater_is_better=stopping is not None and stopping.metric == "rougeL",
        ddp_find_unused_parameters=False,  # what a loss uses beside the model's own forward pass would pass for unused
    )  # fmt: skip


def _tell(context: Context, state: TrainerState, of_what: str) -> None:
    """The curve, and the training in a sentence."""
    context.curve.extend(_point(entry) for entry in state.log_history if "loss" in entry or "eval_validation" in entry)
    curve = [entry["loss"] for entry in state.log_history if "loss" in entry]
    some = max(1, len(curve) // 10)
    first, last = (sum(part) / some for part in (curve[:some], curve[-some:]))
    context.say(
        f"trained {state.global_step:,} steps of {of_what}, {state.num_input_tokens_seen:,} tokens read; loss {first:.3g} to {last:.3g}"
    )


def _tell_best(context: Context, state: TrainerState, what: str) -> None:
    early = state.max_steps - state.global_step
    ended = f"; ended {early:,} steps early" if early else ""
    context.say(f"{what} was best after {state.best_global_step:,} steps, {state.best_metric:.4g}, and those weights were kept{ended}")


def train_all(
    model: "PreTrainedModel", material: Material, settings: TuneSettings, context: Context, loss: Loss = targets_loss,
    needs_targets: bool = True, rewrite: Rewrite = lambda rows, done: rows,
) -> None:  # fmt: skip
    """Train all weights in float32, in place, as `train` does. Zeros are kept and the model is split where the settings say so.

    Raises what `train` and `split` raise.
    """
    model.requires_grad_(True)
    kept = pruned(model) if settings.keep_zeros else {}
    if settings.sharded():
        with split_in_float32(model, context) as parts, zeros_kept_in_parts(parts.get_submodule(name).weight for name in kept):
            train(parts, material, settings, settings.seed, context, loss, needs_targets, rewrite=rewrite, stopping=settings.early_stopping)
            context.say(f"weights, gradients and optimiser states were split over {context.processes} processes")
        return
    with in_float32(model), zeros_kept(kept.values()):
        train(model, material, settings, settings.seed, context, loss, needs_targets, rewrite=rewrite, stopping=settings.early_stopping)


def _learnable(model: "PreTrainedModel", rows: list[Row], numbers: Iterable[int], needs_targets: bool) -> list[int]:
    """Those of these examples that can be learned from: for a decoder all, since any text is a target; else those with a target.

    needs_targets   whether the loss needs targets; without them all will do
    """
    if not needs_targets or (model.can_generate() and not model.config.is_encoder_decoder):
        return list(numbers)
    return [number for number in numbers if any(rows[number][0].references[:1])]


@contextmanager
def _folder(context: Context) -> Iterator[Path]:
    if context.scratch:
        context.scratch.mkdir(parents=True, exist_ok=True)
        yield context.scratch
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _point(entry: dict[str, Any]) -> dict[str, float | int | None]:
    """A point of the training curve as the report keeps it; None for a figure that is not finite."""
    names = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "validation": "eval_validation"}
    figures = {name: entry.get(key) for name, key in names.items()}
    tokens = int(entry["num_input_tokens_seen"]) if "num_input_tokens_seen" in entry else None
    return {"step": entry["step"], "tokens": tokens, **{n: v if v is not None and math.isfinite(v) else None for n, v in figures.items()}}
