"""A real language model there and back: SmolLM2-135M-Instruct (make smollm2)."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asympo_megatron.config import Config, override_config
from asympo_megatron.conversion import hf_to_megatron, megatron_to_hf
from asympo_megatron.conversion.hf_files import SINGLE
from asympo_megatron.conversion.verify import verify

MODEL = Path(sys.prefix) / "smollm2"
PAGE = Path(__file__).resolve().parents[2] / "LICENSE"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="SmolLM2 is not there: make smollm2"),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("smollm2") / "megatron"
    base = Config()
    base.model.path = str(MODEL)
    hf_to_megatron(override_config(base, ["parallel.tensor=3", "parallel.pipeline=2"]), MODEL, target)
    return target


def test_every_token_of_a_page_has_the_same_nll(converted: Path) -> None:
    """Packed, through Megatron, against transformers, float32: real weights, 512 tokens."""
    found = verify(MODEL, converted, texts=[PAGE.read_text()])
    assert found.tensors == []
    assert found.nll_difference <= 1e-4
    assert found.nll[0] < 3.5  # the model has read licences: broken weights or positions would not predict this page


def test_there_and_back_the_text_is_the_same(converted: Path, tmp_path: Path) -> None:
    megatron_to_hf(converted, tmp_path / "back")
    one, other = load_file(MODEL / SINGLE), load_file(tmp_path / "back" / SINGLE)
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    texts = [_greedy(directory) for directory in (MODEL, tmp_path / "back")]
    assert texts[0] == texts[1]
    assert "Paris" in texts[0]


def _greedy(directory: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))
