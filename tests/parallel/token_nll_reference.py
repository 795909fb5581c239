"""What the token NLL tests compare with: the dense definition, inputs, and a spy on tensor sizes."""

import torch
from torch import Tensor


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
