"""A quickstart task shared by the tests of prompts and rewards; nothing writes into it."""

import copy
import json

import pytest

from asympo_megatron.config import load_config
from asympo_megatron.tasks import load_task, prepare_model_dir


@pytest.fixture(scope="session")
def spell_dir(tmp_path_factory):
    return prepare_model_dir(load_config("quickstart"), tmp_path_factory.mktemp("spell"))


@pytest.fixture(scope="session")
def shared_spell_task(spell_dir):
    return load_task(load_config("quickstart"), spell_dir)


@pytest.fixture
def spell_config():
    return load_config("quickstart", ["task.size=3000"])


@pytest.fixture
def gym(tmp_path):
    """Make (config, task) of a reasoning-gym data set with its own tokenizer."""

    def make(name, *overrides, options=None):
        config = copy.deepcopy(load_config("quickstart", [f"task.name={name}", "task.size=300", *overrides]))
        config.task.options = options or {}
        config.rollout.sampling.max_prompt_tokens = 4096
        return config, load_task(config, prepare_model_dir(config, tmp_path / name))

    return make


@pytest.fixture
def jsonl(tmp_path):
    """Make (config, task) of rows or raw lines, with its own tokenizer."""

    def make(rows, *overrides, name="data"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        base = ["task.kind=jsonl", f"task.path={path}", "task.eval_fraction=0"]
        config = load_config("quickstart", [*base, "rollout.sampling.max_prompt_tokens=512", *overrides])
        config.task.options = {}
        return config, load_task(config, prepare_model_dir(config, tmp_path / f"run_{name}"))

    return make
