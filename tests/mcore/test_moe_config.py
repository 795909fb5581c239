"""What a config.json says about experts, and layouts that cannot hold them."""

from typing import Any

import pytest
from moe_programs import build
from rank_programs import make_config

from asympo_megatron.errors import ConfigError
from asympo_megatron.mcore.hf_config import read_hf_config
from asympo_megatron.mcore.model_config import plan_model
from asympo_megatron.objectives import build_objective
from asympo_megatron.testing.tiny_model import TINY_MOE_HF

SP = {"tensor": 2, "sequence": True}


def _facts(**fields: Any) -> Any:
    return read_hf_config({**TINY_MOE_HF, **fields})


def test_layers_with_experts() -> None:
    assert _facts(mlp_only_layers=[]).moe.dense_layers == ()
    assert _facts(decoder_sparse_step=2, mlp_only_layers=[3]).moe.dense_layers == (0, 2, 3)
    assert [_facts().is_moe_layer(number) for number in range(4)] == [True, False, True, True]


def test_both_spellings_of_the_number_of_experts() -> None:
    """transformers 4 writes num_experts, 5 num_local_experts."""
    fields = {name: value for name, value in TINY_MOE_HF.items() if name != "num_experts"}
    assert read_hf_config({**fields, "num_local_experts": 4}) == _facts()


def test_megatron_is_told_all_of_it() -> None:
    planned = plan_model(make_config(), {**TINY_MOE_HF, "norm_topk_prob": False}).transformer
    assert (planned.num_moe_experts, planned.moe_router_topk, planned.moe_ffn_hidden_size) == (4, 2, 24)
    assert planned.moe_router_pre_softmax
    assert planned.moe_layer_freq == [1, 0, 1, 1]
    assert (planned.moe_router_dtype, planned.moe_aux_loss_coeff) == ("fp32", 0.05)


@pytest.mark.parametrize(
    ("parallel", "hf", "megatron", "message"),
    [
        (
            {"expert": 3},
            {},
            {},
            "num_experts=4 of the model is not divisible by parallel.expert=3. Set parallel.expert",
        ),
        ({"expert": 2}, {"model_type": "qwen3"}, {}, "model_type=qwen3 has no experts. Set parallel.expert=1"),
        ({"tensor": 2}, {}, {}, "under sequence parallelism only. Set parallel.sequence=true"),
        (SP, {"moe_intermediate_size": 25}, {}, "moe_intermediate_size=25 .* is not divisible by parallel.tensor=2"),
        (
            {**SP, "expert": 2, "expert_tensor": 5},
            {},
            {},
            "moe_intermediate_size=24 .* is not divisible by parallel.expert_tensor=5",
        ),
        ({}, {"num_experts_per_tok": 5}, {}, "num_experts_per_tok=5 .* at most num_experts=4"),
        ({}, {"mlp_only_layers": [0, 1, 2, 3]}, {}, r"leave none of the 4 layers with experts.*model_type=qwen3"),
        ({"expert": 2}, {}, {"moe_token_dispatcher_type": "allgather"}, "ours differ. Set it to alltoall"),
        ({}, {}, {"moe_router_topk": 1}, "decided by model.hf.num_experts_per_tok"),
        ({}, {}, {"moe_router_load_balancing_type": "seq_aux_loss"}, "decided by model.hf.model_type"),
        ({}, {"num_expert_per_tok": 2}, {}, None),
    ],
)
def test_contradictions_name_the_value_to_change(
    parallel: dict[str, Any], hf: dict[str, Any], megatron: dict[str, Any], message: str | None
) -> None:
    config = make_config(parallel=parallel, model={"megatron": megatron})
    fields = {**TINY_MOE_HF, **hf}
    if message is None:  # a misspelt field beside a missing one
        del fields["num_experts_per_tok"]
        message = "did you mean 'num_experts_per_tok'"
    with pytest.raises(ConfigError, match=message):
        plan_model(config, fields)


def test_intermediate_size_of_a_model_without_dense_layers_does_not_matter() -> None:
    config = make_config(parallel=SP)
    assert plan_model(config, {**TINY_MOE_HF, "mlp_only_layers": [], "intermediate_size": 47}).facts.ffn_size == 47
    with pytest.raises(ConfigError, match="intermediate_size=47"):
        plan_model(config, {**TINY_MOE_HF, "intermediate_size": 47})


class Plain:
    """An objective that is only callable."""

    def __init__(self, _: str) -> None:
        self._objective = build_objective("asympo")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._objective(*args, **kwargs)


def test_an_objective_must_tell_its_divisor(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_programs.build_objective", Plain)
    with pytest.raises(ConfigError, match=r"no normalizer_count.*set model.megatron.moe_aux_loss_coeff=0"):
        build({"coefficient": 0.1})
    build({"coefficient": 0.0})
