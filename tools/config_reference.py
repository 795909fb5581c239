"""Writes docs/configuration.md from the configuration schema; --check only says whether it is current.

The schema's own comments are the text: a string literal under a field describes it.
"""

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asympo_megatron.config import Config, preset_names, rollout_schema, schema

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

HEAD = """# Configuration

One YAML file a run, with the sections below; anything left out has its default. `asympo run FILE a.b=c` overrides
single values, left to right. A key that does not exist is an error that names the nearest one. The resolved
configuration is saved as `config.yaml` in the run directory. Shipped presets: {presets}; examples for clusters are in
[examples/configs](../examples/configs).

The same name resumes a run, also with other settings: those that decide its data or its model are refused, and
`config.yaml` stays as it was; all others hold from the step it goes on from, and are told with their old values in the
log and the report.

`model.megatron`, `optimizer.megatron` and `ddp.megatron` take any field of Megatron-Core's `TransformerConfig`,
`OptimizerConfig` and `DistributedDataParallelConfig`.

This page is made from the schema in `asympo_megatron/config` by `make docs`.
"""


def main(arguments: list[str]) -> int:
    """Write the page, or compare it; returns the exit code."""
    text = render()
    if "--check" not in arguments:
        PAGE.write_text(text)
        return 0
    if PAGE.is_file() and PAGE.read_text() == text:
        return 0
    print(f"{PAGE.name} does not match the schema. Run: make docs", file=sys.stderr)
    return 1


def render() -> str:
    """The whole page."""
    parts = [HEAD.format(presets=", ".join(f"`{name}`" for name in preset_names()))]
    comments = _comments()
    for section in dataclasses.fields(Config):
        parts.append(f"\n## {section.name}\n\n| key | default | meaning |\n|---|---|---|\n")
        default = getattr(Config(), section.name)
        parts += [f"| `{key}` | {value} | {text} |\n" for key, value, text in _rows(section.name, default, comments)]
    return "".join(parts)


def _rows(prefix: str, section: Any, comments: dict[tuple[str, str], str]) -> Iterator[tuple[str, str, str]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        key = f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _rows(key, value, comments)
        else:
            yield key, f"`{_yaml(value)}`", comments.get((type(section).__name__, field.name), "").replace("|", "\\|")


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _comments() -> dict[tuple[str, str], str]:
    """(class, field) to the string literal that follows the field in the source of the schema."""
    found = {}
    sources = [inspect.getsource(module) for module in (schema, rollout_schema)]
    for node in (node for source in sources for node in ast.parse(source).body):
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[node.name, field.target.id] = " ".join(str(after.value.value).split())
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
