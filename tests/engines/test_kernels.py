"""Kinds of kernel by name; own times by kind against sums by hand; a profile of real steps."""

from types import SimpleNamespace

import pytest
from bitsandbytes.functional import has_avx512bf16

from compress.engines.transformers import kernels, timing
from compress.metrics import KERNELS
from compress.model.loading import Bundle
from compress.model.source import Source
from tests.conftest import TASKS
from tests.quantize.test_methods import make


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("matrix_products", [
            "aten::mm", "aten::addmm", "aten::mv", "aten::linear", "aten::matmul", "aten::_int_mm", "aten::_scaled_mm", "bitsandbytes::gemm_4bit",
            "MatMul8bitLt", "quantized::linear_dynamic", "mkldnn::_linear_pointwise", "mkl::_mkl_linear", "aten::_weight_int4pack_mm",
            "sm80_xmma_gemm_f32f32_tf32f32", "ampere_fp16_s16816gemm_fp16_128x64", "nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "gemv2T_kernel_val",
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16>", "kgemm_4bit_inference_naive",
        ]),
        ("attention", [
            "aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::bmm", "aten::baddbmm",
            "aten::_softmax", "pytorch_flash::flash_fwd_kernel", "fmha_cutlassF_f16_aligned_64x64_rf_sm80",
        ]),
        ("unpacking", [
            "bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise", "kDequantizeBlockwise<float, 512, 64, 8, 1>",
            "torchao::dequantize_affine", "aten::bitwise_right_shift",
        ]),
        ("rounding", [
            "torchao::choose_qparams_affine", "torchao::quantize_affine", "bitsandbytes::int8_vectorwise_quant", "bitsandbytes::int8_mm_dequant",
            "aten::round", "_Round", "aten::fake_quantize_per_tensor_affine", "bitsandbytes::quantize_blockwise", "kInt8VectorQuant",
        ]),
        (None, ["aten::mul", "aten::copy_", "aten::t", "aten::cat", "aten::embedding", "aten::isin", "aten::mean", "aten::rsqrt", "aten::bitwise_and"]),
    ],
)  # fmt: skip
def test_names_tell_kinds(kind, names):
    assert {name: kernels.kind_of(name) for name in names} == dict.fromkeys(names, kind)


def event(name, own_us, children=(), device="CPU", launched=(), annotation=False):
    operator = SimpleNamespace(
        name=name, self_cpu_time_total=own_us, cpu_children=list(children), cpu_parent=None, is_async=False, is_user_annotation=annotation,
        device_type=SimpleNamespace(name=device), time_range=SimpleNamespace(elapsed_us=lambda: own_us),
        kernels=[SimpleNamespace(name=kernel, duration=us) for kernel, us in launched],
    )  # fmt: skip
    for child in children:
        child.cpu_parent = operator
    return operator


def every(*roots):
    return [operator for root in roots for operator in (root, *every(*root.cpu_children))]


def test_operators_without_a_kind_are_their_callers():
    unpack = event("bitsandbytes::dequantize_4bit", 10, [event("aten::empty", 5), event("aten::copy_", 15)])
    product = event("bitsandbytes::gemm_4bit", 20, [unpack, event("aten::mm", 50)])
    spent = kernels.on_cpu(every(product, event("aten::mul", 7, [event("aten::copy_", 3)])), excess=0.0)
    assert spent == pytest.approx({"matrix_products": 70e-6, "unpacking": 30e-6, "other": 10e-6})
    assert kernels.shares(spent, 200e-6) == pytest.approx(
        {"matrix_products": 0.35, "attention": 0, "unpacking": 0.15, "rounding": 0, "other": 0.05, "overhead": 0.45}
    )


def test_the_profilers_own_time_is_taken_off_whoever_called():
    """Four operators, 8 us too much: 2 us each, of which the product called two, and nobody but the step the other two."""
    product = event("aten::linear", 20, [event("aten::t", 5), event("aten::mm", 50)])
    spent = kernels.on_cpu(every(product, event("aten::mul", 7)), excess=8e-6)
    assert spent == pytest.approx({"matrix_products": (20 - 4 + 5 + 50) * 1e-6, "other": 7e-6})


def test_more_work_than_time_leaves_no_overhead():
    shares = kernels.shares({"matrix_products": 3.0, "other": 1.0}, 2.0)
    assert (shares["matrix_products"], shares["overhead"]) == (0.75, 0)


def test_a_gpus_kernels_count_by_their_name_or_by_who_launched_them():
    unpack = event("bitsandbytes::dequantize_4bit", 3, [event("aten::mul", 1, launched=[("elementwise_kernel", 40)])])
    mean = event("aten::mean", 1, launched=[("reduce_kernel", 10)])
    product = event("aten::mm", 1, launched=[("ampere_sgemm_128x64_tn", 30)])
    on_device = [
        event(name, us, device="CUDA") for name, us in (("elementwise_kernel", 40), ("reduce_kernel", 10), ("ampere_sgemm_128x64_tn", 30))
    ]
    on_device.append(event("a region", 80, device="CUDA", annotation=True))
    spent = kernels.on_gpu([*every(unpack, mean, product), *on_device])
    assert spent == pytest.approx({"unpacking": 40e-6, "other": 10e-6, "matrix_products": 30e-6})
    assert kernels.shares(spent, 100e-6)["overhead"] == pytest.approx(0.2), "the gaps"


def profiled(folder, kind, dtype="auto", device="cpu"):
    model = Bundle(Source(str(folder), TASKS[kind], dtype), device).model
    inputs = timing.prompts(model, 2, 8)
    run = timing.generate if model.can_generate() else timing.classify
    return kernels.profiled(lambda watch: run(model, inputs, 9, watch), device, 4)


@pytest.mark.parametrize("kind", TASKS)
def test_a_profile_of_every_architecture(toys, kind):
    seconds, shares = profiled(toys[kind], kind)
    assert seconds > 0
    assert sorted(shares) == sorted(KERNELS) and sum(shares.values()) == pytest.approx(1)
    assert shares["matrix_products"] > 0 and shares["attention"] > 0 and shares["other"] > 0
    assert shares["unpacking"] == shares["rounding"] == 0


@pytest.mark.parametrize(("method", "there", "absent"), [("bnb_nf4", "unpacking", "rounding"), ("int8_dynamic", "rounding", "unpacking")])
def test_packed_models_show_what_they_do_besides(toys, tmp_path, method, there, absent):
    _, shares = profiled(make(toys["llama"], "llama", method, tmp_path / "made"), "llama")
    if method == "bnb_nf4" and has_avx512bf16():  # its kernel multiplies what is packed
        assert shares[there] == 0
    else:
        assert shares[there] > 0.02
    assert shares[absent] == 0
    assert shares["matrix_products"] > 0


@pytest.mark.gpu
def test_a_profile_on_a_gpu(toys):
    seconds, shares = profiled(toys["llama"], "llama", "float16", "cuda")
    assert seconds > 0 and sum(shares.values()) == pytest.approx(1)
    assert shares["matrix_products"] > 0 and shares["overhead"] > 0
