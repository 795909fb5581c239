"""Every program of a chaos campaign, for the process from which they are forked."""

from collections.abc import Callable
from typing import Any

from chaos_controller import run_controller
from chaos_engine import run_engine
from chaos_megatron import run_alone, run_real_controller, run_real_trainer
from chaos_trainer import run_trainer
from chaos_world import World


def small_programs(world: World) -> dict[str, tuple[Callable[..., None], tuple[Any, ...]]]:
    """Scripted engines, the controller, the small trainer."""
    engines = {f"engine{k}": (run_engine, (world, k)) for k in range(len(world.engine_ports))}
    return {**engines, "controller": (run_controller, (world,)), "trainer": (run_trainer, (world,))}


def real_programs(world: World) -> dict[str, tuple[Callable[..., None], tuple[Any, ...]]]:
    """The commands `asympo control` and `asympo train`."""
    return {"controller": (run_real_controller, (world,)), "trainer": (run_real_trainer, (world,))}


def lonely_program(world: World) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The same run with nothing in its way."""
    return (run_alone, (world,))
