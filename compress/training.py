"""Training for every family: Hugging Face's Trainer over the calibration's batches, checkpoints that outlive a kill, zeros that stay."""

import inspect
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

from compress.architecture import context_length, label_number
from compress.calibration.stream import Inputs, Row, encoded, padded, without_cache
from compress.errors import DataError, RunError
from compress.methods import Context, EarlyStopping, Optimisation, TuneSettings
from compress.scores import rouge
from compress.writing import prompt_of, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKPOINT_SECONDS = 60.0  # what a kill costs at most, where a checkpoint is quickly written
CHECKPOINT_SHARE = 0.05  # the share of the time that checkpoints may take where it isn't
CURVE = 200  # points of the loss that are kept
LOOKS = 20  # at the validation split, where the recipe doesn't say how often
IGNORED = -100  # the label of a position that counts for nothing
WHOLE = "whole"  # the file that says that a checkpoint was written to its end
WEIGHTS = "trained.safetensors"
BEST = "best-"  # and the steps it took

Step = Callable[[int, int], None]  # steps done, all steps
Rewrite = Callable[[list[Row], int], list[Row]]  # the rows of a batch, steps done -> what is learned from in their place


@dataclass(frozen=True)
class Material:
    """The examples to learn from, and those of the validation split, that early stopping looks at."""

    train: list[Row]
    validation: list[Row]
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def rows(self) -> list[Row]:
        return [*self.train, *self.validation]


