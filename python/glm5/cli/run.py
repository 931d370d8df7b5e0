"""Carry out a recipe: every stage, its evaluation, and a report. Run it again to go on after a stop."""

import os
from pathlib import Path

NAME = "run"

RECIPE_HELP = "tiny or foundation (minutes), small (an evening), glm-5 (for --dry-run), or a .toml file"


def add_arguments(parser) -> None:
    """RECIPE, overrides, and where runs are kept."""
    parser.add_argument("recipe", help=RECIPE_HELP)
    add_recipe_options(parser)


def add_recipe_options(parser) -> None:
    """What every command that takes a recipe takes beside it."""
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe, for example stages.pretrain.steps=50; --dry-run shows all keys",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and what it would take, and stop")
    parser.add_argument(
        "--layout",
        metavar="dp=..,tp=..,pp=..,ep=..,cp=..",
        help="with --dry-run: the ranks to count memory for; what is not named is 1 (docs/recipes.md)",
    )


def run(args) -> None:
    """Trains, evaluates, writes the report and prints the final table."""
    carry_out(args, last=None)


def carry_out(args, last: str | None) -> None:
    """The recipe of `args` up to the end of stage `last`, or all of it."""
    from glm5.recipes import RecipeError, load_recipe
    from glm5.recipes.load import to_toml
    from glm5.train.plan import Layout, plan

    recipe = load_recipe(args.recipe, args.overrides)
    if last is not None and last not in recipe.stages:
        raise RecipeError(f"{args.recipe}: no stage called {last!r}; its stages are {', '.join(recipe.stages)}")
    if args.dry_run:
        print(to_toml(recipe), end="")
        print(_as_comments(plan(recipe, Layout.parse(args.layout) if args.layout is not None else None)), end="")
        return
    if args.layout is not None:
        raise RecipeError("--layout is for --dry-run: glm5 trains in one process")
    _want_memory(recipe)

    from glm5.eval.longctx import evaluate_as_recipe
    from glm5.report import (
        columns,
        long_context_tables,
        read_metrics,
        stage_speeds,
        summary_rows,
        text_table,
        write_report,
    )
    from glm5.train.run import build_model, open_run, prepare, run_stages

    prepare(recipe)
    model = build_model(recipe)
    work = open_run(recipe, args.runs)
    try:
        results = run_stages(work, model, last=last, long_context=evaluate_as_recipe)
        report = write_report(work.folder)
    finally:
        work.close()
    if "about" in results:
        print(f"\n{text_table(summary_rows(results), results['about']['topk'])}")
    for lines in long_context_tables(results)[:1]:
        print(f"\nLong context, % found:\n{columns(lines)}")
    print(f"\nTraining speed: {stage_speeds(read_metrics(work.folder / 'metrics.jsonl'))}")
    for sample in results.get("samples", []):
        print(f"\n{sample['title']}:\n{sample['prompt']}{sample['text']}")
    print(f"\nReport: {report}")


def _as_comments(text: str) -> str:
    """So that what --dry-run prints can be read as a recipe again."""
    return "\n" + "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())


def _want_memory(recipe) -> None:
    """Raises RecipeError where the machine cannot hold the model and its optimizers, before it tries to."""
    from glm5.recipes import RecipeError
    from glm5.train.plan import resident_bytes

    needed, there = resident_bytes(recipe), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise RecipeError(
            f"{recipe.name} needs {needed / 1e9:,.0f} GB for its model and optimizers, this machine has {there / 1e9:,.0f}; "
            "--dry-run shows the plan"
        )
