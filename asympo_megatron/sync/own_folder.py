"""A local directory of one process, whose contents mean nothing to any other."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from asympo_megatron.errors import PublishError


class OwnFolder:
    """Made empty; locked as long as the process lives. What processes of this name left when they died is removed.

    Args:
        parent: a local directory, made if it is missing; None takes the system's temporary one.
        name: of the role and its run.

    Raises:
        PublishError: it cannot be made.
    """

    def __init__(self, parent: str | Path | None, name: str) -> None:
        parent = Path(parent or tempfile.gettempdir())
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _remove_dead(parent, name)
            made = Path(tempfile.mkdtemp(prefix=".asympo-", dir=parent))
            self._lock = _lock(made)  # before it has the name by which it is found
            self.path = made.rename(parent / f"{name}.{made.name.removeprefix('.asympo-')}")
        except OSError as error:
            raise PublishError(
                f"no directory for weights could be made in {parent}: {error}. Set sync.spool_dir to a directory on a "
                "local disk."
            ) from error

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def run_label(run_dir: Path) -> str:
    """What tells the directories of one run from those of others on the same machine."""
    resolved = run_dir.resolve()
    return f"{resolved.name}-{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"


def _remove_dead(parent: Path, name: str) -> None:
    for folder in parent.glob(f"{name}.*"):
        try:
            lock = _lock(folder)
        except OSError:  # its process lives, or it is another user's
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
