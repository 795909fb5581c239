"""Families without a table of ours through the real Megatron-Bridge: `asympo convert` there and back, bit for bit.

Bridge builds its models of Transformer Engine's layers. Here Megatron-Core's own stand in for them, with a norm's
weight where the fused ones keep it: conversion fills and reads parameters and never runs a layer.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bridge_package import import_auto_bridge
from safetensors.torch import load_file, save_file

from asympo_megatron.cli.main import main
from asympo_megatron.conversion.names import LAYERS
from asympo_megatron.testing.tiny_model import byte_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "conversion"))
from small_models import save_small_model

pytestmark = pytest.mark.slow

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},  # tied, norms around zero
    "nemotron": {"tie_word_embeddings": False},  # LayerNorm with biases, a squared ReLU without a gate
}


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import_auto_bridge()
    from megatron.bridge.models import gpt_provider
    from megatron.core.models.common.embeddings import rope_utils

    monkeypatch.setattr(gpt_provider, "transformer_engine_layer_spec", _layers)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", _layers)  # Nemotron's configuration asks for it
    _forget_attention()
    yield
    _forget_attention()


def _forget_attention() -> None:
    """Megatron-Core notes one model's kind of attention in the environment, and then refuses another's."""
    for kernel in ("FLASH", "FUSED", "UNFUSED"):
        os.environ.pop(f"NVTE_{kernel}_ATTN", None)


def _layers(config: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    class Norm(torch.nn.Module):
        def __init__(self, config: Any, hidden_size: int, **_: Any) -> None:
            super().__init__()
            for name in _norm(config, hidden_size):
                self.register_parameter(name, torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype)))

    class TELayerNormColumnParallelLinear(ColumnParallelLinear):  # Bridge knows it by its name
        def __init__(self, input_size: int, output_size: int, *, config: Any, **others: Any) -> None:
            super().__init__(input_size, output_size, config=config, **others)
            for name in _norm(config, input_size):
                empty = torch.empty(input_size, dtype=config.params_dtype)
                self.register_parameter(f"layer_norm_{name}", torch.nn.Parameter(empty))

    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.self_attention.submodules.linear_qkv = TELayerNormColumnParallelLinear
    layer.mlp.submodules.linear_fc1 = TELayerNormColumnParallelLinear
    return TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=Norm)


def _norm(config: Any, size: int) -> tuple[str, ...]:
    return ("weight", "bias") if config.normalization == "LayerNorm" else ("weight",)


def _saved(family: str, directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = save_small_model(directory, {"model_type": family, **FAMILIES[family]})
    model.to(dtype).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_bit_for_bit(bridge: None, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    assert family not in LAYERS
    source, checkpoint, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    tensors = _saved(family, source, dtype)
    assert main(["convert", "hf-to-megatron", str(source), str(checkpoint)]) == 0
    shards = sorted(checkpoint.glob("iter_*/*.distcp"))
    assert sum(file.stat().st_size for file in shards) > sum(tensor.nbytes for tensor in tensors.values())
    # names, files and config are the source's, its weights must not be: those of the checkpoint are asked for
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, source / "model.safetensors")
    assert main(["convert", "megatron-to-hf", str(checkpoint), str(back), "--hf", str(source)]) == 0
    found = load_file(back / "model.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert not torch.distributed.is_initialized()
