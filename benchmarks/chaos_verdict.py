"""The verdict on a campaign, from what is on disk: journal, last checkpoint, events and metrics."""

import json
import sqlite3
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_trainer import STATE

from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore import Checkpoints
from asympo_megatron.mcore.marker import read_marker
from asympo_megatron.metrics import read_rows


@dataclass
class Verdict:
    """What became of every prompt group and of every step."""

    groups: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    redone: int = 0
    """Steps done again after a resume."""
    redone_differently: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Everything that must not be, in words."""
        return [*self.lost, *self.duplicated, *self.hung, *self.corrupt, *self.redone_differently]

    def add(self, other: "Verdict") -> None:
        self.groups += other.groups
        self.trained += other.trained
        self.redone += other.redone
        self.dropped += other.dropped
        for name in ("lost", "duplicated", "hung", "corrupt", "redone_differently"):
            getattr(self, name).extend(getattr(other, name))


def judge(run_dir: Path, events: list[dict[str, Any]], bait: Path, *, cut_short: bool = False) -> Verdict:
    """Read a campaign on the small trainer.

    Args:
        bait: a file that only executed model output would write.
        cut_short: it hung; groups may be on their way.
    """
    verdict = Verdict()
    try:
        state = json.loads((Checkpoints.find(run_dir) / STATE).read_text())
    except CheckpointError:
        state = {"step": 0, "trained": []}
    groups, versions = _journal(run_dir)
    if cut_short:
        judge_committed(verdict, groups, state["trained"])
    else:
        judge_groups(verdict, groups, state["trained"])
        judge_rows(verdict, run_dir, state["step"], state["weights"])
    judge_versions(verdict, versions, events)
    judge_steps(verdict, events)
    if bait.exists():
        verdict.corrupt.append("the code of a response was executed")
    return verdict


def judge_real(run_dir: Path, events: list[dict[str, Any]]) -> Verdict:
    """Read a finished run of the real trainer, whose checkpoints do not say what they were trained on: the leases do,
    and the weights of the run left alone must be the same."""
    verdict = Verdict()
    groups, _ = _journal(run_dir)
    marker = read_marker(Checkpoints.find(run_dir))
    trained: list[list[int]] = [[] for _ in range(marker["step"])]
    for _, prompt, state, _, lease_step in groups:
        if state == "committed":
            trained[lease_step].append(prompt)
    judge_groups(verdict, groups, trained)
    judge_steps(verdict, events)
    judge_rows(verdict, run_dir, marker["step"], marker["checksum"])
    return verdict


def _journal(run_dir: Path) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    db = sqlite3.connect(f"file:{run_dir / 'journal.sqlite'}?mode=ro", uri=True)
    try:
        return (
            db.execute("SELECT group_id, prompt_index, state, reason, lease_step FROM groups").fetchall(),
            db.execute("SELECT version, step, incarnation, checksum FROM versions ORDER BY version").fetchall(),
        )
    finally:
        db.close()


def judge_groups(verdict: Verdict, groups: list[tuple[Any, ...]], trained: list[list[int]]) -> None:
    """Each prompt: in exactly one group, and that trained exactly once in the final weights, or dropped with a reason.

    Args:
        groups: rows of the journal: group_id, prompt_index, state, reason, lease_step.
        trained: prompts by step, as the last checkpoint has them.
    """
    verdict.groups, verdict.trained = len(groups), sum(map(len, trained))
    times = Counter(prompt for step in trained for prompt in step)
    step_of = {prompt: step for step, prompts in enumerate(trained) for prompt in prompts}
    verdict.duplicated += [f"prompt {prompt} trained {n} times" for prompt, n in times.items() if n > 1]
    admitted = Counter(prompt for _, prompt, *_ in groups)
    verdict.duplicated += [f"prompt {prompt} in {n} groups" for prompt, n in admitted.items() if n > 1]
    verdict.lost += [
        f"prompt {prompt} in no group" for prompt in range(max(admitted, default=-1)) if not admitted[prompt]
    ]
    verdict.lost += [f"prompt {prompt} trained, but not in the journal" for prompt in times if not admitted[prompt]]
    for group, prompt, state, reason, lease_step in groups:
        if state == "dropped":
            verdict.dropped[_kind_of(reason)] += 1
            if not reason:
                verdict.lost.append(f"group {group} dropped without a reason")
            if times[prompt]:
                verdict.duplicated.append(f"group {group} trained, though dropped")
        elif state != "committed" or not times[prompt]:
            verdict.lost.append(f"group {group} of step {lease_step} is {state} and trained {times[prompt]} times")
        elif step_of[prompt] != lease_step:
            verdict.duplicated.append(f"group {group} leased for step {lease_step}, trained in {step_of[prompt]}")


def judge_committed(verdict: Verdict, groups: list[tuple[Any, ...]], trained: list[list[int]]) -> None:
    """What a run that was cut short calls committed is in its last checkpoint."""
    verdict.groups, verdict.trained = len(groups), sum(map(len, trained))
    held = {prompt for step in trained for prompt in step}
    for group, prompt, state, _, lease_step in groups:
        if state == "committed" and prompt not in held:
            verdict.lost.append(f"group {group} of step {lease_step} is committed, but in no checkpoint")


def judge_versions(verdict: Verdict, versions: list[tuple[Any, ...]], events: list[dict[str, Any]]) -> None:
    """No trainer publishes after a newer one has; engines hold what was published under that number.

    Args:
        versions: rows of the journal: version, step, incarnation, checksum.
    """
    newest = 0
    for version, _, incarnation, _ in versions:
        if incarnation < newest:
            verdict.duplicated.append(f"version {version} published by trainer {incarnation} after {newest} had")
        newest = max(newest, incarnation)
    checksums = {version: checksum for version, _, _, checksum in versions}
    for event in events:
        if event["event"] == "loaded" and event["checksum"] != checksums.get(event["version"]):
            verdict.corrupt.append(f"{event['role']} loaded other weights as version {event['version']}")
        elif event["event"] == "corrupt":
            verdict.corrupt.append(f"step {event['step']}: responses that do not belong there: {event['wrong']}")


def judge_steps(verdict: Verdict, events: list[dict[str, Any]]) -> None:
    """A step done again ends at the same weights, whoever does it."""
    sums: dict[int, list[str]] = defaultdict(list)
    for event in events:
        if event["event"] == "trained":
            sums[event["step"]].append(event["checksum"])
    for step, found in sums.items():
        verdict.redone += len(found) - 1
        if len(set(found)) > 1:
            verdict.redone_differently.append(f"step {step} ended at {len(set(found))} different weights")


def judge_rows(verdict: Verdict, run_dir: Path, step: int, weights: str) -> None:
    """One row a step, and the last one names the weights of the last checkpoint."""
    logged = {row["step"]: row.get("train/weights_checksum") for row in read_rows(run_dir / "metrics.jsonl")}
    missing = set(range(step + 1)) - set(logged)
    if missing:
        verdict.redone_differently.append(f"metrics have no row of steps {sorted(missing)[:5]}")
    elif logged[step] != weights:
        verdict.redone_differently.append("the last row and the last checkpoint name different weights")


def _kind_of(reason: str | None) -> str:
    """A reason without its numbers."""
    return "".join(letter for letter in (reason or "none").split(":")[0] if not letter.isdigit()).strip()
