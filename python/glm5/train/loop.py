"""The training loop: one stage from any step to its end. Everything that decides a bit is in the recipe and the step number.

What a stage is about (the model's form, its losses, who learns) stands in a file of its own under ``stages/``, and no stage
is known by name here. What comes before and after a stage is ``run.py``'s business.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from glm5.data import MixedDataset
from glm5.recipes import StageRecipe
from glm5.train.counts import Keys, token_flops
from glm5.train.metrics import MetricsLog, Progress, machine_peak
from glm5.train.offload import Offload
from glm5.train.parameters import averaged, make_optimizers
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
    """LM + weight * mean over MTP depths + the indexer's KL, which reaches the indexer only, + what keeps the routers in
    check: those that were asked for."""
    parts = [] if losses["lm"] is None else [losses["lm"]]
    if losses["mtp"]:
        parts.append(recipe.mtp_weight * sum(losses["mtp"]) / len(losses["mtp"]))
    if losses["indexer_kl"] is not None:
        parts.append(losses["indexer_kl"])
    for name, weight in (("balance", recipe.balance_weight), ("router_z", recipe.z_loss)):
        if weight and losses.get(name) is not None:
            parts.append(weight * losses[name])
    return sum(parts[1:], parts[0])


def accumulate(
    stage: Stage, model, batches: list, check: Callable[[torch.Tensor, dict], None], saving: Callable = nullcontext
) -> tuple[dict, torch.Tensor]:
    """The gradient of a step's losses, its packs computed a part at a time.

    A loss of the step is the mean over all of its terms, not the mean of the parts' means: each part's loss counts by its
    share of the terms.

    Args:
        batches: the parts.
        check: called with each part's total loss and the losses that it is made of, before its backward.
        saving: makes the context for forward and backward of each part, such as ``Offload.saving``.

    Returns:
        The step's losses as plain numbers, and the load of the experts summed over the parts.
    """
    if len(batches) == 1:
        with saving():
            losses = stage.losses(model, batches[0])
            loss, shown = total_loss(losses, stage.recipe), scalars(losses)
            check(loss, shown)
            loss.backward()
        return shown, losses["expert_load"]

    counts = [flat(stage.loss_counts(model, batch)) for batch in batches]
    totals = {name: max(sum(each[name] for each in counts), 1) for name in counts[0]}
    summed, load = {}, 0
    for batch, count in zip(batches, counts, strict=True):
        with saving():
            losses = stage.losses(model, batch)
            weighted = {n: loss * (count[n] / totals[n]) for n, loss in flat(losses).items() if loss is not None}
            loss, shown = total_loss(nested(losses, weighted), stage.recipe), {n: x.item() for n, x in weighted.items()}
            check(loss, shown)
            loss.backward()
        summed = {n: summed.get(n, 0.0) + x for n, x in shown.items()}
        load = load + losses["expert_load"]
    return summed, load


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
    parts, model.checkpointing = recipe.micro_batches, recipe.checkpointing
    keeper = None
    if recipe.offload != "none":
        keeper = Offload(recipe.offload, [*model.parameters(), *model.buffers(), *model.tables()])
    for _, p in model.named_parameters():  # what is summed over several parts is summed in float32
        p.grad_dtype = torch.promote_types(p.dtype, torch.float32) if parts > 1 else p.dtype

    def check(loss: torch.Tensor, shown: dict) -> None:
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"stage {name}, step {state.step}: the loss is {loss.item()} ({shown}); "
                f"lower the learning rates of stages.{name}"
            )

    while state.step < recipe.steps:
        started = time.perf_counter()
        places = range(state.step * parts, (state.step + 1) * parts)
        batches = [dataset.batch(place, recipe.packs_per_step // parts, first_pack) for place in places]
        shown, expert_load = accumulate(stage, model, batches, check, keeper.saving if keeper else nullcontext)
        norm, spoiled = gradient_norm(optimizers)
        if spoiled:
            raise TrainingError(
                f"stage {name}, step {state.step}: the gradient is not finite in {spoiled[0]} and {len(spoiled) - 1} "
                f"other parameters ({shown}); lower the learning rates of stages.{name}"
            )
        if touched := touched_though_frozen(model, optimizers):
            raise TrainingError(
                f"stage {name}, step {state.step}: {touched[0]} and {len(touched) - 1} other parameters are not the stage's "
                "to train, but have a gradient or an optimizer; this is a fault of glm5, please report it"
            )
        if recipe.clip_norm and norm > recipe.clip_norm:
            scale_gradients(optimizers, recipe.clip_norm / norm)
        factor = lr_factor(state.step, recipe)
        for optimizer, lr in optimizers.values():
            optimizer.step(state.step, lr * factor)
            optimizer.zero_grad()
        stage.after_update(model, expert_load)
        state.step += 1

        speed = progress.update(state.step, recipe.tokens_per_step, **shown)
        seconds = time.perf_counter() - started
        metrics.write(
            stage=name,
            step=state.step,
            **shown,
            gradient_norm=norm,
            **({"offloaded": keeper.bytes["out"]} if keeper else {}),
            lr_factor=factor,
            tokens_per_s=round(speed),
            seconds=round(seconds, 4),
            **rate(step_flops(model, stage, batches), seconds, model),
        )
        if keeper:
            keeper.clear()
        if validate and stage.validates and state.step % recipe.validate_every == 0 and state.step < recipe.steps:
            measured = {"validation": validate()}
            if recipe.ema:
                with averaged(model, optimizers):
                    measured["validation_ema"] = validate()
            metrics.write(stage=name, step=state.step, **measured)
        if state.step % recipe.checkpoint_every == 0 or state.step == recipe.steps:
            state.optimizers = {key: optimizer.state_dict() for key, (optimizer, _) in optimizers.items()}
            save(state)
    progress.close()
    if keeper:
        keeper.close()


def step_flops(model, stage: Stage, batches: list) -> float:
    """Operations of the matrix products of a step, as ``train/counts.py`` counts them, on the keys that the batches have.

    What is computed again because of ``checkpointing`` does not count.
    """
    visible = torch.cat([batch.ke - batch.ks for batch in batches]).double()
    keys = Keys(float(visible.mean()), float(visible.clamp(max=model.config.index_topk).mean()))
    form, depth = stage.form.attention, stage.recipe.mtp_depth
    each = token_flops(model.config, keys, attention=form, indexer=stage.indexer, mtp_depth=depth)
    return len(visible) * sum(each.values())


def rate(flops: float, seconds: float, model) -> dict[str, float]:
    """Operations a second, and their share of what the machine reaches on registers in the model's dtype."""
    peak = machine_peak(next(model.parameters()).dtype, torch.get_num_threads())
    share = {"share_of_peak": float(f"{flops / seconds / peak:.4g}")} if peak else {}
    return {"flops_per_s": float(f"{flops / seconds:.4g}")} | share


