"""README and docs: every command in them is run, every recipe validated, every Python block run, and a stranger's path walked.

Commands are the lines of a code block that begin with a program's name; what others answer may stand between them. A page's commands and Python
blocks are run in their order, in a copy of the repository with stand-ins for what the pages speak of: small random models and few examples,
and a benchmark of moments in place of `quick` and `standard`. A YAML or Python block whose first line is `# path` is that file. YAML without a
`version` is part of a recipe, and validated within the README's.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

from compress import cli, methods
from compress.recipe import load
from compress.results.report import read_report
from tests.conftest import WORDS
from tests.decoders import decoder

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("accelerate", "compress", "lint-imports", "mypy", "pip", "pytest", "python", "ruff", "torchrun")
RUN = {"run": {0, 1, 4}, "check": {0, 1, 4}, "search": {0, 1, 4}}  # a random model may fail; all other verbs end with 0
NOT_RUN = {  # what begins so isn't run, and why
    "pip install": "is .ci/run's, with what stands behind it",
    "python -m venv": "fetches gigabytes; tests/test_interpreter.py makes an environment",
    "ruff check": "is .ci/run's",
    "accelerate launch": "wants two GPUs; tests/test_processes.py launches torchrun's way",
    "torchrun": "tests/test_processes.py launches",
    "compress sweep recipes/quickstart-rtn.yaml": "wants Ray; tests/test_sweep.py starts one",
    "compress publish": "wants the hub; tests/test_publish.py has a stand-in",
    "python -m compress.benchmark.selftest": "takes hours",
}
MOMENT = """\
batch_sizes: [1]
prompt_tokens: [8]
new_tokens: 4
rounds: 1
precision: null
turns: 2
warmup: 0
threads: 1
"""
STAMP = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
RUNS, MADE = re.compile(rf"reports/([\w-]+)/({STAMP.pattern})"), re.compile(r"artifacts/([\w-]+-)[0-9a-f]{12}")


def blocks(page):
    """Code blocks in order: language ('' for none), text."""
    return [(token.info.strip(), token.content) for token in MarkdownIt().parse(page.read_text()) if token.type in ("fence", "code_block")]


def lines(text):
    return [line.removeprefix("$ ") for line in text.splitlines() if line.removeprefix("$ ").split(" ")[0] in PROGRAMS]


def commands(page):
    return [line for language, text in blocks(page) if language not in ("yaml", "python") for line in lines(text)]


def named(text):
    """The path that a block's first line names."""
    heading = re.match(r"# ([\w./-]+\.\w+)\n", text)
    return heading and heading[1]


EVERY = [pytest.param(page, line, id=f"{page.name}: {line}") for page in PAGES for line in commands(page)]
MINE = next(text for _, text in blocks(ROOT / "README.md") if named(text) == "mine.yaml")


def arguments(line):
    """What a line gives the program, behind its name; [] where it is another program's."""
    words = shlex.split(line.split(">")[0], comments=True)
    return words[1:] if words[0] == "compress" else []


def test_every_page_is_linked_and_every_link_leads_somewhere():
    linked = set()
    for page in PAGES:
        for place in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / place).exists(), f"{page.name}: {place}"
            linked.add((page.parent / place).resolve())
    assert {page for page in PAGES if page.parent.name == "docs"} <= linked


def test_the_page_of_commands_tells_of_every_verb():
    assert set(cli.VERBS) == set(re.findall(r"^\| `compress (\w+)", (ROOT / "docs" / "commands.md").read_text(), re.M))


def test_concepts_tell_of_every_method_with_figures_from_the_reports():
    page = (ROOT / "docs" / "concepts.md").read_text()
    assert {f"| `{name}` |" for family, name, _ in methods.everyone() if family != "finetune"} <= set(re.findall(r"\| `\w+` \|", page))
    measured = "".join(file.read_text() for file in [ROOT / "recipes" / "README.md", *(ROOT / "reports").rglob("report.md")])
    missing = [figure for figure in re.findall(r"x\d\d?\.\d{3,}|\(\d[\d.]+ to [\d.]+|ROUGE-L \d+\.\d|BLEU of \d+\.\d+", page)
               if figure.split()[-1].strip("(") not in measured]  # fmt: skip
    assert missing == []


def test_the_reference_of_a_recipe_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "make_recipe_reference.py"))["page"]()
    assert (ROOT / "docs" / "recipe.md").read_text() == page, "run: python docs/make_recipe_reference.py"


def test_what_is_not_run_is_there():
    for begin in NOT_RUN:
        assert any(param.values[1].startswith(begin) for param in EVERY), begin


