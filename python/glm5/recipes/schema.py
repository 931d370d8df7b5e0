"""The shape of a recipe. Every key has a type, a range and a meaning; an unknown key is an error, never ignored."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

# A stage's name is also a TOML key, part of a dotted override, and how its checkpoints' folders begin.
StageName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Strict(BaseModel):
    """A part of a recipe: what it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelRecipe(Strict):
    preset: str = "tiny"
    dtype: Literal["float32", "bfloat16"] = "float32"
    overrides: dict[str, JsonValue] = Field(default_factory=dict)  # fields of Glm5Config to change in the preset


class DataRecipe(Strict):
    build: str = "python-stdlib"  # data recipe, by name or path; built under the folder of runs if it is not there


# Keys that mean something to stages of one kind alone.
_KIND_OF_KEY = {"rope_theta": "midtrain", "int4_group_size": "sft"}


class StageRecipe(Strict):
    """One stage of training. Learning rates are peaks; steps, never seconds, decide when anything happens."""

    kind: Literal["pretrain", "midtrain", "dsa-warmup", "dsa-sparse", "sft"]
    steps: PositiveInt
    sequence_length: int = Field(1024, ge=2)
    packs_per_step: PositiveInt = 8  # a step trains on packs_per_step * sequence_length tokens
    long_document_power: NonNegativeFloat = 0.0  # p: documents are drawn in proportion to length^p; 0: all alike
    mix: dict[str, PositiveFloat] = Field(default_factory=dict)  # domain -> share of the packs; none named: the only domain
    muon_lr: PositiveFloat = 0.01
    adamw_lr: PositiveFloat = 0.003
    indexer_lr: PositiveFloat = 0.003
    weight_decay: NonNegativeFloat = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    final_lr: NonNegativeFloat = 0.1  # as a fraction of the peak, reached at the last step
    # Which part of the rise and fall is this stage's: several stages may go down one curve, whose peak and end each names.
    schedule_span: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    mtp_depth: int = Field(1, ge=0, le=8)
    mtp_weight: NonNegativeFloat = 0.3
    router_bias_rate: NonNegativeFloat = 0.001
    balance_weight: NonNegativeFloat = 0.0  # of the sequence-level balance loss of the experts; GLM-4.5: 1e-4
    z_loss: NonNegativeFloat = 0.0  # weight of the squared log-sum-exp of the routers' logits
    micro_batches: PositiveInt = 1  # parts in which a step's packs are computed; memory of one, the step of all
    checkpointing: Literal["none", "layers"] = "none"  # layers: each is computed again in the backward, from its input
    offload: Literal["none", "host", "file"] = "none"  # where activations wait for the backward
    clip_norm: NonNegativeFloat = 0.0  # largest norm of the gradient of all trained parameters together; 0: no limit
    ema: float = Field(0.0, ge=0, lt=1)  # decay of a running mean of the weights, one a step; 0: none is kept
    rope_theta: NonNegativeFloat = 0.0  # midtrain: the rotary base from here on, and in later stages; 0: no other
    int4_group_size: Literal[0, 32, 64, 128] = (
        0  # sft: routed experts learn as int4 weights, one scale for so many; 0: not so
    )
    checkpoint_every: PositiveInt = 25  # steps; keep it under 30 s of work
    validate_every: PositiveInt = 100

    @model_validator(mode="after")
    def _keys_belong_to_their_kinds(self):
        for key, kind in _KIND_OF_KEY.items():
            if self.kind != kind and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is a key of stages of kind {kind}, not {self.kind}")
        return self

    @model_validator(mode="after")
    def _the_span_goes_on(self):
        if self.schedule_span[0] >= self.schedule_span[1]:
            raise ValueError(f"schedule_span is {list(self.schedule_span)}, want the second number above the first")
        return self

    @model_validator(mode="after")
    def _parts_are_whole_packs(self):
        if self.packs_per_step % self.micro_batches:
            raise ValueError(
                f"micro_batches is {self.micro_batches}, want a divisor of packs_per_step, {self.packs_per_step}"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.packs_per_step


class LongContextRecipe(Strict):
    """Tasks of ``glm5.data.synthetic`` that are asked after every stage; see ``glm5.eval.longctx``."""

    lengths: tuple[PositiveInt, ...] = ()  # tokens; none: nothing is asked
    tasks: tuple[str, ...] = ("niah-single", "niah-multikey", "niah-multivalue", "niah-multiquery")
    items: PositiveInt = 50  # of each task at each length
    shape: dict[str, PositiveInt] = Field(default_factory=dict)  # fields of glm5.data.synthetic.Shape


class EvaluationRecipe(Strict):
    domain: str = ""  # whose held-out documents are measured after every stage; not named: the first stage's main one
    sequence_length: int = Field(1024, ge=2)
    packs: PositiveInt = 64
    packs_per_batch: PositiveInt = 8
    sample_prompt: str = "def "
    sample_tokens: NonNegativeInt = 240
    sample_temperature: NonNegativeFloat = 0.7
    longctx: LongContextRecipe = LongContextRecipe()
    chat_prompts: tuple[str, ...] = ()  # first messages to a model that has learnt conversations


class Recipe(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # also the name of the run's folder
    seed: int = Field(0, ge=0, lt=2**32)
    threads: PositiveInt = 2
    wandb: str = ""  # project of Weights & Biases that gets the metrics too
    model: ModelRecipe
    data: DataRecipe = DataRecipe()
    stages: dict[StageName, StageRecipe] = Field(min_length=1)  # run in the order in which they are written
    evaluation: EvaluationRecipe = EvaluationRecipe()

    @model_validator(mode="before")
    @classmethod
    def _kind_is_the_stage_name_by_default(cls, values):
        stages = values.get("stages") if isinstance(values, dict) else None
        if isinstance(stages, dict):
            named = {n: ({"kind": n} | s if isinstance(s, dict) else s) for n, s in stages.items()}
            return values | {"stages": named}
        return values

    def digest(self) -> str:
        """Identifies the recipe: sha256 of its resolved content."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()
