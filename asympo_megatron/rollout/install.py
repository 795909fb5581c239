"""One version into one engine: pause, load, verify, continue; and a look at the engine now and then meanwhile."""

import asyncio
from dataclasses import dataclass

from asympo_megatron.errors import EngineError
from asympo_megatron.protocol import COLOCATED
from asympo_megatron.rollout.collective import Collective
from asympo_megatron.rollout.colocated import Colocated
from asympo_megatron.rollout.fleet import Engine
from asympo_megatron.rollout.mirrored import Mirrored
from asympo_megatron.rollout.rows import VersionRow


@dataclass(frozen=True)
class SyncOptions:
    """How weights reach engines, and when an engine counts as dead.

    Args:
        run_prefix: prefix of this run's request ids.
        pause_mode: in_place | retract | abort.
        timeout_s: deadline of one engine's sync.
        start_timeout_s: deadline of readiness.
        silence_s: an engine that is silent for this long is taken out, also while it loads. It is asked for its weight
            version after every quarter of this, once, and has the other three quarters to answer. One that has
            requests and gave no good answer for a quarter is asked for a token, and has half of this to sample it.
        collective, colocated: how weights that lie with the trainer reach an engine.
        mirrored: how weights published as changes do; None: published versions are whole.
        local_only: engines of other machines are refused.
        backoff_s: pause after the first failure; doubles.
    """

    run_prefix: str
    pause_mode: str
    timeout_s: float
    start_timeout_s: float
    silence_s: float
    collective: Collective
    colocated: Colocated
    mirrored: Mirrored | None = None
    local_only: bool = False
    backoff_s: float = 0.5


async def install(engine: Engine, row: VersionRow, options: SyncOptions, *, fresh: bool) -> None:
    """Load a version; the engine serves it when this returns.

    A load may take minutes, so that its deadline says nothing about an engine that was stopped: it is asked for its
    weight version meanwhile, which a live one answers at once.

    Args:
        engine: may have requests.
        row: what to load.
        options: pause mode and deadlines.
        fresh: its requests and cache are of unknown origin: it is emptied first.

    Raises:
        EngineError: the engine refused, failed, or was silent.
        SenderLost: the trainer went while it sent.
    """
    load = asyncio.create_task(_load(engine, row, options, fresh=fresh))
    try:
        while not (await asyncio.wait({load}, timeout=options.silence_s / 4))[0]:
            await engine.client.weight_label(timeout_s=options.silence_s * 3 / 4)
        await load
    finally:
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)


async def _load(engine: Engine, row: VersionRow, options: SyncOptions, *, fresh: bool) -> None:
    """When weights go back to an earlier step, running requests are ended, too: those that may go on under the lag
    rule do so at once, the others when the weights have caught up.
    """
    client = engine.client
    goes_back = engine.weights is not None and row.step < engine.weights.step
    if fresh or goes_back:
        await client.abort(options.run_prefix)
    # A real server ignores an abort by a mere prefix (no request has that very id): the pause must end them.
    mode = "abort" if fresh or goes_back else options.pause_mode
    label, flush_cache = engine.label(row), mode != "in_place"
    way = _way(row, options)
    if way is not None:
        transfer = await way.open(client, row)  # before the pause: it takes time
        try:
            await client.pause(mode)
            await transfer.run(label, flush_cache=flush_cache)
            await _go_on(engine, row, options)
        finally:
            await transfer.close()
    else:
        await client.pause(mode)
        await client.update_weights(row.path, label, flush_cache=flush_cache, timeout_s=options.timeout_s)
        await _go_on(engine, row, options)


def _way(row: VersionRow, options: SyncOptions) -> Collective | Colocated | Mirrored | None:
    """What brings a version to an engine; None: the engine reads what was published."""
    if not row.in_memory:
        return options.mirrored
    return options.colocated if row.path.startswith(COLOCATED) else options.collective


async def _go_on(engine: Engine, row: VersionRow, options: SyncOptions) -> None:
    """After an update: verify, continue."""
    check_label(engine, row, await engine.client.weight_label(attempts=3))
    await engine.client.resume()
    if engine.quarantines:  # no requests for one that would hang again
        await engine.client.check_generates(options.silence_s / 2)


def check_label(engine: Engine, row: VersionRow, label: str) -> None:
    """Raises EngineError unless ``label``, which the engine reports, is that of ``row``."""
    if label != engine.label(row):
        raise EngineError(
            f"engine {engine.url} reports weight version {label!r}, expected {engine.label(row)}: it restarted, or "
            "someone else changed its weights"
        )
