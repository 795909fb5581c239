"""What happened in a run, in words and key figures."""

from collections.abc import Iterator

import numpy as np

from asympo_megatron.metrics.console import clock_time
from asympo_megatron.metrics.report.asynchrony import lag_counts, times
from asympo_megatron.metrics.report.rundata import RunData
from asympo_megatron.objectives import build_objective

_ENDS = 10
"""Rewards at the start and the end are means over this many steps."""
_DISPLAY = {"asympo": "ASymPO", "spo": "SPO", "reinforce": "REINFORCE", "grpo": "GRPO", "sft": "supervised learning"}


def objective_name(run: RunData) -> str:
    return _DISPLAY.get(run.config.objective.name, run.config.objective.name)


def task_name(run: RunData) -> str:
    task = run.config.task
    return task.name if task.kind == "reasoning_gym" else str(task.path)


def model_line(run: RunData) -> str:
    """Where the model comes from and how large it is."""
    model = run.config.model
    name = model.path.rstrip("/").rsplit("/", 1)[-1] if model.path else str(model.hf.get("model_type", "model"))
    sizes = [f"{run.parameters:,} parameters"] if run.parameters else []
    for key, unit in (("num_hidden_layers", "layers"), ("hidden_size", "wide")):
        if key in model.hf:
            sizes.append(f"{model.hf[key]} {unit}")
    return ", ".join([name, *sizes])


def layout_line(run: RunData) -> str:
    parallel = run.config.parallel
    sizes = {"TP": parallel.tensor, "PP": parallel.pipeline, "CP": parallel.context, "EP": parallel.expert}
    return " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank a replica"


def paragraphs(run: RunData) -> Iterator[str]:
    """The summary: how far, what changed, how stale, where the time went."""
    yield from filter(None, (_outcome(run), _changes(run), _what_rl_did(run), _staleness(run), _time(run)))


def _outcome(run: RunData) -> str:
    steps, planned = run.steps_done, run.config.run.steps
    done = f"{steps:,} steps" if steps >= planned else f"{steps:,} of {planned:,} planned steps"
    text = f"{objective_name(run)} on {task_name(run)}: {done}."
    text = text[0].upper() + text[1:]
    accuracy = run.series("eval/accuracy")
    if len(accuracy.steps) > 1:
        text += (
            f" Sampled held-out {run.scored} {_verb(accuracy.first, accuracy.last)} "
            f"from {run.score(accuracy.first)} at step {accuracy.steps[0]} "
            f"to {run.score(accuracy.last)} at step {accuracy.steps[-1]}"
        )
        best = int(accuracy.values.argmax())
        if accuracy.values[best] > accuracy.last + 0.01:
            text += f", after a best of {run.score(accuracy.values[best])} at step {accuracy.steps[best]}"
        text += "."
    reward = run.series("reward/mean")
    if len(reward.steps) >= 2 * _ENDS:
        first, last = reward.values[:_ENDS].mean(), reward.values[-_ENDS:].mean()
        text += (
            f" Mean training reward {_verb(first, last)} from {first:.2f} (first {_ENDS} steps) "
            f"to {last:.2f} (last {_ENDS})."
        )
    return text


def _changes(run: RunData) -> str:
    parts = (f"from step {step} on {', '.join(map(str, changes))}" for step, changes in run.changes)
    text = "; ".join(parts)
    return text and f"The configuration changed while the run trained: {text}. This page names the last one."


def _verb(first: float, last: float) -> str:
    if abs(last - first) < 0.005:
        return "went"
    return "rose" if last > first else "fell"


def _what_rl_did(run: RunData) -> str | None:
    """A warm start on noisy answers may rank the right answer first already; then RL teaches nothing."""
    noise = next((o.split("=", 1)[1] for o in run.config.run.warm_start if o.startswith("rollout.label_noise=")), None)
    accuracy = run.series("eval/accuracy")
    if noise is None or not float(noise) or len(accuracy.steps) < 2:
        return None
    text = (
        "What RL did here: the policy began as a supervised warm start on reference answers in which each letter was "
        f"replaced by a random one with probability {float(noise):g}. "
    )
    rose = accuracy.last > accuracy.first + 0.05
    greedy = run.series("eval/greedy_accuracy")
    if greedy:
        text += (
            f"Decoded greedily, it was right for {greedy.first:.1%} of the held-out prompts before RL and for "
            f"{greedy.last:.1%} at the end. "
        )
    if rose and greedy and greedy.first > accuracy.last - 0.05:
        text += (
            "So the policy had learned the task, and only its samples copied the noise. RL removed that noise: it "
            "concentrated the distribution on answers the policy already ranked first. It did not teach the task."
        )
    elif rose:
        text += "A sampled answer copies that noise, so part of the rise is RL removing it."
    return text.strip()


def _staleness(run: RunData) -> str | None:
    lag, largest = run.series("lag/mean"), run.series("lag/max")
    if not lag or not largest:
        return None
    bound, counts = run.config.rollout.max_lag_steps, lag_counts(run)
    if bound == 0 and largest.values.max() == 0:
        return "Synchronous: every response was trained by the step whose weights sampled it."
    text = (
        f"Responses were on average {lag.mean:.2f} steps old when they were trained, "
        f"{largest.values.max():.0f} at most (bound {bound})"
    )
    if counts.sum():
        text += f"; {1 - counts[0] / counts.sum():.0%} of them came from older weights than the newest"
    over = run.series("lag/over_bound")
    if over and over.values.sum():
        text += f"; {over.values.sum():,.0f} exceeded the bound"
    return text + ("." if _reads_behavior(run) else ". No behavior log-probability was requested or used.")


