"""Megatron's gradient buffer of a parameter: adding to it directly, and telling Megatron so.

DistributedDataParallel gives every parameter ``main_grad``, a view into its communication buffers, and hangs a hook
behind the parameter's gradient accumulator. The hook adds ``param.grad`` to ``main_grad`` unless
``grad_added_to_main_grad`` says that this is done, drops ``param.grad``, and with ``overlap_grad_reduce`` (which
requires a ``param.grad``) counts the parameter as ready.
"""

import torch
from torch import Tensor


def buffer_of(weight: Tensor) -> Tensor | None:
    """The buffer to add the gradient to, or None where autograd should carry it."""
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    return main_grad


def gradient_was_added(weight: Tensor) -> None:
    """Say that ``main_grad`` holds the gradient; call it in a backward that returns None for ``weight``.

    Autograd runs the hook also for None. The hook finds a ``grad`` of the right shape that takes no memory: a real one
    would be another [V, H] tensor, which it throws away unread.

    A weight that is the input embedding of the same stage, too (``zero_out_wgrad``), is left as it is: the embedding's
    gradient arrives by autograd, after both uses, and the hook adds it to ``main_grad``.
    """
    if getattr(weight, "zero_out_wgrad", False) or not hasattr(weight, "grad_added_to_main_grad"):
        return
    weight.grad_added_to_main_grad = True
    if weight.grad is None:
        weight.grad = torch.zeros((), dtype=weight.dtype, device=weight.device).expand_as(weight)
