"""What Learner.step costs beyond a bare Megatron loop on the same batch, model and token NLL.

    python benchmarks/step_overhead.py [--quick] [--save]

The bare loop (bare_loop.py) zeroes the gradients, runs Megatron's schedule on tensors that are ready on the device,
sums token NLLs and steps the optimizer. It checks nothing, reports one number and knows no responses. Our step starts
from rows: it checks and packs them, agrees over ranks, computes objective, statistics and gradient norm, and refuses a
step that is not finite. CPU time of one rank, interleaved, medians of pairs. The entropy is part of token NLL, so both
pay for it.

The collectives are those of one step on two ranks with two micro-batches, counted where torch.distributed is called,
our step beside the bare loop. --quick leaves out the second objective. Results: docs/performance.md.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import collectives
import harness
import torch
from bare_loop import BUDGET, HF, BareLoop, make_config, make_rows

from asympo_megatron.mcore import Learner, initialize, learner, loss, shutdown
from asympo_megatron.mcore.collate import collate
from asympo_megatron.objectives import build_objective
from asympo_megatron.packing import plan_microbatches
from asympo_megatron.testing.megatron import run_ranks

ROWS = 48
DIAGNOSTICS = ((loss.ForwardStep, "_loss"), (learner, "merge_stats"), (learner, "reduce_stats"))
"""All that turns token NLLs into a loss and figures: objective, its statistics, their reduction."""


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    report = harness.Report("step_overhead", save=arguments.save)
    for objective in ("asympo",) if arguments.quick else ("asympo", "grpo"):
        throughput(report, objective)
    count_collectives(report)
    return report.finish()


def throughput(report: harness.Report, objective: str) -> None:
    """Pairs of steps, ours and the bare loop's, on the same weights."""
    config = make_config()
    layout = initialize(config)
    try:
        ours = Learner(config, HF, build_objective(objective), layout)
        rows = make_rows(ROWS)
        lengths = [len(row.prompt_ids) + len(row.ids) - 1 for row in rows]
        plan = plan_microbatches(lengths, dp_size=1, max_tokens=BUDGET)
        microbatches = [[rows[i] for i in part] for part in plan.microbatches[0]]
        bare = BareLoop(ours, [collate(part, layout) for part in microbatches])
        pairs = harness.measure_pairs(lambda: ours.step(microbatches, ROWS), bare.step)
        facts = {"objective": objective, "tokens": sum(lengths), "microbatches": len(microbatches)}
        low, high = pairs.quartiles
        spread = [round(1 / high, 4), round(1 / low, 4)]
        report.at_least("step_overhead/throughput", 1 / pairs.ratio, "x bare loop", 0.97, quartiles=spread, **facts)
        with watching(*DIAGNOSTICS) as spent:
            start = time.process_time()
            for _ in range(len(pairs.ours_s)):
                ours.step(microbatches, ROWS)
            total = time.process_time() - start
        report.at_most("step_overhead/objective_and_diagnostics", sum(spent) / total, "of a step", 0.01, **facts)
        start = time.process_time()
        for _ in range(5):
            ours.checksum()
        checksum = (time.process_time() - start) / 5 * len(pairs.ours_s) / total
        report.show("step_overhead/weights_checksum", checksum, "of a step", **facts)
        report.show("step_overhead/speed", sum(lengths) * len(pairs.ours_s) / total, "tokens per CPU second", **facts)
    finally:
        shutdown()


@contextmanager
def watching(*places: tuple[Any, str]) -> Iterator[list[float]]:
    """CPU seconds of every call of these functions, while it lasts."""
    spent: list[float] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.process_time() - start)

        return call

    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name))))
        yield spent


def count_collectives(report: harness.Report) -> None:
    """One line a layout: calls of the rank that makes most of them, and those that the bare loop does not make."""
    ranks = run_ranks(collectives.PROGRAM, 2, {"objective": "asympo"}, timeout_s=300.0)
    for layout in collectives.LAYOUTS:
        counts = [{kind: calls_of(found) for kind, found in rank[layout].items()} for rank in ranks]
        most = max(counts, key=lambda kinds: kinds["ours"].total())
        added = most["ours"] - most["bare"]
        listed = [f"{number} x {primitive} in {caller}" for (primitive, caller), number in sorted(added.items())]
        facts = {"layout": layout, "bare_loop": most["bare"].total(), "added": listed}
        report.show("step_overhead/collectives", most["ours"].total(), "calls a step", **facts)


def calls_of(found: list[list[Any]]) -> Counter[tuple[str, str]]:
    return Counter({(primitive, caller): number for primitive, caller, number in found})


if __name__ == "__main__":
    sys.exit(main())
