"""A model in memory, by transformers: loading it, saving it, counting its weights."""

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import ao, bnb
from compress.errors import DataError, ModelError, first_line
from compress.model.folder import BROUGHT, stored_dtypes, weight_files, weight_files_beside
from compress.model.source import Source, settings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

AUTO = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}
PACKED_READER = (5, 23)  # the first transformers that reads packed weights of encoder-decoders and GPT-2, which are built differently


@dataclass(frozen=True)
class Bundle:
    """A model with its tokenizer on a device, loaded at first use."""

    source: Source
    device: str

    @cached_property
    def model(self) -> "PreTrainedModel":
        return load_model(self.source, self.device)

    @cached_property
    def config(self) -> "PreTrainedConfig":
        """The model's config, read without loading the model."""
        return self.model.config if "model" in self.__dict__ else read_config(self.source)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.source)

    def holding(self, model: "PreTrainedModel") -> "Bundle":
        """This bundle with another model in it."""
        other = replace(self)
        other.__dict__.update(model=model, tokenizer=self.tokenizer)
        return other

    def save(self, folder: Path) -> None:
        """A Hugging Face folder that plain `from_pretrained` loads: safetensors, config, tokenizer, generation config."""
        from compress import experts

        # beside packed weights transformers reads unpacked experts only in its own form, held together
        beside = getattr(self.model.config, "quantization_config", None) is not None and experts.held_together(self.model)
        self.model.save_pretrained(folder, save_original_format=not beside)
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(source: Source) -> "PreTrainedTokenizerBase":
    """The model's tokenizer; where it has no padding token it pads with the end token.

    Raises ModelError.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.id, revision=source.revision)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise ModelError(f"{source.id}: no usable tokenizer: {first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{source.id}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises DataError where a tokenizer has no chat template, which `data.chat` needs."""
    if not tokenizer.chat_template:
        raise DataError("data.chat: the model's tokenizer has no chat template; write out the prompt and leave out chat")


def load_model(source: Source, device: str, quantization_config: Any = None) -> "PreTrainedModel":
    """The model, in evaluation mode, on the device; quantised at loading by `quantization_config` or the source's bits.

    Raises ModelError when its weights are missing, pickled or don't fit its config. It does so, too, when bits are set for packed weights,
    or the task doesn't fit the architecture.
    """
    import transformers

    if quantization_config is None and source.bits is not None:
        quantization_config = _packing(source, source.bits)
    auto = getattr(transformers, AUTO[source.task])
    extra = {} if quantization_config is None else {"quantization_config": quantization_config}
    packing = settings(source, "config.json").get("quantization_config") or {}
    try:
        with ao.reading() if packing.get("quant_method") == "torchao" else nullcontext():
            model, info = auto.from_pretrained(
                source.id, revision=source.revision, dtype=source.dtype, device_map={"": device},
                use_safetensors=True, trust_remote_code=False, output_loading_info=True, **extra,
            )  # fmt: skip
    except ImportError as error:
        raise ModelError(f"{source.id}: {first_line(error)}") from None
    except NameError as error:  # transformers uses an optional package without a check
        why = f"the package that reads its packed weights isn't installed here ({first_line(error)})"
        raise ModelError(f"{source.id}: {why}; `compress methods` says which a method needs") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, AttributeError) and not reads_packed():
            raise ModelError(f"{source.id}: {reader_needed('its packed weights')}") from None
        raise ModelError(f"{source.id}: can't be loaded for task {source.task}: {first_line(error)}") from None
    except Exception as error:
        if type(error).__name__ == "SafetensorError" or "ignore_mismatched_sizes" in str(error):
            raise ModelError(f"{source.id}: its weights don't fit its config or are damaged") from None
        raise
    if lacking := sorted(info["missing_keys"]):
        raise ModelError(
            f"{source.id}: {len(lacking)} weights are missing, such as {', '.join(lacking[:3])};"
            f" it can't serve {source.task}{_beside(source)}"
        )
    if getattr(model, "peft_config", None):
        raise ModelError(f"{source.id}: transformers puts an adapter on it; merge it into the weights first (peft's merge_and_unload)")
    if not model.all_tied_weights_keys and model.get_expanded_tied_weights_keys(all_submodels=True):
        model.config.tie_word_embeddings = False  # the config claims ties, and the files hold different weights
    if device == "cpu" and (odd := bnb.stumbling(model)):
        raise ModelError(f"{source.id}: {len(odd)} layers, such as {odd[0]}, can't run on this CPU: {bnb.ODD}; use another CPU or a GPU")
    return model.eval()


def _beside(source: Source) -> str:
    """A message on weight files that transformers doesn't load, for a folder that lacks weights."""
    if not source.is_folder or not (others := weight_files_beside(Path(source.id))):
        return ""
    loaded = ", ".join(f.name for f in weight_files(Path(source.id)))
    return f". transformers loads {loaded}, and not {', '.join(f.name for f in others)}, which lies beside"


def reads_packed() -> bool:
    """Whether the installed transformers reads weights of encoder-decoders and GPT-2 that compressed-tensors packed."""
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= PACKED_READER


def reader_needed(what: str) -> str:
    """A message: which transformers `what` needs, and which is installed."""
    import transformers

    least = ".".join(map(str, PACKED_READER))
    return f"{what} need transformers {least} or newer, and here is {transformers.__version__}; pip install 'transformers>={least}'"


