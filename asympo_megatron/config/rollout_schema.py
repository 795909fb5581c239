"""The part of the configuration about responses: how they are sampled and judged, and by which weights."""

from dataclasses import dataclass, field
from typing import Any


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
    """What `asympo run` and `asympo engine` start: embedded | sglang."""
    num_engines: int = 1
    """Engines that `asympo run` starts here; SGLang engine i begins at GPU --base-gpu-id + i x --tp-size."""
    engine_host: str = "127.0.0.1"
    """Address the engines started here listen on."""
    engine_port: int = 0
    """Where `asympo engine` listens; 0: any free port. `asympo run` chooses the ports of its engines itself."""
    engine_urls: list[str] = field(default_factory=list)
    """Engines that already run elsewhere; then `asympo run` starts none."""
    engine_api_key: str | None = None
    """Bearer token of the engines and the router (SGLang gets it in a file, not on its command line)."""
    router_url: str | None = None
    """A router of yours (sglang-router, smg) for training requests, started without workers; null: none, the controller
    shares the load. Needs sync.pause_mode retract or abort."""
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
    dynamic_sampling: bool = False
    """Drop groups in which no response has an advantage and sample other prompts instead (DAPO); biased."""
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
    """collective, colocated: local directory where versions wait for engines, up to three at a time; deltas: where the
    trainer and each mirror keep two whole versions. null: the system's temporary one. /dev/shm keeps them in memory."""
    deltas: int = 0
    """disk: so many versions after a whole one are published as changed elements alone, which `asympo mirror` on each
    engine's host makes whole there; 0: every version whole."""
    mirror_host: str = "127.0.0.1"
    """Address `asympo mirror` listens on; 0.0.0.0 opens it to the network: set a token."""
    mirror_port: int = 0
    """Port of the mirror on every engine's host; 0: any free one (`asympo run` tells its children)."""
    interval_steps: int = 1
    """Publish after every this many optimizer steps; at most rollout.max_lag_steps + 1."""
    pause_mode: str = "in_place"
    """in_place | retract | abort: what happens to running requests while weights change."""
    keep_last: int = 2
    """Versions kept under RUN_DIR/weights, beside those an engine may be loading."""
    timeout_s: float = 300.0
    """Deadline of one update of one engine."""
