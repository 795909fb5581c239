"""The controller: what a trainer may ask (protocol.py), on top of ledger, fleet, sampler and evaluator.

    admission ── prompts ──► requester ──► engines           rule: lag budget            (admission.py)
        ▲                        │ scored groups             weights: newest, or pinned  (targets.py, syncer.py)
        └── commit, drop     ledger + journal ◄── lease, attach, commit ── trainer

| who waits            | for                                    | woken by                              |
|----------------------|----------------------------------------|---------------------------------------|
| admission            | lag budget                             | new weights on the engines, a drop    |
| a request            | a slot on an engine, its lag budget    | an answer, a sync, new weights        |
| lease                | groups_per_step scored groups          | a scored group                        |
| weight sync          | the running evaluation                 | its last answer                       |
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from asympo_megatron import protocol
from asympo_megatron.errors import ControllerError, StaleIncarnationError
from asympo_megatron.rollout.evaluator import evaluation_due
from asympo_megatron.rollout.figures import Figures, status
from asympo_megatron.rollout.lease import batch_figures, manifest
from asympo_megatron.rollout.ledger import ScoredGroup
from asympo_megatron.rollout.parts import Parts
from asympo_megatron.rollout.rows import StoredGroup, VersionRow

log = logging.getLogger(__name__)
_LONGEST_WAIT_S = 60.0


class Controller:
    """Answers the calls of :mod:`asympo_megatron.protocol`; every one may be repeated after a lost connection."""

    def __init__(self, parts: Parts, engine_urls: list[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._parts, self._engine_urls = parts, engine_urls
        self._figures = Figures(parts, clock)

    @property
    def parts(self) -> Parts:
        """The inside, for tests and status."""
        return self._parts

    @property
    def failure(self) -> BaseException | None:
        """What ended the background work; None while all is well."""
        return self._parts.background.failure

    async def start(self) -> None:
        """Take up the work that the journal names."""
        parts, rollout = self._parts, self._parts.config.rollout
        for url in self._engine_urls:
            self.join_engine(url)
        parts.background.spawn(parts.feeder.run(), "admission")
        if parts.evaluator is not None:
            parts.background.spawn(parts.evaluator.run(), "evaluation")
        if parts.router is not None:
            parts.background.spawn(parts.router.run(), "router")
        if parts.syncer is not None:
            patience_s = rollout.engine_timeout_s if self._engine_urls else rollout.engine_start_timeout_s
            parts.background.spawn(parts.syncer.watch_fleet(patience_s), "fleet watch")

    async def stop(self) -> None:
        """End all background work and close the journal; nothing that is journalled is lost."""
        await self._parts.background.stop()
        if self._parts.syncer is not None:
            await self._parts.syncer.close()
        self._parts.journal.close()

    async def wait_failed(self) -> None:
        """Return when :attr:`failure` is set."""
        await self._parts.bell.until(lambda: self.failure is not None)

    def join_engine(self, url: str) -> None:
        """Take an engine into the fleet."""
        if self._parts.syncer is None:
            raise ControllerError("rollout.source=replay uses no engines. Set rollout.source=engines to let one join.")
        if not url.startswith(("http://", "https://")):
            raise ControllerError(f"engine url {url!r} is not of the form http://HOST:PORT.")
        self._parts.syncer.join(url)

    async def attach(self, request: protocol.AttachRequest) -> protocol.AttachReply:
        """A trainer takes over; every earlier one is refused from now on."""
        parts, run_id = self._parts, self._parts.config.run.name
        if request.protocol != protocol.PROTOCOL_VERSION:
            raise ControllerError(
                f"the trainer speaks protocol {request.protocol}, the controller {protocol.PROTOCOL_VERSION}: "
                "run the same release on both sides."
            )
        for what, got, expected in (
            ("run", request.run_id, run_id),
            ("data configuration", request.config_hash, parts.data_hash),
        ):
            if got != expected:
                raise ControllerError(
                    f"the trainer's {what} is {got!r}, this controller's is {expected!r}. Start both with the same "
                    "config file, or point rollout.controller_url at the right controller."
                )
        incarnation = parts.ledger.attach(request.resumed_step)
        parts.targets.forget_after(request.resumed_step, [engine.weights for engine in parts.fleet.engines.values()])
        log.info("trainer %d attached at step %d", incarnation, request.resumed_step)
        parts.bell.ring()
        return protocol.AttachReply(incarnation)

    async def lease(self, request: protocol.LeaseRequest) -> protocol.LeaseReply:
        """The batch of a step: formed once, the same ever after."""
        parts = self._parts
        self._check(request.incarnation)
        self._check_step(request.step)

        def settled() -> bool:
            stale = request.incarnation != parts.journal.incarnation
            return self.failure is not None or stale or self._leased(request.step) is not None

        await parts.bell.until(settled, min(request.wait_s, _LONGEST_WAIT_S))
        self._check(request.incarnation)
        groups = parts.ledger.groups.leases.get(request.step)
        if groups is None:
            return protocol.LeaseReply(ready=False, step=request.step, metrics=self._figures.now())
        steps = parts.ledger.version_steps
        figures = batch_figures(request.step, groups, steps, parts.rule.max_lag_steps)
        return protocol.LeaseReply(
            ready=True,
            step=request.step,
            responses=manifest(request.step, groups, steps),
            metrics={**figures, **self._figures.now()},
            evaluations=parts.journal.deliver_evaluations(request.incarnation, request.step),
        )

    async def payload(self, request: protocol.PayloadRequest) -> protocol.PayloadReply:
        """The tokens of leased responses."""
        self._check(request.incarnation)
        leased = {group.group_id for group in self._parts.ledger.groups.leases.get(request.step, [])}
        stored: dict[int, StoredGroup] = {}
        samples = []
        for group_id, row in request.rows:
            if group_id not in leased:
                raise ControllerError(f"group {group_id} is not part of the lease of step {request.step}.")
            if group_id not in stored:
                stored[group_id] = self._parts.ledger.payload(group_id)
            group = stored[group_id].group
            if not 0 <= row < len(group.responses):
                raise ControllerError(f"group {group_id} has no response {row}; it has {len(group.responses)}.")
            found = group.responses[row]
            samples.append(
                protocol.Sample(group.prompt_ids, found.ids, found.mask, found.versions, found.behavior_logprobs)
            )
        return protocol.PayloadReply(samples)

    async def version(self, request: protocol.VersionRequest) -> protocol.VersionReply:
        """The number for weights of a step; not needed when the engines hold, or are getting, exactly these."""
        self._check(request.incarnation)
        newest = self._parts.targets.newest
        if self._parts.syncer is None:
            return protocol.VersionReply(version=0, needed=False)
        if newest is not None and _holds(newest, request):
            if self._must_evaluate(newest) and self._parts.targets.want_evaluation(newest):
                self._parts.bell.ring()
            return protocol.VersionReply(newest.version, needed=False)
        return protocol.VersionReply(self._parts.journal.allocate_version(), needed=True)

    async def publish(self, request: protocol.PublishRequest) -> protocol.PublishReply:
        """Bring a version to the engines; returns at once."""
        parts = self._parts
        self._check(request.incarnation)
        row = VersionRow(request.version, request.step, request.incarnation, request.checksum, request.path)
        known = parts.ledger.versions.get(request.version)
        if known is None:
            self._check_new(request)
            parts.ledger.publish(row)
            parts.targets.publish(row, evaluate=self._must_evaluate(row))
            parts.bell.ring()
        elif known != row:
            raise ControllerError(
                f"version {row.version} was published as step {known.step} with checksum {known.checksum}; a version "
                "is never used twice. Ask for the next one."
            )
        return protocol.PublishReply(parts.targets.in_use(e.loading for e in parts.fleet.engines.values()))

    async def commit(self, request: protocol.CommitRequest) -> None:
        """A finalised checkpoint holds weights ``step``."""
        self._check(request.incarnation)
        if request.step > self._parts.ledger.groups.next_step:
            raise ControllerError(
                f"commit of step {request.step}, but step {self._parts.ledger.groups.next_step} was not leased yet."
            )
        self._parts.ledger.commit(request.step, request.oldest_step)

    async def finish(self, request: protocol.FinishRequest) -> protocol.FinishReply:
        """Training is over; done when the last evaluation is."""
        parts = self._parts
        self._check(request.incarnation)
        await parts.bell.until(
            lambda: self.failure is not None or parts.targets.pinned is None, min(request.wait_s, _LONGEST_WAIT_S)
        )
        self._check(request.incarnation)
        found = parts.journal.deliver_evaluations(request.incarnation, request.step)
        return protocol.FinishReply(parts.targets.pinned is None, found)

    def status(self) -> dict[str, Any]:
        """What a person wants to know, as JSON."""
        return status(self._parts, self._figures.now())

    def _leased(self, step: int) -> list[ScoredGroup] | None:
        parts = self._parts
        known = parts.ledger.groups.leases.get(step)
        if known is not None:
            return known
        dropped_before = len(parts.ledger.groups.dropped)
        formed = parts.ledger.form_lease(step, parts.rule)
        if len(parts.ledger.groups.dropped) > dropped_before:
            log.warning("%d groups dropped at step %d", len(parts.ledger.groups.dropped) - dropped_before, step)
            parts.bell.ring()
        if formed is not None:
            self._figures.batch_formed()
            parts.bell.ring()  # a replay's lag budget moves with the leases
        return formed

    def _must_evaluate(self, row: VersionRow) -> bool:
        """Whether an evaluation is due and not done yet; a result that an earlier trainer got is delivered again."""
        due = evaluation_due(self._parts.config, row.step)
        return due and not self._parts.journal.reopen_evaluation(row.step, row.checksum)

    def _check(self, incarnation: int) -> None:
        if self.failure is not None:
            raise ControllerError(f"the controller failed: {self.failure}") from self.failure
        current = self._parts.journal.incarnation
        if incarnation < current:
            raise StaleIncarnationError(
                f"this trainer is incarnation {incarnation}, but incarnation {current} has attached since: another "
                "trainer took the run over. Stop this one."
            )
        if incarnation > current:
            raise ControllerError(f"incarnation {incarnation} never attached; the newest is {current}. Attach first.")

    def _check_step(self, step: int) -> None:
        groups = self._parts.ledger.groups
        if step >= self._parts.rule.total_steps:
            raise ControllerError(f"lease of step {step}, but run.steps is {self._parts.rule.total_steps}.")
        if step not in groups.leases and step != groups.next_step:
            raise ControllerError(
                f"lease of step {step}: the next step is {groups.next_step}, and leases are kept from step "
                f"{min(groups.leases, default=groups.next_step)} on."
            )

    def _check_new(self, request: protocol.PublishRequest) -> None:
        newest, given = self._parts.targets.newest, self._parts.journal.next_version
        if request.version >= given:
            raise ControllerError(
                f"version {request.version} was never given out; the next is {given}. Ask for it first."
            )
        if newest is not None and request.version < newest.version:
            raise ControllerError(f"version {request.version} is older than version {newest.version} on the engines.")


def _holds(newest: VersionRow, request: protocol.VersionRequest) -> bool:
    """Whether the newest version is these weights and can still be had: what lay in a trainer's memory went with it."""
    same = (newest.step, newest.checksum) == (request.step, request.checksum)
    return same and not (newest.in_memory and newest.incarnation != request.incarnation)
