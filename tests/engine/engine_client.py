"""A small blocking client and the comparison with the recording; nothing here knows which server answers."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asympo_megatron.testing.polling import wait_until

RECORDING = Path(__file__).parent.parent / "contracts" / "sglang-0.5.23.jsonl"
CONTEXT_LENGTH = 1024
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
GREEDY = {"temperature": 0, "ignore_eos": True}
_TIMEOUT_S = 300
"""Of every call: catches a hang; no busy machine should reach it."""
_DEPENDS_ON_HISTORY = {"cached_tokens_details", "decode_moments"}
"""Null or an object, as the prefix cache hit, or as the server has decoded, or not."""
_NOT_RECORDED = {"embedding", "cache"}
"""Keys of a real server's /model_info that the recording leaves out."""


@dataclass(frozen=True)
class EngineClient:
    """One engine under test, and the two directories of the models that it may serve."""

    url: str
    model_a: Path
    model_b: Path
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32))

    def call(self, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        """Status and parsed body; bytes are sent as they are."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        # a real server reads a body as JSON only where the header says so
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                return answer.status, _parse(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _parse(error.read())

    def post(self, path: str, body: Any = None) -> Any:
        """The body of an answer that must be 200."""
        status, answer = self.call(path, {} if body is None else body, "POST")
        assert status == 200, (path, status, answer)
        return answer

    def generate(self, ids: list[int] | list[list[int]] = PROMPT, rid: str | None = None, **sampling: Any) -> Any:
        return self.post("/generate", generate_body(ids, rid, **sampling))

    def start(self, ids: list[int] = PROMPT, rid: str | None = None, **sampling: Any) -> "Future[Any]":
        """Generate in the background."""
        return self._pool.submit(self.post, "/generate", generate_body(ids, rid, **sampling))

    def digest(self) -> dict[str, str]:
        """Checksum of every tensor that the first rank serves."""
        checksums: dict[str, str] = self.post("/weights_checker", {"action": "checksum"})["ranks"][0]["checksums"]
        return checksums

    def label(self) -> str:
        """The weight version that it reports."""
        return str(self.call("/model_info")[1]["weight_version"])

    def load(self) -> dict[str, Any]:
        return self.call("/v1/loads")[1]["loads"][0]

    def wait_for(self, running: int = 0, waiting: int = 0) -> None:
        """Until at least that many requests run and wait."""
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            load = self.load()
            if load["num_running_reqs"] >= running and load["num_waiting_reqs"] >= waiting:
                return
        raise AssertionError(f"the engine never had {running} running and {waiting} waiting requests: {self.load()}")

    @contextmanager
    def paused(self, mode: str) -> Iterator[None]:
        self.post("/pause_generation", {"mode": mode})
        try:
            yield
        finally:
            self.post("/continue_generation")

    def reset(self) -> None:
        """Nothing running, model A under the label "default"."""
        self.post("/continue_generation")
        self.post("/abort_request", {"rid": "", "abort_all": True})
        self.call("/end_weight_update", {}, "POST")
        wait_until(lambda: self.load()["num_waiting_reqs"] == 0, "requests go", _TIMEOUT_S)
        self.update(self.model_a, "default")

    def update(self, model: Path, version: str) -> None:
        """Flush the cache, too. A real server's scheduler may still hold a request whose answer is out, and refuses."""
        wait_until(lambda: self.load()["num_running_reqs"] == 0, "no request runs", _TIMEOUT_S)
        self.update_now(model, version)

    def update_now(self, model: Path, version: str, flush_cache: bool = True) -> None:
        body = {"model_path": str(model), "weight_version": version, "flush_cache": flush_cache}
        self.post("/update_weights_from_disk", body)


def generate_body(ids: Any, rid: str | None = None, **sampling: Any) -> dict[str, Any]:
    """A body that asks for log-probs, greedy unless ``sampling`` says otherwise."""
    body = {"input_ids": ids, "sampling_params": GREEDY | sampling, "return_logprob": True}
    return body if rid is None else body | {"rid": rid}


def logprobs(answer: dict[str, Any]) -> list[float]:
    return [value for value, _, _ in answer["meta_info"]["output_token_logprobs"]]


def recording() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDING.read_text().splitlines()]


def assert_like(recorded: Any, got: Any, path: str = "$") -> None:
    """Same keys and types, all the way down. A "…" in the recording stands for what was cut."""
    if isinstance(recorded, dict):
        assert isinstance(got, dict), f"{path}: expected an object, got {got!r}"
        if path.endswith(".checksums"):  # keyed by tensor names, which differ between model implementations
            assert got
            assert all(isinstance(value, str) and len(value) == 16 for value in got.values()), path
            return
        wanted = set(recorded) - {"…"}
        missing, extra = wanted - set(got), set(got) - wanted - _NOT_RECORDED
        assert not missing, f"{path} lacks {missing}"
        assert "…" in recorded or not extra, f"{path} has {extra}, which the recording has not"
        for key in wanted:
            if key in _DEPENDS_ON_HISTORY:
                continue
            assert_like(recorded[key], got[key], f"{path}.{key}")
    elif isinstance(recorded, list):
        assert isinstance(got, list), f"{path}: expected a list, got {got!r}"
        pattern = [entry for entry in recorded if not (isinstance(entry, str) and "…" in entry)]
        shortened = len(pattern) < len(recorded) or path.endswith(".prompt_token_ids")  # another tokenizer
        assert shortened or len(got) == len(recorded), f"{path}: {len(got)} entries"
        for number, (old, new) in enumerate(zip(pattern, got, strict=False)):
            assert_like(old, new, f"{path}[{number}]")
    else:
        assert _kind(recorded) == _kind(got), f"{path}: expected {recorded!r}, got {got!r}"


def _kind(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data) if data else ""
    except ValueError:
        return data.decode(errors="replace")
