"""Sorted probabilities against sums written out in float64; two tokenizers over the same examples; what is left out and refused."""

import copy

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from compress.calibration.stream import encoded
from compress.distill import _pair
from compress.distill.universal import distance, matched
from compress.errors import DataError, ModelError
from compress.methods import Example, find
from compress.model.loading import load_model
from tests.blocks import bundle, context, examples
from tests.conftest import TASKS, WORDS, make_tokenizer
from tests.distill.pairs import counted, distil, inputs_of, outlives_a_kill, softened, source, two
from tests.finetune.loops import calm
from tests.test_training import STEPS

GENERATIVE = [kind for kind, task in TASKS.items() if task != "sequence-classification"]
LONG = {"examples": examples(), "max_tokens": 64}  # pieces of words are more than words


def halves(end=True):
    """A tokenizer that cuts words into pieces of two letters, with other numbers for them and for the end."""
    pieces = sorted({word[at : at + 2] for word in WORDS for at in range(0, len(word), 2)})
    vocabulary = {piece: number for number, piece in enumerate(["<pad>", "</s>", "<unk>", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    cut = pre_tokenizers.Split(Regex(".."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), cut])
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def unlike(kind, folder, end=True):
    """Folders of two models, the second of which reads pieces of words and has 50 tokens where the first has 64."""
    whole, other = calm(kind, folder / "words"), calm(kind, folder / "pieces", vocab_size=50)
    halves(end).save_pretrained(other)
    return whole, other


def by_hand(student_logits, teacher_logits, temperature):
    """The sums over ranks in float64, of positions one by one, as far as both go; and how many that are."""
    total, shared = 0.0, min(len(student_logits), len(teacher_logits))
    for ours, theirs in zip(student_logits[:shared].double(), teacher_logits[:shared].double(), strict=True):
        p, q = (sorted(softened(logits, temperature).tolist(), reverse=True) for logits in (ours, theirs))
        p, q = p + [0.0] * (len(q) - len(p)), q + [0.0] * (len(p) - len(q))
        total += sum(abs(a - b) for a, b in zip(p, q, strict=True))
    return total, shared


def summed(student, teacher, seen, temperature):
    """Over examples one by one in float64: the distance, the cross-entropy, the student's positions, and those that both have."""
    student_model, teacher_model = (copy.deepcopy(side.model).double() for side in (student, teacher))
    apart, hard, count, shared = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for example in seen:
            inputs, where, target = inputs_of(student_model, student.tokenizer, example)
            mine = counted(student_model(**inputs).logits, where)
            inputs, where, _ = inputs_of(teacher_model, teacher.tokenizer, example)
            theirs = counted(teacher_model(**inputs).logits, where)
            here, both = by_hand(mine, theirs, temperature)
            assert len(mine) != len(theirs) and mine.shape[1] != theirs.shape[1]
            apart, shared = apart + here, shared + both
            hard += float(cross_entropy(mine, target, reduction="sum"))
            count += len(target)
    return apart, hard, count, shared


@pytest.mark.parametrize("temperature", [1, 2, 4])
@pytest.mark.parametrize(("mine", "theirs"), [(50, 50), (50, 64), (64, 50)])
def test_the_distance_is_the_papers_written_out(mine, theirs, temperature):
    torch.manual_seed(0)
    student_logits, teacher_logits = 3 * torch.randn(7, mine), 2 * torch.randn(7, theirs)
    expected, _ = by_hand(student_logits, teacher_logits, temperature)
    assert float(distance(student_logits, teacher_logits, temperature)) == pytest.approx(expected, rel=1e-6)
    assert expected / 7 > 0.05


def test_by_hand_over_two_tokens_and_three():
    """Teacher 3/4 and 1/4, student 1/4, 1/2 and 1/4: 1/4 + 0 + 1/4."""
    student_logits, teacher_logits = torch.tensor([[0.25, 0.5, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert float(distance(student_logits, teacher_logits, 1)) == pytest.approx(0.5, abs=1e-6)


def test_which_token_is_probable_does_not_matter():
    torch.manual_seed(0)
    student_logits = torch.randn(3, 20)
    assert float(distance(student_logits, student_logits[:, torch.randperm(20)], 2)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("longer", ["teacher", "student"])
@pytest.mark.parametrize(("kind", "temperature"), [("t5", 1), ("bart", 2), ("llama", 4), ("gpt2", 1)])
def test_a_step_is_the_mean_over_the_positions_of_the_student(tmp_path, losses, kind, temperature, longer):
    """The reference reads one example at a time, so it has no padding; batches of two and steps of six are the method's own."""
    teacher, student = unlike(kind, tmp_path)[:: -1 if longer == "teacher" else 1]
    apart, hard, count, shared = summed(bundle(student, kind), bundle(teacher, kind), examples(), temperature)
    how = {"universal_weight": 0.7, "label_weight": 0.3, "temperature": temperature, "batch_size": 2, "accumulate": 3}
    distil("universal", bundle(student, kind), teacher, context(**LONG), steps=1, **how)
    assert len(losses) == 3
    assert sum(losses) == pytest.approx((0.7 * apart + 0.3 * hard) / count, abs=1e-6, rel=1e-6)
    assert apart / count > 0.02
    assert (shared == count) == (longer == "teacher")


@pytest.mark.parametrize("kind", GENERATIVE)
def test_the_student_comes_nearer_and_the_teacher_stays(tmp_path, monkeypatch, losses, kind):
    student, teacher = unlike(kind, tmp_path)
    seen, plain = [], _pair.teacher_of
    monkeypatch.setattr(_pair, "teacher_of", lambda *arguments: seen.append(plain(*arguments)) or seen[-1])
    distil("universal", bundle(student, kind), teacher, context(**LONG), steps=30, batch_size=6, learning_rate=1e-2, label_weight=0)
    assert losses[-1] < 0.5 * losses[0]
    (teacher_bundle,) = seen
    whole = load_model(source(teacher, kind), "cpu").state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in teacher_bundle.model.state_dict().items())
    assert not teacher_bundle.model.training


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path, losses):
    teacher, _ = two("llama", tmp_path)
    distil("universal", bundle(teacher, "llama"), teacher, steps=1, batch_size=6, label_weight=0)
    assert losses == [pytest.approx(0, abs=1e-5)]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_killed_distillation_ends_as_if_it_had_not_been(tmp_path, often, kind):
    student, teacher = unlike(kind, tmp_path)
    how = {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2}

    def distilled(told):
        return distil("universal", bundle(student, kind), teacher, told, **how)[0]

    left, steps = outlives_a_kill(distilled, tmp_path / "scratch", 4, max_tokens=64)
    assert left == ["checkpoint-3"]
    assert steps == [4, 5, 6, 7]


def test_early_stopping_looks_at_the_validation_split_by_both_tokenizers(tmp_path):
    student, teacher = unlike("llama", tmp_path)
    others = [*examples(10)[6:8], Example("odd", "the red cat", []), *examples(10)[8:]]
    told = context(examples=examples(), max_tokens=64, validation=others)
    how = {"early_stopping": {"every": 2, "patience": 9}, "learning_rate": 1e-2, "batch_size": 2, "universal_weight": 0.7}
    trained, _ = distil("universal", bundle(student, "llama"), teacher, told, steps=6, **how)
    best = min(point["validation"] for point in told.curve if point["validation"] is not None)
    apart, hard, count, _ = summed(trained, bundle(teacher, "llama"), [example for example in others if example.references], 1)
    assert best == pytest.approx((0.7 * apart + hard) / count, rel=1e-5)


def test_rows_are_matched_by_their_example(tmp_path, losses):
    """To a teacher whose tokenizer adds no end, a prompt of one token is too short; the examples behind it keep their places."""
    student, teacher = unlike("t5", tmp_path, end=False)
    seen = examples()
    odd = [*seen[:2], Example("odd", "a", ["the cat"]), *seen[2:]]
    told = context(examples=odd, max_tokens=64)
    mine, theirs = matched(bundle(student, "t5"), bundle(teacher, "t5"), told)
    assert [row[0] for row in mine] == [row[0] for row in theirs] == seen
    assert [ids for _, ids, _ in theirs] == [
        ids for _, ids, _ in encoded(load_model(source(teacher, "t5"), "cpu"), halves(False), context(**LONG))
    ]
    assert "by the teacher's tokenizer, 1 of the 7 examples had fewer than two tokens and were left out" in told.said
    assert "1 of the 7 targets have no tokens or no prompt by one of the two tokenizers and were left out" in told.said
    how = {"steps": 1, "batch_size": 6}
    for rows in (odd, seen):
        distil("universal", bundle(student, "t5"), teacher, context(examples=rows, max_tokens=64), **how)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_plain_texts_and_targets_behind_no_prompt_are_left_out(tmp_path):
    student, teacher = unlike("llama", tmp_path)
    odd = [Example("6", "the red cat", []), Example("7", "", ["the cat"]), *examples()]
    _, told = distil("universal", bundle(student, "llama"), teacher, context(examples=odd, max_tokens=64), steps=1, batch_size=6)
    assert "1 of 8 examples have no target and were left out" in told.said
    assert "1 of the 7 targets have no tokens or no prompt by one of the two tokenizers and were left out" in told.said
    assert any("steps of 6 on 6 examples" in message for message in told.said)
    for few, message in ((odd[:1], "none of the 1 examples has a target"), (odd[1:2], "none of the 1 targets has tokens and a prompt")):
        with pytest.raises(DataError, match=message):
            distil("universal", bundle(student, "llama"), teacher, context(examples=few))


def test_a_classifier_and_another_task_are_refused(toys):
    with pytest.raises(ModelError, match="a classifier has no vocabulary; `distill: logits` is for classifiers"):
        distil("universal", bundle(toys["bert"], "bert"), toys["bert"])
    with pytest.raises(ModelError, match="serves seq2seq, and the recipe's task is causal-lm"):
        distil("universal", bundle(toys["llama"], "llama"), toys["llama"], teacher={"id": str(toys["bart"])})


@pytest.mark.parametrize("options", [{"universal_weight": 0}, {"label_weight": -1}, {"temperature": 0}, {"divergence": "forward"}])
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        find("distill", "universal").Settings(**options)


def test_the_toys_tokenizers_cut_targets_differently():
    lengths = [[len(reader(example.references[0]).input_ids) for example in examples()] for reader in (make_tokenizer(), halves())]
    assert all(words < pieces for words, pieces in zip(*lengths, strict=True))
