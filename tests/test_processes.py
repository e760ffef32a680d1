"""Training in several processes: the same steps as one with as large a batch, the same ends, and one reason where it fails."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml
from safetensors.torch import load_file

from compress import artifacts, pipeline, recipe
from compress.errors import ChildDied, DataError, DeviceError, InputError, ModelError, RecipeError, RunError
from compress.execution import Execution
from compress.methods import Optimisation, everyone, quiet
from compress.model.source import Source
from compress.results.report import read_report
from compress.team import Team
from compress.training import sharded
from tests import together
from tests.blocks import bundle, context, saved
from tests.conftest import recipe_for
from tests.distill.pairs import two
from tests.finetune.loops import calm, halved, tune

STEPS = 5
HOW = {"steps": STEPS, "learning_rate": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def path():
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield


@pytest.fixture(scope="module")
def pair(path, tmp_path_factory):
    """Two processes that train together; each test leaves them ready for the next."""
    with Team("tests.together", tmp_path_factory.mktemp("pair") / "log", quiet, 2) as team:
        yield team


@pytest.fixture
def another(tmp_path):
    """Two that fail in the test."""
    with Team("tests.together", tmp_path / "log", quiet, 2) as team:
        yield team


def close(actual, expected):
    """Weights of two trainings that differ in the order of sums alone.

    AdamW divides by a gradient's size, so where that is near the rounding of float32, no two programs agree.
    """
    for name, tensor in expected.items():
        apart = (actual[name] - tensor).abs()
        assert (apart > 1e-4).double().mean() < 0.01, name
        assert apart.max() < 3e-2, name


CASES = [
    ("finetune", "full", "t5", {"batch_size": 2}, 8),
    ("finetune", "full", "llama", {"batch_size": 1, "accumulate": 2}, 8),
    ("finetune", "full", "llama", {"batch_size": 2}, 7),  # three for the last step of an epoch
    ("finetune", "full", "bert", {"batch_size": 2}, 5),  # one, so that the second process has none
    ("finetune", "full", "t5", {"batch_size": 2, "accumulate": 2, "steps": None, "epochs": 3}, 9),
    ("finetune", "lora", "gpt2", {"batch_size": 2, "rank": 4}, 8),
    ("distill", "logits", "llama", {"batch_size": 2}, 9),
    ("distill", "hidden", "t5", {"batch_size": 1, "accumulate": 2, "attention_weight": 0.5, "learning_rate": 1e-3}, 5),
    ("prune", "gradual", "llama", {"batch_size": 2, "sparsity": 0.5, "every": 1}, 7),
    ("finetune", "full", "llama", {"batch_size": 1, "accumulate": 2, "shard": True}, 8),
    ("finetune", "full", "bert", {"batch_size": 2, "shard": True}, 5),
    ("distill", "logits", "t5", {"batch_size": 2, "learning_rate": 1e-3, "shard": True}, 9),
    (
        "distill",
        "hidden",
        "llama",
        {"batch_size": 2, "attention_weight": 0.5, "shard": True, "student": {"config": {"hidden_size": 32}}},
        9,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "kind", "settings", "count"), CASES)
def test_two_processes_take_the_steps_of_one_with_twice_the_batch(pair, tmp_path, family, method, kind, settings, count):
    original, folder = two(kind, tmp_path) if family == "distill" else (None, calm(kind, tmp_path))
    arguments = {
        "family": family,
        "method": method,
        "kind": kind,
        "folder": str(folder),
        "original": str(original) if original else None,
        "count": count,
    }
    shared = pair.ask("train", out=str(tmp_path / "two"), settings={**HOW, **settings}, **arguments)
    split = settings.get("shard", False)
    twice = {name: value for name, value in {**HOW, **settings, "batch_size": 2 * settings["batch_size"]}.items() if name != "shard"}
    single = together.train(quiet, out=tmp_path / "one", settings=twice, processes=1, **arguments)
    assert shared["losses"] == pytest.approx(single["losses"], rel=1e-4)
    assert shared["norms"] == pytest.approx(single["norms"], rel=1e-3)
    assert len(shared["losses"]) == (STEPS if twice["steps"] else 6)
    size = twice["batch_size"] * settings.get("accumulate", 1)
    start = f"trained {len(shared['losses'])} steps of {size} on {count} examples"
    assert single["said"][0].startswith(f"{start}, ")
    assert any(sentence.startswith(f"{start} in 2 processes, ") for sentence in shared["said"])
    assert ("weights, gradients and optimiser states were split over 2 processes" in shared["said"]) == split
    for kind, count in single["held"].items():
        assert shared["held"][kind] == pytest.approx(count / 2 if split else count, rel=0.02), kind
    close(load_file(tmp_path / "two"), load_file(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_killed_training_goes_on_in_two_processes_as_if_it_had_not_been(pair, another, toys, tmp_path, shard):
    """With dropout, so that each process's random numbers have to go on where they were; in the middle of an epoch."""
    scratch = tmp_path / "scratch"
    settings = {**HOW, "batch_size": 1, "shard": shard}
    arguments = {"family": "finetune", "method": "full", "kind": "t5", "folder": str(toys["t5"]), "settings": settings}
    whole = pair.ask("train", out=str(tmp_path / "whole"), **arguments)
    with pytest.raises(ChildDied, match=r"the working process was killed \(signal 9\)"):
        another.ask("train", out=str(tmp_path / "none"), scratch=str(scratch), often=True, kill=[1, 3], **arguments)
    assert sorted(path.name for path in scratch.iterdir()) == ["checkpoint-2"]
    half = scratch / "checkpoint-3"
    half.mkdir()
    (half / "rng_state_1.pth").write_bytes(b"cut off")
    resumed = pair.ask("train", out=str(tmp_path / "found"), scratch=str(scratch), often=True, **arguments)
    assert resumed["losses"] == whole["losses"][2:]
    assert resumed["said"] == whole["said"]
    assert not half.exists()
    weights, expected = load_file(tmp_path / "found"), load_file(tmp_path / "whole")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_split_model_keeps_its_zeros_and_its_best_weights(pair, tmp_path):
    """The best are not the last ones, and are what one process finds."""
    folder = saved(halved(calm("llama", tmp_path / "calm"), "llama", sparsity=0.5).model, tmp_path / "halved")
    arguments = {"family": "finetune", "method": "full", "kind": "llama", "folder": str(folder), "count": 8, "watched": 3}
    settings = {**HOW, "learning_rate": 0.1, "schedule": "constant", "early_stopping": {"every": 1, "patience": 1}}
    shared = pair.ask("train", out=str(tmp_path / "two"), settings={**settings, "batch_size": 2, "shard": True}, **arguments)
    single = together.train(quiet, out=tmp_path / "one", settings={**settings, "batch_size": 4}, processes=1, **arguments)
    assert shared["said"][1] == single["said"][1]
    assert "was best after 1 steps" in single["said"][1]
    assert single["said"][1].endswith("ended 3 steps early")
    weights, expected, before = (load_file(file) for file in (tmp_path / "two", tmp_path / "one", folder / "model.safetensors"))
    close(weights, expected)
    for name, weight in before.items():
        if name.endswith("proj.weight"):
            zero = weight == 0
            assert zero.double().mean() == pytest.approx(0.5, abs=0.01)
            assert torch.equal(weights[name] == 0, zero), name


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_ends_all_with_its_examples(another, toys, tmp_path):
    arguments = {
        "family": "finetune",
        "method": "full",
        "kind": "llama",
        "folder": str(toys["llama"]),
        "settings": {**HOW, "batch_size": 2},
    }
    with pytest.raises(RunError, match=r"training: the loss became nan in step 1 of 5, on the examples \d, \d; nothing was learned yet"):
        another.ask("train", out=str(tmp_path / "none"), nan=1, **arguments)


