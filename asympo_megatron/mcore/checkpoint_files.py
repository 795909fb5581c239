"""Digests of a checkpoint's files. The checksum of the weights says nothing of optimizer states and random states.

Each rank reads what it wrote while that is still in memory, and a share of all files before they are loaded.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch.distributed as dist

from asympo_megatron.errors import DamagedCheckpointError


def own_digests(directory: Path, rank: int) -> dict[str, str]:
    """File name to sha256 of the shards that a rank has written."""
    return _digests(file for file in directory.iterdir() if file.name.startswith(f"__{rank}_"))


def gathered(own: Mapping[str, str]) -> dict[str, str]:
    """Collective: the digests of all ranks."""
    parts: list[Mapping[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {name: digest for part in parts for name, digest in part.items()}


def with_the_rest(directory: Path, digests: Mapping[str, str]) -> dict[str, str]:
    """``digests`` and those of every other file in ``directory``, in the order of names."""
    rest = _digests(file for file in directory.iterdir() if file.name not in digests)
    return dict(sorted({**digests, **rest}.items()))


def check_files(directory: Path, digests: Mapping[str, str]) -> None:
    """Collective: the files are what was saved; each rank reads a share of them.

    Raises:
        DamagedCheckpointError: on every rank; the message names a file that is missing or has changed.
    """
    names = sorted(digests)[dist.get_rank() :: dist.get_world_size()]
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, _first_problem(directory, {name: digests[name] for name in names}))
    for problem in problems:
        if problem:
            raise DamagedCheckpointError(f"checkpoint {directory} is damaged: {problem}. Use an older one.")


def _first_problem(directory: Path, digests: Mapping[str, str]) -> str:
    for name, wanted in digests.items():
        try:
            (got,) = _digests([directory / name]).values()
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        if got != wanted:
            return f"{name} has sha256 {got[:16]}..., was saved with {wanted[:16]}..."
    return ""


def _digests(files: Iterable[Path]) -> dict[str, str]:
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
