"""Every shipped recipe, benchmark and set of gates is read as it stands."""

import pytest

from compress import recipe

SHIPPED = sorted(recipe.shipped().rglob("*.yaml"))
RECIPES, BENCHMARKS, CHECKS = (
    [path for path in SHIPPED if path.parent.name == folder] for folder in (recipe.shipped().name, "benchmarks", "checks")
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipe_is_valid_and_explains_itself(path):
    loaded = recipe.load(path)
    assert loaded.check, "a recipe without gates gives no verdict"
    assert path.read_text().startswith("# "), "the first line says what it is for"


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.stem)
def test_the_benchmark_is_valid(path):
    assert recipe.load("quickstart-int8", [f"benchmark={path.stem}"]).benchmark.batch_sizes


@pytest.mark.parametrize("path", CHECKS, ids=lambda p: p.stem)
def test_the_gates_are_valid(path):
    metrics = "metrics=[rouge, generated_tokens]"
    assert recipe.load("quickstart", [metrics, f"check={path.stem}"]).check["generated_tokens"].min_ratio == 0.9
    changed = recipe.load("quickstart", [metrics, f"check={path.stem}", "check.rougeL.min_ratio=0.5"]).check
    assert (changed["rougeL"].min_ratio, changed["rouge1"].min_ratio > 0.98) == (0.5, True)
