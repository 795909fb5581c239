"""`asympo convert`: there and back bit for bit, what Megatron reads, and what it says of damaged input."""

import argparse
import enum
import inspect
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_programs import build
from safetensors.torch import load_file, save_file

from asympo_megatron.cli.main import main
from asympo_megatron.config import Config, RunDir, load_config, override_config
from asympo_megatron.conversion import hf_to_megatron, load_hf, megatron_to_hf
from asympo_megatron.conversion.hf_files import INDEX, SINGLE
from asympo_megatron.conversion.megatron_weights import MODEL_FILES
from asympo_megatron.conversion.torch_dist import COMMON, CONFIG, METADATA, SHARED_STATE
from asympo_megatron.errors import AsympoError, CheckpointError, ConfigError
from asympo_megatron.mcore import shutdown
from asympo_megatron.mcore.marker import MARKER

pytestmark = pytest.mark.usefixtures("one_rank")

MakeHF = Callable[..., tuple[Any, Path]]


def _config(source: Path, *overrides: str) -> Config:
    base = Config()
    base.model.path = str(source)
    return override_config(base, overrides)


def _convert(source: Path, target: Path, *overrides: str) -> Path:
    hf_to_megatron(_config(source, *overrides), source, target)
    return target


def _same_tensors(first: Path, second: Path) -> None:
    one, other = load_file(first / SINGLE), load_file(second / SINGLE)
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", ["qwen3-untied", "qwen2", "llama3-rope"])
def test_there_and_back_bit_for_bit(make_hf: MakeHF, tmp_path: Path, kind: str) -> None:
    """Three steps that could each change a bit: into the checkpoint, from it into a learner, and back."""
    _, source = make_hf(kind)
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    seen: list[tuple[int, int]] = []
    hf_to_megatron(_config(source, "parallel.tensor=2"), source, tmp_path / "m", lambda *done: seen.append(done))
    assert seen == [(number, len(seen)) for number in range(1, len(seen) + 1)]
    hf = json.loads((source / "config.json").read_text())
    _, wanted = build(hf)
    load_hf(wanted, source)
    checksum = wanted.checksum()
    shutdown()
    _, learner = build(hf)
    learner.load(tmp_path / "m", weights_only=True)  # through Megatron's own reader
    assert learner.checksum() == checksum == json.loads((tmp_path / "m" / MARKER).read_text())["checksum"]
    shutdown()
    megatron_to_hf(tmp_path / "m", tmp_path / "back")
    _same_tensors(source, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == '{"chat_template": "{{ messages }}"}'
    assert json.loads((tmp_path / "back" / "manifest.json").read_text())["checksum"] == checksum


def test_bf16_shards_and_their_index(make_hf: MakeHF, tmp_path: Path) -> None:
    model, source = make_hf("llama")
    shutil.rmtree(source)
    model.bfloat16().save_pretrained(source, max_shard_size="15KB")
    assert (source / INDEX).is_file()
    _convert(source, tmp_path / "m")
    assert json.loads((tmp_path / "m" / MARKER).read_text())["dtype"] == "bf16"
    megatron_to_hf(tmp_path / "m", tmp_path / "back", shard_bytes=15_000)
    files = json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"]
    assert len(set(files.values())) > 2
    for name, file in files.items():
        assert torch.equal(load_file(tmp_path / "back" / file)[name], model.state_dict()[name]), name
    megatron_to_hf(tmp_path / "m", tmp_path / "wide", dtype=torch.float32)
    assert {tensor.dtype for tensor in load_file(tmp_path / "wide" / SINGLE).values()} == {torch.float32}


def test_the_layout_is_checked_against_the_model(make_hf: MakeHF, tmp_path: Path) -> None:
    _, source = make_hf("llama")
    with pytest.raises(ConfigError, match=r"num_attention_heads=4 .*parallel.tensor=8.*divisor of 4"):
        _convert(source, tmp_path / "m", "parallel.tensor=8")
    with pytest.raises(ConfigError, match=r"num_hidden_layers=2 is not divisible by parallel.pipeline=4"):
        _convert(source, tmp_path / "m", "parallel.pipeline=4")
    assert not (tmp_path / "m").exists()


def test_a_layout_with_stages_of_other_sizes(make_hf: MakeHF, tmp_path: Path) -> None:
    """A checkpoint has no layout: what is made for one is the same for all."""
    _, source = make_hf("mistral")
    _convert(source, tmp_path / "m", "parallel.pipeline=2", "model.megatron.num_layers_in_first_pipeline_stage=1")
    megatron_to_hf(tmp_path / "m", tmp_path / "back")
    _same_tensors(source, tmp_path / "back")


def test_a_run_is_exported_with_the_model_that_it_began_with(make_hf: MakeHF, tmp_path: Path) -> None:
    _, source = make_hf("qwen3")
    config = load_config("quickstart", [f"model.path={source}", "model.hf={}", f"run.root={tmp_path}"])
    run = RunDir.of(config)
    run.create(config)
    _convert(source, run.checkpoint(0))
    shutil.rmtree(run.checkpoint(0) / MODEL_FILES)
    megatron_to_hf(run.path, tmp_path / "back")
    _same_tensors(source, tmp_path / "back")


@pytest.mark.parametrize("arguments", [COMMON, SHARED_STATE])
def test_a_foreign_checkpoint_that_keeps_layers_apart(make_hf: MakeHF, tmp_path: Path, arguments: str) -> None:
    """As Megatron-LM writes it: numbered iterations, padded vocabulary, one key a layer, arguments in either place."""
    _, source = make_hf("qwen3")
    foreign = tmp_path / "run" / "iter_0000020"
    _save_as_megatron_lm(source, foreign, arguments, tmp_path / "touched")
    assert (foreign / COMMON).exists() == (arguments == COMMON)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("20")
    (tmp_path / "config.yaml").write_text("another: program")
    megatron_to_hf(tmp_path / "run", tmp_path / "back", model_files=source)
    _same_tensors(source, tmp_path / "back")
    with pytest.raises(CheckpointError, match=r"has no config.json.*--hf DIR"):
        megatron_to_hf(foreign, tmp_path / "other")
    wrong = tmp_path / "wrong"
    shutil.copytree(source, wrong)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"trained with ffn_hidden_size=48, but config.json says 64"):
        megatron_to_hf(foreign, tmp_path / "other", model_files=wrong)
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "touched").exists(), "code among the arguments was run"


