"""slime and miles by contract: recorded signatures, both CP layouts, and flags that would change the gradient."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import gloo_ranks
import pytest
import recorded_context_parallel as recorded
import torch
from parity import CASES, assert_same_gradient, core_gradient, make_batch

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import BatchError, ConfigError
from asympo_megatron.integrations import cp_local
from asympo_megatron.objectives import build_objective
from asympo_megatron.parallel import ParallelGroups
from asympo_megatron.testing.distributed import run_distributed, run_threads

sys.path.append(str(Path(__file__).parents[2] / "tools" / "check_integration"))
import context_parallel

NAMES = ("slime", "miles")


@pytest.fixture(params=NAMES)
def adapter(request, monkeypatch):
    recorded.install(monkeypatch, getattr(recorded, f"{request.param}_modules")())
    path = f"asympo_megatron.integrations.{request.param}"
    monkeypatch.delitem(sys.modules, path, raising=False)
    module = importlib.import_module(path)
    if request.param == "slime":
        monkeypatch.setattr(module, "mpu", recorded.mpu_stand_in())
    yield request.param, module
    sys.modules.pop(path, None)


def rank_gradient(group, name, cp_size, objective, case):
    recorded.enter(group, cp_size)
    place = recorded.place
    where = context_parallel.Place(place.dp_rank, place.dp_size, place.cp_rank, place.cp_size, group)
    return context_parallel.gradient(context_parallel.stack(name), where, objective, **case)


@pytest.mark.parametrize("objective", CASES)
@pytest.mark.parametrize(("ranks", "cp_size"), [(2, 2), (4, 4), (2, 1)])
def test_the_gradient_is_the_cores(adapter, ranks, cp_size, objective):
    name, _ = adapter
    _, want = core_gradient(build_objective(objective, **CASES[objective]), make_batch())
    for case in context_parallel.cases(name, cp_size):
        for got in run_threads(rank_gradient, ranks, name, cp_size, objective, case):
            assert_same_gradient(got, want, make_batch())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_processes_over_gloo_have_the_cores_gradient(name, ranks):
    batch, seen = make_batch(), set()
    want = {objective: core_gradient(build_objective(objective, **CASES[objective]), batch)[1] for objective in CASES}
    for results in run_distributed(gloo_ranks.gradients, ranks, name, timeout_s=300):
        for objective, layout, gradient in results:
            seen.add((objective, layout))
            if objective == "mutant":
                with pytest.raises(AssertionError, match="relative error"):
                    assert_same_gradient(gradient, want["asympo"], batch)
            else:
                assert_same_gradient(gradient, want[objective], batch)
    layouts = context_parallel.LAYOUTS[ranks]
    assert seen == {(name, layout) for name in (*CASES, "mutant") for layout in layouts} - {("mutant", (ranks, 1))}


def test_sums_of_one_rank_alone_are_caught(adapter, monkeypatch):
    """The mutant: normalised by the NLL of the rank's own tokens."""
    name, _ = adapter
    base = importlib.import_module("asympo_megatron.objectives.asympo")
    real = base.sum_per_response
    monkeypatch.setattr(base, "sum_per_response", lambda values, ids, rows, _: real(values, ids, rows, None))
    _, want = core_gradient(build_objective("asympo", **CASES["asympo"]), make_batch())
    got = run_threads(rank_gradient, 2, name, 2, "asympo", {"contiguous": False})[0]
    with pytest.raises(AssertionError, match="relative error"):
        assert_same_gradient(got, want, make_batch())


def consumers(loss, tensor):
    """How many operations of the graph behind ``loss`` send a gradient to ``tensor``."""
    found, seen, nodes = 0, set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = [function for function, _ in node.next_functions]
        found += following.count(tensor.grad_fn)
        nodes += following
    return found