def _reads_behavior(run: RunData) -> bool:
    """Whether the objective reads the log-probs of the engines, or nobody here can say."""
    objective = run.config.objective
    try:
        return "behavior_logprob_T" in build_objective(objective.name, **objective.options).needs
    except Exception:  # of a package that this machine lacks: a report does without
        return True


def _time(run: RunData) -> str | None:
    parts, total = times(run), run.series("time/step_s").values.sum()
    if not parts or not total:
        return None
    shares = sorted(((part.values.sum() / total, label) for label, _, part in parts), reverse=True)
    listed = ", ".join(f"{share:.0%} {label}" for share, label in shares if share >= 0.005)
    return f"The trainer's steps took {total:,.0f} s in all: {listed}."


def tiles(run: RunData) -> Iterator[tuple[str, str, str]]:
    """The largest figures: label, value, remark."""
    accuracy = run.series("eval/accuracy")
    if accuracy:
        yield f"held-out {run.scored}", run.score(accuracy.last), f"from {run.score(accuracy.first)}, sampled"
    loss = run.series("train/loss")
    if not run.is_rl and loss:
        yield "loss", f"{loss.last:.3f}", f"from {loss.first:.3f} nats per token"
    yield "optimizer steps", f"{run.steps_done:,}", f"of {run.config.run.steps:,}"
    lag = run.series("lag/mean")
    if lag:
        yield "mean lag", f"{lag.mean:.2f}", f"steps, bound {run.config.rollout.max_lag_steps}"
    if run.rows[-1].get("time_s"):
        yield "time", clock_time(max(row.get("time_s", 0.0) for row in run.rows)), "without start-up and warm start"
    speed = run.series("train/tokens_per_s")
    if speed:
        yield "trainer", f"{np.median(speed.values):,.0f}", "response tokens per second, median"


_FIGURES = (
    ("Mean training reward, last 10 steps", "reward/mean", lambda v: f"{v[-10:].mean():.3f}"),
    ("J, last 10 steps", "train/J", lambda v: f"{v[-10:].mean():.4g}"),
    ("Entropy, first → last (nats per token)", "train/entropy", lambda v: f"{v[0]:.3f} → {v[-1]:.3f}"),
    ("Gradient norm, median / largest", "train/grad_norm", lambda v: f"{np.median(v):.3g} / {v.max():.3g}"),
    ("NLL of positives, first → last (nats per token)", "train/nll_pos", lambda v: f"{v[0]:.3g} → {v[-1]:.3g}"),
    ("NLL of negatives, first → last (nats per token)", "train/nll_neg", lambda v: f"{v[0]:.3g} → {v[-1]:.3g}"),
    ("Effective sample size of the weights, mean (responses)", "train/ess", lambda v: f"{v.mean():,.1f}"),
    ("Groups whose rewards are all equal, mean share", "reward/zero_variance_groups", lambda v: f"{v.mean():.1%}"),
    ("Responses cut at the length limit, mean share", "rollout/truncated_fraction", lambda v: f"{v.mean():.2%}"),
    ("Groups dropped", "rollout/dropped", lambda v: f"{v.max():,.0f}"),
    ("Responses below the NLL floor, mean share", "train/floored_fraction", lambda v: f"{v.mean():.2%}"),
    ("Response tokens trained", "train/tokens", lambda v: f"{v.sum():,.0f}"),
    ("Mean lag / largest lag (steps)", "lag/mean", lambda v: f"{v.mean():.2f} / "),
    ("Newest weight version of the engines", "sync/version", lambda v: f"{v.max():,.0f}"),
    ("Seconds per weight sync, median", "sync/seconds", lambda v: f"{np.median(v):.3f}"),
    ("Trainer tokens/s, median", "train/tokens_per_s", lambda v: f"{np.median(v):,.0f}"),
    ("Engine tokens/s, median", "rollout/tokens_per_s", lambda v: f"{np.median(v):,.0f}"),
    ("Seconds per step, median", "time/step_s", lambda v: f"{np.median(v):.3f}"),
)


def key_figures(run: RunData) -> Iterator[tuple[str, str]]:
    """Name and value of everything the run reports of the list above."""
    for label, name, form in _FIGURES:
        line = run.series(name)
        if line:
            value = form(line.values)
            yield label, value + (f"{run.series('lag/max').values.max():.0f}" if name == "lag/mean" else "")
    yield from _discarded(run)
    incarnations = max(row.get("incarnation", 1) for row in run.rows)
    if incarnations > 1:
        yield "Trainer incarnations (restarts + 1)", str(incarnations)
    if run.rows[-1].get("train/weights_checksum"):
        yield "Checksum of the last weights", str(run.rows[-1]["train/weights_checksum"])


def _discarded(run: RunData) -> Iterator[tuple[str, str]]:
    """Scored groups that were not trained, beside those that were: what dropping does to the data."""
    groups = run.series("rollout/discarded_groups").values
    if not groups.sum():
        return
    yield "Groups sampled, scored and discarded", f"{groups.sum():,.0f}"
    for label, discarded, trained in (
        ("reward", "rollout/discarded_reward_mean", "reward/mean"),
        ("length (tokens)", "rollout/discarded_response_tokens_mean", "rollout/response_tokens_mean"),
    ):
        mean = np.average(run.series(discarded).values, weights=groups[groups > 0])
        yield f"Mean {label}, discarded / trained", f"{mean:.4g} / {run.series(trained).values.mean():.4g}"
