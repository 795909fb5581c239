"""A trainer's end and a mirror in one process, and weights to send."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from asympo_megatron import protocol
from asympo_megatron.sync import version_path
from asympo_megatron.sync.mirror import Mirror
from asympo_megatron.sync.own_folder import OwnFolder
from asympo_megatron.sync.transport import DeltaTransport

Weights = dict[str, Tensor]


@dataclass
class DeltaWorld:
    """``root`` is what both see; each has a directory of its own in ``spool``."""

    path: Path
    transport: DeltaTransport
    mirror: Mirror

    @property
    def root(self) -> Path:
        return self.path / "weights"

    def publish(self, version: int, weights: Weights) -> Path:
        return Path(self.transport.store(version, 10 * version, weights.items(), f"sum{version}"))

    def bring(self, version: int, transfer: str = "t") -> Path:
        return Path(self.mirror.bring(protocol.BringVersionRequest(transfer, version)).path)

    def release(self, transfer: str = "t") -> None:
        self.mirror.release(protocol.LeaveGroupRequest(transfer))


@contextmanager
def delta_world(path: Path, deltas: int = 3, keep_last: int = 1) -> Iterator[DeltaWorld]:
    transport, mirror = make_transport(path, deltas, keep_last), make_mirror(path)
    try:
        yield DeltaWorld(path, transport, mirror)
    finally:
        transport.close()
        mirror.close()


def make_transport(path: Path, deltas: int, keep_last: int = 1) -> DeltaTransport:
    model = path / "model"
    if not model.is_dir():
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"model_type": "qwen3"}')
    return DeltaTransport(path / "weights", model, keep_last, deltas, OwnFolder(path / "spool", "trainer"))


def make_mirror(path: Path, lease_s: float = 60.0, port: int = 0) -> Mirror:
    folder = OwnFolder(path / "spool", "mirror")
    return Mirror(path / "weights", folder, "127.0.0.1", port, None, lease_s, backoff_s=0.001)


def some_weights() -> Weights:
    generator = torch.Generator().manual_seed(5)
    return {
        "embed": torch.randn(300, 40, generator=generator).bfloat16(),
        "far": torch.randn(200_000, generator=generator).bfloat16(),
        "norm": torch.randn(40, generator=generator),
        "steps": torch.tensor([3, 4]),
        "none": torch.empty(0),
        "one": torch.tensor(2.5),
    }


def edited(weights: Weights, **edits: dict[int, float]) -> Weights:
    """A copy in which single elements have other values."""
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    for name, values in edits.items():
        for position, value in values.items():
            changed[name].view(-1)[position] = value
    return changed


def same_bits(folder: Path, weights: Weights) -> bool:
    """Whether a version's directory holds exactly these, NaN and -0.0 included."""
    held = load_file(folder / "model.safetensors")
    return held.keys() == weights.keys() and all(
        held[name].dtype == tensor.dtype
        and held[name].shape == tensor.shape
        and held[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
        for name, tensor in weights.items()
    )


def delta_bytes(root: Path, version: int) -> int:
    return sum(file.stat().st_size for file in version_path(root, version).glob("*.delta"))
