"""The report as one HTML file: no script, no network, every plot inline."""

from collections.abc import Sequence
from html import escape

from asympo_megatron.metrics import summary
from asympo_megatron.metrics.plots import Plot
from asympo_megatron.metrics.rundata import RunData

_CSS = """
:root { --ink: #1d2939; --soft: #667085; --line: #e4e7ec; --blue: #2457c5; }
* { box-sizing: border-box; }
body { margin: 0; background: #f7f8fa; color: var(--ink); font: 15px/1.55 system-ui, 'Segoe UI', Roboto, Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 36px 24px 56px; }
h1 { margin: 0; font-size: 30px; letter-spacing: -0.02em; }
h2 { margin: 38px 0 12px; font-size: 19px; letter-spacing: -0.01em; }
h3 { margin: 0; font-size: 15px; }
.chips { margin: 8px 0 20px; color: var(--soft); }
.chips span + span::before { content: " · "; }
.summary { background: #fff; border: 1px solid var(--line); border-left: 4px solid var(--blue); border-radius: 8px; padding: 14px 20px; }
.summary p { margin: 6px 0; max-width: 100ch; }
.summary p:first-child { font-size: 16.5px; }
.tiles { display: flex; gap: 14px; margin-top: 14px; }
.tile { flex: 1; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 25px; font-weight: 650; letter-spacing: -0.02em; line-height: 1.3; }
.tile small, .tile i { display: block; color: var(--soft); font-size: 13px; font-style: normal; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px 10px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { color: var(--soft); font-size: 13px; line-height: 1.4; margin: 2px 0 8px; }
svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; background: #fff; border: 1px solid var(--line); border-radius: 8px; width: 100%; }
.tables { display: grid; grid-template-columns: 3fr 2fr; gap: 14px; align-items: start; }
th, td { text-align: left; padding: 6px 14px; border-top: 1px solid var(--line); font-weight: 400; }
th { color: var(--soft); font-size: 13px; border-top: 0; }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
pre { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; overflow-x: auto; font-size: 13px; line-height: 1.45; margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
details { margin: 14px 0; }
footer { color: var(--soft); font-size: 13px; margin-top: 28px; }
@media (max-width: 800px) { .plots, .tables { grid-template-columns: 1fr; } .tiles { flex-wrap: wrap; } }
"""


def render(run: RunData, sections: Sequence[tuple[str, Sequence[Plot]]], command: str, config_yaml: str) -> str:
    """The whole page."""
    name = escape(run.config.run.name)
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
    body.append("<footer>Drawn from metrics.jsonl and config.yaml of the run directory by <code>asympo report</code>. "
                "Faint lines are single steps, strong lines their moving average.</footer>")  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: report</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style></head>\n'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _chips(run: RunData) -> str:
    config = run.config
    chips = [summary.objective_name(run), summary.model_line(run), summary.task_name(run), summary.layout_line(run)]
    if run.is_rl:
        chips.append(f"{config.batch.groups_per_step} groups × {config.batch.group_size} responses a step")
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
    cells = "".join(
        f"<tr><td>{row['eval/step']}</td><td>{row['eval/accuracy']:.1%}</td><td>{row.get('eval/responses', '')}</td></tr>"
        for row in found
    )
    return f"<table><tr><th>evaluated step</th><th>held-out accuracy</th><th>responses</th></tr>{cells}</table>"
