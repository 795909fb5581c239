"""Optimizer state in Megatron's checkpoints: the traps of Megatron-Core 0.16, in one file.

Megatron's optimizers expect the state of Apex's or Transformer Engine's FusedAdam. torch's AdamW differs in that it
creates its state lazily and keeps a ``step`` tensor for every parameter.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def prepare(optimizer: Any) -> None:
    """Call before ``sharded_state_dict``: create the state that Adam would create in its first step.

    ``DistributedOptimizer.state_dict`` asserts that the state exists, ``FP32Optimizer`` would save a step-0 checkpoint
    without it.
    """
    adams = list(_with_torch_adam(optimizer))
    for wrapper in getattr(optimizer, "chained_optimizers", [optimizer]):
        if wrapper not in adams and wrapper.init_state_fn is not None:  # fused ones: Megatron knows their state
            wrapper.init_state_fn(wrapper.optimizer, wrapper.config)
    for wrapper in adams:
        for group in wrapper.optimizer.param_groups:
            for param in group["params"]:
                if not wrapper.optimizer.state[param]:
                    wrapper.optimizer.state[param] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }


@contextlib.contextmanager
def compact_offsets(optimizer: Any) -> Iterator[None]:
    """Hold around ``sharded_state_dict``: number the parameters of a buffer as its gathered tensors are laid out.

    ``DistributedOptimizer.get_parameter_state_dp_zero`` joins the buckets of a buffer without their padding (its
    ``offset_in_world_tensors``), and ``sharded_param_state_fully_reshardable`` cuts the result by
    ``buffer.param_index_map``, whose offsets count that padding (distrib_optimizer.py of 0.16.1, lines 1107-1118 and
    1475-1501). Every parameter behind a padded bucket would be saved shifted, and nothing would say so.
    """
    wrappers = getattr(optimizer, "chained_optimizers", [optimizer])
    sharded = [wrapper for wrapper in wrappers if isinstance(wrapper, DistributedOptimizer)]
    buffers = {id(buffer): buffer for wrapper in sharded for buffer in wrapper.buffers}
    padded = {key: buffer.param_index_map for key, buffer in buffers.items()}
    try:
        for buffer in buffers.values():
            buffer.param_index_map = _without_padding(buffer)
        yield
    finally:
        for key, index_map in padded.items():
            buffers[key].param_index_map = index_map


def _without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    paddings, kept = [], 0
    for bucket in buffer.buckets:
        paddings.append(bucket.offset - kept)
        kept += bucket.numel_unpadded
    return {
        param: (start - paddings[bucket], end - paddings[bucket], bucket)
        for param, (start, end, bucket) in buffer.param_index_map.items()
    }


@torch.no_grad()
def load_state(optimizer: Any, state: Any) -> None:
    """``optimizer.load_state_dict(state)``, right for torch's AdamW; options (lr, betas, eps) stay as configured."""
    options = [_options(group) for group in optimizer.param_groups]
    state = _fit(optimizer, state)
    adams = list(_with_torch_adam(optimizer))
    for wrapper in adams:
        if isinstance(wrapper, DistributedOptimizer):
            # The inherited method copies every entry of the state, "step" too, which the checkpoint does not hold.
            wrapper._set_main_param_and_optimizer_states = _Setter(wrapper)
    for wrapper, part in _parts(optimizer, state):
        if wrapper in adams and not isinstance(wrapper, DistributedOptimizer):
            _restore_step_zero(part)
        _adopt_schedule(wrapper.param_groups, part.get("optimizer", part)["param_groups"])
    try:
        # Without no_grad: float32 main parameters are views of leaves, which autograd refuses to copy into.
        optimizer.load_state_dict(state)
    finally:
        for wrapper in adams:
            wrapper.__dict__.pop("_set_main_param_and_optimizer_states", None)
    for group, ours in zip(optimizer.param_groups, options, strict=True):  # Megatron keeps the order of our groups
        group.update(ours)
    unshare_steps(optimizer)


def _parts(optimizer: Any, state: dict[Any, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Each inner optimizer with its state: a dict of its own, or (dense parameters, experts) dicts under 0, 1."""
    wrappers = getattr(optimizer, "chained_optimizers", [optimizer])
    return [(wrappers[0], state)] if len(wrappers) == 1 else [(w, state[i]) for i, w in enumerate(wrappers)]


def _fit(optimizer: Any, state: dict[Any, Any]) -> dict[Any, Any]:
    """``state`` as this optimizer nests it: expert parallelism has a second one for experts, one expert rank has not.

    Tensors arrive under this optimizer's nesting, whatever the checkpoint's; what is saved once for all ranks (options
    and the step) keeps the checkpoint's. Options are those of the run anyway, so the step is all that is carried over.
    """
    nested = len(getattr(optimizer, "chained_optimizers", [optimizer])) > 1
    saved_nested = not {"param_groups", "optimizer", "state"} & state.keys() if nested else 0 in state
    if nested == saved_nested:
        return state
    saved = state[0] if saved_nested else state
    fitted = {key: part for key, part in state.items() if isinstance(key, int) == nested}
    for wrapper, part in _parts(optimizer, fitted):
        if isinstance(wrapper, DistributedOptimizer):
            steps = [group["step"] for group in saved["optimizer"]["param_groups"] if "step" in group]
            own = wrapper.state_dict()["optimizer"]
            groups = [{**group, **({"step": steps[0]} if steps else {})} for group in own["param_groups"]]
            part["optimizer"] = {**own, "param_groups": groups}
            part["param_state_sharding_type"] = saved["param_state_sharding_type"]
        else:
            pairs = zip(wrapper.param_groups, part["param_groups"], strict=True)
            part["param_groups"] = [{**_options(ours), "params": group["params"]} for ours, group in pairs]
            if "common_step" in saved["state"]:
                part["state"]["common_step"] = saved["state"]["common_step"]
    return fitted


def unshare_steps(optimizer: Any) -> None:
    """Give every parameter a ``step`` of its own: ``load_state_dict`` hands one tensor to all, and each adds to it."""
    for wrapper in _with_torch_adam(optimizer):
        for state in wrapper.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What the run configures of a parameter group; ``step`` is Megatron's count of the steps done."""
    return {name: value for name, value in group.items() if name not in {"params", "step"}}


def _adopt_schedule(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """From 0.19 on the bounds of the schedule are part of what a saved group is found by: a new lr would match none."""

    def kind(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(name) for name in ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr"))

    ours = {kind(group): group for group in own}
    for group in saved:
        now = ours.get(kind(group), {})
        group.update({name: now[name] for name in ("max_lr", "min_lr", "start_wd", "end_wd") if name in now})


def _restore_step_zero(state: dict[str, Any]) -> None:
    """``_extract_common_per_param_step`` finds step 0 falsy and leaves it out of the checkpoint."""
    entries = state.get("optimizer", state)["state"]
    if "common_step" not in entries:
        for entry in entries.values():
            entry.setdefault("step", torch.zeros((), dtype=torch.float32))


class _Setter:
    """Copy loaded tensors of one model parameter into the main parameter and the moments."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def __call__(self, model_param: Any, tensors: dict[str, Any]) -> None:
        inner = self._wrapper.optimizer
        group, order = self._wrapper.model_param_group_index_map[model_param]
        main = inner.param_groups[group]["params"][order]
        for name, target in {"param": main, **inner.state[main]}.items():
            if name != "step":
                target.copy_(tensors[name])


def _with_torch_adam(optimizer: Any) -> Iterator[Any]:
    for wrapper in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(getattr(wrapper, "optimizer", None), (torch.optim.AdamW, torch.optim.Adam)):
            yield wrapper
