"""reasoning-gym tasks: options, scores that become rewards, junk, and answers that are code."""

import asyncio
import builtins
import re
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asympo_megatron.config import load_config
from asympo_megatron.errors import RewardError, TaskError, UnknownNameError
from asympo_megatron.tasks import build_scorer, methods
from asympo_megatron.tasks.methods import Gym, InlineGym, extract_answer, full_score
from asympo_megatron.tasks.reasoning_gym import ReasoningGymSource
from asympo_megatron.tasks.rewards import INLINE


def score_texts(scorer, prompt, texts):
    """Rewards of texts, and the counts, with the scorer closed afterwards."""

    async def run():
        try:
            return await scorer._method.score(prompt, texts)
        finally:
            await scorer.close()

    return asyncio.run(run()), scorer.metrics()


def test_spell_backward_on_hand_made_answers(spell_config, shared_spell_task):
    codec, prompt = shared_spell_task.codec, shared_spell_task.train_prompt(0)
    right = codec.encode_label(prompt.answer)
    scorer = build_scorer(spell_config, shared_spell_task)
    responses = {
        "with end token": (right, 1.0),
        "cut before the end token": (right[:-1], 1.0),
        "one letter missing": (right[1:], 0.0),
        "one letter too many": ([*right[:-1], right[0]], 0.0),
        "first two swapped": ([right[1], right[0], *right[2:]], 0.0),
        "not reversed": (right[:-1][::-1], 0.0),
        "only the end token": ([codec.eos_id], 0.0),
        "special tokens": ([2, 3, 4, 5], 0.0),
        "empty": ([], 0.0),
    }
    rewards = asyncio.run(scorer.score(prompt, [ids for ids, _ in responses.values()]))
    assert dict(zip(responses, rewards, strict=True)) == {name: value for name, (_, value) in responses.items()}
    assert scorer.metrics() == {f"reward/{name}": 0.0 for name in ("junk", "exhausted", "refused", "retries")}


def test_ids_outside_the_vocabulary_are_no_zero(spell_config, shared_spell_task):
    scorer = build_scorer(spell_config, shared_spell_task)
    with pytest.raises(RewardError, match=r"prompt 0: a response: token id 66 is outside the vocabulary"):
        asyncio.run(scorer.score(shared_spell_task.train_prompt(0), [[66]]))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("gcd", "{}0"), ("chain_sum", "{}1"), ("basic_arithmetic", "{} or not"), ("letter_counting", "1{}"), ("lcm", "")],
)
def test_only_a_full_score_is_a_reward(gym, name, wrong):
    config, task = gym(name)
    scorer = build_scorer(config, task)
    assert isinstance(scorer._method, InlineGym)
    for index in range(20):
        prompt = task.train_prompt(index)
        texts = [
            prompt.answer,
            f" {prompt.answer}\n",
            f"So <answer>{prompt.answer}</answer>.",
            wrong.format(prompt.answer),
        ]
        assert score_texts(scorer, prompt, texts)[0] == [1.0, 1.0, 1.0, 0.0]


def test_partial_scores_counted_as_reward_are_caught(gym):
    """Mutant: the raw score of the data set as reward."""
    config, task = gym("gcd")
    prompt = task.train_prompt(0)
    raw = build_scorer(config, task)._method._judge(methods.gym_job(prompt, prompt.answer + " or so"))
    assert 0 < raw < 1
    assert full_score(raw) == 0.0
    assert [full_score(score) for score in (1.0, 1, 0.9999, 0.0)] == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(RewardError, match="returned nan"):
        full_score(float("nan"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 42\n", "42"),
        ("<answer>1</answer> no, <answer> 2\n</answer>!", "2"),
        ("<answer>unclosed", "<answer>unclosed"),
        ("<answer>1</answer> closed twice </answer>", "1"),
        ("<answer>1 <answer>2</answer>", "1 <answer>2"),
        ("", ""),
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "<answer", "/answer>", "1", "\n"]), max_size=30).map("".join))
def test_extraction_finds_what_a_regular_expression_finds(text):
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert extract_answer(text) == (found[-1] if found else text).strip()


def test_a_response_that_repeats_a_tag_is_no_more_work_than_another():
    """A regular expression would take hours on it."""
    text = "<answer>" * 1_000_000
    assert extract_answer(text) == text
    assert extract_answer("</answer>" * 1_000_000) == "</answer>" * 1_000_000


