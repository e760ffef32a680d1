"""Small random models of the types that people compress: what each config is told besides its defaults."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.conftest import make_tokenizer
from tests.mixtures import MIXTURES

ENDS = {"pad_token_id": 0, "eos_token_id": 1}
BERT = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DECODER = {**BERT, **ENDS, "bos_token_id": 1}
GROUPED = {**DECODER, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 16}
T5 = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96, "num_layers": 2, "decoder_start_token_id": 0, **ENDS}
BART = {
    "vocab_size": 64, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "decoder_start_token_id": 1,
    "bos_token_id": 0, "forced_eos_token_id": None, **ENDS,
}  # fmt: skip
GPT = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **ENDS}
SMALL = {"vocab_size": 64, "hidden_size": 64, "n_layer": 2, "n_head": 4, **ENDS}
GEMMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

DECODERS = {
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "MinistralForCausalLM": HEADS,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": HEADS,
    "GemmaForCausalLM": HEADS,
    "Gemma2ForCausalLM": HEADS,
    "Gemma3ForCausalLM": HEADS,
    "PhiForCausalLM": DECODER,
    "Phi3ForCausalLM": GROUPED,
    "GraniteForCausalLM": GROUPED,
    "SmolLM3ForCausalLM": GROUPED,
    "Starcoder2ForCausalLM": GROUPED,
    "OlmoForCausalLM": GROUPED,
    "Olmo2ForCausalLM": GROUPED,
    "Olmo3ForCausalLM": GROUPED,
    "CohereForCausalLM": GROUPED,
    "Cohere2ForCausalLM": GROUPED,
    "GlmForCausalLM": HEADS,
    "Glm4ForCausalLM": HEADS,
    "StableLmForCausalLM": GROUPED,
    "PersimmonForCausalLM": DECODER,
    "NemotronForCausalLM": GROUPED,
    "HeliumForCausalLM": HEADS,
    "ArceeForCausalLM": GROUPED,
    "Exaone4ForCausalLM": GROUPED,
    "SeedOssForCausalLM": HEADS,
    "HunYuanDenseV1ForCausalLM": HEADS,
    "OPTForCausalLM": {
        "vocab_size": 64, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "word_embed_proj_dim": 64, **ENDS,
    },
    "FalconForCausalLM": {key: value for key, value in DECODER.items() if key != "max_position_embeddings"},
    "GPTNeoXForCausalLM": DECODER,
    "GPT2LMHeadModel": {**GPT, "bos_token_id": 1},
    "GPTBigCodeForCausalLM": {**GPT, "multi_query": False},
    "GPTJForCausalLM": {**GPT, "rotary_dim": 8},
    "CodeGenForCausalLM": {**GPT, "rotary_dim": 8},
    "GPTNeoForCausalLM": {
        "vocab_size": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64, **ENDS,
    },
    "BloomForCausalLM": SMALL,
    "MptForCausalLM": {"vocab_size": 64, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **ENDS},
    "Lfm2ForCausalLM": {**GROUPED, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "MambaForCausalLM": {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, **ENDS},
    **MIXTURES,
}  # fmt: skip
BOTH_SIDES = {
    "T5ForConditionalGeneration": T5,
    "MT5ForConditionalGeneration": T5,
    "UMT5ForConditionalGeneration": T5,
    "LongT5ForConditionalGeneration": T5,
    "SwitchTransformersForConditionalGeneration": {**T5, "num_experts": 4, "num_decoder_layers": 2, "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0},
    "T5GemmaForConditionalGeneration": {
        "encoder": {**GEMMA, "vocab_size": 64}, "decoder": {**GEMMA, "vocab_size": 64}, "vocab_size": 64, **ENDS, "bos_token_id": 1,
    },
    "BartForConditionalGeneration": BART,
    "MBartForConditionalGeneration": BART,
    "PLBartForConditionalGeneration": BART,
    "PegasusForConditionalGeneration": BART,
    "MarianMTModel": BART,
    "M2M100ForConditionalGeneration": BART,
    "BlenderbotForConditionalGeneration": BART,
    "BlenderbotSmallForConditionalGeneration": BART,
    "LEDForConditionalGeneration": {**{k: v for k, v in BART.items() if k != "max_position_embeddings"}, "attention_window": 8},
    "ProphetNetForConditionalGeneration": {
        "vocab_size": 64, "hidden_size": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_encoder_layers": 2, "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "max_position_embeddings": 64, "decoder_start_token_id": 1, **ENDS,
    },
}  # fmt: skip
CLASSIFIERS = {
    "BertForSequenceClassification": BERT,
    "RobertaForSequenceClassification": BERT,
    "XLMRobertaForSequenceClassification": BERT,
    "CamembertForSequenceClassification": BERT,
    "ErnieForSequenceClassification": BERT,
    "RoFormerForSequenceClassification": BERT,
    "MPNetForSequenceClassification": BERT,
    "ElectraForSequenceClassification": {**BERT, "embedding_size": 64},
    "DistilBertForSequenceClassification": {"vocab_size": 64, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "pad_token_id": 0},
    "DebertaForSequenceClassification": {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2ForSequenceClassification": {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "ModernBertForSequenceClassification": {**DECODER, "num_hidden_layers": 3},
    "AlbertForSequenceClassification": {**BERT, "embedding_size": 64},
    "LongformerForSequenceClassification": {**BERT, "attention_window": 8, "sep_token_id": 1},
}
ALL = {**DECODERS, **BOTH_SIDES, **CLASSIFIERS}


def task_of(name: str) -> str:
    return "causal-lm" if name in DECODERS else "seq2seq" if name in BOTH_SIDES else "sequence-classification"


def made(name: str, folder: Path, **changes: Any) -> Path:
    """A folder with a random model of the class, whose config is changed so; no bias is zero."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**{**ALL[name], **changes})).eval()
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            if "bias" in parameter:
                values.normal_(std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
