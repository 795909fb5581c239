"""TRL's real trainers: three optimizer steps of each on CPU, the first one's gradient compared with the core's."""

import queue
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from asympo_megatron.batch import UNTRAINED, ResponseBatch
from asympo_megatron.objectives import build_objective

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed: make test-integrations"),
]
WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklm"]
STEPS, GROUP, ACCUMULATION = 3, 4, 2


@pytest.fixture
def policy(tmp_path):
    """A one-layer Qwen2 and its tokenizer, saved where the trainers read them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: rank for rank, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy", tokenizer


def settings(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": GROUP,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_generations": GROUP,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,  # no clipping: the gradient is compared
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **changes,
    }


def record_first_step(trainer):
    """The parameters and the gradient of the first optimizer step, taken just before it."""
    from transformers import TrainerCallback

    taken = {}

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if not taken:
                taken["grad"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
                taken["weights"] = {name: p.detach().clone() for name, p in model.named_parameters()}

    trainer.add_callback(Recorder())
    return taken


def core_gradient(path, weights, responses, temperature=1.0):
    """Gradient of the core for (prompt and response ids, mask, advantage) of a whole step, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    nll, ids, counts = [], [], []
    for row, (sequence, mask, _) in enumerate(responses):
        logits = model(torch.tensor([sequence])).logits[0, :-1].float() / temperature
        trained = torch.tensor(mask[1:], dtype=torch.bool)
        nll.append(-torch.log_softmax(logits, -1).gather(-1, torch.tensor(sequence)[1:, None]).squeeze(-1))
        ids.append(torch.where(trained, row, UNTRAINED))
        counts.append(int(trained.sum()))
    batch = ResponseBatch(torch.cat(ids), torch.tensor([float(a) for *_, a in responses]), torch.tensor(counts))
    out = build_objective("asympo")(torch.cat(nll), batch)
    (out.loss_sum / out.normalizer_count).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    """1e-5 of each tensor's largest entry: two float32 passes through a model, padded one way and not the other."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value.abs().max() > 0, name
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_grpo_trainer(policy, tmp_path, monkeypatch):
    from datasets import Dataset
    from trl import GRPOConfig

    from asympo_megatron.integrations.trl import AsympoGRPOTrainer

    assert not hasattr(AsympoGRPOTrainer, "compute_liger_loss"), "use_liger_kernel replaces the loss"
    path, tokenizer = policy

    def first_letters(completions, **_):
        """Something that differs inside a group: how much of the response lies early in the alphabet."""
        return [sum(word < "g" for word in text.split()) / 8 for text in completions]

    trainer = AsympoGRPOTrainer(
        model=str(path),
        reward_funcs=first_letters,
        args=GRPOConfig(**settings(tmp_path, max_completion_length=8, model_init_kwargs={"dtype": "float32"})),
        train_dataset=Dataset.from_dict({"prompt": ["a b c", "d", "e f", "g h i j"]}),
        processing_class=tokenizer,
    )
    taken, responses = record_first_step(trainer), []
    real = trainer._compute_loss

    def keep(model, inputs):
        if len(responses) < GROUP * ACCUMULATION:
            keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
            for prompt, there, response, mask, advantage in zip(*(inputs[key] for key in keys), strict=True):
                context = prompt[there.bool()].tolist()
                length = int(mask.sum())
                responses.append(
                    (context + response[:length].tolist(), [0] * len(context) + [1] * length, float(advantage))
                )
        return real(model, inputs)

    monkeypatch.setattr(trainer, "_compute_loss", keep)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert "asympo/J" in trainer.state.log_history[0]
    assert any(advantage for *_, advantage in responses)
    assert_same(taken["grad"], core_gradient(path, taken["weights"], responses))


class LocalRollouts:
    """A rollout worker without an engine: scored samples of random tokens, all pushed before training starts."""

    def __init__(self, samples):
        self.rollout_buffer = queue.Queue()
        self.metrics_queue = queue.Queue()
        self.samples = samples

    def start(self):
        for sample in self.samples:
            self.rollout_buffer.put(sample)

    def stop(self):
        pass

    def update_model_version(self, model_version):
        pass

    def check_health(self, stale_after_s):
        pass


def make_samples(count):
    """Samples of RolloutSample; prompts are shared inside a group, and behavior log-probs are not known (zero)."""
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

    draw = np.random.default_rng(0)
    samples = []
    for row in range(count):
        group = row // GROUP
        prompt = [3 + (group + token) % 12 for token in range(3 + group % 2)]
        response = draw.integers(3, len(WORDS), size=1 + int(draw.integers(7))).tolist()
        mask = [0] * len(prompt) + [1] * len(response)
        if row == 1:
            mask = [0] * len(mask)  # a masked response stays in N
        samples.append(
            RolloutSample(
                prompt=[],
                completion=[],
                input_ids=np.array(prompt + response),
                completion_mask=np.array(mask),
                old_log_probs=np.zeros(len(mask), dtype=np.float32),
                advantage=0.0 if group == 1 else (-1.0) ** row * (1 + row % GROUP // 2),
                model_version=0,
                group_id=group,
                metrics={"reward": 0.0},
            )
        )
    return samples


def cpu_attention(module, query, key, value, attention_mask, *, tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k,
                  scaling=None, **kwargs):  # fmt: skip
    """What TRL's flash-attention kernel computes: each segment attends causally to its path from the root."""
    query, key, value = (tensor.transpose(1, 2)[0] for tensor in (query, key, value))
    repeat = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeat, dim=1)[tree_kv_index.long()] for tensor in (key, value))
    parts = []
    starts_q, starts_k = tree_cu_seqlens_q.tolist(), tree_cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        score = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]) * scaling
        behind = torch.arange(k1 - k0)[None] > torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None]
        weight = score.masked_fill(behind, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weight, value[k0:k1]))
    return torch.cat(parts).unsqueeze(0), None


def test_async_grpo_trainer(policy, tmp_path, monkeypatch):
    from datasets import Dataset
    from transformers import AttentionInterface
    from trl.experimental.async_grpo import AsyncGRPOConfig, async_grpo_trainer
    from trl.experimental.async_grpo.packing import TREE_ATTENTION

    from asympo_megatron.integrations.trl_async import AsympoAsyncGRPOTrainer

    path, tokenizer = policy
    samples = make_samples(STEPS * GROUP * ACCUMULATION + GROUP)
    nothing = SimpleNamespace(
        init_weight_transfer=lambda: None,
        pause=lambda: None,
        resume=lambda: None,
        destroy=lambda: None,
        send_weights=lambda iterator: list(iterator),
    )
    # It asks CUDA for the device's speed, for a utilisation metric.
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    trainer = AsympoAsyncGRPOTrainer(
        model=str(path),
        args=AsyncGRPOConfig(**settings(tmp_path, token_budget=0, dtype="float32", max_staleness=100)),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
        rollout_worker=LocalRollouts(samples),
        weight_transfer=nothing,
    )
    AttentionInterface.register(TREE_ATTENTION, cpu_attention)  # theirs is a CUDA kernel
    taken = record_first_step(trainer)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert "asympo/J" in trainer.state.log_history[0]
    responses = [
        (sample.input_ids.tolist(), sample.completion_mask.tolist(), sample.advantage)
        for sample in samples[: GROUP * ACCUMULATION]
    ]
    want = core_gradient(path, taken["weights"], responses, temperature=trainer.temperature)
    assert_same(taken["grad"], want)
