"""RMSNorm's own backward against autograd through the formula."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from asympo_megatron.mcore.norm import RMSNorm


def _norm(dtype: torch.dtype = torch.float64) -> RMSNorm:
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=True), 6, eps=0.1)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 6))
    return norm


@pytest.mark.parametrize("shape", [(5, 6), (4, 1, 3, 6)])
def test_value_and_gradient(shape: tuple[int, ...]) -> None:
    norm = _norm()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), wanted, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda value, weight: norm_with(value, weight), (x, norm.weight))
    assert norm.weight.sequence_parallel


def norm_with(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    norm = _norm()
    return torch.func.functional_call(norm, {"weight": weight}, (value,))


def test_zero_rows_stay_finite() -> None:
    x = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    _norm()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_bf16_is_torchs_own() -> None:
    norm = _norm(torch.bfloat16)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert torch.equal(norm(x), F.rms_norm(x, (6,), norm.weight, 0.1))
