"""The logged entropy must not cost a backward pass of its own."""

from types import SimpleNamespace

import torch

from asympo_megatron.mcore import model as module


def test_no_gradient_reaches_the_entropy(monkeypatch):
    nll_T, entropy_T = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    monkeypatch.setattr(module, "token_nll", lambda *_, **__: (nll_T * 2, entropy_T * 2))
    policy = SimpleNamespace(
        output_layer=SimpleNamespace(weight=torch.zeros(5, 4)), _temperature=1.0, _groups=None, _true_vocab_size=5
    )
    output_2T = module.PolicyModel.compute_language_model_loss(
        policy, torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3, 1, 4)
    )
    output_2T.sum().backward()
    assert nll_T.grad.tolist() == [2.0] * 3
    assert entropy_T.grad is None
    assert output_2T[1].tolist() == [2.0] * 3
