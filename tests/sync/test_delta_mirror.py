"""Versions published as changes, made whole again on an engine's host: chains, damage, deaths, clean-up."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from delta_world import (
    DeltaWorld,
    delta_bytes,
    delta_world,
    edited,
    make_mirror,
    make_transport,
    same_bits,
    some_weights,
)

from asympo_megatron import protocol
from asympo_megatron.errors import PublishError
from asympo_megatron.sync import delta, list_versions, read_manifest, verify_version, version_path
from asympo_megatron.sync.own_folder import OwnFolder

NAN = float("nan")


@pytest.fixture
def world(tmp_path: Path):
    with delta_world(tmp_path) as made:
        yield made


def publish_some(world: DeltaWorld, count: int, keep: bool = True) -> list[dict[str, torch.Tensor]]:
    """Versions 1 to ``count``, each a few elements from the one before."""
    versions = [some_weights()]
    world.publish(1, versions[0])
    for version in range(2, count + 1):
        changes = {version: NAN, 11_000: -0.0, 11_999: float(version)}
        versions.append(edited(versions[-1], embed=changes, far={version * 20_000: 1.0}))
        world.publish(version, versions[-1])
        if keep:
            world.transport.keep([])
    return versions


def copies(world: DeltaWorld) -> list[int]:
    return list_versions(world.mirror._folder.path)


def test_deltas_are_small_and_every_version_comes_out_bit_for_bit(world: DeltaWorld) -> None:
    versions = publish_some(world, 6, keep=False)
    bases = [read_manifest(version_path(world.root, version)).base for version in range(1, 7)]
    assert bases == [None, 1, 2, 3, None, 5]
    assert all(delta_bytes(world.root, version) < 2000 for version in (2, 3, 4, 6))
    for version in (4, 1, 6, 2, 5, 3):  # joiners, catch-up over several, and back
        copy = world.bring(version)
        assert same_bits(copy, versions[version - 1])
        manifest = verify_version(copy)
        assert (manifest.version, manifest.step, manifest.base) == (version, 10 * version, None)
        assert (copy / "config.json").read_text() == '{"model_type": "qwen3"}'


def test_a_copy_is_the_start_of_the_next_one(world: DeltaWorld) -> None:
    """The whole version is read once: its file may be gone, and only the delta travels."""
    versions = publish_some(world, 3, keep=False)
    world.bring(2)
    (version_path(world.root, 1) / "model.safetensors").unlink()
    assert same_bits(world.bring(3), versions[2])


def test_what_kept_versions_are_made_from_is_kept(tmp_path: Path) -> None:
    with delta_world(tmp_path, deltas=3, keep_last=1) as world:
        versions = publish_some(world, 4)
        assert list_versions(world.root) == [1, 2, 3, 4]
        world.publish(5, versions[-1])
        world.transport.keep([3])
        assert list_versions(world.root) == [1, 2, 3, 5], "version 3, in use, needs two others; version 4 goes"
        (version_path(world.root, 2) / "manifest.json").write_text("{")
        world.transport.keep([3])
        assert list_versions(world.root) == [2, 3, 5], "a damaged manifest tells of no base, and ends nothing"
        world.transport.keep([])
        assert list_versions(world.root) == [5]
        assert same_bits(world.bring(5), versions[-1])


def test_a_resumed_trainer_publishes_a_whole_version_first(tmp_path: Path) -> None:
    with delta_world(tmp_path, deltas=9) as world:
        versions = publish_some(world, 3)
        world.transport.close()
        world.transport = make_transport(tmp_path, 9)
        back = edited(versions[0], embed={7: 7.0})
        world.publish(4, back)
        world.publish(5, versions[1])
        assert [read_manifest(version_path(world.root, version)).base for version in (4, 5)] == [None, 4]
        assert same_bits(world.bring(5), versions[1])


def test_other_tensors_other_files(world: DeltaWorld) -> None:
    """A version of another layout is stored whole, though it names a base; an unchanged one holds nothing."""
    weights = some_weights()
    grown = weights | {"more": torch.ones(3)}
    last = edited(grown, embed={9: 9.0})
    world.publish(1, weights)
    world.publish(2, edited(weights, embed={7: 7.0}))
    world.publish(3, grown)
    world.publish(4, last)
    files = [set(read_manifest(version_path(world.root, version)).files) for version in (2, 3, 4)]
    assert files == [{"model.safetensors.delta"}, {"model.safetensors"}, {"model.safetensors.delta"}]
    assert same_bits(world.bring(4), last), "what came before the whole file does not count"
    world.publish(5, last)  # whole again
    world.publish(6, last)
    assert read_manifest(version_path(world.root, 6)).files == {}
    assert same_bits(world.bring(6), last)


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_damaged_delta_is_refused_by_name_and_the_next_whole_version_helps(world: DeltaWorld, how: str) -> None:
    versions = publish_some(world, 3, keep=False)
    held = world.bring(1)
    file = version_path(world.root, 2) / "model.safetensors.delta"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data)) if how == "damaged" else file.unlink()
    reason = "has sha256" if how == "damaged" else "is missing, though"
    with pytest.raises(PublishError, match=rf"v000002/model.safetensors.delta {reason}"):
        world.bring(3)
    assert same_bits(held, versions[0])
    world.publish(4, versions[2])
    world.publish(5, versions[1])
    assert same_bits(world.bring(5), versions[1])


def test_a_damaged_copy_is_made_again_from_what_was_published(world: DeltaWorld) -> None:
    versions = publish_some(world, 3, keep=False)
    file = world.bring(2) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert same_bits(world.bring(3), versions[2])


def test_a_full_disk_costs_no_good_copy(world: DeltaWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = publish_some(world, 3, keep=False)
    held = world.bring(2)

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(delta, "apply_changes", full)
        with pytest.raises(PublishError, match=r"version 3 could not be made from .*No space left on device"):
            world.bring(3)
    assert same_bits(held, versions[1])
    assert copies(world) == [2]
    assert same_bits(world.bring(3), versions[2])


def test_a_damaged_whole_version_is_refused(world: DeltaWorld) -> None:
    publish_some(world, 2)
    file = version_path(world.root, 1) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(PublishError, match=r"of version 2, made from .*v000001 and 1 deltas, has sha256"):
        world.bring(2)
    assert copies(world) == []
    assert not list(world.mirror._folder.path.iterdir()), "nothing partial"


def test_an_unpublished_version_is_refused(world: DeltaWorld) -> None:
    with pytest.raises(PublishError, match="v000009 has no readable manifest"):
        world.bring(9)


def test_a_copy_of_an_earlier_run_of_the_same_name_is_not_taken_for_this_one(tmp_path: Path) -> None:
    with delta_world(tmp_path) as world:
        versions = publish_some(world, 2)
        assert same_bits(world.bring(2), versions[1])
        world.root.rename(tmp_path / "removed")
        world.transport.close()
        world.transport = make_transport(tmp_path, 3)
        world.publish(2, versions[0])
        assert same_bits(world.bring(2), versions[0])


def test_a_copy_stays_while_an_engine_loads_it(world: DeltaWorld) -> None:
    publish_some(world, 4, keep=False)
    world.bring(1, "slow")
    world.bring(2, "gone")
    world.bring(2, "fast")
    world.release("fast")
    world.release("fast")
    world.bring(3, "fast")
    assert copies(world) == [1, 2, 3]
    world.release("slow")
    world.release("gone")
    world.bring(4, "last")
    assert copies(world) == [3, 4]


def test_a_lease_that_nobody_ends_is_over_one_day(tmp_path: Path) -> None:
    """The controller died: what it asked for must not fill the disk."""
    with delta_world(tmp_path) as world:
        publish_some(world, 2)
        world.mirror.close()
        world.mirror = make_mirror(tmp_path, lease_s=0.0)
        world.bring(1)
        world.bring(2, "next")
        assert copies(world) == [2]


def test_two_engines_of_a_host_share_one_copy(world: DeltaWorld) -> None:
    versions = publish_some(world, 3)
    found: list[Path] = []
    engines = [threading.Thread(target=lambda name=f"e{n}": found.append(world.bring(3, name))) for n in range(4)]
    for engine in engines:
        engine.start()
    for engine in engines:
        engine.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert same_bits(found[0], versions[2])


KILLED = """
import os, signal, sys
from pathlib import Path
from asympo_megatron import protocol
from asympo_megatron.sync import delta
sys.path.insert(0, sys.argv[2])
from delta_world import make_mirror

