"""What a controller is made of."""

from dataclasses import dataclass
from typing import Protocol

from asympo_megatron.config import Config
from asympo_megatron.rollout.admission import LagRule
from asympo_megatron.rollout.bell import Background, Bell
from asympo_megatron.rollout.evaluator import Evaluator
from asympo_megatron.rollout.fleet import Fleet
from asympo_megatron.rollout.interfaces import Scorer
from asympo_megatron.rollout.journal import Journal
from asympo_megatron.rollout.ledger import Ledger
from asympo_megatron.rollout.requester import Requester
from asympo_megatron.rollout.router import Router
from asympo_megatron.rollout.syncer import Syncer
from asympo_megatron.rollout.targets import Targets


class Feeder(Protocol):
    """Where groups come from: the sampler, or a replay file."""

    async def run(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """The pieces, wired by :func:`asympo_megatron.rollout.build.build_controller`. A replay has no engines, and so
    no syncer, requester, evaluator and scorer."""

    config: Config
    data_hash: str
    journal: Journal
    ledger: Ledger
    rule: LagRule
    fleet: Fleet
    targets: Targets
    bell: Bell
    background: Background
    feeder: Feeder
    syncer: Syncer | None
    requester: Requester | None
    evaluator: Evaluator | None
    scorer: Scorer | None
    router: Router | None = None
