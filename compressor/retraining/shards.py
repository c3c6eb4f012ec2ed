"""Tensors of which FSDP2 gives a process its part: the local rows, the whole, and what goes with a part."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(values_OI: Tensor, parameter: Tensor, transposed: bool) -> Tensor:
    """This process's part of values [O, I] that go with a whole parameter, oriented [O, I]."""
    if not isinstance(parameter, DTensor):
        return values_OI
    stored = values_OI.t().contiguous() if transposed else values_OI
    part = distribute_tensor(stored.to(parameter.device), parameter.device_mesh, parameter.placements).to_local()
    return (part.t() if transposed else part).contiguous()


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether processes hold different parts of it."""
    return isinstance(parameter, DTensor)
