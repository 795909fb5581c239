"""Placeholders for packages that a framework imports beside its loss path: trackers, services, engines, kernels.

Only the packages named here, and only where they are not installed. Calling anything of a placeholder raises, so no
compared number can come out of one.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from asympo_megatron.errors import IntegrationError

PACKAGES: dict[str, tuple[str, ...]] = {
    "prime_rl": ("wandb",),
    "nemo_rl": (
        "fastapi",
        "matplotlib",
        "mlflow",
        "prometheus_client",
        "swanlab",
        "tensorboard",
        "uvicorn",
        "wandb",
    ),
    "openrlhf": ("deepspeed", "flash_attn", "peft", "pylatexenc", "vllm"),
    "megatron_bridge": (
        "datasets",
        "einops",
        "megatron.energon",
        "modelopt",
        "tensorboard",
        "toml",
        "transformer_engine",
    ),
}


class _Refusing(type):
    """Classes may be named, inherited from and looked into, but not called."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise IntegrationError(
            f"{cls.__module__}.{cls.__qualname__} was called: the loss path needs {cls.__module__} after all. Install "
            "it, and take it out of tools/check_integration/placeholders.py."
        )

    def __getattr__(cls, name: str) -> Any:
        return _absent(cls.__module__, f"{cls.__qualname__}.{name}")


class _Placeholder(ModuleType):
    __version__ = "999"  # torch.utils.tensorboard compares it while it is imported

    def __getattr__(self, name: str) -> Any:
        return _absent(self.__name__, name)


def _absent(module: str, name: str) -> Any:
    if name.rpartition(".")[2].startswith("__"):
        raise AttributeError(f"{module} is a placeholder and has no {name}")
    return _Refusing(name, (), {"__module__": module, "__qualname__": name})


class _Finder(MetaPathFinder, Loader):
    """Last of all finders, so that an installed package wins."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = tuple(f"{name}." for name in packages)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not f"{fullname}.".startswith(self._packages):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def allow(name: str) -> None:
    """Let the packages that ``name`` imports beside its loss path be absent."""
    sys.meta_path.append(_Finder(PACKAGES.get(name, ())))
