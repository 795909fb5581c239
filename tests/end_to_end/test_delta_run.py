"""`asympo run` with versions published as changes: a mirror beside two embedded engines, and a resume."""

import sqlite3

import pytest
import yaml
from command_bench import Bench
from safetensors.torch import load_file

from asympo_megatron import protocol
from asympo_megatron.config import RunDir
from asympo_megatron.sync import list_versions, read_manifest, version_path
from asympo_megatron.sync.mirror import Mirror
from asympo_megatron.sync.own_folder import OwnFolder


@pytest.fixture(scope="module")
def bench(sampling_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("deltas")
    config = path / "deltas.yaml"
    sync = {"deltas": 3, "keep_last": 100, "spool_dir": str(path / "spool")}
    run = {**sampling_config["run"], "name": "deltas"}
    config.write_text(yaml.safe_dump({**sampling_config, "run": run, "sync": sync}))
    bench = Bench(path, config)
    yield bench
    bench.stop()


@pytest.mark.slow
def test_run_and_resume_on_deltas(bench):
    bench.run("run", str(bench.config))
    bench.run("run", str(bench.config), "run.steps=5")
    run_dir = RunDir(bench.path / "runs" / "deltas")
    assert [row["step"] for row in bench.rows("deltas")] == [1, 2, 3, 4, 5]
    with sqlite3.connect(run_dir.journal) as journal:
        versions = journal.execute("SELECT version, incarnation FROM versions ORDER BY version").fetchall()
        evaluated = [step for (step,) in journal.execute("SELECT DISTINCT step FROM evaluations ORDER BY step")]
    assert evaluated == [0, 1, 2, 3, 4, 5]
    assert list_versions(run_dir.weights) == [version for version, _ in versions]
    # each trainer begins with a whole version and goes on with changes of the one before
    previous = None
    for version, incarnation in versions:
        base = read_manifest(version_path(run_dir.weights, version)).base
        assert base == (version - 1 if previous == incarnation else None)
        previous = incarnation
    assert not list((bench.path / "spool").iterdir()), "trainer and mirror remove their copies"

    # what the changes make is what the trainer saved last, tensor by tensor
    bench.run("convert", "megatron-to-hf", "runs/deltas", "saved")
    mirror = Mirror(run_dir.weights, OwnFolder(bench.path, "check"), "127.0.0.1", 0, None, lease_s=1.0)
    try:
        copy = mirror.bring(protocol.BringVersionRequest("t", versions[-1][0])).path
        made = load_file(f"{copy}/model.safetensors")
    finally:
        mirror.close()
    saved = load_file(bench.path / "saved" / "model.safetensors")
    assert made.keys() == saved.keys()
    assert all(made[name].equal(saved[name]) for name in saved)

    # a last version that is a delta does not hold up a run that goes on without
    assert read_manifest(version_path(run_dir.weights, versions[-1][0])).base is not None
    bench.run("run", str(bench.config), "run.steps=6", "sync.deltas=0")
    assert [row["step"] for row in bench.rows("deltas")] == [1, 2, 3, 4, 5, 6]
