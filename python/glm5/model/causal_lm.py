"""The language model: logits, training losses and generation over the backbone.

Knows nothing of optimizers, data or files. ``attention`` is set by the stage, "dense" or "sparse"; it never follows from the
length, the batch or the chunk, because the two forms round differently.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from zlib import crc32

import torch
from torch import nn

from glm5 import ops
from glm5.model.attention import Pass, Selection
from glm5.model.batches import flat_rows
from glm5.model.cache import LatentCache
from glm5.model.config import Glm5Config
from glm5.model.generation import generate
from glm5.model.int4 import want_group_size
from glm5.model.layers import Experts, LayerNorm, Linear, MoE, RMSNorm, at_least_float32
from glm5.model.pretrained import Progress, load_pretrained, save_pretrained
from glm5.model.rotary import RotaryTable, rope_frequencies
from glm5.model.transformer import Backbone, reaches

IGNORED = -100


@dataclass
class CausalLMOutput:
    """What ``Glm5ForCausalLM`` returns.

    Attributes:
        logits: [B, T, V], at least float32.
        mtp_logits: [d - 1] [B, T, V] lead from row t to token t + d + 1.
        loss: mean nats a target, scalar, when there were labels.
        hidden_states: [B, T, H] of the embedding and after each layer, the last after the final norm, when asked for.
    """

    logits: torch.Tensor
    mtp_logits: list[torch.Tensor] = field(default_factory=list)
    loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class Glm5ForCausalLM(nn.Module):
    """GLM-5.

    Args:
        config: the shape.
        dtype: of the parameters: torch.float32 or torch.bfloat16 (numeric profiles ``float32`` and ``bf16``); the router's
            correction bias stays float32.
        device: "meta" allocates nothing.
        seed: of the initial weights; a parameter's values depend on the seed, its name and its shape alone.

    Raises ValueError for an unknown attention form or a token, range or position that is out of range.
    """

    def __init__(
        self,
        config: Glm5Config,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.model = Backbone(config)
            self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.to(dtype)
        self._rotary = RotaryTable(*rope_frequencies(config), config.max_position_embeddings)
        self.extra_config: dict = {}  # what else the config.json said that the weights came with
        self._attention, self._checkpointing = "dense", "none"
        self._select: Callable[[Selection], torch.Tensor] | None = None
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(seed)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        attention: str = "sparse",
        fp8: str = "dequantize",
        progress: Progress = lambda *_: None,
    ) -> "Glm5ForCausalLM":
        """The model in a Hugging Face directory of ``model_type: glm_moe_dsa``.

        Args:
            folder: has config.json and model.safetensors, or shards and model.safetensors.index.json.
            dtype: of the parameters; None takes config.json's. The router's correction bias stays float32, and so do, beside
                bf16, a router's or an indexer's ``weights_proj`` weight that is stored so.
            device: where the weights go.
            attention: the form of attention to use, "sparse" or "dense".
            fp8: what becomes of block-scaled e4m3 weights: "dequantize" to ``dtype``, or "keep" them as they are (half the
                memory of bf16; they are dequantised on every use and take no gradient).
            progress: called with (numbers read, numbers in all) after each tensor.

        Raises:
            PretrainedError: a ValueError: the directory, its config or a file cannot be used, or tensors are missing, extra
                or misshapen: all of them are listed.
        """
        return load_pretrained(cls, folder, dtype=dtype, device=device, attention=attention, fp8=fp8, progress=progress)

    def save_pretrained(
        self,
        folder: Path | str,
        *,
        max_shard_bytes: int = 5_000_000_000,
        fused_experts: bool = False,
        progress: Progress = lambda *_: None,
    ) -> None:
        """Writes a directory that ``from_pretrained``, Transformers and the serving engines read. Every byte of a checkpoint
        comes back as it was.

        Args:
            folder: made if absent; a checkpoint that is there is replaced once the new one is complete.
            max_shard_bytes: a model that is larger becomes several files and an index.
            fused_experts: writes the experts of a layer as two tensors, as they are in memory, instead of three an expert.
                Faster to read here; others may not know it.
            progress: called with (bytes written, bytes in all) after each file.

        Raises:
            OSError: the disk is full or not writable; what was there before is still there.
        """
        save_pretrained(self, folder, max_shard_bytes=max_shard_bytes, fused_experts=fused_experts, progress=progress)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Matrices normal with std ``initializer_range``; norms 1, biases 0, router correction 0."""
        for module_name, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif isinstance(module, RMSNorm | LayerNorm):
                    parameter.fill_(1)
                else:
                    generator = torch.Generator().manual_seed(crc32(f"{seed} {module_name}.{name}".encode()))
                    values = torch.randn(parameter.shape, generator=generator) * self.config.initializer_range
                    parameter.copy_(values)
        for layer in self.moe_layers():
            layer.gate.e_score_correction_bias.zero_()

    # ---- what there is

    @property
    def attention(self) -> str:
        """The form of attention: "dense" (before the sparse stage) or "sparse" (from it on)."""
        return self._attention

    @attention.setter
    def attention(self, form: str) -> None:
        if form not in ("dense", "sparse"):
            raise ValueError(f"Glm5ForCausalLM.attention is {form!r}, want 'dense' or 'sparse'")
        self._attention = form

    @property
    def checkpointing(self) -> str:
        """What a backward computes again instead of keeping it: "none" or "layers", each from its input."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, what: str) -> None:
        if what not in ("none", "layers"):
            raise ValueError(f"Glm5ForCausalLM.checkpointing is {what!r}, want 'none' or 'layers'")
        self._checkpointing = what

    def set_rope_theta(self, theta: float) -> None:
        """Turns the rotary frequencies to another base, as GLM does when the context grows (GLM-4.5 report: 1e4 to 1e6 at
        32K). The config changes with them, so that ``save_pretrained`` writes what the model computes.

        Raises:
            ValueError: theta is no number > 0.
        """
        config = replace(self.config, rope_parameters=self.config.rope_parameters | {"rope_theta": theta})
        for module in self.modules():
            if hasattr(module, "config"):
                module.config = config
        self._rotary = RotaryTable(*rope_frequencies(config), config.max_position_embeddings)

    @property
    def int4_group_size(self) -> int | None:
        """Inputs a scale when the routed experts compute with int4 weights; None when with their own."""
        return next((getattr(layer.experts, "int4_group_size", None) for layer in self.moe_layers()), None)

    @int4_group_size.setter
    def int4_group_size(self, size: int | None) -> None:
        """Makes the routed experts compute with what ``ops.quantize_int4`` leaves of their weights, or with these again.

        The weights themselves stay as they are and take the gradient straight through: quantisation-aware training. A
        model saved in this form keeps its own weights; ``glm5.model.int4.quantized_experts`` gives the codes and scales.

        Raises:
            ValueError: size is none of 32, 64, 128 and -1 (a row), or does not divide the experts' widths; the experts are
                FP8.
        """
        if size is not None:
            if any(not isinstance(layer.experts, Experts) for layer in self.moe_layers()):
                raise ValueError("int4_group_size: the experts are FP8; load them with fp8='dequantize'")
            want_group_size(self.config, size)
        for layer in self.moe_layers():
            layer.experts.int4_group_size = size

    def tables(self) -> tuple[torch.Tensor, ...]:
        """What every pass reads beside parameters and buffers: the cosines and sines of the positions."""
        device = self.head_weight.device
        return self._rotary.on(device, at_least_float32(self.head_weight))

    def moe_layers(self) -> list[MoE]:
        """The MoE blocks in layer order, the MTP layer's last: the order of ``expert_load``."""
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MoE)]

    def indexer_parameters(self) -> Iterator[nn.Parameter]:
        """What the indexer's KL trains."""
        return (p for name, p in self.named_parameters() if ".indexer." in name)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """What the language-model loss trains: all the rest."""
        return (p for name, p in self.named_parameters() if ".indexer." not in name)

    def num_parameters(self, include_mtp: bool = True) -> int:
        """Weights in a checkpoint, the router's correction biases included."""
        mtp = f"model.layers.{self.config.num_hidden_layers}."
        return sum(t.numel() for name, t in self.state_dict().items() if include_mtp or not name.startswith(mtp))

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, H]: the output head, shared by the MTP layer (and by the embedding when they are tied)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    # ---- forward

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mtp_depth: int = 0,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """Logits of a rectangular batch; the arguments mean what they mean in Transformers.

        Args:
            input_ids: int [B, T].
            attention_mask: [B, T], 0 for padding, at either end of a sequence. A padded row attends to nothing; its logits
                mean nothing.
            position_ids: int [B, T] or [1, T]; None counts columns from 0, padding included. Without an attention_mask, a
                step other than +1 begins another document, which sees itself alone.
            labels: int [B, T], -100 where ignored: labels[:, t + 1] is the target of row t.
            mtp_depth: how many times the MTP layer is unrolled.
            output_hidden_states: whether to return them.

        Raises:
            ValueError: wrong shapes, padding between tokens, a token, label or position out of range.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"Glm5ForCausalLM: input_ids has shape {list(input_ids.shape)}, want [batch, time]")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"Glm5ForCausalLM: labels has shape {list(labels.shape)}, want {list(input_ids.shape)}")
        batch, time = input_ids.shape
        tokens = input_ids.reshape(-1)
        run = self._begin(*flat_rows(batch, time, attention_mask, position_ids, tokens.device))
        run.hidden = [] if output_hidden_states else None
        hidden = self.model(tokens, run)
        layers = None if run.hidden is None else tuple(h.view(batch, time, -1) for h in (*run.hidden, hidden))
        mtp = self._mtp(tokens, hidden, run, mtp_depth)
        logits = [self.logits(h).view(batch, time, -1) for h in (hidden, *mtp)]
        loss = None
        if labels is not None:
            shifted = torch.nn.functional.pad(labels[:, 1:].long(), (0, 1), value=IGNORED)
            loss = self._mean_nats(hidden, shifted.reshape(-1))
        return CausalLMOutput(logits[0], logits[1:], loss, layers)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] -> [T, V], at least float32."""
        return ops.linear(hidden, self.head_weight, None, at_least_float32(hidden))

    def hidden_states(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        ks: torch.Tensor,
        ke: torch.Tensor,
        *,
        collect_indexer: bool = False,
        cache: LatentCache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[Selection]]:
        """A flat batch: tokens, positions, ks, ke [T] int -> hidden [T, H] after the final norm, ready for ``logits``.

        Row t attends to rows [ks[t], ke[t]) and stands at positions[t]. With ``collect_indexer`` also the ``Selection`` of
        every layer (a shared layer's holds the indices it reuses), in either form of attention.
        With a ``cache`` (placed by the caller) the keys are its rows, and ks, ke count in them.
        """
        run = self._begin(positions, ks, ke, collect=collect_indexer, cache=cache)
        hidden = self.model(tokens, run)
        return (hidden, run.selections) if collect_indexer else hidden

    @contextmanager
    def selecting(self, select: Callable[[Selection], torch.Tensor]):
        """Within the block every full layer attends to ``select(selection)``, int32 [T, topk] ascending and -1 padded,
        instead of its indexer's choice (``glm5.model.selection`` has some). Sparse attention only."""
        before, self._select = self._select, select
        try:
            yield
        finally:
            self._select = before

    def _begin(self, positions, ks, ke, *, attention=None, indexer="none", cache=None, collect=False) -> Pass:
        cos, sin = self._rotary.on(positions.device, at_least_float32(self.head_weight))
        return Pass(
            positions.to(torch.int32),
            ks.to(torch.int32),
            ke.to(torch.int32),
            cos,
            sin,
            attention or self.attention,
            indexer=indexer,
            grad=torch.is_grad_enabled(),
            cache=cache,
            select=self._select,
            collect=collect,
            recompute=self.checkpointing == "layers" and torch.is_grad_enabled() and cache is None and not collect,
            plain=(attention or self.attention) == "sparse" and indexer == "none" and self._select is None and not collect,
        )

    def _mtp(self, tokens, hidden, run, depth):
        if depth and self.model.mtp is None:
            raise ValueError(f"Glm5ForCausalLM: mtp_depth is {depth}, but the config has num_nextn_predict_layers 0")
        return self.model.unroll_mtp(tokens, hidden, run, depth) if depth else ()

    # ---- training

    def losses(self, batch, *, mtp_depth: int = 3, indexer: str = "none", router_sequence_length: int | None = None) -> dict:
        """The losses of one flat batch.

        Args:
            batch: has ``tokens``, ``targets`` (-100: ignored), ``positions``, ``ks``, ``ke``, each [T] int, as attributes or
                as keys.
            mtp_depth: how many times the MTP layer is unrolled.
            indexer: "none": the language model alone, in the model's form of attention. "warmup": attention is dense,
                nothing but the indexers takes a gradient. "sparse": attention is sparse on the indexers' own choice, the
                language-model losses train the model, the KL on the selected keys trains the indexers and nothing else.
            router_sequence_length: tokens a sequence, which divide T, where the routers' losses are wanted.

        Returns:
            lm: mean nats a target over the main head, scalar; None for "warmup", which has no use for it.
            mtp: the same for each depth, none for "warmup"; a target counts at depth d only when its row's document reaches
                d + 1 tokens on.
            indexer_kl: mean KL a row over the indexed layers (each unroll of the MTP layer is one), or None. Rows without
                keys are left out, and so are those of depth d whose document does not reach d tokens on.
            indexer_rows: how many rows of how many layers that is, int tensor.
            balance, router_z: the ``router_losses`` summed over the MoE layers, the MTP layer counting as the mean over its
                unrolls; None where they were not asked for, and for "warmup".
            expert_load: int [MoE layers, E], tokens each expert got.
            num_targets: of the main head, int tensor. A mean over no targets is 0.

        Raises:
            ValueError: indexer is none of the three, router_sequence_length does not divide T.
        """
        if indexer not in ("none", "warmup", "sparse"):
            raise ValueError(f"Glm5ForCausalLM.losses: indexer is {indexer!r}, want 'none', 'warmup' or 'sparse'")
        get = batch.__getitem__ if isinstance(batch, dict) else lambda name: getattr(batch, name)
        tokens, targets, ks = get("tokens"), get("targets").long(), get("ks")
        attention = {"none": None, "warmup": "dense", "sparse": "sparse"}[indexer]
        run = self._begin(get("positions"), ks, get("ke"), attention=attention, indexer=indexer)

        learns = indexer != "warmup"  # else the passes are there for the attention that the indexers learn from
        if router_sequence_length is not None and learns:
            if router_sequence_length < 1 or len(tokens) % router_sequence_length:
                raise ValueError(
                    f"Glm5ForCausalLM.losses: router_sequence_length is {router_sequence_length}, want a divisor of the "
                    f"{len(tokens)} tokens"
                )
            run.sequence_length = router_sequence_length
        with torch.set_grad_enabled(run.grad and learns):
            hidden = self.model(tokens, run)
            lm = self._mean_nats(hidden, targets) if learns else None
            seeing = run.ke > run.ks
            taught, mtp = [seeing] * len(run.kl), []
            for d, drafted in enumerate(self._mtp(tokens, hidden, run, mtp_depth), 1):
                if learns:
                    mtp.append(self._mean_nats(drafted, mtp_targets(targets, run.positions, run.ks, d)))
                taught += [seeing & reaches(run.positions, run.ks, d)] * (len(run.kl) - len(taught))

        rows = torch.stack(taught).sum() if taught else torch.zeros((), dtype=torch.int64, device=tokens.device)
        kl = None
        if run.kl:
            kept = [torch.where(counted, layer, 0).sum() for counted, layer in zip(taught, run.kl, strict=True)]
            kl = torch.stack(kept).sum() / rows.clamp(min=1)
        moe = [layer for layer in self.model.layers if isinstance(layer.mlp, MoE)]
        unused = torch.zeros(self.config.n_routed_experts, dtype=torch.int32, device=tokens.device)
        ends = torch.stack([run.group_ends.get(layer.layer, unused) for layer in moe]) if moe else unused[None][:0]
        load = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))
        balance, router_z = self._router_losses(run, mtp_depth)
        counts = {"indexer_rows": rows, "expert_load": load, "num_targets": (targets != IGNORED).sum()}
        return {"lm": lm, "mtp": mtp, "indexer_kl": kl, "balance": balance, "router_z": router_z, **counts}

    def _router_losses(self, run, mtp_depth):
        if not run.router_losses:
            return None, None
        weights = [1 / mtp_depth if layer == self.config.num_hidden_layers else 1.0 for layer, _ in run.router_losses]
        return tuple(sum(w * loss[i] for w, (_, loss) in zip(weights, run.router_losses, strict=True)) for i in (0, 1))

    def loss_counts(self, batch, *, mtp_depth: int, indexer: str) -> dict:
        """Over how many terms each of the ``losses`` of `batch` is a mean: read off the batch, nothing is computed.

        The arguments are those of ``losses``. It is what losses of several parts of a batch must be weighted by to be those
        of the whole.

        Returns:
            lm, mtp (a list), indexer_kl: ints; balance, router_z: the number of tokens.
        """
        get = batch.__getitem__ if isinstance(batch, dict) else lambda name: getattr(batch, name)
        targets, positions, ks = get("targets").long(), get("positions"), get("ks")
        depths = range(1, mtp_depth + 1)
        mtp = [int((mtp_targets(targets, positions, ks, d) != IGNORED).sum()) for d in depths]
        rows = 0
        if indexer != "none":
            seeing = get("ke") > ks
            drafted = [int((seeing & reaches(positions, ks, d)).sum()) for d in depths]
            rows = self.config.num_hidden_layers * int(seeing.sum()) + sum(drafted)
        tokens = len(targets)
        return {"lm": int((targets != IGNORED).sum()), "mtp": mtp, "indexer_kl": rows, "balance": tokens, "router_z": tokens}

    def target_logprobs(self, batch) -> torch.Tensor:
        """log p(target) [T] of a flat batch as ``losses`` takes it, at least float32; 0 where the target is ignored."""
        get = batch.__getitem__ if isinstance(batch, dict) else lambda name: getattr(batch, name)
        hidden = self.hidden_states(get("tokens"), get("positions"), get("ks"), get("ke"))
        targets = get("targets").long()
        kept = (targets != IGNORED).nonzero().squeeze(1)
        logp = self._logp(hidden, targets, kept)
        return torch.zeros(targets.shape, dtype=logp.dtype, device=logp.device).index_copy(0, kept, logp)

    def _logp(self, hidden, targets, kept):
        """log p [kept] of the kept rows' targets."""
        temperature = torch.ones(kept.shape, dtype=torch.float32, device=hidden.device)
        return ops.token_logprobs(
            hidden.index_select(0, kept), self.head_weight, targets.index_select(0, kept), temperature
        )[0]

    def _mean_nats(self, hidden, targets):
        """Mean nats a target, 0 without any."""
        kept = (targets != IGNORED).nonzero().squeeze(1)
        return -self._logp(hidden, targets, kept).sum() / max(kept.shape[0], 1)

    @torch.no_grad()
    def update_router_bias(self, load: torch.Tensor, rate: float) -> None:
        """Loss-free balancing: each expert's correction bias moves by ``rate`` towards the mean load (2408.15664).

        load: [MoE layers, E], as ``losses`` returns it, summed over as many batches as the step had. An MTP layer that was
        not run has zero load and does not move.
        """
        layers = self.moe_layers()
        if tuple(load.shape) != (len(layers), self.config.n_routed_experts):
            want = [len(layers), self.config.n_routed_experts]
            raise ValueError(f"update_router_bias: load has shape {list(load.shape)}, want {want}")
        for layer, counts in zip(layers, load.double(), strict=True):
            step = rate * torch.sign(counts.mean() - counts)
            layer.gate.e_score_correction_bias += step.to(layer.gate.e_score_correction_bias)

    # ---- generation

    def generate(self, ids: torch.Tensor, max_new_tokens: int, **options) -> torch.Tensor:
        """``glm5.model.generation.generate`` on this model."""
        return generate(self, ids, max_new_tokens, **options)


def mtp_targets(targets: torch.Tensor, positions: torch.Tensor, ks: torch.Tensor, depth: int) -> torch.Tensor:
    """targets [T] of the main head -> those of MTP depth d: row t gets targets[t + d] of its own document, or -100."""
    moved = nn.functional.pad(targets[depth:], (0, min(depth, targets.shape[0])), value=IGNORED)
    return torch.where(reaches(positions, ks, depth), moved, IGNORED)
