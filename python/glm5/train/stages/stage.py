"""What a stage decides: the model's form, who learns, which losses are asked for, and what follows an update.

Everything else (data, rates, accumulation, checkpoints) is the loop's and the same for every stage; the numbers are the
recipe's. The defaults here are those of a stage that trains the language model in the form it finds.
"""

from dataclasses import dataclass

from glm5.recipes import StageRecipe


@dataclass(frozen=True)
class ModelForm:
    """What, beside its weights, makes a model compute what it does. A stage may change it; the next one inherits it."""

    attention: str = "dense"  # or "sparse"
    rope_theta: float | None = None  # base of the rotary frequencies; None: the preset's, which no stage has changed
    int4_group_size: int | None = None  # of routed experts that compute with int4 weights; None: with their own

    def give(self, model) -> None:
        """Puts `model` into this form."""
        model.attention = self.attention
        if self.rope_theta is not None:
            model.set_rope_theta(self.rope_theta)
        model.int4_group_size = self.int4_group_size


class Stage:
    """One stage of a recipe.

    Args:
        recipe: its numbers.
        before: the model's form at the end of the stage before.

    Attributes:
        before, form: the model's form before this stage; in it, and after it.
        validates: whether held-out loss is worth measuring on the way.
    """

    validates = True

    def __init__(self, recipe: StageRecipe, before: ModelForm):
        self.recipe, self.before = recipe, before
        self.form = self.change(before)

    def change(self, before: ModelForm) -> ModelForm:
        """The form that the stage gives a model which comes in the form `before`."""
        return before

    @property
    def indexer(self) -> str:
        """The KL that ``model.losses`` is asked for: an indexer that selects goes on learning from what it selects, in
        post-training too (DeepSeek-V3.2, 2512.02556)."""
        return "sparse" if self.form.attention == "sparse" else "none"

    def learns(self, is_indexer: bool) -> bool:
        """Whether the stage trains a parameter. It says so of all parameters of an indexer alike, and of all others."""
        return not is_indexer or self.indexer == "sparse"

    def losses(self, model, batch) -> dict:
        """``model.losses`` of `batch`, those that this stage wants; the total is their weighted sum."""
        watched = self.recipe.balance_weight or self.recipe.z_loss
        return model.losses(
            batch,
            mtp_depth=self.recipe.mtp_depth,
            indexer=self.indexer,
            router_sequence_length=self.recipe.sequence_length if watched else None,
        )

    def loss_counts(self, model, batch) -> dict:
        """``model.loss_counts`` of those losses."""
        return model.loss_counts(batch, mtp_depth=self.recipe.mtp_depth, indexer=self.indexer)

    def after_update(self, model, expert_load) -> None:
        """What follows an update of the parameters. `expert_load`: int [MoE layers, E], tokens each expert got in it."""
        if self.recipe.router_bias_rate:
            model.update_router_bias(expert_load, self.recipe.router_bias_rate)
