"""Qwen3-MoE: the logits, gradients and bits of transformers, experts and router included."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_programs import PROGRAM, build, make_config
from safetensors.torch import load_file, save_file

from asympo_megatron.config import load_config
from asympo_megatron.conversion import export_hf, hf_to_megatron, load_hf, megatron_to_hf
from asympo_megatron.conversion.names import entries
from asympo_megatron.conversion.tensors import join_from_hf
from asympo_megatron.engine.model import load_model, read_weights, replace_weights
from asympo_megatron.engine.options import EngineOptions
from asympo_megatron.mcore import Learner, Row, initialize, shards, shutdown
from asympo_megatron.mcore.collate import collate
from asympo_megatron.objectives import build_objective
from asympo_megatron.testing.gradients import GradientProbe, relative_errors
from asympo_megatron.testing.megatron import run_ranks

pytestmark = pytest.mark.usefixtures("one_rank")

MakeHF = Callable[..., tuple[Any, Path]]
KINDS = ("qwen3_moe", "qwen3_moe-raw-weights")
COEFFICIENT = 0.1


def _loaded(directory: Path) -> tuple[Any, Learner]:
    layout, learner = build(json.loads((directory / "config.json").read_text()))
    load_hf(learner, directory)
    return layout, learner


@pytest.mark.parametrize("kind", KINDS)
def test_token_nll_and_round_trip(make_hf: MakeHF, kind: str) -> None:
    model, directory = make_hf(kind)
    layout, learner = _loaded(directory)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 71, (size,), generator=generator).tolist() for size in (33, 7, 60, 2, 31)]
    batch = collate([Row(ids[:1], ids[1:], [1] * (len(ids) - 1), 0.0) for ids in sequences], layout)
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([ids])).logits[0, :-1] for ids in sequences])
        wanted = -logits.log_softmax(-1).gather(1, batch.targets.T)[:, 0]
        got = learner.chunks[0](
            batch.tokens, None, None, labels=batch.targets, packed_seq_params=batch.packed, padding_mask=batch.padding
        )[0]
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    exported, original = dict(export_hf(learner)), load_file(directory / "model.safetensors")
    assert set(exported) == set(original)
    assert all(torch.equal(tensor, original[name]) for name, tensor in exported.items())


def _balance(router_logits: list[torch.Tensor], experts: int, top_k: int) -> torch.Tensor:
    """E / (k T^2) sum_e count_e sum_t p_e(t), summed over layers."""
    total = torch.zeros(())
    for logits in router_logits:
        probability = logits.softmax(-1)
        counts = logits.topk(top_k).indices.flatten().bincount(minlength=experts)
        total = total + experts / (top_k * len(logits) ** 2) * (counts * probability.sum(0)).sum()
    return total


def _by_name(model: Any, learner: Learner) -> dict[str, torch.Tensor]:
    """Gradients of transformers under global names. Its experts are stacked: [E, 2 x ffn, H] and [E, H, ffn]."""
    grads = {name: param.grad for name, param in model.named_parameters()}
    found = {}
    for entry in entries(learner.plan.facts):
        if ".experts." in entry.megatron:
            layer, rest = entry.hf[0].split(".experts.")
            stack = "gate_up_proj" if entry.join == "gate_up" else "down_proj"
            found[entry.megatron] = grads[f"{layer}.experts.{stack}"][int(rest.split(".")[0])]
        else:
            found[entry.megatron] = join_from_hf(entry, [grads[name] for name in entry.hf], learner.plan.facts)
    return found


@pytest.mark.parametrize("name", ["reinforce", "sft"])
def test_gradient_with_the_load_balancing_loss(make_hf: MakeHF, name: str) -> None:
    """Micro-batches of unlike size, divided by responses or by tokens, against autograd of transformers' model."""
    model, directory = make_hf("qwen3_moe")
    config = make_config()
    config.model.megatron["moe_aux_loss_coeff"] = COEFFICIENT
    layout = initialize(config)
    hf = json.loads((directory / "config.json").read_text())
    learner = Learner(config, hf, build_objective(name), layout)
    load_hf(learner, directory)
    probe = GradientProbe(learner)
    generator = torch.Generator().manual_seed(2)
    sizes = [(9, 30, 4), (12,), (5, 17)]
    parts = [[torch.randint(0, 71, (size,), generator=generator).tolist() for size in part] for part in sizes]
    rows = [
        [Row(ids[:2], ids[2:], [1] * (len(ids) - 2), 0.7 - 0.3 * n) for n, ids in enumerate(part)] for part in parts
    ]
    figures = learner.step(rows, 6)

    step_tokens = sum(size - 1 for part in sizes for size in part)
    trained = sum(size - 2 for part in sizes for size in part)
    loss, balances = torch.zeros(()), []
    for part in rows:
        routed: list[list[torch.Tensor]] = []
        for row in part:
            ids = torch.tensor([[*row.prompt_ids, *row.ids]])
            out = model(ids[:, :-1], output_router_logits=True)
            routed.append(list(out.router_logits))
            nll = -out.logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[1:]
            loss = loss + (nll.sum() / trained if name == "sft" else row.advantage * nll.mean() / 6)
        layers = [torch.cat(logits) for logits in zip(*routed, strict=True)]
        share = len(layers[0]) / step_tokens
        balances.append(share * _balance(layers, hf["num_local_experts"], hf["num_experts_per_tok"]))
    (loss + COEFFICIENT * torch.stack(balances).sum()).backward()

    errors = relative_errors(probe.gradients, _by_name(model, learner))
    assert max(errors.values()) <= 2e-5, max(errors, key=lambda key: errors[key])
    layers_with_experts = hf["num_hidden_layers"] - len(hf["mlp_only_layers"])
    assert figures["moe_balance"] == pytest.approx(float(torch.stack(balances).sum()) / layers_with_experts, rel=1e-5)


