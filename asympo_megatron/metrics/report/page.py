"""The report as one HTML file: no script, no network, every plot inline."""

from collections.abc import Sequence
from html import escape
from importlib import resources

from asympo_megatron.metrics.jsonl import Row
from asympo_megatron.metrics.report import summary
from asympo_megatron.metrics.report.drawing import Plot
from asympo_megatron.metrics.report.rundata import RunData


def render(run: RunData, sections: Sequence[tuple[str, Sequence[Plot]]], command: str, config_yaml: str) -> str:
    """The whole page."""
    name = escape(run.config.run.name)
    css = (resources.files("asympo_megatron.metrics.report") / "report.css").read_text()
    body = [
        f"<h1>{name}</h1>",
        _chips(run),
        '<section class="summary">'
        + "".join(f"<p>{escape(text)}</p>" for text in summary.paragraphs(run))
        + "</section>",
        '<div class="tiles">' + "".join(_tile(*tile) for tile in summary.tiles(run)) + "</div>",
    ]
    for title, plots in sections:
        body.append(f'<h2>{escape(title)}</h2><div class="plots">' + "".join(map(_figure, plots)) + "</div>")
    body.append('<h2>Key figures</h2><div class="tables">' + _key_figures(run) + _evaluations(run) + "</div>")
    body.append(f"<h2>Do it again</h2><pre>{escape(command)}</pre>")
    body.append(f"<details><summary>Resolved configuration</summary><pre>{escape(config_yaml)}</pre></details>")
    body.append("<footer>Drawn from metrics.jsonl and the saved configuration by <code>asympo report</code>. "
                "Faint lines are single steps, strong lines their moving average.</footer>")  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: report</title>'
        f'<meta name="viewport" content="width=device-width"><style>{css}</style></head>\n'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _chips(run: RunData) -> str:
    config = run.config
    chips = [summary.objective_name(run), summary.model_line(run), summary.task_name(run), summary.layout_line(run)]
    if run.is_rl:
        chips.append(f"{config.batch.groups_per_step} groups x {config.batch.group_size} responses a step")
    chips.append(f"seed {config.run.seed}")
    return '<div class="chips">' + "".join(f"<span>{escape(chip)}</span>" for chip in chips) + "</div>"


def _tile(label: str, value: str, remark: str) -> str:
    return f'<div class="tile"><small>{escape(label)}</small><b>{escape(value)}</b><i>{escape(remark)}</i></div>'


def _figure(plot: Plot) -> str:
    kind = ' class="wide"' if plot.wide else ""
    return (
        f"<figure{kind}><h3>{escape(plot.title)}</h3><figcaption>{escape(plot.caption)}</figcaption>{plot.svg}</figure>"
    )


def _key_figures(run: RunData) -> str:
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in summary.key_figures(run))
    return f"<table><tr><th>over the run</th><th></th></tr>{rows}</table>"


def _evaluations(run: RunData) -> str:
    found = [row for row in run.rows if row.get("eval/accuracy") is not None]
    if not found:
        return ""
    right = run.scored == "accuracy" and run.config.rollout.eval.samples_per_prompt == 1
    cells = "".join(
        f"<tr><td>{row['eval/step']}</td><td>{run.score(row['eval/accuracy'])}{_error(row) if right else ''}</td>"
        f"<td>{row.get('eval/responses', '')}</td></tr>"
        for row in found
    )
    name = f"held-out {run.scored}{' ± std. error' if right else ''}"
    head = f"<tr><th>step</th><th>{name}</th><th>responses</th></tr>"
    return f"<table>{head}{cells}</table>"


def _error(row: Row) -> str:
    """Standard error of a share of independent answers."""
    if not row.get("eval/responses"):
        return ""
    accuracy = row["eval/accuracy"]
    return f" ± {(accuracy * (1 - accuracy) / row['eval/responses']) ** 0.5:.1%}"
