"""Write a checkpoint in another form: Hugging Face's, native (experts fused), FP8, or int4 experts."""

import math
import sys
import tempfile
from pathlib import Path

NAME = "convert"


def add_arguments(parser) -> None:
    """Where from, where to, and what form."""
    parser.add_argument("source", type=Path, help="model directory, Hugging Face or native, or a run folder")
    parser.add_argument("target", type=Path, help="directory to write")
    parser.add_argument(
        "--to", choices=("hf", "native", "fp8", "int4"), default="hf", help="form to write (default: %(default)s)"
    )
    parser.add_argument("--ema", action="store_true", help="of a run: the running mean of its weights, where it keeps one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of what is not quantised (default: as stored)")
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128, -1),
        help="of int4: inputs that share a scale, -1 for all (default: what the run was trained with, else 32)",
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest file, in 10^9 bytes (default: %(default)s)"
    )


def run(args) -> None:
    """Writes the directory and says where it is."""
    import torch

    from glm5.cli.progress import Bar
    from glm5.data import ByteTokenizer, ChatTemplate
    from glm5.model.conversion import convert_checkpoint
    from glm5.train.run import load_run

    if not 0 < args.max_shard_gb < math.inf:
        raise ValueError(f"--max-shard-gb is {args.max_shard_gb}, want a number > 0")
    options = dict(
        dtype=getattr(torch, args.dtype) if args.dtype else None, max_shard_bytes=math.ceil(args.max_shard_gb * 1e9)
    )
    group_size = args.group_size
    with tempfile.TemporaryDirectory() as scratch:
        source = args.source
        if args.ema and not (source / "recipe.toml").is_file():
            raise ValueError(f"--ema is for run folders; {source} has no recipe.toml")
        if (source / "recipe.toml").is_file():
            model = load_run(source, lambda message: print(message, file=sys.stderr), average=args.ema)
            group_size = group_size or model.int4_group_size
            source = Path(scratch)
            model.save_pretrained(source, fused_experts=True)
            ByteTokenizer().save(source)
            ChatTemplate().save(source)
        with Bar(f"writing {args.target}") as bar:
            convert_checkpoint(source, args.target, args.to, group_size=group_size or 32, progress=bar, **options)
    print(args.target)
