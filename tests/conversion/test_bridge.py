"""Other families go through Megatron-Bridge: by the signatures of its AutoBridge, whole or not at all."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from asympo_megatron.cli.main import main
from asympo_megatron.config import Config, override_config
from asympo_megatron.conversion import hf_to_megatron, megatron_to_hf
from asympo_megatron.errors import CheckpointError, ConfigError


class AutoBridge:
    """Signatures of Megatron-Bridge 0.3.1 and 00b2fbf; ``tests/integrations/test_bridge_maps.py`` asks the real one."""

    broken = False

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, **_: Any) -> "AutoBridge":
        return cls(str(path))

    @classmethod
    def import_ckpt(cls, hf_model_id: str | Path, megatron_path: str | Path, **_: Any) -> None:
        assert in_group == ["gloo"]
        (Path(megatron_path) / "iter_0000000").mkdir()
        if cls.broken:
            raise RuntimeError("no bridge for Gpt5ForCausalLM")
        (Path(megatron_path) / "iter_0000000" / "metadata.json").write_text(str(hf_model_id))
        (Path(megatron_path) / "latest_checkpointed_iteration.txt").write_text("0")

    def export_ckpt(
        self,
        megatron_path: str | Path,
        hf_path: str | Path,
        show_progress: bool = True,
        strict: bool = False,
        source_path: str | Path | None = None,
    ) -> None:
        assert not show_progress
        (Path(hf_path) / "model.safetensors").write_text(f"{megatron_path} {self.path}")


in_group: list[str] = []


@contextmanager
def temporary_distributed_context(backend: str = "gloo") -> Iterator[None]:
    in_group.append(backend)
    try:
        yield
    finally:
        in_group.clear()


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (
        ("", AutoBridge),
        (".training", None),
        (".training.model_load_save", temporary_distributed_context),
    ):
        module = ModuleType("megatron.bridge" + name)
        if content is not None:
            setattr(module, content.__name__, content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "gpt5"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt5"}))
    (directory / "model.safetensors").touch()
    return directory


def _config(source: Path) -> Config:
    base = Config()
    base.model.path = str(source)
    return override_config(base, [])


def test_there_and_back(bridge: None, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "hf-to-megatron", str(source), str(tmp_path / "m")]) == 0
    assert "made by Megatron-Bridge" in capsys.readouterr().out
    checkpoint = tmp_path / "m" / "iter_0000000"
    assert (checkpoint / "metadata.json").read_text() == str(source)
    megatron_to_hf(tmp_path / "m", tmp_path / "back", model_files=source)
    assert (tmp_path / "back" / "model.safetensors").read_text() == f"{checkpoint} {source}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "gpt5", "m"]


def test_without_megatron_bridge(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    words = r"unknown model_type 'gpt5' .*known are llama, mistral.*asympo-megatron\[bridge\] \(Python >= 3.12\)"
    with pytest.raises(ConfigError, match=words):
        hf_to_megatron(_config(source), source, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_what_it_cannot_do_leaves_nothing(
    bridge: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_to_megatron(_config(source), source, tmp_path / "m")
    with pytest.raises(ConfigError, match="leave --dtype out"):
        megatron_to_hf(tmp_path / "m", tmp_path / "back", model_files=source, dtype=torch.float32)
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"gpt5 has no safetensors.*--hf DIR"):
        megatron_to_hf(tmp_path / "m", tmp_path / "back", model_files=source)
    monkeypatch.setattr(AutoBridge, "broken", True)
    with pytest.raises(CheckpointError, match=r"could not convert .*gpt5: RuntimeError: no bridge for Gpt5ForCausalLM"):
        hf_to_megatron(_config(source), source, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt5", "m"]
