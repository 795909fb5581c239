"""token_nll against the dense softmax, its gradients by finite differences, shards, padding."""

import pytest
import torch
import torch.distributed as dist
from token_nll_reference import coefficients, dense, gradients, inputs

from asympo_megatron.errors import BatchError
from asympo_megatron.parallel import SINGLE, ParallelGroups, token_nll
from asympo_megatron.testing.distributed import run_threads


@pytest.mark.parametrize("tile", [(1, 17), (3, 5), (11, 1), (64, 64), None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_the_dense_ones(tile, temperature):
    hidden, weight, target = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    a_T, b_T = coefficients(11)
    nll, entropy = token_nll(hidden, weight, target, temperature=temperature, with_entropy=True, tile=tile)
    want_nll, want_entropy = dense(hidden, weight, target, temperature)
    torch.testing.assert_close(nll, want_nll, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=1e-12)
    for use in ((1, 0), (0, 1), (1, 1)):
        got = gradients(use[0] * (a_T * nll).sum() + use[1] * (b_T * entropy).sum(), hidden, weight)
        nll, entropy = token_nll(hidden, weight, target, temperature=temperature, with_entropy=True, tile=tile)
        want = gradients(use[0] * (a_T * want_nll).sum() + use[1] * (b_T * want_entropy).sum(), hidden, weight)
        want_nll, want_entropy = dense(hidden, weight, target, temperature)
        for left, right in zip(got, want, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    hidden, weight, target = inputs(tokens=4, hidden=3, vocab=5)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: token_nll(h, w, target, temperature=0.8, with_entropy=True, tile=(3, 4)), (hidden, weight)
    )


def test_each_output_alone_carries_its_gradient():
    hidden, weight, target = inputs()
    hidden.requires_grad_()
    a_T, _ = coefficients(11)
    want_nll, _ = dense(hidden, weight, target)
    alone = token_nll(hidden, weight, target)
    torch.testing.assert_close(
        gradients((a_T * alone).sum(), hidden), gradients((a_T * want_nll).sum(), hidden), rtol=1e-12, atol=1e-12
    )
    _, want_entropy = dense(hidden, weight, target)
    _, entropy = token_nll(hidden, weight, target, with_entropy=True)
    torch.testing.assert_close(
        gradients((a_T * entropy).sum(), hidden), gradients((a_T * want_entropy).sum(), hidden), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_gets_no_gradient(frozen):
    hidden, weight, target = inputs()
    learned = weight.requires_grad_() if frozen == "hidden" else hidden.requires_grad_()
    (got,) = gradients(token_nll(hidden, weight, target, tile=(4, 4)).sum(), learned)
    (want,) = gradients(dense(hidden, weight, target)[0].sum(), learned)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_no_token():
    hidden, weight, target = inputs(tokens=0)
    hidden.requires_grad_()
    weight.requires_grad_()
    nll, entropy = token_nll(hidden, weight, target, with_entropy=True)
    assert nll.shape == entropy.shape == (0,)
    grad_hidden, grad_weight = gradients(nll.sum() + entropy.sum(), hidden, weight)
    assert grad_hidden.shape == (0, 6)
    assert grad_weight.abs().sum() == 0


def test_target_outside_the_vocabulary_is_harmless_where_untrained():
    hidden, weight, target = inputs()
    hidden.requires_grad_()
    wild = target.clone()
    wild[3], wild[5] = -100, 10**9
    mask_T = torch.ones(11, dtype=torch.float64)
    mask_T[3] = mask_T[5] = 0
    got = token_nll(hidden, weight, wild)
    assert got.isfinite().all()
    (grad,) = gradients((mask_T * got).sum(), hidden)
    (want,) = gradients((mask_T * dense(hidden, weight, target)[0]).sum(), hidden)
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)


def test_padded_vocabulary_rows_have_probability_zero():
    hidden, weight, target = inputs(vocab=17)
    padded = torch.cat([weight, torch.full((15, 6), 1e6, dtype=torch.float64)]).requires_grad_()
    nll, entropy = token_nll(hidden, padded, target, vocab_size=17, with_entropy=True)
    want_nll, want_entropy = dense(hidden, weight, target)
    torch.testing.assert_close(nll, want_nll, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=1e-12)
    (grad,) = gradients(nll.sum(), padded)
    assert grad[17:].abs().sum() == 0
    assert grad[:17].abs().sum() > 1


# ---- tensor parallel -----------------------------------------------------------------------------------------------


def shard_rank(group, hidden, weight, target, options, sum_hidden_grad):
    groups = ParallelGroups(tensor=group)
    shard = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    hidden = hidden.clone().requires_grad_()
    nll, entropy = token_nll(
        hidden, shard, target, groups=groups, with_entropy=True, sum_hidden_grad=sum_hidden_grad, **options
    )
    a_T, b_T = coefficients(len(target))
    grad_hidden, grad_shard = gradients((a_T * nll).sum() + (b_T * entropy).sum(), hidden, shard)
    alone = token_nll(hidden, shard, target, groups=groups, **options)
    return nll.detach(), entropy.detach(), grad_hidden, grad_shard, alone.detach()


def check_shards(size, vocab_rows, options, rank_fn=shard_rank):
    hidden, weight, target = inputs(vocab=vocab_rows)
    vocab = options.get("vocab_size", vocab_rows)
    target = target % vocab
    hidden.requires_grad_()
    weight.requires_grad_()
    want_nll, want_entropy = dense(hidden, weight[:vocab], target, options.get("temperature", 1.0))
    a_T, b_T = coefficients(11)
    want_hidden, want_weight = gradients((a_T * want_nll).sum() + (b_T * want_entropy).sum(), hidden, weight)
    for summed in (False, True):
        ranks = run_threads(rank_fn, size, hidden.detach(), weight.detach(), target, options, summed)
        for nll, entropy, grad_hidden, _, alone in ranks:
            torch.testing.assert_close(nll, want_nll, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(alone, want_nll, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=1e-12)
            if summed:
                torch.testing.assert_close(grad_hidden, want_hidden, rtol=1e-11, atol=1e-12)
        if not summed:  # Megatron's input copy adds these up
            torch.testing.assert_close(sum(rank[2] for rank in ranks), want_hidden, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), want_weight, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (16, {}),
        (16, {"temperature": 0.6, "tile": (4, 3)}),
        (16, {"vocab_size": 13}),  # padding inside the last shard
        (16, {"vocab_size": 7, "tile": (5, 3)}),  # whole shards of padding
    ],
)
def test_vocabulary_shards_add_up_to_one_rank(size, rows, options):
    check_shards(size, rows, options)


def default_hidden_gradient(group, hidden, weight, target):
    shard = weight.chunk(group.size())[group.rank()]
    hidden = hidden.clone().requires_grad_()
    (grad,) = gradients(token_nll(hidden, shard, target, groups=ParallelGroups(tensor=group)).sum(), hidden)
    return grad


def test_hidden_gradient_is_partial_by_default():
    hidden, weight, target = inputs(vocab=16)
    hidden.requires_grad_()
    (want,) = gradients(dense(hidden, weight, target)[0].sum(), hidden)
    parts = run_threads(default_hidden_gradient, 2, hidden.detach(), weight, target)
    torch.testing.assert_close(parts[0] + parts[1], want, rtol=1e-11, atol=1e-12)
    assert (parts[0] - want).abs().max() > 0.1


@pytest.mark.parametrize("with_entropy", [False, True])
def test_two_collectives_whatever_the_number_of_chunks(monkeypatch, with_entropy):
    calls = []
    original = dist.all_reduce

    def counted(tensor, op=dist.ReduceOp.SUM, group=None):
        calls.append((op, tensor.numel()))
        return original(tensor, op=op, group=group)

    def rank_main(group):
        hidden, weight, target = inputs(vocab=16)
        options = {"groups": ParallelGroups(tensor=group), "with_entropy": with_entropy, "tile": (2, 3)}
        out = token_nll(hidden.requires_grad_(), weight.requires_grad_(), target, **options)
        sum(part.sum() for part in (out if with_entropy else (out,))).backward()

    monkeypatch.setattr(dist, "all_reduce", counted)
    run_threads(rank_main, 1)
    assert calls == [(dist.ReduceOp.MAX, 11), (dist.ReduceOp.SUM, 33 if with_entropy else 22)]


def no_tokens_rank(group):
    hidden, weight, target = inputs(tokens=0)
    return token_nll(hidden.requires_grad_(), weight, target, groups=ParallelGroups(tensor=group)).sum()


def test_no_token_on_shards():
    assert [float(value.detach()) for value in run_threads(no_tokens_rank, 2)] == [0, 0]


def local_ids_rank(group, hidden, weight, target, options, sum_hidden_grad):
    """Mutant: targets taken for ids of the shard."""
    local = target % (weight.shape[0] // group.size()) + group.rank() * (weight.shape[0] // group.size())
    return shard_rank(group, hidden, weight, local, options, sum_hidden_grad)


def unreduced_rank(group, hidden, weight, target, options, sum_hidden_grad):
    """Mutant: softmax over the shard only."""
    shard = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    return (*token_nll(hidden, shard, target % shard.shape[0], with_entropy=True), hidden, shard, target)


@pytest.mark.parametrize("mutant", [local_ids_rank, unreduced_rank])
def test_mutants_of_the_shards(mutant):
    with pytest.raises(AssertionError):
        check_shards(2, 16, {}, mutant)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_TH": torch.zeros(1, 2, 3)}, r"shapes .*expected \[T, H\], \[V, H\], \[T\]"),
        ({"hidden_TH": torch.zeros(4, 3)}, r"T and H must agree"),
        ({"weight_VH": torch.zeros(5, 7)}, r"T and H must agree"),
        ({"weight_VH": torch.zeros(5, 3).double()}, r"hidden is torch.float32 and weight torch.float64; cast"),
        ({"target_T": torch.zeros(2, dtype=torch.int32)}, r"target_T has dtype torch.int32.*\.long\(\)"),
        ({"temperature": 0.0}, r"temperature is 0.0; it must be greater than 0"),
        ({"tile": (4, 0)}, r"tile is .4, 0.; both numbers must be at least 1"),
    ],
)
def test_refusals(change, message):
    good = {"hidden_TH": torch.zeros(2, 3), "weight_VH": torch.zeros(5, 3), "target_T": torch.zeros(2).long()}
    call = {**good, **change}
    with pytest.raises(BatchError, match=message):
        token_nll(call.pop("hidden_TH"), call.pop("weight_VH"), call.pop("target_T"), **call)


def test_single_groups_are_one_rank():
    assert (SINGLE.tensor_size, SINGLE.tensor_rank, SINGLE.context_size, SINGLE.context_rank) == (1, 0, 1, 0)
