"""The kinds of stage a recipe may string together. Each is one small file; the loop carries any of them out alike."""

from glm5.recipes import Recipe
from glm5.train.stages.dsa import DsaSparse, DsaWarmup
from glm5.train.stages.midtrain import Midtrain
from glm5.train.stages.pretrain import Pretrain
from glm5.train.stages.sft import Sft
from glm5.train.stages.stage import ModelForm, Stage

KINDS: dict[str, type[Stage]] = {
    "pretrain": Pretrain,
    "midtrain": Midtrain,
    "dsa-warmup": DsaWarmup,
    "dsa-sparse": DsaSparse,
    "sft": Sft,
}


def stage_of(recipe: Recipe, name: str) -> Stage:
    """The stage called `name`, with the form of the model that the stages before it hand over."""
    form = ModelForm()
    for each, its_recipe in recipe.stages.items():
        stage = KINDS[its_recipe.kind](its_recipe, form)
        if each == name:
            return stage
        form = stage.form
    raise KeyError(name)


__all__ = ["KINDS", "ModelForm", "Stage", "stage_of"]
