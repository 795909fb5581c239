"""The scoring pass on one rank: what it returns, what it leaves alone, who asks for it."""

from typing import Any

import pytest
import torch
from rank_programs import HF, make_config, make_rows
from scoring_programs import KL_COEF, MUTANTS, build, objective_of, score_and_step, scored_rows

from asympo_megatron.errors import BatchError, ConfigError, UnknownNameError
from asympo_megatron.mcore import Learner, Row, initialize
from asympo_megatron.objectives import build_objective, penalize_kl

WIDE = {"config": {"batch": {"max_tokens_per_microbatch": 2048}}}

pytestmark = pytest.mark.usefixtures("one_rank")


def learner_of(name: str, case: dict[str, Any] = WIDE, **options: Any) -> Learner:
    return build(case, build_objective(name, **options))[2]


def plain_model(learner: Learner) -> Any:
    """A transformers model that holds the same weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from asympo_megatron.conversion import export_hf

    model = Qwen3ForCausalLM(Qwen3Config(**HF))
    model.load_state_dict(dict(export_hf(learner)), strict=False)
    return model


@torch.no_grad()
def logprobs_by_hand(model: Any, row: Row, temperature: float = 1.0) -> list[float]:
    ids = torch.tensor([[*row.prompt_ids, *row.ids]])
    logprobs = (model(ids).logits[0] / temperature).log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return logprobs[len(row.prompt_ids) - 1 :].tolist()


def test_scores_are_the_log_probs_of_the_tokens() -> None:
    learner = learner_of("asympo")
    rows = make_rows(0)
    (scored,) = learner.score([rows], "proximal")
    model = plain_model(learner)
    for row, found in zip(rows, scored, strict=True):
        used = max((size for size in range(len(row.mask) + 1) if size and row.mask[size - 1]), default=0)
        assert len(found.proximal_logprobs or ()) == len(row.ids)
        assert list(found.proximal_logprobs or ())[used:] == [0.0] * (len(row.ids) - used)
        wanted = logprobs_by_hand(model, row)[:used]
        assert list(found.proximal_logprobs or ())[:used] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert found.reference_logprobs is None


def test_partition_and_order_change_no_score() -> None:
    learner = learner_of("asympo")
    rows = make_rows(0)
    (whole,) = learner.score([rows], "old")
    wanted = {(*row.prompt_ids, *row.ids): row.proximal_logprobs for row in whole}
    for split in ([[row] for row in rows], [rows[::-1]], [[], rows[1::2], [], rows[::2]]):
        for batch in learner.score(split, "old"):
            for row in batch:
                assert row.proximal_logprobs == pytest.approx(wanted[(*row.prompt_ids, *row.ids)], rel=2e-6, abs=2e-6)


def test_the_temperature_is_that_of_sampling() -> None:
    cool = make_config().rollout.sampling
    cool.temperature = 0.5
    learner = learner_of("asympo", {"config": {**WIDE["config"], "rollout": {"sampling": cool}}})
    row = Row([1, 2], [3, 4, 5], [1, 1, 1], 1.0)
    ((scored,),) = learner.score([[row]], "old")
    wanted = logprobs_by_hand(plain_model(learner), row, temperature=0.5)
    assert scored.proximal_logprobs == pytest.approx(wanted, rel=1e-5)


def test_recomputed_old_log_probs_make_the_ratio_one() -> None:
    learner = learner_of("grpo", old_logprobs="recompute")
    assert learner.passes == ("proximal",)
    scored = scored_rows(learner, [make_rows(0)])
    figures = learner.step(scored, 16)
    assert figures["ratio"] == pytest.approx(1, abs=1e-6)
    assert figures["clip_fraction"] == 0
    again = learner.step(scored, 16)  # the same scores in a second step: now there is something to clip
    assert abs(again["ratio"] - 1) > 1e-4


def test_a_scoring_pass_leaves_no_trace() -> None:
    """Weights, gradients' step and optimizer are bit for bit those of a learner that never scored."""
    plain, scoring = [], []
    for log, passes in ((plain, ()), (scoring, ("old", "reference"))):
        learner = learner_of("asympo")
        for step in range(2):
            for which in passes:
                learner.score([make_rows(step)], which)
            log.append((learner.step([make_rows(step)], 16), learner.checksum()))
    assert plain == scoring


