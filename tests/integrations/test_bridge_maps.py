"""The name maps of conversion against Megatron-Bridge's own, parameter by parameter, both ways, bit by bit."""

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bridge_package import import_auto_bridge
from safetensors.torch import load_file

from asympo_megatron.mcore import initialize, shutdown

sys.path.append(str(Path(__file__).parents[1] / "conversion"))
from small_models import MOE, save_small_model

pytestmark = pytest.mark.slow

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    "qwen3_moe": {**MOE, "norm_topk_prob": True, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None, "head_dim": 8},
}


@pytest.fixture(scope="module")
def auto_bridge() -> Any:
    bridge = import_auto_bridge()
    from megatron.bridge.models.conversion.param_mapping import AutoMapping

    AutoMapping.register_module_type("OutputLayer", "column")
    AutoMapping.register_module_type("BalancedRouter", "replicated")
    return bridge


@pytest.fixture(autouse=True)
def _one_rank() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    shutdown()
    torch.set_num_threads(threads)


def _save(family: str, directory: Path) -> dict[str, torch.Tensor]:
    save_small_model(directory, FAMILIES[family])
    return load_file(directory / "model.safetensors")


def _learner(directory: Path) -> Any:
    from asympo_megatron.config import Config
    from asympo_megatron.conversion import load_hf
    from asympo_megatron.mcore import Learner
    from asympo_megatron.objectives import build_objective

    config = Config()
    config.model.path, config.rollout.source = str(directory), "supervised"
    learner = Learner(
        config, json.loads((directory / "config.json").read_text()), build_objective("asympo"), initialize(config)
    )
    load_hf(learner, directory)
    return learner


def _as_bridge_names(name: str) -> tuple[str, ...]:
    """The name of the local layers, and that of Transformer Engine's, whose norms belong to the projection behind."""
    fused = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    return name, fused.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


def _grouped(name: str) -> str:
    """Experts of SequentialMLP under the name that GroupedMLP gives them."""
    return re.sub(r"local_experts\.(\d+)\.(.*)", r"\2\1", name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_joined_and_split_alike(auto_bridge: Any, tmp_path: Path, family: str) -> None:
    from asympo_megatron.mcore.model import unwrap

    tensors = _save(family, tmp_path)
    model = unwrap(_learner(tmp_path).chunks[0])
    registry = auto_bridge.from_hf_pretrained(str(tmp_path))._model_bridge.mapping_registry()
    seen: set[str] = set()
    for name, ours in model.named_parameters():
        candidates = (_grouped(name), *_as_bridge_names(name))
        mapping = next(filter(None, map(registry.megatron_to_hf_lookup, candidates)), None)
        assert mapping is not None, f"Megatron-Bridge does not know {candidates}"
        module = model.get_submodule(name.rpartition(".")[0])
        names = mapping.hf_param.values() if isinstance(mapping.hf_param, dict) else [mapping.hf_param]
        if isinstance(mapping.hf_param, dict):
            parts: Any = {key: tensors[hf_name] for key, hf_name in mapping.hf_param.items()}
        else:
            parts = tensors[mapping.hf_param]
        assert torch.equal(mapping.hf_to_megatron(parts, module), ours), name
        back = mapping.megatron_to_hf(ours, module)
        assert set(back) == set(names), name
        for hf_name, tensor in back.items():
            assert torch.equal(tensor, tensors[hf_name]), hf_name
        seen |= set(names)
    assert seen == set(tensors), "a tensor that one of the two leaves out"


def test_a_wrong_join_is_noticed(auto_bridge: Any, tmp_path: Path) -> None:
    """Mutant: query, key and value one after the other, not group by group."""
    tensors = _save("llama", tmp_path)
    stacked = torch.cat([tensors[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    from asympo_megatron.mcore.model import unwrap

    ours = dict(unwrap(_learner(tmp_path).chunks[0]).named_parameters())
    assert not torch.equal(stacked, ours["decoder.layers.0.self_attention.linear_qkv.weight"])


def test_the_calls_of_the_fallback_exist(auto_bridge: Any) -> None:
    """What ``conversion.bridge`` calls for other families."""
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    inspect.signature(temporary_distributed_context).bind(backend="gloo")
    inspect.signature(auto_bridge.from_hf_pretrained).bind("model")
    inspect.signature(auto_bridge.import_ckpt).bind("model", "checkpoint")
    inspect.signature(auto_bridge.export_ckpt).bind(None, "checkpoint", "model", show_progress=False)
