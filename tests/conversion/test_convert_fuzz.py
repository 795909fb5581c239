"""Files with random damage: conversion gives the right bits or says what is wrong, and leaves nothing half-done."""

import errno
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asympo_megatron import files
from asympo_megatron.config import Config, override_config
from asympo_megatron.conversion import convert, hf_to_megatron, megatron_to_hf
from asympo_megatron.conversion.hf_files import INDEX, SINGLE
from asympo_megatron.conversion.megatron_weights import MODEL_FILES
from asympo_megatron.conversion.torch_dist import CONFIG, DATA, METADATA
from asympo_megatron.errors import AsympoError, CheckpointError
from asympo_megatron.mcore.marker import MARKER

pytestmark = pytest.mark.usefixtures("one_rank")

MakeHF = Callable[..., tuple[Any, Path]]


def _convert(source: Path, target: Path, **options: Any) -> None:
    base = Config()
    base.model.path = str(source)
    hf_to_megatron(override_config(base, []), source, target, **options)


def _cut(file: Path, rng: random.Random, _: int) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def _flip(file: Path, rng: random.Random, end: int) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 4])):
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _insert(file: Path, rng: random.Random, end: int) -> None:
    data = file.read_bytes()
    place = rng.randrange(min(end, len(data)))
    file.write_bytes(data[:place] + rng.randbytes(rng.choice([1, 8])) + data[place:])


def _header_size(file: Path) -> int:
    return 8 + int(struct.unpack("<Q", file.read_bytes()[:8])[0])


def _values(file: Path, rng: random.Random, _: int) -> None:
    """Another value somewhere in a JSON file."""
    document = json.loads(file.read_text())
    part = document
    while isinstance(part, dict) and part:
        key = rng.choice(sorted(part))
        if not isinstance(part[key], dict) or rng.random() < 0.3:
            part[key] = rng.choice([None, -1, 0, 7, 2.5, "x", [], {}, True, 10**30, "../x.safetensors"])
            break
        part = part[key]
    file.write_text(json.dumps(document))


def _damage_hf(source: Path, rng: random.Random) -> None:
    shard = rng.choice(sorted(source.glob("*.safetensors")))
    file, change = rng.choice(
        [
            (shard, _cut),
            (shard, _flip),
            (shard, _insert),
            (source / INDEX, _values),
            (source / INDEX, _flip),
            (source / "config.json", _values),
            (source / "config.json", _values),
            (source / "config.json", _flip),
        ]
    )
    change(file, rng, _header_size(file) if file == shard else file.stat().st_size)


def _damage_checkpoint(checkpoint: Path, rng: random.Random) -> None:
    bytes_of = [(name, change) for name in (METADATA, DATA, CONFIG, MARKER) for change in (_cut, _flip, _insert)]
    values_of = [(name, _values) for name in (CONFIG, MARKER, f"{MODEL_FILES}/config.json")]
    name, change = rng.choice([*bytes_of, *values_of * 2])
    change(checkpoint / name, rng, (checkpoint / name).stat().st_size)


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


def _error(convert: Callable[[], None]) -> str | None:
    try:
        convert()
    except AsympoError as error:
        return str(error)
    return None


