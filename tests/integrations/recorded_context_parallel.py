"""slime and miles as recorded from their sources (commits in the adapters): signatures, layouts and scaling.

Ranks may be threads, so the context-parallel place of a rank lives in a thread-local. The index arithmetic is our own.
"""

import importlib
import sys
import threading
from types import ModuleType, SimpleNamespace

import torch
from torch.distributed.nn.functional import all_reduce

from asympo_megatron.parallel import zigzag_index

place = threading.local()


def local_response_positions(total, length, longest=None):
    """Positions inside a response that a rank scores, in the order in which it holds them."""
    whole = longest or total
    whole += -whole % (2 * place.cp_size)
    index = zigzag_index(torch.tensor([0, whole]), place.cp_size, place.cp_rank)
    offset = index - (total - length - 1)
    return offset[(offset >= 0) & (offset < length)]


def slice_log_prob_with_cp(log_prob, total_length, response_length, qkv_format="thd", max_token_len=None):
    if place.cp_size == 1:
        return log_prob
    longest = max_token_len if qkv_format == "bshd" else None
    return log_prob[local_response_positions(total_length, response_length, longest)]


def get_local_response_loss_masks(total_lengths, response_lengths, loss_masks, qkv_format="thd", max_seq_lens=None):
    longest = max_seq_lens or [None] * len(total_lengths)
    rows = zip(loss_masks, total_lengths, response_lengths, longest, strict=True)
    return [slice_log_prob_with_cp(mask, total, length, qkv_format, most) for mask, total, length, most in rows]


def scored(logits, args, tokens, total_lengths, response_lengths, longest):
    """One list entry a response: log-probs of this rank's response tokens, in zigzag order whatever the split."""
    bshd = args.qkv_format == "bshd"
    flat = logits.flatten(0, 1)
    start, local_start, rows, full = 0, 0, [], []
    for row, (token, total, length) in enumerate(zip(tokens, total_lengths, response_lengths, strict=True)):
        targets = token[-length:]
        if args.allgather_cp:
            first = flat.shape[0] * place.cp_rank
            position = torch.arange(length) + start + total - length - 1 - first
            mine = (position >= 0) & (position < flat.shape[0])
            part = torch.log_softmax(flat[position[mine]], -1).gather(-1, targets[mine, None]).squeeze(-1)
            full.append(torch.zeros(length).index_put((mine.nonzero().flatten(),), part))
        else:
            whole = longest[row] if bshd else total + (-total % (2 * place.cp_size) if place.cp_size > 1 else 0)
            index = zigzag_index(torch.tensor([0, whole]), place.cp_size, place.cp_rank)
            offset = index - (total - length - 1)
            mine = (offset >= 0) & (offset < length)
            local = flat[local_start : local_start + index.shape[0]][mine]
            rows.append(torch.log_softmax(local, -1).gather(-1, targets[offset[mine], None]).squeeze(-1))
            local_start += index.shape[0]
        start += total
    if not args.allgather_cp:
        return rows
    gathered = all_reduce(torch.cat(full), group=place.group).split(list(response_lengths))
    return [
        slice_log_prob_with_cp(part, total, length)
        for part, total, length in zip(gathered, total_lengths, response_lengths, strict=True)
    ]


def custom_function(args):
    module, _, name = args.custom_loss_function_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def refuse_call(*_):
    raise AssertionError("sum_of_sample_mean divides by the tokens of a rollout")


def slime_modules():
    def get_log_probs_and_entropy(
        logits,
        *,
        args,
        unconcat_tokens,
        total_lengths,
        response_lengths,
        with_entropy=False,
        non_loss_data=True,
        top_p_token_ids=None,
        top_p_token_offsets=None,
    ):
        rows = scored(logits, args, unconcat_tokens, total_lengths, response_lengths, None)
        return torch.empty(0), {"log_probs": rows}

    def get_rollout_top_p_logprob_kwargs(args, batch):
        return {}

    def loss_function(args, batch, num_microbatches, step_global_batch_size, logits):
        loss, log = custom_function(args)(args, batch, logits, refuse_call)
        assert all(value.dim() == 0 for value in log.values())
        if args.allgather_cp and place.cp_size > 1:
            loss = loss + 0 * logits.sum()
        scale = num_microbatches / step_global_batch_size * place.dp_size * place.cp_size
        return loss * scale, torch.tensor(1), {"keys": list(log), "values": list(log.values())}

    return {
        "slime.backends.megatron_utils.loss": [
            get_log_probs_and_entropy,
            get_rollout_top_p_logprob_kwargs,
            loss_function,
        ],
        "slime.backends.megatron_utils.cp_utils": [slice_log_prob_with_cp],
    }


def miles_modules():
    def get_log_probs_and_entropy(
        logits,
        *,
        args,
        unconcat_tokens,
        total_lengths,
        response_lengths,
        with_entropy=False,
        entropy_requires_grad=True,
        non_loss_data=True,
        max_seq_lens=None,
    ):
        return {"log_probs": scored(logits, args, unconcat_tokens, total_lengths, response_lengths, max_seq_lens)}

    def loss_function(args, batch, num_microbatches, logits, apply_megatron_loss_scaling=False, num_rollouts=None):
        assert apply_megatron_loss_scaling
        loss, log = custom_function(args)(args, batch, logits, refuse_call)
        if place.cp_size > 1 and args.allgather_cp:
            loss = loss + 0 * logits.sum()
        scale = num_microbatches / num_rollouts * place.dp_size * place.cp_size
        return loss * scale, torch.tensor(1), {"keys": list(log), "values": list(log.values())}

    def get_parallel_state():
        return SimpleNamespace(cp=SimpleNamespace(size=place.cp_size, rank=place.cp_rank, group=place.group))

    base = "miles.backends.training_utils"
    return {
        f"{base}.loss": [loss_function],
        f"{base}.cp_utils": [slice_log_prob_with_cp, get_local_response_loss_masks],
        f"{base}.loss_hub.logit_processors": [get_log_probs_and_entropy],
        f"{base}.parallel": [get_parallel_state],
    }


def install(monkeypatch, modules):
    """Put stand-ins (functions and classes by module name) where imports find them."""
    for path, contents in modules.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules:
                module = ModuleType(name)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, name, module)
        for item in contents:
            setattr(sys.modules[path], item.__name__, item)


def enter(group, cp_size, context=None):
    """Tell this rank where it is; context-parallel ranks are neighbours, as in Megatron.

    Threads hold one group: there all ranks are one context-parallel group, or none is. Processes pass theirs.
    """
    rank, size = group.rank(), group.size()
    place.dp_rank, place.dp_size = rank // cp_size, size // cp_size
    place.cp_rank, place.cp_size = rank % cp_size, cp_size
    place.group = context or (group if cp_size == size else None)


def mpu_stand_in():
    return SimpleNamespace(
        get_context_parallel_world_size=lambda: place.cp_size, get_context_parallel_group=lambda: place.group
    )
