"""The live view: what it shows, and that it stays quiet where nobody can read it."""

import io

from rich.console import Console

from asympo_megatron.config import load_config
from asympo_megatron.metrics import MetricsWriter, RunConsole
from asympo_megatron.metrics.console import SPARK_WIDTH, RunState, clock_time, spark


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def row(step, **more):
    figures = {"reward/mean": step / 100, "lag/mean": 2.25, "lag/max": 4, "rollout/in_flight": 12, "sync/version": step}
    return {"step": step, "incarnation": 1, **figures, "train/tokens_per_s": 3456.7, **more}


def watch(tmp_path, terminal, *overrides):
    config = load_config("quickstart", ["run.steps=100", *overrides])
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    return (
        RunConsole(config, tmp_path, console=console, clock=clock),
        MetricsWriter(tmp_path / "metrics.jsonl"),
        out,
        clock,
    )


def test_plain_lines_come_at_most_every_few_seconds_and_the_last_step_is_shown(tmp_path):
    console, writer, out, clock = watch(tmp_path, terminal=False)
    with console:
        for step in range(1, 21):
            writer.write(row(step, **({"eval/accuracy": 0.5, "eval/step": 10} if step == 10 else {})))
            clock.now += 1.0
            console.update()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "6/100", "11/100", "16/100", "20/100"]
    assert lines[2] == (
        "step 11/100  reward 0.110  held-out 0.500 at step 10  lag 2.2 (max 4)  in flight 12  "
        "trained tok/s 3,457  weights 11"
    )


def test_no_line_when_nothing_is_new(tmp_path):
    console, writer, out, clock = watch(tmp_path, terminal=False)
    with console:
        writer.write(row(1))
        for _ in range(10):
            clock.now += 10
            console.update()
    assert len(out.getvalue().splitlines()) == 1


def test_progress_false_prints_nothing(tmp_path):
    for terminal in (False, True):
        console, writer, out, _ = watch(tmp_path, terminal, "logging.progress=false")
        with console:
            writer.write(row(1))
            console.update()
        assert out.getvalue() == ""


def test_the_screen_shows_bar_figures_and_remaining_time(tmp_path):
    console, writer, out, clock = watch(tmp_path, terminal=True)
    with console:
        assert "the first step has not ended yet" in out.getvalue()
        writer.write(row(0))
        console.update()
        for step in range(1, 51):
            writer.write(row(step, **({"eval/accuracy": 0.875, "eval/step": 25} if step == 30 else {})))
        clock.now += 100
        console.update()
    screen = out.getvalue()
    for text in (
        "quickstart",
        "step 50/100",
        "1:40 left",
        "reward",
        "0.500",
        "0.875 at step 25",
        "2.2 (max 4)",
        "3,457",
    ):
        assert text in screen, text


def test_the_remaining_time_of_a_resumed_run_counts_what_it_does_itself(tmp_path):
    console, writer, out, clock = watch(tmp_path, terminal=True)
    for step in range(81):
        writer.write(row(step))
    with console:
        clock.now += 20
        console.update()
        assert "left" not in out.getvalue()
        writer.write(row(50, incarnation=2))
        console.update()
        for step in range(51, 61):
            writer.write(row(step, incarnation=2))
        clock.now += 100
        console.update()
        assert "step 60/100" in out.getvalue()
        assert "6:40 left" in out.getvalue()


def test_supervised_steps_show_their_loss_and_no_reward(tmp_path):
    supervised = ["rollout.source=supervised", "objective.name=sft", "advantage.estimator=none"]
    console, writer, out, _ = watch(tmp_path, False, *supervised)
    with console:
        writer.write(
            {"step": 3, "incarnation": 1, "train/loss": 1.25, "lag/mean": 0.0, "lag/max": 0, "reward/mean": 1.0}
        )
    assert out.getvalue() == "step 3/100  loss 1.250\n"


def test_an_older_step_written_again_brings_only_its_evaluation():
    state = RunState()
    for newest in (row(1), row(2), row(1, **{"eval/accuracy": 0.5, "eval/step": 1})):
        state.take(newest)
    assert state.step == 2
    assert state.figures()["held-out"] == "0.500 at step 1"
    assert state.rewards == [0.01, 0.02]


def test_a_resumed_trainer_goes_back():
    state = RunState()
    state.take(row(9))
    state.take(row(4) | {"incarnation": 2})
    assert state.step == 4


def test_spark_is_bounded_and_monotone():
    assert spark([]) == ""
    assert spark([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(spark([float(i) for i in range(1000)])) <= SPARK_WIDTH


def test_clock_time():
    assert [clock_time(s) for s in (0, 59.6, 75, 3700)] == ["0:00", "1:00", "1:15", "1:01:40"]
