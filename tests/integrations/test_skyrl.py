"""SkyRL: the recorded contract, and (slow) the real package."""

import dataclasses
import sys
import typing
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import typing_extensions
from calls import CORRECTIONS, ONE, TWO, UNEVEN, check_gradient, correction, skyrl_gradient, spread
from parity import CASES, make_batch
from recorded import load_adapter, skyrl_modules

from asympo_megatron.errors import BatchError, ConfigError, IntegrationError

NAMES = {"asympo": "asympo", "spo": "asympo_spo"}
OPTIONS = {option: value for options in CASES.values() for option, value in options.items()}
PARTS = pytest.mark.parametrize("microbatches", [ONE, TWO, UNEVEN], ids=["one", "two", "uneven"])


@pytest.fixture
def skyrl(monkeypatch):
    return load_adapter(monkeypatch, "skyrl", skyrl_modules())


def algorithm(**changes):
    defaults = {
        "loss_reduction": "sequence_mean",
        "off_policy_correction": correction(),
        "advantage_batch_normalize": False,
        "use_kl_in_reward": False,
    }
    return SimpleNamespace(**{**defaults, **changes})


@PARTS
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_core_s(skyrl, name, microbatches):
    skyrl.register(**OPTIONS)
    batch = make_batch()
    policy_loss = skyrl.ppo_utils.PolicyLossRegistry.get(NAMES[name])
    divide = skyrl.ppo_utils.apply_loss_reduction_to_advantages_minibatch
    check_gradient(skyrl_gradient(policy_loss, algorithm(), divide, batch, microbatches), name, batch)


def test_advantages_used_as_they_come_would_be_noticed(skyrl, monkeypatch):
    batch = make_batch()
    skyrl.register(**OPTIONS)
    keep = skyrl.padded_token_loss

    def forget(objective, logprob_RL, mask_RL, share_RL):
        return keep(objective, logprob_RL, mask_RL, share_RL / mask_RL.sum(dim=-1, keepdim=True).clamp(min=1))

    monkeypatch.setattr(skyrl, "padded_token_loss", forget)
    divide = skyrl.ppo_utils.apply_loss_reduction_to_advantages_minibatch
    with pytest.raises(AssertionError, match="relative error"):
        check_gradient(
            skyrl_gradient(skyrl.ppo_utils.PolicyLossRegistry.get("asympo"), algorithm(), divide, batch, ONE),
            "asympo",
            batch,
        )


def test_what_cannot_be_right_is_refused(skyrl):
    skyrl.register()
    batch = make_batch()
    policy_loss = skyrl.ppo_utils.PolicyLossRegistry.get("asympo")
    logprob = batch.pad(batch.logprob(batch.logits_PV))

    def call(config, advantages):
        return policy_loss(logprob, None, advantages, config=config, loss_mask=batch.mask_RL.float())

    call(algorithm(), spread(batch))
    with pytest.raises(ConfigError, match="loss_reduction=sequence_mean"):
        call(algorithm(loss_reduction="token_mean"), spread(batch))
    for change in CORRECTIONS:
        with pytest.raises(ConfigError, match="off_policy_correction"):
            call(algorithm(off_policy_correction=correction(**change)), spread(batch))
    with pytest.raises(ConfigError, match=r"Set trainer\.algorithm\.advantage_batch_normalize=False"):
        call(algorithm(advantage_batch_normalize=True), spread(batch))
    with pytest.raises(BatchError, match="differ between the tokens"):
        call(algorithm(), torch.randn(12, 12))


def test_a_changed_hook_or_a_taken_name_is_loud(monkeypatch):
    adapter = load_adapter(monkeypatch, "skyrl", skyrl_modules())
    adapter.register()
    with pytest.raises(IntegrationError, match="already registered"):
        adapter.register()
    monkeypatch.setattr(adapter.ppo_utils, "apply_loss_reduction_to_advantages_minibatch", lambda **_: torch.ones(2, 2))
    with pytest.raises(IntegrationError, match="divides by responses x tokens"):
        adapter.register()


def test_a_missing_hook_is_loud(monkeypatch):
    with pytest.raises(IntegrationError, match="no policy losses where"):
        load_adapter(monkeypatch, "skyrl", {"ray": skyrl_modules()["ray"], "skyrl.backends.skyrl_train.utils": {}})


def test_the_old_log_prob_pass_is_skipped_unless_something_reads_it(skyrl):
    def skips(**settings):
        trainer = SimpleNamespace(algorithm=algorithm(**settings))
        return skyrl.skip_policy_forward(SimpleNamespace(cfg=SimpleNamespace(trainer=trainer)), None)

    assert skips()
    assert not skips(use_kl_in_reward=True)
    assert not any(skips(off_policy_correction=correction(**change)) for change in CORRECTIONS)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("skyrl") is None, reason="skyrl is not installed: make test-integrations")
class TestRealSkyRL:
    @pytest.fixture(autouse=True)
    def typed_dict(self, monkeypatch):
        """skyrl 0.3.0 gives pydantic a ``typing.TypedDict``, which pydantic refuses before Python 3.12."""
        if sys.version_info < (3, 12):
            monkeypatch.setattr(typing, "TypedDict", typing_extensions.TypedDict)

    @PARTS
    @pytest.mark.parametrize("name", CASES)
    def test_the_registry_s_loss_has_the_core_s_gradient(self, name, microbatches):
        from skyrl.backends.skyrl_train.utils import ppo_utils
        from skyrl.train.config import AlgorithmConfig
        from skyrl.train.config.config import OffPolicyCorrectionConfig

        from asympo_megatron.integrations import skyrl

        if "asympo" not in ppo_utils.PolicyLossRegistry.list_available():
            skyrl.register(**OPTIONS)
        config = AlgorithmConfig(policy_loss_type=NAMES[name], loss_reduction="sequence_mean")
        batch = make_batch()
        policy_loss = ppo_utils.PolicyLossRegistry.get(NAMES[name])
        divide = ppo_utils.apply_loss_reduction_to_advantages_minibatch
        check_gradient(skyrl_gradient(policy_loss, config, divide, batch, microbatches), name, batch)
        changes = [{"loss_reduction": "token_mean"}, {"advantage_batch_normalize": True}]
        changes += [{"off_policy_correction": OffPolicyCorrectionConfig(**change)} for change in CORRECTIONS]
        for change in changes:
            with pytest.raises(ConfigError):
                skyrl_gradient(policy_loss, dataclasses.replace(config, **change), divide, batch, microbatches)

    def test_the_loss_reaches_ray_workers(self):
        """What SkyRL's registry does with a function: cloudpickle to the actor and back."""
        import cloudpickle
        from skyrl.backends.skyrl_train.utils import ppo_utils

        from asympo_megatron.integrations import skyrl

        if "asympo" not in ppo_utils.PolicyLossRegistry.list_available():
            skyrl.register(**OPTIONS)
        sent = cloudpickle.loads(cloudpickle.dumps(ppo_utils.PolicyLossRegistry.get("asympo")))
        assert sent.keywords["objective"].nll_floor == OPTIONS["nll_floor"]
