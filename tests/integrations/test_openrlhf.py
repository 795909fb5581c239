"""OpenRLHF: the recorded contract, and (slow) the real package."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calls import accumulate, check_gradient, spread
from parity import CASES, make_batch
from recorded import load_adapter, openrlhf_args, openrlhf_modules

from asympo_megatron.advantages import compute_advantages
from asympo_megatron.errors import BatchError, ConfigError, IntegrationError
from asympo_megatron.objectives import build_objective

sys.path.append(str(Path(__file__).parents[2] / "tools" / "check_integration"))
import placeholders

TRAINED = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]  # OpenRLHF's N: the response without trained tokens is not in it
TWO = [[0, 2, 3, 5, 8, 9], [1, 4, 6, 7, 10]]


@pytest.fixture
def openrlhf(monkeypatch):
    return load_adapter(monkeypatch, "openrlhf", openrlhf_modules())


def gradient(loss_fn, batch, microbatches, dp_size=1):
    """As ``training_step``: DeepSpeed divides every loss by the micro-batches and averages over ranks."""
    counts = {
        "dp_size": dp_size,
        "batch_num_tokens": batch.mask_P.sum() / len(microbatches),
        "global_batch_size": (batch.token_count_R > 0).sum() / len(microbatches),
    }

    def loss_of(rows, part, logprob_P):
        nothing = torch.full_like(part.mask_RL, torch.nan, dtype=torch.float32)
        loss, *_ = loss_fn(part.pad(logprob_P, -1.0), nothing, spread(part), action_mask=part.mask_RL, **counts)
        return loss / len(microbatches) / dp_size

    return accumulate(batch, microbatches, loss_of)


@pytest.mark.parametrize("dp_size", [1, 4])
@pytest.mark.parametrize("microbatches", [[list(range(11))], TWO], ids=["one", "two"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_core_s(openrlhf, name, microbatches, dp_size):
    batch, _ = make_batch().rows(TRAINED)
    loss = openrlhf.ObjectiveLoss(build_objective(name, **CASES[name]))
    check_gradient(gradient(loss, batch, microbatches, dp_size), name, batch)


def test_a_response_without_trained_tokens_is_not_in_n(openrlhf):
    batch = make_batch()
    loss = openrlhf.ObjectiveLoss(build_objective("asympo", **CASES["asympo"]))
    theirs = gradient(loss, batch, [list(range(12))])
    check_gradient(theirs * 11 / 12, "asympo", batch)
    with pytest.raises(AssertionError, match="relative error"):
        check_gradient(theirs, "asympo", batch)


def test_a_mean_over_tokens_would_be_noticed(openrlhf):
    batch, _ = make_batch().rows(TRAINED)
    loss = openrlhf.ObjectiveLoss(build_objective("asympo", **CASES["asympo"]))

    def by_tokens(*tensors, action_mask, **counts):
        share_RL = action_mask / action_mask.sum(1, keepdim=True)
        return loss(tensors[0], tensors[1], tensors[2] * share_RL, action_mask=action_mask, **counts)

    with pytest.raises(AssertionError, match="relative error"):
        check_gradient(gradient(by_tokens, batch, TWO), "asympo", batch)


def test_what_cannot_be_right_is_refused(openrlhf):
    loss = openrlhf.ObjectiveLoss(build_objective("asympo"))
    with pytest.raises(BatchError, match="no global_batch_size"):
        loss(torch.zeros(1, 2), None, torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(BatchError, match="differ between the tokens"):
        loss(torch.zeros(1, 2), None, torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), global_batch_size=1.0)
    with pytest.raises(ConfigError, match="'grpo' needs behavior_logprob_T"):
        openrlhf.ObjectiveLoss(build_objective("grpo"))


def test_the_policy_actor_has_our_loss_and_no_pass_for_old_log_probs(openrlhf):
    objective = build_objective("asympo", nll_floor=0.5)
    actor = openrlhf.policy_actor(objective).__ray_actor_class__()
    actor.init_model_from_pretrained(SimpleNamespace(args=openrlhf_args()), "MODEL", max_steps=3)
    assert actor.trainer.actor_loss_fn.objective == objective
    mask = torch.tensor([[True, False], [True, True]])
    old = actor.forward(sequences=torch.zeros(2, 5), action_mask=mask, attention_mask=None)
    assert old.tolist() == [[0.0, 0.0], [0.0, 0.0]]


REFUSED = [
    ({"is_correction_level": "token"}, "Set --algo.advantage.is_correction_level=off"),
    ({"estimator": "reinforce_baseline"}, "Set one of dr_grpo, rloo, group_norm"),
    ({"init_coef": 0.01}, r"Set --algo\.kl\.init_coef 0"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_setting_that_would_spoil_it_is_named(openrlhf, change, message):
    actor = openrlhf.policy_actor(build_objective("asympo")).__ray_actor_class__()
    with pytest.raises(ConfigError, match=message):
        actor.init_model_from_pretrained(SimpleNamespace(args=openrlhf_args(**change)), "MODEL")
    openrlhf.check_settings(openrlhf_args(init_coef=0.01, use_loss=True))


def test_main_hands_our_actor_to_their_entry_point(openrlhf, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main", "--asympo.options", '{"nll_floor": 0.5}', "--train.batch_size", "8"])
    ran = []
    monkeypatch.setattr(openrlhf.runpy, "run_module", lambda name, **_: ran.append((name, sys.argv[1:])))
    theirs = openrlhf.ppo_actor.PolicyModelActor.__ray_actor_class__
    openrlhf.main()
    assert ran == [("openrlhf.cli.train_ppo_ray", ["--train.batch_size", "8"])]
    assert issubclass(openrlhf.ppo_actor.PolicyModelActor.__ray_actor_class__, theirs)
    openrlhf.PolicyLoss.forward = sorted
    with pytest.raises(IntegrationError, match="PolicyLoss takes"):
        openrlhf.main()


def test_a_missing_hook_is_loud(monkeypatch):
    modules = openrlhf_modules()
    modules["openrlhf.models"].clear()
    with pytest.raises(IntegrationError, match="Install openrlhf"):
        load_adapter(monkeypatch, "openrlhf", modules)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openrlhf") is None, reason="openrlhf is not installed: make test-integrations")
class TestRealOpenRLHF:
    @pytest.fixture(autouse=True)
    def without_engines(self, monkeypatch):
        """DeepSpeed, vLLM and flash-attn are imported beside the loss path; calling anything of them raises."""
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
        placeholders.allow("openrlhf")

    @pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
    @pytest.mark.parametrize("name", CASES)
    def test_training_steps_have_the_core_s_gradient(self, name, dynamic):
        """Advantages of the experience maker, ``training_step``, and the counts of the optimizer step: all theirs."""
        from openrlhf.trainer.ray import ppo_actor
        from openrlhf.utils.loss_utils import iter_grad_accum_global_norm

        from asympo_megatron.integrations.openrlhf import ObjectiveLoss

        batch, _ = make_batch().rows(TRAINED)
        leaf_PV = batch.leaf()
        trainer = object.__new__(ppo_actor.ActorPPOTrainer)
        vars(trainer).update(stand_ins(batch, leaf_PV, len(TWO), dynamic))
        trainer.actor_loss_fn = ObjectiveLoss(build_objective(name, **CASES[name]))
        experiences = [experience(batch, rows) for rows in TWO]
        if dynamic:
            steps = [(part, None) for part in experiences]
        else:
            steps = iter_grad_accum_global_norm(experiences, trainer.strategy, len(TWO), lambda part: part.action_mask)
        for step, (part, counts) in enumerate(steps):
            status = trainer.training_step(part, 0.0, step, counts)
            assert status["metrics"]["ppo_kl"] == 0
        check_gradient(leaf_PV.grad, name, batch)

    def test_advantages_are_the_group_s_also_after_an_untrained_last_token(self):
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

        batch = make_batch()
        part = experience(batch, range(12))
        part.rewards, part.index, part.kl = batch.reward_R, list(range(12)), torch.zeros(part.action_mask.shape)
        maker = object.__new__(RemoteExperienceMaker)
        maker.strategy, maker.kl_ctl = SimpleNamespace(args=maker_args()), SimpleNamespace(value=0.0)
        maker.args, maker.advantage_estimator = maker.strategy.args, "dr_grpo"
        (done,) = maker.compute_advantages_and_returns([part])
        want = [value for row in batch.reward_R.view(3, 4) for value in compute_advantages(row.tolist(), "group_mean")]
        want_RL = torch.tensor(want)[:, None].expand_as(done.advantages)
        assert batch.mask_RL.any(1).sum() == 11
        torch.testing.assert_close(done.advantages[batch.mask_RL], want_RL[batch.mask_RL], rtol=0, atol=1e-6)

    def test_the_actor_class_of_ray_is_theirs_with_our_loss(self):
        import cloudpickle
        from openrlhf.trainer.ray import ppo_actor

        from asympo_megatron.integrations import openrlhf

        openrlhf._check_hook()
        made = openrlhf.policy_actor(build_objective("asympo", nll_floor=0.5)).__ray_actor_class__
        assert issubclass(made, ppo_actor.PolicyModelActor.__ray_actor_class__)
        sent = cloudpickle.loads(cloudpickle.dumps(made))
        mask = torch.ones(2, 3, dtype=torch.bool)
        assert torch.equal(sent.forward(None, sequences=None, action_mask=mask, attention_mask=None), torch.zeros(2, 3))


def experience(batch, rows):
    """A micro-batch as the replay buffer makes it; old log-probs are not known."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    part, _ = batch.rows(list(rows))
    return Experience(
        sequences=torch.tensor(list(rows)),
        action_mask=part.mask_RL,
        action_log_probs=torch.zeros(part.mask_RL.shape),
        advantages=spread(part),
    )


