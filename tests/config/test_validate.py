"""Values that would end a run later are refused before it starts, with the remedy."""

import pytest

from asympo_megatron.config import load_config
from asympo_megatron.config.limits import SUBSETS
from asympo_megatron.errors import ConfigError
from asympo_megatron.metrics.sinks import SINKS

SUPERVISED = ["rollout.source=supervised", "objective.name=sft"]
LENGTHS = ["rollout.sampling.max_prompt_tokens=100", "rollout.sampling.max_new_tokens=101"]
CP4_TP2 = ["parallel.context=4", "parallel.tensor=2", "parallel.sequence=true"]
EVERY_2 = ["sync.interval_steps=2", "rollout.max_lag_steps=4"]

REFUSED = [
    (["run.name=''"], "run.name is ''; it names a directory"),
    (["run.name=a/b"], "run.name is 'a/b'"),
    (["run.name=.."], "run.name is '..'"),
    (["run.local_ranks=0"], "run.local_ranks is 0; it must be at least 1, or null"),
    (["model.init_std=0"], "model.init_std is 0.0; it must be greater than 0"),
    (
        ["parallel.tensor=2", "parallel.expert_tensor=1"],
        "Set parallel.expert to 2 or more, or parallel.expert_tensor=null.",
    ),
    (["model.reference=random"], "null takes the weights that model.init names"),
    (["model.reference=hf"], "model.reference=hf needs model.path"),
    (["objective.kl_coef=-0.1"], "objective.kl_coef is -0.1; it must be at least 0"),
    (["objective.kl_coef=nan"], "objective.kl_coef is nan; it must be at least 0"),
    (["objective.kl_estimator=k4"], "objective.kl_estimator"),
    (["parallel.virtual_pipeline=0", "parallel.pipeline=2"], "parallel.virtual_pipeline is 0"),
    (["optimizer.beta1=1"], "optimizer.beta1 is 1.0; it must be at least 0 and below 1"),
    (["optimizer.beta2=-0.1"], "optimizer.beta2 is -0.1"),
    (["optimizer.eps=0"], "optimizer.eps is 0.0; it must be greater than 0"),
    (["optimizer.clip_grad=-1"], "optimizer.clip_grad is -1.0; it must be at least 0"),
    (["optimizer.weight_decay=-1"], "optimizer.weight_decay is -1.0; it must be at least 0"),
    (["optimizer.min_lr=-1"], "optimizer.min_lr is -1.0; it must be at least 0"),
    (["optimizer.min_lr=nan"], "optimizer.min_lr is nan; it must be at least 0"),
    (["optimizer.min_lr=1"], "optimizer.min_lr=1.0 is above optimizer.lr=0.0006"),
    (["optimizer.warmup_steps=5", "run.steps=5"], "Set optimizer.warmup_steps to 4 or less."),
    (["rollout.sampling.top_p=0"], "rollout.sampling.top_p is 0.0; it must be above 0 and at most 1"),
    (["rollout.sampling.top_p=1.1"], "rollout.sampling.top_p is 1.1"),
    (["rollout.sampling.top_k=0"], "rollout.sampling.top_k is 0; it must be at least 1, or -1 (off)"),
    (["rollout.sampling.top_k=-2"], "rollout.sampling.top_k is -2"),
    (["rollout.sampling.stop_token_ids=[7,-1]"], "rollout.sampling.stop_token_ids is [7, -1]; token ids start at 0"),
    (["rollout.eval.top_p=0"], "rollout.eval.top_p is 0.0"),
    (["rollout.eval.temperature=-1"], "rollout.eval.temperature is -1.0; it must be at least 0"),
    (["rollout.eval.prompts=0"], "rollout.eval.prompts is 0; it must be at least 1. Set rollout.eval.interval_steps=0"),
    ([*EVERY_2, "rollout.eval.interval_steps=5"], "Set rollout.eval.interval_steps to 6."),
    (["rollout.controller_port=65536"], "rollout.controller_port is 65536; a port is a number from 0"),
    (["rollout.engine_port=-1"], "rollout.engine_port is -1"),
    (["logging.prometheus_port=70000"], "logging.prometheus_port is 70000"),
    (["rollout.controller_token=''"], "rollout.controller_token is ''; set a secret, or null for none"),
    (["rollout.engine_api_key=''"], "rollout.engine_api_key is ''"),
    (["rollout.controller_host=0.0.0.0"], "Set rollout.controller_token to a secret, or listen on 127.0.0.1."),
    (["rollout.controller_host=node7"], "rollout.controller_host=node7 opens the controller to the network"),
    (["sync.deltas=-1"], "sync.deltas is -1; it must be at least 0"),
    (["sync.deltas=4", "sync.transport=collective"], "sync.deltas=4 is for sync.transport=disk, but it is collective"),
    (["sync.deltas=4", "rollout.engine_urls=[http://10.0.0.7:30000]"], "set sync.mirror_port to their port"),
    (
        ["sync.deltas=4", "sync.mirror_host=0.0.0.0"],
        "Set rollout.controller_token to a secret, or listen on 127.0.0.1.",
    ),
    (["sync.mirror_port=70000"], "sync.mirror_port is 70000"),
    (["logging.level=LOUD"], "logging.level"),
    (["logging.sinks=[tensorbord]"], "tensorboard"),
    ([*SUPERVISED], "advantage.estimator is group_mean. Set advantage.estimator=none."),
    ([*LENGTHS, *CP4_TP2, "batch.max_tokens_per_microbatch=201"], "201 padded to a multiple of 16"),
    ([*LENGTHS, *CP4_TP2, "batch.max_tokens_per_microbatch=207"], "Raise it to 208,"),
    ([*LENGTHS, "parallel.context=2", "batch.max_tokens_per_microbatch=203"], "Raise it to 204,"),
]

ACCEPTED = [
    ["run.name=..a.b", "run.local_ranks=1"],
    ["optimizer.beta1=0", "optimizer.clip_grad=0", "optimizer.min_lr=6e-4"],
    ["optimizer.warmup_steps=4", "run.steps=5"],
    ["rollout.sampling.top_p=1", "rollout.sampling.top_k=1", "rollout.sampling.stop_token_ids=[0]"],
    ["rollout.eval.temperature=0", "rollout.eval.top_p=0.01"],
    ["rollout.eval.prompts=0", "rollout.eval.interval_steps=0"],
    [*EVERY_2, "rollout.eval.interval_steps=6"],
    [*EVERY_2, *SUPERVISED, "advantage.estimator=none", "rollout.eval.interval_steps=5"],
    ["rollout.controller_port=65535", "rollout.engine_port=0"],
    ["rollout.controller_host=0.0.0.0", "rollout.controller_token=sesame"],
    ["rollout.controller_host=::1"],
    ["rollout.controller_host=localhost"],
    ["logging.sinks=[tensorboard,wandb,prometheus]", "logging.level=DEBUG"],
    [*LENGTHS, *CP4_TP2, "batch.max_tokens_per_microbatch=208"],
    [*LENGTHS, "parallel.tensor=2", "batch.max_tokens_per_microbatch=201"],
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda value: str(value))
def test_a_bad_value_is_refused_with_its_remedy(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", overrides)
    assert message in str(caught.value)


def test_the_known_sinks_are_those_that_exist():
    assert set(SUBSETS["logging.sinks"]) == set(SINKS)


@pytest.mark.parametrize("overrides", ACCEPTED, ids=str)
def test_values_at_their_limits_are_accepted(overrides):
    load_config("quickstart", overrides)
