"""Second moment of the channels of feature maps."""

import torch
from torch import Tensor

from kfac.arguments import argument_error
from kfac.covariance.gram import gram


def channel_covariance(x: Tensor) -> Tensor:
    """Sum the outer products of the channel vectors over all examples and positions.

    Formula: ``Σₙ Σₜ xₙₜ xₙₜᵀ``, neither centred nor normalised, where ``xₙₜ`` holds the ``C``
    channels of example ``n`` at position ``t``.

    Args:
        x: Feature maps ``[N, C, *spatial]`` with any number of spatial dimensions, none included.

    Returns:
        ``[C, C]`` in float32, or in float64 for a float64 input; symmetric up to rounding.

    Raises:
        ValueError: ``x`` is not floating-point or has fewer than two dimensions.

    Cost: ``N·T·C²`` multiply-adds for ``T`` positions. Extra memory of at most the size of ``x`` in
    float32; channels-last inputs are read in place. Products run at full precision whatever
    autocast says, and at torch's ``set_float32_matmul_precision``.

    Source: Grosse & Martens 2016, "A Kronecker-factored approximate Fisher matrix for convolution
    layers", section 3 (there for the patches of a convolution, here for a 1×1 kernel).
    """
    if x.dim() < 2:
        raise argument_error(
            "channel_covariance", "x", "of shape [N, C, *spatial]", list(x.shape),
            "Add the dimensions of examples and channels, e.g. with x.unsqueeze(0).",
        )  # fmt: skip
    maps = to_accumulator("channel_covariance", x)
    maps = maps.flatten(2) if maps.dim() > 2 else maps.unsqueeze(2)
    examples, channels, positions = maps.shape
    with torch.autocast(x.device.type, enabled=False):
        # The batched product writes N·C² numbers, the single one copies N·C·T unless x is
        # channels-last: the smaller of the two was also the faster on all shapes measured.
        if examples > 1 and channels <= positions:
            return torch.bmm(maps, maps.mT).sum(0)
        columns = maps.transpose(0, 1).reshape(channels, examples * positions)
        return gram(columns.T.unsqueeze(1))[0]


def to_accumulator(owner: str, x: Tensor) -> Tensor:
    """Cast ``x`` to the dtype that sums are taken in: float64 stays, all others become float32.

    Args:
        owner: Name of the public function that ``x`` was given to, for the error message.
        x: Floating-point tensor of any shape.

    Returns:
        ``x`` itself where it already has that dtype, else a copy of the same shape.

    Raises:
        ValueError: ``x`` is not floating-point.
    """
    if not x.is_floating_point():
        raise argument_error(
            owner, "x", "a floating-point tensor", x.dtype, "Convert it with x.float()."
        )
    return x if x.dtype == torch.float64 else x.to(torch.float32)