def stand_ins(batch, leaf_PV, microbatches, dynamic):
    """What a trainer holds: an actor that scores free logits, a strategy that divides as DeepSpeed does."""

    def actor(rows, *_, **__):
        part, index = batch.rows(rows.tolist())
        return part.pad(part.logprob(leaf_PV[index]), -1.0), SimpleNamespace()

    actor.train = lambda: None
    accumulated = 1 if dynamic else microbatches  # under dynamic batches the counts are those of the whole step
    strategy = SimpleNamespace(
        ring_attn_group=None,
        backward=lambda loss, *_: (loss / accumulated).backward(),
        optimizer_step=lambda *_, **__: None,
        get_grad_norm=lambda _: 0.0,
    )
    count = float((batch.token_count_R > 0).sum())
    buffer = SimpleNamespace(
        dynamic_batch_num_tokens=[float(batch.mask_P.sum())] * microbatches,
        dynamic_global_batch_size=[count] * microbatches,
        dynamic_optimizer_step=[0] * (microbatches - 1) + [1],
    )
    args = openrlhf_args()
    args.actor = SimpleNamespace(entropy_coef=None)
    args.train = SimpleNamespace(dynamic_batch_enable=dynamic)
    return {
        "actor": actor,
        "strategy": strategy,
        "replay_buffer": buffer,
        "args": args,
        "aux_loss": False,
        "ema_model": None,
        "actor_optim": None,
        "actor_scheduler": SimpleNamespace(get_last_lr=lambda: [0.0]),
    }


def maker_args():
    args = openrlhf_args()
    args.algo.advantage.gamma = 1.0
    args.algo.advantage.no_std_norm = True
    args.rollout = SimpleNamespace(n_samples_per_prompt=4)
    args.reward = SimpleNamespace(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None)
    return args
