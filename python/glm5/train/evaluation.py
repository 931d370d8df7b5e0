"""What is measured after each stage of a run, and where it is kept: ``evaluation.json``, written whole or not at all.

An evaluation is a function of the weights at the end of its stage, so a resumed run does not repeat those it has.
"""

import json
from functools import partial

from glm5._files import write_atomically
from glm5.data import ByteTokenizer
from glm5.model.selection import last_keys, random_keys
from glm5.train.validation import batches, indexer_kl, language_loss, selection_recall

_KL_PACKS = 16
_RECALL_PACKS = 8
_PERIODIC_PACKS = 16


class Evaluator:
    """Evaluates one run's model. ``results`` maps labels such as "dsa-sparse/random" to numbers."""

    def __init__(self, run, model):
        self.run, self.model, self.recipe = run, model, run.recipe.evaluation
        self.path = run.folder / "evaluation.json"
        self.results: dict = self._read() if self.path.exists() else {"done": []}

    def _read(self) -> dict:
        """Raises ValueError when the file is not one that ``after`` wrote."""
        try:
            results = json.loads(self.path.read_bytes())
            if isinstance(results["done"], list):
                return results
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"{self.path} is damaged; remove {self.path.parent} to start the run again")

    def forget(self) -> None:
        """Drops all results: the run begins anew."""
        self.path.unlink(missing_ok=True)
        self.results = {"done": []}

    def validation_loss(self) -> float:
        """Nats per byte on a few packs, in the model's present form of attention."""
        return language_loss(self.model, self.model.attention, self._held_out(_PERIODIC_PACKS))["nats_per_byte"]

    def after(self, name: str) -> None:
        """Measures what the stage called `name` is about, unless that was done before."""
        if name in self.results["done"]:
            return
        stages = self.run.recipe.stages
        stage, names = stages[name], list(stages)
        following = names[names.index(name) + 1 :]
        if stage.kind == "pretrain" and following and stages[following[0]].kind == "pretrain":
            return  # one long pre-training in two lengths is measured at its end
        measure = {"pretrain": self._after_pretrain, "dsa-warmup": self._after_warmup, "dsa-sparse": self._after_sparse}
        self.results |= measure[stage.kind](stage)
        self.results["about"] = {
            "topk": self.model.config.index_topk,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "text": f"{sum(map(len, self.run.corpus.train)) / 1e6:.1f} MB of Python source",
        }
        self.results["done"].append(name)
        write_atomically(self.path, json.dumps(self.results, indent=1))

    def _after_pretrain(self, stage) -> dict:
        return {
            "pretrain/dense": self._loss("dense") | {"kl": self._kl("warmup", stage)},
            "pretrain/sparse": self._loss("sparse") | self._recall("dense", 0),
        }

    def _after_warmup(self, stage) -> dict:
        return {
            "dsa-warmup/dense": self._loss("dense") | {"kl": self._kl("warmup", stage)},
            "dsa-warmup/sparse": self._loss("sparse") | self._recall("dense", stage.steps),
        }

    def _after_sparse(self, stage) -> dict:
        recall = self._recall("sparse", stage.steps)
        return {
            "dsa-sparse/dense": self._loss("dense"),
            "dsa-sparse/sparse": self._loss("sparse") | recall | {"kl": self._kl("sparse", stage)},
            "dsa-sparse/window": self._loss("sparse", lambda _: last_keys)
            | {"recall": self.results["recalls"][-1]["window"]},
            "dsa-sparse/random": self._loss("sparse", partial(random_keys, self.run.recipe.seed)),
            "samples": [self._sample()],
        }

    def _loss(self, attention: str, select=None) -> dict:
        return language_loss(self.model, attention, self._held_out(self.recipe.packs), select)

    def _kl(self, indexer: str, stage) -> float:
        return indexer_kl(self.model, self._held_out(_KL_PACKS), indexer, stage.mtp_depth)

    def _recall(self, attention: str, steps: int) -> dict:
        """Recall of the indexer; both its and the window's join the curve, `steps` after the last point."""
        measured = selection_recall(self.model, attention, self._held_out(_RECALL_PACKS, packs_per_batch=1))
        curve = self.results.setdefault("recalls", [])
        curve.append({"at": (curve[-1]["at"] if curve else 0) + steps} | measured)
        return {"recall": measured["indexer"]}

    def _sample(self) -> dict:
        text = generate_text(
            self.model,
            self.recipe.sample_prompt,
            self.recipe.sample_tokens,
            self.recipe.sample_temperature,
            self.run.recipe.seed,
        )
        return {"title": "A sample, sparse attention", "prompt": self.recipe.sample_prompt, "text": text}

    def _held_out(self, packs: int, packs_per_batch: int | None = None):
        dataset = self.run.dataset("validation", self.recipe.sequence_length)
        return batches(dataset, packs, packs_per_batch or self.recipe.packs_per_batch)


def generate_text(model, prompt: str, tokens: int, temperature: float, seed: int, attention: str = "sparse") -> str:
    """What the model writes after `prompt`, without the prompt."""
    import torch

    tokenizer = ByteTokenizer()
    ids = torch.from_numpy(tokenizer.encode_document(prompt)[:-1]).long()
    before, model.attention = model.attention, attention
    try:
        out = model.generate(ids, tokens, temperature=temperature, seed=seed, stop_tokens=(tokenizer.eos_id,))
    finally:
        model.attention = before
    return tokenizer.decode(out[len(ids) :].tolist())
