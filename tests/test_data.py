"""Rows become examples; what is wrong with data is named by file and row."""

import json

import pandas
import pytest

from compress import data, rows
from compress.errors import DataError, MissingPackage
from compress.methods import Example
from compress.recipe import Data

ROWS = [{"id": f"r{n}", "said": f"words {n}", "short": f"w{n}", "many": [f"w{n}", f"v{n}"]} for n in range(20)]


def settings(source, **changes):
    return Data(**{"source": str(source), "prompt": "Say: {said}", "target": "{short}", **changes})


def examples_of(block, folder, samples=None, seed=0):
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
        examples = examples_of(settings(source), tmp_path)
        assert examples[3] == Example("r3", "Say: words 3", ["w3"])
        assert len(examples) == 20


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_lists_of_references(file, tmp_path):
    assert examples_of(settings(file, target="{many}"), tmp_path)[0].references == ["w0", "v0"]
    assert examples_of(settings(file, target=["{short}", "the {short}"]), tmp_path)[0].references == ["w0", "the w0"]


def test_samples_are_drawn_with_the_seed_and_keep_the_order(file, tmp_path):
    once, again, other = (examples_of(settings(file), tmp_path, 6, seed) for seed in (0, 0, 1))
    assert once == again != other
    numbers = [int(e.id[1:]) for e in once]
    assert numbers == sorted(set(numbers))


def test_the_digest_tells_examples_apart(file, tmp_path):
    a, b = examples_of(settings(file), tmp_path), examples_of(settings(file, prompt="{said}"), tmp_path)
    assert data.examples_digest(a) == data.examples_digest(list(a)) != data.examples_digest(b)


def test_braces_can_be_written(file, tmp_path):
    assert examples_of(settings(file, prompt="{{{said}}}"), tmp_path)[0].prompt == "{words 0}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "test.jsonl: has no rows"),
        ('{"said": "a"}\n', "test.jsonl: the field 'short' that the target names isn't there; the columns are said"),
        ('{"said": null, "short": "x"}\n', "test.jsonl, row 1: the field 'said' that the prompt names is empty"),
        ('{"said": "a", "short": " "}\n', "test.jsonl, row 1: the target is empty"),
        ('{"said": "a"\n', "test.jsonl:1: not JSON: "),
        ('["a"]\n', "test.jsonl:1: an object is expected on each line"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_row(tmp_path, text, message):
    (tmp_path / "test.jsonl").write_text(text)
    with pytest.raises(DataError) as caught:
        examples_of(settings(tmp_path), tmp_path)
    assert message in str(caught.value)


def test_places_that_are_not_there(tmp_path, file):
    with pytest.raises(DataError, match="there is no file or folder"):
        examples_of(settings("./nowhere.jsonl"), tmp_path)
    with pytest.raises(DataError, match=r"has no split 'dev' .*; it has test"):
        examples_of(settings(tmp_path, splits={"evaluation": "dev"}), tmp_path)
    with pytest.raises(DataError, match="names no split for evaluation; it has train"):
        examples_of(settings(tmp_path, splits={"train": "test"}), tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"bad\.parquet: can't be read"):
        examples_of(settings(tmp_path / "bad.parquet"), tmp_path)
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bad\.jsonl: not UTF-8"):
        examples_of(settings(tmp_path / "bad.jsonl"), tmp_path)


def test_a_hub_id_without_datasets_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingPackage, match=r"pip install 'datasets>="):
        examples_of(settings("someone/some-data"), tmp_path)


