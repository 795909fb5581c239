"""The body of SGLang's ``/generate``: what is sent, and the answer checked against what was asked."""

import re
from collections.abc import Container
from typing import Annotated, Any

import msgspec

from asympo_megatron.errors import EngineError, TaskError
from asympo_megatron.records import VersionSpan


class BadAnswer(EngineError):
    """An answer that fails its checks; ``origin``: see :class:`Answer`."""

    def __init__(self, message: str, origin: str = "") -> None:
        super().__init__(message)
        self.origin = origin


class SamplingParams(msgspec.Struct, frozen=True):
    """The sampling fields that are sent; an engine refuses names it does not know."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_token_ids: list[int]
    skip_special_tokens: bool = False


class GenerateRequest(msgspec.Struct, frozen=True):
    """One response to sample."""

    rid: str
    input_ids: list[int]
    sampling_params: SamplingParams
    extra_key: str
    """Prefix-cache key, the weight version at dispatch: without it a request that starts after an in-place update
    reuses keys and values of the old weights, and the engine labels the result with the new version."""
    return_logprob: bool = False


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A checked answer. ``finish_reason`` abort: the response goes on from ``ids``, on this engine or another."""

    ids: list[int]
    versions: list[VersionSpan]
    finish_reason: str
    logprobs: list[float] | None
    expired: bool = False
    """The client's own timer ended the request."""
    origin: str = ""
    """The tag behind the version in the labels of its weights: the engine that sampled it."""


class _Finish(msgspec.Struct, gc=False):
    type: str


class _Span(msgspec.Struct, gc=False):
    version: str
    start: int
    end: int


class _Meta(msgspec.Struct, gc=False):
    id: str
    finish_reason: _Finish
    weight_version: str | None = None
    weight_versions: list[_Span] | None = None
    output_token_logprobs: list[tuple[float, int, str | None]] | None = None


class _Body(msgspec.Struct, gc=False):
    output_ids: list[int]
    meta_info: _Meta


_FINISH_REASONS = ("stop", "length", "abort")


def request_id(run: str, incarnation: int, group: str, row: int, attempt: int) -> str:
    """``run.incarnation.group.response.attempt.``: engines abort by prefix, so every part is of fixed width and ended
    by a dot, and no part holds one. ``run`` is the run's prefix."""
    return f"{run}{incarnation:06d}.{group}.{row:04d}.{attempt:04d}."


def run_prefix(run_id: str) -> str:
    """The prefix of every request of a run."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", run_id) + "."


def check_prompt(ids: list[int], vocab_size: int, what: str) -> None:
    """Refuse a prompt that no engine may see: an id outside the vocabulary kills a real server.

    Raises:
        TaskError: empty, or an id outside of [0, vocab_size).
    """
    if not ids:
        raise TaskError(f"{what} has no token; a prompt needs at least one.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = next(token for token in ids if not 0 <= token < vocab_size)
        raise TaskError(
            f"{what} holds token id {bad}, outside the vocabulary of {vocab_size}. It was not sent, because such an id "
            "kills an engine: check that task and model share the tokenizer."
        )


class AnswerReader:
    """Reads answers and checks each against its request.

    Args:
        vocab_size: bound of token ids.
        known: published weight versions.
    """

    def __init__(self, vocab_size: int, known: Container[int]) -> None:
        self._vocab_size, self._known = vocab_size, known
        token = Annotated[int, msgspec.Meta(ge=0, lt=vocab_size)]  # checked while it is parsed: once more costs more
        fields = [("output_ids", list[token]), ("meta_info", _Meta)]
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(msgspec.defstruct("_Body", fields, gc=False))

    def read(self, body: bytes, request: GenerateRequest) -> Answer:
        """The answer to a request.

        Args:
            body: JSON as it came.
            request: what was asked.

        Raises:
            BadAnswer: the message says which property does not hold.
        """
        decoded = self._decode(body)
        origin = _origin(decoded.meta_info)
        try:
            return self._checked(decoded, request, origin)
        except EngineError as error:
            raise BadAnswer(str(error), origin) from error

    def _checked(self, decoded: _Body, request: GenerateRequest, origin: str) -> Answer:
        ids, meta = decoded.output_ids, decoded.meta_info
        reason, most = meta.finish_reason.type, request.sampling_params.max_new_tokens
        if meta.id != request.rid:
            raise EngineError(f"answer carries request id {meta.id!r}, asked was {request.rid!r}")
        if reason not in _FINISH_REASONS:
            raise EngineError(f"finish_reason is {reason!r}, expected one of {', '.join(_FINISH_REASONS)}")
        if len(ids) > most:
            raise EngineError(f"answer has {len(ids)} tokens, asked were at most {most}")
        if not ids and reason != "abort":
            raise EngineError(f"answer has no token although it finished by {reason}")
        spans = _spans(meta, len(ids), self._known, origin)
        return Answer(ids, spans, reason, _logprobs(meta, ids, request), origin=origin)

    def _decode(self, body: bytes) -> _Body:
        try:
            decoded: _Body = self._decoder.decode(body)
        except msgspec.DecodeError as error:
            try:
                origin = _origin(msgspec.json.decode(body, type=_Body).meta_info)
            except msgspec.DecodeError:
                raise BadAnswer(f"answer is not of the expected form ({error}): {body[:120]!r}") from error
            raise BadAnswer(f"answer holds a token id outside the vocabulary of {self._vocab_size}", origin) from error
        return decoded


def _origin(meta: _Meta) -> str:
    return (meta.weight_version or "").partition(".")[2]


def _spans(meta: _Meta, size: int, known: Container[int], origin: str) -> list[VersionSpan]:
    if meta.weight_versions is None:
        raise EngineError("answer has no meta_info.weight_versions; it takes an engine with them (SGLang 0.5.23)")
    spans, end = [], 0
    for span in meta.weight_versions:
        if span.start != end or span.end < span.start:
            raise EngineError(f"weight_versions has a gap or an overlap at token {span.start}, expected {end}")
        end = span.end
        version, _, tag = span.version.partition(".")
        if not version.isdecimal() or int(version) not in known or tag != origin:
            raise EngineError(
                f"weight version {span.version!r} was never published by this run: the engine restarted, or someone "
                "else changed its weights"
            )
        if span.end > span.start:
            spans.append(VersionSpan(int(version), span.start, span.end))
    if end != size:
        raise EngineError(f"weight_versions covers {end} of {size} tokens")
    return spans


def _logprobs(meta: _Meta, ids: list[int], request: GenerateRequest) -> list[float] | None:
    if not request.return_logprob:
        return None
    found = meta.output_token_logprobs
    if found is None or [token for _, token, _ in found] != ids:
        raise EngineError("output_token_logprobs does not match output_ids")
    return [logprob for logprob, _, _ in found]
