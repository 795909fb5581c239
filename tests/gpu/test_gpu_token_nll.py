"""token_nll on a GPU: error against float64, memory, and the gradient buffer. Never run yet: no GPU was at hand."""

import pytest
import torch

from asympo_megatron.parallel import token_nll

pytestmark = pytest.mark.gpu

TOKENS, VOCAB, HIDDEN = 2_048, 32_768, 256


def values(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) * 2 / HIDDEN**0.5
    target = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden.to("cuda", dtype).requires_grad_(), weight.to("cuda", dtype).requires_grad_(), target.cuda()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients_against_float64(dtype, bound):
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden, weight, target = values(dtype)
    nll_T, entropy_T = token_nll(hidden, weight, target, with_entropy=True)
    got = torch.autograd.grad(nll_T.sum(), (hidden, weight))
    wide = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    logprob = torch.log_softmax(wide[0] @ wide[1].t(), -1)
    exact = -logprob.gather(1, target[:, None]).squeeze(1)
    assert float((nll_T - exact).abs().max()) <= 10 * bound
    assert float((entropy_T + (logprob.exp() * logprob).sum(1)).abs().max()) <= 10 * bound
    for ours, theirs in zip(got, torch.autograd.grad(exact.sum(), wide), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) <= bound


def test_memory_stays_within_tiles():
    hidden, weight, target = values(torch.bfloat16)
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    token_nll(hidden, weight, target).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_nll(hidden, weight, target, tile=(512, 2_048)).sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 4 * TOKENS * VOCAB / 8
    assert weight.grad is None
    assert float(weight.main_grad.norm()) > 0
