"""What `sync.deltas` publishes of a real small language model: share of changed elements, bytes beside a whole version.

    python benchmarks/weight_delta.py [--model DIR] [--steps N] [--quick] [--save]

SmolLM2-135M-Instruct (`make smollm2`), published in bf16 after every step of Adam at lr 1e-6 on float32 master weights;
gradients of the next-token loss over pages of docs/. Two masters make the same updates. "fresh" begins at the published
bf16 values, in the middle of their rounding intervals, from where hardly any weight gets away in a few steps.
"settled" begins anywhere in these intervals, as after long training: that is what a run pays, and what the goal is
for. Every delta goes through the real transport and a mirror, which checks the sha256 of what it makes.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import harness
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from asympo_megatron import protocol
from asympo_megatron.sync import read_manifest
from asympo_megatron.sync.mirror import Mirror
from asympo_megatron.sync.own_folder import OwnFolder
from asympo_megatron.sync.transport import DeltaTransport

MODEL = harness.ROOT / ".venv" / "smollm2"
LR = 1e-6
GOAL = 0.1
Weights = dict[str, Tensor]


class Lane:
    """One master's trainer end and mirror."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._transport = DeltaTransport(folder / "weights", model, 1, 1000, OwnFolder(folder, "trainer"))
        self._mirror = Mirror(folder / "weights", OwnFolder(folder, "mirror"), "127.0.0.1", 0, None, lease_s=0.0)
        self._last: Weights = {}
        self.shares: list[float] = []
        self.sizes: list[float] = []
        self.publish_s: list[float] = []
        self.bring_s: list[float] = []

    def publish(self, version: int, weights: Weights) -> None:
        """Publish and mirror a version; versions after the first are counted."""
        start = time.perf_counter()
        path = Path(self._transport.store(version, version, weights.items(), str(version)))
        self.publish_s.append(time.perf_counter() - start)
        start = time.perf_counter()
        self._mirror.bring(protocol.BringVersionRequest("t", version))
        self.bring_s.append(time.perf_counter() - start)
        if version > 0:
            manifest = read_manifest(path)
            sizes = [sum(entry.bytes for entry in files.values()) for files in (manifest.files, manifest.whole)]
            self.sizes.append(sizes[0] / sizes[1])
            changed = sum(int((_bits(weights[name]) != _bits(old)).sum()) for name, old in self._last.items())
            self.shares.append(changed / sum(old.numel() for old in self._last.values()))
        self._last = weights

    def close(self) -> None:
        self._transport.close()
        self._mirror.close()


def settled(weights: Tensor) -> Tensor:
    """Float32 values that round to these bf16 ones, anywhere in their rounding intervals; zeros stay."""
    bits = weights.float().view(torch.int32)
    moved = (bits + torch.randint(-0x7FFF, 0x8000, bits.shape, dtype=torch.int32)).view(torch.float32)
    return torch.where(weights == 0, weights.float(), moved)


def main() -> int:
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = harness.Report("weight_delta", save=arguments.save)
    with tempfile.TemporaryDirectory() as folder:
        lanes = {name: Lane(Path(folder) / name, arguments.model) for name in ("settled", "fresh")}
        try:
            for version, masters in enumerate(_train(arguments)):
                for name, weights in masters.items():
                    lanes[name].publish(version, weights)
        finally:
            for lane in lanes.values():
                lane.close()
    for name, lane in lanes.items():
        _show(report, name, lane)
    return report.finish()


def _arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="Hugging Face directory of a causal LM in bf16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of text, each step")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} has no config.json: `make smollm2` makes it, or name another with --model.")
    if arguments.quick:
        arguments.steps, arguments.tokens = 3, 128
    return arguments


def _train(arguments: argparse.Namespace) -> Iterator[dict[str, Weights]]:
    """bf16 weights of both masters, before the first step and after each."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    fresh = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model = model.float().train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(settled(fresh[name]))
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), LR)
    text = "".join(page.read_text() for page in sorted((harness.ROOT / "docs").glob("*.md")))
    ids = AutoTokenizer.from_pretrained(arguments.model)(text, return_tensors="pt").input_ids
    for step in range(arguments.steps + 1):
        if step:
            tokens = ids[:, (step - 1) * arguments.tokens : step * arguments.tokens]
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
        now = {name: weight.detach() for name, weight in model.named_parameters()}
        yield {
            "settled": {name: weight.bfloat16() for name, weight in now.items()},
            "fresh": {name: (fresh[name].float() + (now[name] - start[name])).bfloat16() for name in now},
        }


def _show(report: harness.Report, name: str, lane: Lane) -> None:
    facts = {"steps": len(lane.shares), "lr": LR}
    elements = [round(share, 5) for share in lane.shares]
    report.show(
        f"weight_delta/{name}/changed_elements", statistics.median(lane.shares), "of all", each=elements, **facts
    )
    size, sizes = statistics.median(lane.sizes), [round(one, 5) for one in lane.sizes]
    if name == "settled":
        report.at_most(f"weight_delta/{name}/bytes", size, "of a whole version", GOAL, each=sizes, **facts)
    else:
        report.show(f"weight_delta/{name}/bytes", size, "of a whole version", each=sizes, **facts)
    for what, seconds in (("publish", lane.publish_s), ("mirror", lane.bring_s)):
        report.show(f"weight_delta/{name}/{what}_whole", seconds[0], "s")
        report.show(f"weight_delta/{name}/{what}_delta", statistics.median(seconds[1:]), "s")


def _bits(weights: Tensor) -> Tensor:
    return weights.view(torch.int16)


if __name__ == "__main__":
    sys.exit(main())
