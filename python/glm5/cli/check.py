"""Judge an implementation of an op: accuracy, row invariance, ties, NaN and more, a verdict each.

Without --impl it judges glm5's own. Exit status 0: every property holds; 1: one fails, or there is nothing to judge.
"""

import importlib
import os
import sys

NAME = "check"

_SHORT = {"bf16": "bfloat16", "fp32": "float32", "e4m3": "float8_e4m3fn"}


def add_arguments(parser) -> None:
    """Adds the arguments of ``glm5 check``."""
    parser.add_argument("op", nargs="+", help="op of glm5.ops; with --impl one alone")
    parser.add_argument("--impl", metavar="MODULE:FUNCTION", help="a callable with the op's signature (default: glm5's own)")
    parser.add_argument("--device", default="cpu", help="where it runs; the reference runs on the CPU (default: cpu)")
    parser.add_argument("--dtype", help="bfloat16, float32, float8_e4m3fn, ... (default: all that the op promises)")
    parser.add_argument("--examples", type=int, default=16, help="inputs to draw for each property and dtype (default: 16)")
    parser.add_argument("--property", action="append", metavar="NAME", help="judge this one alone; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")


def implementation(path: str):
    """The callable that ``module:function`` names, looked for in the current folder too. Raises ValueError saying what is
    missing."""
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"--impl is {path!r}, want MODULE:FUNCTION, such as mypkg.kernels:sparse_mla")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(f"--impl: importing {module_name} failed: {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ValueError(f"--impl: {module_name} has no {attribute!r}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"--impl: {path} is {type(found).__name__}, want a callable with the op's signature")
    return found


def _dtype(name: str):
    import torch

    found = getattr(torch, _SHORT.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"--dtype is {name!r}, want the name of a torch dtype, such as bfloat16 or float32")
    return found


def run(args) -> int:
    """Prints a report for each op; 1 when a property fails."""
    from glm5 import testing

    if args.impl and len(args.op) > 1:
        raise ValueError(f"--impl is one op's, but there are {len(args.op)}: {', '.join(args.op)}")
    impl = implementation(args.impl) if args.impl else None
    reports = []
    for name in args.op:
        reports.append(
            testing.check(
                name,
                impl=impl,
                device=args.device,
                dtype=_dtype(args.dtype) if args.dtype else None,
                examples=args.examples,
                properties=args.property,
                seed=args.seed,
            )
        )
        print(reports[-1], flush=True)
    return 0 if all(r.ok for r in reports) else 1
