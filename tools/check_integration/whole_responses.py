"""NeMo-RL, prime-rl and ROLL hand over whole responses: their own loss path on one process, against the core.

Axis suffixes: P response positions, V vocabulary, B rows, S padded sequence positions.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from checkout import require_call, require_parameters, upstream
from parity import CASES, ParityBatch, make_batch
from torch import Tensor

from asympo_megatron.objectives import build_objective

PARTS = ([0, 5, 3, 7], [1, 2, 4, 6, 8, 9, 10, 11])
"""Rows of the two micro-batches; one of them holds the response without trained tokens."""


def sequences(part: ParityBatch, logits_PV: Tensor) -> dict[str, Tensor]:
    """Right-padded [B, S]: tokens, logits, and mask and advantage of every token at its own position."""
    total = part.sequence_length_R.tolist()
    trained_S = torch.zeros(sum(total), dtype=torch.bool)
    trained_S[part.scoring_index_P + 1] = part.mask_P
    row_S = torch.repeat_interleave(torch.arange(len(total)), part.sequence_length_R)

    def pad(value_S: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(value_S.split(total)), batch_first=True)

    return {
        "tokens": pad(part.sequence_tokens),
        "logits": pad(part.sequence_logits(logits_PV)),
        "mask": pad(trained_S),
        "advantages": pad(torch.where(trained_S, part.advantage_R[row_S], 0.0)),
    }


def _over_parts(loss_of: Callable[[ParityBatch, Tensor], Tensor]) -> Tensor:
    whole = make_batch()
    leaf_PV = whole.leaf()
    for rows in PARTS:
        part, index_P = whole.rows(rows)
        loss_of(part, leaf_PV[index_P]).backward()
    assert leaf_PV.grad is not None
    return leaf_PV.grad


def nemo_rl(objective: str) -> Tensor:
    """Through ``prepare_loss_input`` and ``wrap_loss_fn_with_input_preparation``, as their workers do."""
    wrap = upstream("nemo_rl.algorithms.loss.wrapper", "wrap_loss_fn_with_input_preparation")
    prepare = upstream("nemo_rl.algorithms.loss.utils", "prepare_loss_input")
    protocol = upstream("nemo_rl.algorithms.loss.interfaces", "LossFunction")
    require_parameters(protocol.__call__, ["data", "global_valid_seqs", "global_valid_toks"])
    data_dict = upstream("nemo_rl.distributed.batched_data_dict", "BatchedDataDict")
    from asympo_megatron.integrations.nemo_rl import ASymPOLoss  # only now: a missing package is named above

    _stay_on_cpu()
    loss = ASymPOLoss(objective, **CASES[objective])

    def loss_of(part: ParityBatch, logits_PV: Tensor) -> Tensor:
        rows = sequences(part, logits_PV)
        data = data_dict(
            {
                "input_ids": rows["tokens"],
                "token_mask": rows["mask"].float(),
                "sample_mask": torch.ones(part.num_responses),
                "advantages": rows["advantages"],
            }
        )
        result, _ = wrap(
            next_token_logits=rows["logits"],
            data=data,
            loss_fn=loss,
            prepare_fn=prepare,
            global_valid_seqs=torch.tensor(float(make_batch().num_responses)),
            global_valid_toks=torch.tensor(1.0),
        )
        return result

    return _over_parts(loss_of)


def _stay_on_cpu() -> None:
    """``get_next_token_logprobs_from_logits`` moves token ids with ``.cuda()``; without a GPU they stay."""
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign,assignment]


def prime_rl(objective: str) -> Tensor:
    """Through ``setup_rl_loss_fn`` and ``compute_loss``, as their trainer does; the known scale is taken out."""
    config = upstream("prime_rl.configs.trainer", "CustomLossConfig")
    setup = upstream("prime_rl.trainer.rl.loss", "setup_rl_loss_fn")
    compute = upstream("prime_rl.trainer.rl.loss", "compute_loss")
    whole = make_batch()
    tokens = int(whole.mask_P.sum())
    mean_length = tokens / whole.num_responses
    kwargs = {"objective": objective, "tokens_per_response": mean_length, **CASES[objective]}
    loss_fn = setup(config(import_path="asympo_megatron.integrations.prime_rl.asympo_loss", kwargs=kwargs))

    def loss_of(part: ParityBatch, logits_PV: Tensor) -> Tensor:
        total = part.sequence_length_R.tolist()
        # logprobs are shifted right: position t holds the log-prob of token t.
        scored_S = torch.zeros(sum(total)).index_put((part.scoring_index_P + 1,), part.logprob(logits_PV))
        mask_S = torch.zeros(sum(total), dtype=torch.bool).index_put((part.scoring_index_P + 1,), part.mask_P)
        row_S = torch.repeat_interleave(torch.arange(len(total)), part.sequence_length_R)
        result, _ = compute(
            trainer_logprobs=scored_S.split(total),
            inference_logprobs=torch.zeros(sum(total)).split(total),
            ref_logprobs=None,
            advantages=part.advantage_R[row_S].split(total),
            loss_mask=mask_S.split(total),
            rl_weights=None,
            ce_weights=None,
            ref_kl_weights=None,
            rl_loss_fn=loss_fn,
            rl_scale=tokens,
            ce_scale=1,
            ref_kl_scale=1,
        )
        return result

    return _over_parts(loss_of)


def roll(objective: str) -> Tensor:
    """``ASymPOWorker.loss_func`` as a subclass of ROLL's worker, with a strategy that scores logits on one rank."""
    parent = upstream("roll.pipeline.rlvr.actor_pg_worker", "ActorPGWorker")
    require_call(parent.loss_func, ["self", "data", "output_tensor"])
    from asympo_megatron.integrations.roll import ASymPOWorker

    worker = object.__new__(
        type("Worker", (ASymPOWorker,), {"objective": build_objective(objective, **CASES[objective])})
    )
    worker.pipeline_config = roll_config()
    worker.worker_config = Namespace(apply_loss_scale=True)
    worker.strategy = Namespace(op_compute_log_probs=_roll_log_probs)
    whole = make_batch()
    counts = {"batch_num_tokens": {"response_mask": whole.mask_P.sum()}}
    counts["global_valid_samples"] = {"default": torch.tensor(whole.num_responses)}

    def loss_of(part: ParityBatch, logits_PV: Tensor) -> Tensor:
        rows = sequences(part, logits_PV)
        data = Namespace(
            batch={"input_ids": rows["tokens"], "response_mask": rows["mask"], "advantages": rows["advantages"][:, 1:]},
            meta_info=counts,
        )
        result, _ = worker.loss_func(data, rows["logits"])
        return result

    return _over_parts(loss_of)


def roll_config(**changes: Any) -> Namespace:
    """The options of ROLL's pipeline that the adapter reads, at ROLL's defaults."""
    correction = Namespace(is_weight=Namespace(enabled=False), filters=[])
    values = {
        "use_kl_loss": False,
        "entropy_loss_coef": 0,
        "difficulty_loss_weight": False,
        "length_loss_weight": False,
        "whiten_advantages": False,
        "rl_loss_coef": 1.0,
        "train_infer_correction": correction,
    }
    return Namespace(**{**values, **changes})


def _roll_log_probs(*, logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Recorded: [B, S - 1], zero where ``attention_mask`` (the response mask) is."""
    scored = torch.log_softmax(logits[:, :-1], -1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return scored * attention_mask[:, 1:]
