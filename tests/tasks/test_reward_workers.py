"""User functions and the processes they run in: retry, time-out, crash, memory, inheritance, end with the parent."""

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import tenacity

from asympo_megatron.config import load_config
from asympo_megatron.config.rollout_schema import TaskConfig
from asympo_megatron.errors import ConfigError, RewardError, UnknownNameError
from asympo_megatron.tasks import Prompt, build_scorer
from asympo_megatron.tasks.functions import AsyncFunction, FunctionReward, SyncFunction
from asympo_megatron.tasks.rewards import checked
from asympo_megatron.tasks.workers import WorkerLostError, WorkerPool, WorkerSpec

PROMPT = Prompt(index=4, ids=[1], question="2 + 2?", answer="4", meta={"bonus": 1})
JOB = {"arguments": [["p"], ["r"], ["a"], [{}]]}


def settings(function, **changes):
    defaults = {"reward": f"reward_functions:{function}", "reward_workers": 1, "reward_timeout_s": 60.0}
    return TaskConfig(**{**defaults, "reward_retries": 0, **changes})


def run(method, prompt=PROMPT, texts=("4", "5")):
    method.function.wait = tenacity.wait_none()

    async def score():
        try:
            return checked(await method.score(prompt, list(texts)), len(texts), prompt)
        finally:
            await method.close()

    return asyncio.run(score())


def pooled(function, *, fenced=False, timeout_s=60.0, jobs=1):
    """Verdicts of jobs run by a pool of one worker, or the error of the first that failed."""

    async def call():
        pool = WorkerPool(WorkerSpec("function", {"target": f"reward_functions:{function}"}, fenced), 1, timeout_s)
        try:
            return [await pool.call(JOB) for _ in range(jobs)]
        finally:
            await pool.close()
            assert pool.process_ids == []

    return asyncio.run(call())


@pytest.mark.parametrize(("function", "kind"), [("equal", SyncFunction), ("equal_async", AsyncFunction)])
def test_functions_are_called_with_the_whole_group(function, kind):
    method = FunctionReward(settings(function))
    assert isinstance(method.function, kind)
    assert run(method) == [1.0, 0.0]


def test_functions_get_prompt_answer_and_row():
    assert run(FunctionReward(settings("lengths"))) == [4.0, 4.0]


def test_the_scorer_uses_the_function(shared_spell_task):
    config = load_config("quickstart", ["task.reward=reward_functions:equal_async"])
    scorer = build_scorer(config, shared_spell_task)
    prompt = shared_spell_task.train_prompt(0)
    responses = [shared_spell_task.codec.encode_label(text) for text in (prompt.answer, "other")]
    assert asyncio.run(scorer.score(prompt, responses)) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_few", r"rewards of prompt 4: expected a list of 2 numbers, one a response, got 1 values"),
        ("not_finite", r"rewards of prompt 4: response 0 got nan; a reward is a finite number"),
        ("not_numbers", r"response 0 got 'good'; a reward is a finite number"),
        ("raises", r"reward_functions:raises failed on prompt 4 in 1 tries .*KeyError: 'judge model is down'"),
        ("dies", r"failed on prompt 4 in 1 tries .*WorkerLostError: the worker died"),
    ],
)
def test_a_failed_reward_is_an_error_and_never_zero(function, message):
    with pytest.raises(RewardError, match=message):
        run(FunctionReward(settings(function)))


@pytest.mark.parametrize("function", ["hangs", "hangs_async"])
def test_time_out(function):
    method = FunctionReward(settings(function, reward_timeout_s=0.5, reward_retries=1))
    with pytest.raises(RewardError, match=rf"{function} failed on prompt 4 in 2 tries .*within .*0.5 s"):
        run(method)
    assert method.counts["retries"] == 1


def test_a_function_that_fails_twice_is_tried_again(tmp_path):
    prompt = Prompt(0, [1], "?", "4", {"file": str(tmp_path / "calls"), "failures": 2})
    method = FunctionReward(settings("flaky", reward_retries=2))
    assert run(method, prompt) == [1.0, 1.0]
    assert method.counts["retries"] == 2
    (tmp_path / "calls").unlink()
    with pytest.raises(RewardError, match="in 2 tries"):
        run(FunctionReward(settings("flaky", reward_retries=1)), prompt)


def test_results_of_the_wrong_kind_are_refused():
    for value in (None, 1.0, "11", {0: 1.0, 1: 0.0}):
        with pytest.raises(
            RewardError, match=f"expected a list of 2 numbers, one a response, got {type(value).__name__}"
        ):
            checked(value, 2, PROMPT)
    assert checked((1, 0.5), 2, PROMPT) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        ("no_such_module:fn", ConfigError, "module 'no_such_module' cannot be imported .*PYTHONPATH"),
        ("reward_functions:equals", UnknownNameError, "'equals': did you mean 'equal'"),
        ("reward_functions:NUMBER", ConfigError, "is int; expected a function"),
        (":fn", ConfigError, "module '' cannot be imported"),
    ],
)
def test_functions_that_cannot_be_found_are_named_at_the_start(reward, error, message):
    with pytest.raises(error, match=message):
        FunctionReward(TaskConfig(reward=reward))


