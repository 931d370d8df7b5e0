"""Continue a text with the model of a run, from its newest checkpoint."""

import sys
from pathlib import Path

NAME = "generate"


def add_arguments(parser) -> None:
    """The prompt, the run, and how to sample."""
    parser.add_argument("prompt", nargs="?", default="def ", help="text to continue (default: %(default)r)")
    parser.add_argument(
        "--run", dest="folder", type=Path, default=Path("runs/foundation"), help="run folder (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=400, help="how many bytes to write at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest byte (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")


def run(args) -> None:
    """Writes the prompt and its continuation to standard output."""
    from glm5.recipes import load_recipe
    from glm5.train.checkpoint import CheckpointStore
    from glm5.train.evaluation import generate_text
    from glm5.train.run import build_model, load_model_tensors, prepare

    if not (args.folder / "recipe.toml").is_file():
        raise ValueError(f"{args.folder} is not a run folder: it has no recipe.toml; `glm5 run foundation` makes one")
    recipe = load_recipe(args.folder / "recipe.toml")
    prepare(recipe)
    store = CheckpointStore(args.folder / "checkpoints", list(recipe.stages), writable=False)
    loaded = store.load_latest(lambda message: print(message, file=sys.stderr))
    if loaded is None:
        raise ValueError(f"{args.folder} has no checkpoint yet")
    manifest, files = loaded
    model = build_model(recipe)
    load_model_tensors(model, manifest, files["model"])
    attention = "sparse" if recipe.stages[manifest.stage].kind == "dsa-sparse" else "dense"
    print(args.prompt + generate_text(model, args.prompt, args.tokens, args.temperature, args.seed, attention))
