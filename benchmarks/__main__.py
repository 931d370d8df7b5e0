"""``python -m benchmarks [FAMILY ...] [--quick]``: times our ops beside their peers and prints one table."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import harness


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("family", nargs="*", help="op families, such as linear; all when none is named")
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter samples: a smoke test, not a measurement")
    parser.add_argument("--only", default="", help="run only the cases whose name holds this text")
    parser.add_argument("--threads", type=int, default=0, help="threads (default: torch's choice)")
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parent / "results" / "latest.json", help="where to write"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        complaints = harness.run(arguments.family, arguments.quick, arguments.only, arguments.json)
    except ValueError as error:
        parser.error(str(error))
    for complaint in complaints:
        print(f"failed: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
