"""The processes that train together, as torchrun starts them, and what they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_PATIENCE = timedelta(hours=6)
"""The others wait while the first samples from the teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    mesh: DeviceMesh | None = None
    """None: there is one process."""

    @property
    def n_ranks(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else self.mesh.size()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Yield this process's place among those that torchrun started, each with a GPU of its own on "cuda"."""
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    if device == "cuda":
        torch.accelerator.set_device_index(dist.get_node_local_rank())
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank=dist.get_rank(), mesh=init_device_mesh(device, (dist.get_world_size(),)))
    finally:
        dist.destroy_process_group()


def shard(ranks: Ranks, modules: Iterable[nn.Module]) -> None:
    """Give each process a part of the modules' weights, gathered as they are called; inner modules first.

    Gradients become means over the processes. Source: FSDP2, torch.distributed.fsdp.fully_shard.
    """
    if ranks.mesh is None:
        return
    for module in modules:
        fully_shard(module, mesh=ranks.mesh)


def wait_for_all(ranks: Ranks) -> None:
    """Return when every process has called this."""
    if ranks.mesh is not None:
        dist.barrier()


def mean_over_ranks(ranks: Ranks, values: Tensor) -> Tensor:
    """Return the mean of every process's values."""
    if ranks.mesh is not None:
        dist.all_reduce(values)
        values /= ranks.n_ranks
    return values


def whole(tensor: Tensor) -> Tensor:
    """Return all of a weight or of what goes with it, on the host; every process must ask."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Overwrite a weight, of which a process may hold a part, with values that all processes have."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(values)
