"""The training loop: one stage from any step to its end. Everything that decides a bit is in the recipe and the step number.

A stage differs from another only in its objective: which attention the model uses, which losses it asks for, which
parameters learn (``parameters.py``). What comes before and after a stage is ``run.py``'s business.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from glm5.data import PackedDataset
from glm5.recipes import StageRecipe
from glm5.train.metrics import MetricsLog, Progress
from glm5.train.parameters import make_optimizers
from glm5.train.schedule import lr_factor

# kind -> attention of the model, indexer loss it asks for
OBJECTIVES = {"pretrain": ("dense", "none"), "dsa-warmup": ("dense", "warmup"), "dsa-sparse": ("sparse", "sparse")}


class TrainingError(ValueError):
    """Training cannot go on; the message says at which step and what to change."""


@dataclass
class StageState:
    """Where a stage is: updates done, and what its optimizers remember (empty at the start)."""

    step: int = 0
    optimizers: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def total_loss(losses: dict, stage: StageRecipe) -> torch.Tensor:
    """LM + weight * mean over MTP depths + the indexer's KL, which reaches the indexer only."""
    if stage.kind == "dsa-warmup":
        return losses["indexer_kl"]
    total = losses["lm"]
    if losses["mtp"]:
        total = total + stage.mtp_weight * sum(losses["mtp"]) / len(losses["mtp"])
    if stage.kind == "dsa-sparse":
        total = total + losses["indexer_kl"]
    return total


def train_stage(
    model,
    name: str,
    stage: StageRecipe,
    dataset: PackedDataset,
    first_pack: int,
    state: StageState,
    metrics: MetricsLog,
    save: Callable[[StageState], None],
    validate: Callable[[], float] | None = None,
) -> None:
    """Trains from ``state.step`` to the end of the stage.

    Args:
        first_pack: where in the dataset's order the stage begins.
        save: called every ``checkpoint_every`` steps and at the end.
        validate: nats per byte of held-out text, asked for every ``validate_every`` steps.

    Raises:
        TrainingError: the loss or a gradient is not finite. Nothing of that step is applied or saved.
    """
    model.attention, indexer_loss = OBJECTIVES[stage.kind]
    optimizers = make_optimizers(model, stage)
    if state.optimizers:
        for key, (optimizer, _) in optimizers.items():
            optimizer.load_state_dict(state.optimizers[key])
    progress = Progress(name, stage.steps)
    progress.update(state.step, stage.tokens_per_step)

    while state.step < stage.steps:
        started = time.perf_counter()
        batch = dataset.batch(state.step, stage.packs_per_step, first_pack)
        losses = model.losses(batch, mtp_depth=stage.mtp_depth, indexer=indexer_loss)
        loss = total_loss(losses, stage)
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
        factor = lr_factor(state.step, stage)
        for optimizer, lr in optimizers.values():
            optimizer.step(state.step, lr * factor)
            optimizer.zero_grad()
        if stage.kind != "dsa-warmup" and stage.router_bias_rate:
            model.update_router_bias(losses["expert_load"], stage.router_bias_rate)
        state.step += 1

        speed = progress.update(state.step, stage.tokens_per_step, **shown)
        seconds = time.perf_counter() - started
        metrics.write(
            stage=name, step=state.step, **shown, lr_factor=factor, tokens_per_s=round(speed), seconds=round(seconds, 4)
        )
        # In the warm-up the model is frozen: its loss stays what it was.
        if validate and stage.kind != "dsa-warmup" and state.step % stage.validate_every == 0 and state.step < stage.steps:
            metrics.write(stage=name, step=state.step, validation=validate())
        if state.step % stage.checkpoint_every == 0 or state.step == stage.steps:
            state.optimizers = {key: optimizer.state_dict() for key, (optimizer, _) in optimizers.items()}
            save(state)
    progress.close()


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
