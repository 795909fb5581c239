"""Megatron-LM (core 0.19 or newer) with ASymPO; pass --calculate-per-token-loss.

``config`` is what pretrain_gpt.py makes of the arguments. The data set yields the keys of ``split_batch``.
"""

from megatron.core.enums import ModelType
from megatron.training import pretrain

from asympo_megatron import build_objective
from asympo_megatron.integrations.megatron_lm import make_forward_step


def train(config, provide_datasets):
    forward_step = make_forward_step(build_objective("asympo", nll_floor=1e-3))
    pretrain(config, provide_datasets, ModelType.encoder_or_decoder, forward_step)
