"""`asympo run` with an embedded engine: lag, order, evaluation, and an end without leftovers, however it ends."""

import os
import signal
import sqlite3

import psutil
import pytest
import yaml
from command_bench import Bench

from asympo_megatron.config import RunDir
from asympo_megatron.testing.polling import wait_until

GROUPS, SIZE, RUN_STEPS = 4, 4, 4


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    config = path / "spell.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "run": {"steps": RUN_STEPS},
                "model": {
                    "hf": {
                        "model_type": "qwen3",
                        "hidden_size": 32,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 2,
                        "num_key_value_heads": 1,
                        "head_dim": 16,
                        "intermediate_size": 64,
                        "tie_word_embeddings": True,
                        "max_position_embeddings": 64,
                    }
                },
                "optimizer": {"lr": 1e-3},
                "batch": {"groups_per_step": GROUPS, "group_size": SIZE, "max_tokens_per_microbatch": 512},
                "rollout": {
                    "sampling": {"max_prompt_tokens": 32, "max_new_tokens": 6},
                    "eval": {"interval_steps": 2, "prompts": 8},
                },
                "task": {"name": "spell_backward", "size": 2000, "options": {"min_word_len": 3, "max_word_len": 3}},
                "checkpoint": {"interval_steps": 2},
            }
        )
    )
    bench = Bench(path, config)
    yield bench
    bench.stop()


def leased(bench, name) -> list[tuple[int, int, int]]:
    """(step, group, prompt) of everything that was trained, from the journal."""
    with sqlite3.connect(RunDir(bench.path / "runs" / name).journal) as journal:
        return journal.execute(
            "SELECT lease_step, group_id, prompt_index FROM groups WHERE lease_step IS NOT NULL ORDER BY 1, 2"
        ).fetchall()


def test_lag_zero_is_synchronous_rl_in_the_order_of_the_prompts(bench):
    bench.run("run", str(bench.config), "run.name=synchronous", "rollout.max_lag_steps=0")
    rows = bench.rows("synchronous")
    assert [(row["lag/max"], row["lag/histogram"]) for row in rows] == [(0, [GROUPS * SIZE])] * RUN_STEPS
    assert all(row["rollout/spanning_fraction"] == 0 for row in rows)
    expected = [(k // GROUPS, k, k) for k in range(GROUPS * RUN_STEPS)]
    assert leased(bench, "synchronous") == expected


def test_asynchronous_run_leaves_metrics_report_and_the_last_weights(bench):
    output = bench.run("run", str(bench.config), "run.name=asynchronous", "rollout.max_lag_steps=2")
    rows = bench.rows("asynchronous")
    assert max(row["lag/max"] for row in rows) in (1, 2)
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [2, 4]
    assert all(row["eval/step"] == row["step"] for row in rows if "eval/step" in row)
    assert sorted(group for _, group, _ in leased(bench, "asynchronous")) == list(range(GROUPS * RUN_STEPS))
    run_dir = bench.path / "runs" / "asynchronous"
    assert "report.html" in output
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert sorted(path.name for path in (run_dir / "weights").iterdir())[-1] == f"v{RUN_STEPS:06d}"
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000002", "step_000004"]


@pytest.mark.slow
def test_a_dead_engine_ends_the_run_with_its_name(bench):
    process = start_and_wait_for_a_step(bench, "engine_dies")
    family = psutil.Process(process.pid).children(recursive=True)
    engine = next(child for child in family if "engine" in child.cmdline())
    engine.kill()
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "engine0 was killed by SIGKILL" in output
    assert psutil.wait_procs(family, timeout=90)[1] == []


@pytest.mark.slow
def test_ctrl_c_stops_all_and_the_same_command_resumes(bench):
    steps = 150  # on a busy machine 40 were done before the signal came
    process = start_and_wait_for_a_step(bench, "interrupted", f"run.steps={steps}")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 130, output[-2000:]
    assert "the same command resumes" in output
    assert psutil.wait_procs(family, timeout=90)[1] == []
    done = bench.rows("interrupted")[-1]["step"]
    bench.run("run", str(bench.config), "run.name=interrupted", f"run.steps={steps}")
    rows = bench.rows("interrupted")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert rows[-1]["incarnation"] == 2
    assert done < steps
    trained = [group for _, group, _ in leased(bench, "interrupted")]
    assert trained == sorted(set(trained))
    assert len(trained) == steps * GROUPS


def start_and_wait_for_a_step(bench, name, *overrides, timeout_s=400.0):
    process = bench.start("run", str(bench.config), f"run.name={name}", "run.steps=10000", *overrides)

    def stepped():
        assert process.poll() is None, process.communicate()[0][-4000:]
        return bool(bench.rows(name))

    wait_until(stepped, f"a step of {name}", timeout_s)
    return process