SEEDS = [range(10), pytest.param(range(10, 300), marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", SEEDS, ids=["few", "many"])
def test_damaged_model_files(make_hf: MakeHF, tmp_path: Path, seeds: range) -> None:
    _, good = make_hf("llama", shard_size="20KB")
    assert len(list(good.glob("*.safetensors"))) > 1
    outcomes = set()
    for seed in seeds:
        source, out = tmp_path / f"source-{seed}", tmp_path / f"out-{seed}"
        shutil.copytree(good, source)
        _damage_hf(source, random.Random(seed))
        error = _error(lambda: _convert(source, out / "m"))  # noqa: B023
        if error is not None:
            assert error, seed
            assert not out.exists() or os.listdir(out) == [], seed
            outcomes.add("refused")
        else:
            megatron_to_hf(out / "m", out / "back")
            _same(_tensors(out / "back"), _tensors(source))
            outcomes.add("converted")
    assert outcomes == {"refused", "converted"}


def test_one_bit_of_a_weight_is_noticed(make_hf: MakeHF, tmp_path: Path) -> None:
    _, source = make_hf("qwen2")
    _convert(source, tmp_path / "m")
    weight = load_file(source / SINGLE)["model.layers.1.mlp.down_proj.weight"].numpy().tobytes()
    data = bytearray((tmp_path / "m" / DATA).read_bytes())
    data[data.index(weight) + 9] ^= 1
    (tmp_path / "m" / DATA).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"was saved with weights of checksum .*: its files are damaged"):
        megatron_to_hf(tmp_path / "m", tmp_path / "out" / "back")
    assert os.listdir(tmp_path / "out") == []


def test_an_output_layer_that_is_no_copy_of_tied_embeddings(make_hf: MakeHF, tmp_path: Path) -> None:
    _, source = make_hf("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"ties the embeddings .*lm_head.weight differs from model.embed_tokens"):
        _convert(source, tmp_path / "m")
    tensors = load_file(source / SINGLE)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / SINGLE)
    _convert(source, tmp_path / "m")


@pytest.mark.parametrize("text", ["", "x", "-1", "\u0661"])
def test_a_damaged_iteration(tmp_path: Path, text: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError, match="expected an iteration"):
        megatron_to_hf(tmp_path, tmp_path / "back")


@pytest.mark.parametrize("seeds", SEEDS, ids=["few", "many"])
def test_damaged_checkpoint_files(make_hf: MakeHF, tmp_path: Path, seeds: range) -> None:
    _, source = make_hf("qwen2")
    _convert(source, tmp_path / "good")
    outcomes = set()
    for seed in seeds:
        checkpoint, out = tmp_path / f"m-{seed}", tmp_path / f"out-{seed}"
        shutil.copytree(tmp_path / "good", checkpoint)
        _damage_checkpoint(checkpoint, random.Random(seed))
        error = _error(lambda: megatron_to_hf(checkpoint, out / "back"))  # noqa: B023
        if error is not None:
            assert error, seed
            assert not out.exists() or os.listdir(out) == [], seed
            outcomes.add("refused")
        else:
            _same(_tensors(out / "back"), _tensors(source))
            outcomes.add("converted")
    assert outcomes == {"refused", "converted"}


def _interrupt(done: int, _: int) -> None:
    if done == 5:
        raise KeyboardInterrupt


def test_an_interrupted_conversion_leaves_nothing(make_hf: MakeHF, tmp_path: Path) -> None:
    _, source = make_hf("llama")
    with pytest.raises(KeyboardInterrupt):
        _convert(source, tmp_path / "out" / "m", progress=_interrupt)
    assert os.listdir(tmp_path / "out") == []
    _convert(source, tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        megatron_to_hf(tmp_path / "m", tmp_path / "out" / "back", progress=_interrupt)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("good_ones", [0, 2])
def test_a_disk_that_fails_while_more_is_written(
    make_hf: MakeHF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_ones: int
) -> None:
    _, source = make_hf("llama")
    calls = []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > good_ones:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "FLUSH_BYTES", 1)
    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(CheckpointError, match=r"could not be written: .*Input/output error"):
        _convert(source, tmp_path / "out" / "m")
    assert os.listdir(tmp_path / "out") == []


def test_a_killed_conversion_leaves_nothing_that_looks_whole(
    make_hf: MakeHF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after SIGKILL: nobody removes the temporary directory."""
    _, source = make_hf("llama")
    with monkeypatch.context() as killed:
        killed.setattr(convert.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            _convert(source, tmp_path / "out" / "m", progress=_interrupt)
    (left,) = (tmp_path / "out").iterdir()
    assert left.name.startswith(".m.")
    with pytest.raises(AsympoError, match="holds no complete Megatron checkpoint"):
        megatron_to_hf(left, tmp_path / "back")
    _convert(source, tmp_path / "out" / "m")
    megatron_to_hf(tmp_path / "out" / "m", tmp_path / "back")
    _same(_tensors(tmp_path / "back"), _tensors(source))
