"""Evaluate a model: how well it answers from a long context."""

import json
import sys
from pathlib import Path

NAME = "eval"


def add_arguments(parser) -> None:
    """What to evaluate, and on what."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    longctx = actions.add_parser("longctx", help="needles, variables, word counts and co-reference in long contexts")
    longctx.add_argument(
        "--run", dest="folder", type=Path, default=Path("runs/tiny"), help="run folder (default: %(default)s)"
    )
    longctx.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face model directory, in place of a run")
    longctx.add_argument("--dtype", choices=("float32", "bfloat16"), help="of a directory's weights (default: as stored)")
    longctx.add_argument("--fp8", choices=("dequantize", "keep"), default="dequantize", help="what becomes of FP8 weights")
    longctx.add_argument("--lengths", type=int, nargs="+", default=[256, 1024], help="tokens (default: 256 1024)")
    longctx.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all; a wrong name shows which there are")
    longctx.add_argument("--items", type=int, default=100, help="of each task at each length (default: %(default)s)")
    longctx.add_argument("--needles", type=int, default=8, help="keys in a haystack (default: %(default)s)")
    longctx.add_argument("--seed", type=int, default=0, help="of the items (default: %(default)s)")
    longctx.add_argument("--attention", choices=("dense", "sparse"), help="default: the form that the model was trained in")
    longctx.add_argument("--haystack", type=Path, metavar="FILE", help="text around the needles (default: made-up words)")
    longctx.add_argument("--json", type=Path, metavar="FILE", help="write the scores there too")


def run(args) -> None:
    """Prints a table of scores with their 95 % intervals."""
    from glm5._files import write_atomically
    from glm5.cli.generate import _of_directory, _of_run
    from glm5.data import Tokenizer
    from glm5.data.synthetic import TASKS, Shape
    from glm5.eval.longctx import evaluate, to_json
    from glm5.report import scores_table

    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}, want >= 0")
    shape = Shape(needles=args.needles, queries=min(args.needles, 3))
    haystack = None
    if args.haystack is not None:
        try:
            haystack = args.haystack.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{args.haystack} is not UTF-8") from None
    model, tokenizer = _of_directory(args) if args.model else _of_run(args)
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"{args.model}: its tokenizer.json has not GLM-5's special tokens, with which documents begin and end"
        )
    attention = args.attention or model.attention
    options = dict(seed=args.seed, attention=attention, shape=shape, haystack=haystack)
    told = (lambda what: print(what, file=sys.stderr)) if sys.stderr.isatty() else (lambda _: None)
    scores = to_json(
        evaluate(model, tokenizer, args.lengths, args.tasks or tuple(TASKS), args.items, **options, progress=told)
    )
    print(scores_table(scores, args.items))
    if args.json is not None:
        about = dict(source=str(args.model or args.folder), attention=attention, seed=args.seed, items=args.items)
        write_atomically(args.json, json.dumps(about | {"needles": args.needles, "scores": scores}, indent=1) + "\n")
