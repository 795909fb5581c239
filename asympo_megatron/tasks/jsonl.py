r"""People's own prompts: one JSON object a line, with the shapes of well-known data sets recognised.

{"prompt": "2 + 2?", "answer": "4"}                                                plain
{"question": "...", "answer": "... worked solution ... #### 42"}                     GSM8K
{"problem": "...", "solution": "... \\boxed{\\frac{3}{4}} ..."}                      MATH
{"prompt": [{"role": "user", "content": "..."}], "reward_model": {"ground_truth": "42"}}   DAPO
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import orjson

from asympo_megatron.config.rollout_schema import TaskConfig
from asympo_megatron.errors import TaskError
from asympo_megatron.tasks.items import Item

DEFAULT_PROMPT, DEFAULT_ANSWER = "prompt", "answer"
OTHER_PROMPTS = ("question", "problem")
"""Looked for when task.prompt_field is left at its default and the first line lacks it."""
OTHER_ANSWERS = ("reward_model.ground_truth", "solution")
"""Likewise for task.answer_field."""

_MISSING = object()


@dataclass(frozen=True)
class Shape:
    """How the lines of one file are read, decided by its first line."""

    prompt_field: str
    answer_field: str | None
    mathematical: bool
    """Known to be a mathematics data set, so that task.reward=task means math."""


class JsonlSource:
    """The lines of a JSONL file, all checked when it is opened; with task.shuffle in an order drawn by task.seed."""

    def __init__(self, task: TaskConfig, path: str | Path) -> None:
        self.name = f"jsonl {path}"
        rows = _read_rows(Path(path))
        needs_answer = ":" not in task.reward
        shape = recognise(rows[0][1], task.prompt_field, task.answer_field)
        self.own_reward = "math" if shape.mathematical else "exact"
        self._items = [_item(path, number, row, shape, needs_answer) for number, row in rows]
        if task.shuffle:
            Random(f"lines/{task.seed}").shuffle(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def item(self, position: int) -> Item:
        return self._items[position]


def recognise(row: dict[str, Any], prompt_field: str, answer_field: str) -> Shape:
    """Decide by one line where prompt and answer are and whether the answers are mathematics."""
    if prompt_field == DEFAULT_PROMPT and lookup(row, prompt_field) is _MISSING:
        prompt_field = next((name for name in OTHER_PROMPTS if name in row), prompt_field)
    answer: str | None = answer_field
    if lookup(row, answer_field) is _MISSING and answer_field == DEFAULT_ANSWER:
        answer = next((name for name in OTHER_ANSWERS if lookup(row, name) is not _MISSING), answer_field)
    value = lookup(row, answer) if answer else _MISSING
    worked = isinstance(value, str) and final_answer(value) != value
    mathematical = worked or prompt_field == "problem" or answer == "reward_model.ground_truth"
    return Shape(prompt_field, answer, mathematical)


def lookup(row: Any, field: str) -> Any:
    """Value of a dotted field; a field whose own name holds dots is found first."""
    if isinstance(row, dict) and field in row:
        return row[field]
    for part in field.split("."):
        if not isinstance(row, dict) or part not in row:
            return _MISSING
        row = row[part]
    return row


def final_answer(solution: str) -> str:
    r"""What a worked solution ends in: the text after the last ``####``, else inside the last ``\boxed``, else all."""
    if "####" in solution:
        return solution.rsplit("####", 1)[1].strip().replace(",", "")
    boxed = last_boxed(solution)
    return solution if boxed is None else boxed


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` (or ``\fbox``) with balanced braces, or None."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip()
    return None


def _read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise TaskError(f"task file {path} does not exist. Set task.path (or task.eval_path) to a JSONL file.")
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise TaskError(f"{path}, line {number}: not valid JSON ({error}); one object a line.") from error
            if not isinstance(row, dict):
                raise TaskError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
            rows.append((number, row))
    if not rows:
        raise TaskError(f"{path} has no line; a task needs at least one prompt.")
    return rows


def _item(path: str | Path, number: int, row: dict[str, Any], shape: Shape, needs_answer: bool) -> Item:
    where = f"{path}, line {number}"
    question = lookup(row, shape.prompt_field)
    if question is _MISSING:
        raise TaskError(
            f"{where}: no field {shape.prompt_field!r}; the line has {', '.join(map(repr, row))}. "
            "Set task.prompt_field."
        )
    value = lookup(row, shape.answer_field) if shape.answer_field else _MISSING
    meta = {key: rest for key, rest in row.items() if key != shape.prompt_field.split(".")[0]}
    meta["line"] = number
    if value is _MISSING or value is None:
        if needs_answer:
            raise TaskError(
                f"{where}: no field {shape.answer_field!r}; the line has {', '.join(map(repr, row))}. "
                "Set task.answer_field, or a reward function that needs no answer."
            )
        return Item(_question(where, question), None, meta=meta)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise TaskError(
            f"{where}: field {shape.answer_field!r} is {type(value).__name__}; expected a text or a number."
        )
    text = str(value)
    final = final_answer(text)
    return Item(_question(where, question), final, label=text if final != text else None, meta=meta)


def _question(where: str, value: Any) -> str | list[dict[str, str]]:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value:
        messages = []
        for message in value:
            if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")
            ):
                raise TaskError(f"{where}: a chat message needs the texts 'role' and 'content', got {message!r}.")
            messages.append({"role": message["role"], "content": message["content"]})
        return messages
    raise TaskError(f"{where}: the prompt is {value!r}; expected a text that is not empty, or a list of chat messages.")
