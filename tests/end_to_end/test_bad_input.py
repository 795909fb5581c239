"""Bad input: a clear error with its remedy and a non-zero exit, before work is lost."""

import json
import socket

import pytest

from asympo_megatron.cli.main import EXIT_BAD_INPUT, EXIT_FAILED, main
from asympo_megatron.config import RunDir, load_config
from asympo_megatron.errors import ConfigError
from asympo_megatron.records import Group, Response, write_groups


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rollout.max_lag=3"], ["rollout.max_lag", "max_lag_steps"]),
        (["objective.name=asypmo"], ["asypmo", "asympo"]),
        (["objective.options.nll_flor=1"], ["nll_flor", "nll_floor"]),
        (["batch.group_size=1"], ["batch.group_size", "advantage.estimator=none"]),
        (["rollout.sampling.max_new_tokens=10000"], ["max_tokens_per_microbatch", "Raise it"]),
        (["task.name=spel_backward"], ["spel_backward", "spell_backward"]),
        (["model.hf.model_type=qwen33"], ["qwen33", "qwen3"]),
        (["model.init=/nowhere/at/all", "run.warm_start=[]"], ["/nowhere/at/all", "model.init"]),
        (["run.warm_start=[objective.name=sfd]"], ["sfd", "sft"]),
        (["rollout.engine_host=192.0.2.1"], ["rollout.engine_host", "192.0.2.1", "Set it to 127.0.0.1"]),
        (["rollout.controller_host=::1"], ["rollout.controller_host", "'::1'", "IPv4"]),
        (["sync.deltas=3", "sync.mirror_host=::1"], ["sync.mirror_host", "'::1'", "IPv4"]),
    ],
)
def test_asympo_run_refuses_before_anything_starts(tmp_path, capsys, arguments, words):
    code = main(["run", "quickstart", f"run.root={tmp_path}", *arguments])
    said = capsys.readouterr().err
    assert code in (EXIT_BAD_INPUT, EXIT_FAILED)
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.log")), "a role was started"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.megatron.num_layer=3"], ["num_layer", "num_layers"]),
        (["optimizer.megatron.lrr=3"], ["lrr", "lr"]),
        (["ddp.megatron.overlap_grad_reducee=true"], ["overlap_grad_reducee", "overlap_grad_reduce"]),
        (["parallel.tensor=3"], ["parallel.tensor", "3"]),
    ],
)
def test_the_trainer_refuses_before_its_first_step(tmp_path, capsys, arguments, words):
    assert main(["run", "quickstart", f"run.root={tmp_path}", *arguments]) == EXIT_FAILED
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_taken_port_is_named_with_its_key(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = [f"run.root={tmp_path}", "run.warm_start=[]", f"rollout.controller_port={port}"]
        assert main(["run", "quickstart", *options]) == EXIT_BAD_INPUT
    assert "rollout.controller_port" in capsys.readouterr().err


def test_a_run_directory_that_cannot_be_written_is_named_with_its_key(tmp_path, capsys):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", "/proc"):
        assert main(["run", "quickstart", f"run.root={root}"]) == EXIT_BAD_INPUT
        said = capsys.readouterr().err
        assert f"the run directory {root}/quickstart cannot be written" in said
        assert "Set run.root" in said
        config = load_config("quickstart", [f"run.root={root}"])
        with pytest.raises(ConfigError, match=r"Set run\.root"):  # a trainer alone
            RunDir.of(config).create(config)


def test_an_empty_task_is_refused(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    options = [f"run.root={tmp_path}", "run.warm_start=[]", "task.kind=jsonl", f"task.path={tmp_path / 'empty.jsonl'}"]
    assert main(["run", "quickstart", *options]) != 0
    assert "empty.jsonl" in capsys.readouterr().err


def replay(path, ids):
    write_groups(path, [Group([3, 4], [Response(ids, [1] * len(ids), float(row)) for row in range(2)])] * 4)
    return [f"rollout.replay={path}", "batch.group_size=2"]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([9, 100_000], ["100000", "vocab"]),
        ([5] * 200, ["group 0", "response 0 has 202 tokens", "max_tokens_per_microbatch is 128"]),
    ],
)
def test_replayed_groups_that_cannot_be_trained(bench, ids, words):
    name = f"bad{len(ids)}"
    options = replay(bench.path / f"{name}.jsonl", ids)
    output = bench.run("train", str(bench.config), f"run.name={name}", *options, code=EXIT_BAD_INPUT)
    assert all(word in output for word in words), output[-2000:]
    assert "Traceback" not in output
    assert bench.rows(name) == []


