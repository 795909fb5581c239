"""token_nll adds the weight's gradient to Megatron's buffer: the same numbers, hooks that fire, no [V, H] tensor."""

import pytest
import torch
from token_nll_reference import dense, gradients, inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asympo_megatron.errors import BatchError
from asympo_megatron.parallel import main_grad, token_nll


class Parameter:
    """A weight with a buffer and the backward hook that Megatron's DistributedDataParallel gives it."""

    def __init__(self, weight: Tensor, overlap: bool = False, tied: bool = False, dtype: torch.dtype | None = None):
        self.weight = torch.nn.Parameter(weight.clone())
        self.weight.main_grad = torch.zeros_like(weight, dtype=dtype)
        self.weight.grad_added_to_main_grad = False
        if tied:
            self.weight.zero_out_wgrad = True
        self.ready = 0
        self._accumulator = self.weight.expand_as(self.weight).grad_fn.next_functions[0][0]
        self._accumulator.register_hook(lambda *_: self._hook(overlap))

    def _hook(self, overlap: bool) -> None:
        weight = self.weight
        assert not overlap or weight.grad is not None
        if weight.grad is not None and (not weight.grad_added_to_main_grad or hasattr(weight, "zero_out_wgrad")):
            weight.main_grad.add_(weight.grad)
        weight.grad = None
        self.ready += 1


def loss_of(weight: Tensor, hidden: Tensor, target: Tensor, tied: bool) -> Tensor:
    """Token NLLs, behind an embedding with the same weight if it is tied."""
    hidden = hidden + weight[target] if tied else hidden
    return (token_nll(hidden, weight, target, tile=(4, 5)) * torch.arange(1.0, 12.0, dtype=hidden.dtype)).sum()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_two_micro_batches_add_up_in_the_buffer(overlap, tied):
    _, weight, _ = inputs()
    parameter = Parameter(weight, overlap, tied)
    want = torch.zeros_like(weight)
    for seed in (1, 2):
        hidden, _, target = inputs(seed=seed)
        loss_of(parameter.weight, hidden, target, tied).backward()
        plain = weight.clone().requires_grad_()
        want += gradients(loss_of(plain, hidden, target, tied), plain)[0]
    torch.testing.assert_close(parameter.weight.main_grad, want, rtol=1e-12, atol=1e-12)
    assert parameter.ready == 2
    assert parameter.weight.grad is None


def test_the_hidden_gradient_is_the_same():
    hidden, weight, target = inputs()
    hidden.requires_grad_()
    loss_of(Parameter(weight).weight, hidden, target, tied=False).backward()
    plain = hidden.detach().clone().requires_grad_()
    want = dense(plain, weight, target)[0] * torch.arange(1.0, 12.0, dtype=torch.float64)
    torch.testing.assert_close(hidden.grad, gradients(want.sum(), plain)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_mutant_marks_nothing(monkeypatch, tied):
    """Without the mark the hook of an overlapped reduction finds no gradient; a tied weight needs no mark."""
    monkeypatch.setattr(main_grad, "gradient_was_added", lambda _: None)
    hidden, weight, target = inputs()
    loss = loss_of(Parameter(weight, overlap=True, tied=tied).weight, hidden, target, tied)
    if tied:
        loss.backward()
        return
    with pytest.raises(AssertionError):
        loss.backward()


def test_a_buffer_without_megatrons_hook_leaves_no_grad():
    hidden, weight, target = inputs()
    leaf = weight.clone().requires_grad_()
    leaf.main_grad = torch.ones_like(weight)
    token_nll(hidden, leaf, target).sum().backward()
    want = gradients(dense(hidden, plain := weight.clone().requires_grad_(), target)[0].sum(), plain)[0]
    torch.testing.assert_close(leaf.main_grad, 1 + want, rtol=1e-12, atol=1e-12)
    assert leaf.grad is None


def test_no_token_still_reports_ready():
    hidden, weight, target = inputs(tokens=0)
    parameter = Parameter(weight, overlap=True)
    token_nll(hidden, parameter.weight, target).sum().backward()
    assert parameter.ready == 1
    assert parameter.weight.main_grad.abs().sum() == 0


def test_bfloat16_weight_float32_buffer():
    hidden, weight, target = inputs(tokens=48, hidden=32, vocab=200, dtype=torch.bfloat16, scale=0.5)
    parameter = Parameter(weight, dtype=torch.float32)
    token_nll(hidden, parameter.weight, target, tile=(16, 64)).sum().backward()
    wide = weight.double().requires_grad_()
    want = gradients(dense(hidden.double(), wide, target)[0].sum(), wide)[0]
    assert float((parameter.weight.main_grad - want).norm() / want.norm()) < 8e-3


class Storages(TorchDispatchMode):
    """Number of operations that return memory of at least ``size`` bytes which is not in ``known``."""

    def __init__(self, size: int, known: tuple[Tensor, ...]):
        super().__init__()
        self.size, self.known, self.large = size, {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.large += storage.nbytes() >= self.size and storage.data_ptr() not in self.known
        return out


def large_tensors(parameter: Parameter, dtype: torch.dtype) -> int:
    hidden, weight, target = inputs(tokens=8, hidden=32, vocab=200, dtype=dtype)
    with Storages(weight.nbytes, (parameter.weight, parameter.weight.main_grad)) as seen:
        token_nll(hidden.requires_grad_(), parameter.weight, target, tile=(4, 20)).sum().backward()
    return seen.large


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_as_large_as_the_weight(monkeypatch, dtype):
    _, weight, _ = inputs(tokens=8, hidden=32, vocab=200, dtype=dtype)
    parameter = Parameter(weight, overlap=True, dtype=torch.float32)
    assert large_tensors(parameter, dtype) == 0
    monkeypatch.setattr(main_grad, "buffer_of", lambda _: None)
    assert large_tensors(parameter, dtype) > 0  # the gradient itself


def test_buffer_of_another_shape_is_refused():
    hidden, weight, target = inputs()
    weight.main_grad = torch.zeros(3)
    with pytest.raises(BatchError, match=r"main_grad has shape \(3,\); the weight's is \(17, 6\)"):
        token_nll(hidden, weight, target)


def test_placeholder_keeps_a_gradient_that_is_there():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    weight.grad_added_to_main_grad, weight.grad = False, torch.ones(2, 3)
    main_grad.gradient_was_added(weight)
    assert weight.grad_added_to_main_grad
    assert weight.grad.tolist() == [[1.0] * 3] * 2
