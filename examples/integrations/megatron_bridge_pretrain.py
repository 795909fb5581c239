"""Megatron-Bridge's training loop with ASymPO.

An item of the data set is a micro-batch: the keys of ``megatron_lm.split_batch``, tokens [S] and advantages [R]. Items
that hold ``packed_seq_params`` need ``dataset.dataloader_type="external"``, with tokens [1, S].
"""

from megatron.bridge.training.pretrain import pretrain

from asympo_megatron import build_objective
from asympo_megatron.integrations.megatron_bridge import ForwardStep


def train(config):
    config.model.calculate_per_token_loss = True
    config.ddp.average_in_collective = False
    config.train.micro_batch_size = 1
    pretrain(config, forward_step_func=ForwardStep(build_objective("asympo", nll_floor=1e-3)))
