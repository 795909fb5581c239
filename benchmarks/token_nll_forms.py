"""The ways to a weighted sum of token NLLs that benchmarks/token_nll.py compares. Each is forward and backward.

A form takes (hidden [T, H], weight [V, H], target [T], coefficient [T]) and returns the gradients of
sum_t coefficient_t nll_t with respect to hidden and weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from asympo_megatron import ASymPO, ResponseBatch, fused_objective_loss, token_nll

Form = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def tiled(hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """Ours: no [T, V]; four products."""
    return _gradients(lambda h, w: token_nll(h, w, target), hidden, weight, coefficient)


def tiled_with_entropy(hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """Ours as the trainer calls it, the entropy being logged only."""
    return _gradients(lambda h, w: token_nll(h, w, target, with_entropy=True)[0], hidden, weight, coefficient)


def naive(hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, log-softmax, gather: three products and several [T, V]."""

    def nll(h: Tensor, w: Tensor) -> Tensor:
        return (
            -torch.log_softmax((h @ w.t()).float() if h.dtype == torch.bfloat16 else h @ w.t(), -1)
            .gather(1, target[:, None])
            .squeeze(1)
        )

    return _gradients(nll, hidden, weight, coefficient)


def four_products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing but the products of :func:`tiled`: what no form that makes the logits twice can beat."""
    logits = hidden @ weight.t()
    torch.mm(hidden, weight.t(), out=logits)
    return logits @ weight, logits.t() @ hidden


def single_pass(
    hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor, response: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Ours in one pass, the objective included; three products.

    Gradients of ASymPO's loss on responses of ``response`` tokens instead, whose advantages are ``coefficient`` at
    their first tokens.
    """
    ids = torch.arange(len(target), device=target.device) // response
    batch = ResponseBatch(ids, coefficient[::response], torch.bincount(ids))
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = fused_objective_loss(*leaves, target, batch, ASymPO(), chunk_tokens=chunk)
    grad_hidden, grad_weight = torch.autograd.grad(out.loss_sum, leaves)
    return grad_hidden, grad_weight


def inputs(
    tokens: int, vocab: int, hidden: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """hidden, weight, target, coefficient; logits with a standard deviation of about 2."""
    generator = torch.Generator(device).manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    scale = 2.0 / hidden**0.5
    target = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    return [normal(tokens, hidden).to(dtype), (scale * normal(vocab, hidden)).to(dtype), target, normal(tokens)]


def _gradients(
    nll: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, coefficient: Tensor
) -> tuple[Tensor, Tensor]:
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    grad_hidden, grad_weight = torch.autograd.grad((coefficient * nll(*leaves)).sum(), leaves)
    return grad_hidden, grad_weight
