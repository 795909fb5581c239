"""TRL: the recorded contract of both trainers."""

from types import SimpleNamespace

import pytest
import torch
from calls import ONE, TWO, UNEVEN, accumulate, check_gradient, spread
from parity import CASES, make_batch
from recorded import load_adapter, trl_args, trl_async_modules, trl_modules

from asympo_megatron.errors import BatchError, ConfigError, IntegrationError
from asympo_megatron.objectives import build_objective


@pytest.fixture
def trl(monkeypatch):
    return load_adapter(monkeypatch, "trl", trl_modules())


@pytest.fixture
def trl_async(monkeypatch):
    return load_adapter(monkeypatch, "trl_async", trl_async_modules())


def grpo_inputs(part, per_token):
    """A micro-batch of GRPOTrainer: padded responses, with the tokens of tools in a mask of their own."""
    whole = part.pad(torch.ones_like(part.token_P))
    return {
        "prompt_ids": torch.zeros(part.num_responses, 2, dtype=torch.long),
        "prompt_mask": torch.ones(part.num_responses, 2, dtype=torch.long),
        "completion_ids": part.pad(part.token_P),
        "completion_mask": whole,
        "tool_mask": part.mask_RL.long(),
        "advantages": spread(part) if per_token else part.advantage_R,
    }


@pytest.mark.parametrize("per_token", [False, True], ids=["advantages-R", "advantages-RL"])
@pytest.mark.parametrize("microbatches", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("name", CASES)
def test_grpo_has_the_core_s_gradient(trl, name, microbatches, per_token):
    trainer = trl.AsympoGRPOTrainer(trl_args(), objective=build_objective(name, **CASES[name]))
    trainer.current_gradient_accumulation_steps = len(microbatches)
    batch = make_batch()

    def loss_of(rows, part, logprob_P):
        return trainer._compute_loss(lambda _: part.pad(logprob_P, -1.0), grpo_inputs(part, per_token))

    check_gradient(accumulate(batch, microbatches, loss_of), name, batch)
    logged = trainer._metrics["train"][f"{name}/zero_advantage_fraction"]
    assert len(logged) == len(microbatches)
    absent_R = (batch.token_count_R == 0) & per_token  # no token, no advantage
    assert sum(logged) / len(logged) == pytest.approx(float(((batch.advantage_R == 0) | absent_R).float().mean()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.04}, "beta is 0.04.* Set beta=0.0"),
        ({"top_entropy_quantile": 0.2}, "Set top_entropy_quantile=1.0"),
        ({"off_policy_mask_threshold": 0.5}, "Set off_policy_mask_threshold=None"),
        ({"use_vllm": True}, "Set vllm_importance_sampling_correction=False"),
    ],
)
def test_grpo_names_the_flag_it_cannot_have(trl, change, message):
    trl.AsympoGRPOTrainer(trl_args(use_vllm=True, vllm_importance_sampling_correction=False))
    with pytest.raises(ConfigError, match=message):
        trl.AsympoGRPOTrainer(trl_args(**change))


def test_liger_is_refused_where_it_replaces_the_loss(monkeypatch):
    """``compute_loss`` of 1.10 calls ``compute_liger_loss`` in the place of ``_compute_loss``; 1.16.0 has none."""
    modules = trl_modules()
    liger = trl_args(use_liger_kernel=True)
    load_adapter(monkeypatch, "trl", modules).AsympoGRPOTrainer(liger)
    modules["trl"]["GRPOTrainer"].compute_liger_loss = lambda *_: None
    trl = load_adapter(monkeypatch, "trl", modules)
    trl.AsympoGRPOTrainer(trl_args())
    with pytest.raises(ConfigError, match="Set use_liger_kernel=False"):
        trl.AsympoGRPOTrainer(liger)


def test_an_objective_with_behavior_data_is_refused(trl, trl_async):
    for trainer in (trl.AsympoGRPOTrainer, trl_async.AsympoAsyncGRPOTrainer):
        with pytest.raises(ConfigError, match="'grpo' needs behavior_logprob_T"):
            trainer(trl_args(token_budget=0), objective=build_objective("grpo"))
        with pytest.raises(ConfigError, match="divided by tokens"):
            trainer(trl_args(token_budget=0), objective=build_objective("sft"))


