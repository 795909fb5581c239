"""The Hugging Face directory a run works with: the user's own, or one made from the configuration."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from asympo_megatron.config import Config
from asympo_megatron.errors import ConfigError, UnknownNameError
from asympo_megatron.tasks.items import Source
from asympo_megatron.tasks.sources import open_source
from asympo_megatron.tasks.tokenizer import save_tokenizer

GYM_ITEMS, JSONL_ITEMS = 200, 20_000
"""Items that a tokenizer is made from. Generated ones can be slow and need few: one character brings its class."""

STAMP = "made_from.json"

_OLD_FIELDS = ("rope_theta", "rope_scaling", "torch_dtype")
"""Fields of config.json that transformers 5 accepts and keeps under another name."""


def prepare_model_dir(config: Config, run_dir: str | Path) -> Path:
    """Return the directory that holds config.json and the tokenizer, making it if the configuration asks for that.

    With model.path: that directory, checked. Else run_dir/model: config.json from model.hf, with vocabulary and special
    tokens of a tokenizer made for the task. Any number of processes may call this at the same time.

    Raises:
        ConfigError: model.path lacks files, or run_dir/model was made from another configuration.
        UnknownNameError: a model_type or field of model.hf that transformers does not know.
    """
    if config.model.path:
        return _check_given(Path(config.model.path))
    target = Path(run_dir) / "model"
    stamp = _stamp(config)
    if not target.is_dir():
        _make(config, target, stamp)
    found = (target / STAMP).read_text() if (target / STAMP).is_file() else "nothing known"
    if found != stamp:
        raise ConfigError(
            f"{target} was made from another model.hf or task ({found}; this configuration has {stamp}). "
            "Choose another run.name, or remove the directory and what was trained with it."
        )
    return target


def _check_given(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path {path} holds no config.json; give a Hugging Face model directory.")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ConfigError(
            f"model.path {path} holds no tokenizer (tokenizer.json, tokenizer_config.json or tokenizer.model); "
            "copy the files of the model's tokenizer there."
        )
    return path


def _stamp(config: Config) -> str:
    """Hash of what the directory is made from. Seed, size and rewards of the task do not touch the tokenizer."""
    task = config.task
    parts: tuple[Any, ...] = (config.model.hf, task.kind, task.name, task.options, task.system_prompt)
    if task.kind == "jsonl":
        parts = (*parts, task.path, task.prompt_field, task.answer_field)
    return json.dumps({"hash": hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:16]})


def _make(config: Config, target: Path, stamp: str) -> None:
    """Make the directory beside its place and rename it: readers see all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".model-", dir=target.parent))
    try:
        fields = _checked_fields(config.model.hf)
        # A fixed seed: a warm start and the run after it share the vocabulary whatever their seeds.
        source = open_source(dataclasses.replace(config.task, seed=0, size=GYM_ITEMS))
        fields.update(_save_sampled_tokenizer(draft, source, config.task.system_prompt or ""))
        (draft / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        (draft / STAMP).write_text(stamp)
        draft.chmod(0o755)
        os.rename(draft, target)
    except OSError:
        if not target.is_dir():  # else another process was first; its directory is as good as ours
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _save_sampled_tokenizer(folder: Path, source: Source, system_prompt: str) -> dict[str, int]:
    items = [source.item(position) for position in range(min(len(source), JSONL_ITEMS))]
    labels = [text for item in items if (text := item.label_text) is not None]
    return save_tokenizer(folder, [item.text for item in items], labels, fixed=system_prompt)


def _checked_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of model.hf, each known to the model_type: transformers would keep a misspelt one in silence."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = str(hf.get("model_type"))
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnknownNameError("model_type (model.hf)", model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    known = CONFIG_MAPPING[model_type]()
    for key in hf:
        if not hasattr(known, key) and key not in _OLD_FIELDS:
            names = [name for name in vars(known) if not name.startswith("_")]
            raise UnknownNameError(f"field of a {model_type} config.json (model.hf)", key, [*names, *_OLD_FIELDS])
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return {"architectures": [architecture], **hf}