def read(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", context: Context) -> Material:
    """The examples that a context has. Raises what `calibration.stream.encoded` raises."""
    train = encoded(model, tokenizer, context)
    return Material(
        train, encoded(model, tokenizer, replace(context, examples=context.validation)) if context.validation else [], tokenizer
    )


@dataclass(frozen=True)
class Batch:
    """What a loss is worked out on.

    inputs   what the model is called with
    wanted   what each position of the logits should give, `IGNORED` where it counts for nothing; of a classifier one label an example
    numbers  the examples' places among the rows of the `Material`
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
    model: "PreTrainedModel", material: Material, how: Optimisation, seed: int, context: Context, loss: Loss = entropy, known: bool = True,
    each_step: Step = lambda done, steps: None, rewrite: Rewrite = lambda rows, done: rows, stopping: EarlyStopping | None = None,
) -> None:  # fmt: skip
    """Train what wants a gradient, in place; goes on from the last checkpoint in `context.scratch`, and ends as if it had never stopped.

    loss       is divided by the number of positions that count in all batches of a step, so accumulated batches are one larger batch
    known      whether the targets are needed; without, examples that have none are learned from too
    each_step  called before the first step, which after a kill is the one behind the checkpoint, and after each, before its checkpoint
    rewrite    called for each batch of the train split before its step; draws no numbers from the global generators, whose state a kill
               loses there
    stopping   looks at the validation split now and then, ends early and keeps the best weights

    The processes of `context` train together: what one alone would take as a batch of `batch_size` x processes they share.

    Raises DataError where there is too little to learn from, RunError where the loss is no longer a number and where not all processes are
    there.
    """
    rows, given = material.rows, range(len(material.train))
    learnable = _learnable(model, rows, given) if known else list(given)
    if not learnable:
        raise DataError(f"training: none of the {len(given)} examples of the train split has a target; look at data.target")
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
        made = batch_of(model, rewrite([rows[number] for number in numbers], learner.state.global_step), numbers, known)
        if not mine:  # of an epoch's last rows none may be left, and all have to take part
            made.wanted.fill_(IGNORED)
        # the Trainer counts shift_labels where it knows them
        return {**made.inputs, "labels": made.wanted, "shift_labels": made.wanted, "numbers": numbers}

    behind = range(len(given), len(rows))
    watched = (_learnable(model, rows, behind) if known else list(behind)) if stopping else []
    if stopping and not watched:
        raise DataError(
            f"early_stopping: the validation split gives nothing to learn from (of {len(behind)} examples); look at data.target"
        )

    def look() -> float:
        if stopping and stopping.metric == "rougeL":
            return _rouge(model, material, watched, how.batch_size)
        return _lost(model, rows, watched, how.batch_size, loss, known)

    on_gpu = model.device.type == "cuda"
    with _folder(context) as folder, without_cache(model):
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=how.batch_size, gradient_accumulation_steps=how.accumulate,
            learning_rate=how.learning_rate, lr_scheduler_type=_SCHEDULES[how.schedule], warmup_steps=round(how.warmup * steps),
            weight_decay=how.weight_decay, max_grad_norm=how.max_grad_norm, seed=seed,
            bf16=on_gpu and torch.cuda.is_bf16_supported(including_emulation=False), use_cpu=not on_gpu,
            remove_unused_columns=False, dataloader_pin_memory=False, include_num_input_tokens_seen="non_padding", save_strategy="no",
            logging_steps=max(1, steps // CURVE), logging_nan_inf_filter=False, report_to="none", disable_tqdm=True,
            eval_strategy="steps" if stopping else "no", eval_steps=stopping.every or max(1, steps // LOOKS) if stopping else None,
            metric_for_best_model="eval_validation", greater_is_better=stopping is not None and stopping.metric == "rougeL",
            ddp_find_unused_parameters=False,  # what a loss uses beside the model's own forward pass would pass for unused
        )  # fmt: skip
        if arguments.world_size != processes:
            raise RunError(f"training: {processes} processes were asked for, and {arguments.world_size} would train")
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # the model is on one of them; the Trainer would put copies on all
        watch = _Watch(context, folder if context.scratch else None, each_step)
        patience = stopping.patience if stopping else 0
        learner = _Learner(
            loss, batch, rows, look, patience, model, arguments, list, train_dataset=learnable, eval_dataset=watched or None,
            callbacks=[watch],
        )  # fmt: skip
        learner.remove_callback(PrinterCallback)
        with arguments.main_process_first(local=False):  # which removes what is half-written
            begun = _last_checkpoint(folder)
        learner.train(resume_from_checkpoint=begun)
        learner.accelerator.unwrap_model(learner.model_wrapped, keep_fp32_wrapper=False)  # 16 bits were for training
        if stopping:
            learner.take_best()
    model.zero_grad(set_to_none=True)
    model.eval()
    state = learner.state
    context.curve.extend(_point(entry) for entry in state.log_history if "loss" in entry or "eval_validation" in entry)
    curve = [entry["loss"] for entry in state.log_history if "loss" in entry]
    some = max(1, len(curve) // 10)
    first, last = (sum(part) / some for part in (curve[:some], curve[-some:]))
    among = f" in {processes} processes" if processes > 1 else ""
    context.say(
        f"trained {state.global_step:,} steps of {size} on {len(learnable):,} examples{among}, {state.num_input_tokens_seen:,} tokens read;"
        f" loss {first:.3g} to {last:.3g}"
    )
    if stopping:
        ended = f"; ended {steps - state.global_step:,} steps early" if state.global_step < steps else ""
        context.say(
            f"{stopping.metric} on {len(watched):,} examples of the validation split was best after {state.best_global_step:,} steps,"
            f" {state.best_metric:.4g}, and those weights were kept{ended}"
        )
    if lacking := len(given) - len(learnable):
        context.say(f"{lacking:,} of {len(given):,} examples have no target and were left out")


def train_all(
    model: "PreTrainedModel", material: Material, settings: TuneSettings, context: Context, loss: Loss = entropy, known: bool = True,
    rewrite: Rewrite = lambda rows, done: rows,
) -> None:  # fmt: skip
    """Train all weights in float32, in place, zeros kept where the settings say so; the rest is `train`'s."""
    model.requires_grad_(True)
    with in_float32(model), zeros_kept(pruned(model).values() if settings.keep_zeros else []):
        train(model, material, settings, settings.seed, context, loss, known, rewrite=rewrite, stopping=settings.early_stopping)


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


def batch_of(model: "PreTrainedModel", part: list[Row], numbers: list[int], known: bool) -> Batch:
    """Rows as a batch on the model's device."""
    inputs = padded(model, [(ids, answer) for _, ids, answer in part])
    return Batch(inputs, labels(model, inputs, part, known), numbers)


@torch.no_grad()
def _lost(model: "PreTrainedModel", rows: list[Row], numbers: list[int], size: int, loss: Loss, known: bool) -> float:
    """The loss a position over some of the rows."""
    total, count = 0.0, 0
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        batch = batch_of(model, [rows[number] for number in part], part, known)
        total, count = total + loss(model, batch).item(), count + int((batch.wanted != IGNORED).sum())
    return total / count


def _rouge(model: "PreTrainedModel", material: Material, numbers: list[int], size: int) -> float:
    """ROUGE-L in points of what a model writes greedily, as many tokens as the longest target has, over some of the rows."""
    rows = [material.rows[number] for number in sorted(numbers, key=lambda number: len(material.rows[number][1]))]
    longest, said = max(len(answer) for _, _, answer in rows), list[str]()
    room = context_length(model.config, material.tokenizer) or math.inf
    for start in range(0, len(rows), size):
        prompts = [prompt_of(model, row) for row in rows[start : start + size]]
        taken = 1 if model.config.is_encoder_decoder else max(map(len, prompts))
        found = write(model, prompts, max(1, int(min(longest, room - taken))), num_beams=1, temperature=None)
        said += [material.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found]
    scores = rouge(said, [example.references for example, _, _ in rows])["rougeL"]
    return sum(score for (score,) in scores) / len(scores)


def _point(entry: dict[str, Any]) -> dict[str, float | int | None]:
    """A point of the training's curve as the report keeps it; a figure that is no number is missing."""
    names = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "validation": "eval_validation"}
    figures = {name: entry.get(key) for name, key in names.items()}
    tokens = int(entry["num_input_tokens_seen"]) if "num_input_tokens_seen" in entry else None
    return {"step": entry["step"], "tokens": tokens, **{n: v if v is not None and math.isfinite(v) else None for n, v in figures.items()}}