def test_a_scorer_that_raises_over_junk_gives_zero_and_one_that_is_broken_an_error(gym):
    config, task = gym("gcd")
    scorer, prompt = build_scorer(config, task), task.train_prompt(0)
    dataset = task.source.dataset
    original = dataset.score_answer

    def picky(answer, entry):
        return original(str(int(answer)), entry)

    dataset.score_answer = picky
    rewards, counts = score_texts(scorer, prompt, ["junk", prompt.answer, ""])
    assert rewards == [0.0, 1.0, 0.0]
    assert counts["reward/junk"] == 2

    def broken(answer, entry):
        raise ValueError("no dictionary")

    dataset.score_answer = broken
    with pytest.raises(RewardError, match=r"raised ValueError\('no dictionary'\) and fails on the reference answer"):
        score_texts(scorer, prompt, ["junk"])


def test_an_item_that_differs_from_the_prompt_is_an_error(gym):
    config, task = gym("gcd")
    prompt = task.train_prompt(0)
    other = type(prompt)(0, prompt.ids, prompt.question + "!", prompt.answer, prompt.meta)
    with pytest.raises(RewardError, match=r"prompt 0: item .* is another question in this process"):
        score_texts(build_scorer(config, task), other, ["1"])


def test_answers_that_are_code_run_nothing(gym, tmp_path):
    """spiral_matrix evaluates an answer as Python: in a fenced worker, and without effect."""
    config, task = gym("spiral_matrix", "task.reward_timeout_s=20", "task.reward_workers=1")
    scorer, prompt = build_scorer(config, task), task.train_prompt(0)
    assert isinstance(scorer._method, Gym)
    touched = tmp_path / "touched"
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        texts = [
            prompt.answer,
            f"__import__('os').system('touch {touched}') or [1]",
            f"[__import__('subprocess').run(['touch', '{touched}'])]",
            f"[open('{touched}', 'w')]",
            f"[__import__('pathlib').Path('{touched}').touch()]",
            f"[__import__('socket').create_connection(('127.0.0.1', {listener.getsockname()[1]}))]",
            f"[__import__('os').kill({victim.pid}, 9)]",
            "[0] * 10**12",
            "junk(",
        ]
        rewards, counts = score_texts(scorer, prompt, texts)
        with pytest.raises(BlockingIOError):
            listener.accept()
    victim.communicate(b"\n", timeout=60)
    assert victim.returncode == 0
    assert rewards == [1.0] + [0.0] * 8
    assert not touched.exists()
    assert counts["reward/refused"] == 6
    assert counts["reward/exhausted"] == 0


def test_the_same_answer_does_harm_where_it_is_not_fenced(gym, tmp_path):
    """Mutant: a data set that evaluates answers put on the allow-list."""
    _, task = gym("spiral_matrix")
    touched = tmp_path / "touched"
    InlineGym(task.source)._score_one(task.train_prompt(0), f"[open('{touched}', 'w')]")
    assert touched.exists()


def test_no_data_set_that_evaluates_is_on_the_allow_list():
    evaluating = {
        "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
        "propositional_logic", "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
    }  # fmt: skip
    assert not evaluating & INLINE


def test_unknown_names_and_options_are_named():
    task = load_config("quickstart").task
    task.options = {"min_word_length": 5}
    with pytest.raises(UnknownNameError, match="'min_word_length': did you mean 'min_word_len'"):
        ReasoningGymSource(task)
    task.options = {"size": 5}
    with pytest.raises(TaskError, match=r"task.options.size: set task.size instead"):
        ReasoningGymSource(task)
    task.options = {"min_word_len": 9, "max_word_len": 3}
    with pytest.raises(TaskError, match=r"refuses task.options .*max_word_len must be >= min_word_len"):
        ReasoningGymSource(task)
    task.name, task.options = "spell_backwards", {}
    with pytest.raises(UnknownNameError, match="'spell_backwards': did you mean 'spell_backward'"):
        ReasoningGymSource(task)


def test_items_that_differ_between_processes_need_a_fixed_hash_seed(monkeypatch):
    task = load_config("quickstart").task
    task.name, task.options = "ransom_note", {}
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(TaskError, match="Set PYTHONHASHSEED=0 for all roles"):
        ReasoningGymSource(task)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert "ransom" in ReasoningGymSource(task).item(0).text.lower()


def test_an_item_that_cannot_be_made_is_named():
    task = load_config("quickstart", ["task.size=30000"]).task
    task.name, task.options = "spell_backward", {}
    source = ReasoningGymSource(task)
    source.dataset.words = []
    with pytest.raises(TaskError, match=r"item 3 of 30000 cannot be made \(IndexError"):
        source.item(3)


def test_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("reasoning_gym"):
            raise ImportError("No module named 'reasoning_gym'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TaskError, match=r"pip install 'asympo-megatron\[tasks\]'"):
        ReasoningGymSource(load_config("quickstart").task)


def test_unknown_reward_is_named(spell_config, shared_spell_task):
    spell_config.task.reward = "maths"
    with pytest.raises(UnknownNameError, match="'maths': did you mean 'math'"):
        build_scorer(spell_config, shared_spell_task)
