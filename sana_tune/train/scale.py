"""The scaled loss of fp16: gradients below its range would be lost, so the loss is multiplied before the backward pass.

torch's GradScaler does the same (double after `GROWTH_STEPS` good steps, halve after a bad one), but reads the device a
second time; the step knows already whether its gradient is finite. The scale stands in the optimizer's first parameter
group, so that a checkpoint holds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000


class LossScale:
    """The scale of a run in fp16."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._group = optimizer.param_groups[0]
        self._group["loss_scale"] = [FIRST_SCALE, 0]

    @property
    def value(self) -> float:
        """What the loss is multiplied by."""
        return self._group["loss_scale"][0]

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss for the backward pass."""
        return loss * self.value

    def unscale(self, parameters: Sequence[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        torch._foreach_mul_([each.grad for each in parameters if each.grad is not None], 1.0 / self.value)

    def update(self, good: bool) -> None:
        """After a step whose gradient was finite (good) or not."""
        scale, steps = self._group["loss_scale"]
        if not good:
            self._group["loss_scale"] = [max(1.0, scale / 2), 0]
        elif steps + 1 >= GROWTH_STEPS:
            self._group["loss_scale"] = [scale * 2, 0]
        else:
            self._group["loss_scale"] = [scale, steps + 1]


class NoLossScale:
    """Stands where the loss is not scaled."""

    def scaled(self, loss: Tensor) -> Tensor:
        return loss

    def unscale(self, parameters: Sequence[nn.Parameter]) -> None:
        pass

    def update(self, good: bool) -> None:
        pass
