"""Module types that K-FAC takes, and how each turns into factors and a gradient matrix."""

from torch import nn

from kfac.layers.attention import AttentionProjection
from kfac.layers.base import Layer, Part, Piece, WeightSharing
from kfac.layers.conv import ConvLayer, ConvTransposeLayer
from kfac.layers.embedding import EmbeddingBagLayer, EmbeddingLayer
from kfac.layers.linear import LinearLayer, TransposedLinearLayer
from kfac.layers.norm import BatchNormLayer, GroupNormLayer, InstanceNormLayer, LayerNormLayer

_CLASSES: tuple[type[Layer], ...] = (
    LinearLayer,
    TransposedLinearLayer,
    ConvLayer,
    ConvTransposeLayer,
    EmbeddingLayer,
    EmbeddingBagLayer,
    AttentionProjection,
    LayerNormLayer,
    GroupNormLayer,
    BatchNormLayer,
    InstanceNormLayer,
)
_LAYER_TYPES = {module_type: layer for layer in _CLASSES for module_type in layer.module_types}
_FOREIGN_TYPES = {name: layer for layer in _CLASSES for name in layer.foreign_types}


def layer_type_for(module: nn.Module) -> type[Layer] | None:
    """Return the layer class for a module's exact type, None where there is none.

    A subclass may compute something else (parametrised or quantised modules do), so it is not
    taken for its base class.
    """
    own = type(module)
    return _LAYER_TYPES.get(own) or _FOREIGN_TYPES.get(f"{own.__module__}.{own.__qualname__}")


def supported_base(module: nn.Module) -> type[nn.Module] | None:
    """Return the supported type that a module's own type derives from, None where there is none."""
    return next((t for t in type(module).__mro__ if t in _LAYER_TYPES), None)


__all__ = ["Layer", "Part", "Piece", "WeightSharing", "layer_type_for", "supported_base"]
