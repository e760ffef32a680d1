"""Small random models of every architecture, made once a session; a small data set; recipes over them. No network."""

import gc
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores, and so do the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))
    apart = Path(tempfile.gettempdir()) / f"compress-tests-{os.getuid()}-{os.environ['PYTEST_XDIST_WORKER']}"
    apart.mkdir(exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(apart), None  # where the lock is for which benchmarks wait

import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from compress.model.loading import Bundle
from compress.model.source import Source
from compress.nursery import nursery

# a busy machine is no fault of what is tested
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
WORDS = [
    "the", "cat", "dog", "sat", "ran", "on", "in", "mat", "hat", "red", "big", "small", "blue", "a", "and", "to", "was", "is", "of", "it",
]  # fmt: skip
TASKS = {"t5": "seq2seq", "bart": "seq2seq", "llama": "causal-lm", "gpt2": "causal-lm", "bert": "sequence-classification"}


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def shared_nursery():
    """The processes of every run are copies of one, which imports once a session."""
    with nursery():
        yield


@pytest.fixture(scope="module", autouse=True)
def out_of_the_way():
    out_of_the_collectors_way()


def out_of_the_collectors_way():
    """Whatever is there by now stays: a stage, which runs in this process here, has rubbish collected thrice, each time among millions of objects."""
    gc.collect()
    gc.freeze()


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_model(kind: str) -> transformers.PreTrainedModel:
    """A random model of 64 units and 2 layers."""
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "eos_token_id": 1}
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=64, d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, decoder_start_token_id=0, **ends,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    if kind == "bart":
        config = transformers.BartConfig(
            vocab_size=64, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, decoder_start_token_id=1,
            bos_token_id=0, forced_eos_token_id=None, **ends,
        )  # fmt: skip
        return transformers.BartForConditionalGeneration(config)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, **ends,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, **ends)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> dict[str, Path]:
    """Folders of random models, float32."""
    folders = {}
    for kind in TASKS:
        folders[kind] = tmp_path_factory.mktemp("toys") / kind
        model = make_model(kind)
        if model.can_generate():
            model.generation_config.max_new_tokens = 7
        model.save_pretrained(folders[kind])
        make_tokenizer().save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """A folder with splits of 24 rows, enough for intervals."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for n in range(24):
        text = " ".join(WORDS[(n * 3 + k * 7) % len(WORDS)] for k in range(5 + n % 12))
        lines.append({"id": f"row-{n}", "said": text, "short": "the cat sat on the red mat", "label": str(n % 2)})
    for split in ("test", "train"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe_for(kind: str, model: Path, rows: Path, **changes) -> dict:
    """A small recipe as plain data; `changes` replace its blocks."""
    data = {"source": str(rows), "prompt": "{said}", "target": "{label}" if kind == "bert" else "{short}"}
    recipe = {
        "version": 1,
        "model": {"id": str(model), "task": TASKS[kind], "dtype": "float32"},
        "data": data,
        "generation": {"max_new_tokens": 8},
        "benchmark": {
            "batch_sizes": [1, 2], "prompt_tokens": [8], "new_tokens": 4, "rounds": 1, "precision": None, "turns": 2, "iterations": 2, "warmup": 0,
            "threads": 1,
        },
    }  # fmt: skip
    return {**recipe, **changes}


@pytest.fixture
def write_recipe(tmp_path):
    def write(data: dict, name: str = "toy") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


@pytest.fixture(params=["t5", "bart", "llama", "gpt2"])
def random_bundle(request, toys):
    """A random model that doesn't stop at once: weights drawn wider, so that prompts matter, and the end token made unlikely."""
    bundle = Bundle(Source(str(toys[request.param]), TASKS[request.param], "float32"), "cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.15 * torch.randn_like(parameter))
    bundle.model.generation_config.suppress_tokens = [0, 1, 2]
    return bundle