@pytest.mark.parametrize("tokens", [3, 0])
def test_only_a_rank_without_response_tokens_adds_a_zero_of_the_logits_size(tokens):
    leaf = torch.randn(1, 4, 5, requires_grad=True)
    logits = leaf + torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf])  # the vocabulary is padded
    scored = torch.log_softmax(logits[0, :tokens], -1)[:, 0] if tokens else torch.zeros(0)
    batch = ResponseBatch(torch.zeros(tokens, dtype=torch.int64), torch.ones(1), torch.tensor([3]))
    loss, _ = cp_local.objective_loss(build_objective("asympo"), -scored, batch, ParallelGroups.single(), logits)
    assert consumers(loss, logits) == 1
    loss.backward()
    assert leaf.grad.isfinite().all()
    assert bool(leaf.grad.any()) == bool(tokens)


FLAGS = [
    ({"use_kl_loss": True}, "--use-kl-loss is set"),
    ({"entropy_coef": 0.01}, "--entropy-coef is set"),
    ({"use_tis": True}, "--use-tis is set"),
    ({"normalize_advantages": True}, "--normalize-advantages whitens over tokens"),
    ({"calculate_per_token_loss": True}, "Remove --calculate-per-token-loss"),
    ({"asympo_objective": "asimpo", "asympo_options": {}}, "did you mean 'asympo'"),
]


@pytest.mark.parametrize(("change", "message"), FLAGS)
def test_a_flag_that_spoils_the_gradient_is_named(adapter, change, message):
    _, module = adapter
    args = Namespace(**{"normalize_advantages": False, "calculate_per_token_loss": False, **change})
    with pytest.raises(ConfigError, match=message):
        module.asympo_loss(args, {}, torch.zeros(1, 4, 3), recorded.refuse_call)


def test_advantages_that_differ_inside_a_response_are_refused(adapter, monkeypatch):
    name, _ = adapter
    real = context_parallel.microbatch

    def uneven(*arguments):
        logits, batch = real(*arguments)
        batch["advantages"][0] = torch.arange(float(batch["advantages"][0].numel()))
        return logits, batch

    monkeypatch.setattr(context_parallel, "microbatch", uneven)
    with pytest.raises(RuntimeError, match="advantages differ between the tokens") as caught:
        run_threads(rank_gradient, 1, name, 1, "asympo", {"contiguous": False})
    assert BatchError.__name__ in str(caught.value)


def test_missing_advantages_name_the_hook(adapter, monkeypatch):
    name, _ = adapter
    real = context_parallel.microbatch

    def without(*arguments):
        logits, batch = real(*arguments)
        return logits, {**batch, "advantages": None}

    monkeypatch.setattr(context_parallel, "microbatch", without)
    with pytest.raises(RuntimeError, match="--rollout-data-postprocess-path"):
        run_threads(rank_gradient, 1, name, 1, "asympo", {"contiguous": False})


@pytest.mark.parametrize("adapter", ["slime"], indirect=True)
@pytest.mark.parametrize("cp_size", [1, 2])
def test_advantages_come_from_rewards_alone(adapter, cp_size):
    _, module = adapter
    recorded.place.cp_rank, recorded.place.cp_size = 0, cp_size
    data = {
        "rewards": [0.75, -0.25],
        "total_lengths": [8, 8],
        "response_lengths": [5, 7],
        "loss_masks": [torch.ones(5), torch.zeros(7)],
    }
    module.fill_advantages(None, 3, data)
    # CP 2, rank 0 holds tokens 0 1 6 7; token t scores t + 1, and the last one scores nothing.
    kept = [5, 7] if cp_size == 1 else [1, 3]
    assert [part.tolist() for part in data["advantages"]] == [[0.75] * kept[0], [-0.25] * kept[1]]


def test_groups_of_different_size_are_centred_one_by_one(adapter):
    _, module = adapter
    rewards = {0: [1.0, 0.0], 1: [1.0, 1.0, 1.0], 2: [0.0, 0.0, 1.0, 1.0]}
    samples = [
        Namespace(group_index=group, get_reward_value=lambda _, value=value: value)
        for group, values in rewards.items()
        for value in values
    ]
    raw, centred = module.group_advantages(Namespace(), samples)
    assert raw == [value for values in rewards.values() for value in values]
    assert centred == [0.5, -0.5, 0.0, 0.0, 0.0, -0.5, -0.5, 0.5, 0.5]
    samples[0].group_index = None
    with pytest.raises(BatchError, match="sample 0 has no group_index"):
        module.group_advantages(Namespace(), samples)