def test_reference_scores_are_those_of_the_weights_held() -> None:
    learner = learner_of("asympo")
    rows = make_rows(0)
    first = learner.score([rows], "reference")
    learner.step([rows], 16)
    assert learner.score([rows], "reference") == first  # the policy moved, the reference did not
    with pytest.raises(ConfigError, match="taken before the first step; this is step 1"):
        learner.hold_reference()


def test_without_loading_the_reference_is_the_initial_policy() -> None:
    config = make_config(batch={"max_tokens_per_microbatch": 2048})
    learner = Learner(config, HF, penalize_kl(build_objective("asympo"), KL_COEF), initialize(config))
    with pytest.raises(ConfigError, match=r"no reference policy is held.*hold_reference"):
        learner.score([make_rows(0)], "reference")
    learner.hold_reference()
    scored = scored_rows(learner, learner.score([make_rows(0)], "old"))
    assert [row.reference_logprobs for row in scored[0]] == [row.proximal_logprobs for row in scored[0]]
    assert learner.step(scored, 16)["reference_kl"] == pytest.approx(0, abs=1e-12)
    moved = learner.step(scored_rows(learner, [make_rows(0)]), 16)
    assert moved["reference_kl"] > 1e-5


def test_bf16_masters_survive_a_reference_pass() -> None:
    """The masters hold more digits than the parameters; a pass that copied parameters back into them would show."""
    weights = []
    for passes in ((), ("reference",)):
        learner = learner_of("asympo", {"config": {**WIDE["config"], "model": {"dtype": "bf16"}}})
        for step in range(3):
            for which in passes:
                learner.score([make_rows(step)], which)
            learner.step([make_rows(step)], 16)
        weights.append([group["params"][0].clone() for group in learner.optimizer.param_groups])
    assert all(map(torch.equal, *weights))
    assert weights[0][0].dtype == torch.float32


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each forward pass of the model: whether it was for training."""
    from asympo_megatron.mcore.model import PolicyModel

    seen: list[bool] = []
    forward = PolicyModel.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PolicyModel, "forward", counted)
    return seen


@pytest.mark.parametrize(
    ("objective", "extra"),
    [
        (build_objective("asympo"), 0),
        (build_objective("spo"), 0),
        (build_objective("reinforce"), 0),
        (build_objective("asymre"), 0),
        (build_objective("grpo"), 0),
        (build_objective("topr"), 0),
        (penalize_kl(build_objective("asympo"), 0.0), 0),
        (build_objective("grpo", old_logprobs="recompute"), 1),
        (build_objective("decoupled_ppo"), 1),
        (penalize_kl(build_objective("asympo"), KL_COEF), 1),
        (objective_of({}), 2),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_forwards_of_a_step(objective: Any, extra: int, forwards: list[bool]) -> None:
    """ASymPO, SPO and REINFORCE cost one forward pass a micro-batch; others pay for each policy that they compare."""
    _, _, learner = build(WIDE, objective)
    batches = [make_rows(0)[:8], make_rows(0)[8:]]
    learner.step(scored_rows(learner, batches), 16)
    assert forwards.count(True) == 2
    assert forwards.count(False) == 2 * extra


def test_mutant_reference_weights_left_in_the_model() -> None:
    whole = score_and_step("whole", WIDE)
    left = score_and_step("left", {**WIDE, "mutant": "weights left"})
    assert "weights left" in MUTANTS
    assert whole["checksums"][0] == whole["checksums"][1]
    assert left["checksums"][0] != left["checksums"][1]
    assert left["figures"][0]["grad_norm"] != pytest.approx(whole["figures"][0]["grad_norm"], rel=1e-2)


def test_refusals() -> None:
    learner = learner_of("decoupled_ppo")
    before = learner.checksum()
    with pytest.raises(UnknownNameError, match="did you mean 'reference'"):
        learner.score([make_rows(0)], "referenc")
    with pytest.raises(BatchError, match="vocab_size is 67"):
        learner.score([[Row([1], [67], [1], 1.0)]], "old")
    unscored = Row([1], [6], [1], 1.0, [-0.5])
    with pytest.raises(BatchError, match=r"response 0 has no proximal_logprobs for 1 tokens.*Call Learner.score\(\)"):
        learner.step([[unscored]], 1)
    assert learner.checksum() == before
