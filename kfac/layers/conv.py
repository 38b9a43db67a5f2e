"""``nn.Conv2d`` of every geometry: a linear layer whose positions are its output locations."""

from typing import cast

from torch import Tensor, nn

from kfac.covariance import (
    PatchGeometry,
    channel_covariance,
    patch_count,
    patch_covariance,
    patch_mean,
    patch_second_moment_diagonal,
)
from kfac.layers.base import Layer, row_moment


class Conv2dLayer(Layer):
    """A convolution: inputs are patches, one block of the curvature per group.

    Source:
        Grosse & Martens 2016, "A Kronecker-factored approximate Fisher matrix for convolution
        layers", section 3.
    """

    module_types = (nn.Conv2d,)
    module: nn.Conv2d

    def dimensions(self) -> tuple[int, int, int]:
        """``groups``, ``in_channels/groups·kH·kW`` inputs, ``out_channels/groups`` outputs."""
        module = self.module
        height, width = module.kernel_size
        inputs = module.in_channels // module.groups * height * width
        return module.groups, inputs, module.out_channels // module.groups

    @property
    def geometry(self) -> PatchGeometry:
        """Which patches the module sees."""
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

    def leading_size(self, x: Tensor) -> int:
        """Size of the first axis; 1 for an unbatched ``[C, H, W]``."""
        return x.shape[0] if x.dim() == 4 else 1

    def rows(self, x: Tensor) -> int:
        """Examples times output locations."""
        x = _batched(x)
        return len(x) * patch_count(x.shape[2:], self.module.kernel_size, **self.geometry)

    def input_moment(self, x: Tensor) -> Tensor:
        """Second moment of the patches of ``x [N, C, H, W]``."""
        x = _batched(x).to(self.dtype)
        second_moment = (
            patch_second_moment_diagonal if self.shape.a_kind == "diagonal" else patch_covariance
        )
        return second_moment(x, self.module.kernel_size, bias=self.has_bias, **self.geometry)

    def gradient_moment(self, g: Tensor) -> Tensor:
        """Second moment of the gradient's columns of ``g [N, C_out, H, W]``, per group."""
        g = _batched(g).to(self.dtype)
        if self.shape.groups == 1 and self.shape.g_kind == "dense":
            return channel_covariance(g).unsqueeze(0)
        columns = g.movedim(1, -1).reshape(-1, self.shape.groups, self.shape.d_out)
        return row_moment(columns, self.shape.g_kind)

    def input_mean(self, x: Tensor, examples: int) -> Tensor:
        """Mean patch of each example; further leading axes count as positions."""
        x = _batched(x).to(self.dtype)
        mean = patch_mean(x, self.module.kernel_size, bias=self.has_bias, **self.geometry)
        return mean.reshape(examples, -1, *mean.shape[1:]).mean(1)

    def gradient_sum(self, g: Tensor, examples: int) -> Tensor:
        """Sum of the gradient over the output locations of each example."""
        total = _batched(g).to(self.dtype).sum((2, 3))
        return total.reshape(examples, -1, self.shape.groups, self.shape.d_out).sum(1)


def _batched(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.unsqueeze(0)
