"""The name maps of conversion against Megatron-Bridge's own, parameter by parameter, both ways, bit by bit.

Bridge imports Transformer Engine and Triton beside its maps; where they are not installed, placeholders stand in for
them: no weight goes through one.
"""

import inspect
import json
import re
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from asympo_megatron.mcore import initialize, shutdown  # Megatron-Core comes before any placeholder

pytestmark = pytest.mark.slow

ABSENT = ("transformer_engine", "triton")

SMALL = {
    "vocab_size": 71,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": False},
    "qwen3_moe": {"head_dim": 8, "tie_word_embeddings": False, **EXPERTS},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None, "head_dim": 8},
}


class _Named(type):
    def __call__(cls, *args: Any, **_: Any) -> Any:
        """As a decorator: gives back the function, or waits for it."""
        return args[0] if args and callable(args[0]) else cls

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type.__call__(_Named, name, (), {})


class _Placeholder(ModuleType):
    __version__ = "999"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type.__call__(_Named, name, (), {})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = tuple(f"{name}." for name in names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if f"{fullname}.".startswith(self._names) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@pytest.fixture(scope="module")
def auto_bridge() -> Any:
    if find_spec("megatron.bridge") is None:
        pytest.skip("Megatron-Bridge is not there: make test-integration-bridge_maps")
    absent = tuple(name for name in ABSENT if PathFinder.find_spec(name) is None)
    sys.meta_path.append(_Finder(absent))
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.param_mapping import AutoMapping

    AutoMapping.register_module_type("OutputLayer", "column")
    AutoMapping.register_module_type("BalancedRouter", "replicated")
    return AutoBridge


@pytest.fixture(autouse=True)
def _one_rank() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    shutdown()
    torch.set_num_threads(threads)


def _save(family: str, directory: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(family.removesuffix("-tied"), **SMALL, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.3)  # norms at one and biases at zero would hide a mix-up
    model.save_pretrained(directory)
    from safetensors.torch import load_file

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
    inspect.signature(auto_bridge.from_hf_pretrained).bind("model")
    inspect.signature(auto_bridge.import_ckpt).bind("model", "checkpoint")
    inspect.signature(auto_bridge.export_ckpt).bind(None, "checkpoint", "model", show_progress=False)
