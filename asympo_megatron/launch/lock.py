"""One owner for a run directory."""

import fcntl

from asympo_megatron.config import RunDir
from asympo_megatron.errors import ConfigError


class RunLock:
    """Exclusive lock on a run directory, held as long as the object lives; the kernel frees it with the process."""

    def __init__(self, run_dir: RunDir) -> None:
        run_dir.make()
        self._file = (run_dir.path / ".lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(
                f"{run_dir.path} is in use by another `asympo run`. Stop that one, or choose another run.name."
            ) from error

    def release(self) -> None:
        self._file.close()
