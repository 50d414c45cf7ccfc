"""A LoRA layer whose base product and adapter are one operation. Called by the loop; the student's parameters and files stay PEFT's.

PEFT's own forward makes the base's result, the adapter's, its scaled copy and their sum: four tensors of a layer's width where one is
enough. Here the adapter's product is added where the base's stands, and the gradient likewise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


def fuse(model: nn.Module) -> None:
    """Let every plain LoRA layer of a PEFT model work in this way. Others (dropout, DoRA, quantised, mixed precision) stay as they are."""
    for layer in model.modules():
        if type(layer) is Linear and _is_plain(layer):
            layer.__class__ = FusedLinear


class FusedLinear(Linear):
    """y = x W' + b + s (x A') B', equal to PEFT's to rounding."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged or not _is_plain(self):
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base = self.base_layer
        return _Adapted.apply(x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])


def _is_plain(layer: Linear) -> bool:
    """Whether one adapter is at work, without dropout, bias or variant, in the precision of frozen weights."""
    if len(layer.active_adapters) != 1 or layer.lora_variant:
        return False
    (name,) = layer.active_adapters
    weight, down, up = layer.base_layer.weight, layer.lora_A[name], layer.lora_B[name]
    return (
        type(layer.base_layer) is nn.Linear
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and up.bias is None
        and not weight.requires_grad
        and weight.dtype == down.weight.dtype == up.weight.dtype
    )


class _Adapted(torch.autograd.Function):
    """Letters: R rows, I inputs, O outputs, r rank. Weight (O, I), down (r, I), up (O, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (R, I)
        narrow = rows @ down.t()  # (R, r)
        ctx.save_for_backward(rows, narrow, weight, down, up)
        ctx.scale = scale
        return F.linear(rows, weight, bias).addmm_(narrow, up.t(), alpha=scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, narrow, weight, down, up = ctx.saved_tensors
        slope = gradient.reshape(-1, gradient.shape[-1])  # (R, O)
        through = slope @ up  # (R, r)
        back = (slope @ weight).addmm_(through, down, alpha=ctx.scale).view(*gradient.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return back, None, None, ctx.scale * (through.t() @ rows), ctx.scale * (slope.t() @ narrow), None
