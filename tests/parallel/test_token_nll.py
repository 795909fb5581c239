"""token_nll against the dense softmax, its gradients by finite differences, shards, padding, error budgets, memory."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from asympo_megatron.errors import BatchError
from asympo_megatron.parallel import SINGLE, ParallelGroups, token_nll
from asympo_megatron.parallel.token_nll import CHUNK_BYTES
from asympo_megatron.testing.distributed import run_threads


def dense(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time."""
    nll, entropy = [], []
    for row, label in zip(hidden, target.tolist(), strict=True):
        logprob = torch.log_softmax(weight @ row / temperature, dim=0)
        nll.append(-logprob[label])
        entropy.append(-(logprob.exp() * logprob).sum())
    return torch.stack(nll), torch.stack(entropy)


def inputs(tokens=11, hidden=6, vocab=17, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = scale * torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)
    target_T = torch.randint(0, vocab, (tokens,), generator=generator)
    return hidden_TH.to(dtype), weight_VH.to(dtype), target_T


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def coefficients(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(77)
    pair = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    return pair[0], pair[1]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 11, 64, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_the_dense_ones(chunk_tokens, temperature):
    hidden, weight, target = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    a_T, b_T = coefficients(11)
    nll, entropy = token_nll(
        hidden, weight, target, temperature=temperature, with_entropy=True, chunk_tokens=chunk_tokens
    )
    want_nll, want_entropy = dense(hidden, weight, target, temperature)
    torch.testing.assert_close(nll, want_nll, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=1e-12)
    for use in ((1, 0), (0, 1), (1, 1)):
        got = gradients(use[0] * (a_T * nll).sum() + use[1] * (b_T * entropy).sum(), hidden, weight)
        nll, entropy = token_nll(
            hidden, weight, target, temperature=temperature, with_entropy=True, chunk_tokens=chunk_tokens
        )
        want = gradients(use[0] * (a_T * want_nll).sum() + use[1] * (b_T * want_entropy).sum(), hidden, weight)
        want_nll, want_entropy = dense(hidden, weight, target, temperature)
        for left, right in zip(got, want, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    hidden, weight, target = inputs(tokens=4, hidden=3, vocab=5)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: token_nll(h, w, target, temperature=0.8, with_entropy=True, chunk_tokens=3), (hidden, weight)
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
    (got,) = gradients(token_nll(hidden, weight, target, chunk_tokens=4).sum(), learned)
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
        (16, {"temperature": 0.6, "chunk_tokens": 4}),
        (16, {"vocab_size": 13}),  # padding inside the last shard
        (16, {"vocab_size": 7, "chunk_tokens": 5}),  # whole shards of padding
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
        options = {"groups": ParallelGroups(tensor=group), "with_entropy": with_entropy, "chunk_tokens": 2}
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


# ---- precision and memory ------------------------------------------------------------------------------------------


def test_float32_error_budget():
    hidden, weight, target = inputs(tokens=64, hidden=32, vocab=1000)
    want_nll, want_entropy = dense(hidden, weight, target)
    nll, entropy = token_nll(hidden.float(), weight.float(), target, with_entropy=True)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), want_nll, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-5, atol=2e-5)


def test_bfloat16_inputs_float32_softmax():
    """Compared with float64 on the same rounded inputs: only the bfloat16 logits and gradients may differ."""
    hidden, weight, target = inputs(tokens=48, hidden=32, vocab=200, dtype=torch.bfloat16, scale=0.5)
    hidden.requires_grad_()
    weight.requires_grad_()
    nll = token_nll(hidden, weight, target, chunk_tokens=5)
    assert nll.dtype == torch.float32
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    want = dense(*wide, target)[0]
    torch.testing.assert_close(nll.double(), want, rtol=0, atol=0.04)  # logits up to 10: half a bfloat16 step is 0.03
    grads = gradients(nll.sum(), hidden, weight)
    for got, ref in zip(grads, gradients(want.sum(), *wide), strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.double() - ref).norm() / ref.norm()) < 8e-3  # one bfloat16 step is 7.8e-3


def test_weight_gradient_accumulates_in_float32():
    """512 chunks that each add 2^-9 of the first: in bfloat16 every addition would be lost."""
    tokens = 513
    hidden = torch.full((tokens, 1), 2.0**-9, dtype=torch.bfloat16)
    hidden[0] = 1.0
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(tokens, dtype=torch.long)
    (grad,) = gradients(token_nll(hidden, weight, target, chunk_tokens=1).sum(), weight)
    assert grad[:, 0].tolist() == [-1.0, 1.0]  # -(1 + 512 / 512) / 2


def test_confident_tokens_keep_their_digits():
    """At NLL 2e-4 and logits of 40 the float32 result is within 1e-3 of the truth."""
    weight = torch.eye(4, dtype=torch.float64)
    hidden = torch.tensor([[48.5, 40.0, 1.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([0])
    want = float(dense(hidden, weight, target)[0])
    assert 1e-4 < want < 3e-4
    got = float(token_nll(hidden.float(), weight.float(), target))
    assert abs(got / want - 1) < 1e-3


def test_large_logits_do_not_overflow():
    weight = torch.tensor([[1.0], [-1.0]])
    nll, entropy = token_nll(torch.tensor([[1e30], [-1e30]]), weight, torch.tensor([0, 0]), with_entropy=True)
    assert nll.tolist() == [0.0, pytest.approx(2e30)]
    assert entropy.tolist() == [0.0, 0.0]


class LargestAllocation(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("with_entropy", [False, True])
def test_never_holds_tokens_times_vocabulary(with_entropy):
    hidden, weight, target = inputs(tokens=256, hidden=4, vocab=128, dtype=torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    with LargestAllocation() as seen:
        out = token_nll(hidden, weight, target, chunk_tokens=8, with_entropy=with_entropy)
        sum(value.sum() for value in (out if with_entropy else (out,))).backward()
    assert seen.elements == 8 * 128 == 256 * 4  # a chunk of logits, or the hidden states themselves
    with LargestAllocation() as seen:
        torch.log_softmax(hidden @ weight.t(), -1)
    assert seen.elements == 256 * 128


def test_default_chunk_fills_its_budget(monkeypatch):
    assert CHUNK_BYTES == 268_435_456
    monkeypatch.setattr(sys.modules[token_nll.__module__], "CHUNK_BYTES", 4 * 128 * 16)
    hidden, weight, target = inputs(tokens=64, hidden=4, vocab=128, dtype=torch.float32)
    with LargestAllocation() as seen:
        token_nll(hidden, weight, target)
    assert seen.elements == 16 * 128


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
        ({"chunk_tokens": 0}, r"chunk_tokens is 0; it must be at least 1"),
    ],
)
def test_refusals(change, message):
    good = {"hidden_TH": torch.zeros(2, 3), "weight_VH": torch.zeros(5, 3), "target_T": torch.zeros(2).long()}
    call = {**good, **change}
    with pytest.raises(BatchError, match=message):
        token_nll(call.pop("hidden_TH"), call.pop("weight_VH"), call.pop("target_T"), **call)


def test_single_groups_are_one_rank():
    assert (SINGLE.tensor_size, SINGLE.tensor_rank, SINGLE.context_size, SINGLE.context_rank) == (1, 0, 1, 0)