@pytest.mark.slow
def test_the_whole_replay_file_is_checked_before_the_first_step(bench):
    good, alone = Group([3], [Response([4], [1], 1.0)] * 2), Group([3], [Response([4], [1], 1.0)])
    write_groups(bench.path / "uneven.jsonl", [good] * 8 + [alone])
    option = f"rollout.replay={bench.path / 'uneven.jsonl'}"
    output = bench.run("train", str(bench.config), "run.name=uneven", option, code=EXIT_BAD_INPUT)
    assert "group 8: 1 response(s)" in output
    assert "advantage.estimator=none" in output
    output = bench.run(
        "train",
        str(bench.config),
        "run.name=uneven",
        option,
        "objective.name=grpo",
        "advantage.estimator=none",
        code=EXIT_BAD_INPUT,
    )
    assert "group 0: response 0 has no behavior_logprobs" in output
    assert bench.rows("uneven") == []


@pytest.mark.slow
def test_resume_false_never_touches_an_earlier_run(bench):
    options = ["run.name=again", "run.steps=2"]
    bench.run("train", str(bench.config), *options)
    before = bench.checksums("again")
    output = bench.run("train", str(bench.config), *options, "checkpoint.resume=false", code=EXIT_BAD_INPUT)
    assert "Set run.name to a new run" in output
    output = bench.run("train", str(bench.config), *options, "run.steps=3", "run.seed=5", code=EXIT_FAILED)
    assert "belongs to a run on other data" in output
    assert bench.checksums("again") == before


def test_a_trainer_without_a_controller_says_how_to_get_one(bench):
    output = bench.run(
        "train",
        str(bench.config),
        "rollout.source=engines",
        "batch.max_tokens_per_microbatch=4096",
        code=EXIT_BAD_INPUT,
    )
    assert "rollout.controller_url" in output
    assert "`asympo run` starts both" in output


def test_a_malformed_replay_line_is_named(bench):
    path = bench.path / "malformed.jsonl"
    path.write_text(json.dumps({"prompt_ids": [1], "responses": [{"ids": [1, 2], "mask": [1], "reward": 1.0}]}) + "\n")
    output = bench.run("train", str(bench.config), "run.name=bad", f"rollout.replay={path}", code=EXIT_BAD_INPUT)
    assert "group 0" in output
    assert "mask has 1 entries for 2 ids" in output


def test_a_loss_that_is_not_finite_keeps_the_state(bench):
    """A gigantic step makes the next loss infinite or NaN: that step is refused, the weights before it are saved."""
    options = [
        "run.name=nan",
        "optimizer.lr=1e30",
        "optimizer.clip_grad=0",
        "run.steps=50",
        "checkpoint.interval_steps=0",
    ]
    output = bench.run("train", str(bench.config), *options, code=EXIT_FAILED)
    assert "NonFiniteLossError" in output
    assert "Lower optimizer.lr" in output
    steps = [row["step"] for row in bench.rows("nan")]
    kept = [path.name for path in (bench.path / "runs" / "nan" / "checkpoints").iterdir()]
    assert kept == [f"step_{steps[-1] if steps else 0:06d}"]


@pytest.mark.slow
def test_an_engine_that_never_gets_ready_ends_the_run(bench):
    with socket.socket() as silent:  # accepts connections, never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        output = bench.run(
            "run",
            "quickstart",
            "run.warm_start=[]",
            "run.name=silent",
            f"rollout.engine_urls=[{url}]",
            "rollout.engine_timeout_s=1",
            "rollout.engine_start_timeout_s=3",
            code=EXIT_FAILED,
        )
    assert url in output
    assert "Traceback" not in output.split("The end of")[0]
