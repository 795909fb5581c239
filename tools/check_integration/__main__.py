"""Compares the gradient of an adapter inside a framework's own source with the core's, on CPU.

    python tools/check_integration NAME PATH_TO_CHECKOUT

NAME is slime, miles, nemo_rl, prime_rl, roll, megatron_lm or megatron_bridge. Exit status 0: every comparison agrees to
1e-6. Run it in the framework's environment, or with the packages of requirements.txt beside ours.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Spawned ranks inherit it. Compiling the frameworks' helpers takes minutes and a compiler, and changes no gradient.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "integrations"), str(HERE.parents[1])]

import megatron_schedules  # noqa: E402
import whole_responses  # noqa: E402
import worlds  # noqa: E402
from checkout import SOURCE_FOLDERS, commit, enter  # noqa: E402
from parity import CASES, assert_same_gradient, core_gradient, make_batch  # noqa: E402

from asympo_megatron.errors import AsympoError  # noqa: E402
from asympo_megatron.objectives import build_objective  # noqa: E402
from asympo_megatron.testing.distributed import run_distributed  # noqa: E402

WORLD_SIZES = (2, 4)


def results(name: str, path: Path) -> Iterator[worlds.Result]:
    """Gradients of the adapter inside the framework."""
    if name in ("slime", "miles"):
        for size in WORLD_SIZES:
            yield from run_distributed(worlds.gradients, size, name, path, timeout_s=300)[0]
        return
    enter(name, path)
    if name.startswith("megatron"):
        yield from megatron_schedules.gradients(name)
        return
    for objective in CASES:
        yield objective, "one process, two micro-batches", getattr(whole_responses, name)(objective)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="check_integration", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SOURCE_FOLDERS))
    parser.add_argument("path", type=Path, help="a checkout of the framework")
    chosen = parser.parse_args(arguments)
    print(f"{chosen.name} at {commit(chosen.path)}")
    with tempfile.TemporaryDirectory() as logs:
        os.environ["ROLL_LOG_DIR"] = logs  # otherwise ROLL writes ./output/logs while it is imported
        try:
            failed = compare(chosen.name, chosen.path)
        except (AsympoError, RuntimeError, ImportError) as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 2
    print("FAILED" if failed else "PASS")
    return 1 if failed else 0


def compare(name: str, path: Path) -> int:
    """How many comparisons differ; prints a line for each."""
    failed = 0
    for objective, layout, gradient in results(name, path):
        _, want = core_gradient(build_objective(objective, **CASES[objective]), make_batch())
        try:
            assert_same_gradient(gradient, want, make_batch())
            print(f"  same gradient: {objective}, {layout}")
        except AssertionError as error:
            failed += 1
            print(f"  DIFFERENT: {objective}, {layout}: {error}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
