"""Supervised fine-tuning on conversations: the model learns the tokens that an assistant samples, and nothing else.

Which tokens count is in the data: there is a target where the chat template says "sampled" and the segment is not marked
as erroneous; all the rest of a conversation is context (GLM-5 report, section 3.1). The routed experts may learn as int4
weights (section 2.4.3), with the op that quantises them for good later.
"""

from dataclasses import replace

from glm5.train.stages.stage import ModelForm, Stage


class Sft(Stage):
    """LM and MTP losses in the form that the stage finds and, where attention is sparse, the KL on the selected keys."""

    def change(self, before: ModelForm) -> ModelForm:
        return replace(before, int4_group_size=self.recipe.int4_group_size or None)
