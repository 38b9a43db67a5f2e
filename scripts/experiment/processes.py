"""One process, or several under `torchrun`: who this is, where it computes, how sums are joined."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiment.errors import RunError


@dataclass(frozen=True)
class Processes:
    """This process among `count`; only the main one (rank 0) writes files and shows progress."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def replicate(self, model: nn.Module) -> nn.Module:
        if self.count == 1:
            return model
        return DistributedDataParallel(
            model, [self.device] if self.device.index is not None else None
        )

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.count == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def gather(self, value: object) -> list[object]:
        """The value of every process, by rank, on all of them."""
        if self.count == 1:
            return [value]
        values: list[object] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the main one's buffers, such as running statistics."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others, for instance to download data."""
        if self.count > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.count > 1 and self.is_main:
            dist.barrier()


@contextmanager
def join_processes(device_name: str) -> Iterator[Processes]:
    """Join the process group that `torchrun` announces in the environment, if it does."""
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if "WORLD_SIZE" not in os.environ:
        yield Processes(device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is the accelerator if there is one, else the CPU; `cuda` is this process's own GPU."""
    accelerator = None
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
    if name == "auto":
        name = accelerator.type if accelerator else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(
            f"device must be auto, cpu, cuda, cuda:1, mps, ..., but got {name!r}."
        ) from None
    if device.type == "cpu":
        return device
    if accelerator is None or accelerator.type != device.type:
        available = f"cpu and {accelerator.type}" if accelerator else "cpu only"
        raise RunError(f"device {name} is not available here ({available}); set device=auto.")
    if device.index is None and device.type != "mps":
        device = torch.device(device.type, local_rank)
        torch.accelerator.set_device_index(local_rank)
    return device
