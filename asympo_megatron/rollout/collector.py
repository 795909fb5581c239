"""Python's garbage collector in the controller's process."""

import gc

_THRESHOLDS = (50_000, 20, 100)


def collect_rarely() -> None:
    """Set the collector for a process with thousands of requests in flight.

    They are hundreds of thousands of objects, which Python's own thresholds have walked again after every few requests;
    nearly all of them are freed by reference counts. What is there already is never walked again. For the whole
    process: to be called by its command, not by a library.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
