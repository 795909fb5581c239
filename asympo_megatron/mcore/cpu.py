"""Megatron-Core on CPU and gloo: everything that a machine without CUDA needs, in one file.

Megatron-Core names CUDA in three ways: functions of ``torch.cuda``, literal devices (``device="cuda"``, ``.cuda()``)
and type strings (``"torch.cuda.FloatTensor"``). The first are given a CPU meaning, the other two are translated by one
``TorchFunctionMode``. Nothing here is active where CUDA is available.
"""

import contextlib
import importlib.util
import logging
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_CPU = torch.device("cpu")


def import_megatron() -> None:
    """First import of megatron.core, without CUDA: with ``torch.compile`` as identity while it lasts.

    jit.py decorates every fused kernel with ``torch.compile``. On CPU that would compile C++ at the first call, and
    loading the compiler takes more than half of the import time of every process.
    """
    if torch.cuda.is_available() or "megatron.core" in sys.modules:
        return
    compiler = torch.compile

    def identity(function: Any = None, **_: Any) -> Any:
        return function if function is not None else lambda decorated: decorated

    if importlib.util.find_spec("triton") is None:
        # transformer/moe/paged_stash.py of 0.19 imports this file, and the file imports triton, unconditionally
        sys.modules["megatron.core.transformer.moe.ops.paged_stash"] = _Absent("paged_stash kernels (triton)")
    torch.compile = identity  # type: ignore[assignment]
    try:
        import megatron.core.models.gpt
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel  # noqa: F401
    finally:
        torch.compile = compiler


class _Absent(types.ModuleType):
    """A module whose names can be imported and not be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"{self.__name__} are not available without a GPU.")

        return absent


def install() -> None:
    """Give Megatron-Core's CUDA calls a CPU meaning. Idempotent; does nothing where CUDA is available.

    The translation of literal devices belongs to the calling thread (torch keeps function modes per thread); forked
    children inherit it, spawned ones call ``install`` themselves.
    """
    if torch.cuda.is_available():
        return
    if not isinstance(torch.cuda.Stream, type) or not issubclass(torch.cuda.Stream, _NullStream):
        _patch_torch_cuda()
        _patch_megatron()
        _patch_gloo()
    if not any(isinstance(mode, CudaLiteralsToCpu) for mode in _get_current_function_mode_stack()):
        CudaLiteralsToCpu().__enter__()


def leave() -> None:
    """Stop translating literal devices in this thread; the CPU meaning of ``torch.cuda`` stays."""
    stack = _get_current_function_mode_stack()
    if stack and isinstance(stack[-1], CudaLiteralsToCpu):
        stack[-1].__exit__(None, None, None)


class CudaLiteralsToCpu(TorchFunctionMode):
    """Translate literal CUDA devices and type strings to their CPU counterparts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            # schedules.forward_backward_no_pipelining: torch.zeros([], dtype=torch.int, device="cuda")
            if _names_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            # rope_utils.get_pos_emb_on_this_cp_rank: torch.tensor(..., pin_memory=True)
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:  # language_module.setup_embeddings_and_output_layer: weight.data.cuda()
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # distrib_optimizer._build_model_and_main_param_groups compares with "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


class _NullStream:
    """A stream on a device that has only one: work is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> "_NullEvent":
        return _NullEvent()


class _NullEvent:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _patch_torch_cuda() -> None:
    # A function of its own for every name: torch._dynamo refuses to be imported when two share one.
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU  # tensor_parallel/layers.py: device=torch.cuda.current_device()
    cuda.synchronize = lambda *_: None  # p2p_communication.P2PCommunicator._communicate with batch_p2p_sync
    cuda.empty_cache = lambda: None  # distributed_data_parallel.offload_grad_buffers
    cuda.set_device = lambda _: None  # called by programs that pick LOCAL_RANK's device
    cuda.Stream, cuda.Event = _NullStream, _NullEvent  # distributed_data_parallel: overlap of gradient reduction
    cuda.current_stream = lambda *_: _NullStream()  # combined_1f1b.py
    cuda.default_stream = lambda *_: _NullStream()  # param_and_grad_buffer.start_grad_sync
    cuda.stream = lambda _=None: contextlib.nullcontext()  # param_and_grad_buffer.start_grad_sync
    # tensor_parallel/random.CudaRNGStatesTracker.add: the CUDA generator is the default CPU generator here
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.random.get_rng_state = lambda **_: torch.get_rng_state()


def _patch_megatron() -> None:
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils

    # tensor_parallel/random._set_cuda_rng_state indexes torch.cuda.default_generators
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    # CudaRNGStatesTracker.fork warns whenever the CPU state moved; here it always does
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    # moe_utils.RouterGatingLinearFunction reads te_general_gemm, which only a TE installation defines
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _patch_gloo() -> None:
    scatter, all_to_all, all_gather, reduce_scatter = (
        dist.scatter,
        dist.all_to_all_single,
        dist.all_gather,
        dist.reduce_scatter,
    )

    def contiguous_scatter(tensor: Any, scatter_list: Any = None, *args: Any, **kwargs: Any) -> Any:
        # distrib_optimizer.load_parameter_state_from_dp_zero passes views; gloo scatters the wrong bytes of those
        parts = [part.contiguous() for part in scatter_list] if scatter_list else scatter_list
        return scatter(tensor, parts, *args, **kwargs)

    def list_all_to_all(output: Any, input: Any, out_sizes: Any = None, in_sizes: Any = None, **kwargs: Any) -> Any:
        # tensor_parallel/mappings._AllToAll passes split sizes as tensors; the gloo binding wants integers
        out_sizes = kwargs.pop("output_split_sizes", out_sizes)
        in_sizes = kwargs.pop("input_split_sizes", in_sizes)
        return all_to_all(output, input, _as_list(out_sizes), _as_list(in_sizes), **kwargs)

    # tensor_parallel/mappings: ranks that share the matrices of an expert hold unlike numbers of its tokens, and gloo
    # wants one size. Tensors are filled up to the largest.
    def unequal_all_gather(outputs: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if len({output.shape for output in outputs}) == 1:
            return all_gather(outputs, tensor, *args, **kwargs)
        rows = max(len(output) for output in outputs)
        filled = [_filled(output, rows) for output in outputs]
        work = all_gather(filled, _filled(tensor, rows), *args, **kwargs)
        for output, whole in zip(outputs, filled, strict=True):
            output.copy_(whole[: len(output)])
        return work

    def unequal_reduce_scatter(output: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len({part.shape for part in inputs}) == 1:
            return reduce_scatter(output, inputs, *args, **kwargs)
        rows = max(len(part) for part in inputs)
        filled = _filled(output, rows)
        work = reduce_scatter(filled, [_filled(part, rows) for part in inputs], *args, **kwargs)
        output.copy_(filled[: len(output)])
        return work

    dist.scatter, dist.all_to_all_single = contiguous_scatter, list_all_to_all  # type: ignore[assignment]
    dist.all_gather, dist.reduce_scatter = unequal_all_gather, unequal_reduce_scatter  # type: ignore[assignment]


def _filled(tensor: Any, rows: int) -> Any:
    return torch.cat([tensor, tensor.new_zeros((rows - len(tensor), *tensor.shape[1:]))])


def _as_list(sizes: Any) -> Any:
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
