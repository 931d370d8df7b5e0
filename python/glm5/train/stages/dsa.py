"""The adaptation to sparse attention in two stages (DeepSeek-V3.2, 2512.02556; GLM-5 report, section 2.1.1).

First the indexers alone learn to predict the attention of the finished dense model. Then attention reads only the keys that
they select, the model learns to live with that, and the indexers follow it.
"""

from dataclasses import replace

from glm5.train.stages.stage import ModelForm, Stage


class DsaWarmup(Stage):
    """The indexers' KL over all keys of dense attention. All else is frozen: no gradient, no optimizer state, no update."""

    validates = False  # the frozen model's loss stays what it was
    indexer = "warmup"

    def change(self, before: ModelForm) -> ModelForm:
        return replace(before, attention="dense")

    def learns(self, is_indexer: bool) -> bool:
        return is_indexer

    def after_update(self, model, expert_load) -> None:
        """Nothing: the router is frozen too."""


class DsaSparse(Stage):
    """LM and MTP losses on the selected keys; the KL on the same keys, which reaches the indexers alone."""

    def change(self, before: ModelForm) -> ModelForm:
        return replace(before, attention="sparse")
