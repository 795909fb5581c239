"""The engine under test: embedded, in this process, on a free port."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_client import CONTEXT_LENGTH, EngineClient
from transformers import AutoModelForCausalLM

from asympo_megatron.engine import EngineOptions
from asympo_megatron.testing.engine_server import engine_server
from asympo_megatron.testing.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one shape, and one of another family."""
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen3": make_tiny_model(root / "qwen3"),
        "qwen3_b": make_tiny_model(root / "qwen3_b", seed=1),
        "llama": make_tiny_model(root / "llama", kind="llama"),
        "tied": make_tiny_model(root / "tied", tied=True),
    }


@pytest.fixture(scope="session")
def references(models: dict[str, Path]) -> dict[str, torch.nn.Module]:
    """The same models in plain transformers."""
    return {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in models.items()}


@pytest.fixture(scope="session")
def running_engine(models: dict[str, Path]) -> Iterator[EngineClient]:
    options = EngineOptions(str(models["qwen3"]), context_length=CONTEXT_LENGTH, max_running_requests=32, threads=1)
    with engine_server(options) as url:
        yield EngineClient(url, models["qwen3"], models["qwen3_b"])


@pytest.fixture
def engine(running_engine: EngineClient) -> Iterator[EngineClient]:
    """The engine in its first state: model A under the label "default", nothing running."""
    running_engine.reset()
    yield running_engine
    running_engine.reset()
