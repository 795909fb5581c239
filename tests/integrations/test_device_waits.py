"""Nothing on the way to a loss waits for the device, unless the framework wants numbers: it all runs on ``meta``.

A tensor of the meta device has no values: ``item``, ``tolist``, ``bool`` and a ``repeat_interleave`` of unknown size,
for which the host would wait on a GPU, raise there.
"""

import pytest
import torch
from recorded import areal_modules, load_adapter, openrlhf_modules

from asympo_megatron.integrations import cp_local
from asympo_megatron.integrations.padded import figures, padded_token_loss
from asympo_megatron.objectives import build_objective
from asympo_megatron.parallel import SINGLE

META = torch.device("meta")


@pytest.mark.parametrize("advantage", [torch.ones(2), torch.ones(2, 5)], ids=["advantages-R", "advantages-RL"])
def test_the_loss_of_padded_rows_leaves_its_figures_on_the_device(advantage):
    logprob_RL = torch.zeros(2, 5, device=META, requires_grad=True)
    mask_RL = torch.ones(2, 5, device=META)
    terms_RL, stats = padded_token_loss(build_objective("asympo"), logprob_RL, mask_RL, advantage.to(META))
    terms_RL.sum().backward()
    with pytest.raises((RuntimeError, NotImplementedError)):
        figures(stats)  # the one place that waits


def test_openrlhf_reads_no_figures(monkeypatch):
    openrlhf = load_adapter(monkeypatch, "openrlhf", openrlhf_modules())
    loss = openrlhf.ObjectiveLoss(build_objective("asympo"))
    one_RL = torch.ones(2, 5, device=META)
    total, *_ = loss(one_RL, one_RL, one_RL, one_RL, global_batch_size=torch.tensor(2.0, device=META))
    assert total.is_meta


def test_responses_of_slime_and_miles_are_gathered_without_lengths_on_the_device():
    parts = [torch.ones(length, device=META) for length in (3, 0, 2)]
    batch = {"advantages": parts, "loss_masks": parts}
    token_nll_T, responses = cp_local.gather_batch(batch, parts, parts, frozenset(), SINGLE)
    loss, _ = cp_local.objective_loss(build_objective("asympo"), token_nll_T, responses, SINGLE, parts[0])
    assert loss.is_meta
    assert responses.response_ids_T.shape == (5,)


def test_areal_spreads_rows_over_a_known_number_of_tokens(monkeypatch):
    areal = load_adapter(monkeypatch, "areal", areal_modules())
    monkeypatch.setattr(areal, "figures", lambda _: {})  # AReaL's tracker takes numbers
    token_T = torch.ones(5, device=META)
    data = {"cu_seqlens": torch.ones(3, device=META), "loss_mask": token_T, "advantages": token_T}
    assert areal.asympo_loss(build_objective("asympo"), token_T, token_T, data).is_meta
