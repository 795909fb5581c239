"""token_nll: error budgets of narrow dtypes, and tensors that never exist."""

import pytest
import torch
from token_nll_reference import LargestAllocation, dense, gradients, inputs

from asympo_megatron.parallel import logit_tiles, token_nll


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
    nll = token_nll(hidden, weight, target, tile=(5, 4))
    assert nll.dtype == torch.float32
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    want = dense(*wide, target)[0]
    torch.testing.assert_close(nll.double(), want, rtol=0, atol=0.04)  # logits up to 10: half a bfloat16 step is 0.03
    grads = gradients(nll.sum(), hidden, weight)
    for got, ref in zip(grads, gradients(want.sum(), *wide), strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.double() - ref).norm() / ref.norm()) < 8e-3  # one bfloat16 step is 7.8e-3


def test_weight_gradient_accumulates_in_float32():
    """512 tiles that each add 2^-9 of the first: in bfloat16 every addition would be lost."""
    tokens = 513
    hidden = torch.full((tokens, 1), 2.0**-9, dtype=torch.bfloat16)
    hidden[0] = 1.0
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(tokens, dtype=torch.long)
    (grad,) = gradients(token_nll(hidden, weight, target, tile=(1, 2)).sum(), weight)
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


@pytest.mark.parametrize("with_entropy", [False, True])
def test_never_holds_tokens_times_vocabulary(with_entropy):
    hidden, weight, target = inputs(tokens=256, hidden=4, vocab=128, dtype=torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    with LargestAllocation() as seen:
        out = token_nll(hidden, weight, target, tile=(32, 32), with_entropy=with_entropy)
        sum(value.sum() for value in (out if with_entropy else (out,))).backward()
    assert seen.elements == 256 * 4  # the gradient of the hidden states; the tiles are smaller
    with LargestAllocation() as seen:
        torch.log_softmax(hidden @ weight.t(), -1)
    assert seen.elements == 256 * 128


@pytest.mark.parametrize(
    ("tokens", "vocab", "shape"), [(64, 512, (32, 32)), (64, 16, (64, 16)), (4, 512, (4, 256)), (0, 512, (1, 512))]
)
def test_default_tile_is_square_within_its_budget(monkeypatch, tokens, vocab, shape):
    assert logit_tiles.default_tile_bytes(torch.device("cpu")) == 4 * 2048**2
    assert logit_tiles.default_tile_bytes(torch.device("cuda")) == 4 * 4096**2
    monkeypatch.setattr(logit_tiles, "CPU_TILE_BYTES", 4 * 1024)
    assert logit_tiles.LogitTiles(None, 0, vocab, 1.0, 4 * 1024).shape(tokens) == shape
    hidden, weight, target = inputs(tokens=tokens, hidden=2, vocab=vocab, dtype=torch.float32)
    with LargestAllocation() as seen:
        token_nll(hidden, weight, target)
    assert seen.elements <= 1024
