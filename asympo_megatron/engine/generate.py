"""``/generate`` and ``/abort_request``."""

import asyncio
import uuid
from typing import Any

import msgspec
from aiohttp import web

from asympo_megatron.engine.params import (
    DEFAULT_NEW_TOKENS,
    BadRequest,
    GenerateBody,
    SamplingParams,
    parse_body,
    sampling_list,
)
from asympo_megatron.engine.sequence import Sequence, result_body
from asympo_megatron.engine.state import ENGINE, Engine, json_response, read_json


class AbortBody(msgspec.Struct, frozen=True):
    rid: str = ""
    abort_all: bool = False


async def generate(request: web.Request) -> web.Response:
    """Sample one or several responses; answers when all of them are finished."""
    engine = request.app[ENGINE]
    body = parse_body(await request.read())
    sequences, single = _build_sequences(engine, body)
    rids = {sequence.rid for sequence in sequences}
    if len(rids) < len(sequences) or not rids.isdisjoint(engine.live_rids):
        raise BadRequest(f"Duplicate request ID detected: {sorted(rids & engine.live_rids or rids)[0]}")
    engine.live_rids |= rids
    try:
        engine.thread.submit(sequences)
        await asyncio.gather(*(sequence.future for sequence in sequences))
    except asyncio.CancelledError:  # the client hung up
        engine.thread.abandon(rids)
        raise
    finally:
        engine.live_rids -= rids
    version = engine.scheduler.weight_version
    answers = [result_body(sequence, _text(engine, sequence), version) for sequence in sequences]
    return json_response(answers[0] if single else answers)


async def abort_request(request: web.Request) -> web.Response:
    """Finish every request whose rid starts with a live one's; any other does nothing, as on a real server."""
    engine = request.app[ENGINE]
    body = await read_json(request, AbortBody)
    if body.abort_all or body.rid in engine.live_rids:
        await engine.thread.call(engine.scheduler.abort, body.rid, body.abort_all)
    return web.Response(content_type="application/json")


def _build_sequences(engine: Engine, body: GenerateBody) -> tuple[list[Sequence], bool]:
    prompts, single = _prompts(engine, body)
    params = sampling_list(body)
    if len(params) == 1:
        params = params * len(prompts)
    if len(params) != len(prompts):
        raise BadRequest(f"sampling_params has {len(params)} entries for {len(prompts)} prompts.")
    pairs = [(ids, param) for ids, param in zip(prompts, params, strict=True) for _ in range(param.n)]
    single = single and len(pairs) == 1
    rids = _rids(body.rid, len(pairs), single)
    return [_sequence(engine, body, *pair, rid) for pair, rid in zip(pairs, rids, strict=True)], single


def _prompts(engine: Engine, body: GenerateBody) -> tuple[list[list[int]], bool]:
    """Token ids of every prompt, and whether the body holds one prompt instead of a list of them."""
    if body.input_ids is not None:
        ids: list[Any] = body.input_ids
        if not ids:
            raise BadRequest("input_ids is empty; give at least one token.")
        if all(type(entry) is list for entry in ids):
            return ids, False
        if any(type(entry) is list for entry in ids):
            raise BadRequest("input_ids mixes token ids and lists of them; give one list, or a list of lists.")
        return [ids], True
    if body.text is None:
        raise BadRequest("Either text, input_ids or input_embeds should be provided.")
    if engine.model.tokenizer is None:
        raise BadRequest("This model has no tokenizer: send input_ids instead of text.")
    texts = body.text if isinstance(body.text, list) else [body.text]
    return [engine.model.tokenizer.encode(text) for text in texts], not isinstance(body.text, list)


def _rids(rid: str | list[str] | None, count: int, single: bool) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(rid, str):
        return [rid] if single else [f"{rid}_{number}" for number in range(count)]
    if len(rid) != count:
        raise BadRequest(f"rid has {len(rid)} entries for {count} responses.")
    return rid


def _sequence(engine: Engine, body: GenerateBody, ids: list[int], params: SamplingParams, rid: str) -> Sequence:
    model = engine.model
    limit = _check_prompt(engine, ids, params)
    if not 0 <= body.top_logprobs_num <= model.vocab_size:
        raise BadRequest(f"top_logprobs_num must be in [0, {model.vocab_size}], got {body.top_logprobs_num}.")
    stop_ids: frozenset[int] = frozenset()
    if not params.ignore_eos:
        stop_ids = model.eos_ids | frozenset(params.stop_token_ids) if params.stop_token_ids else model.eos_ids
    return Sequence(
        rid=rid,
        prompt_ids=ids,
        params=params,
        stop_ids=stop_ids,
        max_new_tokens=limit,
        future=asyncio.get_running_loop().create_future(),
        return_logprob=body.return_logprob,
        logprob_start_len=body.logprob_start_len,
        top_logprobs_num=body.top_logprobs_num,
        return_prompt_ids=body.return_prompt_token_ids,
    )


def _check_prompt(engine: Engine, ids: list[int], params: SamplingParams) -> int:
    """Check a prompt against the model; returns the largest number of new tokens."""
    context, size = engine.model.context_length, len(ids)
    if not ids:
        raise BadRequest("a prompt has no token; give at least one.")
    if size >= context:
        raise BadRequest(f"The input ({size} tokens) is longer than the model's context length ({context} tokens).")
    if min(ids) < 0 or max(ids) >= engine.model.vocab_size:
        outside = next(token for token in ids if not 0 <= token < engine.model.vocab_size)
        raise BadRequest(f"token id {outside} is outside the model's vocabulary of {engine.model.vocab_size} entries.")
    wanted, room = params.max_new_tokens, context - size
    if wanted is msgspec.UNSET:
        return max(min(DEFAULT_NEW_TOKENS, room - 1), 1)
    if wanted is None:
        return max(room - 1, 1)
    if wanted > room:
        raise BadRequest(
            f"Requested token count exceeds the model's maximum context length of {context} tokens: {size} tokens "
            f"from the input and {wanted} for the completion. Lower max_new_tokens."
        )
    return wanted


def _text(engine: Engine, sequence: Sequence) -> str:
    params, reason = sequence.params, sequence.finish_reason or {}
    ids = sequence.output_ids
    trimmed = reason.get("type") == "stop" and not params.no_stop_trim
    if trimmed and sequence.text_end is None:
        ids = ids[:-1]
    text = engine.model.decode(ids, params.skip_special_tokens)
    return text[: sequence.text_end] if trimmed and sequence.text_end is not None else text
