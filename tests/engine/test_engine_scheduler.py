"""The scheduler without HTTP or threads: an update that waits, and a pause that overtakes it."""

from pathlib import Path

import pytest
import torch

from asympo_megatron.engine.model import load_model, read_weights
from asympo_megatron.engine.options import EngineOptions
from asympo_megatron.engine.params import SamplingParams
from asympo_megatron.engine.scheduler import Scheduler, WeightUpdate
from asympo_megatron.engine.sequence import Sequence


def sequence(rid: str) -> Sequence:
    return Sequence(rid, [5, 6, 7], SamplingParams(temperature=0), frozenset(), 50, future=None)


@pytest.fixture
def scheduler(models: dict[str, Path]) -> Scheduler:
    return Scheduler(load_model(EngineOptions(str(models["qwen3"]))), str(models["qwen3"]), max_running=4, seed=0)


def new_weights(models: dict[str, Path], answers: list[str], flush_cache: bool) -> WeightUpdate:
    weights = read_weights(load_model(EngineOptions(str(models["qwen3"]))), models["qwen3_b"])
    return WeightUpdate(
        weights, str(models["qwen3_b"]), "b", flush_cache, done=lambda error: answers.append(str(error))
    )


@torch.inference_mode()
@pytest.mark.parametrize(
    ("flush_cache", "answer", "version"), [(False, "None", "b"), (True, "the cache was not flushed", "b")]
)
def test_a_pause_overtakes_a_waiting_update(
    scheduler: Scheduler, models: dict[str, Path], flush_cache: bool, answer: str, version: str
) -> None:
    running, answers = sequence("a"), []
    scheduler.add([running])
    scheduler.step()
    scheduler.update(new_weights(models, answers, flush_cache))
    late = sequence("late")
    scheduler.add([late])
    scheduler.step()
    assert (len(running.output_ids), late.output_ids, answers) == (3, [], [])  # drains; admits nobody
    scheduler.pause("in_place")
    scheduler.step()
    assert len(answers) == 1
    assert answer in answers[0]
    assert scheduler.weight_version == version
    assert len(running.output_ids) == 3  # the step that settled the update samples nothing
    assert not scheduler.has_work
    scheduler.resume()
    scheduler.step()
    assert (len(running.output_ids), len(late.output_ids)) == (4, 2)


@torch.inference_mode()
def test_a_second_update_is_refused_while_one_waits(scheduler: Scheduler, models: dict[str, Path]) -> None:
    answers: list[str] = []
    scheduler.add([sequence("a")])
    scheduler.step()
    scheduler.update(new_weights(models, answers, flush_cache=True))
    scheduler.update(new_weights(models, answers, flush_cache=True))
    assert answers == ["another weight update is under way."]
    while scheduler.has_work:
        scheduler.step()
    assert answers == ["another weight update is under way.", "None"]
    assert scheduler.weight_version == "b"
