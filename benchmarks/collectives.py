"""Counts the collectives of a step where torch.distributed is called; a program for test ranks.

Megatron binds some of these functions at import, so they are wrapped before it is loaded.
"""

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PROGRAM = f"{__file__}:count"

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "DP2": {},
    "DP2 distributed optimizer": {"optimizer": {"distributed": True}},
    "TP2": {"parallel": {"tensor": 2}},
    "TP2+SP": {"parallel": {"tensor": 2, "sequence": True}},
    "PP2": {"parallel": {"pipeline": 2}},
    "CP2": {"parallel": {"context": 2}},
}

_PRIMITIVES = (
    "all_reduce",
    "broadcast",
    "reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "gather",
    "scatter",
    "barrier",
    "send",
    "recv",
    "isend",
    "irecv",
)


class Recorder:
    """Wraps the primitives of torch.distributed; groups of one rank do not count."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str]] | None = None
        self._inside = False

    def install(self) -> None:
        """Replace the functions, wherever torch.distributed names them."""
        for name in _PRIMITIVES:
            wrapped = self._wrap(name, getattr(dist, name))
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, wrapped)

    def calls_of_second(self, step: Callable[[], object]) -> list[list[Any]]:
        """Run ``step`` twice (the first time may set things up): [primitive, caller, number] of the second time."""
        step()
        self._calls = Counter()
        step()
        calls, self._calls = self._calls, None
        return [[*key, number] for key, number in sorted(calls.items())]

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
            if self._calls is None or self._inside or (group is not None and group.size() == 1):
                return function(*args, **kwargs)
            self._calls[name, _caller()] += 1
            self._inside = True  # a primitive made of others counts once
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return call


def _caller() -> str:
    """Module and function of the nearest frame outside torch and this file."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == "torch":
        frame = frame.f_back
    return f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}"


def count(payload: dict[str, Any]) -> dict[str, dict[str, list[list[Any]]]]:
    """Calls of one step on this rank, after a first one: layout to {"bare", "ours"} to [primitive, caller, number]."""
    recorder = Recorder()
    recorder.install()
    sys.path.append(str(Path(__file__).parent))
    torch.set_num_threads(1)
    from bare_loop import HF, BareLoop, make_config, make_rows

    from asympo_megatron.mcore import Learner, initialize, shutdown
    from asympo_megatron.mcore.collate import collate
    from asympo_megatron.objectives import build_objective
    from asympo_megatron.testing.megatron import join_group

    found: dict[str, dict[str, list[list[Any]]]] = {}
    for name, sections in LAYOUTS.items():
        join_group(name)
        config = make_config(**sections)
        layout = initialize(config)
        learner = Learner(config, HF, build_objective(payload["objective"]), layout)
        rows = make_rows(8)
        mine = rows[layout.dp_rank :: layout.dp_size]
        microbatches = [mine[: len(mine) // 2], mine[len(mine) // 2 :]]
        bare = BareLoop(learner, [collate(part, layout) for part in microbatches])
        steps = {"bare": bare.step, "ours": partial(learner.step, microbatches, len(rows))}
        found[name] = {kind: recorder.calls_of_second(step) for kind, step in steps.items()}
        shutdown()
    return found
