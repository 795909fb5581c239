"""Megatron-LM (core 0.19 or newer) with ASymPO; pass --calculate-per-token-loss and --micro-batch-size 1.

``config`` is what pretrain_gpt.py makes of the arguments. An item of the data set is a micro-batch: the keys of
``split_batch``, tokens [S] and advantages [R]. Items that hold ``packed_seq_params`` cannot be collated: return an
iterator of items, with tokens [1, S], and pass --dataloader-type external.
"""

from megatron.core.enums import ModelType
from megatron.training import pretrain

from asympo_megatron import build_objective
from asympo_megatron.integrations.megatron_lm import make_forward_step


def train(config, provide_datasets):
    provide_datasets.is_distributed = True  # or ranks other than the first of tensor parallelism get no data
    forward_step = make_forward_step(build_objective("asympo", nll_floor=1e-3))
    pretrain(config, provide_datasets, ModelType.encoder_or_decoder, forward_step)
