"""How many examples a model reads at once: as many tokens as memory holds, and half as many where it runs out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch

from compress.errors import is_out_of_memory
from compress.process import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Work = Callable[[list[int]], None]  # what is done with a batch of indices
SHARE = 0.4  # of free memory; the other side may be loaded beside this one, and kernels want room of their own
CALL = 50  # tokens that a CPU reads in the time that a call takes for the weights alone
READ, WRITTEN = 4096, 16384  # tokens; larger batches are no faster on a CPU (reports/quality), whose memory all share


class Batches:
    """Batches of about equally long rows, longest first, so that memory runs out at once or not at all.

    tokens   what a batch may hold, with its padding and the tokens to be written; None takes what fits into free memory. Where memory runs
             out it is set to half of the batch for good
    halved   how often memory ran out
    """

    def __init__(self, model: "PreTrainedModel", tokens: int | None, progress: Progress):
        self._model, self.tokens, self.halved, self._progress = model, tokens, 0, progress
        self._calls = 0  # of the model that a batch takes besides its first
        self._at, self._share = ("", 0, 0, 0), 0.0  # the step, rows done before this batch, its rows, all rows; its share done

    def each(self, lengths: list[int], work: Work, what: str, most_on_cpu: int = READ) -> None:
        """Do all rows, whose tokens `lengths` has. A row that is longer than a batch has one to itself.

        most_on_cpu   the most tokens of a batch on a CPU

        Raises what `work` raised where memory runs out on a single row.
        """
        waiting = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        fit = self.tokens or _fitting(self._model, max(lengths), most_on_cpu)
        while waiting:
            longest = lengths[waiting[0]]
            batch = waiting[: max(1, (self.tokens or fit) // longest)]
            if self.tokens is None and self._model.device.type == "cpu":  # where padding costs what tokens cost
                alike = [row for row in batch if 2 * lengths[row] >= longest]
                saved = sum(longest - lengths[row] for row in batch[len(alike) :])
                if len(batch) < len(waiting) or saved > CALL * self._calls:  # else the others go along
                    batch = alike
            self._at = (what, len(lengths) - len(waiting), len(batch), len(lengths))
            self._share = 0.0
            self._tell(0.0)
            if self._has_room(work, batch):
                waiting = waiting[len(batch) :]
            else:
                self.tokens = max(1, len(batch) // 2) * longest
                self.halved += 1
        self._progress(what, len(lengths), len(lengths))

    @contextmanager
    def stepwise(self, steps: int) -> Iterator[None]:
        """Within it a batch takes about `steps` calls of the model, and each counts as progress."""
        handle, self._calls = self._model.register_forward_hook(lambda *_: self._tell(1 / steps)), steps - 1
        try:
            yield
        finally:
            handle.remove()
            self._calls = 0

    def _tell(self, share: float) -> None:
        """Report that a further `share` of the current batch is done, in rows."""
        self._share = min(1.0, self._share + share)
        what, before, rows, total = self._at
        self._progress(what, before + int(self._share * rows), total)

    @staticmethod
    def _has_room(work: Work, batch: list[int]) -> bool:
        try:
            work(batch)
            return True
        except Exception as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # not while the error is held, whose traceback holds the tensors
        return False


def _fitting(model: "PreTrainedModel", longest: int, most_on_cpu: int) -> int:
    """How many tokens a batch may hold in free memory, by the model's sizes; `longest` is the length of the longest row.

    A token takes its keys and values in every block, twice in an encoder-decoder. It takes what one block computes of it, and its attention
    to all others. And it takes its logits three times: as stored, in float32 and as likelihoods.
    """
    config = model.config.get_text_config()
    width, blocks = config.hidden_size, config.num_hidden_layers + (getattr(config, "num_decoder_layers", None) or 0)
    inner = max(getattr(config, name, None) or 0 for name in ("intermediate_size", "d_ff", "encoder_ffn_dim", "n_inner")) or 4 * width
    cache = 2 * blocks * width * (2 if config.is_encoder_decoder else 1)
    numbers = cache + 8 * width + 3 * inner + 2 * config.num_attention_heads * longest
    logits = 12 * config.vocab_size if model.can_generate() else 0
    tokens: int = int(SHARE * _free(model.device)) // (numbers * model.dtype.itemsize + logits)
    return max(1, tokens if model.device.type == "cuda" else min(tokens, most_on_cpu))


def _free(device: torch.device) -> int:
    """Free bytes; on a GPU also those that torch holds and doesn't use."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    held: int = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held
