"""A model on disk and in memory: looking at it, loading it, saving it, measuring its size."""

import hashlib
import json
import logging
import math
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import ao, bnb, exports
from compress.errors import DataError, DeviceError, ModelError
from compress.phases import phase

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CARD = "README.md"  # says what a model is, and is no part of it
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # what transformers looks for, in this order
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names and torch's
BUILTIN = Path(__file__).parent / "builtin" / "model"
AUTO = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}
# what packed weights bring along, of compressed-tensors and of GPTQ
BROUGHT = frozenset({"weight_scale", "weight_zero_point", "weight_shape", "input_scale", "input_zero_point", "qzeros", "scales", "g_idx"})
PACKED_READER = (5, 23)  # the first transformers that reads the packed weights of encoder-decoders and GPT-2, which are made elsewise


@dataclass(frozen=True)
class Source:
    """Where a model lies: a folder, or a hub id with its revision; and how it is loaded.

    bits   what weights are held in, 4 or 8, by bitsandbytes; None leaves them as they are stored
    """

    id: str
    task: str
    dtype: str = "auto"
    revision: str | None = None
    bits: int | None = None

    @property
    def is_folder(self) -> bool:
        return Path(self.id).is_dir()


def locate(id: str, folder: Path) -> str:
    """The folder that an id in a recipe means, or the hub id as it stands. Folders are relative to the recipe.

    Raises ModelError for what can be neither.
    """
    if id == "builtin":
        check_folder(BUILTIN)
        return str(BUILTIN)
    place = folder / user_path(id)
    if place.is_dir():
        check_folder(place)
        return str(place.resolve())
    if id.startswith((".", "/", "~")) or place.exists() or id.count("/") > 1:
        raise ModelError(f"model {id!r}: there is no folder {place}")
    if not all(part and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in id.split("/")):
        raise ModelError(f"model {id!r}: neither a folder ({place}) nor a hub id such as google/flan-t5-small")
    return id


def user_path(text: str) -> Path:
    """A path as a person writes it, `~` standing for a home folder where there is such a user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def pinned(source: Source) -> Source:
    """The source with the commit that a hub id means just now, so that both sides and every later stage have the same model.

    Raises ModelError when the hub doesn't answer and nothing is cached.
    """
    if source.is_folder:
        return source
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = huggingface_hub.HfApi().model_info(source.id, revision=source.revision, timeout=10).sha
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise ModelError(f"model {source.id!r}: neither a folder here nor on the hub (revision {source.revision or 'main'})") from None
    except Exception as error:  # offline in any of its ways
        cached = huggingface_hub.try_to_load_from_cache(source.id, "config.json", revision=source.revision)
        if not isinstance(cached, str):
            raise ModelError(
                f"model {source.id!r}: no folder of that name here, and the hub does not answer: {_first_line(error)}"
            ) from None
        commit = Path(cached).parent.name
    return replace(source, revision=commit)


def check_folder(folder: Path) -> None:
    """See that a model folder has a config, a tokenizer and whole safetensors, without torch.

    Raises ModelError.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no config.json, so no model folder") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{folder / 'config.json'}: not JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{folder / 'config.json'}: has no model_type, so no transformers model")
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer*.json", "*.model", "vocab.*")):
        raise ModelError(f"{folder}: no tokenizer (tokenizer.json, tokenizer_config.json, *.model or vocab.*)")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: adapter_config.json says that an adapter belongs to this model, which transformers puts on it where peft is there;"
            " merge it into the weights first (peft's merge_and_unload), or take the file away"
        )
    if exports.read(folder) is not None:
        return
    files = weight_files(folder)
    if not files:
        raise ModelError(f"{folder}: {_why_no_weights(folder)}")
    for file in files:
        list(tensor_headers(file))


def _why_no_weights(folder: Path) -> str:
    """Why transformers finds no weights in a folder that it reads without running code."""
    if others := weight_files_beside(folder):
        named = ", ".join(sorted(f.name for f in others))
        if all(f.suffix in PICKLED for f in others):
            return (
                f"only pickled weights ({named}), which can run code when read; store them as safetensors first"
                " (model.save_pretrained does, in an environment where you trust the file)"
            )
        return f"no {SINGLE} and no {INDEX}, which transformers looks for; give {named} that name, if that is the model"
    return "no weights (*.safetensors)"


