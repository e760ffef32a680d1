"""How a loaded model is run, where plain transformers wastes speed.

torchao's int8 layers (`int8_dynamic`, `smoothquant`) are slower than float32 on a CPU: they compute with integers where the CPU has
instructions for it and in loops where it has none. FBGEMM's kernels (Khudia et al. 2021), which come with torch, are faster than float32
on any x86 since AVX2.

Two zeros in every four weights (`prune`, pattern 2:4) are stored densely and computed as such. The sparse tensor cores of GPUs since Ampere
(Mishra et al. 2021) skip them, once the weights lie packed in memory.
"""

import platform
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress import held
from compress.errors import DeviceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# inputs are rounded on one grid, whose step and zero are arguments; `.default` saves the search for an overload
ROUNDED_PRODUCT = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default


def working_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """The dtype to compute in, at least as exact as the stored one, and fast.

    An x86 CPU without instructions for 16 bits (AVX-512 BF16, AMX) takes many times as long in 16 bits as in 32.
    """
    if device != "cpu" or stored not in (torch.bfloat16, torch.float16) or platform.machine() not in ("x86_64", "AMD64"):
        return stored
    return stored if stored == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else torch.float32


class Int8Linear(nn.Module):
    """A linear layer, int8 by row, whose inputs are rounded token by token: 8 bits, or 7 on CPUs where sums of 8 would overflow (no VNNI).

    Each token's numbers are spread over the whole grid from the least to the largest, whatever else is in the batch. The least is
    subtracted before the product. Its own product, the least times the sums of the weight's rows, is added afterwards.

    packed_bytes are the bytes that a step has to read, held_bytes those that the kernel's layout of them takes.

    integers (rows, columns) int8, scale (rows,), bias (rows,), factor (columns,) that multiplies the inputs first
    """

    weight = None  # T5 looks at the dtype of its output layer's weight, unless there is none

    def __init__(self, integers: Tensor, scale: Tensor, bias: Tensor | None, factor: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = integers.shape
        self.packed_bytes = integers.numel() + scale.numel() * scale.element_size()
        with warnings.catch_warnings():  # torch deprecates this kind of tensor, and has no other way to these kernels
            warnings.simplefilter("ignore")
            weight = torch._make_per_channel_quantized_tensor(integers, scale.double(), torch.zeros(len(scale), dtype=torch.long), 0)
        before = held.allocated()
        self._packed = torch.ops.quantized.linear_prepack(weight, None)
        self.held_bytes = max(self.packed_bytes, held.allocated() - before)  # the kernel's own layout, whose columns are padded
        self._sums = (integers.sum(dim=1, dtype=torch.int32) * scale.double()).float()
        self._step = 1 / (255 if torch.cpu._is_vnni_supported() else 127)
        self._factor, self._bias = factor, bias

    def forward(self, states: Tensor) -> Tensor:
        x = states.float() if self._factor is None else states.float() * self._factor
        least = x.amin(dim=-1, keepdim=True)
        size = x.amax(dim=-1, keepdim=True).sub_(least).clamp_(min=1e-10)
        out: Tensor = ROUNDED_PRODUCT((x - least).div_(size), self._step, 0, self._packed).mul_(size).addcmul_(least, self._sums)
        return (out if self._bias is None else out.add_(self._bias)).to(states.dtype)


def use_cpu_int8(model: "PreTrainedModel") -> int:
    """Let FBGEMM compute a loaded model's int8 layers of torchao, in place. Returns how many there are.

    Raises DeviceError for a model on a GPU, where torchao's own kernels are the fast ones, and on a CPU that FBGEMM doesn't support.
    """
    if model.device.type != "cpu":
        raise DeviceError(f"cpu_int8: the model is on {model.device}, and these kernels run on a CPU; leave it out there")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise DeviceError("cpu_int8: these kernels are for x86 CPUs, and this torch has none for the CPU here; leave it out there")
    layers = [(name, layer) for name, layer in model.named_modules() if _is_int8(layer)]
    for name, layer in layers:
        weight: Any = layer.weight
        factor = None if weight.act_pre_scale is None else weight.act_pre_scale.float()
        bias = None if layer.bias is None else layer.bias.data.float()
        model.set_submodule(name, Int8Linear(weight.qdata, weight.scale.flatten(), bias, factor))
    return len(layers)


def use_sparse_24(model: "PreTrainedModel") -> int:
    """Let sparse tensor cores compute a model's layers with two zeros in every four weights, in place. Returns how many there are.

    It takes float16 and bfloat16 layers of shapes that torch's kernels support. A head that shares the embedding's tensor stays as it is.

    Raises DeviceError where there are no such cores.
    """
    from torch.sparse import to_sparse_semi_structured

    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
        raise DeviceError(
            f"sparse_24: the model is on {model.device}, and these kernels need a GPU of compute capability 8.0 or more; leave it out there"
        )
    layers = [(name, layer) for name, layer in model.named_modules() if _is_sparse_24(layer)]
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    layers = [(name, layer) for name, layer in layers if f"{name}.weight" not in tied]
    for _, layer in layers:
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.data.contiguous()), requires_grad=False)
    return len(layers)


def _is_sparse_24(layer: nn.Module) -> bool:
    """Whether a layer has two zeros in every four weights of a row, in a dtype and shape that the kernels take."""
    if type(layer) is not nn.Linear or layer.weight.dtype not in (torch.float16, torch.bfloat16):
        return False
    rows, columns = layer.weight.shape
    return rows % 32 == 0 and columns % 64 == 0 and bool(((layer.weight.reshape(-1, 4) == 0).sum(dim=1) >= 2).all())


def _is_int8(layer: nn.Module) -> bool:
    """Whether a layer's weight is int8 by row and its inputs are rounded at run time."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or type(weight).__name__ != "Int8Tensor":
        return False
    return weight.act_quant_kwargs is not None and weight.scale.numel() == layer.out_features  # type: ignore