real = delta.apply_changes
def dies(base, changes, target):
    real(base, changes, target)
    print(target, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
delta.apply_changes = dies
make_mirror(Path(sys.argv[1])).bring(protocol.BringVersionRequest("t", 3))
"""


def test_a_mirror_killed_in_mid_work_leaves_nothing_that_counts(world: DeltaWorld) -> None:
    """Another one of the same run, still at work on the same host, keeps its copies."""
    versions = publish_some(world, 3)
    held = world.bring(2)
    command = [sys.executable, "-c", KILLED, str(world.path), str(Path(__file__).parent)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = Path(killed.stdout.strip())
    assert left.is_file()
    second = make_mirror(world.path)
    try:
        assert not left.exists()
        assert held.is_dir()
        assert same_bits(Path(second.bring(protocol.BringVersionRequest("t", 3)).path), versions[2])
    finally:
        second.close()


def test_directories_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    living, other = OwnFolder(tmp_path, "role"), OwnFolder(tmp_path, "role-2")
    dead = OwnFolder(tmp_path, "role")
    os.close(dead._lock)  # as the kernel does
    (dead.path / "file").write_text("x")
    new = OwnFolder(tmp_path, "role")
    assert {living.path, other.path, new.path} == set(tmp_path.iterdir())
    assert new.path.stat().st_mode & 0o777 == 0o700
    for folder in (living, other, new):
        folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match=r"no directory for weights could be made in .*file: .*Set sync.spool_dir"):
        OwnFolder(tmp_path / "file", "role")


def test_a_version_number_is_not_used_twice(tmp_path: Path) -> None:
    with delta_world(tmp_path) as world:
        versions = publish_some(world, 2)
        world.transport.close()
        world.transport = make_transport(tmp_path, 3)
        world.publish(2, versions[1])  # the same weights again: kept as they are
        assert read_manifest(version_path(world.root, 2)).base == 1
        world.transport.close()
        world.transport = make_transport(tmp_path, 3)
        with pytest.raises(PublishError, match="v000002 already holds other weights, of step 20"):
            world.publish(2, versions[0])
