"""Recipes: what is read, what is refused and how that is said."""

import textwrap

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compress import methods, recipe, yamlfile
from compress.errors import RecipeError

GOOD = """\
version: 1
model: {id: builtin, task: seq2seq}
data:
  source: builtin
  prompt: "summarize: {dialogue}"
  target: "{summary}"
stages:
  - quantize: bnb_nf4
    double_quant: true
check:
  rougeL: {max_drop: 1.0}
"""


def load(tmp_path, text, *overrides):
    path = tmp_path / "x.yaml"
    path.write_text(textwrap.dedent(text))
    return recipe.load(path, overrides)


def mistakes(tmp_path, text, *overrides):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(str(tmp_path) + "/", "").split("\n")


def test_a_good_recipe_is_read_with_its_defaults(tmp_path):
    recipe = load(tmp_path, GOOD)
    assert recipe.stages[0].as_written() == {"quantize": "bnb_nf4", "ignore": None, "double_quant": True, "compute_dtype": "auto"}
    assert recipe.groups == ("rouge", "generated_tokens")
    assert recipe.benchmark.batch_sizes == [1, 8]  # benchmarks/standard.yaml, the default
    assert recipe.name == "x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("version: 1", "version: 2"), "x.yaml:1: version: 2 is not 1"),
        (("task: seq2seq", "task: seq2sec"), "x.yaml:2: model.task: 'seq2sec' is not one of seq2seq, causal-lm, sequence-classification; did you mean 'seq2seq'?"),
        (("task: seq2seq", "task: seq2seq, dtyp: float16"), "x.yaml:2: model.dtyp: unknown key 'dtyp'; did you mean 'dtype'?"),
        (("quantize: bnb_nf4", "quantize: bnb_nf5"), "x.yaml:8: stages[0].quantize: there is no method 'bnb_nf5'; did you mean 'bnb_nf4'?"),
        (("double_quant: true", "double_quant: 5"), "x.yaml:9: stages[0] (quantize: bnb_nf4): double_quant: 5 is not true or false"),
        (("double_quant: true", "compute_dtype: float31"), "x.yaml:9: stages[0] (quantize: bnb_nf4): compute_dtype: 'float31' is not one of auto, float32, bfloat16, float16; did you mean 'float32'?"),
        (("double_quant", "doublequant"), "x.yaml:9: stages[0] (quantize: bnb_nf4): doublequant: unknown key 'doublequant'; did you mean 'double_quant'?"),
        (("rougeL:", "rougel:"), "x.yaml:11: check.rougel: 'rougel' is not a metric; did you mean 'rougeL'?"),
        (("rougeL:", "bleu:"), "x.yaml:11: check.bleu: bleu isn't measured by this recipe; put bleu under metrics"),
        (("{dialogue}", "{dialogue.x}"), "x.yaml:5: data.prompt: {dialogue.x} is not a plain field such as {dialogue}; a literal brace is written {{ or }}"),
        (('  target: "{summary}"\n', ""), "x.yaml:3: data: target is missing; rouge can't be measured without"),
        (("stages:", "benchmark: standart\nstages:"), "x.yaml:7: benchmark: there is no benchmark 'standart'; did you mean 'standard'?"),
        (("check:\n  rougeL: {max_drop: 1.0}", "check: mlperf"), "x.yaml:10: check: there is no check 'mlperf'; did you mean 'mlperf-99'?"),
        (("stages:", "benchmark: {confidence: 1.5}\nstages:"), "x.yaml:7: benchmark.confidence: 1.5 is too large; it must be below 1.0"),
        (("stages:", "metrics: [rogue]\nstages:"), "x.yaml:7: metrics[0]: 'rogue' is not a metric group; did you mean 'rouge'?"),
        (("stages:", "metrics: [accuracy]\nstages:"), "x.yaml:7: metrics[0]: accuracy can't be measured on task seq2seq"),
        (("stages:", "generation: {max_new_tokens: 0}\nstages:"), "x.yaml:7: generation.max_new_tokens: 0 is less than 1"),
        (
            ("stages:", "generation: {do_sample: true, num_beams: 4}\nstages:"),
            "x.yaml:7: generation: do_sample: true draws single outputs, and num_beams is 4; give one of the two",
        ),
        (("rougeL:", "lm_eval:mmlu:acc:"), "x.yaml:11: check.lm_eval:mmlu:acc: lm_eval:mmlu:acc isn't measured by this recipe; put lm_eval:mmlu under metrics"),
        (("stages:", "generation: {top_p: 0.9}\nstages:"), "x.yaml:7: generation: top_p only count with do_sample: true"),
        (
            ("stages:", "benchmark: {runtime: {compile: true}}\nstages:"),
            "x.yaml:7: benchmark: runtime: compile: true needs cache: static; transformers compiles steps only over a cache of fixed length",
        ),
        (
            ("stages:", "benchmark: {runtime: {compile: true, cache: static, cpu_int8: true}}\nstages:"),
            "x.yaml:7: benchmark: runtime: compile and cpu_int8 exclude each other: torch.compile can't look into FBGEMM's packed weights; "
            "leave one out",
        ),
        (("max_drop", "max_rise"), "x.yaml:11: check.rougeL: max_rise makes no sense, rougeL is better higher; use max_drop or min_ratio"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_file_line_and_key(tmp_path, change, message):
    assert mistakes(tmp_path, GOOD.replace(*change))[0] == message


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("quantize: gptq, bits: 5", "bits: 5 is not one of 2, 3, 4, 8, nor a mapping of keys to values, nor auto"),
        ("quantize: gptq, bits: {q: 9}", "bits.q: 9 is not one of 2, 3, 4, 8"),
        ("quantize: gptq, bits: {}", "bits: is empty; at least one entry is expected"),
        ("prune: depth, drop: few", "drop: 'few' is not a whole number, nor a mapping of keys to values"),
        ("prune: depth, drop: 0", "drop: 0 is less than 1"),
        ("prune: depth, drop: {encoder: -1}", "drop.encoder: -1 is less than 0"),
        ("prune: depth, drop: {encodr: 1}", "drop.encodr: unknown key 'encodr'; did you mean 'encoder'?"),
        ("prune: magnitude, sparsity: 1", "sparsity: 1 is too large; it must be below 1.0"),
    ],
)
def test_a_key_of_several_forms_is_explained_once(tmp_path, stage, message):
    lines = mistakes(tmp_path, GOOD[: GOOD.index("stages:")] + "stages: [{" + stage + "}]\n")
    assert [line.split("): ", 1)[1] for line in lines] == [message]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("rouge: {tokenizer: word}", "metrics[0].rouge.tokenizer: 'word' is not one of auto, latin, words, characters; did you mean 'words'?"),
        ("rouge: {tokeniser: words}", "metrics[0].rouge.tokeniser: unknown key 'tokeniser'; did you mean 'tokenizer'?"),
        ("rogue: {tokenizer: words}", "metrics[0].rogue: unknown key 'rogue'; did you mean 'rouge'?"),
        ("bleu: {tokenizer: flores200}", "metrics[0].bleu.tokenizer: flores200 downloads a vocabulary while it counts, and nothing is fetched then; take char, which suits any script"),
        ("{rouge: {}, bleu: {}}", "metrics[0]: each entry is one metric, as in `- rouge: {tokenizer: words}`; this has 2"),
        ("3", "metrics[0]: 3 is not text; put it in quotes, nor a mapping of keys to values"),
    ],
)  # fmt: skip
def test_a_metric_that_is_more_than_a_name(tmp_path, entry, message):
    assert mistakes(tmp_path, GOOD + f"metrics:\n- {entry}\n- rouge1\n")[0].partition(": ")[2] == message


