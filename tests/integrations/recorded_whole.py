"""NeMo-RL, prime-rl and ROLL as recorded from their sources (commits in the adapters): what the adapters import."""

import enum
import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class MetricNormalizer(enum.Enum):
    NONE = "none"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


class LossFunction:
    def __call__(self, data, global_valid_seqs, global_valid_toks, **kwargs):
        raise NotImplementedError


class ClippedPGLossFn:
    use_fused_linear_logprobs = True


class BatchedDataDict(dict):
    pass


def prepare_loss_input(logits, data, loss_fn, **groups):
    assert loss_fn.input_type is LossInputType.LOGPROB
    logprobs = torch.log_softmax(logits.float(), -1)[:, :-1]
    return {"next_token_logprobs": logprobs.gather(-1, data["input_ids"][:, 1:, None]).squeeze(-1)}, data


def wrap_loss_fn_with_input_preparation(
    next_token_logits, data, global_valid_seqs, global_valid_toks, loss_fn, prepare_fn
):
    loss_input, data = prepare_fn(logits=next_token_logits, data=data, loss_fn=loss_fn)
    return loss_fn(data=data, global_valid_seqs=global_valid_seqs, global_valid_toks=global_valid_toks, **loss_input)


@dataclass
class LossInputs:
    trainer_logprobs: Any
    inference_logprobs: Any
    ref_logprobs: Any
    advantages: Any
    loss_mask: Any
    loss_weights: Any = None


@dataclass
class LossOutputs:
    loss: Any
    metrics: Any


@dataclass
class CustomLossConfig:
    import_path: str
    kwargs: dict


def setup_rl_loss_fn(loss_config):
    module, _, name = loss_config.import_path.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    return lambda inputs: function(inputs, **loss_config.kwargs)


def compute_loss(*, rl_loss_fn, rl_scale, trainer_logprobs, inference_logprobs, advantages, loss_mask, **_):
    total = trainer_logprobs[0].sum() * 0.0
    for row, scored in enumerate(trainer_logprobs):
        inputs = LossInputs(scored, inference_logprobs[row], None, advantages[row], loss_mask[row])
        out = rl_loss_fn(inputs)
        assert all(value.dim() == 0 for value in out.metrics.values())
        total = total + out.loss
    return total / rl_scale, {}


class ActorPGWorker:
    pipeline_config: Any = SimpleNamespace()

    def loss_func(self, data, output_tensor):
        raise AssertionError("the adapter replaces it")


MODULES = {
    "nemo_rl": {
        "nemo_rl.algorithms.loss.interfaces": [LossType, LossInputType, LossFunction, MetricNormalizer],
        "nemo_rl.algorithms.loss.loss_functions": [ClippedPGLossFn],
        "nemo_rl.algorithms.loss.utils": [prepare_loss_input],
        "nemo_rl.algorithms.loss.wrapper": [wrap_loss_fn_with_input_preparation],
        "nemo_rl.distributed.batched_data_dict": [BatchedDataDict],
    },
    "prime_rl": {
        "prime_rl.configs.trainer": [CustomLossConfig],
        "prime_rl.trainer.rl.loss": [LossInputs, LossOutputs, setup_rl_loss_fn, compute_loss],
    },
    "roll": {"roll.pipeline.rlvr.actor_pg_worker": [ActorPGWorker]},
}