class _Learner(Trainer):  # type: ignore[misc]
    """The Trainer with a loss that is right when batches are accumulated, and checkpoints of what is trained alone.

    look      says how the model does on the validation split
    patience  looks without a better value after which training ends
    batch     makes the inputs from the numbers of the rows, this process's share of them. The loader gives numbers alone, because it runs
              one batch ahead: what a model writes for a step is to be written by the weights of that step.
    """

    def __init__(
        self, loss: Loss, batch: Callable[[list[int]], Inputs], rows: list[Row], look: Callable[[], float], patience: int,
        *given: Any, **named: Any,
    ):  # fmt: skip
        super().__init__(*given, **named)
        self._loss, self._batch, self._rows, self._look, self._patience = loss, batch, rows, look, patience
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

    def evaluate(self, *given: Any, **named: Any) -> dict[str, float]:
        self.model.eval()
        value = torch.tensor(self._look() if self.is_world_process_zero() else 0.0, dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            broadcast(value, 0)
        found = {"eval_validation": value.item()}
        self.log(found)
        self.control.should_evaluate = False
        return found

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = bool(super()._determine_best_metric(metrics, trial))
        if better:
            self.state.best_global_step = self.state.global_step
            if self.is_world_process_zero():
                self._save(str(self._best()))
        elif self.state.global_step - (self.state.best_global_step or 0) >= self._patience * self.args.eval_steps:
            self.control.should_training_stop = True
        return better

    def _best(self) -> Path:
        """Where the weights are that the validation split liked best."""
        return Path(self.args.output_dir) / f"{BEST}{self.state.best_global_step}"

    def take_best(self) -> None:
        if self.args.world_size > 1:
            barrier()  # then the first has written them
        self._load_from_checkpoint(str(self._best()))

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
        self._since, self._loss = (0.0, 0), ""
        self._shared, self._first = context.processes > 1, context.rank == 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._since = time.monotonic(), state.num_input_tokens_seen
        self._each_step(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._each_step(state.global_step, state.max_steps)
        seconds, tokens = time.monotonic() - self._since[0], state.num_input_tokens_seen - self._since[1]
        told = f"training; {self._loss}{tokens / seconds:,.0f} tokens/s"
        self._context.progress(told, state.global_step, state.max_steps)
        if self._folder and state.global_step < state.max_steps and self._is_due(args.device):
            control.should_save, self._begun = True, time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if "loss" in state.log_history[-1]:
            self._loss = f"loss {state.log_history[-1]['loss']:.3g}, "

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
            needed = {made, self._folder / f"{BEST}{state.best_global_step}"}
            for other in [*self._folder.glob("checkpoint-*"), *self._folder.glob(f"{BEST}*")]:
                if other not in needed:
                    shutil.rmtree(other)
        self._last = time.monotonic()
        self._pause = max(CHECKPOINT_SECONDS, (self._last - self._begun) / CHECKPOINT_SHARE)


def _learnable(model: "PreTrainedModel", rows: list[Row], numbers: Iterable[int]) -> list[int]:
    """Of these examples those that say what to learn: for a decoder all, its texts are targets themselves; else those with a target."""
    if model.can_generate() and not model.config.is_encoder_decoder:
        return list(numbers)
    return [number for number in numbers if any(rows[number][0].references[:1])]


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
