"""A random Hugging Face model of about 0.1M parameters, with a byte tokenizer, for tests without downloads."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from asympo_megatron.errors import UnknownNameError

TINY_KINDS = ("qwen3", "qwen2", "llama", "qwen3_moe")
TINY_MOE_HF: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "router_aux_loss_coef": 0.05,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "vocab_size": 67,
}
"""Fields of a config.json: a mixture of experts, its second layer dense, for ``Learner`` without any file."""
_EXPERTS = ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers")
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = 320
"""Larger than the tokenizer's 259 entries, as with many published models."""

# Wide enough that greedy tokens have no near-ties and sampling is far from uniform.
_INIT_STD = 0.2

_CHAT_TEMPLATE = (
    "{% for message in messages %}<bos>{{ message.role }}: {{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


def make_tiny_model(directory: str | Path, kind: str = "qwen3", seed: int = 0, tied: bool = False) -> Path:
    """Write config, safetensors and tokenizer of a tiny random model.

    Args:
        directory: created if missing.
        kind: qwen3 | qwen2 | llama | qwen3_moe (its second layer is dense).
        seed: of the weights; two seeds give two models of one shape.
        tied: input and output embeddings share one tensor.

    Returns:
        The directory.

    Raises:
        UnknownNameError: a kind that is not in the list.
    """
    if kind not in TINY_KINDS:
        raise UnknownNameError("tiny model", kind, TINY_KINDS)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    experts = {name: TINY_MOE_HF[name] for name in _EXPERTS} if kind == "qwen3_moe" else {}
    config = AutoConfig.for_model(
        kind,
        **experts,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=tied,
        initializer_range=_INIT_STD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte and three special tokens: every text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([PAD, BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, BOS, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, chat_template=_CHAT_TEMPLATE
    )
