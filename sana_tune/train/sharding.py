"""The trained model on several processes: whole on each (DDP), or every tensor split over all (FSDP2).

FSDP2 is torch's `fully_shard`; it works with gloo on a CPU too. What is split is a DTensor, and all that is done with
it here works for a plain tensor as well, so that nobody else asks which it is. What gathers is collective: all
processes call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from accelerate import Accelerator


def replicated(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model, kept equal on all processes by averaging gradients; itself where there is one process.

    As `accelerator.prepare_model` wraps it, but for its change of the model's `forward`, which would stay in the bare
    model and draw other pictures than one process does.
    """
    if accelerator.num_processes == 1 or is_sharded(model):
        return model
    devices = None if accelerator.device.type == "cpu" else [accelerator.device.index]
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def shard(model: Any, device: torch.device, ranks: int) -> None:
    """Split the model's tensors over all processes, block by block: a block is whole only while it computes.

    What stayed whole after a forward pass would not see that the average takes the weights' place.
    """
    mesh = init_device_mesh(device.type, (ranks,))
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_split(tensor: Tensor) -> bool:
    """Whether a part of it alone is here."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here: all of a plain one. Changing it in place changes the tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def whole_norm(norm: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The norm over all processes, from that of the local parts of `tensors`. Scalar, fp32. Collective when split."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return norm
    square = norm.square()
    torch.distributed.all_reduce(square)
    return square.sqrt()


@torch.no_grad()
def gathered(state: Any) -> Any:
    """Nested mappings and lists with every split tensor whole, in main memory. Collective when anything is split.

    The main process alone has their values: on a machine of eight GPUs each would else hold a whole checkpoint. The
    others get tensors of device meta.
    """
    if isinstance(state, DTensor):
        # an average in main memory is gathered by way of the device: its group may know no other
        placed: Any = state.to(state.device_mesh.device_type)
        whole = placed.full_tensor()
        return whole.cpu() if torch.distributed.get_rank() == 0 else torch.empty_like(whole, device="meta")
    if isinstance(state, Mapping):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gathered(value) for value in state)
    return state


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Fill a tensor, or the part of it that is here, from a whole one that every process has."""
    local(target).copy_(local(like(target, whole)))


def like(target: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor of the same shape, split as `target` is; itself where that is not split."""
    if not isinstance(target, DTensor) or whole.shape != target.shape:
        return whole
    whole = whole.to(target.device)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
