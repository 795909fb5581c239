"""The `asympo` command. It parses arguments and calls; nothing else."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from asympo_megatron.cli import commands, convert
from asympo_megatron.errors import EXIT_REQUEUE, AsympoError, PreemptedError

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 bad input, 75 preempted, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except KeyboardInterrupt:
        print("interrupted: everything is stopped; the same command resumes the run.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except PreemptedError as error:
        print(f"preempted: {error}", file=sys.stderr)
        return EXIT_REQUEUE
    except AsympoError as error:
        print(f"asympo: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asympo", description="Asynchronous RL post-training on Megatron-Core without behavior-policy information."
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    _role(verbs, "run", commands.run, "engines, controller and trainer on this machine, supervised")
    _role(verbs, "train", commands.train, "the trainer alone (one rank, or started by torchrun)")
    _role(verbs, "control", commands.control, "the controller alone")
    engine = _role(verbs, "engine", commands.engine, "one engine: embedded (a transformers model), or SGLang itself")
    engine.add_argument(
        "--engine-args",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="...",
        help="the rest of the line goes to SGLang, after rollout.engine_args",
    )
    _role(verbs, "mirror", commands.mirror, "an engine's host: published deltas made whole (sync.deltas)")
    convert.add_parser(verbs)
    for name, command, text in (
        ("report", commands.report, "write RUN_DIR/report.html"),
        ("journal", commands.journal, "what the journal of a run holds"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("run_dir", type=Path, metavar="RUN_DIR")
        verb.set_defaults(command=command)
    doctor = verbs.add_parser("doctor", help="what is installed, and what a config or a model would run")
    doctor.add_argument("config", nargs="?", metavar="CONFIG|MODEL", help="YAML, preset, or a Hugging Face directory")
    doctor.add_argument("overrides", nargs="*", metavar="a.b=c")
    doctor.set_defaults(command=commands.doctor)
    return parser


def _role(
    verbs: argparse._SubParsersAction, name: str, command: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text)
    verb.add_argument("config", metavar="CONFIG", help="YAML file or preset")
    verb.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, applied left to right")
    verb.set_defaults(command=command)
    return verb


if __name__ == "__main__":
    sys.exit(main())
