"""The ways to a weighted sum of token NLLs that benchmarks/token_nll.py compares. Each is forward and backward.

A form takes (hidden [T, H], weight [V, H], target [T], coefficient [T]) and returns the gradients of
sum_t coefficient_t nll_t with respect to hidden and weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from asympo_megatron.parallel import token_nll

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


def single_pass(
    hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """What a single pass could reach at best: gradients made while the logits of a chunk exist; three products.

    It holds [chunk, V] logits, and a chunk must hold whole responses: the weight of a response is known only after
    its last token. Here the coefficients are simply given.
    """
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    buffer = hidden.new_empty(chunk, weight.shape[0])
    for start in range(0, len(hidden), chunk):
        part = slice(start, min(len(hidden), start + chunk))
        grad = _chunk_gradient(hidden[part], weight, target[part], coefficient[part], buffer)
        torch.mm(grad, weight, out=grad_hidden[part])
        grad_weight.addmm_(grad.t(), hidden[part])
    return grad_hidden, grad_weight


def single_pass_scratch(
    hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor, chunk: int, response: int
) -> tuple[Tensor, Tensor]:
    """The same for responses longer than a chunk: [V, H] scratch, added with the response's weight at its end."""
    grad_hidden, grad_weight, scratch = torch.empty_like(hidden), torch.zeros_like(weight), torch.empty_like(weight)
    buffer = hidden.new_empty(chunk, weight.shape[0])
    ones = torch.ones_like(coefficient)
    for first in range(0, len(hidden), response):
        scratch.zero_()
        for start in range(first, min(len(hidden), first + response), chunk):
            part = slice(start, min(len(hidden), first + response, start + chunk))
            grad = _chunk_gradient(hidden[part], weight, target[part], ones[part], buffer)
            torch.mm(grad, weight, out=grad_hidden[part])
            scratch.addmm_(grad.t(), hidden[part])
        of_response = coefficient[first]
        grad_hidden[first : first + response].mul_(of_response)
        grad_weight.add_(scratch.mul_(of_response))
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


def _chunk_gradient(hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor, buffer: Tensor) -> Tensor:
    logits = torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])
    exp = logits.sub_(logits.amax(1, keepdim=True)).exp_()
    grad = exp.mul_((coefficient / exp.sum(1))[:, None])
    return grad.scatter_add_(1, target[:, None], -coefficient[:, None])


def _gradients(
    nll: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, coefficient: Tensor
) -> tuple[Tensor, Tensor]:
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    grad_hidden, grad_weight = torch.autograd.grad((coefficient * nll(*leaves)).sum(), leaves)
    return grad_hidden, grad_weight
