"""Endpoints that only report."""

import time
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from typing import Any

from aiohttp import web

from asympo_megatron.engine.state import ENGINE, Engine, json_response

SERVER_VERSION = f"embedded-{installed_version('asympo-megatron')}"
_BYTES_PER_GB = 1 << 30


async def health(request: web.Request) -> web.Response:
    """200 with an empty body while the model thread lives. Unlike the real server it generates no token."""
    return web.Response(status=200 if request.app[ENGINE].thread.alive else 503)


async def ready(request: web.Request) -> web.Response:
    """As health, but 503 while generation is paused."""
    engine = request.app[ENGINE]
    return web.Response(status=200 if engine.thread.alive and not engine.scheduler.paused else 503)


async def model_info(request: web.Request) -> web.Response:
    """What is served, and which weights."""
    engine = request.app[ENGINE]
    config = engine.model.module.config
    path = engine.scheduler.model_path
    return json_response(
        {
            "model_path": path,
            "served_model_name": path,
            "tokenizer_path": engine.options.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": engine.scheduler.weight_version,
            "load_format": engine.options.load_format,
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": "null",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": config.model_type,
            "architectures": [type(engine.model.module).__name__],
        }
    )


async def models(request: web.Request) -> web.Response:
    """The OpenAI-style list of one model."""
    engine = request.app[ENGINE]
    path = engine.scheduler.model_path
    card = {"id": path, "object": "model", "created": int(time.time()), "owned_by": "asympo_megatron", "root": path}
    card |= {"parent": None, "max_model_len": engine.model.context_length}
    return json_response({"object": "list", "data": [card]})


async def server_info(request: web.Request) -> web.Response:
    """Version, capacity and weights; a small part of what a real server tells."""
    engine = request.app[ENGINE]
    state = {"weight_version": engine.scheduler.weight_version, "model_path": engine.scheduler.model_path}
    body = {
        "version": SERVER_VERSION,
        "max_total_num_tokens": _token_capacity(engine),
        "max_running_requests": engine.options.max_running_requests,
        "context_length": engine.model.context_length,
        "internal_states": [state],
        "status": "ready",
        **state,
    }
    return json_response(body)


async def loads(request: web.Request) -> web.Response:
    """Running and waiting requests. Figures of mechanisms that the embedded engine has not are 0 or null."""
    engine = request.app[ENGINE]
    now = datetime.now(UTC)
    return json_response(
        {
            "timestamp": now.isoformat(),
            "version": SERVER_VERSION,
            "accelerator": None,
            "num_accelerators": 1,
            "loads": [_load(engine, now.timestamp())],
        }
    )


def _load(engine: Engine, timestamp: float) -> dict[str, Any]:
    scheduler = engine.scheduler
    running, waiting = len(scheduler.batch.rows), len(scheduler.waiting)
    used, capacity = scheduler.batch.cached_tokens, _token_capacity(engine)
    return {
        "timestamp": timestamp,
        "dp_rank": 0,
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_waiting_uncached_tokens": 0,
        "num_used_tokens": used,
        "num_total_tokens": used,
        "num_active_tokens": used,
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": capacity,
        "max_running_requests": engine.options.max_running_requests,
        "token_usage": used / capacity,
        "gen_throughput": 0.0,
        "cache_hit_rate": 0.0,
        "utilization": running / engine.options.max_running_requests,
        "total_prefill_uncached_tokens": 0,
        "total_prefill_busy_us": 0,
        "decode_moments": None,
        "memory": {
            "weight_gb": engine.model.module.num_parameters() * engine.model.module.dtype.itemsize / _BYTES_PER_GB,
            "kv_cache_gb": 0.0,
            "graph_gb": 0.0,
            "token_capacity": capacity,
        },
        "disaggregation": {
            "mode": "null",
            "prefill_bootstrap_queue_reqs": 0,
            "prefill_inflight_queue_reqs": 0,
            "decode_prealloc_queue_reqs": 0,
            "decode_transfer_queue_reqs": 0,
            "decode_retracted_queue_reqs": 0,
            "kv_transfer_speed_gb_s": 0.0,
            "kv_transfer_latency_ms": 0.0,
        },
        "queues": {
            "waiting": waiting,
            "grammar": 0,
            "paused": running if scheduler.paused else 0,
            "retracted": 0,
            "prealloc_ready": 0,
        },
    }


def _token_capacity(engine: Engine) -> int:
    return engine.options.max_running_requests * engine.model.context_length
