"""Which Hugging Face tensors make up which Megatron-Core parameter: one small table per family.

``{}`` stands for the number of the layer. A parameter made of several tensors names how they are joined.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from asympo_megatron.mcore.hf_config import ModelFacts


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter.

    Args:
        megatron: global name (see ``mcore.shards``).
        hf: names of the tensors that it is made of.
        join: same | qkv (query heads of a group, its key, its value, group after group) | gate_up (stacked).
    """

    megatron: str
    hf: tuple[str, ...]
    join: str = "same"


_LAYER = "decoder.layers.{}."
_HF = "model.layers.{}."


def _layer(megatron: str, *hf: str, join: str = "same") -> Entry:
    return Entry(_LAYER + megatron, tuple(_HF + name for name in hf), join)


EMBEDDING = Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
FINAL_NORM = Entry("decoder.final_layernorm.weight", ("model.norm.weight",))
HEAD = Entry("output_layer.weight", ("lm_head.weight",))

LLAMA = (
    _layer("input_layernorm.weight", "input_layernorm.weight"),
    _layer(
        "self_attention.linear_qkv.weight",
        *(f"self_attn.{part}_proj.weight" for part in "qkv"),
        join="qkv",
    ),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", join="gate_up"),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
)

QWEN2 = (
    *LLAMA,
    _layer("self_attention.linear_qkv.bias", *(f"self_attn.{part}_proj.bias" for part in "qkv"), join="qkv"),
)

QWEN3 = (
    *LLAMA,
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)

LAYERS = {"llama": LLAMA, "mistral": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}
"""Entries of one layer, by model_type."""


def entries(facts: ModelFacts) -> Iterator[Entry]:
    """Every parameter of the whole model, layers numbered, in the order of the forward pass."""
    yield EMBEDDING
    for number in range(facts.num_layers):
        for entry in LAYERS[facts.model_type]:
            yield Entry(entry.megatron.format(number), tuple(name.format(number) for name in entry.hf), entry.join)
    yield FINAL_NORM
    if not facts.tied:
        yield HEAD
