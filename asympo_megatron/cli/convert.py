"""`asympo convert`: checkpoints between Hugging Face and Megatron-Core, and whether two of them are the same."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from asympo_megatron.config import Config, override_config
from asympo_megatron.errors import ConfigError

EXIT_DIFFERENT = 1


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command and its three verbs."""
    text = "checkpoints between Hugging Face and Megatron-Core"
    convert = verbs.add_parser("convert", help=text, description=f"{text}, in one process, tensor by tensor")
    kinds = convert.add_subparsers(required=True, metavar="VERB")
    to_megatron = kinds.add_parser("hf-to-megatron", help="Hugging Face directory SRC -> Megatron checkpoint DST")
    _paths(to_megatron, "src", "dst")
    to_megatron.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="what it will be loaded with, e.g. parallel.tensor=2: checked"
    )
    to_megatron.set_defaults(command=hf_to_megatron)
    to_hf = kinds.add_parser("megatron-to-hf", help="Megatron checkpoint SRC, of any layout -> Hugging Face DST")
    _paths(to_hf, "src", "dst")
    _model_files(to_hf)
    to_hf.add_argument("--dtype", choices=("fp32", "bf16"), help="convert to it; default: as stored")
    to_hf.add_argument("--shard-gb", type=float, default=4.0, help="largest safetensors file (default 4)")
    to_hf.set_defaults(command=megatron_to_hf)
    same = kinds.add_parser("verify", help=f"whether A and B hold the same model; exit code {EXIT_DIFFERENT} if not")
    _paths(same, "a", "b")
    _model_files(same)
    same.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to score instead of the built-in ones")
    same.add_argument("--tolerance", type=float, help="largest difference of a token's NLL in nats (default 1e-4)")
    same.set_defaults(command=verify)


def hf_to_megatron(arguments: argparse.Namespace) -> int:
    from asympo_megatron.conversion import hf_to_megatron as convert

    base = Config()
    base.model.path = str(arguments.src)
    config = override_config(base, arguments.overrides)
    if convert(config, arguments.src, arguments.dst, progress=_progress()):
        print(f"{arguments.dst}: start from it with model.init={arguments.dst} model.path={arguments.src}")
    else:
        print(f"{arguments.dst}: made by Megatron-Bridge, for trainers that know this family; `asympo train` does not")
    return 0


def megatron_to_hf(arguments: argparse.Namespace) -> int:
    from asympo_megatron.conversion import megatron_to_hf as convert
    from asympo_megatron.mcore.model_config import DTYPES

    if not arguments.shard_gb > 0:
        raise ConfigError(f"--shard-gb is {arguments.shard_gb}; it must be greater than 0.")
    convert(
        arguments.src,
        arguments.dst,
        model_files=arguments.hf,
        dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
        shard_bytes=int(arguments.shard_gb * 2**30),
        progress=_progress(),
    )
    print(arguments.dst)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from asympo_megatron.conversion.verify import TEXTS, TOLERANCE
    from asympo_megatron.conversion.verify import verify as compare

    comparison = compare(
        arguments.a,
        arguments.b,
        model_files=arguments.hf,
        texts=[_read_text(arguments.text)] if arguments.text else TEXTS,
        tolerance=TOLERANCE if arguments.tolerance is None else arguments.tolerance,
        progress=_progress(),
    )
    print(comparison.table())
    return 0 if comparison.ok else EXIT_DIFFERENT


def _paths(parser: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        parser.add_argument(name, type=Path, metavar=name.upper())


def _model_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", type=Path, metavar="DIR", help="config.json and tokenizer, if the checkpoint has none")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {file} cannot be read: {error}.") from error


def _progress() -> Callable[[int, int], None] | None:
    """A line that counts tensors on a terminal; nothing where output goes to a file."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\r{done}/{total} tensors", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show
