"""What Megatron's training loops do around our loss: other losses, loaders."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from parity import CASES, assert_same_gradient, core_gradient, make_batch
from torch.utils.data import DataLoader

from asympo_megatron.errors import BatchError, ConfigError
from asympo_megatron.integrations.megatron_bridge import ForwardStep
from asympo_megatron.integrations.megatron_lm import (
    make_forward_step,
    make_loss_func,
    require_exact_count,
    split_batch,
)
from asympo_megatron.objectives import build_objective
from asympo_megatron.parallel import SINGLE

PARTS = ([0, 5, 3, 7], [1, 2, 4, 6, 8, 9, 10, 11])

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


def item(rows):
    """A micro-batch as a data set holds it; ``tokens`` are positions in P, which ``FreeLogits`` scores."""
    part, index_P = make_batch().rows(rows)
    return {
        "tokens": index_P,
        "labels": part.token_P,
        "response_ids": part.response_ids_P,
        "advantages": part.advantage_R,
        "token_counts": part.token_count_R,
    }


class FreeLogits(torch.nn.Module):
    """In the place of a GPTModel: one logit per response position and vocabulary entry."""

    def __init__(self):
        super().__init__()
        self.config = model().config
        self.logits_PV = torch.nn.Parameter(make_batch().logits_PV.clone())

    def forward(self, input_ids, position_ids, attention_mask, labels, packed_seq_params):
        assert input_ids.dim() == 2
        return -torch.log_softmax(self.logits_PV[input_ids], -1).gather(-1, labels[..., None]).squeeze(-1)


def external(items):
    """An iterator of the user's own: a batch axis on tokens alone, packed sequences allowed."""
    for one in items:
        rows = {name: one[name][None] for name in ("tokens", "labels", "response_ids")}
        yield {**one, **rows, "packed_seq_params": PackedSeqParams(qkv_format="thd")}


@pytest.mark.parametrize("loader", [DataLoader, external], ids=["collated", "external"])
@pytest.mark.parametrize("name", ["megatron_lm", "megatron_bridge"])
def test_items_of_megatrons_loaders_have_the_cores_gradient(monkeypatch, name, loader):
    objective, free = build_objective("asympo", **CASES["asympo"]), FreeLogits()
    if name == "megatron_bridge":
        monkeypatch.setattr("asympo_megatron.integrations.megatron_bridge.model_groups", lambda _: SINGLE)
        step, given = ForwardStep(objective), (None,)
    else:
        step, given = make_forward_step(objective, lambda: SINGLE), ()
    batches, count = iter(loader([item(rows) for rows in PARTS])), 0
    for _ in PARTS:
        output, loss_func = step(*given, batches, free)
        loss, counted, _ = loss_func(output)
        loss.backward()
        count += int(counted)
    _, want = core_gradient(objective, make_batch())
    assert_same_gradient(free.logits_PV.grad / count, want, make_batch())


@pytest.mark.parametrize("objective", ["asympo", "sft"])
def test_figures_are_numbers_where_no_response_has_a_positive_advantage(objective):
    """``train_step`` adds them up and divides: a count of 0 would make NaN of a whole log interval."""
    data = {**item([0, 1]), "advantages": torch.tensor([-1.0, -2.0])}
    inputs, responses = split_batch(data)
    nll = -make_batch().logprob(make_batch().logits_PV)[inputs["input_ids"]]
    _, _, figures = make_loss_func(build_objective(objective), SINGLE)(responses, nll)
    assert {"loss", "zero_advantage_fraction"} <= figures.keys()
    for name, (total, count) in figures.items():
        assert torch.isfinite(total / count), name


def test_several_items_in_one_micro_batch_are_refused():
    batch = next(iter(DataLoader([item([0, 1]), item([0, 1])], batch_size=2)))
    with pytest.raises(BatchError, match=r"put 2 items into one.*Set --micro-batch-size 1"):
        split_batch(batch)


def test_everything_goes_to_the_models_device():
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 3]), max_seqlen_q=3)
    inputs, responses = split_batch({**item([0]), "packed_seq_params": packed}, torch.device("meta"))
    ours = (responses.response_ids_T, responses.advantage_R, responses.token_count_R)
    assert all(tensor.is_meta for tensor in (inputs["input_ids"], inputs["labels"], *ours))
    assert inputs["packed_seq_params"].cu_seqlens_q.is_meta
    assert inputs["packed_seq_params"].max_seqlen_q == 3
    assert not packed.cu_seqlens_q.is_meta


def test_a_rank_without_a_loader_is_told_how_to_get_one():
    with pytest.raises(BatchError, match="is_distributed = True"):
        make_forward_step(build_objective("asympo"))(None, FreeLogits())
