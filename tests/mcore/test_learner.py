"""The learner on one rank: invariances, refusals that keep the state, the learning rate."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_programs import HF, build, make_rows

from asympo_megatron.batch import ObjectiveOutput
from asympo_megatron.errors import BatchError, ConfigError, NonFiniteLossError
from asympo_megatron.mcore import Learner, Row
from asympo_megatron.objectives import build_objective

pytestmark = pytest.mark.usefixtures("one_rank")

Split = Callable[[list[Row]], list[list[Row]]]


def _trained(split: Split, steps: int = 2, **sections: Any) -> tuple[Learner, list[dict[str, float]]]:
    _, _, learner = build({"config": {"batch": {"max_tokens_per_microbatch": 2048}, **sections}})
    figures = []
    for step in range(steps):
        rows = make_rows(step)
        figures.append(learner.step(split(rows), len(rows)))
    return learner, figures


def test_micro_batch_partition_and_order_do_not_matter() -> None:
    _, whole = _trained(lambda rows: [rows])
    partitions: list[Split] = [
        lambda rows: [[row] for row in rows],
        lambda rows: [rows[::-1]],
        lambda rows: [[], rows[1::2], [], rows[::2], []],
    ]
    for split in partitions:
        _, parts = _trained(split)
        for a, b in zip(parts, whole, strict=True):
            for name in ("loss", "J", "grad_norm", "entropy", "nll_pos"):
                assert a[name] == pytest.approx(b[name], rel=2e-6, abs=1e-7), name


def test_untrained_responses_count_in_n() -> None:
    """N in the divisor: twice the responses, half of them masked, is half the gradient."""
    rows = [Row(row.prompt_ids, row.ids, [1] * len(row.ids), row.advantage) for row in make_rows(0)]
    masked = [Row(row.prompt_ids, row.ids, [0] * len(row.ids), 1.0) for row in rows]
    _, plain = _trained(lambda _: [rows], steps=1)
    _, _, learner = build({"config": {"batch": {"max_tokens_per_microbatch": 2048}}})
    doubled = learner.step([rows + masked], 2 * len(rows))
    assert doubled["grad_norm"] == pytest.approx(plain[0]["grad_norm"] / 2, rel=1e-6)
    assert doubled["input_tokens"] == plain[0]["input_tokens"]  # and they cost nothing


def test_gradient_is_that_of_the_written_out_loss() -> None:
    """One step against autograd through a plain transformers model that holds the same weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from asympo_megatron.conversion import export_hf

    _, _, learner = build({"objective": "reinforce", "config": {"batch": {"max_tokens_per_microbatch": 2048}}})
    model = Qwen3ForCausalLM(Qwen3Config(**HF))
    model.load_state_dict(dict(export_hf(learner)), strict=False)
    rows = make_rows(0)
    loss = torch.zeros(())
    for row in rows:
        if any(row.mask):
            ids = torch.tensor([[*row.prompt_ids, *row.ids]])
            logprobs = model(ids).logits[0].float().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            mask = torch.tensor(row.mask)
            loss = loss - row.advantage * (logprobs[len(row.prompt_ids) - 1 :] * mask).sum() / mask.sum() / len(rows)
    loss.backward()
    wanted = torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None]).norm()
    got = learner.step([rows], len(rows))
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert got["grad_norm"] == pytest.approx(wanted.item(), rel=1e-5)


@dataclass(frozen=True)
class _Poison:
    """An objective whose loss is not finite in the step that carries advantage 7."""

    value: float

    def __call__(self, token_nll_T: Any, batch: Any, groups: Any) -> ObjectiveOutput:
        out = build_objective("asympo")(token_nll_T, batch, groups=groups)
        bad = self.value if 7.0 in batch.advantage_R.tolist() else 1.0
        return ObjectiveOutput(out.loss_sum * bad, out.normalizer_count, out.metrics)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_step_is_refused_and_leaves_no_trace(value: float) -> None:
    def learner_after(steps: list[list[Row]]) -> tuple[str, list[torch.Tensor]]:
        config, layout, _ = build({"config": {"batch": {"max_tokens_per_microbatch": 2048}}})
        learner = Learner(config, HF, _Poison(value), layout)
        for rows in steps:
            if 7.0 in [row.advantage for row in rows]:
                before = learner.checksum(), _adam(learner), learner.step_count
                with pytest.raises(NonFiniteLossError, match=r"step 1: .*The step was refused and the weights kept"):
                    learner.step([rows], len(rows))
                assert before[0] == learner.checksum()
                assert all(map(torch.equal, before[1], _adam(learner)))
                assert before[2] == learner.step_count
            else:
                learner.step([rows], len(rows))
        return learner.checksum(), _adam(learner)

    good = [make_rows(0), make_rows(1)]
    poisoned = [Row([1, 2], [3, 4], [1, 1], 7.0)]
    checksum, adam = learner_after([good[0], poisoned, good[1]])
    wanted_checksum, wanted_adam = learner_after(good)
    assert checksum == wanted_checksum
    assert all(map(torch.equal, adam, wanted_adam))


