"""AReaL: the recorded contract, and (slow) the real package."""

import dataclasses
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from calls import ONE, TWO, UNEVEN, areal_gradient, check_gradient, packed, packed_logprob
from parity import CASES, make_batch
from recorded import areal_modules, load_adapter

from asympo_megatron.errors import BatchError, ConfigError, IntegrationError
from asympo_megatron.objectives import build_objective

PARTS = pytest.mark.parametrize("microbatches", [ONE, TWO, UNEVEN], ids=["one", "two", "uneven"])
CENTRED = SimpleNamespace(mean_level="group", group_size=4)


@pytest.fixture
def areal(monkeypatch):
    return load_adapter(monkeypatch, "areal", areal_modules())


def settings(areal, **changes):
    return areal.AsympoActorConfig(**{"reward_norm": CENTRED, **changes})


@PARTS
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_core_s(areal, name, microbatches):
    engine = areal.AsympoFSDPPPOActor(settings(areal, objective=name, objective_options=CASES[name]))
    loss_fn, weight_fn = engine.actor.ppo_update(None)
    assert engine.training, "other calls reach the engine"
    batch = make_batch()
    check_gradient(areal_gradient(loss_fn, weight_fn, batch, microbatches), name, batch)


def test_a_response_that_ends_untrained_keeps_its_advantage(areal):
    """AReaL 1.0.4 gives the second row 0, which upsets the balance of its group."""
    actor = areal.AsympoFSDPPPOActor(settings(areal)).actor
    mask = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    data = actor._compute_advantages({"rewards": torch.tensor([0.5, -0.5]), "loss_mask": mask})
    assert data["advantages"].tolist() == [[0.0, 0.5, 0.5], [-0.5, -0.5, 0.0]]


def test_a_weight_by_tokens_would_be_noticed(areal):
    engine = areal.AsympoFSDPPPOActor(settings(areal, objective_options=CASES["asympo"]))
    loss_fn, _ = engine.actor.ppo_update(None)
    batch = make_batch()
    gradient = areal_gradient(loss_fn, lambda data: data["loss_mask"].count_nonzero(), batch, TWO)
    with pytest.raises(AssertionError, match="relative error"):
        check_gradient(gradient, "asympo", batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recompute_logprob": True}, "actor.recompute_logprob=False"),
        ({"use_decoupled_loss": True}, "actor.use_decoupled_loss=False"),
        ({"kl_ctl": 0.1}, "actor.kl_ctl=0.0"),
        ({"adv_norm": CENTRED}, "actor.adv_norm=None"),
        ({"reward_norm": None}, "actor.reward_norm.mean_level=group"),
        ({"reward_norm": SimpleNamespace(mean_level=None, group_size=4)}, "actor.reward_norm.mean_level=group"),
        ({"reward_norm": SimpleNamespace(mean_level="batch", group_size=4)}, "actor.reward_norm.mean_level=group"),
        (
            {"reward_norm": SimpleNamespace(mean_level="group", group_size=1)},
            "actor.reward_norm.group_size=gconfig.n_samples",
        ),
        ({"mask_no_eos_with_zero": True}, "actor.mask_no_eos_with_zero=False"),
        ({"objective": "grpo"}, "needs behavior_logprob_T"),
    ],
)
def test_a_setting_that_would_spoil_it_is_named(areal, change, message):
    areal.AsympoFSDPPPOActor(settings(areal))
    with pytest.raises(ConfigError, match=message):
        areal.AsympoFSDPPPOActor(settings(areal, **change))


def test_micro_batches_that_are_not_whole_responses_are_refused(areal):
    part = make_batch()
    objective = build_objective("asympo")
    logprob, data = packed_logprob(part, part.logprob(part.logits_PV)), packed(part)
    areal.asympo_loss(objective, logprob, logprob, data)
    for change, message in (
        ({"cu_seqlens": None}, "not a packed micro-batch"),
        ({"teacher_logp": logprob}, "no distillation term"),
        ({"advantages": torch.randn_like(logprob)}, "differ between the tokens"),
    ):
        with pytest.raises(BatchError, match=message):
            areal.asympo_loss(objective, logprob, logprob, {**data, **change})


def test_the_trainer_makes_our_engine_for_the_actor_only(areal):
    trainer = areal.AsympoPPOTrainer()
    alloc = SimpleNamespace(backend="fsdp", parallel="d2")
    assert trainer._create_train_engine(areal.PPOActorConfig(), alloc) == "theirs"
    engine = trainer._create_train_engine(settings(areal), alloc)
    assert isinstance(engine, areal.AsympoFSDPPPOActor)
    assert engine.parallel_strategy == "d2"
    with pytest.raises(ConfigError, match="has the fsdp engine only"):
        trainer._create_train_engine(settings(areal), SimpleNamespace(backend="megatron", parallel="d2"))


