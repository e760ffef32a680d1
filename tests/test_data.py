"""Rows become examples; what is wrong with data is named by file and row."""

import json

import pandas
import pytest

from compress import data
from compress.errors import DataError, MissingPackage
from compress.methods import Example
from compress.recipe import Data

ROWS = [{"id": f"r{n}", "said": f"words {n}", "short": f"w{n}", "many": [f"w{n}", f"v{n}"]} for n in range(20)]


def settings(source, **changes):
    return Data(**{"source": str(source), "prompt": "Say: {said}", "target": "{short}", **changes})


def found(block, folder, samples=None, seed=0):
    return data.examples(block, folder, "evaluation", samples, seed)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path, ending):
    file = tmp_path / f"test.{ending}"
    frame = pandas.DataFrame([{k: row[k] for k in ("id", "said", "short")} for row in ROWS])
    if ending == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    elif ending == "json":
        frame.to_json(file, orient="records")
    elif ending == "csv":
        frame.to_csv(file, index=False)
    else:
        frame.to_parquet(file)
    for source in (file, tmp_path):
        examples = found(settings(source), tmp_path)
        assert examples[3] == Example("r3", "Say: words 3", ["w3"])
        assert len(examples) == 20


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_lists_of_references(file, tmp_path):
    assert found(settings(file, target="{many}"), tmp_path)[0].references == ["w0", "v0"]
    assert found(settings(file, target=["{short}", "the {short}"]), tmp_path)[0].references == ["w0", "the w0"]


def test_samples_are_drawn_with_the_seed_and_keep_the_order(file, tmp_path):
    once, again, other = (found(settings(file), tmp_path, 6, seed) for seed in (0, 0, 1))
    assert once == again != other
    numbers = [int(e.id[1:]) for e in once]
    assert numbers == sorted(set(numbers))


def test_the_digest_tells_examples_apart(file, tmp_path):
    a, b = found(settings(file), tmp_path), found(settings(file, prompt="{said}"), tmp_path)
    assert data.examples_digest(a) == data.examples_digest(list(a)) != data.examples_digest(b)


def test_braces_can_be_written(file, tmp_path):
    assert found(settings(file, prompt="{{{said}}}"), tmp_path)[0].prompt == "{words 0}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "test.jsonl: has no rows"),
        ('{"said": "a"}\n', "test.jsonl, row 1: the field 'short' that the target names isn't there; the row has said"),
        ('{"said": null, "short": "x"}\n', "test.jsonl, row 1: the field 'said' that the prompt names is empty"),
        ('{"said": "a", "short": " "}\n', "test.jsonl, row 1: the target is empty"),
        ('{"said": "a"\n', "test.jsonl:1: not JSON: "),
        ('["a"]\n', "test.jsonl:1: an object is wanted on each line"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_row(tmp_path, text, message):
    (tmp_path / "test.jsonl").write_text(text)
    with pytest.raises(DataError) as caught:
        found(settings(tmp_path), tmp_path)
    assert message in str(caught.value)


def test_places_that_are_not_there(tmp_path, file):
    with pytest.raises(DataError, match="there is no file or folder"):
        found(settings("./nowhere.jsonl"), tmp_path)
    with pytest.raises(DataError, match=r"has no split 'dev' .*; it has test"):
        found(settings(tmp_path, splits={"evaluation": "dev"}), tmp_path)
    with pytest.raises(DataError, match="names no split for evaluation; it has train"):
        found(settings(tmp_path, splits={"train": "test"}), tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"bad\.parquet: can't be read"):
        found(settings(tmp_path / "bad.parquet"), tmp_path)
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bad\.jsonl: not UTF-8"):
        found(settings(tmp_path / "bad.jsonl"), tmp_path)


def test_a_hub_id_without_datasets_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingPackage, match=r"pip install 'datasets>="):
        found(settings("someone/some-data"), tmp_path)


def test_shots_stand_before_each_prompt_and_are_never_the_example_itself(file, tmp_path):
    file.with_name("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    plain, shot = found(settings(tmp_path), tmp_path), found(settings(tmp_path, shots=3, shot_separator="\n--\n"), tmp_path)
    written = {f"Say: {row['said']} {row['short']}" for row in ROWS}
    firsts = []
    for before, after in zip(plain, shot, strict=True):
        *shots, last = after.prompt.split("\n--\n")
        assert (last, after.references, after.id) == (before.prompt, before.references, before.id)
        assert len(set(shots)) == 3
        assert set(shots) <= written
        assert not any(text.startswith(f"{before.prompt} ") for text in shots)
        firsts.append(tuple(shots))
    common = max(set(firsts), key=firsts.count)
    assert firsts.count(common) == 17, "the same for all but the three that are examples themselves"
    assert found(settings(tmp_path, shots=3), tmp_path, samples=2)[0].prompt.split("\n\n")[:2] == list(common[:2])
    assert found(settings(tmp_path, shots=3, seed=1), tmp_path)[0].prompt != shot[0].prompt
    assert data.examples(settings(tmp_path, shots=3), tmp_path, "train", 20, 0) == plain, "calibration and training have none"
    with pytest.raises(DataError, match=r"data\.shots: 20 are wanted and the train split has 19 other examples"):
        found(settings(tmp_path, shots=20), tmp_path)
