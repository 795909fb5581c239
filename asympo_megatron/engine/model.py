"""The served model: loading it, reading new weights beside it, replacing its weights, checksums."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from asympo_megatron.engine.options import EngineOptions
from asympo_megatron.errors import EngineError, PublishError
from asympo_megatron.sync.manifest import MANIFEST_NAME, verify_version

_DTYPES: dict[str, Any] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}
_ATTENTION_TYPES = {"full_attention", "sliding_attention"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A causal LM with what requests are checked against."""

    module: Any
    tokenizer: Any | None
    eos_ids: frozenset[int]
    vocab_size: int
    context_length: int

    @property
    def num_layers(self) -> int:
        return self.module.config.num_hidden_layers

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text of token ids, empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def load_model(options: EngineOptions) -> ServedModel:
    """Load config, weights and, where there is one, tokenizer.

    Raises:
        EngineError: no such model, or one whose cache is not keys and values of attention.
    """
    path = Path(options.model_path)
    if not (path / "config.json").is_file():
        raise EngineError(f"{path} has no config.json. Set the engine's model_path to a Hugging Face directory.")
    config = AutoConfig.from_pretrained(path)
    other = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_TYPES
    if other:
        raise EngineError(
            f"{path} has layers of type {sorted(other)}; the embedded engine batches attention only. Use a real server."
        )
    if options.load_format == "dummy":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            dtype = _DTYPES[options.dtype]
            chosen = {} if dtype == "auto" else {"dtype": dtype}
            module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", **chosen)
    else:
        module = _from_pretrained(path, _DTYPES[options.dtype])
    tokenizer = _load_tokenizer(path)
    longest = getattr(config, "max_position_embeddings", None) or 2048
    return ServedModel(
        module=module.eval().requires_grad_(False),
        tokenizer=tokenizer,
        eos_ids=_eos_ids(path, config, tokenizer),
        vocab_size=config.vocab_size,
        context_length=min(options.context_length or longest, longest),
    )


def read_weights(model: ServedModel, path: str | Path) -> dict[str, Tensor]:
    """Read and check the weights of another directory without touching the served ones.

    A manifest is verified if there is one. Names that do not match (layers that transformers fuses when it loads) take
    the slower way through transformers.

    Raises:
        EngineError: the directory is missing, damaged, or does not fit the served model; the message names the tensor.
    """
    path = Path(path)
    if not path.is_dir():
        raise EngineError(f"Failed to get weights iterator: {path} is not a directory.")
    try:
        if (path / MANIFEST_NAME).exists():
            verify_version(path)
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise EngineError(f"Failed to get weights iterator: {path} has no safetensors file.")
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (PublishError, SafetensorError, OSError) as error:
        raise EngineError(f"Failed to load weights: {error}") from error
    current = model.module.state_dict()
    if _missing(current, weights) or set(weights) - set(current):
        weights = _from_pretrained(path, "auto").state_dict()
    if missing := _missing(current, weights):
        raise EngineError(f"Failed to load weights: {path} lacks {missing[0]} ({len(missing)} missing in all).")
    check_names(model, weights, str(path))
    return weights


def check_names(model: ServedModel, weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that the served model does not have, or has in another shape.

    Raises:
        EngineError: the message names the tensor and where it came from.
    """
    current = model.module.state_dict()
    for name, tensor in weights.items():
        if name not in current:
            raise EngineError(f"Failed to load weights: {source} has {name}, which the served model has not.")
        if tensor.shape != current[name].shape:
            raise EngineError(
                f"Failed to load weights: {name} in {source} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(current[name].shape)}: it is another model."
            )


@torch.no_grad()
def replace_weights(model: ServedModel, weights: Mapping[str, Tensor]) -> None:
    """Copy checked weights into the served model."""
    current = model.module.state_dict()
    for name, tensor in weights.items():
        current[name].copy_(tensor)


def weight_checksums(model: ServedModel) -> dict[str, str]:
    """A digest of each tensor's bytes, as SGLang takes it on a CPU, by Hugging Face name."""
    return {
        name: hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).numpy()).hexdigest()[:16]
        for name, tensor in model.module.state_dict().items()
    }


def _from_pretrained(path: Path, dtype: Any) -> Any:
    auto: Any = AutoModelForCausalLM
    try:
        module, report = auto.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise EngineError(f"Failed to load weights of {path}: {error}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise EngineError(
            f"Failed to load weights of {path}: missing {sorted(report['missing_keys'])}, "
            f"of another shape {sorted(map(str, report['mismatched_keys']))}."
        )
    return module


def _missing(current: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Names without a value; tied names share storage, and one of them is enough."""
    given = {current[name].data_ptr() for name in weights if name in current}
    return [name for name, tensor in current.items() if name not in weights and tensor.data_ptr() not in given]


def _load_tokenizer(path: Path) -> Any | None:
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        logger.warning("%s has no tokenizer: answers carry token ids and an empty text", path)
        return None
    return AutoTokenizer.from_pretrained(path, use_fast=True)


def _eos_ids(path: Path, config: Any, tokenizer: Any | None) -> frozenset[int]:
    sources = [config.eos_token_id]
    if (path / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(path).eos_token_id)
    if tokenizer is not None:
        sources.append(tokenizer.eos_token_id)
    ids: set[int] = set()
    for source in sources:
        if source is not None:
            ids.update(source if isinstance(source, list) else [source])
    return frozenset(ids)
