"""Preconditioned gradients: stacked as the factors are, and by parameter."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from kfac.layers import Layer


class Stack(NamedTuple):
    """Gradients and preconditioned ones of layers of one shape, ``[layers, groups, d_out, d_in]``.

    Both are contiguous and in the dtype of the factors, in which a preconditioned gradient may be
    larger than the parameter's dtype holds.
    """

    layers: Sequence[Layer]
    gradient: Tensor
    direction: Tensor


class Directions:
    """What preconditioning has made of the gradients.

    Args:
        stacks: The layers, each in one stack.
        gradients: Gradients of the mean loss, of these layers' parameters and maybe of others.

    Attributes:
        stacks: As given.
        parameters: The parameters that are in the stacks.
        whole: Those of which every element is.
    """

    def __init__(self, stacks: Sequence[Stack], gradients: Mapping[nn.Parameter, Tensor]) -> None:
        self.stacks = stacks
        self._gradients = gradients
        pieces = [
            piece
            for stack in stacks
            for layer in stack.layers
            for piece in layer.pieces
            if piece.parameter in gradients
        ]
        self.parameters = {piece.parameter for piece in pieces}
        self.whole = {piece.parameter for piece in pieces if piece.rows is None}

    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """The direction of each parameter, in the dtype of the factors.

        Of a parameter that is in the stacks in parts only, the others have the gradient. Tensors
        are views of the stacks where they can be.
        """
        found: dict[nn.Parameter, Tensor] = {}
        for layers, _, direction in self.stacks:
            for layer, matrix in zip(layers, direction, strict=True):
                for piece, part in zip(layer.pieces, layer.unmatrix(matrix), strict=True):
                    parameter = piece.parameter
                    if parameter not in self._gradients:
                        continue
                    if piece.rows is None:
                        found[parameter] = part
                        continue
                    if parameter not in found:
                        whole = self._gradients[parameter]
                        found[parameter] = whole.to(part.dtype, copy=True)
                    piece.of(found[parameter]).copy_(part)
        return found