def test_the_embedded_engine_serves_exported_weights(make_hf: MakeHF, tmp_path: Path) -> None:
    """transformers stacks the experts of a layer when it loads; the published files keep them apart."""
    model, directory = make_hf("qwen3_moe")
    _, learner = _loaded(directory)
    served = load_model(EngineOptions(model_path=str(directory), load_format="dummy"))
    save_file(dict(export_hf(learner)), str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    replace_weights(served, read_weights(served, tmp_path))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(served.module(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("local_layers", [False, True])
def test_checkpoints_of_either_kind_of_layers_are_read(
    make_hf: MakeHF, tmp_path: Path, kind: str, local_layers: bool
) -> None:
    """Transformer Engine's layers keep the norm before a mixture of experts apart, Megatron's local ones do not."""
    _, source = make_hf(kind)
    directory = tmp_path / "checkpoint"
    config = load_config("quickstart", [f"model.path={source}", "model.hf={}"])
    hf_to_megatron(config, source, directory)
    file = directory / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    norms = {key for key in metadata.state_dict_metadata if key.endswith("pre_mlp_layernorm.weight")}
    assert norms
    if local_layers:
        (directory / "complete").unlink()
        file.write_bytes(pickle.dumps(_as_local_layers(metadata)))
    megatron_to_hf(directory, tmp_path / "back", model_files=source)
    wanted, got = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert set(got) == set(wanted)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def _as_local_layers(metadata: Any) -> Any:
    def spelt(key: str) -> str:
        return key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")

    metadata.state_dict_metadata = {spelt(key): entry for key, entry in metadata.state_dict_metadata.items()}
    metadata.storage_data = {
        dataclasses.replace(index, fqn=spelt(index.fqn)): place for index, place in metadata.storage_data.items()
    }
    return metadata


def test_experts_are_cut_by_name(make_hf: MakeHF, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by their marks: Transformer Engine sets those of linear_fc2 to the other axis (Megatron-Core 0.16)."""
    _, directory = make_hf("qwen3_moe")
    _, learner = _loaded(directory)
    group = FakeGroup()
    for name, param in learner.chunks[0].named_parameters():
        if ".experts." in name:
            param.tensor_model_parallel, param.partition_dim = True, 0
    monkeypatch.setattr(shards, "_expert_place", lambda: (group, 0))
    axes = {
        shard.name.rpartition(".experts.")[2].partition(".")[2]: shard.dim
        for shard in shards.shards(learner.chunks, 71)
        if shard.group is group
    }
    assert axes == {"linear_fc1.weight": 0, "linear_fc2.weight": 1}


class FakeGroup:
    """Expert tensor parallelism of two ranks."""

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 2


TWO_RANKS = {
    "expert": {"expert": 2},
    "expert-whole-matrices-tensor": {"expert": 2, "expert_tensor": 1, "tensor": 2, "sequence": True},
    "tensor": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
}
FOUR_RANKS = {
    "expert-tensor": {"expert": 2, "tensor": 2, "sequence": True},
    "expert-pipeline": {"expert": 2, "pipeline": 2},
    "expert-pipeline-tensor": {"expert": 2, "expert_tensor": 1, "pipeline": 2, "tensor": 2, "sequence": True},
}


def _check_layouts(world_size: int, layouts: dict[str, Any], make_hf: MakeHF, tmp_path: Path) -> None:
    _, source = make_hf("qwen3_moe")
    hf = json.loads((source / "config.json").read_text())
    _, learner = _loaded(source)
    checksum = learner.checksum()
    shutdown()
    cases = {
        name: {"hf": hf, "parallel": sizes, "source": str(source), "target": str(tmp_path / f"{name}.safetensors")}
        for name, sizes in layouts.items()
    }
    ranks = run_ranks(f"{PROGRAM}:layouts", world_size, {"cases": cases}, timeout_s=300)
    wanted = load_file(source / "model.safetensors")
    for name, case in cases.items():
        assert [rank[name]["checksum"] for rank in ranks] == [checksum] * world_size, name
        got = load_file(case["target"])
        assert set(got) == set(wanted)
        assert all(torch.equal(got[key], wanted[key]) for key in wanted), name


@pytest.mark.slow
def test_two_ranks_load_and_export_the_same_bits(make_hf: MakeHF, tmp_path: Path) -> None:
    _check_layouts(2, TWO_RANKS, make_hf, tmp_path)


@pytest.mark.slow
def test_four_ranks_load_and_export_the_same_bits(make_hf: MakeHF, tmp_path: Path) -> None:
    _check_layouts(4, FOUR_RANKS, make_hf, tmp_path)
