"""``nn.Linear`` with any leading dimensions."""

from torch import Tensor, nn

from kfac.covariance import channel_covariance
from kfac.layers.base import Layer, append_one


class LinearLayer(Layer):
    """A linear layer: every leading position is a row, the last axis holds the features."""

    module_types = (nn.Linear,)

    def dimensions(self) -> tuple[int, int, int]:
        """One group, ``in_features`` inputs, ``out_features`` outputs."""
        d_out, d_in = self.weight.shape
        return 1, d_in, d_out

    def leading_size(self, x: Tensor) -> int:
        """Size of the first axis; 1 for an input without leading dimensions."""
        return x.shape[0] if x.dim() > 1 else 1

    def row_count(self, x: Tensor) -> int:
        """Product of the leading dimensions."""
        return x.numel() // x.shape[-1]

    def input_rows(self, x: Tensor, examples: int) -> Tensor:
        """All axes between the examples and the features are positions."""
        rows = x.reshape(examples, -1, x.shape[-1]).to(self.dtype)
        return (append_one(rows) if self.has_bias else rows).unsqueeze(2)

    def gradient_rows(self, g: Tensor, examples: int) -> Tensor:
        """All axes between the examples and the features are positions."""
        return g.reshape(examples, -1, g.shape[-1]).to(self.dtype).unsqueeze(2)

    def input_moment(self, x: Tensor) -> Tensor:
        """Second moment of the rows of ``x [..., in_features]``, a last 1 appended for a bias."""
        if self.shape.a_kind == "diagonal":
            return super().input_moment(x)
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        moment = channel_covariance(rows)
        if self.has_bias:
            moment = _border(moment, rows.sum(0), len(rows))
        return moment.unsqueeze(0)

    def input_mean(self, x: Tensor, examples: int) -> Tensor:
        """Mean over all axes between the examples and the features."""
        mean = x.reshape(examples, -1, x.shape[-1]).to(self.dtype).mean(1)
        return (append_one(mean) if self.has_bias else mean).unsqueeze(1)


def _border(moment: Tensor, total: Tensor, rows: int) -> Tensor:
    """Extend Σ x xᵀ to Σ (x, 1)(x, 1)ᵀ without building the rows (x, 1)."""
    d = len(total)
    result = moment.new_empty(d + 1, d + 1)
    result[:d, :d] = moment
    result[:d, d] = result[d, :d] = total
    result[d, d] = rows
    return result
