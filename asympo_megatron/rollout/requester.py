"""One response, whatever happens to engines meanwhile: nothing that was sampled is thrown away."""

import asyncio
import heapq
import itertools
import logging
from collections.abc import Callable, Container

import msgspec

from asympo_megatron.errors import ControllerError, EngineError
from asympo_megatron.records import VersionSpan
from asympo_megatron.rollout.answer import Answer, AnswerReader, GenerateRequest, SamplingParams, request_id
from asympo_megatron.rollout.bell import Bell
from asympo_megatron.rollout.client import EngineClient, EngineLost, RequestRefused
from asympo_megatron.rollout.fleet import Engine, Fleet
from asympo_megatron.rollout.router import Router
from asympo_megatron.rollout.rows import VersionRow

log = logging.getLogger(__name__)
_MAX_STRIKES = 8
"""Lost connections, or aborts without a token, in a row on an engine that looks healthy."""
_MAX_FAILURES = 100
"""Of one request in a row, behind a router: with the pauses between them some eight minutes."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0


class Sampled(msgspec.Struct, frozen=True, gc=False):
    """A complete turn; its tokens may come from several engines and weight versions."""

    ids: list[int]
    versions: list[VersionSpan]
    finish_reason: str
    logprobs: list[float] | None
    requests: int
    """How many it took."""


class Draft(msgspec.Struct, frozen=True, gc=False):
    """What is asked for: where the response belongs, its prompt, and how it is sampled.

    ``version`` pins an evaluation to engines with exactly that weight version; None is a training response, which
    starts and goes on only while the lag rule lets its group sample.
    """

    group: int
    name: str
    row: int
    prompt_ids: list[int]
    params: SamplingParams
    version: int | None = None
    requests: int = 0
    """Sent for earlier turns of this response: ids of requests go on from there."""


class Requester:
    """Samples responses on the fleet.

    Args:
        fleet: where requests go.
        bell: rung when the lag rule or the fleet may have changed.
        may_sample: the lag rule for a group.
        versions: published weight versions.
        vocab_size: bound of token ids.
        identity: prefix of the run's request ids, and the trainer's incarnation at the time of asking.
        logprobs: ask for behavior log-probs.
        router: where training requests go; None: to the engine that has the slot.
    """

    def __init__(
        self,
        fleet: Fleet,
        bell: Bell,
        may_sample: Callable[[int], bool],
        versions: Container[int],
        vocab_size: int,
        identity: Callable[[], tuple[str, int]],
        *,
        logprobs: bool,
        router: Router | None = None,
    ) -> None:
        self._router = router
        self._fleet, self._may_sample = fleet, may_sample
        self._reader, self._identity = AnswerReader(vocab_size, versions), identity
        self._logprobs = logprobs
        self._held: list[tuple[int, int, asyncio.Future[None]]] = []
        """A heap of requests that the lag rule holds back: group, order of arrival (no two alike), who waits."""
        self._order = itertools.count()
        bell.listen(self._let_go)
        self.tokens_sampled = 0
        """Of training responses; an evaluation's do not count."""

    async def sample(self, draft: Draft) -> Sampled:
        """Sample one turn; goes on elsewhere after a failure and from its last token after an abort.

        Raises:
            ControllerError: an engine says that the request itself is wrong.
        """
        parts = _Parts(logprobs=[] if self._logprobs else None)
        attempt = draft.requests
        while True:
            if draft.version is None and not self._may_sample(draft.group):
                await self._hold(draft.group)
            engine = await self._fleet.acquire(draft.group, draft.version)
            try:
                if not self._still_fits(engine, draft):  # it changed between the grant and now
                    continue
                answer = await self._ask(engine, draft, parts, attempt)
            finally:
                self._fleet.release(engine)
            attempt += 1
            if answer is None:
                continue
            if draft.version is None:
                self.tokens_sampled += len(answer.ids)
            parts.add(answer)
            if answer.finish_reason != "abort":
                return parts.finish(answer.finish_reason, attempt - draft.requests)
            if len(parts.ids) >= draft.params.max_new_tokens:
                return parts.finish("length", attempt - draft.requests)

    async def _hold(self, group: int) -> None:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._held, (group, next(self._order), waiting))
        await waiting

    def _let_go(self) -> None:
        """Something changed. The lag rule lets older groups sample first, so the oldest answers for all of them."""
        while self._held and self._may_sample(self._held[0][0]):
            _, _, waiting = heapq.heappop(self._held)
            if not waiting.done():  # else cancelled
                waiting.set_result(None)

    def _still_fits(self, engine: Engine, draft: Draft) -> bool:
        if not engine.serving or engine.weights is None:
            return False
        if draft.version is None:
            return self._may_sample(draft.group)
        return engine.weights.version == draft.version

    async def _ask(self, engine: Engine, draft: Draft, parts: "_Parts", attempt: int) -> Answer | None:
        weights = engine.weights
        assert weights is not None  # _still_fits() saw to it
        request = self._request(draft, parts, attempt, str(weights.version))
        try:
            if self._router is None or draft.version is not None:
                return await self._ask_engine(engine, weights, request)
            return await self._ask_router(self._router, request, parts)
        except RequestRefused as error:
            raise ControllerError(
                f"{error}. Prompt of {len(request.input_ids)} and up to {request.sampling_params.max_new_tokens} new "
                "tokens: check rollout.sampling against the engine's context length."
            ) from error

    async def _ask_router(self, router: Router, request: GenerateRequest, parts: "_Parts") -> Answer | None:
        try:
            answer = await router.ask(request, self._reader)
        except EngineError as error:
            # a router that tries again by itself uses the id again, which an engine still at work on it refuses
            if isinstance(error, RequestRefused) and isinstance(parts.failure, RequestRefused):
                raise
            await parts.failed(request.rid, error)
            return None
        if answer.ids or answer.expired:
            parts.failures, parts.failure = 0, None
        else:
            await parts.failed(request.rid, EngineError("aborted without a token"))
        return answer

    async def _ask_engine(self, engine: Engine, weights: VersionRow, request: GenerateRequest) -> Answer | None:
        client = engine.client
        try:
            answer = await client.generate(request, self._reader)
            if answer.origin != engine.tag:
                raise EngineError(f"engine {engine.url} has weights labelled by another controller")
        except RequestRefused:
            raise
        except EngineLost as error:
            await self._examine(engine, client, request.rid, error)
            return None
        except EngineError as error:
            self._fleet.fail(engine, client, error)
            return None
        if answer.ids:
            engine.answered()
        elif answer.expired:  # it waited behind others in a busy engine: no fault of the engine
            log.info("engine %s had not begun %s when rollout.request_timeout_s was over", engine.url, request.rid)
        elif engine.weights == weights and engine.serving:
            self._strike(engine, client, EngineError(f"engine {engine.url} aborts requests without a token"))
        return answer

    def _request(self, draft: Draft, parts: "_Parts", attempt: int, version: str) -> GenerateRequest:
        params, prompt_ids = draft.params, draft.prompt_ids
        if parts.ids:
            prompt_ids = prompt_ids + parts.ids
            params = msgspec.structs.replace(params, max_new_tokens=params.max_new_tokens - len(parts.ids))
        rid = request_id(*self._identity(), draft.name, draft.row, attempt)
        return GenerateRequest(rid, prompt_ids, params, version, self._logprobs)

    async def _examine(self, engine: Engine, client: EngineClient, rid: str, error: EngineLost) -> None:
        """A connection failed. An engine that still answers only lost that request; else it is taken out at once."""
        if engine.client is not client or engine.failure is not None:
            return
        try:
            await client.abort(rid)  # it may still be at work on a request that nobody waits for
        except EngineError:
            self._fleet.fail(engine, client, error)
            return
        self._strike(engine, client, error)

    def _strike(self, engine: Engine, client: EngineClient, error: EngineError) -> None:
        engine.strikes += 1
        log.info("engine %s, strike %d: %s", engine.url, engine.strikes, error)
        if engine.strikes >= _MAX_STRIKES:
            self._fleet.fail(engine, client, error)


