"""The configuration of a run: one YAML file, twelve sections. Values live in YAML, defaults live here.

Defaults marked "ours" are this project's choice; the published abstract of ASymPO fixes none of them.
"""

from dataclasses import dataclass, field
from typing import Any

from asympo_megatron.config.rollout_schema import RolloutConfig, SyncConfig, TaskConfig


@dataclass
class RunConfig:
    name: str = "run"
    """The run directory is root/name; the same name resumes the run."""
    root: str = "runs"
    """Directory of all runs. Engines on other hosts must see it under the same path."""
    seed: int = 0
    """Of initial weights and label noise. Engines mix it with their port and start time: no two sample alike."""
    steps: int = 100
    """Optimizer steps."""
    warm_start: list[str] = field(default_factory=list)
    """Overrides of this very config: `asympo run` first completes the run they describe (RUN_DIR/warmup), and its
    last checkpoint becomes model.init."""
    local_ranks: int | None = None
    """Trainer processes that `asympo run` starts; null: tensor x pipeline x context. Under torchrun it says nothing."""


@dataclass
class ModelConfig:
    path: str | None = None
    """Hugging Face directory: config.json, tokenizer and, for init: hf, safetensors."""
    hf: dict[str, Any] = field(default_factory=dict)
    """Fields of a Hugging Face config.json (model_type, hidden_size, ...): the model when `path` is null; the
    tokenizer and vocab_size then come from the task."""
    init: str = "random"
    """random | hf (weights of `path`) | a checkpoint, or the checkpoints directory (its newest), of an earlier run."""
    reference: str | None = None
    """Reference policy of objective.kl_coef: hf | a checkpoint, as for `init`; null: the weights that `init` names."""
    dtype: str = "fp32"
    """fp32 | bf16."""
    init_std: float = 0.02
    """init: random; standard deviation of the initial weights."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any field of Megatron-Core's TransformerConfig."""


@dataclass
class ParallelConfig:
    tensor: int = 1
    """TP: ranks that share every matrix and the vocabulary."""
    sequence: bool = False
    """Sequence parallelism over the TP ranks."""
    pipeline: int = 1
    """PP: stages."""
    virtual_pipeline: int | None = None
    """VPP: model chunks of each stage; null: one."""
    context: int = 1
    """CP: ranks that share one packed sequence. What remains of the world size is data parallel."""
    expert: int = 1
    """EP: ranks, among those of TP, CP and DP, that share the experts of a mixture."""
    expert_tensor: int | None = None
    """Ranks that share the matrices of one expert; null: as many as `tensor`."""

    @property
    def expert_tensor_size(self) -> int:
        """``expert_tensor``, or what null stands for."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    """AdamW learning rate after the warm-up."""
    min_lr: float = 0.0
    """What a linear or cosine schedule ends at."""
    schedule: str = "constant"
    """constant | linear | cosine, over run.steps after warmup_steps."""
    warmup_steps: int = 0
    """Linear from 0."""
    weight_decay: float = 0.0
    """Decoupled, as in AdamW."""
    beta1: float = 0.9
    """Decay of the mean gradient."""
    beta2: float = 0.95
    """Decay of the mean squared gradient."""
    eps: float = 1e-8
    """Added to the root of the mean squared gradient."""
    clip_grad: float = 1.0
    """Largest L2 norm of the whole gradient; 0: no clipping."""
    distributed: bool = False
    """Megatron's distributed optimizer (states sharded over DP)."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any field of Megatron-Core's OptimizerConfig."""


@dataclass
class DDPConfig:
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any field of Megatron-Core's DistributedDataParallelConfig."""


@dataclass
class ObjectiveConfig:
    name: str = "asympo"
    """asympo | spo | reinforce | asymre | opmd | topr | grpo | dr_grpo | dapo | gspo | cispo | sapo | vespo | m2po |
    decoupled_ppo | tis | icepop | mis | sft, an installed entry point, or pkg.mod:Class."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of that objective, e.g. nll_floor for asympo (default 1e-3 nats a token: ours)."""
    kl_coef: float = 0.0
    """Weight of a KL penalty against model.reference; 0: none, and no reference policy is loaded or run."""
    kl_estimator: str = "k3"
    """k1 | k2 | k3: see docs/objectives.md for the gradient of each."""


@dataclass
class AdvantageConfig:
    estimator: str = "group_mean"
    """group_mean | mean_std | leave_one_out | none."""


@dataclass
class BatchConfig:
    groups_per_step: int = 32
    """Prompts of one optimizer step."""
    group_size: int = 8
    """Responses to each prompt."""
    max_tokens_per_microbatch: int = 8192
    """Prompt and response tokens of one micro-batch on one DP rank, over its CP ranks together."""


@dataclass
class CheckpointConfig:
    interval_steps: int = 50
    """0: only after the last step."""
    keep_last: int = 2
    """Checkpoints kept."""
    async_save: bool = False
    """Write them from a copy in host memory while training goes on."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run directory."""


@dataclass
class LoggingConfig:
    sinks: list[str] = field(default_factory=list)
    """Beside metrics.jsonl: tensorboard | wandb | prometheus."""
    prometheus_host: str = "127.0.0.1"
    """Address of the prometheus sink; 0.0.0.0 lets other machines scrape it."""
    prometheus_port: int = 9400
    """0: any free port."""
    progress: bool = True
    """Live view, or a line every few seconds when the output is no terminal."""
    level: str = "INFO"
    """DEBUG | INFO | WARNING | ERROR."""


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ddp: DDPConfig = field(default_factory=DDPConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
