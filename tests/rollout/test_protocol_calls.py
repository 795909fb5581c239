"""The protocol over HTTP: incarnations, leases that re-open, refusals, authorisation."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from rollout_world import World, run_async, small_config, world

from asympo_megatron import protocol
from asympo_megatron.errors import ConfigError, ControllerError, JournalError, StaleIncarnationError
from asympo_megatron.rollout.api import build_app


async def train(w: World, steps: range) -> dict[int, protocol.LeaseReply]:
    """Lease every step and publish the weights it leads to."""
    replies = {}
    for step in steps:
        replies[step] = await w.trainer.lease(step)
        assert replies[step].ready
        await w.trainer.publish(step + 1)
    return replies


def test_lease_is_idempotent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            first, second, third = await asyncio.gather(*(w.trainer.lease(0) for _ in range(3)))
            assert first.responses == second.responses == third.responses
            assert len(first.responses) == 4
            assert [(row.group_id, row.row) for row in first.responses] == [(0, 0), (0, 1), (1, 0), (1, 1)]
            assert [row.advantage for row in first.responses] == [-0.5, 0.5] * 2
            assert first.metrics["reward/mean"] == 0.5
            assert first.metrics["lag/over_bound"] == 0
            assert 2 <= first.metrics["reward/junk"] <= w.scorer.calls, "of the scorer, when the reply was written"

    run_async(scenario())


def test_lease_waits_for_weights_and_answers_in_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.trainer.attach()
            reply = await w.trainer.lease(0, wait_s=0.05)
            assert not reply.ready
            assert reply.responses == []
            assert reply.metrics["rollout/in_flight"] == 0
            waiting = asyncio.create_task(w.trainer.lease(0))
            await w.trainer.publish(0)
            assert (await waiting).ready

    run_async(scenario())


def test_resumed_trainer_gets_the_same_groups(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            before = await train(w, range(4))
            tokens = {step: await w.trainer.payload(reply) for step, reply in before.items()}
            await w.trainer.commit(2, 2)
            old = w.trainer.incarnation
            assert await w.trainer.attach(2) == old + 1
            await w.trainer.publish(2)
            for step in (2, 3):
                again = await w.trainer.lease(step)
                assert again.responses == before[step].responses, "groups, order, advantages and lags"
                assert await w.trainer.payload(again) == tokens[step]
                await w.trainer.publish(step + 1)
            new = (await w.trainer.lease(4)).responses
            known = {row.group_id for reply in before.values() for row in reply.responses}
            assert not known & {row.group_id for row in new}
            assert max(row.lag for row in new) <= w.config.rollout.max_lag_steps

    run_async(scenario())


def test_older_incarnations_are_refused_on_every_call(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            old = await w.trainer.attach()
            await w.trainer.publish(0)
            for step in (0, 1):  # weights 0 and max_lag_steps 1 allow two batches
                assert (await w.trainer.lease(step)).ready
            stuck = asyncio.create_task(w.trainer.lease(2))
            await w.trainer.attach(0)
            with pytest.raises(StaleIncarnationError, match="incarnation 2 has attached since"):
                await stuck
            calls = [
                ("/lease", protocol.LeaseRequest(old, 0, 0.0)),
                ("/payload", protocol.PayloadRequest(old, 0, [(0, 0)])),
                ("/version", protocol.VersionRequest(old, 1, "x")),
                ("/publish", protocol.PublishRequest(old, 1, 1, "x", "/weights/1")),
                ("/commit", protocol.CommitRequest(old, 1, 0)),
                ("/finish", protocol.FinishRequest(old, 6, 0.0)),
            ]
            for path, request in calls:
                with pytest.raises(StaleIncarnationError, match="Stop this one") as refused:
                    await w.trainer.call(path, request, dict)
                assert refused.value.__notes__ == ["HTTP 409"], path
            with pytest.raises(ControllerError, match="incarnation 9 never attached"):
                await w.trainer.call("/commit", protocol.CommitRequest(9, 1, 0), dict)
            assert w.controller.parts.journal.committed_step == 0

    run_async(scenario())


def test_refusals_name_the_remedy(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attach = protocol.AttachRequest("world", "other-hash", 0)
            with pytest.raises(ControllerError, match=r"data configuration is 'other-hash'.*same config file"):
                await w.trainer.call("/attach", attach, protocol.AttachReply)
            with pytest.raises(ControllerError, match="run is 'walk', this controller's is 'world'"):
                await w.trainer.call("/attach", protocol.AttachRequest("walk", "x", 0), protocol.AttachReply)
            attach = protocol.AttachRequest("world", w.controller.parts.data_hash, 0, protocol=99)
            with pytest.raises(ControllerError, match="speaks protocol 99"):
                await w.trainer.call("/attach", attach, protocol.AttachReply)
            with pytest.raises(JournalError, match="resumes at step 3"):
                await w.trainer.attach(3)
            await w.trainer.attach(0)
            await w.trainer.publish(0)
            for step, why in ((6, "run.steps is 6"), (2, "the next step is 0")):
                with pytest.raises(ControllerError, match=why):
                    await w.trainer.lease(step)
            reply = await w.trainer.lease(0)
            for rows, why in (([(99, 0)], "group 99 is not part"), ([(0, 7)], "group 0 has no response 7")):
                with pytest.raises(ControllerError, match=why):
                    await w.trainer.call(
                        "/payload", protocol.PayloadRequest(1, reply.step, rows), protocol.PayloadReply
                    )
            with pytest.raises(ControllerError, match="commit of step 5, but step 1 was not leased"):
                await w.trainer.commit(5)
            async with w.client.post("/lease", data=b"\x81junk") as answer:
                assert answer.status == 400
                error = msgspec.msgpack.decode(await answer.read(), type=protocol.ErrorReply)
                assert error.kind == "ControllerError"
                assert "body is not a LeaseRequest" in error.message

    run_async(scenario())


def test_versions_are_used_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await w.trainer.attach()
            assert await w.trainer.publish(0) == 0
            same = await w.trainer.call("/version", protocol.VersionRequest(1, 0, "weights-0"), protocol.VersionReply)
            assert same == protocol.VersionReply(0, False), "the engines hold exactly these"
            same = await w.trainer.call("/version", protocol.VersionRequest(1, 1, "weights-0"), protocol.VersionReply)
            assert same.needed, "a later step is announced even when its weights are equal: admission counts steps"
            repeated = protocol.PublishRequest(1, 0, 0, "weights-0", w.trainer.path(0))
            assert (await w.trainer.call("/publish", repeated, protocol.PublishReply)).in_use == [0]
            for number, why in ((0, "a version is never used twice"), (7, "version 7 was never given out")):
                request = protocol.PublishRequest(1, 1, number, "other", "/weights/x")
                with pytest.raises(ControllerError, match=why):
                    await w.trainer.call("/publish", request, protocol.PublishReply)

    run_async(scenario())


def test_bearer_token(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, app=lambda controller: build_app(controller, "secret", lambda: None)) as w:
            with pytest.raises(ControllerError, match="bearer token: set rollout") as refused:
                await w.trainer.attach()
            assert refused.value.__notes__ == ["HTTP 401"]
            w.trainer._headers["Authorization"] = "Bearer secret"
            assert await w.trainer.attach() == 1
            assert (await w.client.get("/status")).status == 401
            assert (await w.client.get("/healthz")).status == 200

    run_async(scenario())


@pytest.mark.parametrize("token", ["", "  "])
def test_empty_token_is_refused_not_taken_for_none(tmp_path: Path, token: str) -> None:
    async def built() -> None:
        async with world(tmp_path, small_config(rollout__controller_token=token)):
            pass

    async def served() -> None:
        async with world(tmp_path, app=lambda controller: build_app(controller, "", lambda: None)) as w:
            assert (await w.client.get("/status")).status == 401

    with pytest.raises(ConfigError, match=r"rollout\.controller_token is empty: set a token, or null"):
        run_async(built())
    assert not list(tmp_path.iterdir())
    run_async(served())


def test_status_and_join(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, small_config(rollout__max_lag_steps=0)) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            await w.trainer.lease(0)
            status = await (await w.client.get("/status")).json()
            assert (status["run"], status["step"], status["incarnation"], status["weights_step"]) == ("world", 1, 1, 0)
            assert [engine["state"] for engine in status["engines"]] == ["serving"]
            async with w.client.post("/engines", json={"url": "ftp://x"}) as answer:
                assert answer.status == 400
                assert "not of the form http://HOST:PORT" in (await answer.json())["error"]

    run_async(scenario())


def test_failure_in_the_background_is_told(tmp_path: Path) -> None:
    """A crash of a task never hangs the trainer: the waiting lease and every later call answer 500."""

    async def scenario() -> None:
        told: list[bool] = []

        async with world(tmp_path, app=lambda c: build_app(c, None, lambda: told.append(True))) as w:
            w.task.train_prompt = lambda _: 1 / 0  # type: ignore[method-assign]
            await w.trainer.attach()
            waiting = asyncio.create_task(w.trainer.lease(0))
            await w.trainer.publish(0)
            with pytest.raises(ControllerError, match="the controller failed: division by zero") as refused:
                await waiting
            assert refused.value.__notes__ == ["HTTP 500"]
            with pytest.raises(ControllerError, match="the controller failed"):
                await w.trainer.commit(0)
            assert told
            assert (await w.client.get("/healthz")).status == 500
            assert isinstance(w.controller.failure, ZeroDivisionError)

    run_async(scenario())
