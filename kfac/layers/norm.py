"""Norm layers: behind the normalisation, every channel is a linear layer with one input."""

from abc import abstractmethod
from collections.abc import Mapping
from copy import copy
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from kfac.layers.base import Layer, append_one


class NormLayer(Layer):
    """Scale and shift of a normalised input: s = γ x̂ + β in every channel.

    A channel is a group with the inputs (x̂, 1) and one output, so A is ``[channels, 2, 2]`` and G
    ``[channels, 1, 1]``; an element of γ is a channel, whatever the shape of γ. x̂ is computed anew
    from the module's input, because the output does not tell it where γ is 0.

    Source:
        Osawa et al. 2020, "Scalable and Practical Natural Gradient for Large-Scale Deep Learning",
        has a 2×2 block for the γ and β of each channel too, the second moment of their gradients.
        Here it is A ⊗ G, as for every other layer.
    """

    @abstractmethod
    def normalized(self, x: Tensor) -> Tensor:
        """x̂ in the layout of the input ``x``, which is in the dtype of the factors."""

    def channels_last(self, tensor: Tensor) -> Tensor:
        """View an input or output ``[N, channels, *spatial]`` as ``[N, *spatial, channels]``."""
        return tensor.movedim(1, -1)

    def dimensions(self) -> tuple[int, int, int]:
        """One group per channel, with one input and one output."""
        return self.weight.size, 1, 1

    def leading_size(self, x: Tensor) -> int:
        """Size of the first axis; 1 for an input that has the axes of the channels only."""
        x = self.channels_last(x)
        return x.shape[0] if x.dim() > 1 else 1

    def row_count(self, x: Tensor) -> int:
        """Examples times positions: everything but the channels."""
        return x.numel() // self.shape.groups

    def input_rows(self, x: Tensor, examples: int) -> Tensor:
        """x̂, with the 1 for a bias; all axes between examples and channels are positions."""
        rows = self._rows(self.normalized(x.to(self.dtype)), examples).unsqueeze(-1)
        return append_one(rows) if self.has_bias else rows

    def gradient_rows(self, g: Tensor, examples: int) -> Tensor:
        """All axes between examples and channels are positions."""
        return self._rows(g.to(self.dtype), examples).unsqueeze(-1)

    def input_moment(self, x: Tensor) -> Tensor:
        """Σ x̂², Σ x̂ and the number of rows, per channel."""
        total, square = self._sums(x.to(self.dtype))
        entries = [square]
        if self.has_bias:
            count = torch.full_like(square, self.row_count(x))
            entries += [total, total, count] if self.shape.a_kind == "dense" else [count]
        return torch.stack(entries, dim=-1).view(self.shape.factor_shapes()["A"])

    def _sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Σ x̂ and Σ x̂² over all rows, per channel."""
        rows = self.normalized(x)
        return self._sum(rows), self._sum(rows.square())

    def gradient_moment(self, g: Tensor) -> Tensor:
        """Σ g² per channel."""
        return self._sum(g.to(self.dtype).square()).view(self.shape.factor_shapes()["G"])

    def input_mean(self, x: Tensor, examples: int) -> Tensor:
        """Mean of x̂ over all axes between examples and channels."""
        mean = self._rows(self.normalized(x.to(self.dtype)), examples).mean(1).unsqueeze(-1)
        return append_one(mean) if self.has_bias else mean

    def summed_gradient(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`Layer`; normalising has rounding errors of its own, where x̂ is small."""
        total, scale = super().summed_gradient(x, g)
        return total, scale + g.to(self.dtype).norm() * self.row_count(x) ** 0.5

    def _rows(self, tensor: Tensor, examples: int) -> Tensor:
        """``[examples, positions, channels]``."""
        return self.channels_last(tensor).reshape(examples, -1, self.shape.groups)

    def _sum(self, tensor: Tensor) -> Tensor:
        """Sum over all axes but the channels', without bringing the channels to the end."""
        tensor = self.channels_last(tensor).unsqueeze(0)
        return tensor.sum(tuple(range(tensor.dim() - 1)))