class _Backend(enum.Enum):
    FLASH = 1


def _save_as_megatron_lm(source: Path, directory: Path, place: str, touched: Path) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from asympo_megatron.mcore.checkpoint_save import in_process_results
    from asympo_megatron.mcore.model import unwrap

    _, learner = build(json.loads((source / "config.json").read_text()))
    load_hf(learner, source)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"non_homogeneous_layers": True, "singleton_local_shards": False, "dp_cp_group": group}
    state = unwrap(learner.chunks[0]).sharded_state_dict(metadata=metadata)
    embedding = state["embedding.word_embeddings.weight"]
    embedding.data = torch.cat([embedding.data, torch.zeros(57, 32)])  # 71 rows padded to 128
    embedding.local_shape, embedding.global_shape = (128, 32), (128, 32)
    arguments = argparse.Namespace(num_layers=2, ffn_hidden_size=48, backend=_Backend.FLASH, evil=_Evil(touched))
    shared = {"args": arguments, "iteration": 20}
    whole = {"model": state, "common_state": ShardedObject("common_state", shared, (1,), (0,))}
    directory.mkdir(parents=True)
    with in_process_results():
        # Megatron-Core 0.19 puts what is not sharded there itself.
        newest = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
        dist_checkpointing.save({"model": state, **shared} if newest else whole, str(directory))
    (directory / COMMON).unlink(missing_ok=True)
    if place == COMMON:
        torch.save(shared, directory / COMMON)
    shutdown()


class _Evil:
    def __init__(self, touched: Path) -> None:
        self._touched = touched

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._touched),)


@pytest.mark.parametrize("file", [METADATA, COMMON])
def test_pickled_code_is_never_run(make_hf: MakeHF, tmp_path: Path, file: str) -> None:
    _, source = make_hf("llama")
    checkpoint = _convert(source, tmp_path / "m")
    evil = _Evil(tmp_path / "touched")
    if file == METADATA:
        (checkpoint / file).write_bytes(pickle.dumps(evil))
        with pytest.raises(CheckpointError, match=r"refused: it asks for posix.mkdir.*Do not trust"):
            megatron_to_hf(checkpoint, tmp_path / "back")
    else:
        torch.save({"args": argparse.Namespace(num_layers=2), "evil": evil}, checkpoint / file)
        megatron_to_hf(checkpoint, tmp_path / "back")
        _same_tensors(source, tmp_path / "back")
    assert not (tmp_path / "touched").exists()