@pytest.mark.slow
def test_the_teacher_writes_every_text_once(pair, tmp_path, monkeypatch):
    folder, scratch = calm("llama", tmp_path), tmp_path / "scratch"
    texts = pair.ask("written", folder=str(folder), scratch=str(scratch))
    settings = together.sequence.Settings(batch_size=2, max_new_tokens=8)
    single = together.sequence.written(bundle(folder, "llama"), settings, context())
    assert texts == [example.references for example in single]
    parts = [{json.loads(line)[0] for line in file.read_text().splitlines()} for file in sorted(scratch.iterdir())]
    assert sorted(map(len, parts)) == [2, 4]
    assert parts[0] | parts[1] == set(range(6))


@pytest.mark.slow
def test_each_process_writes_on_its_own_rows(pair, tmp_path):
    """Of unlike lengths, so that the processes write and learn from unlike numbers of tokens; the last step's second has no rows."""
    original, folder = two("llama", tmp_path)
    settings = {**HOW, "batch_size": 2, "student_share": 1.0, "max_new_tokens": 6, "learning_rate": 1e-3, "steps": 6}
    arguments = {"family": "distill", "method": "on_policy", "kind": "llama", "folder": str(folder), "original": str(original), "count": 5}
    training = pair.ask("train", out=str(tmp_path / "made"), settings=settings, **arguments)
    assert training["said"][0].startswith("trained 6 steps of 4 on 5 examples in 2 processes, ")
    assert training["losses"][-2] < training["losses"][0]  # both steps of four rows


