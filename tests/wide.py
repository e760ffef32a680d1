"""Random models big enough to be pruned, whose logits depend on every weight."""

import json

import torch

from compress.model.loading import Bundle
from compress.model.source import Source
from tests import blocks
from tests.conftest import TASKS, make_model, make_tokenizer
from tests.plain import plain

SEEN = [
    {"id": "0", "prompt": "the cat sat on a big red mat", "references": ["1"]},
    {"id": "1", "prompt": "dog ran to the hat and it was small", "references": ["0"]},
    {"id": "2", "prompt": "red dog", "references": ["1"]},
]
SHAPES = {
    "t5": {"num_heads": 8, "d_kv": 8, "d_ff": 128, "num_layers": 4, "num_decoder_layers": 3, "tie_word_embeddings": True},
    "bart": {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_layers": 3, "decoder_layers": 4, "scale_embedding": True},
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 160, "num_hidden_layers": 4},
    "gpt2": {"n_head": 8, "n_layer": 4},
    "bert": {"num_attention_heads": 8, "num_hidden_layers": 4},
}


def wide(kind, **changes):
    """A model of 64 units, 8 heads and 3 or 4 blocks; its weights are large enough for every part to matter."""
    toy = make_model(kind)
    for key, value in {**SHAPES[kind], **changes}.items():
        setattr(toy.config, key, value)
    model = type(toy)(toy.config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # biases, and the weights of norms
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.normal_(std=0.15)
    if model.can_generate():
        model.generation_config.max_new_tokens = 7
    return model


def stored(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def run(method, kind, folder, target, seen=SEEN, **settings):
    return blocks.run("prune", method, folder, kind, target, seen, **settings)


def bundle(folder, kind):
    return Bundle(Source(str(folder), TASKS[kind], "float32"), "cpu")


def logits(model):
    ids = torch.arange(3, 23)[None]
    extra = {"decoder_input_ids": ids[:, :8]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **extra).logits.float()


def alike(actual, expected):
    """Equal to 1e-5 of the largest logit, which is far from zero."""
    assert expected.abs().max() > 0.1
    return (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def greedy(model):
    """The tokens that a model goes on with; none from one that can't."""
    if not model.can_generate():
        return []
    ids = torch.arange(3, 13)[None]
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=7, pad_token_id=0)[0].tolist()


def elsewhere(targets):
    """Logits and greedy tokens of each from plain transformers, by name."""
    program = """
        import json, sys, torch, transformers
        for name, target in json.loads(sys.argv[1]).items():
            kind = transformers.AutoConfig.from_pretrained(target).architectures[0]
            model, info = getattr(transformers, kind).from_pretrained(target, output_loading_info=True)
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
            ids = torch.arange(3, 23)[None]
            extra = {"decoder_input_ids": ids[:, :8]} if model.config.is_encoder_decoder else {}
            tokens = []
            with torch.no_grad():
                logits = model.eval()(input_ids=ids, **extra).logits
                if model.can_generate():
                    ids = torch.arange(3, 13)[None]
                    mask = torch.ones_like(ids)
                    tokens = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=7, pad_token_id=0)[0].tolist()
            print(json.dumps([name, logits.tolist(), tokens]))
    """
    output = plain(program, json.dumps({name: str(target) for name, target in targets.items()}))
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert [name for name, _, _ in rows] == list(targets)
    return {name: (torch.tensor(logits), tokens) for name, logits, tokens in rows}