class _Parts:
    """The segments of a turn, put together."""

    def __init__(self, logprobs: list[float] | None) -> None:
        self.ids: list[int] = []
        self._versions: list[VersionSpan] = []
        self._logprobs = logprobs
        self.failures = 0
        self.failure: EngineError | None = None

    async def failed(self, rid: str, error: EngineError) -> None:
        """Behind a router: a try brought nothing. Wait a little, longer every time.

        Raises:
            ControllerError: for too long.
        """
        log.info("request %s: %s", rid, error)
        if self.failures == _MAX_FAILURES:
            raise ControllerError(
                f"request {rid} failed {self.failures} times in a row behind rollout.router_url, while engines serve; "
                f"last: {error}"
            ) from error
        await asyncio.sleep(min(_FIRST_PAUSE_S * 2 ** min(self.failures, 10), _LONGEST_PAUSE_S))
        self.failures, self.failure = self.failures + 1, error

    def add(self, answer: Answer) -> None:
        offset = len(self.ids)
        self.ids = self.ids + answer.ids if offset else answer.ids  # never in place: a request may hold them
        if self._logprobs is not None and answer.logprobs is not None:
            self._logprobs += answer.logprobs
        for span in answer.versions:
            last = self._versions[-1] if self._versions else None
            if last is not None and last.version == span.version:
                self._versions[-1] = VersionSpan(last.version, last.start, span.end + offset)
            else:
                self._versions.append(VersionSpan(span.version, span.start + offset, span.end + offset))

    def finish(self, reason: str, requests: int) -> Sampled:
        return Sampled(self.ids, self._versions, reason, self._logprobs, requests)
