"""What the processes of a chaos run agree on: configuration, prompts, and the tokens that every response must have.

The tokens of a response are a function of its group, its row and the position alone. So a token that belongs to another
request, or a gap after an abort, is seen by the trainer; and the weights after step k are a function of the groups
trained, whatever died meanwhile.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_reward import BROKEN, SPELLS

from asympo_megatron.config import Config, RunDir

VOCABULARY, PLAIN = 64, 56
"""Token ids; those from PLAIN on are no plain text: an engine under a fault ends a response with one."""
FIRST_SPELL = PLAIN
PROMPT_TOKENS = 3
LONGEST = 8


@dataclass(frozen=True)
class World:
    """One campaign; every process is given it."""

    home: str
    name: str
    steps: int
    controller_port: int
    engine_ports: tuple[int, ...]
    groups_per_step: int = 2
    group_size: int = 3
    max_lag_steps: int = 1
    lag_policy: str = "admission"
    pause_mode: str = "in_place"
    checkpoint_every: int = 2
    keep_checkpoints: int = 1
    async_save: bool = False
    engine_latency_s: float = 0.01
    engine_timeout_s: float = 4.0
    mutant: str = ""

    @property
    def path(self) -> Path:
        return Path(self.home)

    @property
    def engine_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.engine_ports]

    @property
    def controller_url(self) -> str:
        return f"http://127.0.0.1:{self.controller_port}"

    def config(self) -> Config:
        config = Config()
        config.run.name, config.run.root, config.run.steps = self.name, self.home, self.steps
        config.batch.groups_per_step, config.batch.group_size = self.groups_per_step, self.group_size
        config.batch.max_tokens_per_microbatch = 64
        config.checkpoint.interval_steps, config.checkpoint.keep_last = self.checkpoint_every, self.keep_checkpoints
        config.checkpoint.async_save = self.async_save
        config.sync.pause_mode, config.sync.keep_last, config.sync.timeout_s = self.pause_mode, 2, 10.0
        rollout = config.rollout
        rollout.controller_url = self.controller_url
        rollout.max_lag_steps, rollout.lag_policy = self.max_lag_steps, self.lag_policy
        rollout.sampling.max_new_tokens, rollout.sampling.max_prompt_tokens = LONGEST, 16
        rollout.request_timeout_s = rollout.engine_timeout_s = self.engine_timeout_s
        rollout.engine_start_timeout_s = 60.0
        config.task.reward_timeout_s, config.task.reward_retries, config.task.reward_workers = 2.0, 1, 2
        return config

    @property
    def run_dir(self) -> RunDir:
        return RunDir.of(self.config())

    @property
    def bait(self) -> Path:
        """A file that only executed model output would write."""
        return self.path / "executed"


def prompt_ids(index: int) -> list[int]:
    """The digits of a prompt's number: an engine's answer says whose it is."""
    return [index // PLAIN**2 % PLAIN, index // PLAIN % PLAIN, index % PLAIN]


def prompt_index(ids: list[int]) -> int:
    return (ids[0] * PLAIN + ids[1]) * PLAIN + ids[2]


def response_ids(index: int, row: int) -> list[int]:
    """The only right answer in ``row`` of prompt ``index``; its first token is the row."""
    digest = hashlib.sha256(f"{index}.{row}".encode()).digest()
    size = 2 + digest[0] % (LONGEST - 2)
    return [row, *(byte % PLAIN for byte in digest[1:size])]


def matches(found: list[int], index: int, row: int) -> bool:
    """Whether a response is the right one, up to a spell in place of its last token."""
    expected = response_ids(index, row)
    spelled = found[-1] >= FIRST_SPELL and found[:-1] == expected[:-1] and len(found) == len(expected)
    return found == expected or spelled


@dataclass(frozen=True)
class Prompt:
    index: int
    ids: list[int]
    answer: str
    meta: dict[str, Any]
    question: str = ""


@dataclass(frozen=True)
class Codec:
    stop_token_ids: tuple[int, ...] = ()
    vocab_size: int = VOCABULARY

    def decode(self, ids: list[int]) -> str:
        return " ".join(SPELLS[token - FIRST_SPELL] if token >= FIRST_SPELL else str(token) for token in ids)


@dataclass(frozen=True)
class NumberedTask:
    """Prompt i is i. Every 29th has a reference answer that breaks the scorer: its group is dropped."""

    bait: Path
    codec: Codec = field(default_factory=Codec)

    def train_prompt(self, index: int) -> Prompt:
        answer = BROKEN if index % 29 == 17 else "1"
        return Prompt(index, prompt_ids(index), answer, {"bait": str(self.bait)})

    def eval_prompts(self, limit: int) -> list[Prompt]:
        raise NotImplementedError("these runs evaluate nothing")
