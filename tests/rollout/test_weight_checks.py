"""What is checked before an engine serves a version: the published files, and the label that the engine reports."""

import asyncio
import shutil
import threading
from pathlib import Path

import msgspec
import pytest
from rollout_world import VOCAB, installed, run_async, small_config, updates, world

from asympo_megatron import protocol
from asympo_megatron.errors import ControllerError, PublishError
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.sync import Manifest
from asympo_megatron.sync.manifest import MANIFEST_NAME
from asympo_megatron.testing.fake_engine import FakeEngine


def test_label_is_verified(tmp_path: Path) -> None:
    """An engine that says it loaded but reports another version does not serve."""

    async def scenario() -> None:
        engine = FakeEngine(VOCAB)

        async def forgetful(request):  # type: ignore[no-untyped-def]
            from aiohttp import web

            return web.json_response({"success": True})

        engine._update = forgetful  # type: ignore[method-assign]
        config = small_config(rollout__engine_timeout_s=1.0)
        async with world(tmp_path, config, engines=[engine]) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            with pytest.raises(ControllerError, match="reports weight version 'default', expected 0") as dead:
                await w.trainer.lease(0)
            assert "no engine is left" in str(dead.value)
            assert engine.requests == []

    run_async(scenario())


def test_damaged_weights_end_the_run_with_the_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        def verify(row: VersionRow) -> None:
            raise PublishError(f"{row.path}/model.safetensors has another digest than its manifest says.")

        engine = FakeEngine(VOCAB)
        async with world(tmp_path, engines=[engine], verify=verify) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            with pytest.raises(ControllerError, match=r"/weights/0/model\.safetensors has another digest"):
                await w.trainer.lease(0)
            assert updates(engine) == [], "no engine was told to load it"

    run_async(scenario())


def test_version_is_in_use_while_its_files_are_verified(tmp_path: Path) -> None:
    """Verifying takes long, and two newer versions come meanwhile: the trainer must not delete what is being read."""

    async def scenario() -> None:
        begun, go_on = threading.Event(), threading.Event()

        def verify(row: VersionRow) -> None:
            if row.version == 1:
                begun.set()
                assert go_on.wait(120)

        async with world(tmp_path, verify=verify) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await w.until(lambda: installed(w, 0))
            await w.trainer.publish(1)
            assert await asyncio.to_thread(begun.wait, 120)
            await w.trainer.publish(2)
            publish = protocol.PublishRequest(w.trainer.incarnation, 2, 2, "weights-2", w.trainer.path(2))
            try:
                assert (await w.trainer.call("/publish", publish, protocol.PublishReply)).in_use == [1, 2]
            finally:
                go_on.set()
            await w.until(lambda: installed(w, 2))
            assert updates(w.engines[0]) == ["0", "2"]

    run_async(scenario())


def test_damaged_version_that_nobody_wants_any_more_is_passed_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        begun, go_on = threading.Event(), threading.Event()

        def verify(row: VersionRow) -> None:
            if row.version == 1:
                begun.set()
                assert go_on.wait(120)
                raise PublishError(f"{row.path} has no readable manifest.")

        async with world(tmp_path, verify=verify) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await w.until(lambda: installed(w, 0))
            await w.trainer.publish(1)
            assert await asyncio.to_thread(begun.wait, 120)
            await w.trainer.publish(2)
            go_on.set()
            await w.until(lambda: installed(w, 2) or w.controller.failure is not None)
            assert w.controller.failure is None
            assert updates(w.engines[0]) == ["0", "2"]

    run_async(scenario())


@pytest.mark.parametrize("harm", ["removed", "unreadable", "none"])
def test_version_whose_files_are_gone_is_published_again(tmp_path: Path, harm: str) -> None:
    """A scratch disk was cleaned between two sessions of a run: the trainer resumes with the weights of the journal."""

    async def scenario() -> None:
        async with world(tmp_path, engines=[FakeEngine(VOCAB)], verify=None) as w:
            await w.trainer.attach()
            assert await w.trainer.publish(0) == 0
            await w.until(lambda: installed(w, 0))
            directory = Path(w.trainer.path(0))
        if harm == "removed":
            shutil.rmtree(directory)
        elif harm == "unreadable":
            (directory / "manifest.json").write_text("{")
        async with world(tmp_path, engines=[FakeEngine(VOCAB)], verify=None) as w:
            await w.trainer.attach()
            wanted = 0 if harm == "none" else 1
            assert await w.trainer.publish(0) == wanted
            await w.until(lambda: installed(w, wanted))
            assert (await w.trainer.lease(0)).ready

    run_async(scenario())


def test_version_of_another_run_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, engines=[FakeEngine(VOCAB)], verify=None) as w:
            await w.trainer.attach()
            request = protocol.VersionRequest(w.trainer.incarnation, 0, "weights-0")
            assert (await w.trainer.call("/version", request, protocol.VersionReply)).version == 0
            path = Path(w.trainer.path(0))
            path.mkdir(parents=True)
            manifest = Manifest(0, 0, "weights-of-another-run", {})
            (path / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
            publish = protocol.PublishRequest(w.trainer.incarnation, 0, 0, "weights-0", str(path))
            await w.trainer.call("/publish", publish, protocol.PublishReply)
            with pytest.raises(ControllerError, match="with checksum weights-of-another-run, expected version 0"):
                await w.trainer.lease(0)
            assert updates(w.engines[0]) == []

    run_async(scenario())


def test_weights_that_appear_late_are_waited_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        tries = []

        def verify(row: VersionRow) -> None:
            tries.append(row.version)
            if len(tries) < 3:
                raise PublishError(f"{row.path} has no readable manifest.")

        async with world(tmp_path, verify=verify) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert (await w.trainer.lease(0)).ready
            assert tries == [0] * 3

    run_async(scenario())