def _edit_header(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = (directory / SINGLE).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (directory / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _edit_config(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))


def _rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def _index(directory: Path, text: str) -> None:
    (directory / SINGLE).rename(directory / "model-00001-of-00002.safetensors")
    (directory / INDEX).write_text(text)


NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda d: os.truncate(d / SINGLE, 5000), "cannot be read.*damaged or incomplete: copy it again"),
    "empty": (lambda d: os.truncate(d / SINGLE, 0), "cannot be read.*copy it again"),
    "header": (lambda d: (d / SINGLE).write_bytes(b"\xff" * 64), "cannot be read"),
    "offsets": (lambda d: _edit_header(d, lambda h: h[NORM].update(data_offsets=[0, 9])), "cannot be read"),
    "missing": (lambda d: _rewrite(d, lambda t: t.pop(NORM)), f"lack 1 tensor.*{NORM}"),
    "extra": (lambda d: _rewrite(d, lambda t: t.update(x=torch.ones(1))), "no place for, e.g. x"),
    "dtype": (lambda d: _rewrite(d, lambda t: t.update({NORM: t[NORM].to(torch.int8)})), "dtype I8.*Quantized"),
    "mixed": (
        lambda d: _rewrite(d, lambda t: t.update({(n := "model.layers.0.mlp.up_proj.weight"): t[n].half()})),
        "tensors of one parameter differ in dtype",
    ),
    "index": (lambda d: _index(d, "[]"), "is not an index of safetensors"),
    "index file": (
        lambda d: _index(d, json.dumps({"weight_map": {NORM: "model-00009-of-00002.safetensors"}})),
        "model-00009-of-00002.safetensors is missing",
    ),
    "index path": (
        lambda d: _index(d, json.dumps({"weight_map": {NORM: "../elsewhere.safetensors"}})),
        r"names the file '\.\./elsewhere.safetensors'; expected a .safetensors file beside it",
    ),
    "no weights": (lambda d: (d / SINGLE).unlink(), "has neither model.safetensors nor"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no readable config.json"),
    "config text": (lambda d: (d / "config.json").write_text("{"), "has no readable config.json"),
    "config list": (lambda d: (d / "config.json").write_text("[]"), "holds a list, expected a mapping"),
    "config lies": (lambda d: _edit_config(d, intermediate_size=64), r"has shape \(48, 32\), but config.json says"),
    "config layers": (lambda d: _edit_config(d, num_hidden_layers=4), "lack 18 tensor"),
    "config heads": (lambda d: _edit_config(d, num_attention_heads=3), "not divisible by num_key_value_heads"),
    "unknown model": (lambda d: _edit_config(d, model_type="gpt5"), "unknown model_type"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_input_gives_one_clear_error_and_no_output(make_hf: MakeHF, tmp_path: Path, damage: str) -> None:
    _, source = make_hf("llama")
    change, message = DAMAGE[damage]
    change(source)
    with pytest.raises(AsympoError, match=message):
        _convert(source, tmp_path / "out" / "m")
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def _lie_about_dtype(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    metadata.state_dict_metadata["decoder.final_layernorm.weight"].properties.dtype = torch.bfloat16
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


DAMAGED_CHECKPOINT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no format": (lambda d: (d / CONFIG).unlink(), "no complete checkpoint|no Megatron checkpoint"),
    "other format": (lambda d: (d / CONFIG).write_text('{"sharded_backend": "zarr"}'), "'zarr'; only torch_dist"),
    "metadata": (lambda d: (d / METADATA).write_bytes(b"junk"), "cannot be read.*Copy it again"),
    "dtype": (
        _lie_about_dtype,
        r"final_layernorm.weight is stored as torch.float32, but .metadata says torch.bfloat16",
    ),
    "no data": (lambda d: (d / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "cut data": (lambda d: os.truncate(d / "__0_0.distcp", 9000), "cannot be read.*Copy the damaged files again"),
    "arguments": (lambda d: (d / COMMON).write_bytes(b"junk"), "common.pt cannot be read"),
    "vocabulary": (lambda d: _edit_config(d / MODEL_FILES, vocab_size=99), r"shape \(71, 32\), but config.json says"),
    "fewer layers": (
        lambda d: _edit_config(d / MODEL_FILES, num_hidden_layers=1),
        r"has shape \(2, 32\), but config.json says \(1, 32\)",
    ),
    "tied": (lambda d: _edit_config(d / MODEL_FILES, tie_word_embeddings=True), "no place for, e.g. output_layer"),
}


@pytest.mark.parametrize("damage", DAMAGED_CHECKPOINT)
def test_damaged_checkpoints_too(make_hf: MakeHF, tmp_path: Path, damage: str) -> None:
    _, source = make_hf("llama")
    checkpoint = _convert(source, tmp_path / "m")
    change, message = DAMAGED_CHECKPOINT[damage]
    change(checkpoint)
    with pytest.raises(AsympoError, match=message):
        megatron_to_hf(checkpoint, tmp_path / "out" / "back")
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def test_commands_and_exit_codes(make_hf: MakeHF, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, source = make_hf("llama")
    assert main(["convert", "hf-to-megatron", str(source), str(tmp_path / "m"), "parallel.pipeline=2"]) == 0
    assert "model.init=" in capsys.readouterr().out
    assert main(["convert", "hf-to-megatron", str(source), str(tmp_path / "m")]) == 1
    assert "exists already; nothing is overwritten" in capsys.readouterr().err
    assert main(["convert", "hf-to-megatron", str(source), str(tmp_path / "n"), "parallel.tensr=2"]) == 2
    assert "did you mean 'tensor'" in capsys.readouterr().err
    assert main(["convert", "megatron-to-hf", str(tmp_path / "m"), str(tmp_path / "h"), "--dtype", "bf16"]) == 0
    assert load_file(tmp_path / "h" / SINGLE)[NORM].dtype == torch.bfloat16
