"""Mid-training: the language model goes on with a longer context, one stage for each rung of the ladder.

What a rung changes are its numbers (length, rates, data) and, where the recipe says so, the base of the rotary frequencies:
GLM-4.5 turned it from 1e4 to 1e6 when it went to 32K (2508.06471, section 2.3). Attention stays as it was before.
"""

from dataclasses import replace

from glm5.train.stages.stage import ModelForm, Stage


class Midtrain(Stage):
    """LM and MTP losses in the form that the stage finds, with the recipe's ``rope_theta`` from its first step on."""

    def change(self, before: ModelForm) -> ModelForm:
        return replace(before, rope_theta=self.recipe.rope_theta or before.rope_theta)
