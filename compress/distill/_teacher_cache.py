"""The teacher's distribution at each position, worked out once and kept on disk for every run that learns from it.

Of each position that counts two things are kept. The k likeliest tokens, with their logits less the largest (float16). And for each of
some temperatures the logarithm of the mass of all other tokens (float32). So at these temperatures the distribution over k tokens and "any
other" is the teacher's own; at another it could not be told from k logits.

A folder for each teacher, in it a file for some hundred examples, named by their tokens.
"""

import itertools
import os
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.calibration.stream import Row, without_cache
from compress.distill import _pair
from compress.errors import ModelError, NoSpace, is_disk_full
from compress.model.folder import tensor_headers
from compress.model.source import fingerprint
from compress.recipe import digest
from compress.training.material import IGNORED, Material, batch_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.methods import Context
    from compress.model.loading import Bundle

T = TypeVar("T")
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0)  # one that a recipe asks for besides makes a folder of its own
FORMAT = 1  # a file of another would be taken for one of this
FILE_ROWS = 256  # examples of one file, which is what a kill costs at most
BATCH_ROWS = 8
LEAST = -6e4  # float16 ends at -65504; the mass of such a token is nothing at any temperature


@dataclass(frozen=True)
class Asked:
    """What is kept of a position: `top_k` of the first `size` tokens, and the mass of the others at each of `temperatures`."""

    top_k: int
    size: int
    temperatures: tuple[float, ...]


