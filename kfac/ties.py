"""Layers that share a weight: one block, and one update, for all of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from kfac.layers import Layer, Part, Piece, WeightSharing


@dataclass(frozen=True)
class Candidate:
    """A part of a module that becomes a layer unless its weight is shared in an unknown way.

    Attributes:
        name: Name of the layer.
        module: The module.
        layer_type: Class of the layer.
        part: Which of the module's parameters it consists of.
        weight_sharing: How positions that share the weight enter the factors.
        weight: The weight.
        bias: The bias, None where there is none that is trained.
    """

    name: str
    module: nn.Module
    layer_type: type[Layer]
    part: Part
    weight_sharing: WeightSharing
    weight: nn.Parameter
    bias: nn.Parameter | None

    def layer(self, bias: nn.Parameter | None, max_factor_dim: int, identity_g: bool) -> Layer:
        """The layer, with this bias."""
        return self.layer_type(
            self.name,
            self.module,
            weight_sharing=self.weight_sharing,
            weight=Piece(self.weight, self.part.weight_rows),
            bias=None if bias is None else Piece(bias, self.part.bias_rows),
            max_factor_dim=max_factor_dim,
            identity_g=identity_g,
        )


def sharing_one_weight(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Group candidates by their weight, or by their range of a packed weight's rows."""
    groups: dict[tuple[int, str], list[Candidate]] = {}
    for candidate in candidates:
        key = id(candidate.weight), str(candidate.part.weight_rows)
        groups.setdefault(key, []).append(candidate)
    return list(groups.values())


def layers_of(
    members: Sequence[Candidate], holders: Counter[int], *, max_factor_dim: int, identity_g: bool
) -> list[Layer] | str:
    """Turn the candidates that share one weight into layers of one block.

    The block is that of the first member whose weight holds outputs first (a linear layer rather
    than an embedding). Members of the same layout add to its factors. Members of the other one
    have the transposed gradient: they keep factors of their own, to be merged when the block is
    inverted.

    Args:
        members: The candidates.
        holders: How many modules hold each parameter, by its id.
        max_factor_dim: See :func:`kfac.layers.base.factor_kind`.
        identity_g: Keep no G.

    Returns:
        The layers, or why K-FAC does not take the weight.
    """
    modules = {id(member.module) for member in members}
    if holders[id(members[0].weight)] > len(modules):
        return "its weight is shared with a module that K-FAC does not take"
    first = min(members, key=lambda member: member.layer_type.layout != "outputs first")
    layout = first.layer_type.layout
    alike = [member for member in members if member.layer_type.layout == layout]
    bias = first.bias if _is_common(first.bias, alike, holders) else None
    primary, *others = [
        member.layer(bias if member in alike else None, max_factor_dim, identity_g)
        for member in [first, *(m for m in members if m is not first)]
    ]
    for layer in others:
        if layer.layout == layout and layer.shape == primary.shape:
            layer.primary = primary
        elif _is_transpose(layer, primary) and not identity_g:
            layer.primary, layer.is_transposed = primary, True
        else:
            kinds = ", ".join(sorted({type(m.module).__name__ for m in members}))
            return f"its weight is shared by modules that use it in different ways ({kinds})"
    return [primary, *others]


def _is_common(
    bias: nn.Parameter | None, members: Sequence[Candidate], holders: Counter[int]
) -> bool:
    """Whether all members, and nothing else, have this bias."""
    if bias is None or any(member.bias is not bias for member in members):
        return False
    return holders[id(bias)] == len({id(member.module) for member in members})


def _is_transpose(layer: Layer, primary: Layer) -> bool:
    """Whether the gradient matrix of one is the transpose of the other's, but for the bias."""
    if {layer.layout, primary.layout} != {"outputs first", "inputs first"}:
        return False
    inputs = primary.shape.d_in - primary.has_bias
    return (layer.shape.d_in, layer.shape.d_out) == (primary.shape.d_out, inputs)