def test_printing_does_not_disturb_the_protocol(capfd):
    assert pooled("prints", jobs=2)[1].value == [0.0]
    assert '"value": [1.0]' in capfd.readouterr().err


def test_a_forged_reply_ends_the_worker():
    with pytest.raises(WorkerLostError, match="a forged reply"):
        pooled("forges")


def test_memory_is_limited_in_fenced_workers():
    with pytest.raises(WorkerLostError, match="more than 1024 MiB of memory"):
        pooled("eats_memory", fenced=True)


def test_fenced_workers_open_no_socket_and_see_no_secret(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with pytest.raises(Exception, match=r"PermissionError: a scored answer tried socket.__new__"):
        pooled("opens_socket", fenced=True)
    assert pooled("environment", fenced=True)[0].value == [0.0]
    assert pooled("environment", fenced=False)[0].value == [1.0]


def test_workers_inherit_no_socket_and_import_nothing_heavy():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.set_inheritable(listener.fileno(), True)
        assert pooled("sockets")[0].value == [0.0]
    assert pooled("modules")[0].value == [0.0]


def test_a_lost_worker_is_replaced_and_a_good_one_kept():
    async def processes():
        pool = WorkerPool(WorkerSpec("function", {"target": "reward_functions:hangs"}, fenced=False), 1, 0.3)
        seen = []
        for _ in range(2):
            task = asyncio.ensure_future(pool.call(JOB))
            with pytest.raises(WorkerLostError, match=r"no reply within 0.3 s"):
                await task
            seen.append(pool.process_ids)
        await pool.close()
        good = WorkerPool(WorkerSpec("function", {"target": "reward_functions:equal"}, fenced=False), 2, 60.0)
        ids = []
        for _ in range(3):
            await good.call(JOB)
            ids.append(tuple(good.process_ids))
        await good.close()
        return seen, ids

    lost, kept = asyncio.run(processes())
    assert lost == [[], []]
    assert len(set(kept)) == 1
    assert len(kept[0]) == 1, "the second worker starts only when two jobs run at once"


def test_what_a_lost_worker_started_ends_with_it(tmp_path):
    """In a session of its own, as those who run code start it: the worker's process group does not hold it."""
    told = tmp_path / "pid"
    job = {"arguments": [["p"], [str(told)], ["a"], [{}]]}

    async def lose():
        pool = WorkerPool(WorkerSpec("function", {"target": "reward_functions:runs_code"}, fenced=False), 1, 60.0)
        task = asyncio.ensure_future(pool.call(job))
        while not told.exists():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(lose(), 60))
    try:
        started = psutil.Process(int(told.read_text()))
    except psutil.NoSuchProcess:
        return
    try:
        assert psutil.wait_procs([started], timeout=60)[1] == []
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            started.kill()


def test_a_cancelled_job_leaves_no_reply_for_the_next():
    async def cancel():
        pool = WorkerPool(WorkerSpec("function", {"target": "reward_functions:hangs"}, fenced=False), 1, 60.0)
        job = asyncio.ensure_future(pool.call(JOB))
        while not pool.process_ids:
            await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert pool.process_ids == []

    asyncio.run(asyncio.wait_for(cancel(), 60))


def test_a_worker_that_cannot_start_says_why():
    async def call():
        pool = WorkerPool(WorkerSpec("function", {"target": "reward_functions:missing"}, fenced=False), 1, 60.0)
        await pool.call(JOB)

    with pytest.raises(RewardError, match=r"a function reward worker did not start: AttributeError: .*'missing'"):
        asyncio.run(call())


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals and pidfd are Linux's")
def test_a_hung_worker_dies_with_its_parent():
    program = textwrap.dedent(
        f"""
        import asyncio, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from asympo_megatron.tasks.workers import WorkerPool, WorkerSpec

        async def main():
            pool = WorkerPool(WorkerSpec("function", {{"target": "reward_functions:equal"}}, fenced=False), 1, 600.0)
            await pool.call({JOB!r})
            print(pool.process_ids[0], flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    handle = os.pidfd_open(worker)
    try:
        os.kill(worker, signal.SIGSTOP)  # as deaf as a hung one: it will not notice the end of its input
        parent.kill()
        parent.wait(30)
        assert select.select([handle], [], [], 30)[0], "the worker outlived its parent"
    finally:
        if not select.select([handle], [], [], 0)[0]:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


def test_importing_tasks_stays_light():
    program = (
        "import sys, asympo_megatron.tasks; "
        "print([name for name in ('torch', 'transformers', 'reasoning_gym', 'sympy') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