class TeacherCache:
    """The teacher's distributions by the examples' numbers, read from files as they are needed."""

    def __init__(self, folder: Path, parts: list[list[Row]], asked: Asked):
        self.asked, self._open = asked, dict[Path, tuple[Any, list[int]]]()
        self.files = [folder / f"{digest([(ids, answer) for _, ids, answer in part])}.safetensors" for part in parts]
        self._places = [(file, place) for file, part in zip(self.files, parts, strict=True) for place in range(len(part))]

    def of(self, numbers: list[int], temperature: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of all positions of the examples in turn: tokens (positions, k), log-probabilities of these and any other (positions, k + 1)."""
        parts = [self._read(*self._places[number]) for number in numbers]
        tokens, logits, others = (torch.cat(part).to(device) for part in zip(*parts, strict=True))
        other = others[:, self.asked.temperatures.index(temperature), None]
        return tokens.long(), torch.cat([logits.float() / temperature, other], dim=-1).log_softmax(dim=-1)

    def size(self) -> tuple[int, int]:
        """Positions, and bytes on disk."""
        return sum(self._file(file)[1][-1] for file in self.files), sum(file.stat().st_size for file in set(self.files))

    def _file(self, file: Path) -> tuple[Any, list[int]]:
        if file not in self._open:
            handle: Any = safe_open(file, "pt")
            self._open[file] = handle, handle.get_tensor("starts").tolist()
        return self._open[file]

    def _read(self, file: Path, place: int) -> tuple[Tensor, Tensor, Tensor]:
        handle, starts = self._file(file)
        tokens, logits, others = (handle.get_slice(name)[starts[place] : starts[place + 1]] for name in ("tokens", "logits", "others"))
        return tokens, logits, others


def teacher_cache(
    teacher: "Bundle", student: "PreTrainedModel", material: Material, top_k: int, temperature: float, context: "Context"
) -> TeacherCache:
    """The teacher's distributions on the material, read from `context.cache`; the teacher is loaded only where a file is missing.

    Several runs may fill the same folder at once: each writes the missing files in an order of its own and skips those that it finds there.

    material   by the student's tokenizer, whose ids mean the same to the teacher

    Raises ModelError where `top_k` leaves no other token, NoSpace where the disk is too full.
    """
    size = min(config.get_text_config().vocab_size for config in (teacher.config, student.config))
    if not student.can_generate():
        raise ModelError("top_k: is for models that write, whose vocabulary is large; a classifier has few labels, leave it out")
    if top_k >= size:
        raise ModelError(
            f"top_k: {top_k} of a vocabulary of {size} leaves no other token; leave top_k out, and the teacher runs at every step"
        )
    asked = Asked(top_k, size, TEMPERATURES if temperature in TEMPERATURES else (*TEMPERATURES, temperature))
    assert context.cache, "a place to keep it is given by whoever runs a stage"
    folder = context.cache / f"logits-{digest([FORMAT, fingerprint(teacher.source), asdict(asked)])}"
    folder.mkdir(parents=True, exist_ok=True)
    split = [part for rows in (material.train, material.validation) for part in _parts(rows, FILE_ROWS)]
    cache = TeacherCache(folder, split, asked)
    lacking = {file: part for file, part in zip(cache.files, split, strict=True) if not _is_whole(file)}
    if lacking:
        unkept = replace(teacher)  # the loaded teacher goes with it when all is filled
        _fill(lacking, asked, _pair.frozen(unkept), student, context)
    positions, nbytes = cache.size()
    context.say(
        f"the teacher's {top_k} likeliest tokens at {positions:,} positions are kept in {folder.name}: {nbytes / 2**20:.1f} MiB,"
        f" {nbytes / positions:.0f} bytes a token"
    )
    return cache


def _parts(entries: list[T], size: int) -> list[list[T]]:
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def _is_whole(file: Path) -> bool:
    """Whether a file is there and whole; a damaged one is deleted."""
    try:
        list(tensor_headers(file))
    except ModelError:
        file.unlink(missing_ok=True)
        return False
    return True


def _fill(lacking: dict[Path, list[Row]], asked: Asked, teacher: "PreTrainedModel", student: "PreTrainedModel", context: "Context") -> None:
    order = list(lacking)
    random.Random(os.getpid()).shuffle(order)  # runs that begin together share the work
    with without_cache(teacher):
        for done, file in enumerate(order):
            context.progress("the teacher's logits", done, len(order))
            if file.exists():  # another run made it meanwhile
                continue
            told = _told(lacking[file], asked, teacher, student)
            partial = (context.scratch or file.parent) / f".{file.name}.{os.getpid()}.partial"
            partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(told, partial)
                _look_for_room(partial, len(order) - done, file.parent, asked)
                partial.replace(file)
            except Exception as error:
                partial.unlink(missing_ok=True)
                if not is_disk_full(error):
                    raise
                raise NoSpace(
                    f"the disk filled while the teacher's logits were written to {file.parent}; {done} of {len(order)} files were made"
                    f" and stay; free some space, or lower top_k, which is {asked.top_k}"
                ) from None
    context.progress("the teacher's logits", len(order), len(order))


def _look_for_room(file: Path, files: int, folder: Path, asked: Asked) -> None:
    """Raises NoSpace at the first file, not after hours, where the disk has no room for all of that size."""
    needed, free = file.stat().st_size * (files - 1), shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpace(
            f"the teacher's logits will take about {needed / 2**20:,.0f} MiB more, and {folder} has {free / 2**20:,.0f} MiB free;"
            f" free some space, or lower top_k, which is {asked.top_k}"
        )


@torch.no_grad()
def _told(rows: list[Row], asked: Asked, teacher: "PreTrainedModel", student: "PreTrainedModel") -> dict[str, Tensor]:
    """The teacher's distributions on some rows; rows of about the same length go through it together."""
    answers: dict[int, tuple[Tensor, ...]] = {}
    for part in _parts(sorted(range(len(rows)), key=lambda number: len(rows[number][1])), BATCH_ROWS):
        batch = batch_of(student, [rows[number] for number in part], part, needs_targets=True)
        logits = batch.logits_of(teacher)[:, : asked.size]
        logits = logits - logits.max(dim=-1, keepdim=True).values
        top = logits.topk(asked.top_k, dim=-1)
        rest = logits.scatter(-1, top.indices, -torch.inf)
        others = torch.stack([(rest / temperature).logsumexp(dim=-1) for temperature in asked.temperatures], dim=-1)
        tokens = top.indices.to(torch.uint16 if asked.size <= 2**16 else torch.int32)
        counts = (batch.labels != IGNORED).sum(dim=-1).tolist()
        kept = [torch.split(tensor.cpu(), counts) for tensor in (tokens, top.values.clamp(min=LEAST).half(), others.clamp(min=LEAST))]
        answers.update(zip(part, zip(*kept, strict=True), strict=True))
    tokens, values, others = (torch.cat([answers[number][kind] for number in range(len(rows))]) for kind in range(3))
    starts = [0, *itertools.accumulate(len(answers[number][0]) for number in range(len(rows)))]
    return {"tokens": tokens, "logits": values, "others": others, "starts": torch.tensor(starts)}