def settings(source: Source, name: str) -> dict[str, Any]:
    """A JSON file of a model, read without torch; empty where the model, or a hub that doesn't answer, has none.

    Raises ModelError where it holds something else than an object.
    """
    place = Path(source.id) / name
    if not source.is_folder:
        import huggingface_hub

        try:
            place = Path(huggingface_hub.hf_hub_download(source.id, name, revision=source.revision))
        except (OSError, ValueError):  # no such file, no network
            return {}
    try:
        held = json.loads(place.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{place}: not JSON: {error}") from None
    if not isinstance(held, dict):
        raise ModelError(f"{place}: an object is wanted, with a key for each setting")
    return held


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that plain transformers loads from a folder, no others: the one that its config names
    (`transformers_weights`), or else model.safetensors, or else those that the index names. None where it has none of these.

    Raises ModelError where one of them isn't there or the index is damaged.
    """
    index = folder / INDEX
    if named := _named_weights(folder):
        if Path(named).name != named or not (folder / named).is_file():
            raise ModelError(f"{folder / 'config.json'}: transformers_weights names {named}, which isn't there")
        if not named.endswith(".index.json"):
            return [folder / named]
        index = folder / named
    elif (folder / SINGLE).is_file():
        return [folder / SINGLE]
    elif not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, OSError):
        raise ModelError(f"{index}: damaged") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{index}: names {name}, which isn't there")
    return [folder / name for name in names]


def weight_files_beside(folder: Path) -> list[Path]:
    """Files of a folder that look like weights and that transformers doesn't load."""
    loaded = set(weight_files(folder))
    return sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", *PICKLED) and f not in loaded)


def _named_weights(folder: Path) -> str | None:
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8-sig")).get("transformers_weights")
    except (ValueError, RecursionError, OSError, AttributeError):
        return None
    return named if isinstance(named, str) else None


def stored_dtypes(folder: Path) -> list[str]:
    """The dtypes of the floating-point weights in a folder's files, as torch calls them, in the order of the files; each once."""
    headers = (header for file in weight_files(folder) for _, header in sorted(tensor_headers(file)))
    return list(dict.fromkeys(DTYPES[header["dtype"]] for header in headers if header["dtype"] in DTYPES))


def tensor_headers(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and header (dtype, shape, data_offsets) of each tensor in a safetensors file.

    Raises ModelError when the file is damaged or shorter than its header says.
    """
    if not file.is_file():
        raise ModelError(f"{file}: not a file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 <= length <= min(size - 8, 100_000_000):
            raise ModelError(f"{file}: damaged or truncated ({size:,} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"{file}: damaged, its header can't be read") from None
    if size < 8 + length + end:
        raise ModelError(f"{file}: truncated, {size:,} bytes where its header says {8 + length + end:,}")
    yield from header.items()


def stored_parameters(folder: Path) -> int:
    """The number of weights in a folder's files, packed ones with their unpacked shapes; nothing is loaded.

    Raises ModelError where a file is damaged.
    """
    bits = (settings(Source(str(folder), ""), "config.json").get("quantization_config") or {}).get("bits", 4)
    total = 0
    for file in weight_files(folder):
        headers = dict(tensor_headers(file))
        for name, header in headers.items():
            owner, _, leaf = name.rpartition(".")
            if leaf in BROUGHT:
                continue
            if leaf == "weight_packed":
                total += math.prod(_integers(file, headers[f"{owner}.weight_shape"]))
            else:
                total += math.prod(header["shape"]) * (32 // bits if leaf == "qweight" else 1)
    return total


def _integers(file: Path, header: dict[str, Any]) -> tuple[int, ...]:
    """A tensor of 64-bit integers."""
    begin, end = header["data_offsets"]
    with file.open("rb") as stream:
        stream.seek(8 + struct.unpack("<Q", stream.read(8))[0] + begin)
        return struct.unpack(f"<{(end - begin) // 8}q", stream.read(end - begin))


def fingerprint(source: Source) -> dict[str, Any]:
    """What tells one model from another: the content of a folder's files but its card and weights beside it; id and commit of a hub's."""
    if not source.is_folder:
        return asdict(source)
    folder = Path(source.id)
    with phase("fingerprints"):
        unread = {CARD, *(f.name for f in weight_files_beside(folder))}
        export = exports.read(folder)
        own = [folder / name for name in export.files] if export else []
        files = sorted({*(f for f in folder.iterdir() if f.is_file() and f.name not in unread), *own})
        content = {str(file.relative_to(folder)): _digest(file.resolve(), (now := file.stat()).st_size, now.st_mtime_ns) for file in files}
    return {"files": content, "task": source.task, "dtype": source.dtype, "bits": source.bits}


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file that has been this large since this time."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pick_device(wanted: str) -> str:
    """`cpu` or `cuda`. Raises DeviceError when a GPU is wanted and none is there."""
    if wanted == "cpu":  # for which an engine's own environment needs no torch
        return "cpu"
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        why = "this torch has no CUDA" if torch.version.cuda is None else "torch sees no GPU"
        raise DeviceError(f"--device cuda: {why} on this machine; use --device cpu or auto")
    return "cuda" if there else "cpu"


@dataclass(frozen=True)
class Bundle:
    """A model with its tokenizer on a device, loaded when first looked at."""

    source: Source
    device: str

    @cached_property
    def model(self) -> "PreTrainedModel":
        return load_model(self.source, self.device)

    @cached_property
    def config(self) -> "PreTrainedConfig":
        """The model's config, for which it needn't be loaded."""
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

        # where others are packed, transformers reads experts that aren't only as it holds them itself, together
        beside = getattr(self.model.config, "quantization_config", None) is not None and experts.held_together(self.model)
        self.model.save_pretrained(folder, save_original_format=not beside)
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(source: Source) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, padding with the end token where it has no padding of its own.

    Raises ModelError.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.id, revision=source.revision)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise ModelError(f"{source.id}: no usable tokenizer: {_first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{source.id}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises DataError where `data.chat` is wanted of a tokenizer that has no chat template."""
    if not tokenizer.chat_template:
        raise DataError("data.chat: the model's tokenizer has no chat template; write the prompt out and leave chat away")


def load_model(source: Source, device: str, quantization_config: Any = None) -> "PreTrainedModel":
    """The model, in evaluation mode, on the device; quantised on the way where a config or the source's bits say so.

    Raises ModelError when its weights are missing, pickled or don't fit its config, when bits are asked of packed ones, or the task doesn't
    fit its architecture.
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
        raise ModelError(f"{source.id}: {_first_line(error)}") from None
    except NameError as error:  # transformers uses an optional package without a look whether it is there
        why = f"the package that reads its packed weights isn't installed here ({_first_line(error)})"
        raise ModelError(f"{source.id}: {why}; `compress methods` says which a method needs") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, AttributeError) and not reads_packed():
            raise ModelError(f"{source.id}: {reader_needed('its packed weights')}") from None
        raise ModelError(f"{source.id}: can't be loaded for task {source.task}: {_first_line(error)}") from None
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
        model.config.tie_word_embeddings = False  # it says that weights are shared of which the files hold two unlike ones
    if device == "cpu" and (odd := bnb.stumbling(model)):
        raise ModelError(f"{source.id}: {len(odd)} layers, such as {odd[0]}, can't run on this CPU: {bnb.ODD}; use another CPU or a GPU")
    return model.eval()


def _beside(source: Source) -> str:
    """What else lies in a folder whose weights are not whole."""
    if not source.is_folder or not (others := weight_files_beside(Path(source.id))):
        return ""
    loaded = ", ".join(f.name for f in weight_files(Path(source.id)))
    return f". transformers loads {loaded}, and not {', '.join(f.name for f in others)}, which lies beside"


def reads_packed() -> bool:
    """Whether the transformers here reads weights of encoder-decoders and GPT-2 that compressed-tensors packed."""
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= PACKED_READER


def reader_needed(what: str) -> str:
    """The sentence that says which transformers it takes to read what was packed, and which is here."""
    import transformers

    least = ".".join(map(str, PACKED_READER))
    return f"{what} need transformers {least} or newer, and here is {transformers.__version__}; pip install 'transformers>={least}'"


def _packing(source: Source, bits: int) -> Any:
    """The config by which bitsandbytes holds weights in 8 bits (LLM.int8) or 4 (NF4, its scales quantised again).

    Heads are left out, and in 4 bits what not every CPU computes with.
    """
    from torch import nn
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    bare = skeleton(source)
    if getattr(bare.config, "quantization_config", None) is not None:
        raise ModelError(f"{source.id}: bits: {bits} is for a model with full weights, and these are packed already; leave bits away")
    if bare.can_generate():
        whole = [name for name, module in bare.named_modules() if module is bare.get_output_embeddings()]
    else:
        whole = [name for name, _ in bare.named_children() if name != bare.base_model_prefix]
    if bits == 4:
        whole += [name for name, m in bare.named_modules() if isinstance(m, nn.Linear | Conv1D) and not bnb.takes_4bit(m)]
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # it would tell of every call of every layer that it rounds
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=bare.dtype, llm_int8_skip_modules=whole,
    )  # fmt: skip


def task_of(source: Source) -> str:
    """The task that a model's config means by the class it names.

    Raises ModelError where it names none, or one that serves another task.
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
    """What a model's config.json says. Raises ModelError."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.id, revision=source.revision)
    except Exception as error:  # a config may hold anything
        raise ModelError(f"{source.id}: its config can't be read: {_first_line(error)}") from None
    return config


def skeleton(source: Source) -> "PreTrainedModel":
    """The model as transformers loads it, without its weights (computed buffers are there): its layers, dtype and ties.

    transformers is asked, which looks at the files' headers: a config needn't say which dtype they hold, nor that a head has weights of
    its own. A packed model is what its config.json says.

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
        raise ModelError(f"{source.id}: can't serve task {source.task}: {_first_line(error)}") from None
    if loaded is None:
        return bare
    for name, buffer in bare.named_buffers():
        if buffer.device.type != "meta":
            owner, _, leaf = name.rpartition(".")
            setattr(loaded.get_submodule(owner), leaf, buffer)
    if any(loaded.get_parameter(one) is not loaded.get_parameter(other) for one, other in loaded.all_tied_weights_keys.items()):
        # the files hold both sides of a tie: transformers ties them where they are equal, for which it must read them
        plain = mapped(source)
        loaded.all_tied_weights_keys = dict(plain.all_tied_weights_keys)
        loaded.config.tie_word_embeddings = plain.config.tie_word_embeddings
        loaded.tie_weights(recompute_mapping=False)
    return loaded


def mapped(source: Source) -> "PreTrainedModel":
    """The model as transformers loads it into main memory, its weights on disk until they are looked at.

    They are in the dtype that they are stored in, whatever the source's is: in that they need no memory. Where the files hold several
    dtypes, or weights in another form than the model's (experts one by one), what must be converted is in memory.

    Raises ModelError.
    """
    dtypes = stored_dtypes(local_folder(source))
    return load_model(replace(source, bits=None, dtype=dtypes[0] if len(dtypes) == 1 and dtypes[0] != "float64" else source.dtype), "cpu")


def parameter_bytes(model: "PreTrainedModel") -> int:
    """Bytes of the weights in the dtypes that they have; shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def parameter_count(model: "PreTrainedModel") -> int:
    """The number of weights; a packed one counts with its unpacked shape, a shared one once."""
    named = ((name.rpartition("."), parameter) for name, parameter in model.named_parameters())
    return sum(weights_in(model.get_submodule(owner), leaf, parameter) for (owner, _, leaf), parameter in named)


def weights_in(owner: "nn.Module", leaf: str, parameter: "torch.Tensor") -> int:
    """How many weights a module's parameter of this name stands for; none where it is what packed weights bring along."""
    if leaf in BROUGHT:
        return 0
    if leaf == "weight_packed":
        return int(owner.weight_shape.prod())  # type: ignore[operator]
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def local_folder(source: Source) -> Path:
    """Where the files of a loaded model lie: its folder, or the hub's cache."""
    from transformers.utils import cached_file

    return Path(str(cached_file(source.id, "config.json", revision=source.revision))).parent


def file_bytes(folder: Path) -> int:
    """Bytes of the weight files on disk."""
    export = exports.read(folder)
    files = weight_files(folder) if export is None else [folder / name for name in export.files]
    return sum(file.stat().st_size for file in files)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
