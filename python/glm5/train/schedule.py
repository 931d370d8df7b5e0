"""Learning-rate schedules: factors of the peak as a function of the step."""

import math

from glm5.recipes import StageRecipe


def lr_factor(step: int, stage: StageRecipe) -> float:
    """The factor for update `step` (from 0): a linear rise over ``warmup_steps``, then `schedule` down to ``final_lr``.

    Of the way down the stage goes from the first to the second of ``schedule_span``, 0 to 1 being all of it.
    """
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return 1.0
    progress = (step - stage.warmup_steps + 1) / max(1, stage.steps - stage.warmup_steps)
    begin, end = stage.schedule_span
    progress = begin + (end - begin) * progress
    fall = progress if stage.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1 + (stage.final_lr - 1) * fall
