# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Memory for time: results that are cheap to compute are computed again in the backward pass instead of being kept."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def recomputed_in_backward(
    output: torch.Tensor, module: nn.Module, of: torch.Tensor, enabled: bool = True
) -> AbstractContextManager:
    """
    Context for the operations that take `output` = `module(of)`, maybe cast: what autograd would keep of `output` for
    their gradients is computed anew from `of`, bit for bit. It pays where `of` is kept in any case.

    Compilers make this choice themselves, so that a compiled or exported program is left alone.

    Args:
        output: What is not to be kept.
        module: Deterministic. Its hooks do not see the second computation.
        of: Its argument.
        enabled: Whether to do so. Not under gradient checkpointing, whose hooks these would replace.
    """
    if not enabled or torch.compiler.is_compiling() or not (torch.is_grad_enabled() and output.requires_grad):
        return nullcontext()
    try:
        place = (output.data_ptr(), output.numel())
    except RuntimeError:  # the transforms of torch.func wrap tensors, which then have no address
        return nullcontext()
    dtype = output.dtype  # autograd keeps both functions, and with them what they refer to: not the output itself

    def pack(tensor: torch.Tensor) -> Any:
        is_output = (tensor.data_ptr(), tensor.numel()) == place and tensor.is_contiguous()
        return tensor.shape if is_output else tensor

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        return module.forward(of).to(dtype).view(packed)  # with a graph where second derivatives are asked for

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
