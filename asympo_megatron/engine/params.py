"""The body of ``/generate``: its fields, their checks, and the server's words when one is wrong."""

import math
import re
from typing import Any

import msgspec

DEFAULT_NEW_TOKENS = 128


class BadRequest(Exception):
    """A request that is answered with 400. ``body`` is the JSON of the answer."""

    def __init__(self, message: str, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.body = body if body is not None else {"error": {"message": message}}


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sampling parameters by the names, defaults and order of SGLang (the order shows in its error message)."""

    max_new_tokens: int | msgspec.UnsetType | None = msgspec.UNSET
    """Unset: DEFAULT_NEW_TOKENS or what the context leaves; null: what the context leaves."""
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: Any = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    n: int = 1
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: Any = None
    logit_bias: Any = None
    sampling_seed: int | None = None
    custom_params: Any = None
    beam_width: Any = None
    watermark: Any = None
    choice: Any = None


_UNSUPPORTED = (
    "stop_regex",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "logit_bias",
    "custom_params",
    "beam_width",
    "watermark",
    "choice",
)


class GenerateBody(msgspec.Struct, frozen=True):
    """Fields of ``/generate`` that mean something here; others, ``extra_key`` among them, are ignored."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: SamplingParams | list[SamplingParams] | None = None
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    return_prompt_token_ids: bool = False
    rid: str | list[str] | None = None
    stream: bool = False


_DEFAULTS = SamplingParams()
_DECODER = msgspec.json.Decoder(GenerateBody)
_UNKNOWN_FIELD = re.compile(r"unknown field `(\w+)` - at `\$\.sampling_params")


def parse_body(data: bytes) -> GenerateBody:
    """Decode and check a body, all but what depends on the model.

    Raises:
        BadRequest: with the words of the real server where they are known.
    """
    try:
        body = _DECODER.decode(data)
    except msgspec.DecodeError as error:
        unknown = _UNKNOWN_FIELD.search(str(error))
        if unknown:
            known = ", ".join(f"`{name}`" for name in SamplingParams.__struct_fields__)
            message = f"unknown field `{unknown[1]}`, expected one of {known}"
            raise BadRequest(message, {"error": message}) from error
        raise BadRequest(f"The request body cannot be read: {error}.") from error
    if body.stream:
        raise BadRequest("stream=true is not supported by the embedded engine; leave it out, or use a real server.")
    for params in sampling_list(body):
        _check_params(params)
    return body


def sampling_list(body: GenerateBody) -> list[SamplingParams]:
    """The sampling parameters of a body: one for all its prompts, or one each."""
    if body.sampling_params is None:
        return [_DEFAULTS]
    return body.sampling_params if isinstance(body.sampling_params, list) else [body.sampling_params]


def _check_params(params: SamplingParams) -> None:
    if not (params.temperature >= 0 and math.isfinite(params.temperature)):
        raise BadRequest(f"temperature must be a non-negative finite number, got {_number(params.temperature)}.")
    if not 0 < params.top_p <= 1:
        raise BadRequest(f"top_p must be in (0, 1], got {_number(params.top_p)}.")
    if not 0 <= params.min_p <= 1:
        raise BadRequest(f"min_p must be in [0, 1], got {_number(params.min_p)}.")
    if params.top_k < -1 or params.top_k == 0:
        raise BadRequest(f"top_k must be -1 (disable) or at least 1, got {params.top_k}.")
    most = params.max_new_tokens
    if isinstance(most, int) and most < 1:
        raise BadRequest(f"max_new_tokens must be at least 1, got {most}.")
    if params.min_new_tokens < 0 or (isinstance(most, int) and params.min_new_tokens > most):
        raise BadRequest(f"min_new_tokens must be in [0, max_new_tokens], got {params.min_new_tokens}.")
    if params.n < 1:
        raise BadRequest(f"n must be at least 1, got {params.n}.")
    for name in ("frequency_penalty", "presence_penalty"):
        if not -2 <= getattr(params, name) <= 2:
            raise BadRequest(f"{name} must be in [-2, 2], got {_number(getattr(params, name))}.")
    if not 0 < params.repetition_penalty <= 2:
        raise BadRequest(f"repetition_penalty must be in (0, 2], got {_number(params.repetition_penalty)}.")
    for name in _UNSUPPORTED:
        if getattr(params, name) is not None:
            raise BadRequest(f"{name} is not supported by the embedded engine; leave it out, or use a real server.")


def _number(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
