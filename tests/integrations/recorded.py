"""Contracts of verl 0.9.1, skyrl 0.3.0, areal 1.0.4, openrlhf 0.11.2 and trl 1.16.0 as recorded.

Stand-ins hold only what an adapter touches, so that the adapters are tested without the packages. That they agree with
the packages is what ``make test-integrations`` is for.
"""

import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch


def load_adapter(monkeypatch, name, modules):
    """Import ``asympo_megatron.integrations.NAME`` afresh, with these modules in place of the framework."""
    import asympo_megatron.integrations as package

    for path, content in modules.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            if parent not in modules or end == len(parts):
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        vars(sys.modules[path]).update(content)
    for path in modules:  # `from a.b import c` looks c up as an attribute
        head, _, tail = path.rpartition(".")
        if head:
            setattr(sys.modules[head], tail, sys.modules[path])
    monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
    adapter = importlib.import_module(f"{package.__name__}.{name}")
    # Gone for good, not restored when the test ends: a test of the real package imports its own.
    del sys.modules[f"{package.__name__}.{name}"], vars(package)[name]
    return adapter


def verl_modules():
    registry = {}

    def register_policy_loss(name):
        return lambda function: registry.setdefault(name, function)

    def vanilla(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        raise NotImplementedError

    def agg_loss(
        loss_mat,
        loss_mask,
        loss_agg_mode,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
        loss_scale_factor=None,
    ):
        total = (loss_mat * loss_mask).sum()
        if loss_agg_mode == "seq-mean-token-sum":
            return total / global_batch_size * dp_size
        assert loss_agg_mode == "token-mean"
        return total / batch_num_tokens * dp_size

    @dataclass
    class PolicyLossConfig:
        loss_mode: str = "vanilla"

        def get(self, key, default=None):
            return getattr(self, key, default)

    register_policy_loss("vanilla")(vanilla)
    core_algos = {
        "POLICY_LOSS_REGISTRY": registry,
        "register_policy_loss": register_policy_loss,
        "get_policy_loss_fn": registry.__getitem__,
        "agg_loss": agg_loss,
    }
    return {"verl.trainer.ppo.core_algos": core_algos, "verl.workers.config": {"PolicyLossConfig": PolicyLossConfig}}


def skyrl_modules():
    functions = {}

    class PolicyLossRegistry:
        @classmethod
        def register(cls, name, func):
            if name in functions:
                raise ValueError(f"policy loss '{name}' already registered")
            functions[name] = func

        @classmethod
        def get(cls, name):
            return functions[name]

        @classmethod
        def list_available(cls):
            return list(functions)

    def ppo_policy_loss(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None):
        raise NotImplementedError

    def divide(advantages, loss_mask, loss_reduction, micro_batch_size, max_seq_len, prompt_boundaries=None):
        if loss_reduction == "sequence_mean":
            return advantages / (advantages.shape[0] * loss_mask.sum(dim=-1, keepdim=True).clamp(min=1))
        assert loss_reduction == "token_mean"
        return advantages / loss_mask.sum().clamp(min=1)

    def off_policy_correction_enabled(section):
        outlier = section.outlier_token_is_threshold_low, section.outlier_token_is_threshold_high
        token = section.token_mask_is_threshold_low, section.token_mask_is_threshold_high
        one_is_enough = (section.tis_ratio_type, section.sequence_mask_metric, *outlier)
        return any(value is not None for value in one_is_enough) or None not in token

    utils = {
        "PolicyLossRegistry": PolicyLossRegistry,
        "ppo_policy_loss": ppo_policy_loss,
        "apply_loss_reduction_to_advantages_minibatch": divide,
        "repopulate_all_registries": lambda: None,
    }
    remote = lambda **_: lambda function: SimpleNamespace(remote=function)  # noqa: E731
    folder = "skyrl.backends.skyrl_train.utils"
    correction = {"off_policy_correction_enabled": off_policy_correction_enabled}
    return {
        f"{folder}.ppo_utils": utils,
        f"{folder}.off_policy_correction_utils": correction,
        "ray": {"remote": remote},
    }


def areal_modules():
    @dataclass
    class NormConfig:
        mean_level: str | None = "batch"
        std_level: str | None = "batch"
        group_size: int = 1

    @dataclass
    class PPOActorConfig:
        use_decoupled_loss: bool = False
        recompute_logprob: bool = False
        use_sapo_loss: bool = False
        m2_threshold: float | None = None
        rejection_sampling: object = None
        adv_norm: object = None
        reward_norm: NormConfig | None = None
        mask_no_eos_with_zero: bool = False
        kl_ctl: float = 0.1
        discount: float = 1.0
        gae_lambda: float = 1.0

    @dataclass
    class GRPOConfig:
        actor: PPOActorConfig = field(default_factory=PPOActorConfig)

    class PPOActor:
        def __init__(self, config, engine):
            self.config = config
            self.engine = engine

        def _compute_advantages(self, data):  # no further back than the last trained token
            reward = data["rewards"][:, None]
            data["tot_rewards"] = torch.zeros_like(data["loss_mask"]).index_fill(1, torch.tensor([-1]), 1.0) * reward
            data["advantages"] = data["loss_mask"] * data["loss_mask"][:, -1:] * reward
            return data

        def ppo_update(self, minibatch):
            self.engine.train()
            return self.engine.train_batch(
                minibatch, loss_fn=None, loss_weight_fn=lambda x: x["loss_mask"].count_nonzero()
            )

    class FSDPPPOActor:
        def __init__(self, config):
            self.config = config

        def train(self):
            self.training = True

        def train_batch(self, input_, loss_fn, loss_weight_fn):
            return loss_fn, loss_weight_fn

        def create_process_group(self, parallel_strategy):
            self.parallel_strategy = parallel_strategy

    class PPOTrainer:
        def _create_train_engine(self, actor_config, alloc):
            return "theirs"

    tracker = SimpleNamespace(denominator=_record, stat=_record, scalar=_record)
    return {
        "areal": {"PPOTrainer": PPOTrainer},
        "areal.api.cli_args": {"GRPOConfig": GRPOConfig, "PPOActorConfig": PPOActorConfig, "NormConfig": NormConfig},
        "areal.engine.core": {"train_engine": SimpleNamespace(compute_total_loss_weight=None)},
        "areal.engine.fsdp_engine": {"FSDPPPOActor": FSDPPPOActor},
        "areal.trainer.ppo.actor": {"PPOActor": PPOActor},
        "areal.utils": {"stats_tracker": tracker},
        "areal.utils.environ": {"is_single_controller": lambda: False},
    }


def _record(**values):
    for value in values.values():
        assert isinstance(value, (torch.Tensor, float, str))


def openrlhf_modules():
    class PolicyLoss:
        def forward(
            self,
            log_probs,
            old_log_probs,
            advantages,
            action_mask=None,
            rollout_log_probs=None,
            dp_size=1,
            batch_num_tokens=None,
            global_batch_size=None,
        ):
            raise NotImplementedError

    class PolicyModelActor:
        def init_model_from_pretrained(self, strategy, pretrain, max_steps=None, vllm_engines=None):
            self.trainer = ActorPPOTrainer()

        def forward(self, sequences, action_mask=None, attention_mask=None):
            raise AssertionError("the pass for old log-probs")

    class ActorPPOTrainer:
        def __init__(self):
            self.actor_loss_fn = PolicyLoss()

    actor = SimpleNamespace(
        PolicyModelActor=SimpleNamespace(__ray_actor_class__=PolicyModelActor), ActorPPOTrainer=ActorPPOTrainer
    )
    return {
        "ray": {"remote": lambda **_: lambda made: SimpleNamespace(__ray_actor_class__=made)},
        "openrlhf.models": {"PolicyLoss": PolicyLoss},
        "openrlhf.trainer.ray": {"ppo_actor": actor},
    }


def openrlhf_args(estimator="dr_grpo", is_correction_level="off", init_coef=0.0, use_loss=False):
    """OpenRLHF's nested namespace: what the adapter looks at."""
    advantage = SimpleNamespace(estimator=estimator, is_correction_level=is_correction_level)
    kl = SimpleNamespace(init_coef=init_coef, use_loss=use_loss, unbiased_gradient=False)
    return SimpleNamespace(algo=SimpleNamespace(advantage=advantage, kl=kl))


class _Accelerator:
    num_processes = 1

    def reduce(self, tensor, reduction):
        assert reduction == "mean"
        return tensor


class _Trainer:
    """What both TRL trainers have in common here."""

    def __init__(self, args):
        self.args = args
        self.model = SimpleNamespace(training=True)
        self.accelerator = _Accelerator()
        self.aux_loss_enabled = False
        self.current_gradient_accumulation_steps = 1
        self._metrics = {"train": _Lists(), "eval": _Lists()}


class _Lists(dict):
    def __missing__(self, key):
        return self.setdefault(key, [])


def trl_modules():
    class GRPOTrainer(_Trainer):
        def _get_per_token_logps_and_entropies(
            self,
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size=None,
            compute_entropy=False,
            compute_aux_loss=False,
            pixel_values=None,
            image_grid_thw=None,
            num_images=None,
            pixel_attention_mask=None,
            spatial_shapes=None,
            num_tiles=None,
            image_sizes=None,
            token_type_ids=None,
            mm_token_type_ids=None,
            image_position_ids=None,
        ):
            assert input_ids.shape == attention_mask.shape
            logprob = model(input_ids)[:, -logits_to_keep:]
            return logprob, torch.zeros_like(logprob), None

        def _compute_loss(self, model, inputs):
            raise NotImplementedError

    return {"trl": {"GRPOTrainer": GRPOTrainer}}


def trl_async_modules():
    class AsyncGRPOTrainer(_Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            mask = inputs["attention_mask"].bool()
            model(input_ids=inputs["input_ids"][mask].unsqueeze(0), fused_lm_head=True)
            return torch.tensor(float("nan"))

    return {"trl.experimental.async_grpo": {"AsyncGRPOTrainer": AsyncGRPOTrainer}}


def trl_args(**changes):
    """Defaults of GRPOConfig and AsyncGRPOConfig that the adapters look at."""
    defaults = {
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "off_policy_mask_threshold": None,
        "use_liger_kernel": False,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "token_budget": None,
    }
    return SimpleNamespace(**{**defaults, **changes})