def test_metrics_with_tokenizers_are_read_beside_plain_names(tmp_path):
    plain, cut = (
        load(tmp_path, GOOD + f"metrics: [{first}, bleu, chrf, exact_match, cer]\n")
        for first in ("rouge", "rouge: {tokenizer: characters}")
    )
    assert plain.groups == cut.groups == ("rouge", "bleu", "chrf", "exact_match", "cer")
    assert plain.as_written()["metrics"] == ["rouge", "bleu", "chrf", "exact_match", "cer"]
    assert (plain.tokenizers.rouge, cut.tokenizers.rouge) == ("auto", "characters")
    again = recipe.Recipe.model_validate({key: value for key, value in cut.as_written().items() if key != "stages"})
    assert again.tokenizers == cut.tokenizers
    decided = plain.decided_by([["Привет, мир"]])
    assert (decided.tokenizers.rouge, decided.digest) == ("words", plain.digest)


def test_every_mistake_is_told_at_once(tmp_path):
    text = GOOD.replace("version: 1", "version: one").replace("task: seq2seq", "task: x").replace("bnb_nf4", "nf4")
    assert len(mistakes(tmp_path, text)) == 3


def test_a_stage_after_a_packing_one_is_refused(tmp_path):
    text = GOOD.replace("    double_quant: true\n", "  - quantize: cast\n")
    assert mistakes(tmp_path, text) == [
        "x.yaml:9: stages[1]: `quantize: cast` can't follow `quantize: bnb_nf4`, whose output is packed: make that the last stage"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml:1: a mapping of keys to values is expected, this is empty"),
        ("- a\n- b", "x.yaml:1: a mapping of keys to values is expected, this is a list"),
        ("a: [1, 2", "x.yaml:2: not YAML: did not find expected ',' or ']'"),
        ("a: 1\nb: 2\na: 3", "x.yaml:3: a stands twice, first on line 1"),
        ("a: &x [1]\nb: *x", "x.yaml:2: aliases (*name) are not read; write the value out"),
        ("a: !!python/object/apply:os.system [ls]", "x.yaml:1: not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_at_all(tmp_path, text, message):
    assert mistakes(tmp_path, text)[0] == message


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: there is no such file"):
        recipe.load(tmp_path / "nowhere.yaml")


def test_overrides_are_read_as_yaml_and_named_in_mistakes(tmp_path):
    recipe = load(tmp_path, GOOD, "stages.0.double_quant=false", "data.samples=7", "generation.max_new_tokens=9")
    assert (recipe.stages[0].settings.double_quant, recipe.data.samples, recipe.generation.max_new_tokens) == (False, 7, 9)
    assert load(tmp_path, GOOD, "benchmark.turns=9").benchmark.turns == 9
    assert load(tmp_path, GOOD, "benchmark=quick", "benchmark.turns=9").benchmark.prompt_tokens == [64]
    assert mistakes(tmp_path, GOOD, "data.samples=few") == [
        "x.yaml with data.samples overridden: data.samples: 'few' is not a whole number"
    ]
    assert mistakes(tmp_path, GOOD, "stages.3.bits=4") == ["stages.3.bits=4: stages has 1 entries, numbered from 0; 3 is none of them"]
    assert mistakes(tmp_path, GOOD, "nonsense") == ["nonsense: a key and a value are expected, as in stages.0.bits=4"]
    assert mistakes(tmp_path, GOOD, "version.a=4") == ["version.a=4: version is 1 and has no key 'a'"]


def test_the_digest_names_what_a_run_depends_on(tmp_path):
    same = load(tmp_path, GOOD + "# a comment\n")
    other = load(tmp_path, GOOD, "data.seed=1")
    assert load(tmp_path, GOOD).digest == same.digest != other.digest


def test_a_shipped_recipe_is_found_by_its_name():
    assert recipe.load("quickstart").name == "quickstart"


def test_the_schema_knows_every_method_and_refuses_unknown_keys():
    schema = recipe.schema()
    stages = schema["properties"]["stages"]["items"]["anyOf"]
    assert {s["title"] for s in stages} == {f"{family}: {name}" for family, name, _ in methods.everyone()}
    assert schema["additionalProperties"] is False
    for family, name, method in methods.everyone():  # of two blocks with one name, one would stand for both
        for part, block in method.Settings.model_json_schema().get("$defs", {}).items():
            assert schema["$defs"][part] == block, f"{family}: {name}"
    assert not {"name", "folder", "text"} & schema["properties"].keys()


keys = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(keys, values, min_size=1, max_size=4))
def test_any_yaml_mapping_is_read_back_as_it_was_written(data):
    assert yamlfile.Document("x", yaml.safe_dump(data)).data == data


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_by_name(text):
    try:
        assert isinstance(yamlfile.Document("x.yaml", text).data, dict)
    except RecipeError as error:
        assert str(error).startswith("x.yaml:")


@given(st.dictionaries(st.sampled_from(["version", "model", "data", "stages", "check", "metrics", "benchmark", "generation"]), values))
def test_any_mapping_gives_a_recipe_or_named_mistakes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x.yaml"
    path.write_text(yaml.safe_dump(data))
    try:
        recipe.load(path)
    except RecipeError as error:
        assert all(line.startswith(str(path)) for line in str(error).split("\n"))


def test_what_one_reading_overrides_another_does_not_see(tmp_path):
    text = GOOD[: GOOD.index("check:")]
    assert load(tmp_path, text, "check.rougeL.max_drop=1").check
    assert load(tmp_path, text).check == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("artifacts", "can't be called artifacts"),
        ("sweeps", "can't be called sweeps"),
        ("a\nb", "without control characters"),
        ("r\udcff", "without control characters"),
        ("x" * 240, "at most 200 bytes"),
    ],
)
def test_names_that_reports_can_not_have_are_refused(tmp_path, name, message):
    file = tmp_path / f"{name}.yaml"
    file.write_text(GOOD)
    with pytest.raises(RecipeError, match=message):
        recipe.load(file)
