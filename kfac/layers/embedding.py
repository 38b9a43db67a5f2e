"""``nn.Embedding``: a linear layer on one-hot inputs that are never formed."""

import torch
from torch import Tensor, nn

from kfac.layers.base import Layer


class EmbeddingLayer(Layer):
    """A table whose rows are looked up: A is diagonal and holds the frequencies of the tokens.

    The gradient matrix is the transpose of the table's, ``[1, embedding_dim, num_embeddings]``. A
    row that is ``padding_idx`` has no gradient, and counts as an input of zeros.

    Under ``"reduce"`` the mean of an example's one-hot rows has a second moment that is not
    diagonal; of that only the diagonal is kept.
    """

    module_types = (nn.Embedding,)
    has_one_hot_inputs = True
    module: nn.Embedding

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Gradients that are divided by frequencies are not those of a linear layer."""
        assert isinstance(module, nn.Embedding)
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq=True changes its gradient"
        if module.sparse:
            return "sparse=True gives it sparse gradients"
        return None

    def dimensions(self) -> tuple[int, int, int]:
        """One group, ``num_embeddings`` inputs, ``embedding_dim`` outputs."""
        return 1, self.module.num_embeddings, self.module.embedding_dim

    def leading_size(self, x: Tensor) -> int:
        """Size of the first axis; 1 for a single token."""
        return x.shape[0] if x.dim() else 1

    def row_count(self, x: Tensor) -> int:
        """Number of tokens."""
        return x.numel()

    def input_moment(self, x: Tensor) -> Tensor:
        """How often each token occurs in ``x``, ``[1, num_embeddings]``."""
        return self._counts(x.reshape(1, -1))

    def input_mean(self, x: Tensor, examples: int) -> Tensor:
        """Relative frequency of each token in each example."""
        tokens = x.reshape(examples, -1)
        return self._counts(tokens).unsqueeze(1) / tokens.shape[1]

    def input_rows(self, x: Tensor, examples: int) -> Tensor:
        """One-hot rows ``[examples, tokens, 1, num_embeddings]``, of zeros for padding.

        Cost: ``num_embeddings`` numbers per token.
        """
        tokens = x.reshape(-1, 1)
        return self._counts(tokens).reshape(examples, -1, 1, self.shape.d_in)

    def gradient_rows(self, g: Tensor, examples: int) -> Tensor:
        """All axes between the examples and the features are positions."""
        return g.reshape(examples, -1, 1, g.shape[-1]).to(self.dtype)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The table transposed, ``[1, embedding_dim, num_embeddings]``."""
        return weight.mT.unsqueeze(0)

    def unmatrix(self, matrix: Tensor) -> list[Tensor]:
        """Undo :meth:`matrix`."""
        return [matrix[0].mT]

    def _counts(self, tokens: Tensor) -> Tensor:
        """Occurrences of each token per row of ``tokens [n, m]``, ``[n, num_embeddings]``."""
        counts = torch.zeros(
            len(tokens), self.module.num_embeddings, dtype=self.dtype, device=tokens.device
        )
        counts.scatter_add_(1, tokens.long(), torch.ones_like(tokens, dtype=self.dtype))
        if self.module.padding_idx is not None:
            counts[:, self.module.padding_idx] = 0
        return counts
