"""A framework's checkout: which commit it is, and whether its functions are still the recorded ones."""

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import placeholders

from asympo_megatron.errors import IntegrationError

SOURCE_FOLDERS = {
    "slime": (".",),
    "miles": (".",),
    "nemo_rl": (".",),
    "prime_rl": ("src", "packages/prime-rl-configs/src"),
    "roll": (".",),
    "megatron_lm": (".",),
    "megatron_bridge": ("src",),
}
"""Where the importable packages lie in each checkout."""


def enter(name: str, path: Path) -> None:
    """Import the framework from the checkout and from nowhere else.

    Raises:
        IntegrationError: the folder is no such checkout.
    """
    for folder in reversed(SOURCE_FOLDERS[name]):
        source = (path / folder).resolve()
        if not source.is_dir():
            raise IntegrationError(f"{path} has no folder {folder}: it is no checkout of {name}.")
        sys.path.insert(0, str(source))
    placeholders.allow(name)


def commit(path: Path) -> str:
    """Commit of the checkout, or a word that says it is not known."""
    done = subprocess.run(
        ["git", "-C", str(path), "log", "-1", "--format=%h of %cs"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "an unknown commit"


def upstream(module: str, name: str) -> Callable[..., Any]:
    """One function or class of the framework.

    Raises:
        IntegrationError: it is not there; the message says whether a package is missing or the source has changed.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise IntegrationError(f"the checkout has no module {error.name}: it has moved or been renamed.") from error
        raise IntegrationError(
            f"{module} imports {error.name}, which is not installed here. Run this in the framework's environment, or "
            "install tools/check_integration/requirements.txt with --no-deps."
        ) from error
    except (ImportError, AssertionError) as error:  # some refuse versions of other packages while importing
        raise IntegrationError(f"{module} cannot be imported here: {error}") from error
    except AttributeError as error:
        raise IntegrationError(f"{module} has no {name}: it has moved or been renamed.") from error


def require_parameters(function: Callable[..., Any], wanted: Sequence[str]) -> None:
    """The parameters by which an adapter, or the framework's caller, passes its arguments.

    Raises:
        IntegrationError: one is gone, or a new one has no default.
    """
    parameters = inspect.signature(function).parameters
    missing = [name for name in wanted if name not in parameters]
    where = f"{function.__module__}.{function.__qualname__}"
    if missing:
        raise IntegrationError(f"{where} has no parameter {', '.join(missing)}; it takes {', '.join(parameters)}.")


def require_call(function: Callable[..., Any], recorded: Sequence[str]) -> None:
    """The parameters, in order, of a function that the framework calls or that an adapter stands in for.

    Raises:
        IntegrationError: they are not the recorded ones.
    """
    got = list(inspect.signature(function).parameters)
    if got != list(recorded):
        where = f"{function.__module__}.{function.__qualname__}"
        raise IntegrationError(f"{where} takes {', '.join(got)}; the adapter was written for {', '.join(recorded)}.")
