"""Convolutions of every geometry: linear layers whose positions are their output locations."""

from math import prod
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kfac.covariance import (
    PatchGeometry,
    channel_covariance,
    extract_patches,
    patch_count,
    patch_covariance,
    patch_mean,
    patch_second_moment_diagonal,
)
from kfac.layers.base import Layer, append_one


class ConvLayer(Layer):
    """A convolution: inputs are patches, one block of the curvature per group.

    Source:
        Grosse & Martens 2016, "A Kronecker-factored approximate Fisher matrix for convolution
        layers", section 3.
    """

    module_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    module: _ConvNd

    def dimensions(self) -> tuple[int, int, int]:
        """``groups``, ``in_channels/groups·|kernel|`` inputs, ``out_channels/groups`` outputs."""
        module = self.module
        inputs = module.in_channels // module.groups * prod(module.kernel_size)
        return module.groups, inputs, module.out_channels // module.groups

    @property
    def geometry(self) -> PatchGeometry:
        """Which patches of :meth:`patched` the module sees."""
        module = self.module
        return cast(
            PatchGeometry,
            {
                "stride": module.stride,
                "padding": module.padding,
                "dilation": module.dilation,
                "groups": module.groups,
                "padding_mode": module.padding_mode,
            },
        )

    def patched(self, x: Tensor) -> Tensor:
        """The maps that the patches are taken from, given a batched input."""
        return x

    def positions(self, spatial: tuple[int, ...]) -> int:
        """Number of output locations for an input of this size."""
        return patch_count(spatial, self.module.kernel_size, **self.geometry)

    def leading_size(self, x: Tensor) -> int:
        """Size of the first axis; 1 for an unbatched ``[C, *spatial]``."""
        return len(self._batched(x))

    def row_count(self, x: Tensor) -> int:
        """Examples times output locations."""
        x = self._batched(x)
        return len(x) * self.positions(tuple(x.shape[2:]))

    @property
    def inputs_together(self) -> int:
        """The inputs from one channel."""
        return prod(self.module.kernel_size)

    def input_moment(self, x: Tensor) -> Tensor:
        """Second moment of the patches of ``x [N, C, *spatial]``."""
        if self.shape.a_kind == "block-diagonal":
            has_channels = self.shape.a_block % self.inputs_together == 0
            return self._blockwise_moment(x) if has_channels else super().input_moment(x)
        x = self.patched(self._batched(x).to(self.dtype))
        second_moment = (
            patch_second_moment_diagonal if self.shape.a_kind == "diagonal" else patch_covariance
        )
        return second_moment(x, self.module.kernel_size, bias=self.has_bias, **self.geometry)

    def _blockwise_moment(self, x: Tensor) -> Tensor:
        """As :meth:`input_moment`: each block of A sees some of the channels, as a group would."""
        x = self.patched(self._batched(x).to(self.dtype))
        kernel, geometry = self.module.kernel_size, self.geometry
        groups, blocks, rows, _ = self.shape.factor_shapes()["A"]
        channels = torch.unflatten(x, 1, (groups, -1))
        missing = blocks * rows // self.inputs_together - channels.shape[2]
        channels = F.pad(channels, [0, 0] * len(kernel) + [0, missing]).flatten(1, 2)
        blockwise: PatchGeometry = {**geometry, "groups": groups * blocks}
        moment = patch_covariance(channels, kernel, **blockwise).view(groups, blocks, rows, rows)
        if self.has_bias:
            total = patch_mean(x, kernel, bias=True, **geometry).sum(0) * patch_count(
                x.shape[2:], kernel, **geometry
            )
            one = (self.shape.d_in - 1) % rows
            moment[:, -1, one, : one + 1] = moment[:, -1, : one + 1, one] = total[:, -one - 1 :]
        return moment

    def gradient_moment(self, g: Tensor) -> Tensor:
        """Second moment of the gradient's columns of ``g [N, C_out, *spatial]``, per group."""
        if self.shape.groups == 1 and self.shape.g_kind == "dense":
            return channel_covariance(self._batched(g).to(self.dtype)).unsqueeze(0)
        return super().gradient_moment(g)

    def input_rows(self, x: Tensor, examples: int) -> Tensor:
        """The patches; further leading axes count as positions."""
        x = self.patched(self._batched(x).to(self.dtype))
        columns = extract_patches(x, self.module.kernel_size, **self.geometry)
        rows = columns.permute(0, 3, 1, 2).reshape(examples, -1, *columns.shape[1:3])
        return append_one(rows) if self.has_bias else rows

    def gradient_rows(self, g: Tensor, examples: int) -> Tensor:
        """The gradient's columns, per group."""
        columns = self._batched(g).to(self.dtype).movedim(1, -1)
        return columns.reshape(examples, -1, self.shape.groups, self.shape.d_out)

    def summed_gradient(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Σ g aᵀ over all patches, one example after the other, so that few are there at a time."""
        total, scale = x.new_zeros(()), x.new_zeros(())
        for one_x, one_g in zip(self._batched(x), self._batched(g), strict=True):
            one_total, one_scale = super().summed_gradient(one_x, one_g)
            total, scale = total + one_total, scale + one_scale
        return total, scale

    def input_mean(self, x: Tensor, examples: int) -> Tensor:
        """Mean patch of each example; further leading axes count as positions."""
        x = self.patched(self._batched(x).to(self.dtype))
        mean = patch_mean(x, self.module.kernel_size, bias=self.has_bias, **self.geometry)
        return mean.reshape(examples, -1, *mean.shape[1:]).mean(1)

    def gradient_sum(self, g: Tensor, examples: int) -> Tensor:
        """Sum of the gradient over the output locations of each example."""
        total = self._batched(g).to(self.dtype).flatten(2).sum(2)
        return total.reshape(examples, -1, self.shape.groups, self.shape.d_out).sum(1)

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == len(self.module.kernel_size) + 2 else x.unsqueeze(0)


class ConvTransposeLayer(ConvLayer):
    """A transposed convolution: one of stride 1 over the stretched input, its kernel flipped.

    Stretching puts ``stride - 1`` zeros between neighbouring pixels and pads by
    ``dilation·(kernel - 1) - padding`` on both sides (crops where that is negative), and by
    ``output_padding`` at the end of each dimension. The gradient matrix holds the flipped kernels,
    so that it multiplies patches as that of a convolution does.

    Source:
        Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning", section 4.
    """

    module_types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    layout = "flipped"

    @property
    def geometry(self) -> PatchGeometry:
        """Which patches of :meth:`patched` the flipped kernel sees."""
        return {"dilation": self.module.dilation, "groups": self.module.groups}

    def patched(self, x: Tensor) -> Tensor:
        """Stretch the input."""
        stride = self.module.stride
        if any(step > 1 for step in stride):
            sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], stride, strict=True)]
            stuffed = x.new_zeros(*x.shape[:2], *sizes)
            stuffed[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = x
            x = stuffed
        return F.pad(x, [size for pair in reversed(self._margins()) for size in pair])

    def positions(self, spatial: tuple[int, ...]) -> int:
        """Number of output locations for an input of this size."""
        return prod(self._output_size(spatial))

    def problem_of_call(self, x: Tensor, output: Tensor) -> str | None:
        """An ``output_size`` may have overruled the module's own ``output_padding``."""
        expected = self._output_size(tuple(self._batched(x).shape[2:]))
        if tuple(self._batched(output).shape[2:]) == expected:
            return None
        return (
            f"{self.name!r} was called with an output_size that differs from what its "
            f"output_padding={self.module.output_padding} gives, so its patches are unknown. "
            "Set its output_padding to the difference, or pass its name in skip=."
        )

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The flipped kernels with the outputs first, ``[groups, d_out, d_in]``."""
        blocks = weight.reshape(self.shape.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return super().matrix(blocks.flip(self._kernel_dims), bias)

    def unmatrix(self, matrix: Tensor) -> list[Tensor]:
        """Undo :meth:`matrix`."""
        groups, (channels_in, channels_out, *kernel) = self.shape.groups, self.weight.shape
        weight, *bias = super().unmatrix(matrix)
        blocks = weight.reshape(groups, channels_out, channels_in // groups, *kernel)
        return [blocks.flip(self._kernel_dims).transpose(1, 2).flatten(0, 1), *bias]

    @property
    def _kernel_dims(self) -> tuple[int, ...]:
        """Dimensions of the kernel in a weight that is split into groups."""
        return tuple(range(3, 3 + len(self.module.kernel_size)))

    def _margins(self) -> list[tuple[int, int]]:
        """Padding before and after the stuffed input, per dimension; negative to crop."""
        module = self.module
        assert not isinstance(module.padding, str)  # torch refuses it
        spans = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
        settings = zip(spans, module.padding, module.output_padding, strict=True)
        return [(span - padding, span - padding + extra) for span, padding, extra in settings]

    def _output_size(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the output for an input of this size."""
        module = self.module
        settings = zip(spatial, module.stride, self._margins(), module.dilation, strict=True)
        return tuple(
            (size - 1) * step + 1 + sum(margins) - dilation * (kernel - 1)
            for (size, step, margins, dilation), kernel in zip(
                settings, module.kernel_size, strict=True
            )
        )
