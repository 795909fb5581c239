"""What Megatron's own machinery does to our loss: settings that would scale its other terms are refused."""

from types import SimpleNamespace

import pytest
from megatron.core.transformer import TransformerConfig

from asympo_megatron.errors import ConfigError
from asympo_megatron.integrations.megatron_bridge import ForwardStep
from asympo_megatron.integrations.megatron_lm import make_forward_step, require_exact_count
from asympo_megatron.objectives import build_objective

OTHER_LOSSES = [
    ({"num_moe_experts": 2, "moe_aux_loss_coeff": 1e-3}, r"moe_aux_loss_coeff is 0\.001.*Set moe_aux_loss_coeff=0"),
    (
        {
            "num_moe_experts": 2,
            "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
            "moe_aux_loss_coeff": [0.0, 1e-3],
        },
        r"moe_aux_loss_coeff is \[0\.0, 0\.001\]",
    ),
    ({"num_moe_experts": 2, "moe_z_loss_coeff": 1e-3}, r"moe_z_loss_coeff is 0\.001"),
    ({"mtp_num_layers": 1}, r"mtp_loss_scaling_factor is 0\.1"),
]
NO_OTHER_LOSS = [
    {},
    {"num_moe_experts": 2},
    {"num_moe_experts": 2, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0},
    {"moe_z_loss_coeff": 1e-3},  # a dense model has no router
    {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.0},
]


def model(**settings):
    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    return SimpleNamespace(config=TransformerConfig(calculate_per_token_loss=True, **shape, **settings))


@pytest.mark.parametrize(("settings", "message"), OTHER_LOSSES)
def test_losses_that_megatron_scales_for_tokens_are_refused_beside_responses(settings, message):
    objective = build_objective("asympo")
    with pytest.raises(ConfigError, match=message):
        make_forward_step(objective)(iter([]), model(**settings))
    with pytest.raises(ConfigError, match=message):
        ForwardStep(objective)(None, iter([]), model(**settings))


@pytest.mark.parametrize("settings", [settings for settings, _ in OTHER_LOSSES])
def test_objectives_divided_by_tokens_keep_them(settings):
    require_exact_count(model(**settings), build_objective("sft"))


@pytest.mark.parametrize("settings", NO_OTHER_LOSS)
def test_models_without_such_a_loss_pass(settings):
    require_exact_count(model(**settings), build_objective("asympo"))