def test_fewer_examples_than_all_processes_take_are_refused(toys):
    with pytest.raises(DataError, match=r"fewer than the 8 of one step \(batch_size 4 x accumulate 1 x 2 processes\); lower these"):
        tune(bundle(toys["llama"], "llama"), "full", context(processes=2), batch_size=4)


def test_fewer_processes_than_were_asked_for_are_an_error(toys):
    with pytest.raises(RunError, match="training: 2 processes were asked for, and 1 would train"):
        tune(bundle(toys["llama"], "llama"), "full", context(processes=2), batch_size=2)


@pytest.mark.parametrize(
    ("stage", "kind", "message"),
    [
        (
            {"finetune": "full"},
            InputError,
            "finetune: full: shard: true splits models over processes, and there is one; give --processes 2,",
        ),
        ({"finetune": "full", "early_stopping": {"metric": "rougeL"}}, RecipeError, "shard: true, and early_stopping looks at rougeL"),
        ({"finetune": "lora"}, RecipeError, "unknown key 'shard'"),
        ({"distill": "on_policy"}, RecipeError, "unknown key 'shard'"),
        ({"distill": "logits", "top_k": 4}, RecipeError, "shard: true, and top_k is 4"),
        ({"distill": "hidden", "teacher": {"id": "builtin", "bits": 4}}, RecipeError, "shard: true, and teacher.bits is 4"),
    ],
)
def test_what_can_not_be_split_is_refused_before_anything_is_loaded(toys, rows, write_recipe, tmp_path, stage, kind, message):
    data = {**recipe_for("llama", toys["llama"], rows)["data"], "splits": {"train": "train", "validation": "test", "evaluation": "test"}}
    with pytest.raises(kind, match=message):
        pipeline.run(write_recipe(recipe_for("llama", toys["llama"], rows, data=data, stages=[{**stage, "shard": True}])), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packed_weights_are_not_split_and_whole_ones_do_not_pass_for_split(toys):
    model = bundle(toys["t5"], "t5").model
    count = f"{sum(p.numel() for p in model.parameters()):,}"
    with pytest.raises(RunError, match=f"shard: process 0 of 2 has {count} of {count} weights, which is more than its part"):
        sharded._check(list(model.parameters()), context(processes=2))
    model.config.quantization_config = {}
    with pytest.raises(ModelError, match="shard: T5ForConditionalGeneration has packed weights, which can't be split"):
        sharded.split(model, context(processes=2))


def test_a_split_model_s_weights_come_back_in_the_dtypes_they_had(toys):
    model = bundle(toys["t5"], "t5", "bfloat16").model
    model.decoder.block[0].layer[2].DenseReluDense.wo.float()
    expected = {name: (weight.float() + 1).to(weight.dtype) for name, weight in model.state_dict().items()}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with sharded.split_in_float32(model, context()) as parts, torch.no_grad():
            for weight in parts.parameters():
                assert weight.dtype == torch.float32
                weight.add_(1)
    finally:
        torch.distributed.destroy_process_group()
    weights = model.state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(weight, expected[name]) and weight.dtype == expected[name].dtype for name, weight in weights.items())
    assert model.shared.weight is model.encoder.embed_tokens.weight


def test_what_trains_says_so():
    for _, name, method in everyone():
        assert method.ABOUT.trains == (issubclass(method.Settings, Optimisation) or name == "qat"), name


def test_an_artifact_is_named_by_its_processes_where_it_was_trained_in_several(toys, rows, write_recipe, tmp_path, monkeypatch):
    stages = [{"quantize": "cast"}, {"finetune": "full", "batch_size": 2}]
    loaded = recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, stages=stages)))

    def names(processes):
        counts_by_name = {}

        def make(stage, source, models, shown, target, execution, processes):
            target.mkdir(parents=True)
            counts_by_name[target.name] = processes

        monkeypatch.setattr(artifacts, "_make_one", make)
        folder = tmp_path / f"{processes}-{len(list(tmp_path.iterdir()))}"
        source = Source(str(toys["llama"]), "causal-lm", "float32")
        artifacts.make(loaded, source, folder, Execution("cpu", tmp_path / "log"), processes)
        return list(counts_by_name), list(counts_by_name.values())

    (cast, trained), counts = names(1)
    assert counts == [1, 1]
    (again, trained_by_two), counts = names(2)
    assert counts == [1, 2], "the others run in one"
    assert cast == again
    assert len({trained, trained_by_two, names(3)[0][1]}) == 3
    assert names(1)[0] == [cast, trained]


