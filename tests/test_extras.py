"""Whatever says `pip install` names a package that this project declares, or an extra of a clone; never the `compress` of the package index."""

import ast
import json
import re
import shlex
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from compress import engines, extras, methods, trackers
from compress.report.usage import READERS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = {canonicalize_name(Requirement(line).name) for lines in [PROJECT["dependencies"], *EXTRAS.values()] for line in lines}
APART = {name for engine in engines.names() for line in engines.find(engine).ABOUT.apart.values() for name in line.split()}
PAGES = [
    ROOT / "pyproject.toml", *ROOT.glob("*.md"), *(ROOT / "recipes").rglob("*.*"),
    *(path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".yml", ".ipynb")),
]  # fmt: skip
SOURCES = sorted((ROOT / "compress").rglob("*.py"))
COMMAND = re.compile(r"pip install ((?:-{1,2}[\w-]+ )*(?:'[^']*'|[\w.\[\],<>=~!-]+)(?: (?:'[^']*'|[\w-]+[\[<>=~!][^\s'`\"]*))*)")


def wrong(command):
    """What is wrong with the arguments of a `pip install`."""
    for word in shlex.split(command):
        if word in ("-e", "-r", "requirements.txt", "."):
            continue
        local = re.fullmatch(r"\.\[([\w,]+)\]", word)
        if local:
            yield from (f"no extra {extra}" for extra in local[1].split(",") if extra not in EXTRAS)
            continue
        try:
            name = canonicalize_name(Requirement(word).name)
        except InvalidRequirement:
            yield f"{word} is no requirement"
            continue
        if name not in (DECLARED | APART) - {extras.DISTRIBUTION}:
            yield f"{word} is not declared"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_installs_what_a_clone_has(path):
    text = path.read_text()
    assert [f"{match[0]}: {why}" for match in COMMAND.finditer(text) for why in wrong(match[1])] == []
    assert re.findall(r"\bcompress\[[\w,]+\]", text) == []


def test_the_code_makes_every_line_in_one_place():
    written = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"pip install\b|compress\[\w+\]", node.value):
                written.append((path.relative_to(ROOT / "compress").as_posix(), node.value.strip().partition("\n")[0]))
    assert sorted({path for path, _ in written}) == ["extras.py", "methods.py", "model/loading.py", "report/usage.py"], written
    names = {name for path in SOURCES for name in re.findall(r"install_line\(['\"](\w+)['\"]", path.read_text())}
    names |= {method.ABOUT.extra for _, _, method in methods.everyone() if method.ABOUT.extra} | set(trackers.names())
    assert len(names) >= 9
    assert names <= set(EXTRAS)


def test_what_installs_a_method_is_declared():
    for family, name, method in methods.everyone():
        packages = {canonicalize_name(package) for package in method.ABOUT.packages}
        assert packages <= DECLARED, f"{family}: {name}"
        if packages:
            named = {canonicalize_name(Requirement(word).name) for word in shlex.split(method.ABOUT.install_line)[2:]}
            assert packages <= named, f"{family}: {name}"
    assert {canonicalize_name(package) for packages in READERS.values() for package in packages.split()} <= DECLARED


@pytest.mark.parametrize("place", ["clone", "wheel"])
def test_a_line_names_an_extras_own_requirements_however_this_copy_came(place, tmp_path, monkeypatch):
    if place == "wheel":
        info = tmp_path / "compress_workbench-0.1.0.dist-info"
        info.mkdir()
        lines = [
            "Metadata-Version: 2.4",
            "Name: compress-workbench",
            "Version: 0.1.0",
            *(f"Requires-Dist: {d}" for d in PROJECT["dependencies"]),
        ]
        lines += [
            f"Requires-Dist: {requirement}; extra == '{extra}'" for extra, requirements in EXTRAS.items() for requirement in requirements
        ]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (distribution,) = metadata.distributions(path=[str(tmp_path)])
        monkeypatch.setattr(extras.metadata, "requires", lambda name: {distribution.name: distribution.requires}[name])
        monkeypatch.setattr(extras, "PROJECT", tmp_path / "pyproject.toml")
    for extra in set(EXTRAS) - {"test"}:
        line = extras.install_line(extra)
        assert {str(Requirement(word)) for word in shlex.split(line)[2:]} == {
            str(Requirement(requirement)) for requirement in EXTRAS[extra]
        }
        assert list(wrong(line.removeprefix("pip install "))) == []
    assert extras.install_line("quant", "quant") == f"pip install '{EXTRAS['quant'][0]}'"
    with pytest.raises(KeyError, match="gremlins"):
        extras.install_line("gremlins")


def test_what_refers_to_the_package_itself_has_its_name():
    own = [Requirement(line) for line in EXTRAS["test"] if line.startswith("compress")]
    assert [requirement.name for requirement in own] == [PROJECT["name"]] == [extras.DISTRIBUTION]
    assert own[0].extras <= set(EXTRAS)


def test_what_a_user_sees_of_the_methods_has_the_lines(capsys):
    from compress import cli

    arguments = cli.parser().parse_args(["methods", "--json"])
    assert arguments.call(arguments) == 0
    told = {f"{method['family']}: {method['method']}": method["install"] for method in json.loads(capsys.readouterr().out)}
    assert told["quantize: int8_static"] == f"pip install '{EXTRAS['quant'][0]}'"
    assert told["prune: magnitude"] is None
