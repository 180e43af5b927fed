"""The processes that train together: one alone, or those that `torchrun` started.

All of them run the same program on their own rows. DDP keeps a copy of the model in each; FSDP2 shards weights,
gradients and optimiser state.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hymba.errors import UserError


class World:
    """This process among all that train: `rank` of `size`, computing on `device`."""

    def __init__(self, device: str, parallel: str):
        """Raises `UserError` for a device that is not there."""
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.sharded = self.size > 1 and parallel == "fsdp"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise UserError(f"run.device={device!r} cannot be used here: {first}") from None
        self._ddp: nn.Module | None = None
        self.background: dist.ProcessGroup | None = None  # for what other threads say to each other
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # who trains several models one after the other makes the group: torchrun's processes can meet only once
        self._made_group = self.size > 1 and not dist.is_initialized()
        if self._made_group:
            dist.init_process_group(backend(self.device))
        if self.size > 1:
            self.background = dist.new_group(backend="gloo")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def close(self) -> None:
        if self._made_group:
            dist.destroy_process_group()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def tell(self, value):
        """The first process's value, in every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def share(self, rows: int) -> range:
        """The rows of a step that this process takes."""
        if rows % self.size:
            raise UserError(
                f"a step of {rows} rows cannot be shared equally by {self.size} processes; change batch_tokens"
            )
        return range(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)

    def wrap(self, model: nn.Module) -> Callable[..., Tensor]:
        """Make the model one that all processes train together -> what is called in its place."""
        if self.size == 1:
            return model
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # it warns of views among what a block returns, for callers who change them in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            mesh = init_device_mesh(self.device.type, (self.size,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        from torch.nn.parallel import DistributedDataParallel

        devices = [self.device] if self.device.type == "cuda" else None
        self._ddp = DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
        return self._ddp

    @contextmanager
    def accumulate(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around a forward and backward pass: gradients are summed over processes in the last of a step only."""
        if self.sharded:
            model.set_requires_gradient_sync(last)
        elif self._ddp is not None:
            self._ddp.require_backward_grad_sync = last
        yield


def backend(device: torch.device) -> str:
    """How processes on such devices talk to each other."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this process may hold a shard, as a whole; all processes must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