def test_a_changed_or_missing_hook_is_loud(monkeypatch):
    modules = areal_modules()
    modules["areal.engine.fsdp_engine"]["FSDPPPOActor"].train_batch = sorted
    with pytest.raises(IntegrationError, match="train_batch takes"):
        load_adapter(monkeypatch, "areal", modules)
    modules["areal.trainer.ppo.actor"].clear()
    with pytest.raises(IntegrationError, match="no class where"):
        load_adapter(monkeypatch, "areal", modules)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("areal") is None, reason="areal is not installed: make test-integrations")
class TestRealAReaL:
    @pytest.fixture(autouse=True)
    def no_trackers(self, monkeypatch):
        """areal imports four experiment trackers when it is imported; none lies on the path of the loss."""
        for name in ("swanlab", "wandb", "tensorboardX", "trackio"):
            monkeypatch.setitem(sys.modules, name, MagicMock(__spec__=ModuleSpec(name, None)))

    @PARTS
    @pytest.mark.parametrize("name", CASES)
    def test_the_actor_s_update_reaches_the_core_s_gradient(self, monkeypatch, name, microbatches):
        """compute_advantages and ppo_update of the real actor, the loss call path of the real FSDP engine."""
        from areal.api.cli_args import NormConfig

        from asympo_megatron.integrations import areal

        config = areal.AsympoActorConfig(
            objective=name,
            objective_options=CASES[name],
            ppo_n_minibatches=1,
            reward_norm=NormConfig(mean_level="group", std_level=None, group_size=4),
        )
        for change in ({"reward_norm": NormConfig()}, {"mask_no_eos_with_zero": True}):
            with pytest.raises(ConfigError):
                areal.AsympoPPOActor(dataclasses.replace(config, **change), None)
        batch = make_batch()
        process = FakeProcess(batch, microbatches)
        for method in ("train", "get_version", "train_batch"):
            monkeypatch.setattr(areal.FSDPPPOActor, method, process.method(method))
        engine = object.__new__(areal.AsympoFSDPPPOActor)
        engine.actor = areal.AsympoPPOActor(config, engine)
        data = engine.actor._compute_advantages(padded(batch))
        engine.actor._ppo_update(data)
        check_gradient(process.gradient, name, batch)


def padded(batch):
    """A rollout batch as AReaL's workflows make it: [R, L] sequences, log-probs and mask not yet shifted."""
    from areal.utils.data import pad_sequences_to_tensors

    rows, start = [], 0
    total = int(batch.sequence_length_R.sum())
    mask_S = torch.zeros(total).index_put((batch.scoring_index_P + 1,), batch.mask_P.float())
    for row, length in enumerate(batch.sequence_length_R.tolist()):
        part = slice(start, start + length)
        rows.append(
            {
                "input_ids": batch.sequence_tokens[part],
                "loss_mask": mask_S[part].int(),
                "logprobs": torch.zeros(length),
                "rewards": batch.reward_R[row],
            }
        )
        start += length
    rewards = torch.stack([row.pop("rewards") for row in rows])
    return {**pad_sequences_to_tensors(rows), "rewards": rewards}


class FakeProcess:
    """What an FSDP engine does with a model: packs and weighs as the real one, whose methods it calls."""

    def __init__(self, batch, microbatches):
        self.batch, self.microbatches = batch, microbatches

    def method(self, name):
        """As a method of the engine's class."""
        return lambda _, *given: getattr(self, name)(*given)

    def train(self):
        pass

    def get_version(self):
        return 0

    def train_batch(self, input_, loss_fn, loss_weight_fn):
        from areal.utils.data import pack_tensor_dict

        leaf_PV = self.batch.leaf()
        micro = []
        for rows in self.microbatches:
            index = torch.tensor(rows)
            cut = {key: value[index] if torch.is_tensor(value) else value for key, value in input_.items()}
            micro.append(pack_tensor_dict(cut))
        total = sum(loss_weight_fn(data) for data in micro)
        for rows, data in zip(self.microbatches, micro, strict=True):
            part, index = self.batch.rows(rows)
            logprob = packed_logprob(part, part.logprob(leaf_PV[index]))
            self._real_path(logprob, data, loss_fn, loss_weight_fn, total).backward()
        self.gradient = leaf_PV.grad
        return {"grad_norm": 0.0}

    def _real_path(self, logprob, data, loss_fn, loss_weight_fn, total):
        """``FSDPEngine._compute_logprobs_and_loss`` with the model's outputs put in."""
        from areal.engine.fsdp_engine import FSDPEngine

        stand_in = SimpleNamespace(
            config=SimpleNamespace(is_critic=False),
            enable_tree_training=False,
            _compute_logprobs_entropy=lambda *_: (logprob, torch.zeros_like(logprob)),
            _get_vocab_min_max_logits=lambda *_: (logprob, logprob),
        )
        context = SimpleNamespace(mb_input=data, model_inputs=None, ulysses_pad_size=0, pad_length=0)
        return FSDPEngine._compute_logprobs_and_loss(
            stand_in, logprob, context, loss_fn, loss_weight_fn, total, loss_multiplier=1.0
        )
