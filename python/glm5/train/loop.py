"""The training loop: one stage from any step to its end. Everything that decides a bit is in the recipe and the step number.

What a stage is about (the model's form, its losses, who learns) stands in a file of its own under ``stages/``, and no stage
is known by name here. What comes before and after a stage is ``run.py``'s business.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from glm5.data import MixedDataset
from glm5.recipes import StageRecipe
from glm5.train.metrics import MetricsLog, Progress
from glm5.train.parameters import make_optimizers
from glm5.train.schedule import lr_factor
from glm5.train.stages import Stage


class TrainingError(ValueError):
    """Training cannot go on; the message says at which step and what to change."""


@dataclass
class StageState:
    """Where a stage is: updates done, and what its optimizers remember (empty at the start)."""

    step: int = 0
    optimizers: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def total_loss(losses: dict, recipe: StageRecipe) -> torch.Tensor:
    """LM + weight * mean over MTP depths + the indexer's KL, which reaches the indexer only: those that were asked for."""
    parts = [] if losses["lm"] is None else [losses["lm"]]
    if losses["mtp"]:
        parts.append(recipe.mtp_weight * sum(losses["mtp"]) / len(losses["mtp"]))
    if losses["indexer_kl"] is not None:
        parts.append(losses["indexer_kl"])
    return sum(parts[1:], parts[0])


def train_stage(
    model,
    name: str,
    stage: Stage,
    dataset: MixedDataset,
    first_pack: int,
    state: StageState,
    metrics: MetricsLog,
    save: Callable[[StageState], None],
    validate: Callable[[], float] | None = None,
) -> None:
    """Trains from ``state.step`` to the end of the stage.

    Args:
        name: the stage's, for metrics and errors.
        first_pack: where in the dataset's order the stage begins.
        save: called every ``checkpoint_every`` steps and at the end.
        validate: nats per byte of held-out text, asked for every ``validate_every`` steps.

    Raises:
        TrainingError: the loss or a gradient is not finite, or a parameter that the stage does not train was touched.
            Nothing of that step is applied or saved.
    """
    recipe = stage.recipe
    stage.form.give(model)
    optimizers = make_optimizers(model, stage)
    if state.optimizers:
        for key, (optimizer, _) in optimizers.items():
            optimizer.load_state_dict(state.optimizers[key])
    progress = Progress(name, recipe.steps)
    progress.update(state.step, recipe.tokens_per_step)

    while state.step < recipe.steps:
        started = time.perf_counter()
        batch = dataset.batch(state.step, recipe.packs_per_step, first_pack)
        losses = stage.losses(model, batch)
        loss = total_loss(losses, recipe)
        shown = scalars(losses)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"stage {name}, step {state.step}: the loss is {loss.item()} ({shown}); "
                f"lower the learning rates of stages.{name}"
            )
        loss.backward()
        if spoiled := spoiled_gradients(optimizers):
            raise TrainingError(
                f"stage {name}, step {state.step}: the gradient is not finite in {spoiled[0]} and {len(spoiled) - 1} "
                f"other parameters ({shown}); lower the learning rates of stages.{name}"
            )
        if touched := touched_though_frozen(model, optimizers):
            raise TrainingError(
                f"stage {name}, step {state.step}: {touched[0]} and {len(touched) - 1} other parameters are not the stage's "
                "to train, but have a gradient or an optimizer; this is a fault of glm5, please report it"
            )
        factor = lr_factor(state.step, recipe)
        for optimizer, lr in optimizers.values():
            optimizer.step(state.step, lr * factor)
            optimizer.zero_grad()
        stage.after_update(model, losses["expert_load"])
        state.step += 1

        speed = progress.update(state.step, recipe.tokens_per_step, **shown)
        seconds = time.perf_counter() - started
        metrics.write(
            stage=name, step=state.step, **shown, lr_factor=factor, tokens_per_s=round(speed), seconds=round(seconds, 4)
        )
        if validate and stage.validates and state.step % recipe.validate_every == 0 and state.step < recipe.steps:
            metrics.write(stage=name, step=state.step, validation=validate())
        if state.step % recipe.checkpoint_every == 0 or state.step == recipe.steps:
            state.optimizers = {key: optimizer.state_dict() for key, (optimizer, _) in optimizers.items()}
            save(state)
    progress.close()


def touched_though_frozen(model, optimizers: dict) -> list[str]:
    """Names of the frozen parameters that have a gradient, or state in an optimizer, all the same.

    The audit of every update. It looks at a few hundred pointers and reads no number.
    """
    held = {id(p) for optimizer, _ in optimizers.values() for p in optimizer.parameters.values()}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return [name for name, p in frozen.items() if p.grad is not None or id(p) in held]


def spoiled_gradients(optimizers: dict) -> list[str]:
    """Names of the parameters whose gradient's norm is infinite or a NaN. (Of bf16 it takes a 15th of ``isfinite``.)"""
    parameters = {n: p for optimizer, _ in optimizers.values() for n, p in optimizer.parameters.items()}
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if not gradients:
        return []
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(gradients.values()))])
    return [name for name, finite in zip(gradients, norms.isfinite().tolist(), strict=True) if not finite]


def scalars(losses: dict) -> dict[str, float]:
    """The losses as plain numbers, those that are there."""
    named = {"lm": losses["lm"], "indexer_kl": losses["indexer_kl"]}
    named |= {f"mtp{depth}": loss for depth, loss in enumerate(losses["mtp"], 1)}
    return {name: loss.item() for name, loss in named.items() if loss is not None}
