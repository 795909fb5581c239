"""What the lattice (tests/lattice) does not visit: four-way tensor parallelism, and why figures of ASymPO need J.

ASymPO's loss is the mean advantage whatever the weights are, so it says nothing about them: J, the NLLs and the
gradient norms of all steps are compared.
"""

from typing import Any

import pytest
from rank_programs import PROGRAM, make_rows, train

from asympo_megatron.testing.megatron import run_ranks

COMPARED = ("J", "nll_pos", "nll_neg", "entropy", "grad_norm")


def test_only_the_loss_of_reinforce_depends_on_the_weights(reference: dict[str, Any]) -> None:
    """Why the loss of ASymPO is not enough: it is the sum of the advantages over N, in any layout and any model."""
    reinforce = train("reference", {"objective": "reinforce"})
    for step, (asympo, naive) in enumerate(zip(reference["figures"], reinforce["figures"], strict=True)):
        rows = make_rows(step)
        mean = sum(row.advantage for row in rows if any(row.mask)) / len(rows)
        assert asympo["loss"] == pytest.approx(mean, abs=1e-6)
        assert abs(naive["loss"] - mean) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_four_way_tensor_parallelism(kv_heads: int) -> None:
    """With two key and value heads, two ranks share each."""
    heads = {"hf": {"num_key_value_heads": kv_heads}}
    case = {"config": {"parallel": {"tensor": 4, "sequence": kv_heads == 2}}, **heads}
    ranks = run_ranks(f"{PROGRAM}:train_cases", 4, {"cases": {"four": case}}, timeout_s=400)
    got, wanted = ranks[0]["four"], train("reference", heads)
    assert all(rank["four"] == got for rank in ranks), "ranks report different figures"
    assert got["checksums"][0] == wanted["checksums"][0], "initial weights depend on the layout"
    for a, b in zip(got["figures"], wanted["figures"], strict=True):
        for name in COMPARED:
            assert a[name] == pytest.approx(b[name], rel=2e-6), name
        for name in ("loss", "tokens", "input_tokens", "responses"):
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6), name
