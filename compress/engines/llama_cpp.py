"""llama.cpp (Gerganov 2023): decoders on CPUs, in floats or with weights in blocks of 4 to 8 bits, whose inputs it rounds to 8 bits.

It comes in the package xllamacpp, whose own server takes texts and tells no likelihoods. So the C functions of its library are called, as
`llama.h` declares them. Their structures are checked against the library's defaults before any is used. Flash attention is off, nothing is
kept from one call to the next, and keys and values have the type that the setting `cache` names.
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char, c_char_p, c_float, c_int, c_int32, c_uint32, c_uint64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress import decoding, exports
from compress.engines import About, Engine, Opening, Piece, Traits, Weights, Written, batched
from compress.errors import ModelError
from compress.methods import Settings as _Settings
from compress.model.loading import load_tokenizer, read_config
from compress.model.source import settings
from compress.phases import phase
from compress.process import Progress
from compress.recipe import Generation
from compress.scores import Likelihood
from compress.structure import context_length

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compress.model.source import Source

ABOUT = About(
    reads="what `export: gguf` writes",
    opens="gguf",
    tasks=("causal-lm",),
    devices=("cpu",),
    packages=("xllamacpp",),
    extra="llama_cpp",
)
FILE = "model.gguf"
TOKENS, SEQUENCES = 4096, 64  # of a batch of examples: tokens by default, and sequences at most
PAGE = 256  # tokens; the engine rounds a cache up to a multiple
AT_ONCE = 256  # tokens whose logits are held together while a text is read
CACHES = {"f32": 0, "f16": 1}  # as ggml numbers them
TRIED = "install xllamacpp 2026.10.11549, which works"
ERROR = 4  # of a message, as ggml numbers its levels


class Settings(_Settings):
    cache: Literal["f16", "f32"] = Field("f16", description="what keys and values are kept in")


class _ModelParams(ctypes.Structure):
    _fields_ = (("devices", c_void_p), ("overrides", c_void_p), ("n_gpu_layers", c_int32), ("others", c_char * 236))


class _ContextParams(ctypes.Structure):
    """The fields that matter here. What follows them is passed back as it came; `others` has room for more than there is."""

    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32), ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32), ("n_threads", c_int32), ("n_threads_batch", c_int32),
        ("ctx_type", c_int), ("rope_scaling", c_int), ("pooling", c_int), ("attention", c_int), ("flash_attention", c_int),
        ("rope", c_float * 6), ("yarn_orig_ctx", c_uint32), ("defrag", c_float), ("on_eval", c_void_p), ("on_eval_data", c_void_p),
        ("type_k", c_int), ("type_v", c_int), ("others", c_char * 400),
    )  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32), ("token", c_void_p), ("embd", c_void_p), ("pos", c_void_p), ("n_seq_id", c_void_p), ("seq_id", c_void_p),
        ("logits", c_void_p),
    )  # fmt: skip


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_model_size": (c_uint64, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_free": (None, [c_void_p]),
}
# the defaults of a context in the library: sizes, choices left to it, a threshold, keys and values in float16
DEFAULTS = (512, 2048, 512, 1, -1, -1, -1.0, CACHES["f16"], CACHES["f16"])
_errors: list[str] = []  # its messages; the first says what is wrong, the others what follows from it


def _hear(level: int, message: bytes, _: int | None) -> None:
    if level == ERROR:
        _errors.append(message.decode(errors="replace").strip())


def _complaint() -> str:
    """The first error message since the last call; the others are dropped."""
    first = next(iter(_errors), "it doesn't say why")
    _errors.clear()
    return first


_listener = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(_hear)  # which must live as long as the library


@cache
def library() -> ctypes.CDLL:
    """llama.cpp's functions. Raises ModelError for an xllamacpp that lacks one or has other structures."""
    spec = find_spec("xllamacpp.xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    native = ctypes.CDLL(spec.origin)
    for name, (result, arguments) in SIGNATURES.items():
        try:
            function = getattr(native, name)
        except AttributeError:
            raise ModelError(f"engine: llama_cpp: this xllamacpp has no {name}; {TRIED}") from None
        function.restype, function.argtypes = result, arguments
    native.llama_log_set(_listener, None)
    native.llama_backend_init()
    p = native.llama_context_default_params()
    if (p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max, p.rope_scaling, p.flash_attention, p.defrag, p.type_k, p.type_v) != DEFAULTS:
        raise ModelError(f"engine: llama_cpp: this xllamacpp has structures that aren't known here; {TRIED}")
    return native


def make(opening: Opening, batch_tokens: int | None = None) -> Engine:
    return LlamaCpp(opening, batch_tokens)


class LlamaCpp(Engine):
    """A model as llama.cpp runs it."""

    def __init__(self, opening: Opening, batch_tokens: int | None):
        self._library = library()
        self._opening, self._most = opening, batch_tokens or TOKENS
        self._folder, self._config = Path(opening.source.id), read_config(opening.source)
        self._generation = settings(opening.source, decoding.FILE)
        self.tokenizer = load_tokenizer(opening.source)
        self._context, self._shape = None, (0, 0)

    def open(self) -> None:
        export = exports.require(self._folder, "gguf", "llama_cpp")
        model_params = self._library.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = self._library.llama_model_load_from_file(str(self._folder / FILE).encode(), model_params)
        if not self._model:
            raise ModelError(f"engine: llama_cpp: {self._folder / FILE}: {_complaint()}")
        self._parameters = export.parameters
        self._vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))
        self.traits = Traits(
            dtype=export.weights, context=context_length(self._config, self.tokenizer), vocabulary=self._vocabulary, encodes=False,
            generates=True, ends=decoding.ends(self._generation, self._config.eos_token_id, self.tokenizer.pad_token_id),
        )  # fmt: skip
        self.run([[min(10, self._vocabulary - 1)] * 4], 2, lambda: None)

    def weights(self) -> Weights:
        """As in its file. Blocks that are rearranged for the CPU take as many bytes."""
        return Weights(self._library.llama_model_size(self._model), 0, self._parameters)

    def run(self, prepared: list[list[int]], new_tokens: int, watch: Callable[[], None]) -> None:
        self._search(prepared, new_tokens, frozenset(), watch)

    def write(self, prompts: list[list[int]], generation: Generation, progress: Progress) -> Written:
        decoding.followed("llama_cpp", self._generation, generation, ())
        tokens: list[list[int]] = [[] for _ in prompts]
        with phase("generating"):
            for batch in batched([len(prompt) + generation.max_new_tokens for prompt in prompts], self._most, progress, "generating"):
                for few in (batch[first : first + SEQUENCES] for first in range(0, len(batch), SEQUENCES)):
                    rows = self._search([prompts[row] for row in few], generation.max_new_tokens, self.traits.ends, lambda: None)
                    for row, answer in zip(few, rows, strict=True):
                        tokens[row] = answer
        return Written(tokens)

    def read(self, pieces: list[Piece], progress: Progress, original: "Source | None" = None) -> list[Likelihood]:
        longest, likelihoods = max((len(piece.ids) for piece in pieces), default=0), []
        for number, piece in enumerate(pieces):
            progress("reading", number, len(pieces))
            self._begin(1, longest)
            nats, following = 0.0, [*piece.labels[1:], -100]
            for first in range(0, len(piece.ids), AT_ONCE):
                labels = following[first : first + AT_ONCE]
                tokens = zip(piece.ids[first : first + AT_ONCE], labels, strict=True)
                logits = self._decode([(token, first + place, 0, label >= 0) for place, (token, label) in enumerate(tokens)])
                nats += sum(_nats(row, label) for row, label in zip(logits, (label for label in labels if label >= 0), strict=True))
            likelihoods.append(Likelihood(nats, sum(label >= 0 for label in following), 0.0, 0.0, 0.0))
        progress("reading", len(pieces), len(pieces))
        return likelihoods

    def _search(self, prompts: list[list[int]], new_tokens: int, ends: frozenset[int], watch: Callable[[], None]) -> list[list[int]]:
        """The likeliest tokens one after the other, up to one that ends a text; `watch` is called after each step."""
        self._begin(len(prompts), max(map(len, prompts)) + new_tokens)
        written: list[list[int]] = [[] for _ in prompts]
        rows = [(token, place, row, place == len(prompt) - 1) for row, prompt in enumerate(prompts) for place, token in enumerate(prompt)]
        for _ in range(new_tokens):
            live = [row for _, _, row, needs_logits in rows if needs_logits]
            best = self._decode(rows).argmax(axis=1).tolist()
            watch()
            going = [(token, row) for token, row in zip(best, live, strict=True) if token not in ends]
            for token, row in going:
                written[row].append(token)
            rows = [(token, len(prompts[row]) + len(written[row]) - 1, row, True) for token, row in going]
            if not rows:
                break
        return written

    def _begin(self, sequences: int, tokens: int) -> None:
        """Empty the cache, for `sequences` of `tokens` each; a new one is made only where the last had another size."""
        shape = (sequences, -(-tokens // PAGE) * PAGE)
        if self._context is not None and shape == self._shape:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)
            return
        if self._context is not None:
            self._library.llama_free(self._context)
        context_params, own = self._library.llama_context_default_params(), self._opening.settings
        assert isinstance(own, Settings)
        context_params.n_ctx = context_params.n_batch = shape[0] * shape[1]
        context_params.n_seq_max = sequences
        context_params.n_threads = context_params.n_threads_batch = self._opening.threads
        context_params.flash_attention, context_params.type_k, context_params.type_v = 0, CACHES[own.cache], CACHES[own.cache]
        self._context, self._shape = self._library.llama_init_from_model(self._model, context_params), shape
        if not self._context:
            self._context = None
            raise ModelError(f"engine: llama_cpp: no cache for {sequences} x {shape[1]:,} tokens: {_complaint()}; take fewer")

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> "NDArray[np.float32]":
        """Logits, float32 (tokens that need them, vocabulary), which hold until the next call.

        rows   of each token: the token, its position, its sequence, whether it needs logits
        """
        import numpy as np

        tokens, positions, sequences = (np.array(column, np.int32) for column in list(zip(*rows, strict=True))[:3])
        needs_logits, ones = np.array([row[3] for row in rows], np.int8), np.ones(len(rows), np.int32)
        places = sequences.ctypes.data + sequences.itemsize * np.arange(len(rows), dtype=np.uint64)  # of each token's list of one sequence
        at = [array.ctypes.data for array in (tokens, positions, ones, places, needs_logits)]
        if code := self._library.llama_decode(self._context, _Batch(len(rows), at[0], None, *at[1:])):
            raise ModelError(f"engine: llama_cpp: it stopped with {code}: {_complaint()}")
        if not needs_logits.any():
            return np.empty((0, self._vocabulary), np.float32)
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (int(needs_logits.sum()), self._vocabulary))


def _nats(logits: "NDArray[np.float32]", token: int) -> float:
    """Minus the log of a token's probability, of logits (vocabulary,)."""
    import numpy as np

    wide = logits.astype(np.float64)
    wide -= wide.max()
    return float(np.log(np.exp(wide).sum()) - wide[token])
