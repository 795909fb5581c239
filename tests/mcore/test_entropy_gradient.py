"""The logged entropy must not cost a backward pass of its own."""

from types import SimpleNamespace

import torch

from asympo_megatron.mcore.model import OutputLayer


def test_no_gradient_reaches_the_entropy(one_rank):
    nll_T, entropy_T = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    config = SimpleNamespace(sequence_parallel=False)
    weight = torch.nn.Parameter(torch.zeros(5, 4))
    projection = SimpleNamespace(weight=weight, tp_group=SimpleNamespace(size=lambda: 1))
    layer = OutputLayer(projection, config, lambda *_: (nll_T * 2, entropy_T * 2))
    output_2T, _ = layer(torch.zeros(3, 1, 4), None, torch.zeros(1, 3, dtype=torch.int64))
    output_2T.sum().backward()
    assert nll_T.grad.tolist() == [2.0] * 3
    assert entropy_T.grad is None
    assert output_2T[1].tolist() == [2.0] * 3
