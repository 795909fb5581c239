"""Every family: the same logits as transformers, and the same bits after a round trip."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_programs import build
from safetensors.torch import load_file, save_file

from asympo_megatron.conversion import export_hf, load_hf
from asympo_megatron.conversion.hf_files import INDEX, SINGLE
from asympo_megatron.conversion.names import LAYERS
from asympo_megatron.errors import CheckpointError, ConfigError
from asympo_megatron.mcore import Learner, Row
from asympo_megatron.mcore.collate import collate
from asympo_megatron.mcore.model import unwrap

pytestmark = pytest.mark.usefixtures("one_rank")

KINDS = ("qwen3", "qwen3-untied", "qwen2", "qwen2-untied", "llama", "llama3-rope", "mistral")
MakeHF = Callable[..., tuple[Any, Path]]


def _loaded(directory: Path) -> tuple[Any, Learner]:
    layout, learner = build(json.loads((directory / "config.json").read_text()))
    load_hf(learner, directory)
    return layout, learner


@torch.no_grad()
def _our_logits(learner: Learner, layout: Any, sequences: list[list[int]]) -> torch.Tensor:
    """Logits of all positions that predict a next token: hidden states before the output layer times its weight."""
    batch = collate([Row(ids[:1], ids[1:], [1] * (len(ids) - 1), 0.0) for ids in sequences], layout)
    model = unwrap(learner.chunks[0])
    hidden = []
    hook = model.output_layer.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    nll_and_entropy = model(batch.tokens, None, None, labels=batch.targets, packed_seq_params=batch.packed)
    hook.remove()
    weight = model.output_layer.weight
    logits = hidden[0].squeeze(1) @ (model.shared_embedding_or_output_weight() if weight is None else weight).T
    logprobs = logits.log_softmax(-1)
    torch.testing.assert_close(nll_and_entropy[0], -logprobs.gather(1, batch.targets.T)[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll_and_entropy[1], -(logprobs.exp() * logprobs).sum(-1), rtol=1e-5, atol=1e-5)
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_round_trip(make_hf: MakeHF, kind: str) -> None:
    model, directory = make_hf(kind)
    layout, learner = _loaded(directory)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 71, (size,), generator=generator).tolist() for size in (33, 7, 60, 2, 31)]
    with torch.no_grad():
        wanted = torch.cat([model(torch.tensor([ids])).logits[0, :-1] for ids in sequences])
    got = _our_logits(learner, layout, sequences)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    exported = dict(export_hf(learner))
    original = {name: value for name, value in model.state_dict().items() if name in exported}
    assert set(load_file(directory / SINGLE)) == set(exported)
    for name, tensor in exported.items():
        assert torch.equal(tensor, original[name]), name


def test_swapped_projections_are_noticed(make_hf: MakeHF) -> None:
    """Mutant: gate and up exchanged have the right shapes and the wrong logits."""
    model, directory = make_hf("llama")
    tensors = load_file(directory / SINGLE)
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, str(directory / SINGLE))
    layout, learner = _loaded(directory)
    ids = list(range(20))
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, :-1]
    assert (_our_logits(learner, layout, [ids]) - wanted).abs().max() > 1e-2


def test_sharded_safetensors(make_hf: MakeHF) -> None:
    model, directory = make_hf("qwen3-untied", shard_size="20KB")
    assert (directory / INDEX).is_file()
    _, learner = _loaded(directory)
    for name, tensor in export_hf(learner):
        assert torch.equal(tensor, model.state_dict()[name]), name


def _edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, str(directory / SINGLE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lack 1 tensor.*model.norm.weight"),
        (lambda t: t.update({"model.norm.bias": torch.zeros(3)}), "no place for, e.g. model.norm.bias"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r"model.norm.weight has shape \(3,\), but config.json says \(32,\)",
        ),
    ],
)
def test_files_that_do_not_fit(make_hf: MakeHF, change: Any, message: str) -> None:
    _, directory = make_hf("llama")
    _edit(directory, change)
    with pytest.raises(CheckpointError, match=message):
        _loaded(directory)


def test_damaged_and_missing_files(make_hf: MakeHF, tmp_path: Path) -> None:
    _, directory = make_hf("llama")
    _, learner = _loaded(directory)
    before = learner.checksum()
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor .*model.path"):
        load_hf(learner, tmp_path)
    (directory / SINGLE).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_hf(learner, directory)
    assert learner.checksum() == before


@pytest.mark.parametrize("extra", [True, False])
def test_parameters_that_the_map_does_not_know_are_not_dropped(
    make_hf: MakeHF, monkeypatch: pytest.MonkeyPatch, extra: bool
) -> None:
    """Biases that only one side has: an engine would serve another model than the one that trains."""
    _, directory = make_hf("qwen2")
    _, learner = _loaded(directory)
    bias = "decoder.layers.0.self_attention.linear_qkv.bias"
    if extra:
        monkeypatch.setitem(LAYERS, "qwen2", LAYERS["llama"])
        with pytest.raises(ConfigError, match=rf"parameters without a Hugging Face name: {bias}.*model_type=qwen2"):
            next(export_hf(learner))
    else:
        held = [shard for shard in learner.shards() if shard.name != bias]
        monkeypatch.setattr(learner, "shards", lambda: iter(held))
        with pytest.raises(ConfigError, match=rf"the model lacks: {bias} \(1 in all\)"):
            next(export_hf(learner))
