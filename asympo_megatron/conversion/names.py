"""Which Hugging Face tensors make up which Megatron-Core parameter: one small table per family.

``{}`` stands for the number of the layer, ``[]`` for that of the expert. A parameter made of several tensors names how
they are joined.
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

ATTENTION = (
    _layer("input_layernorm.weight", "input_layernorm.weight"),
    _layer(
        "self_attention.linear_qkv.weight",
        *(f"self_attn.{part}_proj.weight" for part in "qkv"),
        join="qkv",
    ),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)

MLP = (
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", join="gate_up"),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
)

LLAMA = (*ATTENTION, *MLP)

QWEN2 = (
    *LLAMA,
    _layer("self_attention.linear_qkv.bias", *(f"self_attn.{part}_proj.bias" for part in "qkv"), join="qkv"),
)

QK_NORM = (
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)

QWEN3 = (*LLAMA, *QK_NORM)

ROUTER = _layer("mlp.router.weight", "mlp.gate.weight")

EXPERT = (
    _layer(
        "mlp.experts.[].linear_fc1.weight",
        *(f"mlp.experts.[].{part}_proj.weight" for part in ("gate", "up")),
        join="gate_up",
    ),
    _layer("mlp.experts.[].linear_fc2.weight", "mlp.experts.[].down_proj.weight"),
)
"""Entries of one expert, the same in every family of mixtures."""

LAYERS = {"llama": LLAMA, "mistral": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "qwen3_moe": QWEN3}
"""Entries of one layer, by model_type; of a mixture of experts, those of its dense layers."""

MOE_LAYERS = {"qwen3_moe": (*ATTENTION, *QK_NORM, ROUTER)}
"""Entries of one layer of experts, without the experts, by model_type."""


def entries(facts: ModelFacts) -> Iterator[Entry]:
    """Every parameter of the whole model, layers numbered, in the order of the forward pass."""
    yield EMBEDDING
    for number in range(facts.num_layers):
        if facts.moe is None or number in facts.moe.dense_layers:
            yield from (_numbered(entry, number) for entry in LAYERS[facts.model_type])
            continue
        yield from (_numbered(entry, number) for entry in MOE_LAYERS[facts.model_type])
        for expert in range(facts.moe.num_experts):
            yield from (_numbered(entry, number, expert) for entry in EXPERT)
    yield FINAL_NORM
    if not facts.tied:
        yield HEAD


def _numbered(entry: Entry, layer: int, expert: int = 0) -> Entry:
    def fill(name: str) -> str:
        return name.format(layer).replace("[]", str(expert))

    return Entry(fill(entry.megatron), tuple(map(fill, entry.hf)), entry.join)
