"""The dialogues and the model that come with the package."""

import json

import pytest

from compress import data, rows, scores
from compress.benchmark.statistics import corpus_value
from compress.builtin import corpus
from compress.engines.transformers.batching import Batches
from compress.methods import quiet
from compress.model.loading import Bundle
from compress.model.source import BUILTIN, Source
from compress.recipe import load
from tests.measuring import writer


def test_the_shipped_dialogues_are_written_again_by_their_generator(tmp_path):
    corpus.write(tmp_path)
    for split in corpus.SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (rows.BUILTIN / f"{split}.jsonl").read_bytes()


def test_no_dialogue_stands_in_two_splits_and_every_slot_is_filled():
    shipped = [json.loads(line) for split in corpus.SPLITS for line in (rows.BUILTIN / f"{split}.jsonl").read_text().splitlines()]
    assert len(shipped) == sum(corpus.SPLITS.values()) == len({row["dialogue"] for row in shipped})
    assert not any("{" in row["dialogue"] + row["summary"] for row in shipped)


def test_the_package_stays_small():
    assert sum(f.stat().st_size for f in BUILTIN.iterdir()) < 8_000_000


@pytest.mark.slow
def test_the_model_summarises_held_out_dialogues():
    recipe = load("quickstart")
    examples = data.examples(recipe.data, recipe.folder, "evaluation", 100, 0)
    bundle = Bundle(Source(str(BUILTIN), "seq2seq", "float32"), "cpu")
    wrote = writer(bundle.model, bundle.tokenizer, [e.prompt for e in examples], recipe.generation.model_dump())
    tokens = wrote.write(Batches(bundle.model, None, quiet))
    texts = bundle.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert corpus_value("rougeL", scores.rouge(texts, [e.references for e in examples])["rougeL"]) > 60
