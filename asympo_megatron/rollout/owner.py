"""One owner of a journal: an exclusive lock that dies with its process."""

import fcntl
import os
from pathlib import Path

from asympo_megatron.errors import JournalError


def take_ownership(path: Path) -> int:
    """Lock a journal until the descriptor that is returned is closed; readers (``asympo journal``) do not.

    Raises:
        JournalError: another process has it.
    """
    handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise JournalError(
            f"{path} is in use by another controller (process {owner}). Stop it, or set run.name to a new name."
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle
