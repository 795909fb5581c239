"""A finished warm start is used again only for the run it was made for."""

import pytest

from asympo_megatron.config import RunDir, load_config, warm_start_config
from asympo_megatron.errors import ConfigError
from asympo_megatron.launch import supervisor


@pytest.fixture
def started(monkeypatch):
    roles = []
    monkeypatch.setattr(supervisor, "prepare_model_dir", lambda _, path: path / "model")
    monkeypatch.setattr(supervisor, "_run_roles", lambda *arguments: roles.append(arguments))
    return roles


def warmed(tmp_path, *overrides):
    config = load_config("quickstart", [f"run.root={tmp_path}", *overrides])
    first = warm_start_config(config)
    assert first is not None
    run_dir = RunDir.of(first)
    if not run_dir.config.is_file():
        run_dir.create(first)
        run_dir.checkpoint(first.run.steps).mkdir(parents=True)
    return config


def test_a_finished_warm_start_is_not_repeated(tmp_path, started):
    config = warmed(tmp_path)
    supervisor.run_local(config, print)
    ((_, run_dir, _, _, overrides, _),) = started
    assert run_dir == RunDir.of(config)
    assert overrides == [f"model.init={run_dir.warmup / 'checkpoints'}"]
    assert load_config(run_dir.config) == config  # the saved config is the user's, so it can be run again


@pytest.mark.parametrize("change", ["run.seed=4", "optimizer.beta2=0.9", "model.hf.hidden_size=128"])
def test_a_warm_start_with_other_options_is_refused(tmp_path, started, change):
    warmed(tmp_path)
    with pytest.raises(ConfigError, match=r"made with other options.*run\.name"):
        supervisor.run_local(warmed(tmp_path, change), print)
    assert started == []


def test_what_the_warm_start_does_not_depend_on_may_change(tmp_path, started):
    warmed(tmp_path)
    supervisor.run_local(warmed(tmp_path, "rollout.max_lag_steps=2", "run.steps=500"), print)
    assert len(started) == 1
