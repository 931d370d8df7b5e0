"""Carry out a recipe up to the end of one stage. Stages that were finished before are not repeated."""

from glm5.cli.run import RECIPE_HELP, add_recipe_options, carry_out

NAME = "train"


def add_arguments(parser) -> None:
    """STAGE, and the recipe it is a stage of."""
    parser.add_argument(
        "stage", help="name of a stage of the recipe, for example pretrain; the stages before it are run first"
    )
    parser.add_argument("--recipe", default="tiny", help=f"{RECIPE_HELP} (default: %(default)s)")
    add_recipe_options(parser)


def run(args) -> None:
    """As ``glm5 run``, and stops after the stage."""
    carry_out(args, last=args.stage)
