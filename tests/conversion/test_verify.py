"""`asympo convert verify`: the same model is recognised, another one is not, whichever formats the two have."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from asympo_megatron.cli.main import main
from asympo_megatron.config import Config, override_config
from asympo_megatron.conversion import hf_to_megatron
from asympo_megatron.conversion.hf_files import SINGLE
from asympo_megatron.conversion.verify import verify
from asympo_megatron.errors import CheckpointError
from asympo_megatron.testing.tiny_model import make_tiny_model

pytestmark = pytest.mark.usefixtures("one_rank")

TEXTS = ("packed rows", "three\nlines\nof text", "x" * 40)


def _megatron(source: Path, target: Path) -> Path:
    base = Config()
    base.model.path = str(source)
    hf_to_megatron(override_config(base, []), source, target)
    return target


def _changed(source: Path, target: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / SINGLE)
    tensors[name] = change(tensors[name])
    save_file(tensors, target / SINGLE)
    return target


def test_the_packed_path_scores_as_transformers_does(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "hf", "qwen3", seed=3)
    found = verify(source, _megatron(source, tmp_path / "m"), texts=TEXTS)
    assert found.ok
    assert found.tensors == []
    assert found.nll_difference <= 1e-5
    assert found.nll[0] > 1  # a random model is unsure: NLLs near zero would agree for any weights


def test_a_change_of_one_tensor_is_found_and_named(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "hf", "llama", seed=3)
    name = "model.layers.1.mlp.down_proj.weight"
    other = _changed(source, tmp_path / "other", name, lambda tensor: tensor * 1.5)
    found = verify(_megatron(source, tmp_path / "m"), other, texts=TEXTS)
    assert not found.ok
    assert [tensor.name for tensor in found.tensors] == [name]
    assert found.tensors[0].relative == pytest.approx(0.5, rel=1e-6)
    assert found.nll_difference > found.tolerance
    assert name in found.table()
    assert "NOT the same model" in found.table()


def test_rounding_alone_is_a_difference_too(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "hf", "qwen2", seed=3)
    rounded = _changed(source, tmp_path / "other", "model.norm.weight", lambda tensor: tensor.bfloat16())
    (difference,) = verify(source, rounded, texts=TEXTS).tensors
    assert difference.dtypes == (torch.float32, torch.bfloat16)


def test_models_of_different_shape(tmp_path: Path) -> None:
    first, second = make_tiny_model(tmp_path / "a", "llama"), make_tiny_model(tmp_path / "b", "qwen2")
    with pytest.raises(CheckpointError, match=r"model_type=llama and .* model_type=qwen2: these are different models"):
        verify(first, second, texts=TEXTS)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_tiny_model(tmp_path / "hf", "llama", seed=3)
    other = _changed(source, tmp_path / "other", "model.norm.weight", lambda tensor: tensor * 2)
    text = tmp_path / "page.txt"
    text.write_text("some words to score")
    assert main(["convert", "verify", str(source), str(source), "--text", str(text)]) == 0
    assert "the same model" in capsys.readouterr().out
    assert main(["convert", "verify", str(source), str(other), "--text", str(text)]) == 1
    assert "NOT the same model" in capsys.readouterr().out
    assert main(["convert", "verify", str(source), str(source), "--text", str(tmp_path / "no.txt")]) == 2
    assert "--text" in capsys.readouterr().err