def async_inputs(part, pad=3):
    """A row of DataCollatorForRollout: loss terms by position, sample and advantage; padded behind."""
    index_T = part.scoring_index_P[part.mask_P]
    fill = torch.full((pad,), -1)
    total, samples = int(part.sequence_length_R.sum()), part.num_responses
    return {
        "input_ids": part.sequence_tokens[None],
        "attention_mask": torch.ones(1, total),
        "token_index": torch.cat([index_T, fill])[None],
        "segment_id": torch.cat([part.row_P[part.mask_P], 0 * fill])[None],
        "advantages": torch.cat([part.advantage_R[part.row_P][part.mask_P], 0.0 * fill])[None],
        "global_n_forward_tokens": torch.tensor([float(total)]),
        "mean_seq_len": torch.tensor([total / samples]),
    }


def async_gradient(trainer, batch, microbatches):
    trainer.current_gradient_accumulation_steps = len(microbatches)

    def loss_of(rows, part, logprob_P):
        total = int(part.sequence_length_R.sum())
        logprob_S = torch.linspace(-9, -1, total).index_put((part.scoring_index_P,), logprob_P)
        return trainer.compute_loss(lambda **_: SimpleNamespace(log_probs=logprob_S[None]), async_inputs(part))

    return accumulate(batch, microbatches, loss_of)


@pytest.mark.parametrize("microbatches", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("name", CASES)
def test_async_grpo_has_the_core_s_gradient(trl_async, name, microbatches):
    objective = build_objective(name, **CASES[name])
    trainer = trl_async.AsympoAsyncGRPOTrainer(trl_args(token_budget=0), objective=objective)
    batch = make_batch()
    check_gradient(async_gradient(trainer, batch, microbatches), name, batch)


def test_async_grpo_with_a_token_budget_divides_by_a_fixed_number(trl_async):
    objective = build_objective("asympo", **CASES["asympo"])
    with pytest.raises(ConfigError, match="Set token_budget=0, or pass responses_per_step"):
        trl_async.AsympoAsyncGRPOTrainer(trl_args())
    trainer = trl_async.AsympoAsyncGRPOTrainer(trl_args(), objective=objective, responses_per_step=12)
    batch = make_batch()
    check_gradient(async_gradient(trainer, batch, UNEVEN), "asympo", batch)


def test_means_of_uneven_micro_batches_would_be_noticed(trl_async):
    objective = build_objective("asympo", **CASES["asympo"])
    trainer = trl_async.AsympoAsyncGRPOTrainer(trl_args(token_budget=0), objective=objective)
    batch = make_batch()
    with pytest.raises(AssertionError, match="relative error"):
        check_gradient(async_gradient(trainer, batch, UNEVEN), "asympo", batch)


def test_async_grpo_refuses_what_it_does_not_know(trl_async):
    part = make_batch()
    trainer = trl_async.AsympoAsyncGRPOTrainer(trl_args(token_budget=0))
    model = lambda **_: SimpleNamespace(log_probs=torch.zeros(1, int(part.sequence_length_R.sum())))  # noqa: E731
    inputs = async_inputs(part)
    with pytest.raises(BatchError, match="differ between the tokens"):
        trainer.compute_loss(model, {**inputs, "advantages": torch.randn_like(inputs["advantages"])})


@pytest.mark.parametrize("name", ["trl", "trl_async"])
def test_a_missing_hook_is_loud(monkeypatch, name):
    with pytest.raises(IntegrationError, match="Install trl"):
        load_adapter(monkeypatch, name, {"trl.experimental.async_grpo": {}})


def test_a_changed_hook_is_loud(monkeypatch):
    modules = trl_modules()
    modules["trl"]["GRPOTrainer"]._get_per_token_logps_and_entropies = sorted
    with pytest.raises(IntegrationError, match="takes no compute_aux_loss"):
        load_adapter(monkeypatch, "trl", modules)
    modules = trl_async_modules()
    modules["trl.experimental.async_grpo"]["AsyncGRPOTrainer"].compute_loss = sorted
    with pytest.raises(IntegrationError, match="compute_loss takes"):
        load_adapter(monkeypatch, "trl_async", modules)
