"""Small random mixtures of experts of every kind that is known here."""

import torch
import transformers

from compress.calibration.stream import encoded, padded
from compress.model.loading import load_model

ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, **ENDS}
GROUPED = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2}
QWEN = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **SMALL, "intermediate_size": 96, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MIXTURES = {
    "Qwen2MoeForCausalLM": {**GROUPED, **QWEN, "shared_expert_intermediate_size": 32},
    "Qwen3MoeForCausalLM": {**GROUPED, **QWEN, "head_dim": 16},
    "MixtralForCausalLM": {**GROUPED, **LOCAL},
    "OlmoeForCausalLM": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "GptOssForCausalLM": {**GROUPED, **LOCAL, "head_dim": 16, "layer_types": ["full_attention", "full_attention"]},
    "DeepseekV2ForCausalLM": DEEPSEEK,
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "PhimoeForCausalLM": {**GROUPED, **LOCAL},
    "GraniteMoeForCausalLM": {**GROUPED, **LOCAL},
    "GraniteMoeHybridForCausalLM": {
        **GROUPED, **LOCAL, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 32,
        "mamba_d_state": 16, "mamba_n_groups": 1,
    },
    "Qwen3NextForCausalLM": {
        **GROUPED, **QWEN, "shared_expert_intermediate_size": 32, "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    },
    "JambaForCausalLM": {
        **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 32,
    },
}  # fmt: skip
TOGETHER = ("GptOssForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM")  # in checkpoints, too


def mixture(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**MIXTURES[name])).eval()
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            if "bias" in parameter:
                values.normal_(std=0.2)
    return model


def routed(bundle, told, note) -> None:
    """note(path, module, states, chosen, weights) for the experts of every layer, in float64, one example after the other."""
    model = load_model(bundle.source, "cpu").double()
    model.set_experts_implementation("eager")
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            module.register_forward_pre_hook(lambda module, args, path=path: note(path, module, *args))
    with torch.no_grad():
        for _, ids, answer in encoded(model, bundle.tokenizer, told):
            model(**padded(model, [(ids, answer)]))
