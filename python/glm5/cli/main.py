"""The ``glm5`` command line: finds the subcommand and runs it. Knows nothing about what a subcommand does.

A subcommand is a module with ``NAME``, a docstring whose first line is its help, ``add_arguments(parser)`` and
``run(args) -> int | None``. It imports torch inside ``run``, so that ``glm5 --help`` answers at once.
"""

import argparse
import errno
import os
import sys
from importlib import import_module

import glm5

COMMANDS = ("run", "train", "data", "generate", "eval", "convert", "bench", "check", "doctor")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="glm5", description="The GLM-5 system: train, adapt, serve.")
    parser.add_argument("--version", action="version", version=f"glm5 {glm5.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for command in COMMANDS:
        module = import_module(f"glm5.cli.{command}")
        summary = module.__doc__.splitlines()[0]
        subparser = subparsers.add_parser(module.NAME, help=summary, description=summary)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run, name=module.NAME)
    return parser


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses `argv`. argparse closes a KEY=VALUE list at the first option; here it goes on after it."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        parser.exit(2)
    if hasattr(args, "overrides"):
        args.overrides = args.overrides + [text for text in rest if "=" in text and not text.startswith("-")]
        rest = [text for text in rest if text not in args.overrides]
    if rest:
        parser.error(f"{args.name} does not know {' '.join(rest)}; see glm5 {args.name} --help")
    return args


def _explain(error: Exception) -> str:
    """What went wrong: of a failed system call the file, the reason, and what helps."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += "; make room and run the same command again"
    return text


def main(argv: list[str] | None = None) -> int:
    """Runs ``glm5 argv``; returns the exit status. A user's mistake (ValueError, OSError) ends in one line, no traceback."""
    args = _parse(argv)
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("GLM5_TRACEBACK"):
            raise
        print(f"glm5 {args.name}: {_explain(error)} (GLM5_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; the same command goes on from the last checkpoint" if hasattr(args, "runs") else ""
        print(f"\nglm5 {args.name}: interrupted{hint}", file=sys.stderr)
        return 130
