"""Errors of the package. Each message says what was wrong, what was got, what was expected and the remedy.

Every class inherits the standard exception it refines, so that callers may catch either.
"""

import difflib
from collections.abc import Iterable


class AsympoError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(AsympoError, ValueError):
    """A configuration value that cannot work."""


class UnknownNameError(ConfigError, KeyError):
    """A name that is not in a table; the message names the nearest one that is."""

    def __init__(self, kind: str, got: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(got, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {got!r}: {hint}known: {', '.join(names)}.")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class BatchError(AsympoError, ValueError):
    """Tensors of a batch that do not fit together."""


class StatError(AsympoError, ValueError):
    """Statistics of one name that differ in kind between micro-batches or ranks."""


class PackingError(AsympoError, ValueError):
    """Responses that cannot be packed under the token budget."""


class RecordError(AsympoError, ValueError):
    """A replay line, group or response that is malformed."""


class TaskError(AsympoError, ValueError):
    """A task without usable prompts, or an answer that cannot be scored."""


class RewardError(AsympoError, RuntimeError):
    """A reward function that failed; a failed reward is never silently zero."""


class EpisodeError(AsympoError, RuntimeError):
    """An environment that failed, or a reply that no tokens can express; a reply is never guessed."""


class EngineError(AsympoError, RuntimeError):
    """An engine that answered wrongly, not in time, or not at all."""


class ControllerError(AsympoError, RuntimeError):
    """The controller refused or cannot serve a call."""


class StaleIncarnationError(ControllerError):
    """A trainer whose replacement has attached: it must stop without doing harm."""


class JournalError(AsympoError, RuntimeError):
    """A journal that does not belong to this run or is in an impossible state."""


class PublishError(AsympoError, OSError):
    """Weights that could not be written completely or do not match their manifest."""


class CheckpointError(AsympoError, OSError):
    """A checkpoint that is missing, partial or does not fit the model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files cannot be read, or hold something else than was saved."""


class IntegrationError(AsympoError, ImportError):
    """A framework whose plug-in point is missing or is not the one an adapter was written for."""


EXIT_REQUEUE = 75
"""Exit code of a run that a batch system stopped in good order: start the same command again (EX_TEMPFAIL)."""


class PreemptedError(AsympoError, RuntimeError):
    """The run was asked to stop, and has: its state is saved and the same command resumes it."""


class NonFiniteLossError(AsympoError, ArithmeticError):
    """Loss or gradient norm is NaN or infinite: the step was refused and the weights kept."""


def revive(kind: str, message: str) -> AsympoError:
    """The error that another process or rank reported by class name and message."""
    known = globals().get(kind)
    if isinstance(known, type) and issubclass(known, AsympoError) and "__init__" not in vars(known):
        return known(message)
    return ControllerError(message)
