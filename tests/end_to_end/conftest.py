"""A tiny model, a replay file and a config for whole commands."""

from pathlib import Path

import pytest
import yaml
from command_bench import STEPS, Bench

from asympo_megatron.records import write_groups
from asympo_megatron.testing.replay import random_groups
from asympo_megatron.testing.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def materials(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("materials")
    make_tiny_model(path / "model", tied=True)
    write_groups(path / "groups.jsonl", random_groups(16))
    return path


@pytest.fixture(scope="module")
def sampling_config(materials):
    """Settings of a run of 3 steps with two engines; each module adds its own."""
    return {
        "run": {"steps": 3},
        "model": {"path": str(materials / "model"), "init": "hf"},
        "optimizer": {"lr": 1e-3},
        "batch": {"groups_per_step": 4, "group_size": 4, "max_tokens_per_microbatch": 512},
        "rollout": {
            "num_engines": 2,
            "max_lag_steps": 2,
            "sampling": {"max_prompt_tokens": 64, "max_new_tokens": 6},
            "eval": {"interval_steps": 1, "prompts": 4},
        },
        "task": {"size": 2000, "template": "plain", "options": {"min_word_len": 3, "max_word_len": 3}},
        "checkpoint": {"interval_steps": 2},
    }


@pytest.fixture(scope="module")
def bench(materials, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    config = path / "tiny.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "run": {"steps": STEPS},
                "model": {"path": str(materials / "model"), "init": "hf"},
                "optimizer": {"lr": 1e-3, "eps": 1e-5},
                "batch": {"groups_per_step": 4, "group_size": 4, "max_tokens_per_microbatch": 128},
                "rollout": {"source": "replay", "replay": str(materials / "groups.jsonl"), "max_lag_steps": 4},
                "checkpoint": {"interval_steps": 2},
            }
        )
    )
    bench = Bench(path, config)
    yield bench
    bench.stop()
