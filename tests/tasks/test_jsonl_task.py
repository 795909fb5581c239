"""People's own data: shapes of lines, splits, errors with line numbers."""

import json
from pathlib import Path

import pytest

from asympo_megatron.config import load_config
from asympo_megatron.errors import TaskError
from asympo_megatron.tasks.jsonl import JsonlSource, final_answer, last_boxed, recognise

GSM8K = {"question": "Tom has 3 bags of 4 apples.", "answer": "3*4=<<3*4=12>>12 apples.\n#### 1,012"}
MATH = {"problem": "Halve 3/2.", "level": "Level 1", "solution": r"It is $\boxed{\frac{3}{4}}$. \boxed{\frac{3}{4}}"}
MATH500 = {"problem": "Halve 3/2.", "solution": r"\boxed{\frac{3}{4}}", "answer": r"\frac{3}{4}"}
DAPO = {
    "prompt": [{"role": "user", "content": "Solve step by step: 40 + 2"}],
    "reward_model": {"ground_truth": "42", "style": "rule"},
    "extra_info": {"index": 7},
}
PLAIN = {"prompt": "Capital of Peru?", "answer": "Lima", "bonus": 2}


def source(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    task = load_config("quickstart", ["task.kind=jsonl", f"task.path={path}", "task.shuffle=false"]).task
    for key, value in settings.items():
        setattr(task, key, value)
    return JsonlSource(task, path)


@pytest.mark.parametrize(
    ("row", "question", "answer", "label", "own_reward"),
    [
        (GSM8K, "Tom has 3 bags of 4 apples.", "1012", GSM8K["answer"], "math"),
        (MATH, "Halve 3/2.", r"\frac{3}{4}", MATH["solution"], "math"),
        (MATH500, "Halve 3/2.", r"\frac{3}{4}", r"\frac{3}{4}", "math"),
        (DAPO, "Solve step by step: 40 + 2", "42", "42", "math"),
        (PLAIN, "Capital of Peru?", "Lima", "Lima", "exact"),
        ({"prompt": "2+2?", "answer": 4}, "2+2?", "4", "4", "exact"),
    ],
)
def test_shapes_of_lines(tmp_path, row, question, answer, label, own_reward):
    lines = source(tmp_path, row)
    item = lines.item(0)
    assert (item.text, item.answer, item.label_text, lines.own_reward) == (question, answer, label, own_reward)
    assert item.meta["line"] == 1


def test_the_rest_of_the_row_goes_to_reward_functions(tmp_path):
    assert source(tmp_path, PLAIN).item(0).meta == {"answer": "Lima", "bonus": 2, "line": 1}
    assert source(tmp_path, DAPO).item(0).meta["extra_info"] == {"index": 7}
    assert source(tmp_path, DAPO).item(0).question == DAPO["prompt"]


def test_dotted_and_named_fields(tmp_path):
    row = {"data": {"q": "Why?"}, "gold.text": "Because", "prompt": "not this"}
    item = source(tmp_path, row, prompt_field="data.q", answer_field="gold.text").item(0)
    assert (item.text, item.answer) == ("Why?", "Because")
    assert recognise({"question": "?", "solution": "1"}, "prompt", "answer").answer_field == "solution"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a \boxed{1} then \boxed{\frac{1}{\sqrt{2}}} end", r"\frac{1}{\sqrt{2}}"),
        (r"\fbox{ 7 }", "7"),
        (r"\boxed{unclosed", None),
        ("nothing", None),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


def test_final_answer_prefers_the_marker():
    assert final_answer(r"\boxed{1} #### 2,000") == "2000"
    assert final_answer("just text") == "just text"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PLAIN, '{"prompt": "x", "answer"'], r"rows.jsonl, line 2: not valid JSON"),
        ([PLAIN, "", "[1]"], r"line 3: expected a JSON object, got list"),
        ([PLAIN, {"answer": "x"}], r"line 2: no field 'prompt'; the line has 'answer'. Set task.prompt_field"),
        ([PLAIN, {"prompt": "x", "label": 1}], r"line 2: no field 'answer'; the line has 'prompt', 'label'"),
        ([{"prompt": "x", "answer": ["a"]}], r"line 1: field 'answer' is list; expected a text or a number"),
        ([{"prompt": " ", "answer": "a"}], r"line 1: the prompt is ' '; expected a text that is not empty"),
        ([{"prompt": [{"role": "user"}], "answer": "a"}], r"line 1: a chat message needs the texts 'role' and"),
        (["", " "], r"has no line; a task needs at least one prompt"),
    ],
)
def test_malformed_lines_are_named(tmp_path, rows, message):
    with pytest.raises(TaskError, match=message):
        source(tmp_path, *rows)


@pytest.mark.parametrize(
    ("name", "own_reward", "first_answer"),
    [
        ("plain", "exact", "plum"),
        ("gsm8k_style", "math", "34"),
        ("math_style", "math", r"\frac{3}{4}"),
        ("dapo_style", "math", "210"),
    ],
)
def test_the_shipped_samples_are_read(name, own_reward, first_answer):
    path = Path(__file__).parents[2] / "examples" / "data" / f"{name}.jsonl"
    task = load_config("quickstart", ["task.kind=jsonl", f"task.path={path}", "task.shuffle=false"]).task
    lines = JsonlSource(task, path)
    assert (len(lines), lines.own_reward, lines.item(0).answer) == (6, own_reward, first_answer)


def test_missing_file(tmp_path):
    task = load_config("quickstart", ["task.kind=jsonl", "task.path=x"]).task
    with pytest.raises(TaskError, match=r"nowhere.jsonl does not exist. Set task.path"):
        JsonlSource(task, tmp_path / "nowhere.jsonl")


def test_a_function_may_need_no_answer(tmp_path):
    assert source(tmp_path, {"prompt": "Write a poem."}, reward="pkg.mod:fn").item(0).answer is None


def test_shuffle_is_by_seed(tmp_path):
    rows = [{"prompt": f"q{n}", "answer": "a"} for n in range(30)]
    opened = [source(tmp_path, *rows, shuffle=True, seed=seed) for seed in (0, 0, 1)]
    orders = [[lines.item(position).text for position in range(len(lines))] for lines in opened]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert len(orders[0]) == 30


def test_held_out_file_keeps_its_prompts_out_of_training(jsonl, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"prompt": f"q {n}", "answer": "1"}) + "\n" for n in range(5)))
    rows = [{"prompt": f"q {n}", "answer": "1"} for n in range(3, 20)] + [{"prompt": "Q  4", "answer": "1"}]
    _, task = jsonl(rows, f"task.eval_path={held}")
    trained = {task.train_prompt(index).question for index in range(task.epoch_size)}
    assert trained == {f"q {n}" for n in range(5, 20)}
    assert {prompt.question for prompt in task.eval_prompts(100)} == {f"q {n}" for n in range(5)}


def test_held_out_share_of_one_file(jsonl):
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(400)] * 2
    _, task = jsonl(rows, "task.eval_fraction=0.2")
    trained = {task.train_prompt(index).question for index in range(task.epoch_size)}
    held_out = {prompt.question for prompt in task.eval_prompts(1000)}
    assert len(trained) == task.epoch_size
    assert trained.isdisjoint(held_out)
    assert len(trained | held_out) == 400
    assert 50 < len(held_out) < 110
