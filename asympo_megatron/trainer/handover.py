"""Tensors from the thread that gathers them to one that stores them: the learner goes on when the last one is taken.

They may be the learner's own memory. So one is handed over when the storing thread asks for it, and the learner's
thread goes on only when that asks for the next: nothing is read that training has changed meanwhile.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from asympo_megatron.errors import PublishError

Named = tuple[str, Tensor]


class Handover:
    """One version on its way.

    Args:
        store: called in a thread of its own with the tensors; it does not read one after it has asked for the next.
    """

    def __init__(self, store: Callable[[Iterator[Named]], None]) -> None:
        self._store = store
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked = threading.Semaphore(0)
        self._over = False
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="publish", daemon=True)

    def give(self, tensors: Iterable[Named]) -> None:
        """Hand tensors over until all are taken, or none is asked for any more; what comes after that goes on alone."""
        self._thread.start()
        try:
            for item in tensors:
                self._asked.acquire()
                if self._over:
                    return
                self._items.put(item)
                del item  # before the next one is gathered
            self._asked.acquire()
            self._items.put(None)
        except BaseException as error:  # of the gather
            self._items.put(PublishError(f"the weights could not be gathered: {error}"))
            raise

    def finish(self, *, wait: bool) -> bool:
        """Whether it is over, or wait until it is.

        Raises:
            BaseException: what ended it.
        """
        if wait:
            self.join()
        over = self._over  # read first: the thread sets it last
        if self._problem is not None:
            raise self._problem
        return over

    def join(self) -> None:
        """Wait until it is over, however it ends."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._store(self._asked_for())
        except BaseException as error:
            self._problem = error
        finally:
            self._over = True
            self._asked.release()

    def _asked_for(self) -> Iterator[Named]:
        while True:
            self._asked.release()
            item = self._items.get()
            if item is None:
                return
            if isinstance(item, PublishError):
                raise item
            yield item
            del item
