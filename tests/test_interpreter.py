"""Engines in an environment of their own: another interpreter runs the measuring process, and what is wrong with one is told."""

import os
import stat
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from compress import pipeline, preflight, recipe
from compress.errors import MissingPackage, RecipeError
from compress.interpreter import Interpreter
from tests.conftest import recipe_for


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment that has all packages of this one, and not this project."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def script(folder, text):
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_the_measuring_process_runs_in_it_with_its_packages_and_our_code(toys, rows, write_recipe, python, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    told = f'#!/bin/sh\necho started >> {tmp_path}/started\nexec {python} "$@"\n'
    own = tmp_path / "bin" / "python"
    own.parent.mkdir()
    own.write_text(told)
    own.chmod(0o755)
    engine = {"name": "fake", "python": os.path.relpath(own, tmp_path)}
    report = pipeline.run(write_recipe(recipe_for("llama", toys["llama"], rows, engine=engine)), tmp_path / "reports", "cpu")
    assert report.engine == "fake" and not any(side.failures for side in report.sides)
    assert len((tmp_path / "started").read_text().splitlines()) >= 4, "both sides, and looks at what it has"
    assert report.settings["engines"] == [{"name": "fake", "python": "bin/python"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no interpreter"),
        ("echo 'no such library' >&2; exit 3", "doesn't run; its last line: no such library"),
        ("exit 3", "its last line: exit code 3"),
        ("echo hello", "doesn't run as a Python"),
        ("""echo '{"python": [3, 9], "versions": {}}'""", "is Python 3.9; 3.11 or newer is needed"),
        ("""echo '{"python": [3, 12], "versions": {"msgspec": "1", "packaging": "1", "psutil": "1", "pydantic": "1", "pyyaml": "1"}}'""",
         r"has no transformers, one or another\. Install with: .*/python -m pip install transformers another"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_told_with_the_way_out(tmp_path, text, message):
    own = tmp_path / "python" if text is None else script(tmp_path, text)
    with pytest.raises(MissingPackage, match=message):
        Interpreter(own).require(["one or another"])


def test_it_is_looked_at_before_any_work(toys, rows, write_recipe, tmp_path):
    written = recipe_for("llama", toys["llama"], rows, engine={"name": "fake", "python": "nowhere/python"})
    (mistake,) = preflight.look(recipe.load(write_recipe(written))).mistakes
    assert f"engine: fake: python: there is no interpreter {tmp_path}/nowhere/python" in mistake


def test_a_python_that_is_no_path_is_a_mistake_of_the_recipe(toys, rows, write_recipe):
    with pytest.raises(RecipeError, match=r"engine\.python: 3: the interpreter of an environment is expected"):
        recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, engine={"name": "fake", "python": 3})))


def test_versions_are_those_of_its_packages(python):
    assert Interpreter(python).versions(["torch", "nothing-of-that-name"]).keys() == {"torch"}
    assert Interpreter(Path(sys.executable)).versions(["pytest or nothing"]) == {"pytest": pytest.__version__}
