"""The report: one file, true to its rows, whatever the run got to."""

import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from synthetic_run import STEPS, write_run

from asympo_megatron.config import RunDir, history, load_config, override_config
from asympo_megatron.errors import RecordError
from asympo_megatron.metrics import MetricsWriter, read_rows, write_report
from asympo_megatron.metrics.report import summary
from asympo_megatron.metrics.report.asynchrony import lag_counts
from asympo_megatron.metrics.report.drawing import smooth
from asympo_megatron.metrics.report.rundata import load_run

SUPERVISED = ["rollout.source=supervised", "objective.name=sft", "advantage.estimator=none"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(run_dir):
    return write_report(run_dir).read_text()


class Outline(HTMLParser):
    """Collects tags and text, and every address that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "path", "use", "rect", "br", "link", "image"):
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        assert tag not in ("script", "link", "iframe"), tag

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def outline(page):
    parsed = Outline()
    parsed.feed(page)
    return parsed


def test_the_page_is_self_contained(page):
    parsed = outline(page)
    assert parsed.fetched == []
    assert "@import" not in page
    assert "url(http" not in page
    assert len(page) < 1_500_000


def test_every_plot_is_there_with_units(page):
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == [
        "Reward and held-out accuracy", "J", "Entropy",
        "NLL of positives and negatives", "Scale imbalance", "Gradient norm", "Warm start",
        "Lag of the trained responses", "Lag by step", "Responses that span weight versions", "In flight",
        "Throughput", "Where the trainer&#x27;s time goes",
    ]  # fmt: skip
    assert page.count("<svg") == len(titles)
    for unit in ("nats per token", "tokens per second", "seconds per step", "lag (optimizer steps)"):
        assert unit in page, unit


def test_the_summary_tells_what_happened(run_dir, page):
    rows = {row["step"]: row for row in read_rows(run_dir / "metrics.jsonl")}
    first, last = rows[0]["eval/accuracy"], rows[STEPS]["eval/accuracy"]
    text = " ".join(outline(page).words)
    assert f"rose from {first:.1%} at step 0 to {last:.1%} at step {STEPS}" in text
    assert "concentrated the distribution" in text
    assert "It did not teach the task." in text
    assert "right for 98.5% of the held-out prompts before RL" in text
    assert "with probability 0.22" in text


def test_what_rl_did_is_claimed_only_where_greedy_answers_were_right_before(tmp_path):
    run_dir = write_run(tmp_path, steps=50, greedy=0.4)
    text = " ".join(summary.paragraphs(load_run(run_dir)))
    assert "it was right for 40.0% of the held-out prompts before RL" in text
    assert "part of the rise is RL removing it" in text
    assert "did not teach" not in text


def test_lag_is_summed_over_the_whole_run(run_dir):
    run = load_run(run_dir)
    counts = lag_counts(run)
    assert counts.sum() == 256 * STEPS
    mean = (counts * np.arange(len(counts))).sum() / counts.sum()
    assert mean == pytest.approx(run.series("lag/mean").mean, rel=1e-12)
    assert f"on average {mean:.2f} steps old" in " ".join(summary.paragraphs(run))


@pytest.mark.parametrize(
    ("objective", "options", "claimed"),
    [
        ("asympo", {}, True),
        ("reinforce", {}, True),
        ("grpo", {"old_logprobs": "recompute"}, True),
        *((name, {}, False) for name in ("grpo", "dapo", "dr_grpo", "gspo", "cispo", "tis", "icepop")),
        ("no_such_package:Objective", {}, False),
    ],
)
def test_behavior_logprobs_are_said_to_be_unused_only_where_they_are(run_dir, objective, options, claimed):
    run = load_run(run_dir)
    run.config.objective.name, run.config.objective.options = objective, options
    text = " ".join(summary.paragraphs(run))
    assert "steps old when they were trained" in text
    assert ("No behavior log-probability was requested or used." in text) == claimed


def test_shares_of_time_add_up(run_dir):
    (text,) = [text for text in summary.paragraphs(load_run(run_dir)) if text.startswith("The trainer's steps took")]
    assert sum(int(share) for share in re.findall(r"(\d+)%", text)) in (99, 100, 101)


def test_discarded_groups_stand_beside_trained_ones(run_dir):
    run = load_run(run_dir)
    assert not any("discarded" in label for label, _ in summary.key_figures(run))
    figures = [
        {"rollout/discarded_groups": 3, "rollout/discarded_reward_mean": 1.0, "reward/mean": 0.5},
        {"rollout/discarded_groups": 0, "reward/mean": 0.7},
        {"rollout/discarded_groups": 1, "rollout/discarded_reward_mean": 0.0, "reward/mean": 0.9},
    ]
    tokens = {"rollout/discarded_response_tokens_mean": 20.0, "rollout/response_tokens_mean": 25.0}
    rows = [{"step": step, **row, **tokens} for step, row in enumerate(figures, 1)]
    del rows[1]["rollout/discarded_response_tokens_mean"]
    found = dict(summary.key_figures(dataclasses.replace(run, rows=rows)))
    assert found["Groups sampled, scored and discarded"] == "4"
    assert found["Mean reward, discarded / trained"] == "0.75 / 0.7"
    assert found["Mean length (tokens), discarded / trained"] == "20 / 25"


def test_the_same_run_gives_the_same_page(run_dir, page):
    assert write_report(run_dir).read_text() == page


def test_secrets_and_markup_do_not_reach_the_page(tmp_path):
    config = load_config("quickstart", [f"run.root={tmp_path}", "run.name=a<b>", "rollout.controller_token=sesame"])
    run_dir = RunDir.of(config)
    run_dir.create(config)
    MetricsWriter(run_dir.metrics).write({"step": 0, "eval/accuracy": 0.25, "eval/step": 0})
    page = write_report(run_dir.path).read_text()
    assert "sesame" not in page
    assert "a<b>" not in page
    assert "a&lt;b&gt;" in page


def test_a_run_that_got_worse_is_said_to_have_fallen(tmp_path):
    run_dir = write_run(tmp_path, steps=50)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 50, "incarnation": 1, "eval/accuracy": 0.01, "eval/step": 50}) + "\n")
    text = " ".join(summary.paragraphs(load_run(run_dir)))
    assert "fell from 28.0% at step 0 to 1.0% at step 50, after a best of" in text
    assert "removed that noise" not in text


def test_an_unfinished_run_is_said_to_be_unfinished(tmp_path):
    run_dir = write_run(tmp_path, steps=50)
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join(rows[:20]) + "\n")
    assert "19 of 50 planned steps" in write_report(run_dir).read_text()


@pytest.mark.parametrize("rows", [[{"step": 0}], [{"step": 1, "train/loss": 2.0, "train/grad_norm": None}]])
def test_sparse_rows_give_a_page(tmp_path, rows):
    overrides = [*SUPERVISED, "run.warm_start=[]"]
    config = load_config("quickstart", [f"run.root={tmp_path}", *overrides])
    run_dir = RunDir.of(config)
    run_dir.create(config)
    for row in rows:
        MetricsWriter(run_dir.metrics).write(row)
    assert "Supervised learning on spell_backward" in write_report(run_dir.path).read_text()


def test_a_supervised_run_shows_its_loss_and_neither_reward_nor_lag(run_dir):
    rows = read_rows(run_dir / "warmup" / "metrics.jsonl")
    config = load_config("quickstart", [f"run.root={run_dir}", "run.name=alone", *SUPERVISED])
    alone = RunDir.of(config)
    alone.create(config)
    writer = MetricsWriter(alone.metrics)
    for row in rows:
        writer.write(row)
    titles = re.findall(r"<h3>(.*?)</h3>", write_report(alone.path).read_text())
    assert titles == ["Loss"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"no config\.yaml: it is not the directory of a run"):
        write_report(tmp_path)
    config = load_config("quickstart", [f"run.root={tmp_path}"])
    RunDir.of(config).create(config)
    with pytest.raises(RecordError, match="no row yet"):
        write_report(RunDir.of(config).path)


def test_smoothing_keeps_a_constant_and_a_mean():
    constant = np.full(300, 3.25)
    np.testing.assert_allclose(smooth(constant), constant, rtol=1e-12)
    ramp = np.arange(300.0)
    np.testing.assert_allclose(smooth(ramp)[20:-20], ramp[20:-20], atol=0.5)


def test_roles_do_not_load_matplotlib():
    code = "import sys, asympo_megatron.metrics; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_an_accuracy_comes_with_its_standard_error(page):
    assert "<td>28.0% ± 2.8%</td><td>256</td>" in page  # sqrt(0.28 * 0.72 / 256)


def test_rewards_that_are_no_shares_of_right_answers(tmp_path):
    run_dir = write_run(tmp_path, steps=50)
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step, reward in ((0, -0.25), (50, 318.5)):
            file.write(json.dumps({"step": step, "incarnation": 1, "eval/accuracy": reward, "eval/step": step}) + "\n")
    page = write_report(run_dir).read_text()
    assert "Sampled held-out reward rose from -0.250 at step 0 to 318.500 at step 50" in page
    assert "<th>held-out reward</th>" in page
    assert "held-out accuracy" not in page


def test_a_slow_first_step_does_not_flatten_the_others(tmp_path):
    run_dir = write_run(tmp_path, steps=80)
    rows = read_rows(run_dir / "metrics.jsonl")
    with (run_dir / "metrics.jsonl").open("a") as file:
        slow = rows[1] | {"time/wait_s": 60.0, "time/step_s": rows[1]["time/step_s"] + 60.0 - rows[1]["time/wait_s"]}
        file.write(json.dumps(slow) + "\n")
    drawn = write_report(run_dir).read_text().split("Where the trainer&#x27;s time goes")[1]
    first_bar = (slow["time/step_s"] + rows[2]["time/step_s"]) / 2  # 80 steps in 40 bars
    assert f"{first_bar:.1f} s" in drawn


def test_a_configuration_that_changed_while_the_run_trained_is_told(tmp_path):
    """Rows are of the configuration that trained them, whatever the run was started with last."""
    run_dir = RunDir(write_run(tmp_path, steps=50))
    config = load_config(run_dir.config)
    history.begin(run_dir, config, 0)
    history.begin(run_dir, override_config(config, ["optimizer.lr=0.5"]), 20)
    history.begin(run_dir, override_config(config, ["objective.name=spo"]), 50)
    text = " ".join(summary.paragraphs(load_run(run_dir.path)))
    assert "The configuration changed while the run trained: from step 20 on optimizer.lr 0.0006 -> 0.5." in text
    assert text.startswith("ASymPO on ")
    page = write_report(run_dir.path).read_text()
    assert "<span>ASymPO</span>" in page
    assert "name: spo\n" not in page
    assert "configs/step_000020.yaml" in page, "the command repeats what trained"
