"""A real language model on a real server: SmolLM2-135M-Instruct (make smollm2), its weights published from Megatron."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from engine_client import EngineClient, generate_body
from sglang_servers import PYTHON, sglang_servers
from test_engine_generation import greedy_reference
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))  # the runner of whole commands

from command_bench import Bench

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = Path(sys.prefix) / "smollm2"
STEPS = 3
NEW_TOKENS = 24

pytestmark = [
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="SmolLM2 is not there: make smollm2"),
    pytest.mark.skipif(not PYTHON.is_file(), reason="SGLang is not there: make sglang-env"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2")
    shutil.copy(EXAMPLES / "rewards.py", path)
    bench = Bench(path, EXAMPLES / "configs" / "smollm2_cpu.yaml")
    yield bench
    bench.stop()


def greedy(directory: Path, ids: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    return greedy_reference(model, ids, NEW_TOKENS)


def ask(client: EngineClient, ids: list[int], version: str) -> list[int]:
    """Keyed by version, as the controller asks: the server's cache outlives its weights."""
    body = generate_body(ids, max_new_tokens=NEW_TOKENS) | {"extra_key": version}
    return list(client.post("/generate", body)["output_ids"])


def chat_ids(question: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    message = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])


def test_rl_steps_end_to_end_and_the_server_says_what_transformers_says(bench, tmp_path):
    """`examples/configs/smollm2_cpu.yaml` as it is, but on a server of ours, so that it can be asked afterwards."""
    with sglang_servers(MODEL, 1, tmp_path) as (server,):
        client = EngineClient(server.url, MODEL, MODEL)
        ids = chat_ids("What is the capital of France?")
        assert ask(client, ids, "first") == greedy(MODEL, ids)
        bench.run(
            *("run", str(bench.config), "run.name=smollm2", f"run.steps={STEPS}", "optimizer.lr=3e-5"),
            *(f"model.path={MODEL}", f"task.path={EXAMPLES / 'data' / 'plain.jsonl'}"),
            *("rollout.engine=sglang", f"rollout.engine_urls=[{server.url}]"),
            timeout_s=900,
        )
        rows = bench.rows("smollm2")
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert len({row["train/weights_checksum"] for row in rows}) == STEPS
        newest = max((bench.path / "runs" / "smollm2" / "weights").iterdir())
        version = str(int(newest.name[1:]))
        assert client.call("/model_info")[1]["weight_version"].partition(".")[0] == version
        prompts = [ids, chat_ids("Write one sentence about the sea.")]
        served = [ask(client, prompt, version) for prompt in prompts]
        assert served == [greedy(newest, prompt) for prompt in prompts]
        assert served != [greedy(MODEL, prompt) for prompt in prompts], "trained weights speak otherwise"
