"""What is too long is cut within its content, against plain transformers on content that is cut by hand; templates that can't serve."""

import pytest

from compress import prompts
from compress.calibration.stream import encoded
from compress.data import examples
from compress.errors import DataError
from compress.methods import Example
from compress.prompts import Prompts
from compress.recipe import Data
from compress.results.stages import Cut
from compress.training.material import read
from tests.blocks import bundle, context
from tests.conftest import WORDS, make_tokenizer
from tests.measuring import reader

CHAT = "{% for m in messages %}a {{ m.role and m.content }} of {% endfor %}{% if add_generation_prompt %}it was{% endif %}"
LONG = " ".join(WORDS[(3 * n) % len(WORDS)] for n in range(40))


@pytest.fixture
def words():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def by_hand(words, content, limit, from_end=False):
    """The longest content, word by word, that plain transformers puts into so many tokens."""
    parts = content.split()
    for count in range(len(parts), -1, -1):
        kept = " ".join(parts[len(parts) - count :] if from_end else parts[:count])
        turn = [{"role": "user", "content": kept}]
        ids = words(words.apply_chat_template(turn, add_generation_prompt=True, tokenize=False), add_special_tokens=False)["input_ids"]
        if len(ids) <= limit:
            return ids
    raise AssertionError("the template alone is too long")


@pytest.mark.parametrize("limit", [4, 5, 9, 20, 43])
@pytest.mark.parametrize("from_end", [False, True])
def test_a_chat_prompt_keeps_its_template_whole(words, limit, from_end):
    ids, cut = Prompts(words, chat=True, keep_end=from_end).read(LONG, limit)
    assert cut
    assert ids == by_hand(words, LONG, limit, from_end)
    assert ids[-2:] == words("it was", add_special_tokens=False)["input_ids"]


def test_a_prompt_that_fits_is_as_it_was(words):
    assert Prompts(words, chat=True).read("the cat", 6) == (by_hand(words, "the cat", 6), False)
    with pytest.raises(DataError, match="3 tokens hold no prompt: the chat template alone takes 4; raise max_tokens"):
        Prompts(words, chat=True).read("the cat", 3)


def test_evaluation_calibration_and_training_have_the_same_ids(toys):
    bundled = bundle(toys["llama"], "llama")
    bundled.tokenizer.chat_template = CHAT
    target = "red dog"
    told = context(examples=[Example("0", LONG, [target])], max_tokens=16, chat=True)
    ((_, ids, answer),) = encoded(bundled.model, bundled.tokenizer, told)
    ((_, trained, learned),) = read(bundled.model, bundled.tokenizer, told).train
    room = 16 - len(answer)
    assert (ids, answer) == (trained, learned)
    assert answer == [*bundled.tokenizer(target, add_special_tokens=False)["input_ids"], bundled.tokenizer.eos_token_id]
    assert (
        reader(bundled.model, bundled.tokenizer, max_tokens=room, chat=True).read([LONG])[0]
        == ids[:room]
        == by_hand(bundled.tokenizer, LONG, room)
    )
    assert told.cut == [{"cut": 1, "all": 1, "limit": 16, "by_key": True}] * 2


def test_a_target_that_is_too_long_leaves_the_prompt_its_template(toys):
    bundled = bundle(toys["llama"], "llama")
    bundled.tokenizer.chat_template = CHAT
    ((_, ids, answer),) = encoded(
        bundled.model, bundled.tokenizer, context(examples=[Example("0", LONG, [LONG])], max_tokens=12, chat=True)
    )
    assert len(answer) == 6
    assert ids[:6] == by_hand(bundled.tokenizer, LONG, 6)
    with pytest.raises(DataError, match="the chat template alone takes 4"):
        encoded(bundled.model, bundled.tokenizer, context(examples=[Example("0", LONG, [LONG])], max_tokens=4, chat=True))


@pytest.mark.parametrize("chat", [False, True])
def test_the_recipes_own_words_around_a_field_stay(words, tmp_path, chat):
    (tmp_path / "test.jsonl").write_text(f'{{"said": "{LONG}", "who": "dog"}}')
    (example,) = examples(Data(source=str(tmp_path), prompt="big {who} sat {said} is small"), tmp_path, "evaluation", None, 0)
    assert example.prompt[slice(*example.content)] == LONG
    ids, _ = Prompts(words, chat).read(example, 14, unended=True)
    shown = words.decode(ids)
    kept = " ".join(LONG.split()[: 14 - 5 - 4 * chat])
    expected = f"big dog sat {kept} is small"
    assert shown == (f"a {expected} of it was" if chat else expected)
    ids, _ = Prompts(words).read(example, 14)
    assert ids[-1] == words.eos_token_id, "an encoder's end token stays"
    assert len(ids) == 14


def test_words_that_are_too_long_themselves_are_cut_like_the_rest(words):
    example = Example("0", f"{LONG} cat", [], (len(LONG) + 1, len(LONG) + 4))
    assert Prompts(words).read(example, 7, unended=True)[0] == words(LONG, add_special_tokens=False)["input_ids"][:7]
    assert Prompts(words, chat=True).read(example, 9)[0] == by_hand(words, f"{LONG} cat", 9)


REFUSALS = [
    ("{{ raise_exception('a system turn comes first') }}", "refuses a lone user turn: a system turn comes first"),
    ("{{ messages[0]['content'] + none_such.x }}", "refuses a lone user turn: 'none_such' is undefined"),
    ("a fixed text", "leaves out what the user says: 'a fixed text'"),
    (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}",
        "begins the assistant's turn by '<assistant>', and doesn't where",
    ),
]


@pytest.mark.parametrize(("template", "sentence"), REFUSALS)
def test_a_template_that_cannot_serve_is_refused(words, template, sentence):
    words.chat_template = template
    with pytest.raises(DataError, match=rf"^data\.chat: the model's chat template {sentence}"):
        prompts.check_template(words)


def test_a_user_turn_that_ends_in_the_opening_of_the_assistants_serves(words):
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[ {{ m.content }} ]{% else %} {{ m.content }}{% endif %}{% endfor %}"
    )
    prompts.check_template(words)


def test_many_cut_prompts_are_said_first():
    few, many = (
        Cut(where="the evaluation", cut=5, all=500, limit=64, key="data.max_tokens"),
        Cut(where="finetune: full", cut=6, all=500, limit=512, key=None),
    )
    assert few.share <= 0.01 < many.share
    assert few.sentence == "5 of the 500 prompts of the evaluation (1.0%) were cut to 64 tokens, more of which data.max_tokens lets in"
    assert many.sentence == "6 of the 500 prompts of finetune: full (1.2%) were cut to 512 tokens, which is the model's context"
