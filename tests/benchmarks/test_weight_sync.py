"""benchmarks/weight_sync.py on a small model: what it calls equal arrived, what it calls slow or large falls short."""

import json
from dataclasses import replace

import harness
import pytest
import torch
import weight_peers
import weight_sync
from weight_sync import MEBIBYTE, QUICK

from asympo_megatron.testing.engine_server import engine_server

SMALL = replace(QUICK, layers=2, hidden=256, vocab=8_000, bucket_bytes=4 * MEBIBYTE)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("weights")
    weight_sync.make_config(SMALL, root / "model")
    with engine_server(weight_sync.options(root, seed=1)) as url:
        yield root, url


@pytest.fixture
def weights(world):
    served = weight_sync.load_model(weight_sync.options(world[0], seed=0))
    return {name: tensor.clone() for name, tensor in served.module.named_parameters()}


def lines_of(capsys):
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


def test_the_goal_of_speed_can_be_missed(capsys):
    report = harness.Report("trial")
    for name, ours_s in (("trial/fast", 1.24), ("trial/slow", 1.26)):
        weight_sync.judge_speed(
            report, name, harness.Pairs((ours_s,) * 20, (1.0,) * 20), MEBIBYTE, goal=weight_sync.GOAL
        )
    assert report.finish() == 1
    lines = lines_of(capsys)
    assert [lines[name]["ok"] for name in ("trial/fast", "trial/slow")] == [True, False]
    assert lines["trial/slow/ours"]["value"] == pytest.approx(1 / 1.26, rel=1e-4)


def once(ours, theirs, *, clock):
    """In place of harness.measure_pairs: each side runs, the clock does not matter."""
    ours()
    theirs()
    return harness.Pairs((1.0,) * 20, (1.0,) * 20)


def test_what_arrives_is_compared(world, weights, capsys, monkeypatch):
    """Every transport brings the weights; a benchmark of one that does not is an error, not a figure."""
    root, url = world
    monkeypatch.setattr(harness, "measure_pairs", once)
    report = harness.Report("trial")
    served = weight_sync.load_model(weight_sync.options(root, seed=5))
    weight_sync.by_disk(report, served, weights, root)
    weight_sync.by_collective(report, weights, SMALL, url, loads=True)
    weight_sync.by_sharing(report, weights, SMALL, url)
    names = set(lines_of(capsys))
    assert {f"weight_sync/{way}/ours" for way in ("disk", "collective/with_load", "colocated")} <= names
    held = {name: -tensor for name, tensor in weights.items()}
    changed = held | {"model.norm.weight": held["model.norm.weight"] + 1}
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight did not arrive"):
        weight_peers.expect_arrived(changed, url)
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight did not arrive"):
        weight_peers.expect_equal(held, changed)


@pytest.mark.parametrize("way", weight_sync.TRANSPORTS)
def test_a_transport_that_holds_a_whole_version_is_noticed(world, weights, way):
    root, _ = world
    transport = weight_sync.make_transport(way, SMALL, root / f"held_{way}", root)
    hoard = []

    def gathered(keep):
        """Eight times the model, one tensor after the other; a mutant keeps them all."""
        for copy in range(8):
            for name, tensor in weights.items():
                given = tensor.clone()
                if keep:
                    hoard.append(given)
                yield f"{copy}.{name}", given
                del given

    try:
        whole = 8 * weight_sync.total_bytes(weights)
        assert harness.peak_above(lambda: transport.store(1, 1, gathered(False), "checksum")) < whole / 2
        assert harness.peak_above(lambda: transport.store(2, 2, gathered(True), "checksum")) > 0.9 * whole
    finally:
        transport.close()


def test_memory_is_that_of_the_call_at_its_worst_moment():
    def call():
        block = torch.zeros(64 * MEBIBYTE, dtype=torch.uint8)
        for value in range(20):  # the watcher looks every millisecond
            block.fill_(value)
        del block

    before = torch.zeros(64 * MEBIBYTE, dtype=torch.uint8).fill_(1)
    assert 60 * MEBIBYTE < harness.peak_above(call) < 72 * MEBIBYTE
    del before
