"""The table of objectives, and how a name becomes one."""

import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType

from asympo_megatron.errors import ConfigError, UnknownNameError
from asympo_megatron.objectives.asympo import ASymPO
from asympo_megatron.objectives.asymre import AsymRE
from asympo_megatron.objectives.base import Objective
from asympo_megatron.objectives.cispo import CISPO
from asympo_megatron.objectives.decoupled import MIS, TIS, DecoupledPPO, IcePop
from asympo_megatron.objectives.grpo import DAPO, GRPO, DrGRPO
from asympo_megatron.objectives.gspo import GSPO
from asympo_megatron.objectives.m2po import M2PO
from asympo_megatron.objectives.opmd import OPMD
from asympo_megatron.objectives.reinforce import Reinforce
from asympo_megatron.objectives.sapo import SAPO
from asympo_megatron.objectives.sft import SFT
from asympo_megatron.objectives.spo import SPO
from asympo_megatron.objectives.topr import TOPR
from asympo_megatron.objectives.vespo import VESPO

OBJECTIVES: Mapping[str, type[Objective]] = MappingProxyType(
    {
        "asympo": ASymPO,
        "spo": SPO,
        "asympo_spo": SPO,
        "reinforce": Reinforce,
        "asymre": AsymRE,
        "opmd": OPMD,
        "topr": TOPR,
        "grpo": GRPO,
        "dr_grpo": DrGRPO,
        "dapo": DAPO,
        "gspo": GSPO,
        "cispo": CISPO,
        "sapo": SAPO,
        "vespo": VESPO,
        "m2po": M2PO,
        "decoupled_ppo": DecoupledPPO,
        "tis": TIS,
        "icepop": IcePop,
        "mis": MIS,
        "sft": SFT,
    }
)

ENTRY_POINT_GROUP = "asympo_megatron.objectives"
"""Installed packages add objectives under this group; they cannot replace one of the table."""


def build_objective(name: str, **options: object) -> Objective:
    """Build an objective from its name and options.

    Args:
        name: a name of ``OBJECTIVES``, of an installed entry point, or ``package.module:Class``.
        options: fields of the objective, e.g. ``nll_floor=1e-3``.

    Raises:
        UnknownNameError: no such objective or option; the message names the nearest.
        ConfigError: a value out of range, or an entry point or import path that does not lead to an ``Objective``.
    """
    kind = _find(name)
    known = list(inspect.signature(kind).parameters)
    for option in options:
        if not known:
            raise ConfigError(f"objective {name!r} takes no options; got {option!r}. Remove objective.options.")
        if option not in known:
            raise UnknownNameError(f"option of objective {name!r}", option, known)
    return kind(**options)


def _find(name: str) -> type[Objective]:
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if ":" in name:
        return _import(name, name)
    installed = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name in installed:
        return _import(name, installed[name])
    raise UnknownNameError("objective (or give pkg.mod:Class)", name, [*OBJECTIVES, *installed])


def _import(name: str, path: str) -> type[Objective]:
    module, _, attribute = path.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"objective {name!r}: cannot import {path}: {error}.") from error
    if not (inspect.isclass(kind) and issubclass(kind, Objective)):
        raise ConfigError(f"objective {name!r}: {path} is no subclass of asympo_megatron.objectives.Objective.")
    return kind
