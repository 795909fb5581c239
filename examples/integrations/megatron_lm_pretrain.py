"""Megatron-LM with ASymPO; pass --calculate-per-token-loss. The data set yields the keys of ``split_batch``."""

from megatron.training import pretrain

from asympo_megatron import build_objective
from asympo_megatron.integrations.megatron_lm import make_forward_step


def train(provide_datasets, model_provider, model_type):
    forward_step = make_forward_step(build_objective("asympo", nll_floor=1e-3))
    pretrain(provide_datasets, model_provider, model_type, forward_step)
