"""A game of several turns: the model works out a sum with a calculator that takes one step at a time.

    user       13*4+57
    model      13*4
    calculator 52
    model      52+57
    calculator 109
    model      =109

`task.environment=calculator:calculate task.reward=calculator:right`, with this folder in PYTHONPATH. As a program it
writes the files that a configuration names: sums, and games for the warm start, some of their calls wrong.

    python examples/calculator.py examples/configs/calculator_cpu.yaml
"""

import ast
import json
import operator
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
LONGEST = 32
"""Characters of a call; so no call is slow, and no result is large."""
SUMS = 8000
GAMES = 20000
NOISE = 0.1
"""Probability that a character of a warm-start turn is a random digit instead."""


def calculate(prompt: str, response: str, answer: str, meta: Mapping[str, Any]) -> str | None:
    """The environment: an answer begins with "=" and ends the game; anything else is a call of the calculator."""
    if response.startswith("="):
        return None
    value = evaluate(response)
    return "?" if value is None else str(value)


def right(
    prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str], metas: Sequence[Mapping[str, Any]]
) -> list[float]:
    """The reward: 1 for the right answer in the last turn, however many calls it took."""
    return [float(response == f"={answer}") for response, answer in zip(responses, answers, strict=True)]


def evaluate(text: str) -> int | None:
    """Value of numbers with + - *; None for anything else. Nothing of the text is ever run."""
    try:
        return _value(ast.parse(text, mode="eval").body) if len(text) <= LONGEST else None
    except (SyntaxError, ValueError):  # ValueError: not an expression of numbers, or a null byte
        return None


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"no arithmetic: {ast.dump(node)}")


def write_sums(path: Path) -> None:
    """Distinct sums of the form 13*4+57, the same every time; one object a line, {"prompt": ..., "answer": ...}."""
    rng, sums = random.Random(0), dict[str, int | None]()
    while len(sums) < SUMS:
        text = f"{rng.randint(2, 99)}*{rng.randint(2, 9)}{rng.choice('+-')}{rng.randint(2, 99)}"
        sums[text] = evaluate(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": text, "answer": str(sums[text])}) + "\n" for text in sums))


def write_games(config: Any, path: Path) -> None:
    """Games on training prompts as a replay file: the turns with mask 1, the calculator's replies with mask 0."""
    from asympo_megatron.records import write_groups
    from asympo_megatron.tasks import load_task, prepare_model_dir

    with tempfile.TemporaryDirectory() as folder:
        task, rng = load_task(config, prepare_model_dir(config, folder)), random.Random(1)
        write_groups(path, [_game(task, index, rng) for index in range(GAMES)])


def _game(task: Any, index: int, rng: random.Random) -> Any:
    from asympo_megatron.records import Group, Response

    prompt, codec = task.train_prompt(index), task.codec
    split = max(prompt.question.find(sign) for sign in "+-")
    parts: list[tuple[list[int], int]] = []
    said = prompt.question[:split]
    for rest in (prompt.question[split:], "", None):
        turn = codec.encode_label("".join(rng.choice("0123456789") if rng.random() < NOISE else c for c in said))
        parts.append((turn, 1))
        reply = calculate(prompt.question, codec.decode(turn), prompt.answer, prompt.meta)
        if reply is None or rest is None:
            break
        parts.append((codec.encode_reply(turn, reply), 0))
        said = f"{reply}{rest}" if rest else f"={reply}"
    ids = [token for part, _ in parts for token in part]
    mask = [bit for part, bit in parts for _ in part]
    response = Response(ids, mask, reward=1.0, turns=sum(bit for _, bit in parts))
    return Group(prompt.ids, [response], index, index)


if __name__ == "__main__":
    from asympo_megatron.config import load_config, warm_start_config

    run = load_config(sys.argv[1])
    warm_start = warm_start_config(run)
    write_sums(Path(run.task.path))
    write_games(run, Path(warm_start.rollout.replay))
