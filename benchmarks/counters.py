# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Counts that are the same on every run: floating-point operations, and bytes of tensors that exist at once."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def count_operations(run: Callable[[], object]) -> int:
    """
    Floating-point operations of all matrix products, convolutions and attentions in a call, backward passes
    included; a multiply-add counts as two. Attention's backward pass computes its scores again, which counts, too.
    """
    # PyTorch has no formulas for in-place products and for the attention of CPUs.
    formulas = {
        torch.ops.aten.addmm_: _product,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


def _product(_: Any, left: Any, right: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


class AllocatedBytes(TorchDispatchMode):
    """
    Bytes of the tensors that operations make while this mode is on: those that exist now, and the most at any time.
    Buffers that a kernel frees before it returns are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._addresses: set[int] = set()

    def reset_peak(self) -> None:
        self.peak = self.current

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = operation(*args, **kwargs)
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(outputs):
            address, size = storage.data_ptr(), storage.nbytes()
            # Views and in-place results are no new memory.
            if size and address not in given and address not in self._addresses:
                self._addresses.add(address)
                self.current += size
                weakref.finalize(storage, self._freed, address, size).atexit = False
        self.peak = max(self.peak, self.current)
        return outputs

    def _freed(self, address: int, size: int) -> None:
        self._addresses.discard(address)
        self.current -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """
    The most bytes of tensors that exist at once because of a call, above what exists before it. On a CPU as
    [`AllocatedBytes`] counts them, which keeps compiled code from being used; elsewhere what the allocator says.
    """
    if torch.device(device).type == "cpu":
        with AllocatedBytes() as allocated:
            run()
        return allocated.peak
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before
