"""Sinks take what metrics.jsonl takes; their packages are optional."""

import sys
import types
import urllib.request

import pytest

from asympo_megatron.config import load_config
from asympo_megatron.errors import ConfigError, UnknownNameError
from asympo_megatron.metrics import open_sinks
from asympo_megatron.metrics.sinks import scalars

ROWS = [
    {"step": 0, "time_s": 0.0},
    {"step": 1, "reward/mean": 0.25, "train/J": None, "train/weights_checksum": "ab", "lag/histogram": [1, 2]},
    {"step": 2, "reward/mean": 0.5},
    {"step": 1, "reward/mean": 0.25, "eval/accuracy": 0.75, "eval/step": 1},
]


def config_with(*sinks, **logging):
    overrides = [f"logging.{key}={value}" for key, value in logging.items()]
    return load_config("quickstart", [f"logging.sinks=[{','.join(sinks)}]", *overrides])


def test_scalars_leaves_out_what_is_no_number():
    assert scalars(ROWS[1]) == {"reward/mean": 0.25}


def test_no_sink_by_default(tmp_path):
    assert open_sinks(load_config("quickstart"), tmp_path) == []


def test_an_unknown_sink_names_the_nearest(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'wandb'"):
        open_sinks(config_with("wandbb"), tmp_path)


@pytest.mark.parametrize(("sink", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, sink, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"asympo-megatron\[{sink}\]"):
        open_sinks(config_with(sink), tmp_path)


def test_prometheus_serves_the_newest_values(tmp_path):
    (sink,) = open_sinks(config_with("prometheus", prometheus_port=0), tmp_path)
    try:
        for row in ROWS:
            sink.write(row)
        with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    finally:
        sink.close()
    assert "asympo_eval_accuracy 0.75" in lines
    assert "asympo_reward_mean 0.5" in lines, "an older step written again must not move a gauge back"


def test_a_taken_port_is_an_error_with_a_remedy(tmp_path):
    (sink,) = open_sinks(config_with("prometheus", prometheus_port=0), tmp_path)
    try:
        with pytest.raises(ConfigError, match=r"cannot be opened.*Set another port"):
            open_sinks(config_with("prometheus", prometheus_port=sink.port), tmp_path)
    finally:
        sink.close()


def test_tensorboard_draws_each_value_once(tmp_path, monkeypatch):
    drawn = []
    writer = types.SimpleNamespace(
        add_scalar=lambda name, value, global_step: drawn.append((name, value, global_step)),
        flush=lambda: None,
        close=lambda: drawn.append("closed"),
    )
    module = types.SimpleNamespace(SummaryWriter=lambda log_dir: drawn.append(log_dir) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (sink,) = open_sinks(config_with("tensorboard"), tmp_path)
    for row in ROWS:
        sink.write(row)
    sink.close()
    assert drawn == [
        str(tmp_path / "tensorboard"),
        ("time_s", 0.0, 0),
        ("reward/mean", 0.25, 1),
        ("reward/mean", 0.5, 2),
        ("eval/accuracy", 0.75, 1),
        ("eval/step", 1.0, 1),
        "closed",
    ]


class FakeWandb(types.SimpleNamespace):
    """Records what the sink asks of wandb."""

    def __init__(self):
        super().__init__(inits=[], logged=[])

    def init(self, **options):
        self.inits.append(options)
        run_id = options["id"] or f"id{len(self.inits)}"
        return types.SimpleNamespace(
            id=run_id, define_metric=lambda *_, **__: None, log=self.logged.append, finish=lambda: None
        )


def test_wandb_resumes_its_run_and_is_shown_no_secret(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = config_with("wandb")
    config.rollout.controller_token, config.rollout.engine_api_key = "sesame", "opener"
    (first,) = open_sinks(config, tmp_path)
    for row in ROWS:
        first.write(row)
    first.close()
    open_sinks(config, tmp_path)
    assert [options["id"] for options in wandb.inits] == [None, "id1"]
    assert wandb.logged[-1] == {"step": 1, "eval/accuracy": 0.75, "eval/step": 1.0}
    assert "sesame" not in str(wandb.inits)
    assert "opener" not in str(wandb.inits)
    assert config.rollout.controller_token == "sesame", "hiding must not touch the configuration in use"
