"""Which configuration trained which steps: refusals change nothing, changes are kept from the step they begin at."""

import pytest

from asympo_megatron.config import RunDir, history, load_config
from asympo_megatron.errors import ConfigError
from asympo_megatron.metrics import MetricsWriter


@pytest.fixture
def configured(tmp_path):
    return lambda *overrides: load_config("quickstart", [f"run.root={tmp_path}", *overrides])


@pytest.fixture
def run_dir(configured):
    run_dir = RunDir.of(configured())
    run_dir.create(configured())
    MetricsWriter(run_dir.metrics).write({"step": 0})
    assert history.begin(run_dir, configured(), 0) == []
    return run_dir


def files(run_dir):
    return sorted(path.name for path in run_dir.path.iterdir())


def attempt(run_dir, config, error, accepted):
    """A run that fails; returns the changes it was told and the configuration that its roles found."""
    seen = []
    try:
        with history.proposed(run_dir, config) as changes:
            seen += [[str(change) for change in changes], load_config(run_dir.config)]
            if accepted:
                MetricsWriter(run_dir.metrics).write({"step": 0})
            raise error
    except type(error):
        return seen


def test_a_refused_run_leaves_the_configuration_as_it_was(run_dir, configured):
    before = run_dir.config.read_bytes()
    run_dir.config.chmod(0o600)
    config = configured("batch.group_size=4", "optimizer.lr=1")
    changes, found = attempt(run_dir, config, ConfigError("the journal belongs to another run"), accepted=False)
    assert changes == ["optimizer.lr 0.0006 -> 1.0", "batch.group_size 8 -> 4"]
    assert found == config
    assert run_dir.config.read_bytes() == before
    assert run_dir.config.stat().st_mode & 0o777 == 0o600
    assert files(run_dir) == ["config.yaml", "configs", "metrics.jsonl"]


def test_a_run_that_fails_after_it_was_accepted_keeps_its_configuration(run_dir, configured):
    attempt(run_dir, configured("optimizer.lr=1"), KeyboardInterrupt(), accepted=True)
    assert load_config(run_dir.config).optimizer.lr == 1
    assert files(run_dir) == ["config.yaml", "configs", "metrics.jsonl"]


def test_the_first_configuration_of_a_run_stays_whatever_happens(tmp_path):
    config = load_config("quickstart", [f"run.root={tmp_path}"])
    assert attempt(RunDir.of(config), config, RuntimeError("no engine"), accepted=False) == [[], config]
    assert load_config(RunDir.of(config).config) == config


def test_a_trainer_alone_replaces_the_configuration_once_it_is_accepted(run_dir, configured):
    (change,) = history.begin(run_dir, configured("rollout.max_lag_steps=2"), 50)
    assert str(change) == "rollout.max_lag_steps 4 -> 2"
    assert load_config(run_dir.config).rollout.max_lag_steps == 2


def test_the_trainer_of_a_supervised_run_does_not(run_dir, configured):
    """It has overrides that tell it where everything is: who types the command again needs the configuration alone."""
    before = run_dir.config.read_bytes()
    told = ["rollout.controller_url=http://127.0.0.1:9", "model.init=warmup", "rollout.controller_token=sesame"]
    assert history.begin(run_dir, configured(*told), 50) == []
    assert run_dir.config.read_bytes() == before
    assert [path.name for path in run_dir.configs.iterdir()] == ["step_000000.yaml"]


def test_each_step_has_the_configuration_that_trained_it(run_dir, configured):
    for step, lr in ((50, 1.0), (80, 2.0)):
        history.begin(run_dir, configured(f"optimizer.lr={lr}"), step)

    def lr(step):
        found = history.in_force(run_dir, step)
        assert found is not None
        return load_config(found).optimizer.lr

    assert [lr(step) for step in (1, 50, 51, 80, 81)] == [6e-4, 6e-4, 1.0, 1.0, 2.0]
    told = [(step, list(map(str, changes))) for step, changes in history.changes(run_dir, 100)]
    assert told == [(50, ["optimizer.lr 0.0006 -> 1.0"]), (80, ["optimizer.lr 1.0 -> 2.0"])]
    assert [step for step, _ in history.changes(run_dir, 80)] == [50], "that of step 80 has trained nothing yet"


def test_a_run_that_goes_back_forgets_the_changes_of_lost_steps(run_dir, configured):
    history.begin(run_dir, configured("optimizer.lr=1"), 50)
    (change,) = history.begin(run_dir, configured("optimizer.lr=1"), 40)
    assert change.key == "optimizer.lr", "it holds from step 40 on now"
    assert [step for step, _ in history.changes(run_dir, 100)] == [40]
    history.begin(run_dir, configured(), 40)
    assert history.changes(run_dir, 100) == [], "as if it had never been"


def test_options_that_come_and_go_and_long_values(run_dir, configured):
    changes = history.begin(run_dir, configured("objective.options.nll_floor=0.5", f"model.path={'x' * 500}"), 1)
    assert str(changes[1]) == "objective.options.nll_floor unset -> 0.5"
    assert len(str(changes[0])) < 150
