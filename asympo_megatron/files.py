"""Files that are still there after a power cut."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

FLUSH_BYTES = 32 << 20
"""Written between two flushes of a file that grows."""


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Flusher:
    """A thread that brings an open file to the disk while more is written to it; on leaving, all of it is there.

    Args:
        file: open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._disk = file, ThreadPoolExecutor(1, "flush")
        self._flush: Future[None] | None = None
        self._bytes = 0

    def wrote(self, size: int) -> None:
        """Some bytes were written.

        Raises:
            OSError: earlier ones could not be brought to the disk.
        """
        self._bytes += size
        if self._bytes < FLUSH_BYTES or not (self._flush is None or self._flush.done()):
            return
        self._wait()
        self._flush, self._bytes = self._disk.submit(self._sync), 0

    def __enter__(self) -> "Flusher":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._disk.shutdown()
        if kind is None:
            self._wait()
            self._sync()

    def _wait(self) -> None:
        if self._flush is not None:
            self._flush.result()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
