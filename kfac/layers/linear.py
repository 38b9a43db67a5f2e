"""``nn.Linear`` with any leading dimensions."""

from torch import Tensor, nn

from kfac.covariance import channel_covariance
from kfac.layers.base import Layer, append_one, row_moment


class LinearLayer(Layer):
    """A linear layer: every leading position is a row, the last axis holds the features."""

    module_types = (nn.Linear,)
    module: nn.Linear

    def dimensions(self) -> tuple[int, int, int]:
        """One group, ``in_features`` inputs, ``out_features`` outputs."""
        return 1, self.module.in_features, self.module.out_features

    def leading_size(self, x: Tensor) -> int:
        """Size of the first axis; 1 for an input without leading dimensions."""
        return x.shape[0] if x.dim() > 1 else 1

    def rows(self, x: Tensor) -> int:
        """Product of the leading dimensions."""
        return x.numel() // x.shape[-1]

    def input_moment(self, x: Tensor) -> Tensor:
        """Second moment of the rows of ``x [..., in_features]``, a last 1 appended for a bias."""
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        if self.shape.a_kind == "diagonal":
            augmented = append_one(rows) if self.has_bias else rows
            return row_moment(augmented.unsqueeze(1), "diagonal")
        moment = channel_covariance(rows)
        if self.has_bias:
            moment = _border(moment, rows.sum(0), len(rows))
        return moment.unsqueeze(0)

    def gradient_moment(self, g: Tensor) -> Tensor:
        """Second moment of the rows of ``g [..., out_features]``."""
        rows = g.reshape(-1, g.shape[-1]).to(self.dtype)
        return row_moment(rows.unsqueeze(1), self.shape.g_kind)

    def input_mean(self, x: Tensor, examples: int) -> Tensor:
        """Mean over all axes between the examples and the features."""
        mean = x.reshape(examples, -1, x.shape[-1]).to(self.dtype).mean(1)
        return (append_one(mean) if self.has_bias else mean).unsqueeze(1)

    def gradient_sum(self, g: Tensor, examples: int) -> Tensor:
        """Sum over all axes between the examples and the features."""
        return g.reshape(examples, -1, g.shape[-1]).to(self.dtype).sum(1).unsqueeze(1)


def _border(moment: Tensor, total: Tensor, rows: int) -> Tensor:
    """Extend Σ x xᵀ to Σ (x, 1)(x, 1)ᵀ without building the rows (x, 1)."""
    d = len(total)
    result = moment.new_empty(d + 1, d + 1)
    result[:d, :d] = moment
    result[:d, d] = result[d, :d] = total
    result[d, d] = rows
    return result
