"""The marker of a complete checkpoint: what it holds, and whether a run may go on from it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from asympo_megatron.config import Config, data_hash
from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore.hf_config import ModelFacts

MARKER = "complete"
FORMAT = 2
MAX_STEP = 2**63 - 1


def make_marker(
    config: Config, facts: ModelFacts, *, step: int, ranks: int, dtype: str, checksum: str
) -> dict[str, Any]:
    """What a checkpoint of a run says of itself.

    Args:
        step: optimizer steps behind these weights.
        ranks: that saved it.
        dtype: of the weights (fp32 | bf16); another one is rounded when it is loaded.
        checksum: of the weights.
    """
    return {
        "format": FORMAT,
        "step": step,
        "layout": layout_of(config, ranks),
        "model": _model(facts),
        "data_hash": data_hash(config),
        "distributed": config.optimizer.distributed,
        "dtype": dtype,
        "checksum": checksum,
    }


def layout_of(config: Config, ranks: int) -> dict[str, Any]:
    """The parallel layout as a marker has it."""
    return {**dataclasses.asdict(config.parallel), "ranks": ranks}


def write_marker(directory: Path, marker: dict[str, Any]) -> None:
    """Declare a checkpoint complete."""
    with (directory / MARKER).open("w") as file:
        json.dump(marker, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_marker(directory: Path) -> dict[str, Any]:
    """The marker of a complete checkpoint.

    Raises:
        CheckpointError: there is none, or not one of ours.
    """
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} does not exist.")
    try:
        marker = json.loads((directory / MARKER).read_text())
    except (OSError, ValueError):
        marker = None
    if not isinstance(marker, dict):
        raise CheckpointError(
            f"checkpoint {directory} is incomplete: it has no {MARKER!r} file that can be read. Use an older one."
        )
    if marker.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {directory} has format {marker.get('format')}, expected {FORMAT}.")
    step, checksum, files = marker.get("step"), marker.get("checksum"), marker.get("files", {})
    if type(step) is not int or not 0 <= step <= MAX_STEP or not isinstance(checksum, str):
        raise CheckpointError(
            f"checkpoint {directory} is damaged: its {MARKER!r} file has step {step!r} and checksum {checksum!r}. "
            "Use an older one."
        )
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise CheckpointError(
            f"checkpoint {directory} is damaged: its {MARKER!r} file has files={files!r:.80}. Use an older one."
        )
    return marker


def check_model(marker: dict[str, Any], facts: ModelFacts, directory: Path) -> None:
    """The checkpoint is of this model.

    Raises:
        CheckpointError: the message names the first fact that differs.
    """
    saved = marker["model"]
    for name, value in _model(facts).items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"checkpoint {directory} holds a model with {name}={saved.get(name)}, this run has {name}={value}. "
                "Set model.path or model.hf to the model of the checkpoint."
            )


def check_run(marker: dict[str, Any], config: Config, directory: Path) -> None:
    """A run goes on with the data and the kind of optimizer it began with; another may start anew from its weights.

    Raises:
        CheckpointError: what differs, and how to start from the weights.
    """
    if marker["data_hash"] != data_hash(config):
        raise CheckpointError(
            f"checkpoint {directory} belongs to a run on other data (task, batch, sampling, replay or seed changed). "
            f"Set run.name to a new run; model.init={directory} starts it from these weights."
        )
    # Megatron's two kinds of optimizers write states that the other does not read.
    wanted = config.optimizer.distributed
    saved = marker.get("distributed", wanted)
    if saved != wanted:
        raise CheckpointError(
            f"checkpoint {directory} was saved with optimizer.distributed={str(saved).lower()}, this run has "
            f"{str(wanted).lower()}. Set it back, or set run.name to a new run; model.init={directory} starts it from "
            "these weights with a new optimizer."
        )


def _model(facts: ModelFacts) -> dict[str, Any]:
    """The facts as JSON reads them back."""
    fields = dataclasses.asdict(facts)
    moe = fields.pop("moe")
    if moe is not None:
        del moe["aux_loss_coef"]  # of training, not of the model
        moe["dense_layers"] = list(moe["dense_layers"])
    return {**fields.pop("family"), **fields, "moe": moe}