@pytest.mark.parametrize(("page", "line"), EVERY)
def test_every_command_is_one_that_the_program_knows(page, line):
    if words := arguments(line):
        cli.parser().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_the_text_are_ones_that_the_program_knows(page):
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        for part in token.children or []:
            if part.type == "code_inline" and re.match(r"compress \w+ ", part.content):
                cli.parser().parse_args(shlex.split(part.content.replace("...", ""))[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_in_a_page_is_valid(page, tmp_path):
    for language, text in blocks(page):
        if language == "yaml" and "repos" not in (written := yaml.safe_load(text)) and named(text) != "gates.yaml":
            whole = written if "version" in written else yaml.safe_load(MINE)
            for key, value in written.items():
                whole[key] = {**whole[key], **value} if key == "data" else value
            file = tmp_path / "page.yaml"
            file.write_text(yaml.safe_dump(whole))
            if methods_known(whole):
                load(file)


def methods_known(recipe):
    """Whether a recipe's methods are there: that of the page on adding one is, where that page is run."""
    return all(any(stage.get(family) in methods.names(family) for family in methods.FAMILIES) for stage in recipe.get("stages", []))


@pytest.fixture(scope="session")
def shelf(toys, tmp_path_factory):
    """What a fresh clone has, with stand-ins for what the pages speak of, and a run of the README's recipe in it."""
    if not (ROOT / ".git").exists():
        pytest.skip("what a fresh clone has is told by git")
    folder = tmp_path_factory.mktemp("shelf") / "compress"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if (ROOT / name).is_file() and not re.match(r"reports/(?!reference/)", name):  # kept reports that no page speaks of
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for file in (folder / "recipes").glob("*.yaml"):
        file.write_text(small(file.read_text()))
    for place in (folder / "benchmarks", folder / "recipes" / "benchmarks"):
        place.mkdir(exist_ok=True)
        for name in ("quick", "standard"):
            (place / f"{name}.yaml").write_text(MOMENT)
    stand_ins(folder, toys)
    (folder / "mine.yaml").write_text(MINE)
    walk(folder, "compress run mine.yaml")
    return folder


def small(recipe):
    """A recipe of `recipes/` with the random model, few examples and the shortest benchmark."""
    for long, short in (
        (r"id: builtin\b", "id: ../my-flan-t5"),
        (r"samples: \d+", "samples: 24"),
        (r"(?m)^benchmark: .*", "benchmark: quick"),
    ):
        recipe = re.sub(long, short, recipe)
    return recipe


def stand_ins(folder, toys):
    """A model and dialogues of the names that pages give them."""
    shutil.copytree(toys["t5"], folder / "my-flan-t5")
    checkpoint(folder)
    (folder / "dialogues").mkdir()
    rows = [{"dialogue": " ".join(WORDS[n % 7 :]), "summary": "the cat sat on the red mat"} for n in range(24)]
    for split in ("train", "test"):
        (folder / "dialogues" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def checkpoint(folder):
    """What the Trainer leaves: checkpoint-300, with the optimiser's state and its own files beside the model."""
    source = decoder(folder / "untrained")
    model, tokenizer = LlamaForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    arguments = TrainingArguments(folder / "trained", max_steps=1, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": [5, 9, 3], "labels": [5, 9, 3]}] * 8, processing_class=tokenizer)
    trainer.train()
    shutil.move(folder / "trained" / "checkpoint-1", folder / "checkpoint-300")
    assert {"optimizer.pt", "training_args.bin", "trainer_state.json"} <= {file.name for file in (folder / "checkpoint-300").iterdir()}


def walk(folder, line):
    """Run a line of a page as a person would who stands in the folder; `compress`, `python` and `pytest` are this environment's."""
    tools = folder / ".tools"
    if not tools.exists():
        tools.mkdir()
        for name, what in (("compress", "-m compress"), ("python", ""), ("pytest", "-m pytest -p no:cacheprovider -q")):
            (tools / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {what} "$@"\n')
            (tools / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    verb = line.split()[1] if line.startswith("compress ") else ""
    assert done.returncode in RUN.get(verb, {0}), f"{line}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def provide(folder, text):
    """The runs and artifacts that a block names: copies of the newest, which say that they are of that time and passed."""
    for recipe, name in RUNS.findall(text):
        place = folder / "reports" / recipe
        if not (place / name).exists():
            shutil.copytree(max(run for run in place.iterdir() if STAMP.fullmatch(run.name)), place / name)
            report = json.loads((place / name / "report.json").read_text())
            time = datetime.strptime(name[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
            report |= {
                "run": name,
                "created": time.isoformat(),
                "verdict": "pass",
            }  # which a random model, that writes nothing right, doesn't get
            (place / name / "report.json").write_text(json.dumps(report))
    for match in MADE.finditer(text):
        place = folder / "reports" / match[0]
        if not place.exists():
            shutil.copytree(next(place.parent.glob(f"{match[1]}*")), place)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not line.startswith(tuple(NOT_RUN)) for line in commands(page))], ids=lambda page: page.name
)
def test_every_command_and_every_python_block_of_a_page_runs(page, shelf, tmp_path):
    folder = tmp_path / "compress"
    shutil.copytree(shelf, folder)
    for language, text in blocks(page):
        if name := named(text):
            (folder / name).write_text(small(text) if name.startswith("recipes/") else text)
        elif language == "python":
            provide(folder, text)
            (folder / "block.py").write_text(text)
            walk(folder, "python block.py")
        elif language == "yaml":
            continue
        else:
            for line in lines(text):
                provide(folder, line)
                if not line.startswith(tuple(NOT_RUN)):
                    walk(folder, line)


def test_the_hooks_find_mistakes(tmp_path):
    """The pre-commit example: what it runs, on the files that it says."""
    text = next(text for _, text in blocks(ROOT / "docs" / "commands.md") if named(text) == ".pre-commit-config.yaml")
    (hook,) = yaml.safe_load(text)["repos"][0]["hooks"]
    files = [
        str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml") if re.search(hook["files"], str(path.relative_to(ROOT)))
    ]
    assert sorted(files) == sorted(f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 2\n")
    for paths, status in (([*files], 0), ([*files, str(bad)], 2)):
        done = subprocess.run([sys.executable, "-m", *hook["entry"].split(), *paths], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stderr


@pytest.mark.slow
def test_a_strangers_path_ends_in_a_verdict_on_their_own_model(shelf):
    """The README's recipe for a model of one's own, in what a fresh clone has. Its two first lines, which install too, are .ci/run's."""
    (report,) = (shelf / "reports" / "mine").glob("*/report.json")
    assert read_report(report).verdict in {"pass", "fail", "cannot_tell"}
    assert {"report.html", "report.md", "measurements.parquet"} <= {file.name for file in report.parent.iterdir()}
