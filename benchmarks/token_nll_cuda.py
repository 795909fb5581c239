"""Token NLL on a GPU, in bf16, against what others use. Called by benchmarks/token_nll.py --device cuda.

Time and peak memory of forward and backward at H 4,096, V 151,936, beside the time of the three matrix products alone
(`gemm_floor`; a form's fraction of it is floor / time). Megatron's cross entropies run with TP 1. **Never run yet: no
GPU was at hand when this was written.**
"""

import os
import statistics
import time
from collections.abc import Callable

import harness
import token_nll_forms as forms
import torch
import torch.distributed as dist
from torch import Tensor

VOCAB, HIDDEN = 151_936, 4_096
ROUNDS = 20


def run(quick: bool, save: bool) -> int:
    """Print the figures; without a CUDA device, fail and say so."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/token_nll.py --device cuda: no CUDA device is visible. Run it on a GPU machine.")
    report = harness.Report("token_nll_cuda", save=save)
    available = _forms()
    for tokens in (8_192,) if quick else (8_192, 16_384, 32_768, 65_536):
        values = forms.inputs(tokens, VOCAB, HIDDEN, torch.bfloat16, "cuda")
        floor = _measure(lambda values=values: _gemms(*values))[0]
        report.show("token_nll_cuda/gemm_floor", floor, "s", tokens=tokens)
        for name, form in available.items():
            _compare(report, name, lambda form=form, values=values: form(*values), floor, tokens)
    dist.destroy_process_group()
    return report.finish()


def _compare(report: harness.Report, name: str, call: Callable[[], object], floor: float, tokens: int) -> None:
    try:
        seconds, extra = _measure(call)
    except torch.cuda.OutOfMemoryError:
        report.show(f"token_nll_cuda/{name}_out_of_memory", 1, "run", tokens=tokens)
        return
    report.show(f"token_nll_cuda/{name}_time", seconds, "s", tokens=tokens)
    report.show(f"token_nll_cuda/{name}_floor_fraction", floor / seconds, "of the time", tokens=tokens)
    gradient_bytes = 2 * VOCAB * HIDDEN
    report.show(f"token_nll_cuda/{name}_extra", (extra - gradient_bytes) / 2**20, "MiB", tokens=tokens)
    if name == "tiled":
        report.at_least("token_nll_cuda/tiled_floor_fraction", floor / seconds, "of the time", 0.5, tokens=tokens)


def _measure(call: Callable[[], object]) -> tuple[float, int]:
    """Median seconds, and peak bytes beyond what was allocated before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, seconds = torch.cuda.memory_allocated(), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() - before


def _gemms(hidden: Tensor, weight: Tensor, *_: Tensor) -> None:
    """The three products every form needs, in pieces that fit into memory."""
    for part in hidden.split(8_192):
        logits = part @ weight.t()
        logits @ weight
        logits.t() @ part


def _forms() -> dict[str, forms.Form]:
    """All that is installed here."""
    found: dict[str, forms.Form] = {
        "tiled": forms.tiled,
        "tiled_with_entropy": forms.tiled_with_entropy,
        "compiled_cross_entropy": _of_logits(torch.compile(_cross_entropy)),
        **_megatron(),
    }
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return found

    def liger(hidden: Tensor, weight: Tensor, target: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        # reduction "none" has no per-token gradient in every release: the plain sum costs the same
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = liger_fused_linear_cross_entropy(*leaves, target, reduction="sum")
        grad_hidden, grad_weight = torch.autograd.grad(loss, leaves)
        return grad_hidden, grad_weight

    return {**found, "liger_sum": liger}


def _megatron() -> dict[str, forms.Form]:
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29511"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel()
    group = parallel_state.get_tensor_model_parallel_group()

    def plain(logits: Tensor, target: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits[:, None].float(), target[:, None])[:, 0]

    def fused(logits: Tensor, target: Tensor) -> Tensor:
        return fused_vocab_parallel_cross_entropy(logits[:, None], target[:, None], group)[:, 0]

    return {"megatron": _of_logits(plain), "megatron_fused": _of_logits(fused)}


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")


def _of_logits(nll: Callable[[Tensor, Tensor], Tensor]) -> forms.Form:
    def form(hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = (coefficient * nll(leaves[0] @ leaves[1].t(), target)).sum()
        grad_hidden, grad_weight = torch.autograd.grad(loss, leaves)
        return grad_hidden, grad_weight

    return form
