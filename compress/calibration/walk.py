"""The calibration pass: it goes through a model block by block, with the weights of one block in memory at a time.

The skeleton of the model lies on torch's meta device. What stands outside the blocks (embeddings, last norms, heads) is read first. Then
for each stack of blocks (the encoder's, the decoder's) the calibration examples are led to its first block. Each block is read from
safetensors and solved by the method. It is run once more with its new weights, so that the next one sees the inputs that it will have in
use, and packed. Only the hidden states between two blocks are kept.

The error is measured here, alike for all methods: the share of a layer's output that its new weights change (mean square over the
calibration tokens). Its inputs are those that the solved layers before it make.
"""

import ctypes
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from compress import experts
from compress.calibration.block import Block
from compress.calibration.lost import measuring
from compress.calibration.stream import Inputs, Stream, batches, encode, is_encoder, lead_in, look_ahead, without_cache
from compress.calibration.weights import empty
from compress.errors import BrokenPromise, InputError, ModelError
from compress.methods import Context, LayerSettings
from compress.model.loading import Bundle
from compress.runtime import working_dtype
from compress.structure import block_stacks, linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_MEASURED = "what its layers lost wasn't measured"
MEASURED = 4  # what a layer lost is measured on every fourth batch


class Storage(Protocol):
    """How solved layers are stored.

    bits  that a weight of each layer takes, by the layer's name; a layer without is not worked on
    """

    bits: dict[str, int]

    def packed(self, name: str, layer: nn.Linear, solution: Any) -> nn.Module:
        """What stands in the layer's place in the file, in main memory."""
        ...

    def describe(self, model: "PreTrainedModel") -> None:
        """Write into the model's config how the layers that were packed are stored."""
        ...


Prepare = Callable[["PreTrainedModel", dict[str, nn.Linear]], Storage]


def walk(
    bundle: Bundle,
    settings: LayerSettings,
    context: Context,
    prepare: Prepare,
    solve: Callable[[Block], None],
    targets: bool = False,
    blind: bool = False,
) -> Bundle:
    """Lead the calibration examples through the model and have `solve` set every layer of every block; the model comes back as stored.

    prepare   makes the storage from the model without weights and the layers to work on
    targets   give each block the uncompressed model's hidden states to aim at; keeps a second set of them
    blind     `solve` looks at weights only: examples serve to measure the error, which isn't measured where there are none

    Raises DataError when there is nothing to calibrate on, BrokenPromise when the model has no blocks with linear layers.
    """
    with tempfile.TemporaryDirectory() as scratch:  # for a checkpoint that has to be written anew; read until the last block
        model = _walk(bundle, Path(scratch), settings, context, prepare, solve, targets, blind)
    return bundle.holding(model)


def _walk(
    bundle: Bundle,
    scratch: Path,
    settings: LayerSettings,
    context: Context,
    prepare: Prepare,
    solve: Callable[[Block], None],
    targets: bool,
    blind: bool,
) -> "PreTrainedModel":
    model, weights = empty(bundle.source, scratch)
    if any(scratch.iterdir()):
        context.say("stored as GPTBigCode, which is GPT-2 with ordinary linear layers and computes the same")
    check_dtype(model)
    stacks = block_stacks(model)
    layers = layers_in_blocks(model, stacks, settings, context)
    if not blind:
        look_ahead(model, stacks)
    store = prepare(model, layers)
    stored = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model.to(working_dtype(model.dtype, bundle.device))
    weights.fill(model, "", bundle.device, skip=tuple(f"{stack}." for stack in stacks))
    model.tie_weights(recompute_mapping=False)
    examples = _few(model, bundle, context) if blind else _enough(batches(model, bundle.tokenizer, context), layers, context)
    # two ways through the model: as the solved blocks go, and as the uncompressed ones do
    ways = [examples, [dict(inputs) for inputs in examples]] if targets else [examples]
    solved = 0
    done, total = 0, sum(map(len, stacks.values()))
    with torch.no_grad(), without_cache(model):
        for stack, blocks in stacks.items():
            weights.fill(model, f"{stack}.0", bundle.device)
            ways, streams = _led_in(model, blocks, ways, context, blind)
            for index in range(len(blocks)):
                context.progress("calibrating, block by block", done, total)
                name, module = f"{stack}.{index}", blocks[index]
                weights.fill(model, name, bundle.device)
                aims = _led_through(streams[1][index], module, bundle.device) if targets else []
                # taken out, so that nothing holds a layer's weights once it is packed
                inside = {full: layers.pop(full) for full in list(layers) if full.startswith(f"{name}.") and full in store.bits}
                bits = {full: store.bits[full] for full in inside}
                block = Block(name, module, inside, bits, streams[0][index], aims, bundle.device, stored)
                if block.layers:
                    solve(block)
                last = index + 1 == len(blocks)
                _finish(block, context, whole=not last or is_encoder(model, blocks))
                if not last:
                    for stream in streams:
                        stream[index + 1].hidden, stream[index].hidden = stream[index].hidden, []
                _as_stored(model, name, stored)
                for full, solution in block.solved.items():
                    del block.layers[full].forward  # which holds the layer itself
                    model.set_submodule(full, store.packed(full, block.layers[full], solution))
                solved += len(block.solved)
                module.to("cpu")
                _give_memory_back()
                done += 1
            context.progress("calibrating, block by block", done, total)
            if is_encoder(model, blocks):
                for way, stream in zip(ways, streams, strict=True):
                    encode(model, blocks, way, stream[-1])
    if not solved:
        raise BrokenPromise(f"{type(model).__name__}: every layer was left out; nothing would be smaller")
    _as_stored(model, "", stored)
    experts.fuse(model)
    store.describe(model.to("cpu"))
    return model


