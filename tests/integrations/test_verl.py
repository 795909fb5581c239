"""verl: the recorded contract, and (slow) the real package."""

import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from calls import ONE, TWO, UNEVEN, check_gradient, spread, verl_gradient
from parity import CASES, make_batch
from recorded import load_adapter, verl_modules

from asympo_megatron.errors import BatchError, ConfigError, IntegrationError

VERL_NAMES = {"asympo": "asympo", "spo": "asympo_spo"}
real = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed: make test-integrations"),
]


@pytest.fixture
def verl(monkeypatch):
    return load_adapter(monkeypatch, "verl", verl_modules())


def settings(verl, **options):
    return SimpleNamespace(policy_loss=verl.AsympoPolicyLossConfig(**options), global_batch_info={})


@pytest.mark.parametrize("microbatches", [ONE, TWO, UNEVEN], ids=["one", "two", "uneven"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_core_s(verl, name, microbatches):
    batch = make_batch()
    policy_loss = verl.core_algos.get_policy_loss_fn(VERL_NAMES[name])
    check_gradient(verl_gradient(policy_loss, settings(verl, **CASES[name]), batch, microbatches), name, batch)


def test_data_parallel_ranks_are_averaged(verl):
    batch = make_batch()
    check_gradient(verl_gradient(verl.asympo, settings(verl, nll_floor=0.5), batch, TWO, dp_size=4), "asympo", batch)


def test_token_mean_would_be_noticed(verl, monkeypatch):
    batch = make_batch()
    real_agg = verl.core_algos.agg_loss
    monkeypatch.setattr(
        verl.core_algos,
        "agg_loss",
        lambda **given: real_agg(**{**given, "loss_agg_mode": "token-mean", "batch_num_tokens": 50}),
    )
    with pytest.raises(AssertionError, match="relative error"):
        check_gradient(verl_gradient(verl.asympo, settings(verl, nll_floor=0.5), batch, ONE), "asympo", batch)


def test_options_have_the_core_s_defaults(verl):
    config = SimpleNamespace(policy_loss=verl.PolicyLossConfig(), global_batch_info={})
    batch = make_batch()
    plain = verl_gradient(verl.asympo, config, batch, ONE)
    assert torch.equal(plain, verl_gradient(verl.asympo, settings(verl, nll_floor=1e-3), batch, ONE))
    assert not torch.equal(plain, verl_gradient(verl.asympo, settings(verl, nll_floor=0.5), batch, ONE))
    with pytest.raises(ConfigError, match="nll_floor is -1"):
        verl_gradient(verl.asympo, settings(verl, nll_floor=-1.0), batch, ONE)


def call(verl, batch, config, **changes):
    arguments = {
        "old_log_prob": None,
        "log_prob": batch.pad(batch.logprob(batch.logits_PV)),
        "advantages": spread(batch),
        "response_mask": batch.mask_RL,
        "config": config,
    }
    return verl.asympo(**{**arguments, **changes})


def test_what_cannot_be_right_is_refused(verl):
    batch, config = make_batch(), settings(verl)
    with pytest.raises(BatchError, match="no global_batch_size"):
        call(verl, batch, config)
    config.global_batch_info.update(dp_size=1, global_batch_size=12)
    call(verl, batch, config)
    with pytest.raises(ConfigError, match="rollout_is=null"):
        call(verl, batch, config, rollout_is_weights=torch.ones(12, 12))
    with pytest.raises(BatchError, match="differ between the tokens"):
        call(verl, batch, config, advantages=torch.randn(12, 12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agg_loss": lambda **_: torch.tensor(1.0)}, "expected 2"),
        ({"agg_loss": None}, "plug-in point has changed"),
        ({"get_policy_loss_fn": lambda _: sorted}, "this adapter knows those of 0.9.1"),
        ({"POLICY_LOSS_REGISTRY": {"asympo": max}}, "already has a policy loss 'asympo'"),
    ],
)
def test_a_changed_hook_is_loud(monkeypatch, caplog, change, message):
    modules = verl_modules()
    modules["verl.trainer.ppo.core_algos"].update(change)
    with pytest.raises(IntegrationError, match=message):
        load_adapter(monkeypatch, "verl", modules)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "asympo and asympo_spo are not registered" in caplog.text


def test_a_missing_hook_is_loud(monkeypatch, caplog):
    modules = verl_modules()
    modules["verl.workers.config"].clear()
    with pytest.raises(IntegrationError, match="Install verl"):
        load_adapter(monkeypatch, "verl", modules)
    assert "not registered with verl" in caplog.text


class TestRealVerl:
    pytestmark = real

    def test_importing_verl_registers_both_losses(self):
        program = (
            "import verl\nfrom verl.trainer.ppo.core_algos import get_policy_loss_fn as get\n"
            "print(get('asympo').__module__, get('asympo_spo').__module__)"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.stdout.split()[-2:] == ["asympo_megatron.integrations.verl"] * 2, done.stderr

    @pytest.mark.parametrize("microbatches", [ONE, TWO, UNEVEN], ids=["one", "two", "uneven"])
    @pytest.mark.parametrize("name", CASES)
    def test_ppo_loss_has_the_core_s_gradient(self, name, microbatches):
        """The worker's own ``ppo_loss``, from nested tensors, with the config that hydra makes."""
        import verl  # noqa: F401
        from calls import accumulate
        from verl.utils.config import omega_conf_to_dataclass
        from verl.workers.utils import losses

        config = omega_conf_to_dataclass(
            {
                "_target_": "verl.workers.config.FSDPActorConfig",
                "strategy": "fsdp",
                "rollout_n": 4,
                "ppo_micro_batch_size_per_gpu": 2,
                "policy_loss": {
                    "_target_": "asympo_megatron.integrations.verl.AsympoPolicyLossConfig",
                    "loss_mode": VERL_NAMES[name],
                    **CASES[name],
                },
            }
        )
        batch = make_batch()

        def loss_of(rows, part, logprob_P):
            loss, metrics = losses.ppo_loss(config, {"log_probs": nested(part, logprob_P)}, tensordict(part, 12))
            assert f"actor/{name}/J" in metrics
            return loss

        check_gradient(accumulate(batch, microbatches, loss_of), name, batch)


def nested(part, logprob_P):
    """Log-probs of whole sequences as the engines return them: jagged, prompt positions included."""
    rows, start = [], 0
    full_S = torch.zeros(int(part.sequence_length_R.sum())).index_put((part.scoring_index_P,), logprob_P)
    for length in part.sequence_length_R.tolist():
        rows.append(full_S[start : start + length])
        start += length
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def tensordict(part, global_batch_size):
    """The fields that ``ppo_loss`` reads, jagged where verl's are."""
    from verl.utils import tensordict_utils as tu

    lengths = part.response_length_R.tolist()

    def jagged(values_P):
        return torch.nested.as_nested_tensor(list(values_P.split(lengths)), layout=torch.jagged)

    prompts = [torch.zeros(length, dtype=torch.long) for length in part.prompt_length_R.tolist()]
    data = tu.get_tensordict(
        {
            "prompts": torch.nested.as_nested_tensor(prompts, layout=torch.jagged),
            "responses": jagged(part.token_P),
            "response_mask": jagged(part.mask_P.long()),
            "attention_mask": torch.nested.as_nested_tensor(
                [torch.ones(length) for length in part.sequence_length_R.tolist()], layout=torch.jagged
            ),
            "old_log_probs": jagged(torch.zeros(len(part.token_P))),
            "advantages": jagged(part.advantage_R[part.row_P] * part.mask_P),
        }
    )
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=7, global_batch_size=global_batch_size)
    return data
