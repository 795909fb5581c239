"""The real Megatron-Bridge on a machine without a GPU: placeholders for what it imports beside its conversion.

No weight goes through a placeholder.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

import asympo_megatron.mcore  # noqa: F401  # Megatron-Core comes before any placeholder

ABSENT = ("datasets", "megatron.energon", "modelopt", "tensorboard", "toml", "transformer_engine", "triton")


class _Named(type):
    def __call__(cls, *args: Any, **_: Any) -> Any:
        """As a decorator: gives back the function, or waits for it."""
        return args[0] if args and callable(args[0]) else cls

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type.__call__(_Named, name, (), {})


class _Placeholder(ModuleType):
    __version__ = "999"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type.__call__(_Named, name, (), {})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = tuple(f"{name}." for name in names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if f"{fullname}.".startswith(self._names) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def import_auto_bridge() -> Any:
    """``megatron.bridge.AutoBridge``; the test is skipped where it is not installed."""
    if find_spec("megatron.bridge") is None:
        pytest.skip("Megatron-Bridge is not there: make test-integration-bridge_maps")
    absent = tuple(name for name in ABSENT if PathFinder.find_spec(name) is None)
    sys.meta_path.append(_Finder(absent))
    from megatron.bridge import AutoBridge

    return AutoBridge
