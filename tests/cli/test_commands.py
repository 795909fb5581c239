"""The small commands, and how every command fails."""

import json
from pathlib import Path

import pytest

from asympo_megatron.cli.main import EXIT_BAD_INPUT, main


def test_doctor_names_versions_and_what_would_run(capsys):
    assert main(["doctor", "quickstart", "run.seed=3"]) == 0
    said = capsys.readouterr().out
    for words in (
        "megatron-core 0.",
        "transformer-engine",
        "TP 1 x PP 1 x CP 1 = 1 ranks",
        "objective: asympo, reads the current policy only",
        "max_lag_steps 4",
        "warm start: 600 steps of sft",
    ):
        assert words in said, said


def test_doctor_says_what_an_objective_reads(capsys):
    assert main(["doctor", "quickstart", "objective.name=grpo"]) == 0
    assert "objective: grpo, reads behavior_logprob_T" in capsys.readouterr().out


def test_doctor_of_a_model_counts_parameters_and_memory(tmp_path, capsys):
    """Llama 3.2 1B has 1,235,814,400 parameters, counted by hand for one rank of TP 2 x PP 2 below."""
    fields = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["doctor", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1.236 B parameters" in said
    assert "Megatron's local spec" in said
    layer = (2048 + 512 + 512) * 2048 + 2048 * 2048 + 3 * 2048 * 8192
    held = 8 * (layer // 2 + 2 * 2048) + 128256 * 2048 // 2 + 2048  # the tied output weight is a copy on the last stage
    assert held == 374_638_592
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "model.dtype=bf16"]
    assert main(["doctor", str(tmp_path), *layout]) == 0
    said = capsys.readouterr().out
    assert "largest stage (last) holds 0.375 B parameters a rank" in said
    assert "weights and float32 gradients 2.09 GiB, optimizer states 4.19 GiB" in said
    assert main(["doctor", str(tmp_path), "parallel.tensor=3"]) == 2
    assert "num_attention_heads=32 of the model is not divisible by parallel.tensor=3" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "journal"])
def test_a_directory_that_is_no_run_is_refused(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) != 0
    said = capsys.readouterr().err
    assert str(tmp_path) in said
    assert said.startswith("asympo: ")
    assert list(tmp_path.iterdir()) == []


def test_no_command_prints_the_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == EXIT_BAD_INPUT
    assert "COMMAND" in capsys.readouterr().err


def test_a_report_on_a_run_of_somebody_else_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    read_text = Path.read_text

    def refuse(path, *arguments, **keywords):
        if path.name == "config.yaml":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", refuse)  # whoever runs this test may read everything
    assert main(["report", str(tmp_path)]) == EXIT_BAD_INPUT
    assert "config.yaml cannot be read (Permission denied)" in capsys.readouterr().err
