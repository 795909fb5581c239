"""Plots of what was learned and whether it stayed stable. None: the run does not report it."""

import numpy as np
from matplotlib.ticker import PercentFormatter

from asympo_megatron.metrics.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PURPLE,
    RED,
    Plot,
    legend,
    line_plot,
    log_scale,
    new_axes,
    steps_axis,
    to_svg,
    trend,
)
from asympo_megatron.metrics.report.rundata import RunData, series


def headline(run: RunData) -> Plot | None:
    reward, accuracy = run.series("reward/mean"), run.series("eval/accuracy")
    if not reward and not accuracy:
        return None
    with new_axes(wide=True, height=3.5) as (figure, axes):
        if reward:
            trend(axes, reward, GREY, "training reward (mean of the step's responses)")
        if accuracy:
            axes.plot(
                accuracy.steps,
                accuracy.values,
                "o-",
                color=BLUE,
                linewidth=2.2,
                markersize=5,
                label=f"held-out {run.scored}",
            )
            for index, offset in ((0, (6, -13)), (-1, (-4, -15))):
                axes.annotate(
                    run.score(accuracy.values[index]),
                    (accuracy.steps[index], accuracy.values[index]),
                    xytext=offset,
                    textcoords="offset points",
                    color=BLUE,
                    fontweight="bold",
                    ha="left" if index == 0 else "right",
                )
        greedy = run.series("eval/greedy_accuracy")
        if greedy:
            axes.plot(
                greedy.steps, greedy.values, "o--", color=GREEN, linewidth=1.2, markersize=3, label="greedy answers"
            )
        values = np.concatenate([reward.values, accuracy.values])
        if values.min() >= 0 and values.max() <= 1:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("reward, accuracy" if run.scored == "accuracy" else "reward")
        steps_axis(axes)
        legend(axes)
        caption = (
            f"Held-out {run.scored}: sampled answers to prompts never trained on, at one fixed weight version. "
            "Training reward: the responses of each step, which older weights sampled."
        )
        return Plot(f"Reward and held-out {run.scored}", caption, to_svg(figure), wide=True)


def nll(run: RunData) -> Plot | None:
    positive, negative = run.series("train/nll_pos"), run.series("train/nll_neg")
    if not positive or not negative:
        return None
    with new_axes() as (figure, axes):
        trend(axes, negative, RED, "negative advantage")
        trend(axes, positive, GREEN, "positive advantage")
        axes.set_ylabel("nats per token")
        axes.set_ylim(bottom=0)
        steps_axis(axes)
        legend(axes)
        caption = "Mean over responses of their average token NLL. Both rising together is the sign of a collapse."
        return Plot("NLL of positives and negatives", caption, to_svg(figure))


def nll_ratio(run: RunData) -> Plot | None:
    line = run.series("train/nll_ratio")
    if not line:
        return None
    with new_axes() as (figure, axes):
        trend(axes, line, PURPLE)
        axes.axhline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylabel("negatives / positives")
        if line.values.max() > 30 * max(line.values.min(), 1e-12):
            log_scale(axes)
        steps_axis(axes)
        caption = (
            "How much larger the loss of negatives is. ASymPO divides it out: every response pulls by its advantage."
        )
        return Plot("Scale imbalance", caption, to_svg(figure))


def grad_norm(run: RunData) -> Plot | None:
    line = run.series("train/grad_norm")
    if not line:
        return None
    clip = run.config.optimizer.clip_grad
    with new_axes() as (figure, axes):
        trend(axes, line, BLUE, "before clipping")
        if clip > 0:
            axes.axhline(clip, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"clipped at {clip:g}")
        axes.set_ylabel("L2 norm")
        if line.values.min() > 0 and line.values.max() > 30 * line.values.min():
            log_scale(axes)
        else:
            axes.set_ylim(bottom=0)
        steps_axis(axes)
        legend(axes)
        return Plot("Gradient norm", "Of the whole model, over all ranks.", to_svg(figure))


def loss(run: RunData) -> Plot | None:
    """Only for supervised steps: the value of an RL loss says nothing."""
    line = run.series("train/loss")
    if run.is_rl or not line:
        return None
    with new_axes(wide=True, height=3.5) as (figure, axes):
        trend(axes, line, GREEN)
        axes.set_ylabel("nats per token")
        steps_axis(axes)
        return Plot("Loss", "Mean token NLL of the reference answers.", to_svg(figure), wide=True)


def warmup_loss(run: RunData) -> Plot | None:
    line = series(run.warmup_rows, "train/loss")
    if not line:
        return None
    with new_axes() as (figure, axes):
        trend(axes, line, GREEN)
        axes.set_ylabel("loss (nats per token)")
        steps_axis(axes, "optimizer step of the warm start")
        return Plot("Warm start", "Supervised steps before RL, by the same trainer.", to_svg(figure))


j = line_plot(
    "train/J", BLUE, "J", "J", "Mean of advantage x log(average NLL of the response). On each batch ASymPO descends J."
)
entropy = line_plot(
    "train/entropy",
    PURPLE,
    "Entropy",
    "nats per token",
    "Of the policy, per trained token. Rising again after a fall is a warning.",
    bottom=0,
)
