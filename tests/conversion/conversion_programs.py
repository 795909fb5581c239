"""Programs that test ranks run (see asympo_megatron.testing.megatron); not tests themselves."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from asympo_megatron.config import Config
from asympo_megatron.config.validate import validate
from asympo_megatron.conversion import export_hf, load_hf
from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore import Layout, Learner, initialize, shutdown
from asympo_megatron.objectives import build_objective
from asympo_megatron.testing.megatron import join_group

PROGRAM = __file__


def make_config(**parallel: Any) -> Config:
    """A configuration that only builds a model."""
    config = Config()
    config.model.hf = {"model_type": "qwen3"}
    config.rollout.source = "supervised"
    config.objective.name = "sft"
    config.advantage.estimator = "none"
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    validate(config)
    return config


def build(hf: dict[str, Any], **parallel: Any) -> tuple[Layout, Learner]:
    """A learner with random weights."""
    config = make_config(**parallel)
    layout = initialize(config)
    return layout, Learner(config, hf, build_objective("asympo"), layout)


def layouts(payload: dict[str, Any]) -> dict[str, Any]:
    """Load a Hugging Face directory and export it again, in several layouts."""
    results: dict[str, Any] = {}
    for name, case in payload["cases"].items():
        join_group(name)
        layout, learner = build(case["hf"], **case["parallel"])
        result: dict[str, Any] = {}
        try:
            load_hf(learner, case["source"])
            result["checksum"] = learner.checksum()
            tensors = list(export_hf(learner))
            result["shapes"] = {key: list(tensor.shape) for key, tensor in tensors}
            if layout.rank == 0:
                save_file(dict(tensors), str(Path(case["target"])))
            else:
                assert all(tensor.device.type == "meta" for _, tensor in tensors)
        except CheckpointError as error:
            result["error"] = str(error)
        finally:
            shutdown()
        results[name] = result
    torch.manual_seed(0)
    return results


def reload(payload: dict[str, Any]) -> dict[str, Any]:
    """Load a converted checkpoint in several layouts and save it again from there; the checksums."""
    results: dict[str, Any] = {}
    for name, case in payload["cases"].items():
        join_group(name)
        _, learner = build(case["hf"], **case["parallel"])
        try:
            learner.load(case["source"], weights_only=True)
            results[name] = learner.checksum()
            learner.save(case["target"])
        finally:
            shutdown()
    return results
