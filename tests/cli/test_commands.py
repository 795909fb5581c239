"""The small commands, and how every command fails."""

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