def _packing(source: Source, bits: int) -> Any:
    """The config with which bitsandbytes holds weights in 8 bits (LLM.int8) or 4 (NF4, its scales quantised again).

    Heads are left out, and in 4 bits layers that some CPUs can't compute.
    """
    from torch import nn
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    bare = skeleton(source)
    if getattr(bare.config, "quantization_config", None) is not None:
        raise ModelError(f"{source.id}: bits: {bits} is for a model with full weights, and these are packed already; leave bits out")
    if bare.can_generate():
        whole = [name for name, module in bare.named_modules() if module is bare.get_output_embeddings()]
    else:
        whole = [name for name, _ in bare.named_children() if name != bare.base_model_prefix]
    if bits == 4:
        whole += [name for name, m in bare.named_modules() if isinstance(m, nn.Linear | Conv1D) and not bnb.takes_4bit(m)]
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # it would log that it rounds at every call of every layer
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=bare.dtype, llm_int8_skip_modules=whole,
    )  # fmt: skip


def task_of(source: Source) -> str:
    """The task of the class that a model's config names.

    Raises ModelError where it names none, or one of no task here.
    """
    from transformers.models.auto import modeling_auto as known

    named = read_config(source).architectures or []
    serving = {
        "seq2seq": known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "causal-lm": known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "sequence-classification": known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    for task, classes in serving.items():
        if set(named) & {str(name) for name in classes.values()}:
            return task
    raise ModelError(f"{source.id}: no task can be told from its config's architectures, {named}; give --task, one of {', '.join(AUTO)}")


def read_config(source: Source) -> "PreTrainedConfig":
    """A model's config. Raises ModelError."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.id, revision=source.revision)
    except Exception as error:  # a config may hold anything
        raise ModelError(f"{source.id}: its config can't be read: {first_line(error)}") from None
    return config


def skeleton(source: Source) -> "PreTrainedModel":
    """The model as transformers loads it, without its weights: its layers, dtype, ties and computed buffers.

    transformers looks at the files' headers, since a config needn't say which dtype they hold, nor that a head has weights of its own.
    A packed model follows from its config.json alone.

    Raises ModelError for what can't be loaded.
    """
    import torch
    import transformers
    from accelerate import init_empty_weights

    config = read_config(source)
    try:
        packed = getattr(config, "quantization_config", None) is not None
        loaded = None if packed else load_model(replace(source, bits=None), "meta")
        dtype = loaded.dtype if loaded is not None else config.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
        with init_empty_weights(include_buffers=False):
            bare: PreTrainedModel = getattr(transformers, AUTO[source.task]).from_config(config, dtype=dtype or torch.float32)
    except ModelError:
        raise
    except Exception as error:  # a config may hold anything
        raise ModelError(f"{source.id}: can't serve task {source.task}: {first_line(error)}") from None
    if loaded is None:
        return bare
    for name, buffer in bare.named_buffers():
        if buffer.device.type != "meta":
            owner, _, leaf = name.rpartition(".")
            setattr(loaded.get_submodule(owner), leaf, buffer)
    if any(loaded.get_parameter(name) is not loaded.get_parameter(twin) for name, twin in loaded.all_tied_weights_keys.items()):
        # the files hold both weights of a tie; transformers must read them, for it ties them only where they are equal
        plain = mapped(source)
        loaded.all_tied_weights_keys = dict(plain.all_tied_weights_keys)
        loaded.config.tie_word_embeddings = plain.config.tie_word_embeddings
        loaded.tie_weights(recompute_mapping=False)
    return loaded


def mapped(source: Source) -> "PreTrainedModel":
    """The model as transformers loads it into main memory, its weights on disk until they are read.

    They keep their stored dtype, whatever the source's is, and so need no memory. Where the files hold several dtypes, or weights in
    another form than the model's (experts one by one), those that must be converted are in memory.

    Raises ModelError.
    """
    dtypes = stored_dtypes(local_folder(source))
    return load_model(replace(source, bits=None, dtype=dtypes[0] if len(dtypes) == 1 and dtypes[0] != "float64" else source.dtype), "cpu")


def parameter_bytes(model: "PreTrainedModel") -> int:
    """Bytes of the weights in their dtypes; shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def parameter_count(model: "PreTrainedModel") -> int:
    """The number of weights; a packed one counts with its unpacked shape, a shared one once."""
    named = ((name.rpartition("."), parameter) for name, parameter in model.named_parameters())
    return sum(weights_in(model.get_submodule(owner), leaf, parameter) for (owner, _, leaf), parameter in named)


def weights_in(owner: "nn.Module", leaf: str, parameter: "torch.Tensor") -> int:
    """How many weights a module's parameter `leaf` stands for; 0 for what packed weights bring along, such as scales."""
    if leaf in BROUGHT:
        return 0
    if leaf == "weight_packed":
        return int(owner.weight_shape.prod())  # type: ignore[operator]
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def local_folder(source: Source) -> Path:
    """The folder of a loaded model's files: its own, or the hub's cache."""
    from transformers.utils import cached_file

    return Path(str(cached_file(source.id, "config.json", revision=source.revision))).parent
