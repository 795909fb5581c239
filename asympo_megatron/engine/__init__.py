"""The embedded engine: SGLang's protocol around a transformers model, for machines without GPUs."""

from asympo_megatron.engine.app import make_app
from asympo_megatron.engine.options import EngineOptions
from asympo_megatron.engine.server import serve

__all__ = ["EngineOptions", "make_app", "serve"]
