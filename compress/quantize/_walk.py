"""The calibration pass: a model gone through block by block, of which one at a time has its weights in memory.

The skeleton of the model lies on torch's meta device. What stands outside the blocks (embeddings, last norms, heads) is read first. Then
for each stack of blocks (the encoder's, the decoder's) the calibration examples are led to its first block; each block is read from
safetensors, solved by the method, run once more with its new weights, so that the next one sees what it will see in use, and packed.
Only the hidden states between two blocks are kept, an example at a time and so without padding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from compress.architecture import as_linear, context_length, has_transposed_layers, linear_layers
from compress.errors import BrokenPromise, DataError
from compress.methods import Context
from compress.model import Bundle, Source, local_folder, skeleton, weight_files
from compress.quantize._grid import Grid, GridSettings, require_whole_groups
from compress.quantize._pack import describe, packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Inputs = dict[str, Any]  # what the model is called with for one example
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with besides the hidden states


@dataclass
class Stream:
    """What one block is given: for each example the hidden states (1, tokens, width) and the rest of the call."""

    hidden: list[Tensor]
    calls: list[Call]

    def through(self, module: nn.Module, index: int, device: str) -> Tensor:
        """The hidden states behind a block for one example."""
        args, kwargs = self.calls[index]
        out = module(self.hidden[index].to(device), *args, **kwargs)
        states: Tensor = out[0] if isinstance(out, tuple) else out
        return states


@dataclass
class Block:
    """One block with its weights and its linear layers to solve.

    given   its inputs as the solved blocks before it make them
    targets what the uncompressed model has behind this block, an example each; empty unless asked for
    """

    name: str
    module: nn.Module
    layers: dict[str, nn.Linear]
    given: Stream
    targets: list[Tensor]
    device: str
    solved: dict[str, tuple[Grid, Tensor]] = field(default_factory=dict)

    def output(self, index: int) -> Tensor:
        """The hidden states behind the block for one example."""
        return self.given.through(self.module, index, self.device)

    def set(self, name: str, grid: Grid, integers: Tensor) -> None:
        """Give a layer its solution, integers of the weight's shape; it computes with it from here on."""
        self.solved[name] = (grid, integers)
        layer = self.layers[name]
        layer.weight.data = grid.values(integers).to(layer.weight.dtype)


def walk(
    bundle: Bundle, settings: GridSettings, context: Context, scratch: Path, solve: Callable[[Block], None], targets: bool = False
) -> Bundle:
    """Lead the calibration examples through the model and have `solve` set every layer of every block; the model comes back packed.

    scratch   an empty folder, for a checkpoint that has to be written anew
    targets   give each block the uncompressed model's hidden states to aim at; keeps a second set of them

    Raises DataError when there is nothing to calibrate on, BrokenPromise when the model has no blocks with linear layers.
    """
    model, weights = _empty(bundle.source, scratch)
    wanted, _ = linear_layers(model, settings.ignore)
    stacks = _stacks(model)
    inside = {
        full: layer
        for full, layer in wanted.items()
        if isinstance(layer, nn.Linear) and any(full.startswith(f"{stack}.") for stack in stacks)
    }
    if not inside:
        raise BrokenPromise(f"{type(model).__name__} has no blocks with linear layers to work on")
    for full in wanted.keys() - inside.keys():
        context.layers.append({"name": full, "bits": None, "left_out": "stands outside the blocks"})
    require_whole_groups(inside, settings)
    weights.fill(model, "", bundle.device, skip=tuple(f"{stack}." for stack in stacks))
    model.tie_weights()
    examples = _examples(model, bundle.tokenizer, context)
    # two ways through the model: as the solved blocks go, and as the uncompressed ones do
    ways = [examples, [dict(inputs) for inputs in examples]] if targets else [examples]
    grids: dict[str, Grid] = {}
    done, total = 0, sum(map(len, stacks.values()))
    with torch.no_grad(), _without_cache(model):
        for stack, blocks in stacks.items():
            weights.fill(blocks[0], f"{stack}.0.", bundle.device)
            streams = [_lead_in(model, blocks, way) for way in ways]
            for index in range(len(blocks)):
                name, module = f"{stack}.{index}", blocks[index]
                weights.fill(module, f"{name}.", bundle.device)
                aims = [streams[1][index].through(module, n, bundle.device).cpu() for n in range(len(examples))] if targets else []
                layers = {full: layer for full, layer in inside.items() if full.startswith(f"{name}.")}
                block = Block(name, module, layers, streams[0][index], aims, bundle.device)
                solve(block)
                behind = [[block.output(n).cpu() for n in range(len(examples))], aims]
                for stream, hidden in zip(streams, behind, strict=False):
                    stream[min(index + 1, len(blocks) - 1)].hidden = hidden
                for full, (grid, integers) in block.solved.items():
                    model.set_submodule(full, packed(layers[full], grid, integers))
                    grids[full] = grid
                module.to("cpu")
                done += 1
                context.progress("calibrating, block by block", done, total)
            if model.config.is_encoder_decoder and any(blocks is part for part in model.get_encoder().modules()):
                for way, stream in zip(ways, streams, strict=True):
                    _encode(model, blocks, way, stream[-1].hidden)
    describe(model.to("cpu"), grids)
    return bundle.holding(model)


