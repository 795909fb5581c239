"""One sequence on its way through the engine, and the answer that it becomes."""

import time
from dataclasses import dataclass, field
from typing import Any

from asympo_megatron.engine.params import SamplingParams

LogprobEntry = tuple[float | None, int, None]


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt, what was sampled after it, and by which weights.

    Built on the event loop, then touched by the model thread alone until ``finish_reason`` is set.
    """

    rid: str
    prompt_ids: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    max_new_tokens: int
    future: Any
    """Completed on the event loop, with this sequence."""
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    return_prompt_ids: bool = False
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[LogprobEntry]] = field(default_factory=list)
    input_logprobs: list[LogprobEntry] = field(default_factory=list)
    input_top_logprobs: list[list[LogprobEntry] | None] = field(default_factory=list)
    spans: list[tuple[str, int]] = field(default_factory=list)
    """(weight version, first output token that it sampled)."""
    num_retractions: int = 0
    finish_reason: dict[str, Any] | None = None
    text_end: int | None = None
    """Characters of the text before a matched stop string."""
    started_at: float = field(default_factory=time.perf_counter)

    @property
    def wants_input_logprobs(self) -> bool:
        return self.return_logprob and self.logprob_start_len >= 0

    def context_ids(self) -> list[int]:
        """Prompt and all tokens sampled so far: what a prefill must read."""
        return self.prompt_ids + self.output_ids if self.output_ids else self.prompt_ids

    def begin_span(self, version: str) -> None:
        """Tokens from here on are sampled by ``version``."""
        start = len(self.output_ids)
        if self.spans and self.spans[-1][1] == start:
            self.spans.pop()
        if not self.spans or self.spans[-1][0] != version:
            self.spans.append((version, start))

    def abort(self) -> None:
        """Finish with the tokens there are."""
        self.finish_reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}

    def version_spans(self) -> list[dict[str, Any]]:
        """``weight_versions`` of the answer."""
        ends = [start for _, start in self.spans[1:]] + [len(self.output_ids)]
        return [
            {"version": version, "start": start, "end": end}
            for (version, start), end in zip(self.spans, ends, strict=False)  # a sequence that never ran has no span
            if end > start
        ]


def result_body(sequence: Sequence, text: str, version: str) -> dict[str, Any]:
    """The answer to one sequence, with the keys of the real server.

    ``version`` labels an answer without tokens; otherwise the last span does.
    """
    spans = sequence.version_spans()
    meta: dict[str, Any] = {
        "id": sequence.rid,
        "finish_reason": sequence.finish_reason,
        "prompt_tokens": len(sequence.prompt_ids),
        "weight_version": spans[-1]["version"] if spans else version,
        "num_retractions": sequence.num_retractions,
    }
    if sequence.return_logprob:
        _add_logprobs(meta, sequence)
    meta |= {
        "reasoning_tokens": 0,
        "completion_tokens": len(sequence.output_ids),
        "cached_tokens": 0,
        "weight_versions": spans,
        "cached_tokens_details": None,
        "dp_rank": None,
        "e2e_latency": time.perf_counter() - sequence.started_at,
        "response_sent_to_client_ts": time.time(),
    }
    body = {"text": text, "output_ids": sequence.output_ids, "meta_info": meta}
    if sequence.return_prompt_ids:
        body["prompt_token_ids"] = sequence.prompt_ids
    return body


def _add_logprobs(meta: dict[str, Any], sequence: Sequence) -> None:
    pairs = zip(sequence.logprobs, sequence.output_ids, strict=True)
    meta["input_token_logprobs"] = sequence.input_logprobs
    meta["output_token_logprobs"] = [(value, token, None) for value, token in pairs]
    meta["output_token_logprobs_length"] = len(sequence.logprobs)
    if sequence.top_logprobs_num > 0:
        meta["input_top_logprobs"] = sequence.input_top_logprobs
        meta["output_top_logprobs"] = sequence.top_logprobs