def _few(model: "PreTrainedModel", bundle: Bundle, context: Context) -> list[Inputs]:
    """The examples that there are; what is lost isn't measured where there is none, or none that can be read."""
    if not context.examples:
        context.say(f"{NOT_MEASURED}, for want of a train split")
        return []
    try:
        return batches(model, bundle.tokenizer, context)
    except InputError as error:
        context.say(f"{NOT_MEASURED}: {error}")
        return []


def _led_in(
    model: "PreTrainedModel", blocks: nn.ModuleList, ways: list[list[Inputs]], context: Context, blind: bool
) -> tuple[list[list[Inputs]], list[list[Stream]]]:
    """What each block is called with on each way; where examples only serve to measure and can't be followed, there are none from here on.

    Raises ModelError where they are needed.
    """
    try:
        return ways, [lead_in(model, blocks, way) for way in ways]
    except ModelError as error:
        if not blind:
            raise
        context.say(f"{NOT_MEASURED}: {error}")
        return [[]], [lead_in(model, blocks, [])]


def _enough(examples: list[Inputs], layers: dict[str, nn.Linear], context: Context) -> list[Inputs]:
    """The examples; a note says so where they have fewer tokens than a layer has inputs."""
    tokens, widest = sum(int(inputs["attention_mask"].sum()) for inputs in examples), max(layer.in_features for layer in layers.values())
    if tokens < widest:
        context.say(
            f"calibrated on {tokens:,} tokens, fewer than the {widest:,} inputs of its widest layer: what suits these may not suit other"
            " texts; raise calibration.samples or give longer ones"
        )
    return examples


def _as_stored(model: "PreTrainedModel", prefix: str, dtypes: dict[str, torch.dtype]) -> None:
    """Give the weights of the module of this name the dtypes that they are stored in, each once: what is packed then has its own."""
    inside = f"{prefix}." if prefix else ""
    for name, tensor in model.get_submodule(prefix).state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes.pop(inside + name, tensor.dtype))


def check_dtype(model: "PreTrainedModel") -> None:
    """Raises ModelError for a model that can't be had in its dtype (T5 in float16)."""
    if model.dtype == torch.float16 and (wide := model._keep_in_fp32_modules):
        raise ModelError(
            f"{type(model).__name__} in float16: its {', '.join(sorted(wide))} layers overflow there; set model.dtype: bfloat16 or float32"
        )


def layers_in_blocks(
    model: "PreTrainedModel", stacks: dict[str, nn.ModuleList], settings: LayerSettings, context: Context
) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks that aren't ignored; the others are noted.

    Raises BrokenPromise where there are none.
    """
    layers, ignored = linear_layers(model, settings.ignore)
    for full in ignored:
        context.leave_out(full, settings.why_ignored)
    inside = {}
    for full, layer in layers.items():
        if isinstance(layer, nn.Linear) and any(full.startswith(f"{stack}.") for stack in stacks):
            inside[full] = layer
        else:
            context.leave_out(full, "stands outside the blocks")
    if not inside:
        raise BrokenPromise(f"{type(model).__name__} has no blocks with linear layers to work on")
    return inside


def _led_through(stream: Stream, module: nn.Module, device: str) -> list[Tensor]:
    """The hidden states behind a block, in place of those before it."""
    for batch in range(len(stream.hidden)):
        stream.hidden[batch] = stream.through(module, batch, device).cpu()
    return stream.hidden


def _give_memory_back() -> None:
    """What a block needed goes back to the system; glibc would keep it, in pieces too small for the next block's matrices."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _finish(block: Block, context: Context, whole: bool) -> None:
    """Lead the examples through the solved block and note what became of each layer.

    whole   False for a decoder's last block: nothing comes behind it, so only the batches that errors are measured on are led through
    """
    batch = 0

    def rows(states: Tensor) -> Tensor | None:
        return None if batch % MEASURED else block.given.rows(states, batch)

    with measuring({name: block.layers[name] for name in block.solved}, block.weights, rows) as errors:
        for batch in range(0, len(block.given.hidden), 1 if whole else MEASURED):
            block.given.hidden[batch] = block.output(batch, anew=batch % MEASURED == 0).cpu()
    block.release()
    for name, remark in block.remarks.items():
        context.remarks[name] = "; ".join(filter(None, [context.remarks.get(name), remark]))
    for name in block.layers:
        if name in block.solved:
            context.note(name, block.bits[name], errors.get(name), block.solved[name].sparsity)
        else:
            context.leave_out(name, block.left_out.get(name, "no calibration example reached it"))
