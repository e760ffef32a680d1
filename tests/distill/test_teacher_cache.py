"""The teacher's likeliest tokens on disk: what a student learns from them is what it would from the teacher itself, but for the others."""

import errno
import gc
import math
import shutil
import weakref
from dataclasses import replace

import pytest
import torch

from compress.distill import _pair, _teacher_cache
from compress.distill._divergence import divergence_over
from compress.errors import ModelError, NoSpace
from compress.methods import Context, Example, find
from compress.model.loading import load_model
from compress.training.material import read
from tests.blocks import bundle, examples
from tests.distill.pairs import counted, distil, divergence, inputs_of, softened, source, two
from tests.test_early_stopping import looks
from tests.test_training import until

ONE = {"steps": 1, "batch_size": 6, "label_weight": 0}


def seen(place, **changes):
    return Context("cpu", until(None, []), **{"examples": examples(), "max_tokens": 32, "cache": place, **changes})


def told(folder, kind, tokenizer, example):
    """The logits of one example at the positions that count, in float64."""
    model = load_model(source(folder, kind, "float64"), "cpu")
    inputs, where, _ = inputs_of(model, tokenizer, example)
    with torch.no_grad():
        return counted(model(**inputs).logits, where)


def together(teacher, student, k):
    """Probabilities of the teacher's k likeliest tokens and of all others together, as each of the two has them."""
    top = teacher.topk(k).indices
    return [torch.cat([p.gather(-1, top), 1 - p.gather(-1, top).sum(-1, keepdim=True)], -1) for p in (teacher, student)]


@pytest.mark.parametrize(("kind", "how", "temperature"), [
    ("t5", "forward", 1), ("t5", "reverse", 2), ("t5", "jensen-shannon", 4), ("llama", "forward", 2.5), ("llama", "jensen-shannon", 2),
])  # fmt: skip
def test_the_loss_is_over_the_likeliest_tokens_and_any_other(tmp_path, losses, kind, how, temperature):
    teacher, student = two(kind, tmp_path)
    distil("logits", bundle(student, kind), teacher, seen(tmp_path / "c"), top_k=5, divergence=how, temperature=temperature, **ONE)
    tokenizer, total, count = bundle(student, kind).tokenizer, 0.0, 0
    for example in examples():
        teacher_shares, student_shares = (softened(told(folder, kind, tokenizer, example), temperature) for folder in (teacher, student))
        teacher_shares, student_shares = together(teacher_shares, student_shares, 5)
        total += divergence(student_shares.log(), teacher_shares.log(), how, 1) * temperature**2
        count += len(teacher_shares)
    assert losses == [pytest.approx(total / count, rel=2e-3)], "logits are kept in float16"


@pytest.mark.parametrize("how", ["forward", "reverse", "jensen-shannon"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_its_slope_is_that_of_the_sums(how, temperature):
    """Of a vocabulary of 9 in an embedding of 11 rows, by differences of the loss."""
    torch.manual_seed(0)
    teacher_logits, student_logits = 3 * torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    tokens, settings = teacher_logits.topk(3).indices, find("distill", "logits").Settings(divergence=how, temperature=temperature)
    shares, _ = together(softened(teacher_logits, temperature), softened(teacher_logits, temperature), 3)
    assert torch.autograd.gradcheck(lambda logits: divergence_over(logits, tokens, shares.log(), 9, settings), (student_logits,))


@pytest.mark.parametrize("temperature", [1, 3])
def test_the_mass_of_all_others_is_exact(tmp_path, temperature):
    teacher, student = two("bart", tmp_path)
    place = seen(tmp_path / "c")
    toy, tokenizer = bundle(student, "bart"), bundle(student, "bart").tokenizer
    material = read(toy.model, tokenizer, place)
    kept = _teacher_cache.teacher_cache(bundle(teacher, "bart"), toy.model, material, 4, temperature, place)
    tokens, log_shares = kept.of([2, 0], temperature, torch.device("cpu"))
    logits = torch.cat([told(teacher, "bart", tokenizer, examples()[number]) for number in (2, 0)])
    assert torch.equal(tokens, logits.topk(4).indices)
    expected = softened(logits, temperature)
    assert log_shares.exp().sum(-1).tolist() == pytest.approx([1.0] * len(log_shares), abs=1e-6)
    assert torch.allclose(log_shares[:, -1].double().exp(), 1 - expected.gather(-1, tokens).sum(-1), rtol=1e-3)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_all_tokens_but_one_are_as_good_as_the_teacher(tmp_path, kind, losses):
    teacher, student = two(kind, tmp_path)
    size = bundle(student, kind).model.config.vocab_size
    how = {"steps": 8, "batch_size": 3, "learning_rate": 1e-4, "early_stopping": {"every": 4, "patience": 9}}
    live = seen(tmp_path / "c", validation=examples(10)[6:])
    distil("logits", bundle(student, kind), teacher, live, **how)
    expected, losses[:] = list(losses), []
    cached = seen(tmp_path / "c", validation=examples(10)[6:])
    distil("logits", bundle(student, kind), teacher, cached, top_k=size - 1, **how)
    assert losses == pytest.approx(expected, rel=2e-3)
    assert looks(cached) == pytest.approx(looks(live), rel=2e-3)


def test_what_is_there_is_used_again_without_the_teacher(tmp_path, monkeypatch, losses):
    teacher, student = two("llama", tmp_path)
    first = seen(tmp_path / "c")
    distil("logits", bundle(student, "llama"), teacher, first, top_k=5, temperature=2, **ONE)
    (line,) = (sentence for sentence in first.said if "likeliest" in sentence)
    assert "the teacher's 5 likeliest tokens at" in line
    assert line.endswith("bytes a token")
    loaded, plain = [], _pair.frozen
    monkeypatch.setattr(_pair, "frozen", lambda teacher_bundle: loaded.append(teacher_bundle) or plain(teacher_bundle))
    distil("logits", bundle(student, "llama"), teacher, seen(tmp_path / "c"), top_k=5, temperature=4, **ONE)
    assert loaded == [], "the usual temperatures are all there"
    for change in ({"top_k": 6}, {"top_k": 5, "temperature": 2.5}):
        distil("logits", bundle(student, "llama"), teacher, seen(tmp_path / "c"), **change, **ONE)
    distil("logits", bundle(student, "llama"), student, seen(tmp_path / "c"), top_k=5, **ONE)
    assert len(loaded) == 3, "other tokens, temperature, teacher"
    assert len(list((tmp_path / "c").iterdir())) == 4
    other = [*examples()[:5], Example("5", "the cat sat", ["a dog"])]
    distil("logits", bundle(student, "llama"), teacher, seen(tmp_path / "c", examples=other), top_k=5, **ONE)
    assert len(loaded) == 4, "other examples"


def test_the_teacher_is_gone_when_the_student_is_trained(tmp_path, monkeypatch, losses):
    teacher, student = two("t5", tmp_path)
    loaded, plain, alive = [], _pair.frozen, []
    monkeypatch.setattr(_pair, "frozen", lambda teacher_bundle: loaded.append(weakref.ref(plain(teacher_bundle))) or loaded[-1]())
    told = seen(tmp_path / "c")
    there = replace(told, progress=lambda what, *_: alive.append(loaded[0]() is not None) if what.startswith("training") else gc.collect())
    distil("logits", bundle(student, "t5"), teacher, there, top_k=5, **ONE)
    assert alive == [False]


@pytest.fixture
def small_files(monkeypatch):
    """Two examples a file."""
    monkeypatch.setattr(_teacher_cache, "FILE_ROWS", 2)


def test_a_damaged_file_is_made_again(tmp_path, small_files, losses):
    teacher, student = two("t5", tmp_path)
    distil("logits", bundle(student, "t5"), teacher, seen(tmp_path / "c"), top_k=5, **ONE)
    damaged, *others = sorted((tmp_path / "c").rglob("*.safetensors"))
    assert len(others) == 2
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-7])
    distil("logits", bundle(student, "t5"), teacher, seen(tmp_path / "c"), top_k=5, **ONE)
    assert damaged.read_bytes() == whole
    assert losses[0] == losses[1]