class _Weights:
    """The tensors of a model folder, read one by one."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self._dtype, self._files = dtype, dict[str, Path]()
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                self._files.update(dict.fromkeys(tensors.keys(), file))

    def hold(self, names: set[str]) -> bool:
        return names <= self._files.keys()

    def fill(self, module: nn.Module, prefix: str, device: str, skip: tuple[str, ...] = ()) -> None:
        """Put a module's weights on the device, all but those whose names begin with one of `skip`."""
        state = {}
        for name in module.state_dict():
            if not name.startswith(skip or ("\0",)) and (file := self._files.get(prefix + name)) is not None:
                with safe_open(file, framework="pt") as tensors:
                    tensor = tensors.get_tensor(prefix + name)
                state[name] = tensor.to(device, self._dtype if tensor.is_floating_point() else None)
        module.load_state_dict(state, strict=False, assign=True)
        for name, buffer in module.named_buffers():
            if buffer.device.type != "meta" and not name.startswith(skip or ("\0",)):
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, buffer.to(device))


def _empty(source: Source, scratch: Path) -> tuple["PreTrainedModel", _Weights]:
    """The model without weights, its computed buffers being there, and where to read the weights.

    A checkpoint with other names than the model's own (old uploads), and GPT-2 with its transposed layers, is written anew.
    """
    model = skeleton(source)
    if model.can_generate():
        with suppress(OSError):  # an old upload may have none; then the model's config stands for it
            model.generation_config = GenerationConfig.from_pretrained(source.id, revision=source.revision)
    weights = _Weights(local_folder(source), model.dtype)
    tied = set(model.all_tied_weights_keys)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if weights.hold(names - tied) and not has_transposed_layers(model):
        return model.eval(), weights
    as_linear(Bundle(source, "cpu").model).save_pretrained(scratch)
    return _empty(Source(str(scratch), source.task, source.dtype), scratch)


def _stacks(model: "PreTrainedModel") -> dict[str, nn.ModuleList]:
    """The lists of blocks in the order they are run: outermost module lists of one class with linear layers inside."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            same = len({type(block) for block in module}) == 1
            if same and any(isinstance(part, nn.Linear) for part in module.modules()):
                found[name] = module
    return found


def _examples(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", context: Context) -> list[Inputs]:
    """The calibration examples as inputs on the device: the prompt, or prompt and target; for encoder-decoders both sides."""
    room = context_length(model.config)
    limit = min(context.max_tokens, room or context.max_tokens)
    found = []
    for example in context.examples:
        prompt, target = example.prompt, example.references[0] if example.references else ""
        if context.chat:
            turn = [{"role": "user", "content": prompt}]
            prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        both = model.config.is_encoder_decoder
        text = prompt if both or not model.can_generate() else f"{prompt}{target}"
        ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")["input_ids"].to(model.device)
        inputs: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if both:
            labels = tokenizer(text_target=target, truncation=True, max_length=limit, return_tensors="pt")["input_ids"].to(model.device)
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        if ids.shape[1] > 1:
            found.append(inputs)
    if not found:
        raise DataError("calibration: no example has two tokens or more; look at data.splits.train and the prompt")
    return found


class _Stop(Exception):
    """The last block of a stack was reached; what comes behind it isn't wanted."""


class _StandIn(nn.Module):
    """Stands where a block stood and answers in its place."""

    def __init__(self, block: nn.Module, answer: Callable[..., Any]):
        super().__init__()
        object.__setattr__(self, "_stands_for", block)
        object.__setattr__(self, "_answer", answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stands_for, name)  # models look at attributes of their blocks, such as the kind of attention

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._answer(hidden, args, kwargs)


def _lead_in(model: "PreTrainedModel", blocks: nn.ModuleList, examples: list[Inputs]) -> list[Stream]:
    """What each block is called with; hidden states for the first alone, the others' are filled in as they come.

    The first block is run, since T5's makes the position bias that the others are given; the others answer with what it said.
    """
    first, said = blocks[0], list[Any]()
    streams = [Stream([], []) for _ in blocks]

    def answer(index: int, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        streams[index].calls.append((args, kwargs))
        if index == 0:
            streams[0].hidden.append(states.cpu())
        if index == len(blocks) - 1:
            raise _Stop
        if index == 0:
            said[:] = [first(states, *args, **kwargs)]
        return said[0]

    with _standing_in(blocks, answer):
        for inputs in examples:
            try:
                model(**inputs)
            except _Stop:
                continue
    return streams


def _encode(model: "PreTrainedModel", blocks: nn.ModuleList, examples: list[Inputs], hidden: list[Tensor]) -> None:
    """Give every example the encoder's output, made from the hidden states behind its last block, in place of its input."""
    from transformers.modeling_outputs import BaseModelOutput

    for inputs, last in zip(examples, hidden, strict=True):
        states = last.to(model.device)
        with _standing_in(blocks, lambda *_, states=states: _in_form_of(model, states)):
            out = model.get_encoder()(input_ids=inputs.pop("input_ids"), attention_mask=inputs["attention_mask"])
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=out.last_hidden_state)


@contextmanager
def _standing_in(blocks: nn.ModuleList, answer: Callable[..., Any]) -> Iterator[None]:
    """Every block answers answer(index, hidden, args, kwargs) while the context lasts."""
    real = list(blocks)
    for index, block in enumerate(real):
        blocks[index] = _StandIn(block, lambda *said, index=index: answer(index, *said))
    try:
        yield
    finally:
        for index, block in enumerate(real):
            blocks[index] = block


@contextmanager
def _without_cache(model: "PreTrainedModel") -> Iterator[None]:
    """A cache would grow with every call of a block. Each stack of an encoder-decoder has a config of its own."""
    configs = {id(m.config): m.config for m in model.modules() if getattr(getattr(m, "config", None), "use_cache", None)}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def _in_form_of(model: "PreTrainedModel", states: Tensor) -> Any:
    """Hidden states as a block of the model gives them; T5's give two position biases too."""
    return (states, None, None) if "T5" in type(model).__name__ else states
