"""Time the ops beside their peers, and print what share of this machine's limits they reach."""

import sys
from pathlib import Path

NAME = "bench"


def add_arguments(parser) -> None:
    """What to run, against what, and where the figures go."""
    parser.add_argument("op", nargs="*", help="ops (moe_permute) or families (moe), all when none is named")
    parser.add_argument(
        "--against", default="", metavar="LIST", help="peers: torch,torchao,kt,transformers (default: those installed)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter samples: a smoke test, not a measurement")
    parser.add_argument("--only", default="", metavar="TEXT", help="run only the cases whose name holds this text")
    parser.add_argument("--threads", type=int, default=0, help="threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the shares there: .svg, or .png with cairosvg")


def benchmarks_root() -> Path:
    """The folder that has ``benchmarks`` in it: a checkout's root, or the copy that a wheel brings."""
    package = Path(__file__).parents[1]
    return next(root for root in (package / "_bundled", package.parents[1]) if (root / "benchmarks/harness.py").is_file())


def run(args) -> int:
    """Prints the tables. Returns 1 when a figure cannot be right or a promise about memory is broken."""
    import torch

    if (root := str(benchmarks_root())) not in sys.path:
        sys.path.insert(0, root)
    from benchmarks import harness, peers, picture

    if args.threads < 0:
        raise ValueError(f"--threads is {args.threads}, want >= 1")
    peers.choose([name for name in args.against.split(",") if name])
    if args.picture:
        picture.check(args.picture)
    if args.threads:
        torch.set_num_threads(args.threads)
    complaints = harness.run(args.op, args.quick, args.only, args.json, args.picture)
    for complaint in complaints:
        print(f"failed: {complaint}", file=sys.stderr)
    return 1 if complaints else 0
