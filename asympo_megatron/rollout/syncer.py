"""The life of every engine: get ready, load the current weights, serve, load the next ones; after a failure, again.

One task per engine, so that engines sync at the same time and none waits for another.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, stop_after_delay, wait_exponential

from asympo_megatron.errors import ControllerError, EngineError, PublishError
from asympo_megatron.rollout.bell import Background, Bell
from asympo_megatron.rollout.client import EngineClient
from asympo_megatron.rollout.collective import SenderLost
from asympo_megatron.rollout.colocated import check_local
from asympo_megatron.rollout.fleet import Engine, EngineState, Fleet
from asympo_megatron.rollout.install import SyncOptions, check_label, install
from asympo_megatron.rollout.router import Router
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.rollout.targets import Targets

log = logging.getLogger(__name__)
_MAX_QUARANTINES = 5
"""In a row, without one good answer in between: then the engine is given up."""
_VERIFY_ATTEMPTS = 5
"""A network file system may show a renamed directory late."""


class Syncer:
    """Drives engines through their states.

    Args:
        fleet: the engines.
        targets: which version they should hold.
        options: deadlines and pause mode.
        verify: checks the files of a published version against their manifest; raises PublishError.
        connect: makes the client of an engine.
        bell: rung when anything changes.
        background: where the engines' tasks run.
        router: is told which engines serve; None: there is none.
    """

    def __init__(
        self,
        fleet: Fleet,
        targets: Targets,
        options: SyncOptions,
        verify: Callable[[VersionRow], object],
        connect: Callable[[str], EngineClient],
        bell: Bell,
        background: Background,
        router: Router | None = None,
    ) -> None:
        self._fleet, self._targets, self._options = fleet, targets, options
        self._verify, self._connect = verify, connect
        self._bell, self._background, self._router = bell, background, router
        self._verified: dict[int, asyncio.Task[None]] = {}
        self.last_sync_s = 0.0

    def join(self, url: str) -> Engine:
        """Take an engine in (again); it gets requests once it is ready and holds the current weights.

        Raises:
            ControllerError: it is on another machine, and weights are shared on this one.
        """
        url = url.rstrip("/")
        if self._options.local_only:
            check_local(url)
        known = self._fleet.engines.get(url)
        if known is not None and known.state is not EngineState.EVICTED:
            return known
        engine = Engine(url, self._connect(url))
        self._fleet.engines[url] = engine
        self._background.spawn(self._live(engine), f"engine {url}")
        self._bell.ring()
        return engine

    async def close(self) -> None:
        """Close every connection."""
        for engine in self._fleet.engines.values():
            await engine.client.close()
        if self._router is not None:
            await self._router.close()

    async def watch_fleet(self, no_engine_s: float) -> None:
        """Raises ControllerError when every engine has been given up, or none joined, for ``no_engine_s``."""

        def hopeless() -> bool:
            return all(engine.state is EngineState.EVICTED for engine in self._fleet.engines.values())

        while True:
            await self._bell.until(hopeless)
            if not await self._bell.until(lambda: not hopeless(), no_engine_s):
                known = "; ".join(f"{e.url}: {e.last_error}" for e in self._fleet.engines.values()) or "none was named"
                raise ControllerError(
                    f"no engine is left ({known}). Start engines, name them in rollout.engine_urls, start again."
                )

    async def _live(self, engine: Engine) -> None:
        while True:
            try:
                await self._get_ready(engine)
                await self._serve(engine)
            except EngineError as error:
                await self._quarantine(engine, error)
            if engine.state is EngineState.EVICTED:
                await engine.client.close()
                return

    async def _get_ready(self, engine: Engine) -> None:
        self._fleet.set_state(engine, EngineState.STARTING)
        engine.tag = secrets.token_hex(4)
        if self._router is not None:  # before it is told to go on with whatever weights it has
            await self._router.leave(engine.url)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(EngineError),
            stop=stop_after_delay(self._options.start_timeout_s),
            wait=wait_exponential(multiplier=0.05, max=2.0),
            reraise=True,
        )
        try:
            await retrying(engine.client.ready)
        except EngineError as error:
            self._evict(
                engine,
                f"engine {engine.url} did not get ready within {self._options.start_timeout_s:g} s "
                f"(rollout.engine_start_timeout_s); last: {error}",
            )

    async def _serve(self, engine: Engine) -> None:
        fresh = True
        while engine.state is not EngineState.EVICTED:
            await self._bell.until(lambda: self._targets.current is not None)
            target = self._targets.current
            assert target is not None
            if engine.weights == target:
                await self._watch(engine)
                continue
            engine.loading = target  # before its files are read: from now on the publisher keeps them
            try:
                if await self._files_good(target) and self._targets.current == target:
                    await self._sync(engine, target, fresh=fresh)
                    fresh = False
            except SenderLost as error:
                fresh = True
                await self._wait_for_sender(engine, target, error)
            finally:
                engine.loading = None

    async def _wait_for_sender(self, engine: Engine, target: VersionRow, error: SenderLost) -> None:
        """The trainer went while it sent. The engine may hold half of a version: it serves none until the next one."""
        log.warning("engine %s waits for weights: %s", engine.url, error)
        engine.weights, engine.last_error = None, str(error)
        self._fleet.set_state(engine, EngineState.SYNCING)
        if self._router is not None:
            await self._router.leave(engine.url)
        held = any(other.weights == target for other in self._fleet.engines.values())
        if not held and self._targets.lost(target):
            log.warning("no evaluation of step %d: its weights went with the trainer that had them", target.step)
        self._bell.ring()  # it was syncing before
        await self._bell.until(lambda: self._targets.current != target, self._options.backoff_s * 2)

    async def _watch(self, engine: Engine) -> None:
        """Return when other weights are wanted; raise when the engine failed."""
        serving = engine.weights
        changed = await self._bell.until(
            lambda: engine.failure is not None or engine.suspected or self._targets.current != serving,
            self._options.silence_s / 4,
        )
        suspected, engine.suspected = engine.suspected, False
        if engine.failure is not None:
            raise EngineError(str(engine.failure)) from engine.failure
        if (suspected or not changed) and serving is not None:
            check_label(engine, serving, await engine.client.weight_label(timeout_s=self._options.silence_s * 3 / 4))
        await self._check_generates(engine)

    async def _check_generates(self, engine: Engine) -> None:
        """A request may take long, an engine at work on requests may not be still: weights, labels and health checks
        are answered by a server whose scheduler hangs, too."""
        now_s, patience_s = asyncio.get_running_loop().time, self._options.silence_s / 4
        busy = self._fleet.in_flight if self._fleet.routed else engine.in_flight  # a router may have sent it anything
        if busy and now_s() - engine.quiet_since_s >= patience_s:
            await engine.client.check_generates(self._options.silence_s / 2)
            engine.quiet_since_s = now_s()

    async def _sync(self, engine: Engine, row: VersionRow, *, fresh: bool) -> None:
        started_s = time.monotonic()
        self._fleet.set_state(engine, EngineState.SYNCING)
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await install(engine, row, self._options, fresh=fresh)
        except TimeoutError as error:
            raise EngineError(
                f"engine {engine.url} did not load version {row.version} within {self._options.timeout_s:g} s "
                "(sync.timeout_s)"
            ) from error
        if engine.failure is not None:
            raise EngineError(str(engine.failure)) from engine.failure
        engine.weights = row
        self.last_sync_s = time.monotonic() - started_s
        self._fleet.set_state(engine, EngineState.SERVING)
        if self._router is not None:
            self._router.join(engine.url)

    async def _files_good(self, row: VersionRow) -> bool:
        """Verify a version once, before any engine reads it; False when it is bad, but no longer wanted.

        A bad version that is wanted is the publisher's fault, not the engine's: PublishError ends the run.
        """
        if row.in_memory:
            return True
        if row.version not in self._verified:
            self._verified = {version: task for version, task in self._verified.items() if not task.done()}
            self._verified[row.version] = asyncio.get_running_loop().create_task(self._verify_files(row))
        try:
            await asyncio.shield(self._verified[row.version])
        except PublishError as error:
            if self._targets.current == row:
                raise
            log.info("version %d is not loaded, a newer one is there: %s", row.version, error)
            self._verified.pop(row.version, None)
            return False
        return True

    async def _verify_files(self, row: VersionRow) -> None:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(PublishError),
            stop=stop_after_attempt(_VERIFY_ATTEMPTS),
            wait=wait_exponential(multiplier=self._options.backoff_s / 2, max=4.0),
            reraise=True,
        )
        await retrying(asyncio.to_thread, self._verify, row)

    async def _quarantine(self, engine: Engine, error: EngineError) -> None:
        """Trust nothing about the engine any more: drop its connections, so that its requests go elsewhere."""
        log.warning("engine %s is quarantined: %s", engine.url, error)
        engine.failure, engine.weights, engine.last_error = None, None, str(error)
        engine.strikes = 0
        engine.quarantines += 1
        self._fleet.set_state(engine, EngineState.QUARANTINED)
        old, engine.client = engine.client, self._connect(engine.url)
        await old.close()
        if self._router is not None:
            await self._router.leave(engine.url)
        if engine.quarantines >= _MAX_QUARANTINES:
            self._evict(engine, f"engine {engine.url} failed {engine.quarantines} times in a row; last: {error}")
            return
        await asyncio.sleep(self._options.backoff_s * 2 ** (engine.quarantines - 1))

    def _evict(self, engine: Engine, reason: str) -> None:
        log.error("%s; it gets no more requests. POST its url to /engines to take it in again.", reason)
        engine.last_error = reason
        self._fleet.set_state(engine, EngineState.EVICTED)
