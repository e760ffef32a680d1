"""Products in float32 on a CPU without instructions for the dtype: the same numbers, gradients too, and torch's own kernels afterwards."""

import pytest
import torch

from compress import products


@pytest.fixture
def old_cpu(monkeypatch):
    """A CPU that lacks them all, wherever this runs."""
    monkeypatch.setattr(products, "_without_instructions", lambda: {torch.bfloat16, torch.float16, torch.int8})


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rows", "inner"), [(1, 7), (5, 3000), (40, 2048)])
def test_int8_products_are_exact(old_cpu, rows, inner):
    a, b = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((rows, inner), (9, inner)))
    a[0], b[0] = -128, -128  # the largest sum there is
    with products.in_float32("cpu"), torch.inference_mode():
        product = torch._int_mm(a, b.t())
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), a.long() @ b.long().t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [2, products.FEW, 50])
def test_products_of_floats_are_those_of_float64_rounded_once(old_cpu, dtype, rows):
    x, weight, bias = drawn(3, rows, 64).to(dtype), drawn(24, 64).to(dtype), drawn(24).to(dtype)
    with products.in_float32("cpu"), torch.inference_mode():
        actual = [torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, weight, bias), torch.bmm(x, x.transpose(1, 2))]
    x, weight, bias = (part.double() for part in (x, weight, bias))
    product = x @ weight.t()
    for got, right in zip(actual, [product, product + bias, x @ x.transpose(1, 2)], strict=True):
        assert got.dtype == dtype
        wide = torch.promote_types(dtype, torch.float32)
        rounding, sums = torch.finfo(dtype).eps, 512 * torch.finfo(wide).eps
        torch.testing.assert_close(got.double(), right, rtol=rounding, atol=sums)


def test_gradients_go_through(old_cpu):
    x, weight = drawn(40, 64).bfloat16(), torch.nn.Parameter(drawn(24, 64).bfloat16())
    with products.in_float32("cpu"):
        torch.nn.functional.linear(x, weight).float().square().sum().backward()
    wide = weight.detach().double().requires_grad_()
    (x.double() @ wide.t()).square().sum().backward()
    assert torch.nn.functional.cosine_similarity(weight.grad.double().flatten(), wide.grad.flatten(), dim=0) > 0.9999


def test_torchs_own_kernels_are_back_afterwards(old_cpu, monkeypatch):
    a = torch.randint(-128, 128, (4, 8), dtype=torch.int8)
    used = []
    monkeypatch.setattr(products, "_int_mm", lambda a, b: used.append(1) or torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="inside"), products.in_float32("cpu"):
        assert torch._int_mm(a, a.t()).sum() == 0
        raise ValueError("inside")
    assert torch.equal(torch._int_mm(a, a.t()).long(), a.long() @ a.long().t())
    with products.in_float32("cuda"):
        torch._int_mm(a, a.t())
    assert used == [1]


def test_torch_tells_what_a_cpu_has():
    assert products._without_instructions() <= {torch.bfloat16, torch.float16, torch.int8}
