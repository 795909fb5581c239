"""The configuration of a run: one YAML file, twelve sections. Values live in YAML, defaults live here.

Defaults marked "ours" are this project's choice; the published abstract of ASymPO fixes none of them.
"""

from dataclasses import dataclass, field
from typing import Any


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
class SamplingConfig:
    temperature: float = 1.0
    """Training responses: the learner scores logits / temperature, too."""
    top_p: float = 1.0
    """Nucleus; 1: off. The learner scores the full distribution."""
    top_k: int = -1
    """-1: off."""
    max_prompt_tokens: int = 1024
    """Longer prompts are left out."""
    max_new_tokens: int = 1024
    """A response that reaches it is truncated: see overlong."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Added to the tokenizer's end-of-sequence token."""
    overlong: str = "train"
    """Truncated responses: train | mask (no loss, still in N) | penalize (reward - overlong_penalty)."""
    overlong_penalty: float = 1.0
    """overlong: penalize; subtracted from the reward before the advantage."""


@dataclass
class EvalConfig:
    interval_steps: int = 0
    """Evaluate weights whose step is a multiple, step 0 and the last included; 0: never."""
    prompts: int = 256
    """Held-out prompts an evaluation uses (fewer if the task holds fewer)."""
    samples_per_prompt: int = 1
    """Accuracy is the mean over all of them."""
    greedy: bool = False
    """Also judge one answer a prompt at temperature 0 (eval/greedy_accuracy): what the policy ranks first."""
    temperature: float = 1.0
    """Of the evaluation alone."""
    top_p: float = 1.0
    """Of the evaluation alone."""


@dataclass
class RolloutConfig:
    source: str = "engines"
    """engines | replay (groups from a file) | supervised (reference answers of the task; needs objective sft)."""
    replay: str | None = None
    """replay: JSONL file, one group a line."""
    label_noise: float = 0.0
    """supervised: probability that a label token is replaced by a random one of the answer alphabet."""
    controller_url: str | None = None
    """Where the trainer finds the controller; null: replay and supervised are read by the trainer itself."""
    journal_dir: str | None = None
    """Directory of journal.sqlite on a local disk of the controller's host, one for each run; null: the run
    directory."""
    controller_host: str = "127.0.0.1"
    """Address the controller listens on; 0.0.0.0 opens it to the network: set a token."""
    controller_port: int = 0
    """0: any free port (`asympo run` tells its children)."""
    controller_token: str | None = None
    """Bearer token that every call to the controller must carry."""
    engine: str = "embedded"
    """What `asympo run` starts locally: embedded | sglang."""
    num_engines: int = 1
    """Engines that `asympo run` starts here; SGLang engine i begins at GPU --base-gpu-id + i x --tp-size."""
    engine_host: str = "127.0.0.1"
    """Address the embedded engine listens on."""
    engine_port: int = 0
    """Where `asympo engine` listens; 0: any free port. `asympo run` chooses the ports of its engines itself."""
    engine_urls: list[str] = field(default_factory=list)
    """Engines that already run elsewhere; then `asympo run` starts none."""
    engine_api_key: str | None = None
    """Bearer token of the engines (SGLang gets it in a file, not on its command line)."""
    engine_args: list[str] = field(default_factory=list)
    """Further arguments of `python -m sglang.launch_server` (engine: sglang)."""
    engine_python: str | None = None
    """Python of the environment that holds sglang (its pins conflict with the trainer's)."""
    max_in_flight_per_engine: int = 512
    """Requests; the rest waits in the controller."""
    max_lag_steps: int = 1
    """0 is synchronous RL."""
    lag_policy: str = "admission"
    """admission | strict | drop."""
    request_timeout_s: float = 600.0
    """After this a response is aborted on its engine."""
    engine_timeout_s: float = 60.0
    """Deadline of control calls; an engine silent for this long is taken out."""
    engine_start_timeout_s: float = 600.0
    """How long an engine may take to get ready, and the trainer waits for the controller."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass
class TaskConfig:
    kind: str = "reasoning_gym"
    """reasoning_gym | jsonl."""
    name: str = "spell_backward"
    """reasoning_gym: name of the data set."""
    options: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: configuration of the data set."""
    size: int = 100_000
    """reasoning_gym: questions drawn from the data set; those that are distinct and not held out make an epoch."""
    path: str | None = None
    """jsonl: file of prompts."""
    prompt_field: str = "prompt"
    """jsonl: a dotted name; GSM8K-, MATH- and DAPO-style fields are recognised when it is absent."""
    answer_field: str = "answer"
    """jsonl: the reference answer, a dotted name."""
    eval_path: str | None = None
    """jsonl: file of held-out prompts; null: eval_fraction of `path`."""
    eval_fraction: float = 0.05
    """Share of the questions that is held out; which ones depends on their text alone."""
    seed: int = 0
    """Of the prompts and of their order."""
    shuffle: bool = True
    """Every epoch after the first has an order of its own; jsonl: the first one, too."""
    system_prompt: str | None = None
    """template chat: goes before every prompt."""
    template: str = "chat"
    """chat (the tokenizer's chat template) | plain (the question as it is)."""
    reward: str = "task"
    """task (the task's own scorer) | exact | math (math-verify) | pkg.mod:fn."""
    reward_timeout_s: float = 10.0
    """Of scoring one batch or one answer, and of one reply of the environment."""
    reward_retries: int = 2
    """Further tries of a reward or reply that failed; then its group is dropped and counted, never scored 0."""
    reward_workers: int = 2
    """Processes that score answers, for rewards that parse model output; as many again for the environment."""
    environment: str | None = None
    """pkg.mod:fn, which replies to the model's turns (tools, games); null: a response is one turn."""
    max_turns: int = 8
    """environment: turns of the model in one response; the reply to the last of them is not given."""
    reply_role: str = "user"
    """environment, template chat: role of its replies, e.g. tool where the chat template knows it."""


@dataclass
class SyncConfig:
    transport: str = "disk"
    """disk: safetensors through a shared file system | collective: broadcast by the trainer | colocated: memory of the
    trainer, shared with engines on loopback addresses of its machine."""
    host: str = "127.0.0.1"
    """collective: address of the trainer's rank 0 as controller and engines reach it; off loopback, set a token."""
    bucket_bytes: int = 268_435_456
    """collective, colocated: weights travel in buckets of at most this size (a larger tensor alone)."""
    spool_dir: str | None = None
    """collective, colocated: local directory where versions wait for engines, up to three at a time; null: the system's
    temporary one. /dev/shm keeps them in memory."""
    interval_steps: int = 1
    """Publish after every this many optimizer steps; at most rollout.max_lag_steps + 1."""
    pause_mode: str = "in_place"
    """in_place | retract | abort: what happens to running requests while weights change."""
    keep_last: int = 2
    """Versions kept under RUN_DIR/weights, beside those an engine may be loading."""
    timeout_s: float = 300.0
    """Deadline of one update of one engine."""


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