class LayerNormLayer(NormLayer):
    """``nn.LayerNorm`` and ``nn.RMSNorm``: γ has the shape of the trailing axes."""

    module_types = (nn.LayerNorm, nn.RMSNorm)
    module: nn.LayerNorm | nn.RMSNorm

    def leading_shape(self, x: Tensor) -> tuple[int, ...]:
        """All axes but those of the channels."""
        return tuple(x.shape[: -len(self.module.normalized_shape)])

    def observed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The only argument: ``input`` of the one, ``x`` of the other."""
        x: Tensor
        (x,) = [*args, *kwargs.values()]
        return x

    def channels_last(self, tensor: Tensor) -> Tensor:
        """View ``[*leading, *normalized_shape]`` as ``[*leading, channels]``."""
        return tensor.flatten(-len(self.module.normalized_shape))

    def normalized(self, x: Tensor) -> Tensor:
        """Normalise over the trailing axes."""
        module, shape = self.module, list(self.module.normalized_shape)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, shape, eps=module.eps)
        return F.layer_norm(x, shape, eps=module.eps)


class GroupNormLayer(NormLayer):
    """``nn.GroupNorm``; its groups only say what is normalised together."""

    module_types = (nn.GroupNorm,)
    module: nn.GroupNorm

    def normalized(self, x: Tensor) -> Tensor:
        """Normalise over each group of channels and all positions of an example."""
        return F.group_norm(x, self.module.num_groups, eps=self.module.eps)


class BatchNormLayer(NormLayer):
    """``nn.BatchNorm1d`` to ``3d``, by the statistics of the batch or by running ones.

    Which of the two is up to the module's mode when it is called, not when a gradient arrives.
    """

    module_types: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
    )
    module: _NormBase
    by_running_statistics = False
    _is_over_the_batch = True
    _whole_batch: Tensor | None = None  # what a part of a call's input is normalised with

    def as_called(self) -> Self:
        """Remember the statistics that this call normalises by."""
        call = copy(self)
        call.by_running_statistics = not self.module.training and self._has_running_statistics()
        return call

    def leading_part(self, x: Tensor, size: int) -> tuple[Layer, Tensor]:
        """The first examples, which the others have helped to normalise."""
        call = copy(self)
        call._whole_batch = x
        return call, x[:size]

    def normalized(self, x: Tensor) -> Tensor:
        """Normalise over examples and positions, or by the running statistics."""
        module = self.module
        if not self.by_running_statistics:
            return self._by_own_statistics(x)
        mean, variance = module.running_mean, module.running_var
        assert mean is not None
        assert variance is not None
        return F.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), eps=module.eps)

    def _sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What has been normalised by its own statistics has these sums by definition."""
        is_whole = self._whole_batch is None
        if self.by_running_statistics or not (self._is_over_the_batch and is_whole):
            return super()._sums(x)
        _, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        rows = x.numel() // x.shape[1]
        square = rows * variance / (variance + self.module.eps)
        return torch.zeros_like(square), square

    def _has_running_statistics(self) -> bool:
        return self.module.running_mean is not None

    def _by_own_statistics(self, x: Tensor) -> Tensor:
        if self._whole_batch is None:
            return F.batch_norm(x, None, None, training=True, eps=self.module.eps)
        whole = self._whole_batch.to(x.dtype)
        mean, variance = torch.batch_norm_update_stats(whole, None, None, 0.0)
        return F.batch_norm(x, mean, variance, eps=self.module.eps)


class InstanceNormLayer(BatchNormLayer):
    """``nn.InstanceNorm1d`` to ``3d``, by the statistics of each example or by running ones."""

    module_types = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    _is_over_the_batch = False

    def channels_last(self, tensor: Tensor) -> Tensor:
        """As for the others; an unbatched ``[channels, *spatial]`` is a batch of one."""
        return super().channels_last(self._batched(tensor))

    def normalized(self, x: Tensor) -> Tensor:
        """Normalise over the positions of an example, or by the running statistics."""
        return super().normalized(self._batched(x))

    def _has_running_statistics(self) -> bool:
        return self.module.track_running_stats

    def _by_own_statistics(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, eps=self.module.eps)

    def _batched(self, x: Tensor) -> Tensor:
        spatial = 1 + self.module_types.index(type(self.module))
        return x.unsqueeze(0) if x.dim() == spatial + 1 else x
