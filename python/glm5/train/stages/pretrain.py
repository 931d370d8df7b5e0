"""Pre-training: the language model with dense attention, at one length of context. The indexers rest."""

from dataclasses import replace

from glm5.train.stages.stage import ModelForm, Stage


class Pretrain(Stage):
    """LM and MTP losses on everything but the indexers."""

    def change(self, before: ModelForm) -> ModelForm:
        return replace(before, attention="dense")
