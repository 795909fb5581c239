"""Configuration: overrides, unknown keys, contradictions, warm start, data hash."""

import pytest

from asympo_megatron.config import (
    Config,
    data_hash,
    load_config,
    override_config,
    preset_names,
    save_config,
    warm_start_config,
)
from asympo_megatron.errors import ConfigError, UnknownNameError


def quickstart(*overrides: str):
    return load_config("quickstart", overrides)


def test_overrides_win_over_the_file_and_the_file_over_defaults():
    config = quickstart("rollout.max_lag_steps=7", "objective.options.nll_floor=0.01", "model.hf.hidden_size=96")
    assert config.rollout.max_lag_steps == 7
    assert config.objective.options == {"nll_floor": 0.01}
    assert config.model.hf["hidden_size"] == 96
    assert config.model.hf["model_type"] == "qwen3"
    assert config.optimizer.beta2 == 0.95


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.max_lag=3", ["rollout.max_lag", "max_lag_steps"]),
        ("optimiser.lr=1", ["optimiser", "optimizer"]),
        ("rollout.sampling.temprature=1", ["rollout.sampling.temprature", "temperature"]),
        ("rollout.source=engine", ["rollout.source", "engines"]),
    ],
)
def test_unknown_names_name_the_nearest(override, words):
    with pytest.raises(UnknownNameError) as caught:
        quickstart(override)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.steps=many"], ["run.steps", "Integer"]),
        (["run.steps=0"], ["run.steps", "at least 1"]),
        (["optimizer.lr=0"], ["optimizer.lr", "greater than 0"]),
        (["batch.group_size=1"], ["batch.group_size", "advantage.estimator=none"]),
        (["rollout.sampling.max_new_tokens=9000"], ["max_tokens_per_microbatch", "Raise it to 9032"]),
        (["rollout.source=replay"], ["rollout.replay=FILE"]),
        (["rollout.source=supervised"], ["objective.name=sft"]),
        (["sync.interval_steps=6"], ["rollout.max_lag_steps to 5"]),
        (["parallel.sequence=true"], ["parallel.tensor"]),
        (["parallel.virtual_pipeline=2"], ["parallel.pipeline"]),
        (["model.init=hf"], ["model.path"]),
        (["task.kind=jsonl"], ["task.path"]),
        (["rollout.label_noise=1.5"], ["rollout.label_noise", "probability"]),
        (["nonsense"], ["a.b=c"]),
    ],
)
def test_contradictions_name_the_remedy(overrides, words):
    with pytest.raises(ConfigError) as caught:
        quickstart(*overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_model_and_bad_files(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("{}")
    with pytest.raises(ConfigError, match="no model"):
        load_config(empty)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(UnknownNameError, match="quickstart"):
        load_config("quickstrat")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [unclosed")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(broken)
    broken.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(broken)


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("task: {system_prompt: é}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml is no UTF-8 text .*Save it as UTF-8"):
        load_config(latin)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "read_text", refuse)  # whoever runs this test may read everything
    with pytest.raises(ConfigError, match=r"latin\.yaml cannot be read \(Permission denied\).*its owner"):
        load_config(latin)


def test_saved_config_loads_to_the_same(tmp_path):
    config = quickstart("run.seed=5", "model.megatron.num_moe_experts=4")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "text",
    ["Write ${x}", "${oc.env:HOME}", "${", "${a b", r"\${x}", r"\\${x}", r"C:\dir\ ${a}\\", r"\\ $ {", "é ${é}"],
)
def test_text_that_looks_like_an_interpolation_stays_text(tmp_path, text):
    """Roles read what was saved, and a warm start inherits it; the sign was resolved when the user's file was read."""
    config = quickstart()
    config.task.system_prompt = text
    config.rollout.engine_args, config.objective.options = [text], {"words": {"more": [text]}}
    config.run.root = f"runs {text}"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert override_config(config, []) == config
    first = warm_start_config(config)
    assert first is not None
    assert (first.task.system_prompt, first.run.root) == (text, f"runs {text}/quickstart")


def test_interpolations_of_the_user_are_resolved_once_and_saved_as_values(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYMPO_TOKEN", "sesame ${oc.env:HOME}")
    config = quickstart(
        "rollout.controller_token=${oc.env:ASYMPO_TOKEN}", "task.system_prompt='Write \\${x} for ${run.name}'"
    )
    assert config.rollout.controller_token == "sesame ${oc.env:HOME}"
    assert config.task.system_prompt == "Write ${x} for quickstart"
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.delenv("ASYMPO_TOKEN")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_config_with_secrets_is_for_its_owner_alone(tmp_path):
    save_config(quickstart("rollout.controller_token=sesame"), tmp_path / "secret.yaml")
    assert (tmp_path / "secret.yaml").stat().st_mode & 0o077 == 0


def test_every_preset_loads():
    assert "quickstart" in preset_names()
    for name in preset_names():
        load_config(name)


def test_warm_start_inherits_all_but_what_it_overrides():
    config = quickstart("run.seed=9", "objective.options.nll_floor=0.1", "run.root=elsewhere")
    first = warm_start_config(config)
    assert first is not None
    assert (first.run.root, first.run.name, first.run.seed) == ("elsewhere/quickstart", "warmup", 9)
    assert (first.objective.name, first.objective.options) == ("sft", {})
    assert first.model == config.model
    assert first.task == config.task
    assert first.run.warm_start == []
    assert warm_start_config(first) is None
    config.rollout.journal_dir = "/local/journal"
    first = warm_start_config(config)
    assert first is not None
    assert first.rollout.journal_dir == "/local/journal/warmup", "a journal belongs to one run"


def test_warm_start_with_an_unknown_key_is_refused():
    with pytest.raises(UnknownNameError, match="groups_per_step"):
        warm_start_config(quickstart("run.warm_start=[batch.groups_per_stp=3]"))


def test_data_hash_moves_with_the_data_and_only_with_it():
    base = data_hash(quickstart())
    same = ["run.steps=9", "optimizer.lr=1", "rollout.max_lag_steps=0", "run.name=other", "logging.level=DEBUG"]
    same += ["task.reward_timeout_s=99", "task.reward_retries=9", "task.reward_workers=9", "model.init_std=1"]
    moves = ["run.seed=1", "batch.group_size=4", "task.seed=3", "rollout.sampling.top_p=0.9"]
    moves += ["task.reward=exact", "model.hf.hidden_size=8"]
    assert all(data_hash(quickstart(item)) == base for item in same)
    assert len({data_hash(quickstart(item)) for item in moves} | {base}) == len(moves) + 1
    tokenizers = [Config(), Config()]
    tokenizers[1].model.path = "/models/other"
    assert data_hash(tokenizers[0]) != data_hash(tokenizers[1])


def test_every_numeric_limit_is_about_an_existing_key():
    from asympo_megatron.config import limits
    from asympo_megatron.config.validate import value_of

    config = quickstart()
    for key in (*limits.CHOICES, *limits.SUBSETS, *limits.AT_LEAST, *limits.POSITIVE, *limits.RULES):
        value_of(config, key)