def _adam(learner: Learner) -> list[torch.Tensor]:
    state = learner.optimizer.chained_optimizers[0].optimizer.state
    return [value.clone() for entry in state.values() for value in entry.values()]


def test_weights_that_nobody_loaded_do_not_train(tmp_path: Path) -> None:
    _, _, learner = build({"config": {"model": {"init": str(tmp_path)}}})
    with pytest.raises(NonFiniteLossError):
        learner.step([[Row([1], [6], [1], 1.0)]], 1)


def test_wrong_rows_are_refused_before_any_work() -> None:
    _, _, learner = build({})
    before = learner.checksum()
    with pytest.raises(BatchError, match="vocab_size is 67"):
        learner.step([[Row([1], [67], [1], 1.0)]], 1)
    with pytest.raises(BatchError, match="hold 1 responses, but num_responses=2"):
        learner.step([[Row([1], [6], [1], 1.0)]], 2)
    assert learner.checksum() == before
    assert learner.step_count == 0


@pytest.mark.parametrize(("logprobs", "got"), [(None, "no"), ([-0.5], "1")])
def test_missing_behavior_logprobs_are_refused_before_any_work(logprobs: list[float] | None, got: str) -> None:
    """Of the rows, not in the forward pass: there one rank would raise while the others wait for it."""
    _, _, learner = build({"objective": "grpo"})
    learner._forward_backward = None  # type: ignore[assignment, method-assign]
    complete, bad = Row([1], [6, 7], [1, 1], 1.0, [-0.5, -0.5]), Row([1], [6, 7], [0, 1], 1.0, logprobs)
    with pytest.raises(BatchError, match=rf"response 1 has {got} behavior_logprobs for 2 tokens.*needs one each"):
        learner.step([[complete, bad]], 2)


def test_behavior_logprobs_are_asked_for_only_where_they_matter() -> None:
    _, _, grpo = build({"objective": "grpo"})
    grpo.step([[Row([1], [6, 7], [1, 1], 1.0, [-0.5, -0.5]), Row([1], [6], [0], 1.0)]], 2)
    _, _, asympo = build({})
    asympo.step([[Row([1], [6], [1], 1.0)]], 1)


@pytest.mark.parametrize(
    ("schedule", "warmup", "wanted"),
    [
        ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
        ("constant", 2, [0.5, 1.0, 1.0, 1.0]),
        ("linear", 0, [0.8, 0.6, 0.4, 0.2]),
        ("cosine", 0, [0.9045, 0.6545, 0.3455, 0.0955]),
    ],
)
def test_every_step_of_the_schedule_moves_the_weights(schedule: str, warmup: int, wanted: list[float]) -> None:
    optimizer = {"schedule": schedule, "warmup_steps": warmup, "lr": 1e-3}
    _, figures = _trained(lambda rows: [rows], steps=4, optimizer=optimizer, run={"steps": 4})
    assert [round(step["lr"] / 1e-3, 4) for step in figures] == wanted


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"warmup_steps": 8}}, "warmup_steps=8 must end before run.steps=8"),
        ({"optimizer": {"min_lr": 1.0}}, "min_lr=1.0 is above"),
        ({"optimizer": {"megatron": {"adam_eps": 1.0}}}, "Remove it and set optimizer.eps"),
        ({"optimizer": {"megatron": {"sgd_momentun": 1.0}}}, "did you mean 'sgd_momentum'"),
        ({"ddp": {"megatron": {"average_in_collective": True}}}, "average_in_collective is decided by"),
        (
            {"ddp": {"megatron": {"overlap_grad_reduce": True, "overlap_param_gather": True}}},
            "ddp.megatron.overlap_param_gather=true needs optimizer.distributed=true",
        ),
        ({"parallel": {"tensor": 2}}, r"1 rank\(s\) cannot hold replicas of parallel.tensor=2"),
        ({"parallel": {"expert": 2}}, r"1 rank\(s\) cannot hold the experts of parallel.expert=2"),
    ],
)
def test_impossible_configurations(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"config": sections})


def test_bf16_trains_close_to_fp32() -> None:
    """An error budget, not equality: bf16 weights and activations, float32 masters, statistics and gradients."""
    _, single = _trained(lambda rows: [rows])
    learner, half = _trained(lambda rows: [rows], model={"dtype": "bf16"})
    assert half[0]["nll_pos"] == pytest.approx(single[0]["nll_pos"], rel=2e-2)
    assert half[0]["grad_norm"] == pytest.approx(single[0]["grad_norm"], rel=1e-1)  # 4 layers of 8-bit mantissas
    assert {param.dtype for chunk in learner.chunks for param in chunk.parameters()} == {torch.bfloat16}
