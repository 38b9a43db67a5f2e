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


# Methods that a subclass may have of its own and still compute what its base computes.
_HARMLESS = {"__init__", "__setstate__", "_load_from_state_dict", "extra_repr", "reset_parameters"}


def layer_type_for(module: nn.Module) -> type[Layer] | None:
    """Return the layer class for a module's type, None where there is none.

    A subclass is taken for its base class if it inherits every method that takes part in the
    computation, as one that only initialises differently does.
    """
    own = type(module)
    by_name = _FOREIGN_TYPES.get(f"{own.__module__}.{own.__qualname__}")
    base = supported_base(module)
    if by_name is not None or base is None:
        return by_name
    return _LAYER_TYPES[base] if _computes_like(own, base) else None


def _computes_like(own: type[nn.Module], base: type[nn.Module]) -> bool:
    lineage = base.__mro__[: base.__mro__.index(nn.Module)]
    methods = {name for cls in lineage for name, value in vars(cls).items() if callable(value)}
    decisive = (methods | {"__call__", "__getattr__"}) - _HARMLESS
    return all(getattr(own, name) == getattr(base, name) for name in decisive)


def supported_base(module: nn.Module) -> type[nn.Module] | None:
    """Return the supported type that a module's own type derives from, None where there is none."""
    return next((t for t in type(module).__mro__ if t in _LAYER_TYPES), None)


__all__ = ["Layer", "Part", "Piece", "WeightSharing", "layer_type_for", "supported_base"]
