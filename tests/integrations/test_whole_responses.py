"""NeMo-RL, prime-rl and ROLL by contract, and the Megatron forward steps on Megatron's own schedule function."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import recorded_context_parallel
import recorded_whole as recorded
import torch
from parity import CASES, assert_same_gradient, core_gradient, make_batch

from asympo_megatron.errors import BatchError, ConfigError, IntegrationError
from asympo_megatron.objectives import build_objective
from asympo_megatron.parallel import ParallelGroups, zigzag_index
from asympo_megatron.testing.distributed import run_threads

sys.path.append(str(Path(__file__).parents[2] / "tools" / "check_integration"))
import checkout
import megatron_schedules
import whole_responses


@pytest.fixture
def adapter(request, monkeypatch):
    recorded_context_parallel.install(monkeypatch, recorded.MODULES[request.param])
    path = f"asympo_megatron.integrations.{request.param}"
    monkeypatch.delitem(sys.modules, path, raising=False)
    yield importlib.import_module(path)
    sys.modules.pop(path, None)


@pytest.mark.parametrize("objective", CASES)
@pytest.mark.parametrize(
    ("adapter", "name"), [(name, name) for name in recorded.MODULES], indirect=["adapter"], ids=list(recorded.MODULES)
)
def test_the_gradient_is_the_cores(adapter, name, objective):
    _, want = core_gradient(build_objective(objective, **CASES[objective]), make_batch())
    assert_same_gradient(getattr(whole_responses, name)(objective), want, make_batch())


@pytest.mark.parametrize("objective", CASES)
@pytest.mark.parametrize("name", ["megatron_lm", "megatron_bridge"])
def test_megatrons_schedule_function_gives_the_cores_gradient(monkeypatch, name, objective):
    if name == "megatron_bridge":
        monkeypatch.setattr(megatron_schedules, "upstream", bridge_upstream(checkout.upstream))
        bridge = importlib.import_module("asympo_megatron.integrations.megatron_bridge")
        monkeypatch.setattr(bridge, "model_groups", lambda _: ParallelGroups.single())
    results = {key: gradient for key, _, gradient in megatron_schedules.gradients(name)}
    _, want = core_gradient(build_objective(objective, **CASES[objective]), make_batch())
    assert_same_gradient(results[objective], want, make_batch())


def bridge_upstream(real):
    def needs_global_state_injection(step):
        return next(iter(checkout.inspect.signature(step).parameters)) in ("state", "global_state")

    return lambda module, name: needs_global_state_injection if "bridge" in module else real(module, name)


def context_gradient(group, share_counts):
    """Loss callbacks of all context-parallel ranks; Megatron adds gradients and counts up, then divides."""
    from asympo_megatron.integrations.megatron_lm import make_loss_func, split_batch

    batch, groups = make_batch(), ParallelGroups(context=group)
    pad = -batch.row_P.shape[0] % (2 * group.size())
    index = zigzag_index(torch.tensor([0, batch.row_P.shape[0] + pad]), group.size(), group.rank())
    leaf_PV = batch.leaf()
    nll = torch.nn.functional.pad(-batch.logprob(leaf_PV), (0, pad), value=torch.nan)[index]
    ids = torch.nn.functional.pad(batch.response_ids_P, (0, pad), value=-1)[index]
    counts = batch.token_count_R if share_counts else torch.bincount(ids[ids >= 0], minlength=12)
    given = {"tokens": ids, "labels": ids, "response_ids": ids, "advantages": batch.advantage_R, "token_counts": counts}
    _, responses = split_batch(given)
    loss_func = make_loss_func(build_objective("asympo", **CASES["asympo"]), groups)
    loss, count, figures = loss_func(responses, nll[None])
    loss.backward()
    return leaf_PV.grad, count, figures["J"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallel_ranks_of_megatron_add_up_to_the_cores_gradient(ranks):
    objective = build_objective("asympo", **CASES["asympo"])
    _, want = core_gradient(objective, make_batch())
    grads, counts, figures = zip(*run_threads(context_gradient, ranks, True), strict=True)
    assert_same_gradient(sum(grads) / sum(counts), want, make_batch())
    assert float(sum(figures)[1]) == make_batch().num_responses
    # The mutant: each rank gives the tokens it holds as the tokens of the response.
    grads, counts, _ = zip(*run_threads(context_gradient, ranks, False), strict=True)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same_gradient(sum(grads) / sum(counts), want, make_batch())


def test_megatron_without_per_token_loss_is_refused(monkeypatch):
    from asympo_megatron.integrations.megatron_lm import make_forward_step, split_batch

    model = megatron_schedules.ScoredLogits()
    model.config.calculate_per_token_loss = False
    with pytest.raises(ConfigError, match="Pass --calculate-per-token-loss"):
        make_forward_step(build_objective("asympo"))(iter([]), model)
    with pytest.raises(BatchError, match="the batch has no labels, response_ids, advantages, token_counts"):
        split_batch({"tokens": 1})


@pytest.mark.parametrize("adapter", ["nemo_rl"], indirect=True)
def test_nemo_rl_setup_returns_our_loss_in_the_place_of_theirs(adapter):
    loss, theirs = adapter.ASymPOLoss("spo", negative_scale=0.5), recorded.ClippedPGLossFn()
    config = Namespace(loss_fn=Namespace(reference_policy_kl_penalty=0.0, positive_example_nll_weight=0.0))
    parts = adapter.with_loss(lambda _, extra: ("policy", theirs, extra), loss)(config, "logger")
    assert parts == ("policy", loss, "logger")
    assert loss.use_fused_linear_logprobs
    with pytest.raises(IntegrationError, match="setup returned no ClippedPGLossFn"):
        adapter.with_loss(lambda _: ("policy",), loss)(config)
    config.loss_fn.reference_policy_kl_penalty = 0.01
    with pytest.raises(ConfigError, match=r"Set loss_fn.reference_policy_kl_penalty=0\."):
        adapter.with_loss(lambda _: ("policy", theirs), loss)(config)


@pytest.mark.parametrize("adapter", ["nemo_rl"], indirect=True)
def test_nemo_rl_figures_scaled_after_the_step_are_those_of_a_loss_that_knew_the_counts(adapter):
    """``MegatronPolicyWorker._scale_metric``: counts of 1 first, one division of every figure after the step."""
    mask_BS = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    data = {"token_mask": mask_BS, "sample_mask": torch.ones(2), "advantages": mask_BS * torch.tensor([[1.0], [-1.0]])}
    one, responses = torch.tensor(1.0), torch.tensor(8.0)
    loss = adapter.ASymPOLoss()
    _, wanted = loss(data, responses, one, -torch.ones(2, 2))
    _, raw = loss(data, one, one, -torch.ones(2, 2))
    plain = {name for name, kind in loss.metric_normalizations.items() if kind is recorded.MetricNormalizer.NONE}
    assert {name: value if name in plain else value / 8 for name, value in raw.items()} == pytest.approx(wanted)
    assert wanted["num_valid_samples"] == 2


def test_nemo_rl_before_it_scaled_figures(monkeypatch):
    path = "nemo_rl.algorithms.loss.interfaces"
    older = {path: [recorded.LossType, recorded.LossInputType, recorded.LossFunction]}
    recorded_context_parallel.install(monkeypatch, recorded.MODULES["nemo_rl"] | older)
    monkeypatch.delitem(sys.modules, "asympo_megatron.integrations.nemo_rl", raising=False)
    assert importlib.import_module("asympo_megatron.integrations.nemo_rl").ASymPOLoss().metric_normalizations == {}
    del sys.modules["asympo_megatron.integrations.nemo_rl"]


@pytest.mark.parametrize("adapter", ["prime_rl"], indirect=True)
def test_prime_rl_wants_a_scale_and_weights_of_one(adapter):
    one = torch.ones(3)
    inputs = recorded.LossInputs(-one, one, None, one, one.bool(), 0.5 * one)
    with pytest.raises(ConfigError, match="tokens_per_response is 0; set it to the mean trained length"):
        adapter.asympo_loss(inputs, tokens_per_response=0)
    with pytest.raises(BatchError, match="rl_weights other than 0 and 1"):
        adapter.asympo_loss(inputs, tokens_per_response=100.0)


ROLL = [
    ({"use_kl_loss": True}, "Set use_kl_loss=False"),
    ({"whiten_advantages": True}, "Set whiten_advantages=False"),
    ({"train_infer_correction": Namespace(is_weight=Namespace(enabled=True), filters=[])}, "train_infer_correction"),
]


@pytest.mark.parametrize("adapter", ["roll"], indirect=True)
@pytest.mark.parametrize(("change", "message"), ROLL)
def test_roll_options_that_spoil_the_gradient_are_named(adapter, change, message):
    worker = object.__new__(adapter.ASymPOWorker)
    worker.pipeline_config = whole_responses.roll_config(**change)
    worker.worker_config = Namespace(apply_loss_scale=True)
    with pytest.raises(ConfigError, match=message):
        worker.loss_func(Namespace(batch={}), torch.zeros(1))


@pytest.mark.parametrize("adapter", ["roll"], indirect=True)
def test_roll_without_loss_scale_is_refused(adapter):
    worker = object.__new__(adapter.ASymPOWorker)
    worker.pipeline_config = whole_responses.roll_config()
    worker.worker_config = Namespace(apply_loss_scale=False)
    with pytest.raises(ConfigError, match=r"actor_train\.apply_loss_scale is false"):
        worker.loss_func(Namespace(batch={}), torch.zeros(1))
