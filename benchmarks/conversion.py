"""Conversion of a real small model: peak memory of the whole process, and speed beside a plain copy of the file.

    make smollm2 && python benchmarks/conversion.py [--quick] [--save]

Memory is the high-water mark of `asympo convert` as its parent sees it, imports included.

Speed is wall time in one process, interleaved: both sides read the safetensors and write and fsync as many bytes. A
copy is safetensors' own: load_file, save_file. Conversion checksums the weights, or hashes the files, and writes
another format in the same time.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import harness
from safetensors.torch import load_file, save_file

from asympo_megatron.config import Config, override_config
from asympo_megatron.conversion import hf_to_megatron, megatron_to_hf

MODEL = Path(sys.prefix) / "smollm2"
FILE = "model.safetensors"
MEBIBYTE = 2**20


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    if not (MODEL / FILE).is_file():
        sys.exit("SmolLM2 is not there: make smollm2")
    warnings.filterwarnings("ignore")
    report = harness.Report("conversion", save=arguments.save)
    shard = (MODEL / FILE).stat().st_size / MEBIBYTE
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for verb, source in (("hf-to-megatron", MODEL), ("megatron-to-hf", root / "hf-to-megatron")):
            peak = _peak_mib(verb, source, root / verb)
            limit = round(1.3 * shard + 300)
            report.at_most(f"conversion/{verb}/peak_memory", peak, "MiB", limit, largest_shard_mib=round(shard))
        base = Config()
        base.model.path = str(MODEL)
        config = override_config(base, [])
        checkpoint = root / "hf-to-megatron"
        forms: dict[str, Callable[[Path], None]] = {
            "hf-to-megatron": lambda target: hf_to_megatron(config, MODEL, target),
            "megatron-to-hf": lambda target: megatron_to_hf(checkpoint, target),
        }
        for name, run in forms.items():
            _speed(report, f"conversion/{name}", run, root, harness.MIN_PAIRS * (1 if arguments.quick else 2))
    return report.finish()


def _peak_mib(verb: str, source: Path, target: Path) -> float:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "asympo_megatron.cli.main",
        "convert",
        verb,
        str(source),
        str(target),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    return usage.ru_maxrss / 1024


def _speed(report: harness.Report, name: str, run: Callable[[Path], None], root: Path, pairs: int) -> None:
    measured = harness.measure_pairs(
        lambda: _again(root / "ours", run),
        lambda: _again(root / "theirs", _copy),
        pairs=pairs,
        clock=time.perf_counter,
    )
    report.at_least(f"{name}/speed_of_a_copy", 1 / measured.ratio, "ratio", 0.5, pairs=pairs)
    report.show(f"{name}/seconds", statistics.median(measured.ours_s), "s")
    report.show(f"{name}/copy_seconds", statistics.median(measured.theirs_s), "s")


def _again(target: Path, write: Callable[[Path], None]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    write(target)


def _copy(target: Path) -> None:
    target.mkdir()
    save_file(load_file(MODEL / FILE), target / FILE)
    descriptor = os.open(target / FILE, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
