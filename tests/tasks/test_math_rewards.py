"""Mathematical answers: equality, and answers that exhaust the worker."""

import asyncio

import pytest

from asympo_megatron.config.rollout_schema import TaskConfig
from asympo_megatron.errors import RewardError
from asympo_megatron.tasks import Prompt, build_scorer
from asympo_megatron.tasks.methods import Exact, Math
from asympo_megatron.tasks.workers import WorkerSpec

EQUAL = [
    (r"\frac{3}{4}", r"The total is \boxed{0.75}"),
    (r"\frac{3}{4}", "<answer>6/8</answer>"),
    ("1012", "so we get $1,012$"),
    ("42", "The final answer is 42."),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    ("x^2+2x+1", r"thus $(x+1)^2$"),
    (r"\{1, 2\}", r"\boxed{\{2,1\}}"),
    ("[0,1)", r"\boxed{[0, 1)}"),
    (r"\pi/2", r"first \boxed{7}, no: \boxed{\frac{\pi}{2}}"),
    ("-5", "<answer>1</answer> wait <answer>-5.0</answer>"),
    ("0.5", r"\boxed{50\%}"),
    ("Tuesday", r"\boxed{Tuesday}"),
]
UNEQUAL = [
    (r"\frac{3}{4}", r"\boxed{\frac{4}{3}}"),
    ("42", "the answer is 24"),
    ("42", ""),
    ("42", "no idea"),
    ("42", r"\boxed{}"),
    ("42", r"\boxed{4"),
    ("2", r"\boxed{2x}"),
    ("(1,2)", r"\boxed{[1,2]}"),
    (r"\sqrt{3}", "1.7"),
    ("Tuesday", r"\boxed{Monday}"),
    ("7", "<answer>8</answer> though \\boxed{7}"),
]


def settings(**changes):
    return TaskConfig(**{"reward": "math", "reward_workers": 1, "reward_timeout_s": 60.0, **changes})


def prompt_of(answer):
    return Prompt(index=5, ids=[1], question="?", answer=answer)


def run(method, cases):
    async def score():
        try:
            return [(await method.score(prompt_of(answer), [text]))[0] for answer, text in cases]
        finally:
            await method.close()

    return asyncio.run(score())


def test_equal_and_unequal_answers():
    method = Math(WorkerSpec("math"), settings())
    rewards = run(method, EQUAL + UNEQUAL)
    wrong = [case for case, reward in zip(EQUAL, rewards, strict=False) if reward != 1.0]
    wrong += [case for case, reward in zip(UNEQUAL, rewards[len(EQUAL) :], strict=True) if reward != 0.0]
    assert wrong == []
    assert sum(method.counts.values()) == 0


def test_comparing_texts_would_not_do():
    """Mutant: exact comparison in place of mathematics."""
    rewards = run(Exact(), EQUAL)
    assert sum(rewards) < len(EQUAL) / 2


def test_an_answer_that_exhausts_the_worker_is_zero_and_the_others_keep_their_rewards(caplog):
    method = Math(WorkerSpec("math"), settings(reward_timeout_s=2.0, reward_retries=1))
    hard = r"\boxed{9^{9^{9^{9}}}}"

    async def score():
        try:
            return await method.score(prompt_of("42"), [r"\boxed{42}", hard, "$42$", "41"])
        finally:
            await method.close()

    assert asyncio.run(score()) == [1.0, 0.0, 1.0, 0.0]
    assert (method.counts["exhausted"], method.counts["retries"], method.counts["junk"]) == (1, 1, 0)
    assert "prompt 5: reward 0 for" in caplog.text
    assert "exhausted: no reply within 2 s" in caplog.text


def test_a_reference_answer_without_mathematics_is_an_error():
    with pytest.raises(RewardError, match=r"prompt 5: .*finds no expression in the reference answer"):
        run(Math(WorkerSpec("math"), settings()), [("  ", r"\boxed{1}")])


def test_a_reference_answer_without_mathematics_costs_no_worker():
    method = Math(WorkerSpec("math"), settings(reward_workers=1))

    async def processes():
        try:
            assert await method.score(prompt_of("1"), [r"\boxed{1}"]) == [1.0]
            before = method.pool.process_ids
            with pytest.raises(RewardError, match="finds no expression in the reference answer"):
                await method.score(prompt_of("  "), [r"\boxed{1}", "2", "3"])
            assert await method.score(prompt_of("1"), [r"\boxed{1}"]) == [1.0]
            return before, method.pool.process_ids
        finally:
            await method.close()

    before, after = asyncio.run(processes())
    assert before == after
    assert len(after) == 1


def test_data_of_known_shape_is_scored_as_mathematics(jsonl):
    rows = [{"question": f"Half of {n}?", "answer": f"{n}/2 #### {n / 2}"} for n in range(1, 30)]
    config, task = jsonl(rows, "task.shuffle=false")
    scorer = build_scorer(config, task)
    assert isinstance(scorer._method, Math)
    prompt = task.train_prompt(0)
    assert prompt.answer == "0.5"
    assert run(scorer._method, [(prompt.answer, "1/2"), (prompt.answer, "1/3")]) == [1.0, 0.0]
    config.task.reward = "exact"
    exact = build_scorer(config, task)
    responses = [task.codec.encode_label(text) for text in ("0.5", " 0.5\n", "1/2")]
    assert asyncio.run(exact.score(prompt, responses)) == [1.0, 1.0, 0.0]
