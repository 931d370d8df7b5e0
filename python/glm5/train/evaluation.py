"""What is measured after each stage of a run, and where it is kept: ``evaluation.json``, written whole or not at all.

An evaluation is a function of the weights at the end of its stage, so a resumed run does not repeat those it has.
"""

import json
from collections.abc import Callable
from functools import partial

import torch

from glm5._files import write_atomically
from glm5.data import ByteTokenizer, ChatTemplate
from glm5.data.shards import VALIDATION
from glm5.model.selection import last_keys, random_keys
from glm5.train.stages import stage_of
from glm5.train.validation import batches, indexer_kl, language_loss, selection_recall

# Of the recipe's packs, one in so many is enough for these.
_KL_SHARE = 4
_RECALL_SHARE = 8
_PERIODIC_SHARE = 4
# What a reader should call a measurement.
_TITLES = {
    "dense": "dense, after {stage}",
    "untrained": "sparse, indexer untrained",
    "sparse": "sparse, after {stage}",
    "window": "  with a last-k window instead",
    "random": "  with random keys instead",
    "before": "  {domain}, before {stage}",
    "own": "  {domain}, after {stage}",
}


class Evaluator:
    """Evaluates one run's model.

    ``results["measured"]`` maps labels such as "dsa-sparse/random" (stage and form) to a title and numbers, in the order of
    the run; "done" names the stages that were measured; "longctx" maps them to scores at each length, where the recipe asks
    for it; "recalls", "samples" and "about" are for the report.

    Args:
        long_context: (model, the run's recipe, form of attention) -> those scores; asking is ``glm5.eval``'s business.

    Raises:
        ValueError: the recipe asks for them and there is no `long_context`.
    """

    def __init__(self, run, model, long_context: Callable | None = None):
        self.run, self.model, self.recipe = run, model, run.recipe.evaluation
        if self.recipe.longctx.lengths and long_context is None:
            raise ValueError("the recipe has evaluation.longctx.lengths, which needs a long_context to ask the model")
        self._long_context = long_context
        self.path = run.folder / "evaluation.json"
        self.results: dict = self._read() if self.path.exists() else {"done": [], "measured": {}}

    def _read(self) -> dict:
        """Raises ValueError when the file is not one that ``after`` wrote."""
        try:
            results = json.loads(self.path.read_bytes())
            if isinstance(results["done"], list) and isinstance(results["measured"], dict):
                return results
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"{self.path} is damaged; remove {self.path.parent} to start the run again")

    def forget(self) -> None:
        """Drops all results: the run begins anew."""
        self.path.unlink(missing_ok=True)
        self.results = {"done": [], "measured": {}}

    def validation_loss(self) -> float:
        """Nats per byte on a few packs, in the model's present form of attention."""
        return language_loss(self.model, self.model.attention, self._held_out(_PERIODIC_SHARE))["nats_per_byte"]

    def after(self, name: str) -> None:
        """Measures what the stage called `name` is about, unless that was done before."""
        if name in self.results["done"]:
            return
        recipe = self.run.recipe
        stage, names = stage_of(recipe, name), list(recipe.stages)
        following = [stage_of(recipe, other) for other in names[names.index(name) + 1 :][:1]]
        if stage.indexer == "warmup":
            found = self._after_warmup(stage)
        elif stage.form.attention == "dense":
            found = self._after_dense(stage, adapts_next=any(other.indexer == "warmup" for other in following))
        else:
            found = self._after_sparse(stage)
        self._keep(name, found)
        # A stage with data of its own: what it made of their held-out part, and what they cost before it.
        for label, other in [("own", name), *(("before", other) for other in names[names.index(name) + 1 :][:1])]:
            if (domain := self.run.main_domain(other)) != self._domain():
                self._keep(other, {label: self._loss(stage.form.attention, domain=domain)}, domain)
        if self.recipe.longctx.lengths:
            # A warm-up's own form is dense; what it made of the indexers shows in the sparse one.
            attention = "sparse" if stage.indexer == "warmup" else stage.form.attention
            scores = self._long_context(self.model, recipe, attention)
            self.results.setdefault("longctx", {})[name] = {"attention": attention, "scores": scores}
        if name == names[-1]:
            self.results["samples"] = [self._sample(stage.form.attention), *self._answers(stage.form.attention)]
        self.results["about"] = {
            "topk": self.model.config.index_topk,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "text": self._about_data(),
        }
        self.results["done"].append(name)
        write_atomically(self.path, json.dumps(self.results, indent=1))

    def _keep(self, stage: str, found: dict, domain: str = "") -> None:
        for label, numbers in found.items():
            title = _TITLES[label].format(stage=stage, domain=domain)
            self.results["measured"][f"{stage}/{label}"] = {"title": title} | numbers

    def _after_dense(self, stage, adapts_next: bool) -> dict:
        """`adapts_next`: the next stage warms the indexers up, so what they are like before is of interest."""
        if not adapts_next:
            return {"dense": self._loss("dense")}
        return {
            "dense": self._loss("dense") | {"kl": self._kl("warmup", stage)},
            "untrained": self._loss("sparse") | self._recall("dense", 0),
        }

    def _after_warmup(self, stage) -> dict:
        return {
            "dense": self._loss("dense") | {"kl": self._kl("warmup", stage)},
            "sparse": self._loss("sparse") | self._recall("dense", stage.recipe.steps),
        }

    def _after_sparse(self, stage) -> dict:
        recall = self._recall("sparse", stage.recipe.steps)
        own = {"sparse": self._loss("sparse") | recall | {"kl": self._kl("sparse", stage)}}
        if stage.before.attention == "sparse":
            return own
        return own | {
            "dense": self._loss("dense"),
            "window": self._loss("sparse", lambda _: last_keys) | {"recall": self.results["recalls"][-1]["window"]},
            "random": self._loss("sparse", partial(random_keys, self.run.recipe.seed)),
        }

    def _loss(self, attention: str, select=None, domain: str | None = None) -> dict:
        return language_loss(self.model, attention, self._held_out(domain=domain), select)

    def _kl(self, indexer: str, stage) -> float:
        return indexer_kl(self.model, self._held_out(_KL_SHARE), indexer, stage.recipe.mtp_depth)

    def _recall(self, attention: str, steps: int) -> dict:
        """Recall of the indexer; both its and the window's join the curve, `steps` after the last point."""
        measured = selection_recall(self.model, attention, self._held_out(_RECALL_SHARE, packs_per_batch=1))
        curve = self.results.setdefault("recalls", [])
        curve.append({"at": (curve[-1]["at"] if curve else 0) + steps} | measured)
        return {"recall": measured["indexer"]}

    def _sample(self, attention: str) -> dict:
        text = generate_text(
            self.model,
            self.recipe.sample_prompt,
            self.recipe.sample_tokens,
            self.recipe.sample_temperature,
            self.run.recipe.seed,
            attention,
        )
        return {"title": f"A sample, {attention} attention", "prompt": self.recipe.sample_prompt, "text": text}

    def _answers(self, attention: str) -> list[dict]:
        """What the model says to each of the recipe's ``chat_prompts``, with thoughts and without."""
        template, found = ChatTemplate("glm-5"), []
        for prompt in self.recipe.chat_prompts:
            for thinks in (True, False):
                messages = [{"role": "user", "content": prompt}]
                asked = template.render(messages, add_generation_prompt=True, enable_thinking=thinks)
                ids = torch.from_numpy(asked.ids).long()
                options = dict(temperature=0.0, stop_tokens=template.stop_ids)
                out = generate_ids(self.model, ids, self.recipe.sample_tokens, attention, **options)
                text = template.tokenizer.decode(out.tolist(), skip_special=False)
                mode = "with a thought" if thinks else "without a thought"
                found.append({"title": f"An answer, {mode}", "prompt": asked.text, "text": text})
        return found

    def _about_data(self) -> str:
        domains = self.run.data.manifest.domains
        sizes = [f"{entry.bytes / 1e6:.1f} MB of {d}" for d, entry in domains.items() if not d.endswith(VALIDATION)]
        return ", ".join(sizes)

    def _domain(self) -> str:
        return self.recipe.domain or self.run.main_domain(next(iter(self.run.recipe.stages)))

    def _held_out(self, one_in: int = 1, packs_per_batch: int | None = None, domain: str | None = None):
        dataset = self.run.held_out(domain or self._domain(), self.recipe.sequence_length)
        return batches(dataset, -(-self.recipe.packs // one_in), packs_per_batch or self.recipe.packs_per_batch)


def generate_text(model, prompt: str, tokens: int, temperature: float, seed: int, attention: str = "sparse") -> str:
    """What the model writes after `prompt`, without the prompt."""
    tokenizer = ByteTokenizer()
    ids = torch.from_numpy(tokenizer.encode_document(prompt)[:-1]).long()
    options = dict(temperature=temperature, seed=seed, stop_tokens=(tokenizer.eos_id,))
    return tokenizer.decode(generate_ids(model, ids, tokens, attention, **options).tolist())


def generate_ids(model, ids: torch.Tensor, tokens: int, attention: str, **options) -> torch.Tensor:
    """What ``model.generate`` adds to `ids` [T] in a form of attention."""
    before, model.attention = model.attention, attention
    try:
        return model.generate(ids, tokens, **options)[len(ids) :]
    finally:
        model.attention = before
