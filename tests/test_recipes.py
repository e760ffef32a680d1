"""Every shipped recipe and benchmark is read as it stands."""

import pytest

from compress import recipe

SHIPPED = sorted(recipe.shipped().rglob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.parent.name != "benchmarks"], ids=lambda p: p.stem)
def test_the_recipe_is_valid_and_explains_itself(path):
    found = recipe.load(path)
    assert found.check, "a recipe without gates gives no verdict"
    assert path.read_text().startswith("# "), "the first line says what it is for"


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.parent.name == "benchmarks"], ids=lambda p: p.stem)
def test_the_benchmark_is_valid(path):
    assert recipe.load("quickstart", [f"benchmark={path.stem}"]).benchmark.batch_sizes
