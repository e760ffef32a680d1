"""How a loaded model is run, where plain transformers leaves speed lying.

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

from compress.errors import DeviceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def working_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """The dtype to compute with where results are to be at least as exact as in the stored one, and soon there.

    An x86 CPU without instructions for 16 bits (AVX-512 BF16, AMX) takes many times as long in 16 bits as in 32.
    """
    if device != "cpu" or stored not in (torch.bfloat16, torch.float16) or platform.machine() not in ("x86_64", "AMD64"):
        return stored
    return stored if stored == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else torch.float32


class Int8Linear(nn.Module):
    """A linear layer, int8 by row, whose inputs are rounded token by token: 8 bits, or 7 on CPUs where sums of 8 would overflow (no VNNI).

    integers (rows, columns) int8, scale (rows,), bias (rows,), factor (columns,) what the inputs are multiplied by before
    """

    weight = None  # T5 looks at its output layer's dtype and lets one without weight be

    def __init__(self, integers: Tensor, scale: Tensor, bias: Tensor | None, factor: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = integers.shape
        self.packed_bytes = integers.numel() + scale.numel() * scale.element_size()
        with warnings.catch_warnings():  # torch means to remove this kind of tensor one day, and has no other way to these kernels
            warnings.simplefilter("ignore")
            weight = torch._make_per_channel_quantized_tensor(integers, scale.double(), torch.zeros(len(scale), dtype=torch.long), 0)
        self._packed = torch.ops.quantized.linear_prepack(weight, None)
        self._narrow = not torch.cpu._is_vnni_supported()
        self._factor, self._bias = factor, bias

    def forward(self, states: Tensor) -> Tensor:
        x = states.float() if self._factor is None else states.float() * self._factor
        # the kernel has one scale for all inputs: tokens are given one size before, and their own after
        size = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10)
        out: Tensor = torch.ops.quantized.linear_dynamic(x / size, self._packed, self._narrow).mul_(size)
        return (out if self._bias is None else out.add_(self._bias)).to(states.dtype)


def use_cpu_int8(model: "PreTrainedModel") -> int:
    """Have a loaded model's int8 layers of torchao computed by FBGEMM, in place. Returns how many there were.

    Raises DeviceError for a model on a GPU, where torchao's own kernels are the fast ones.
    """
    if model.device.type != "cpu":
        raise DeviceError(f"cpu_int8: the model is on {model.device}, and these kernels run on a CPU; leave it out there")
    found = [(name, layer) for name, layer in model.named_modules() if _is_int8(layer)]
    for name, layer in found:
        weight: Any = layer.weight
        factor = None if weight.act_pre_scale is None else weight.act_pre_scale.float()
        bias = None if layer.bias is None else layer.bias.data.float()
        model.set_submodule(name, Int8Linear(weight.qdata, weight.scale.flatten(), bias, factor))
    return len(found)


def use_sparse_24(model: "PreTrainedModel") -> int:
    """Have a loaded model's layers with two zeros in every four weights computed by sparse tensor cores, in place. Returns how many.

    Takes float16 and bfloat16 layers of shapes that torch's kernels know; a head that is the embedding's own tensor stays as it is.

    Raises DeviceError where there are no such cores.
    """
    from torch.sparse import to_sparse_semi_structured

    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
        raise DeviceError(
            f"sparse_24: the model is on {model.device}, and these kernels need a GPU of compute capability 8.0 or more; leave it out there"
        )
    found = [(name, layer) for name, layer in model.named_modules() if _is_sparse_24(layer)]
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    found = [(name, layer) for name, layer in found if f"{name}.weight" not in tied]
    for _, layer in found:
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.data.contiguous()), requires_grad=False)
    return len(found)


def _is_sparse_24(layer: nn.Module) -> bool:
    """Whether a layer has two zeros in every four weights of a row, in a dtype and shape that the kernels take."""
    if type(layer) is not nn.Linear or layer.weight.dtype not in (torch.float16, torch.bfloat16):
        return False
    rows, columns = layer.weight.shape
    return rows % 32 == 0 and columns % 64 == 0 and bool(((layer.weight.reshape(-1, 4) == 0).sum(dim=1) >= 2).all())


def _is_int8(layer: nn.Module) -> bool:
    """Whether a layer's weight is int8 by row and its inputs are to be rounded as they come."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or type(weight).__name__ != "Int8Tensor":
        return False
    return weight.act_quant_kwargs is not None and weight.scale.numel() == layer.out_features  # type: ignore
