"""``nn.MultiheadAttention``: its input projections are linear layers without a module."""

from collections.abc import Sequence

from torch import nn

from kfac.layers.base import Part
from kfac.layers.linear import LinearLayer


class AttentionProjection(LinearLayer):
    """The projection of the queries, the keys or the values.

    Their weights are the three ranges of rows of a packed one, or separate where keys or values
    have another width; their biases are packed in both cases. The output projection is a module of
    its own, whose weight the attention uses without calling it.
    """

    module_types = (nn.MultiheadAttention,)
    is_functional = True

    @classmethod
    def parts(cls, module: nn.Module) -> Sequence[Part]:
        """Queries, keys and values."""
        assert isinstance(module, nn.MultiheadAttention)
        width = module.embed_dim
        return [
            Part(
                suffix=f"{name}_proj",
                weight="in_proj_weight" if is_packed else f"{name}_proj_weight",
                bias="in_proj_bias",
                weight_rows=rows if is_packed else None,
                bias_rows=rows,
            )
            for is_packed in [module._qkv_same_embed_dim]
            for name, rows in zip("qkv", _ranges(width, 3), strict=True)
        ]


def _ranges(length: int, count: int) -> list[slice]:
    return [slice(i * length, (i + 1) * length) for i in range(count)]