def touched_though_frozen(model, optimizers: dict) -> list[str]:
    """Names of the frozen parameters that have a gradient, or state in an optimizer, all the same.

    The audit of every update. It looks at a few hundred pointers and reads no number.
    """
    held = {id(p) for optimizer, _ in optimizers.values() for p in optimizer.parameters.values()}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return [name for name, p in frozen.items() if p.grad is not None or id(p) in held]


def gradients_of(optimizers: dict) -> dict[str, torch.Tensor]:
    """The gradients that there are, by the names of their parameters."""
    parameters = {n: p for optimizer, _ in optimizers.values() for n, p in optimizer.parameters.items()}
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def gradient_norm(optimizers: dict) -> tuple[float, list[str]]:
    """The norm of all gradients together, and the names of the parameters whose own is infinite or a NaN. (Of bf16 it takes
    a 15th of ``isfinite``.)"""
    gradients = gradients_of(optimizers)
    if not gradients:
        return 0.0, []
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(list(gradients.values()), dtype=torch.float32)])
    spoiled = [name for name, finite in zip(gradients, norms.isfinite().tolist(), strict=True) if not finite]
    return float(norms.square().sum().sqrt()), spoiled


def scale_gradients(optimizers: dict, factor: float) -> None:
    """Multiplies every gradient."""
    torch._foreach_mul_(list(gradients_of(optimizers).values()), factor)


# What a stage may ask of ``model.losses``; "mtp" is a list, one a depth, and its members are called mtp1, mtp2, ...
_LOSSES = ("lm", "indexer_kl", "balance", "router_z")


def flat(losses: dict) -> dict:
    """The losses, or what is said of each, by the names that metrics have."""
    return {n: losses.get(n) for n in _LOSSES} | {f"mtp{depth}": each for depth, each in enumerate(losses["mtp"], 1)}


def nested(losses: dict, named: dict) -> dict:
    """`losses` with the values of `named`, which has the names of ``flat``."""
    mtp = [named[f"mtp{depth}"] for depth, _ in enumerate(losses["mtp"], 1)]
    return {n: named.get(n) for n in _LOSSES} | {"mtp": mtp}


def scalars(losses: dict) -> dict[str, float]:
    """The losses as plain numbers, those that are there."""
    return {name: loss.item() for name, loss in flat(losses).items() if loss is not None}
