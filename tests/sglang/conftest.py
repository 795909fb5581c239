"""Two real SGLang servers, booted once for the whole session, and the fixtures of tests/engine on top of them.

ASYMPO_SGLANG_URLS=http://...,http://... takes servers that run already (start them with `python tools/sglang_cpu_env
serve MODEL_DIR` on a model of the tests' shape): the suite then starts within seconds. It kills the second one.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from asympo_megatron.testing.tiny_model import make_tiny_model

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))  # the conformance suite, shared with tests/engine

from engine_client import EngineClient
from sglang_servers import PYTHON, sglang_servers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.sglang)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one shape."""
    root = tmp_path_factory.mktemp("models")
    return {"qwen3": make_tiny_model(root / "qwen3"), "qwen3_b": make_tiny_model(root / "qwen3_b", seed=1)}


@pytest.fixture(scope="session")
def references(models: dict[str, Path]) -> dict[str, torch.nn.Module]:
    """The same models in plain transformers."""
    return {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in models.items()}


@pytest.fixture(scope="session")
def server_urls(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    given = os.environ.get("ASYMPO_SGLANG_URLS")
    if given:
        yield given.split(",")
        return
    if not PYTHON.is_file():
        pytest.skip(f"{PYTHON} does not exist: `make sglang-env` builds the environment of SGLang")
    with sglang_servers(models["qwen3"], 2, tmp_path_factory.mktemp("servers")) as servers:
        yield [server.url for server in servers]


@pytest.fixture(scope="session")
def running_engine(server_urls: list[str], models: dict[str, Path]) -> EngineClient:
    return EngineClient(server_urls[0], models["qwen3"], models["qwen3_b"])


@pytest.fixture
def engine(running_engine: EngineClient) -> Iterator[EngineClient]:
    """The first server in its first state: model A under the label "default", nothing running."""
    running_engine.reset()
    yield running_engine
    running_engine.reset()
