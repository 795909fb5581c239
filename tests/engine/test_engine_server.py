"""What only the embedded engine has: its process, its options, its key, damaged weights."""

import http.client
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from engine_client import PROMPT, EngineClient, generate_body
from safetensors.torch import load_file, save_file

from asympo_megatron.engine import EngineOptions, make_app, serve
from asympo_megatron.engine.server import bind
from asympo_megatron.errors import EngineError, UnknownNameError
from asympo_megatron.testing.engine_server import engine_server

SERVE = """
import sys
from asympo_megatron.engine import EngineOptions, serve
serve(EngineOptions(sys.argv[1], load_format="dummy", threads=1), on_ready=lambda url: print(url, flush=True))
print("ended", flush=True)
"""


def client_for(url: str, model: Path) -> EngineClient:
    return EngineClient(url, model, model)


def test_dummy_weights_need_only_a_config(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(models["qwen3"] / "config.json", tmp_path)
    outputs = []
    for seed in (0, 0, 1):
        with engine_server(EngineOptions(str(tmp_path), load_format="dummy", seed=seed, threads=1)) as url:
            client = client_for(url, tmp_path)
            answer = client.generate(max_new_tokens=12)
            outputs.append(answer["output_ids"])
            assert answer["text"] == ""
            info = client.call("/model_info")[1]
            assert (info["weight_version"], info["load_format"]) == ("default", "dummy")
            status, refused = client.call("/generate", {"text": "hello"}, "POST")
            assert status == 400
            assert "send input_ids instead of text" in refused["error"]["message"]
    assert outputs[0] == outputs[1] != outputs[2]


def test_api_key_guards_everything_but_health(models: dict[str, Path]) -> None:
    with engine_server(EngineOptions(str(models["qwen3"]), api_key="secret", threads=1)) as url:
        address = urlparse(url)
        for path, header, status in [
            ("/health", None, 200),
            ("/model_info", None, 401),
            ("/model_info", "Bearer wrong", 401),
            ("/model_info", "Bearer s\u00e9cret", 401),
            ("/model_info", "Bearer secret", 200),
        ]:
            connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
            connection.request("GET", path, headers={"Authorization": header.encode("latin-1")} if header else {})
            assert connection.getresponse().status == status, (path, header)
            connection.close()


def test_a_taken_port_is_named_before_the_model_is_loaded() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"cannot bind port {port} of 127.0.0.1.*Set the engine's port"):
            serve(EngineOptions("/does/not/exist", port=port))


def test_options_and_models_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'dummy'"):
        EngineOptions("x", load_format="dumy")
    with pytest.raises(UnknownNameError, match="engine dtype"):
        EngineOptions("x", dtype="fp64")
    with pytest.raises(EngineError, match="max_running_requests is 0; it must be at least 1"):
        EngineOptions("x", max_running_requests=0)
    with pytest.raises(EngineError, match="port is 70000"):
        EngineOptions("x", port=70000)
    with pytest.raises(EngineError, match=r"has no config\.json"):
        make_app(EngineOptions(str(tmp_path)))


def test_missing_weights_at_start_are_an_error(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["qwen3"], tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "down_proj" not in name}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(EngineError, match=r"missing .*down_proj"):
        make_app(EngineOptions(str(tmp_path / "m")))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_process_cleanly_with_requests_running(models: dict[str, Path], number: int) -> None:
    command = [sys.executable, "-c", SERVE, str(models["qwen3"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = client_for(process.stdout.readline().strip(), models["qwen3"])
        running = client.start(max_new_tokens=1500)
        client.wait_for(running=1)
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "ended\n"), errors
    assert "Traceback" not in errors
    with pytest.raises(AssertionError, match=r"503.*the engine is shutting down"):
        running.result()


def test_a_client_that_hangs_up_frees_its_row(engine: EngineClient) -> None:
    address = urlparse(engine.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    connection.request("POST", "/generate", json.dumps(generate_body(PROMPT, "gone", max_new_tokens=1000)))
    engine.wait_for(running=1)
    connection.close()
    # Its rid may be used again as soon as the engine has noticed.
    while True:
        status, answer = engine.call("/generate", generate_body(PROMPT, "gone", max_new_tokens=1), "POST")
        if status == 200:
            break
        assert "Duplicate" in answer["error"]["message"]
    assert answer["meta_info"]["completion_tokens"] == 1
    assert engine.load()["num_running_reqs"] == 0


def test_weights_that_give_nan_answer_500_and_recover(
    engine: EngineClient, models: dict[str, Path], tmp_path: Path
) -> None:
    before = engine.generate(max_new_tokens=8)["output_ids"]
    shutil.copytree(models["qwen3"], tmp_path / "nan")
    weights = load_file(models["qwen3"] / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    engine.update(tmp_path / "nan", "nan")
    status, answer = engine.call("/generate", generate_body(PROMPT, max_new_tokens=8), "POST")
    assert status == 500
    assert "not finite" in answer["error"]["message"]
    assert engine.call("/health")[0] == 200
    engine.update(engine.model_a, "default")
    assert engine.generate(max_new_tokens=8)["output_ids"] == before


def test_more_requests_than_rows_are_all_answered(engine: EngineClient) -> None:
    """100 requests over 32 rows; joins and leaves at every step, each answer as if it were alone."""
    prompts = [[5 + number % 7] * (1 + number % 23) for number in range(100)]
    running = [engine.start(ids, max_new_tokens=1 + number % 11) for number, ids in enumerate(prompts)]
    answers = [future.result()["output_ids"] for future in running]
    for number in range(0, 100, 9):
        alone = engine.generate(prompts[number], max_new_tokens=1 + number % 11)["output_ids"]
        assert answers[number] == alone