def test_shots_stand_before_each_prompt_and_are_never_the_example_itself(file, tmp_path):
    file.with_name("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    plain, shot = examples_of(settings(tmp_path), tmp_path), examples_of(settings(tmp_path, shots=3, shot_separator="\n--\n"), tmp_path)
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
    assert examples_of(settings(tmp_path, shots=3), tmp_path, samples=2)[0].prompt.split("\n\n")[:2] == list(common[:2])
    assert examples_of(settings(tmp_path, shots=3, seed=1), tmp_path)[0].prompt != shot[0].prompt
    assert data.examples(settings(tmp_path, shots=3), tmp_path, "train", 20, 0) == plain, "calibration and training have none"
    with pytest.raises(DataError, match=r"data\.shots: 20 examples are needed, and the train split has only 19 others"):
        examples_of(settings(tmp_path, shots=20), tmp_path)


def write(folder, rows, name="test.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_empty_rows_are_left_out_and_counted_or_refused(tmp_path):
    cells = ["a b", "", None, " \n", "c"]
    write(tmp_path, [{"said": cell, "short": short} for cell in cells for short in ("x", " ", None)] + [{"said": "no target"}])
    dataset = data.Dataset(settings(tmp_path), tmp_path)
    assert [(e.id, e.prompt) for e in dataset.examples("evaluation", None, 0)] == [("0", "Say: a b"), ("12", "Say: c")]
    assert len(dataset.examples("evaluation", 1, 0)) == 1
    (split,) = dataset.splits()
    assert (split.name, split.rows, split.empty, split.why_empty) == ("test.jsonl", 16, 14, "row 2: the target is empty")
    with pytest.raises(DataError, match=r"test\.jsonl, row 2: the target is empty; 14 of 16 rows are empty, and data\.empty is refuse"):
        examples_of(settings(tmp_path, empty="refuse"), tmp_path)
    write(tmp_path, [{"said": "a", "short": ""}] * 3)
    with pytest.raises(DataError, match=r"row 1: the target is empty; all 3 rows are empty"):
        examples_of(settings(tmp_path), tmp_path)


def test_one_blank_field_of_several_and_a_constant_prompt_are_no_emptiness(tmp_path):
    write(tmp_path, [{"said": "a", "more": "", "short": 0, "many": ["", "b"]}])
    assert examples_of(settings(tmp_path, prompt="{said}|{more}"), tmp_path)[0].prompt == "a|"
    assert examples_of(settings(tmp_path, prompt="go on", target="{many}"), tmp_path)[0] == Example("0", "go on", ["", "b"])


def test_drawing_passes_over_empty_rows_and_is_the_same_without_them(tmp_path, file):
    before = examples_of(settings(file), tmp_path, 6)
    write(tmp_path, [row for full in ROWS for row in (full, {**full, "short": ""})])
    assert examples_of(settings(file), tmp_path, 6) == before


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"lang": "de"}, [0, 1]), ({"lang": ["de", "fr"]}, [0, 1, 4]), ({"lang": "de", "n": 1}, [1]), ({"good": True}, [0, 4]),
        ({"n": [2.0, 4]}, [2, 4]), ({"n": "1"}, [1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_rows_are_kept_by_the_values_of_their_fields(tmp_path, where, kept, ending):
    langs, good = ["de", "de", "en", None, "fr"], [True, False, False, False, True]
    frame = pandas.DataFrame({"said": list("abcde"), "short": "x", "lang": langs, "n": range(5), "good": good})
    if ending == "jsonl":
        frame.to_json(tmp_path / "test.jsonl", orient="records", lines=True)
    elif ending == "csv":
        frame.to_csv(tmp_path / "test.csv", index=False)
    else:
        frame.to_parquet(tmp_path / "test.parquet")
    dataset = data.Dataset(settings(tmp_path, where=where), tmp_path)
    assert [int(example.id) for example in dataset.examples("evaluation", None, 0)] == kept
    assert dataset.splits()[0].filtered == 5 - len(kept)


def test_a_filter_that_leaves_nothing_says_what_there_is(tmp_path):
    write(tmp_path, [{**row, "lang": "en"} for row in ROWS])
    with pytest.raises(DataError, match=r"data\.where leaves out all of its 20 rows; lang is 'en' \(20\)"):
        examples_of(settings(tmp_path, where={"lang": "de"}), tmp_path)
    with pytest.raises(
        DataError, match=r"the field 'language' that data\.where names isn't there; the columns are id, said, short, many, lang"
    ):
        examples_of(settings(tmp_path, where={"language": "de"}), tmp_path)


def test_joined_texts_are_one_with_their_empty_rows(tmp_path):
    write(tmp_path, [{"text": text} for text in ("= A =", "", "b c", None, "d")])
    block = Data(source=str(tmp_path), text="{text}", join="\n\n", samples=2, empty="refuse")
    dataset = data.Dataset(block, tmp_path)
    assert dataset.examples("evaluation", 2, 0) == [Example("test", "= A =\n\n\n\nb c\n\n\n\nd", [])]
    assert dataset.splits()[0].empty == 0, "nothing is left out"
    block = Data(source=str(tmp_path), text="{text}", join="\n\n", samples=2)
    write(tmp_path, [{"text": "a"}, {"text": ""}, {"text": "b"}], "train.jsonl")
    assert [e.prompt for e in data.examples(block, tmp_path, "train", 9, 0)] == ["a", "b"], "calibration and training draw rows"


def test_a_file_is_read_once_and_a_later_change_is_seen(tmp_path, file):
    dataset = data.Dataset(settings(file), tmp_path)
    before = dataset.examples("evaluation", None, 0)
    assert not data.compared(dataset.splits())[0].changed
    file.write_text(file.read_text().replace("words 3", "words three"))
    assert dataset.examples("train", None, 0) == before
    assert data.compared(dataset.splits())[0].changed
    file.unlink()
    assert data.compared(dataset.splits())[0].changed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.csv", b"a,b\n1\n", "test.csv:2: 1 cells where the header has 2"),
        ("test.csv", b"said,said,short\na,b,c\n", "test.csv:1: its header has 'said' twice"),
        ("test.csv", "said,short\nä,b\n".encode("latin-1"), "test.csv: not UTF-8"),
        ("test.jsonl", b'{"said": "a", "short": "b"}\n{"said": "c", "sho', "test.jsonl:2: not JSON: "),
        ("test.jsonl", b'{"said": {"a": 1}, "short": "b"}\n', "the field 'said' that the prompt names holds dict, text is expected"),
        ("test.json", b'{"data": []}', "test.json: a list of objects is expected"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        examples_of(settings(tmp_path), tmp_path)
    assert message in str(caught.value)


def test_a_byte_order_mark_and_a_long_cell_are_read(tmp_path):
    (tmp_path / "test.csv").write_bytes("﻿said,short\na,b\n".encode() + b"c" * 200_000 + b",d\n")
    assert [(e.prompt[:6], e.references) for e in examples_of(settings(tmp_path), tmp_path)] == [("Say: a", ["b"]), ("Say: c", ["d"])]


def test_a_split_that_is_a_folder_and_a_file_of_another_kind_are_said(tmp_path):
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"its split 'test' is a folder, test; a file of jsonl, json, csv or parquet is expected"):
        examples_of(settings(tmp_path), tmp_path)
    (tmp_path / "wiki.test.raw").write_text("a")
    with pytest.raises(DataError, match=r"wiki\.test\.raw: is none of jsonl, json, csv and parquet"):
        examples_of(settings(tmp_path / "wiki.test.raw"), tmp_path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_a_head_is_the_beginning_of_a_file(tmp_path, ending, monkeypatch):
    frame = pandas.DataFrame([{"said": f"words {n}", "short": "x"} for n in range(500)])
    file = tmp_path / f"test.{ending}"
    if ending in ("jsonl", "json"):
        frame.to_json(file, orient="records", lines=ending == "jsonl")
    else:
        frame.to_csv(file, index=False) if ending == "csv" else frame.to_parquet(file)
    monkeypatch.setattr(rows, "HEAD_BYTES", 2000)
    table = rows.head(file, 40)
    assert (table.columns, table.whole, len(table.rows), table.rows[39]["said"]) == (["said", "short"], False, 40, "words 39")
    if ending != "json":
        assert rows.head(file, 500).whole
    if ending == "jsonl":
        file.write_text(file.read_text()[:-5])
        with pytest.raises(DataError, match=r"test\.jsonl: its last line: not JSON"):
            rows.head(file, 40)
