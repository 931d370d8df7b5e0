"""Recipes: checked on reading, overridden by dotted keys, written back without loss."""

import pytest

from glm5.recipes import RecipeError, load_recipe, recipe_names
from glm5.recipes.load import to_toml


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "again.toml"
    path.write_text(to_toml(recipe))
    again = load_recipe(path)
    assert again == recipe and again.digest() == recipe.digest()
    assert list(again.stages) == list(recipe.stages)  # the order of stages is part of the recipe


def test_any_text_survives_a_round_trip(tmp_path):
    text = "".join(map(chr, range(1, 0x250))) + "\U0001f600"
    recipe = load_recipe("foundation")
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"sample_prompt": text})})
    path = tmp_path / "again.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_overrides_reach_nested_keys_and_change_the_digest():
    plain = load_recipe("foundation")
    changed = load_recipe(
        "foundation", ["seed=7", "stages.dsa-warmup.steps=3", "name=other", "model.overrides.num_layers=2"]
    )
    assert (changed.seed, changed.stages["dsa-warmup"].steps, changed.name) == (7, 3, "other")
    assert changed.model.overrides == plain.model.overrides | {"num_layers": 2}
    assert changed.digest() != plain.digest() == load_recipe("foundation").digest()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["stages.pretrain.step=3"],
            r"foundation\.toml: unknown key stages\.pretrain\.step; did you mean stages\.pretrain\.steps\?",
        ),
        (["sed=3"], r"unknown key sed; did you mean seed\?"),
        (["data.zzz=3"], r"unknown key data\.zzz; known here: build"),
        (["stages.pretrain.steps=-1"], r"stages\.pretrain\.steps: got -1: .*greater than 0"),
        (["stages.pretrain.kind=dsa"], "stages.pretrain.kind: got 'dsa'"),
        (["name=../x"], "name: got '../x'"),
        (["seed"], "want key=value"),
        (["seed.x=1"], "seed is a value, not a table"),
        (["seed=4294967296"], "seed: got 4294967296: .*less than 4294967296"),
        (["stages={}"], "stages: got {}: .*at least 1 item"),
        (["stages.a/b.kind=pretrain", "stages.a/b.steps=1"], "stages.a/b.*should match pattern"),
        (["stages.pretrain.muon_lr=inf"], "stages.pretrain.muon_lr: got inf: .*finite"),
        (["model.overrides.hidden_size=1979-05-27"], "model.overrides.hidden_size: got datetime.date"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("foundation", overrides)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(RecipeError, match="no recipe called 'fundation'; there are .*foundation"):
        load_recipe("fundation")
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = \n")
    with pytest.raises(RecipeError, match="broken.toml: not valid TOML"):
        load_recipe(broken)
    broken.write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(RecipeError, match="broken.toml: not valid TOML: .*utf-8"):
        load_recipe(broken)
    broken.write_text('name = "x"\n[stages.pretrain]\nsteps = 1\n')
    with pytest.raises(RecipeError, match="key model is missing"):
        load_recipe(broken)
