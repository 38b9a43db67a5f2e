"""``nn.Linear`` with any leading dimensions, and the same with a transposed weight."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kfac.covariance import channel_covariance
from kfac.layers.base import Layer, append_one


class LinearLayer(Layer):
    """A linear layer: every leading position is a row, the last axis holds the features."""

    module_types: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.Linear,
        NonDynamicallyQuantizableLinear,
    )
    foreign_types: ClassVar[tuple[str, ...]] = ("timm.layers.linear.Linear",)
    calls_linear = True

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

    def leading_shape(self, x: Tensor) -> tuple[int, ...]:
        """All axes but the features'."""
        return tuple(x.shape[:-1])

    def input_rows(self, x: Tensor, examples: int) -> Tensor:
        """All axes between the examples and the features are positions."""
        rows = x.reshape(examples, -1, x.shape[-1]).to(self.dtype)
        return (append_one(rows) if self.has_bias else rows).unsqueeze(2)

    def gradient_rows(self, g: Tensor, examples: int) -> Tensor:
        """All axes between the examples and the features are positions."""
        return g.reshape(examples, -1, g.shape[-1]).to(self.dtype).unsqueeze(2)

    def input_moment(self, x: Tensor) -> Tensor:
        """Second moment of the rows of ``x [..., in_features]``, a last 1 appended for a bias."""
        if self.shape.a_kind != "dense":
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


class TransposedLinearLayer(LinearLayer):
    """A linear layer whose weight is ``[inputs, outputs]``: s = Wᵀ a + b.

    GPT-2 and its relatives are made of these in Hugging Face's library, under the name ``Conv1D``.
    The gradient matrix is the transpose of the weight's gradient.
    """

    module_types = ()
    calls_linear = False
    layout = "inputs first"
    foreign_types = ("transformers.pytorch_utils.Conv1D",)

    def observed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The input, which is called ``x``."""
        x: Tensor = args[0] if args else kwargs["x"]
        return x

    def dimensions(self) -> tuple[int, int, int]:
        """One group; inputs and outputs are the weight's rows and columns."""
        d_in, d_out = self.weight.shape
        return 1, d_in, d_out

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The transposed weight, then the bias, ``[1, d_out, d_in]``."""
        return super().matrix(weight.mT, bias)

    def unmatrix(self, matrix: Tensor) -> list[Tensor]:
        """Undo :meth:`matrix`."""
        weight = matrix[0, :, : self.weight.shape[0]].mT
        return [weight] if self.bias is None else [weight, matrix[0, :, -1]]


def _border(moment: Tensor, total: Tensor, rows: int) -> Tensor:
    """Extend Σ x xᵀ to Σ (x, 1)(x, 1)ᵀ without building the rows (x, 1)."""
    d = len(total)
    result = moment.new_empty(d + 1, d + 1)
    result[:d, :d] = moment
    result[:d, d] = result[d, :d] = total
    result[d, d] = rows
    return result
