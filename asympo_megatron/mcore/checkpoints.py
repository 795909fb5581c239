"""The checkpoints of a run: names, the newest complete one, and how many are kept."""

import logging
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from asympo_megatron.errors import CheckpointError, DamagedCheckpointError
from asympo_megatron.mcore.checkpoint_save import TEMPORARY, Saving, remove_leftovers
from asympo_megatron.mcore.learner import Learner
from asympo_megatron.mcore.marker import read_marker

log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{6,})$")


@dataclass(frozen=True)
class Saved:
    """Checkpoints of a run after a save.

    Args:
        step: of the newest.
        oldest_step: of the oldest that is kept.
    """

    step: int
    oldest_step: int


class Checkpoints:
    """Directories ``step_NNNNNN`` under one root.

    Args:
        root: e.g. RUN_DIR/checkpoints; every rank sees it (a shared file system on a cluster).
        keep_last: complete checkpoints that stay.
    """

    def __init__(self, root: str | Path, keep_last: int) -> None:
        self.root, self._keep_last = Path(root), keep_last
        self._pending: tuple[int, Saving | None] | None = None

    def save(self, learner: Learner) -> int:
        """Collective: save the learner's state unless this step is saved already, then remove the oldest ones.

        Returns:
            Step of the oldest checkpoint that is kept.
        """
        self.begin(learner, background=False)
        return self.complete().oldest_step

    def begin(self, learner: Learner, *, background: bool) -> None:
        """Collective: take the learner's state; the checkpoint appears with :meth:`complete`.

        Args:
            background: write it in a thread (see ``checkpoint_save.Saving``) while the learner trains on.

        Raises:
            CheckpointError: it cannot be written.
        """
        assert self._pending is None, "complete() the checkpoint before"  # one copy of the state in memory, not more
        directory = self.root / f"step_{learner.step_count:06d}"
        saving = None
        if self._from_rank0(lambda: int(not _is_complete(directory))):
            self._from_rank0(lambda: self._clear(directory))
            if background:
                saving = Saving(learner, directory, background=True)
            else:
                learner.save(directory)
        self._pending = (learner.step_count, saving)

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is begun and not complete; the same on every rank."""
        return self._pending is not None

    def ready(self, *, wait: bool) -> bool:
        """Collective: whether the threads of all ranks have written the checkpoint that is begun, or wait for them."""
        _, saving = self._begun()
        return saving is None or saving.written(wait=wait)

    def complete(self) -> Saved:
        """Collective: give the checkpoint that is begun its name, when it is written, and remove the oldest ones.

        Raises:
            CheckpointError: it could not be written. The one before is the newest, and nothing of it stays.
        """
        (step, saving), self._pending = self._begun(), None
        if saving is not None:
            saving.complete()
        return Saved(step, self._from_rank0(self._prune))

    def newest(self) -> Path | None:
        """Collective: the newest complete checkpoint, or None. Incomplete ones are skipped with a warning."""
        step = self._from_rank0(lambda: _newest_step(self.root))
        return self.root / f"step_{step:06d}" if step >= 0 else None

    def resume(self, learner: Learner) -> Path | None:
        """Collective: go on from the newest checkpoint; returns it, or None if there is none.

        Damaged ones are skipped with a warning. Once an older one is loaded they are renamed: their steps are trained
        and saved again.

        Raises:
            DamagedCheckpointError: of the newest, if none can be read.
            CheckpointError: the newest is of another model or run.
        """
        damaged: dict[int, DamagedCheckpointError] = {}
        while (step := self._from_rank0(partial(_newest_step, self.root, min(damaged, default=None)))) >= 0:
            path = self.root / f"step_{step:06d}"
            try:
                learner.load(path)
            except DamagedCheckpointError as error:
                damaged[step] = error
                continue
            self._from_rank0(partial(_set_aside, self.root, damaged, path.name))
            return path
        if damaged:
            raise damaged[max(damaged)]
        return None

    @staticmethod
    def find(path: str | Path) -> Path:
        """A checkpoint itself, or the newest complete one inside a checkpoints (or run) directory.

        Raises:
            CheckpointError: nothing there can be loaded.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"checkpoint {path} does not exist. Check model.init.")
        if _is_complete(path):
            return path
        for root in (path, path / "checkpoints"):
            step = _newest_step(root)
            if step >= 0:
                return root / f"step_{step:06d}"
        raise CheckpointError(f"{path} holds no complete checkpoint. Check model.init.")

    def _begun(self) -> tuple[int, Saving | None]:
        assert self._pending is not None, "begin() comes first"
        return self._pending

    def _clear(self, directory: Path) -> int:
        shutil.rmtree(directory, ignore_errors=True)
        remove_leftovers(self.root)
        return 0

    def _prune(self) -> int:
        """Remove what is not kept. Leftovers stay: one may be what a replacement of this trainer is writing."""
        complete = [step for step, path in _steps(self.root) if _is_complete(path)]
        for step in complete[: -self._keep_last]:
            # Renamed first: a crash in the middle of the removal must not leave a checkpoint that looks whole.
            doomed = self.root / f"step_{step:06d}{TEMPORARY}"
            (self.root / f"step_{step:06d}").rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        return complete[-self._keep_last :][0]

    @staticmethod
    def _from_rank0(call: Callable[[], int]) -> int:
        """One rank works on the file system, all ranks hear the result, or raise its error together."""
        box: list[tuple[int, str]] = [(0, "")]
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                box = [(call(), "")]
            except OSError as error:
                box = [(0, str(error) or type(error).__name__)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(box, src=0)
        result, problem = box[0]
        if problem:
            raise CheckpointError(problem)
        return result


def _steps(root: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.match(path.name), path) for path in root.glob("step_*"))
    return sorted((int(match.group(1)), path) for match, path in found if match)


def _is_complete(directory: Path) -> bool:
    try:
        read_marker(directory)
    except CheckpointError:
        return False
    return True


def _newest_step(root: Path, below: int | None = None) -> int:
    """Newest complete step (older than ``below``), or -1; warns about incomplete newer ones."""
    partial: list[str] = []
    newest = -1
    for step, path in reversed(_steps(root)):
        if below is not None and step >= below:
            continue
        if _is_complete(path):
            newest = step
            break
        partial.append(path.name)
    if partial:
        instead = f"using step_{newest:06d}" if newest >= 0 else "none older is complete"
        log.warning("%s: %s is incomplete and skipped; %s", root, ", ".join(partial), instead)
    return newest


def _set_aside(root: Path, damaged: Mapping[int, DamagedCheckpointError], instead: str) -> int:
    for step, error in damaged.items():
        path = root / f"step_{step:06d}"
        kept = path.with_name(f"{path.name}.{secrets.token_hex(4)}.damaged")
        path.rename(kept)
        log.warning("%s It is skipped and kept as %s; using %s", error, kept.name, instead)
    return 0