SERVER = """
    import os, signal, sys, time
    from compress.errors import DataError
    from compress.process import serve

    RANK = int(os.environ["RANK"])

    def environment(progress):
        progress("from", RANK, 3)
        time.sleep(0.3 * RANK if RANK else 0.3)
        return {k: v for k, v in os.environ.items() if k in ("WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS") or k.startswith(("ACCEL", "TORCHEL"))}

    def one_is_wrong(progress):
        if RANK == 2: raise DataError("row 3 is odd")
        time.sleep(60)

    def one_dies(progress):
        print(f"last words of {RANK}", flush=True)
        if RANK == 1:
            time.sleep(0.2)
            os._exit(7)
        raise RuntimeError("connection closed by peer")

    if __name__ == "__main__":
        serve(globals())
"""


@pytest.fixture
def three(tmp_path, monkeypatch):
    (tmp_path / "server.py").write_text(textwrap.dedent(SERVER))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    seen = []
    with Team("server", tmp_path / "log", lambda *event: seen.append(event), 3) as team:
        team.seen = seen
        yield team


def test_the_first_answers_for_all(three):
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert three.ask("environment") == {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": threads}
    assert three.seen == [("from", 0, 3), ("from", 3, 3)], "a bar that is not brought to its end is when the answer comes"


def test_the_error_of_one_is_the_error_of_all_and_ends_them(three):
    with pytest.raises(DataError, match="row 3 is odd"):
        three.ask("one_is_wrong")
    pids = [child.pid for child in three._children]
    three.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_death_of_one_counts_before_what_it_made_of_the_others(three, tmp_path):
    with pytest.raises(ChildDied, match="the working process ended with exit code 7; its last line: last words of 1"):
        three.ask("one_dies")
    three.close()
    words = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("last")]
    assert words == [f"last words of {rank}" for rank in range(3)]
    assert [path.name for path in tmp_path.glob("log*")] == ["log"]


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def cli(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "compress", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--processes", "0"], {}, "--processes 0: must be 1 or more"),
        (["--processes", "two"], {}, "invalid int value: 'two'"),
        (["--processes", "3"], LAUNCHED, "--processes 3: 2 were launched; leave one of the two out"),
        ([], {**LAUNCHED, "LOCAL_WORLD_SIZE": "1"}, "2 processes were launched, 1 of them on this machine; all must be on one"),
        ([], {"RANK": "0", "WORLD_SIZE": "2"}, "2 processes were launched, 1 of them on this machine"),
        ([], {**LAUNCHED, "RANK": "x"}, "RANK=x in the environment: a number is expected"),
        ([], {**LAUNCHED, "ACCELERATE_USE_FSDP": "true"}, "configured for FSDP, which isn't used here"),
        ([], {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "accelerate launch started a single process"),
    ],
)  # fmt: skip
def test_what_can_not_be_launched_is_refused(arguments, environment, message, tmp_path):
    done = cli("run", "quickstart", "--out", tmp_path / "out", *arguments, **environment)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_copies_beside_the_first_end_at_once_and_say_nothing(tmp_path):
    done = cli("run", tmp_path / "nowhere.yaml", **{**LAUNCHED, "RANK": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="--processes 3: each takes a GPU of its own, and there are 2; use fewer, or --device cpu"):
        together.stage._join("cuda", 3)


@pytest.mark.slow
def test_a_launcher_s_run_trains_in_as_many_processes(toys, rows, tmp_path):
    """torchrun's two copies make one report; its variables don't reach the processes that train, which are others."""
    stages = [
        {"distill": "logits", "student": {"config": {"num_hidden_layers": 1}}, "batch_size": 2, "steps": 2, "samples": 8, "shard": True},
        {"quantize": "qat", "steps": 2, "batch_size": 2, "group_size": -1},
    ]
    changes = {"stages": stages, "calibration": {"samples": 8}, "metrics": ["generated_tokens"]}
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(recipe_for("llama", toys["llama"], rows, **changes)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "compress", "run", str(file), "--json", "--out", str(tmp_path / "out"), "--device", "cpu"],
        capture_output=True, text=True, timeout=600, env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
    )  # fmt: skip
    (report,) = (tmp_path / "out" / "toy").glob("*/report.json")
    launched = read_report(report)
    assert json.loads(done.stdout)["verdict"] == launched.verdict == "cannot_tell", done.stderr
    assert sum("split over 2 processes" in line for line in launched.stages[0].said) == 2  # teacher and student
    for record in launched.stages:
        assert any(line.startswith("trained 2 steps of 4 on 8 examples in 2 processes") for line in record.said)
