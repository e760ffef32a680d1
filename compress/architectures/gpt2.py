"""GPT-2: linear layers with their weights the other way round (Conv1D), queries, keys and values in one of them."""

from typing import TYPE_CHECKING, Any

from compress.architectures import CHANNEL, HEAD, HEADS, HIDDEN, LABELS, Architecture, Axis
from compress.errors import ModelError
from compress.shape import Config, Shape, Stack, head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS = {
    "wte|wpe|lm_head|score": (None, HIDDEN),
    "attn.c_attn": (Axis(HEADS, 3), HIDDEN),
    "attn.c_proj": (HIDDEN, HEAD),
    "c_fc": (CHANNEL, HIDDEN),
    "mlp.c_proj": (HIDDEN, CHANNEL),
    "ln_[12f]": (HIDDEN,),
}


def shape(config: Config, task: str) -> Shape:
    width, heads, vocabulary, layers = (config[key] for key in ("n_embd", "n_head", "vocab_size", "n_layer"))
    inner = config.get("n_inner") or 4 * width
    decoder = Stack(
        layers, width, heads, heads, width // heads, inner, composed=config.get("activation_function", "gelu_new") == "gelu_new"
    )
    other = (vocabulary + config["n_positions"]) * width + layers * (4 * width + 5 * width + inner) + 2 * width
    other += head(config, task, width, tied=True)
    return Shape.of("GPT-2", task, None, decoder, other, 0, vocabulary)


ARCHITECTURE = Architecture(tasks=LABELS, shape=shape, layers=LAYERS)


def as_linear(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same model with `nn.Linear` in place of GPT-2's transposed Conv1D, which most libraries pass over in silence.

    Plain transformers describes such a model as GPTBigCode with one key and value head per query head. Its fused projection is
    ordered by head (query, key, value of head 0, then of head 1 ...), GPT-2's by kind. Exact up to the order of sums.

    Raises ModelError for the GPT-2 variants that GPTBigCode can't describe.
    """
    import torch
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, GPTBigCodeForSequenceClassification
    from transformers.pytorch_utils import Conv1D

    if not any(isinstance(module, Conv1D) for module in model.modules()):
        return model
    kinds: dict[str, Any] = {
        "GPT2LMHeadModel": GPTBigCodeForCausalLM,
        "GPT2ForSequenceClassification": GPTBigCodeForSequenceClassification,
    }
    old, kind = model.config, kinds.get(type(model).__name__)
    if kind is None or getattr(old, "add_cross_attention", False) or getattr(old, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError(f"{type(model).__name__} with this config has Conv1D layers that no plain transformers model has as linear ones")
    shared = GPTBigCodeConfig().to_dict().keys() & old.to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    config = GPTBigCodeConfig(**{key: getattr(old, key) for key in shared}, multi_query=False)
    heads, width = config.num_attention_heads, config.hidden_size
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            weight, bias = module.weight.data.t(), module.bias.data
            if name.endswith("attn.c_attn"):
                order = torch.arange(3 * width).view(3, heads, width // heads).transpose(0, 1).reshape(-1).to(weight.device)
                weight, bias = weight[order], bias[order]
            state[f"{name}.weight"], state[f"{name}.bias"] = weight.contiguous(), bias.contiguous()
    new = kind(config).to(model.dtype)
    missing, unexpected = new.load_state_dict(state, strict=False)
    if missing or any(not key.endswith((".attn.bias", ".attn.masked_bias")) for key in unexpected):
        raise ModelError(f"GPT-2 weights that GPTBigCode has no place for: {', '.join([*missing, *unexpected][:5])}")
    new.tie_weights()
    new.generation_config = model.generation_config
    return new.to(model.device).eval()
