"""`asympo run` with weights from the trainer's process to two embedded engines; resumed under new versions."""

import sqlite3

import pytest
import yaml
from command_bench import Bench

from asympo_megatron.config import RunDir


@pytest.fixture(scope="module")
def bench(sampling_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("collective")
    config = path / "collective.yaml"
    sync = {"bucket_bytes": 20_000}
    config.write_text(yaml.safe_dump({**sampling_config, "sync": sync}))
    bench = Bench(path, config)
    yield bench
    bench.stop()


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["collective", "colocated"])
def test_run_and_resume_without_a_weight_file(bench, transport):
    options = (f"run.name={transport}", f"sync.transport={transport}")
    bench.run("run", str(bench.config), *options)
    bench.run("run", str(bench.config), *options, "run.steps=5")
    run_dir = RunDir(bench.path / "runs" / transport)
    rows = bench.rows(transport)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert not run_dir.weights.exists()
    with sqlite3.connect(run_dir.journal) as journal:
        versions = journal.execute("SELECT version, step, incarnation, path FROM versions ORDER BY version").fetchall()
        evaluated = [step for (step,) in journal.execute("SELECT DISTINCT step FROM evaluations ORDER BY step")]
    assert all(path.startswith(f"{transport}://127.0.0.1:") for *_, path in versions)
    # the weights of step 3 went with the first trainer: the second one publishes them again
    assert [(step, incarnation) for _, step, incarnation, _ in versions if step == 3] == [(3, 1), (3, 2)]
    assert evaluated == [0, 1, 2, 3, 4, 5]