def test_two_runs_that_begin_together_share_the_work(tmp_path, small_files, monkeypatch, losses):
    teacher, student = two("t5", tmp_path)
    calls, plain = [], _teacher_cache._told

    def and_another_run(*arguments):
        calls.append(len(calls))
        if len(calls) == 1:  # the other run does all while this one is at its first file
            distil("logits", bundle(student, "t5"), teacher, seen(tmp_path / "c"), top_k=5, **ONE)
        return plain(*arguments)

    monkeypatch.setattr(_teacher_cache, "_told", and_another_run)
    distil("logits", bundle(student, "t5"), teacher, seen(tmp_path / "c"), top_k=5, **ONE)
    assert len(calls) == 1 + 3
    assert losses[0] == losses[1]
    assert all(file.suffix == ".safetensors" for file in (tmp_path / "c").rglob("*.*"))


def test_a_full_disk_leaves_what_is_whole(tmp_path, small_files, monkeypatch):
    teacher, student = two("t5", tmp_path)
    plain, written = _teacher_cache.save_file, []

    def full(tensors, file):
        plain(tensors, file)
        written.append(file)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_teacher_cache, "save_file", full)
    with pytest.raises(
        NoSpace, match=r"the disk filled while the teacher's logits .* 1 of 3 files were made and stay; .* lower top_k, which is 5"
    ):
        distil("logits", bundle(student, "t5"), teacher, seen(tmp_path / "c"), top_k=5, **ONE)
    assert len(list((tmp_path / "c").rglob("*.*"))) == 1
    distil("logits", bundle(student, "t5"), teacher, seen(tmp_path / "c"), top_k=5, **ONE)
    assert len(written) == 4, "what was whole is not made again"


def test_a_disk_that_is_too_small_is_seen_at_the_first_file(tmp_path, small_files, monkeypatch):
    teacher, student = two("t5", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(NoSpace, match=r"the teacher's logits will take about 0 MiB more, and .* has 0 MiB free"):
        distil("logits", bundle(student, "t5"), teacher, seen(tmp_path / "c"), top_k=5, **ONE)
    assert list((tmp_path / "c").rglob("*.*")) == []


@pytest.mark.parametrize(("kind", "k", "expected"), [
    ("t5", math.inf, "top_k: .* of a vocabulary of .* leaves no other"), ("bert", 5, "top_k: is for models that write"),
])  # fmt: skip
def test_what_cannot_be_kept_is_refused(tmp_path, kind, k, expected):
    teacher, student = two(kind, tmp_path)
    k = bundle(student, kind).model.config.vocab_size if k == math.inf else k
    with pytest.raises(ModelError, match=expected):
        distil("logits", bundle(student, kind), teacher, seen(tmp_path / "c", examples=examples(label=kind == "bert")), top_k=k, **ONE)
