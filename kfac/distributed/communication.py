"""Sums over the processes that train one model; knows no layers and no factors."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """The processes whose gradients are averaged.

    Attributes:
        group: Their process group, None for a single process.
        rank: Number of this process in it.
        size: How many there are.
    """

    group: Any = None
    rank: int = 0
    size: int = 1

    @staticmethod
    def of(model: nn.Module) -> "Ranks":
        """The processes over which a model averages its gradients.

        Only ``DistributedDataParallel`` does that, as the outermost module or below a compiled one.
        """
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                group = module.process_group
                return Ranks(group, dist.get_rank(group), dist.get_world_size(group))
        return Ranks()

    @staticmethod
    def of_call() -> "Ranks":
        """Those of the ``DistributedDataParallel`` whose forward pass is under way, if one is."""
        wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        return Ranks() if wrapper is None else Ranks.of(wrapper)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one message per dtype and device."""
        if self.size == 1:
            return
        batches: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            batches[tensor.dtype, tensor.device].append(tensor)
        for members in batches.values():
            packed = torch.cat([t.flatten() for t in members])
            dist.all_reduce(packed, group=self.group)
            parts = torch.split(packed, [t.numel() for t in members])
            for tensor, part in zip(members, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
