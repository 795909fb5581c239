"""What the same run is started with later: refused without a trace, or accepted and told."""

import pytest
from command_bench import STEPS

from asympo_megatron.cli.main import EXIT_BAD_INPUT, EXIT_FAILED
from asympo_megatron.config import RunDir, load_config


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_changed_configuration_is_told_and_a_refused_one_leaves_no_trace(bench, command):
    run_dir = RunDir(bench.path / "runs" / command)
    start = [command, str(bench.config), f"run.name={command}"]
    bench.run(*start, "run.steps=2")
    before = run_dir.config.read_bytes()
    assert "run.name to a new" in bench.run(*start, "run.seed=5", code=EXIT_FAILED)
    bench.run(*start, "objective.name=asypmo", code=EXIT_BAD_INPUT)
    assert run_dir.config.read_bytes() == before

    said = bench.run(*start, "optimizer.lr=0.5")
    assert "configuration of run changed: optimizer.lr 0.001 -> 0.5" in said or command == "train"
    log = said if command == "train" else (run_dir.logs / "trainer.log").read_text()
    assert "the configuration changed: from step 2 on optimizer.lr 0.001 -> 0.5" in log
    assert load_config(run_dir.config).optimizer.lr == 0.5
    assert [row["step"] for row in bench.rows(command)] == list(range(1, STEPS + 1))

    bench.run(*start, "optimizer.lr=0.5", "objective.name=spo")
    page = (bench.path / bench.run("report", str(run_dir.path)).strip()).read_text()
    changed = f"run.steps 2 -&gt; {STEPS}, optimizer.lr 0.001 -&gt; 0.5"
    assert f"from step 2 on {changed}. This page names the last one." in page
    assert "ASymPO on" in page, "steps that are done keep the name of what trained them"
