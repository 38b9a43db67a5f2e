"""``nn.Embedding`` and ``nn.EmbeddingBag``: linear layers on inputs that are never formed."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac.example_gradients import Basis
from kfac.layers.base import Layer


class TableLayer(Layer):
    """A table ``[num_embeddings, embedding_dim]`` that is multiplied by token counts.

    The gradient matrix is the transpose of the table's, ``[1, embedding_dim, num_embeddings]``. Of
    A only the diagonal is kept.
    """

    layout = "inputs first"
    has_sparse_inputs = True
    module: nn.Embedding | nn.EmbeddingBag

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Gradients that are divided by frequencies are not those of a linear layer."""
        assert isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq=True changes its gradient"
        if module.sparse:
            return "sparse=True gives it sparse gradients"
        return None

    def dimensions(self) -> tuple[int, int, int]:
        """One group, ``num_embeddings`` inputs, ``embedding_dim`` outputs."""
        return 1, self.module.num_embeddings, self.module.embedding_dim

    def gradient_rows(self, g: Tensor, examples: int) -> Tensor:
        """All axes between the examples and the features are positions."""
        return g.reshape(examples, -1, 1, g.shape[-1]).to(self.dtype)

    @abstractmethod
    def entries(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, token and coefficient of everything in an input that may be not zero."""

    def summed_gradient(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`Layer`, by way of the rows of the table that were used."""
        rows, tokens, coefficients = self.entries(x)
        parts = self.gradient_rows(g, 1)[0, :, 0][rows] * coefficients.unsqueeze(-1)
        table = parts.new_zeros(self.shape.d_in, self.shape.d_out)
        total = table.index_add_(0, tokens, parts).mT.unsqueeze(0)
        return total, parts.norm() * len(parts) ** 0.5

    def squared_gradients(self, x: Tensor, g: Tensor, examples: int, basis: Basis) -> Tensor:
        """As in :class:`Layer`, by way of the rows of the table that each example has used.

        Cost: sorts the tokens, so as to add up the gradients of equal ones in an example.
        """
        rows, tokens, coefficients = self.entries(x)
        gradients = self.gradient_rows(g, 1)[0, :, 0]
        if basis.g is not None:
            gradients = gradients @ basis.g[0]
        cells = rows // max(len(gradients) // examples, 1) * self.shape.d_in + tokens
        parts = gradients[rows] * coefficients.unsqueeze(-1)
        # Σ part·total over the parts of a total is the square of that total.
        products = parts * _totals(parts, cells)
        table = parts.new_zeros(self.shape.d_in, self.shape.d_out)
        return table.index_add_(0, tokens, products).mT.unsqueeze(0)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The table transposed, ``[1, embedding_dim, num_embeddings]``."""
        return weight.mT.unsqueeze(0)

    def unmatrix(self, matrix: Tensor) -> list[Tensor]:
        """Undo :meth:`matrix`."""
        return [matrix[0].mT]


class EmbeddingLayer(TableLayer):
    """A table whose rows are looked up: A is diagonal and holds the frequencies of the tokens.

    A row that is ``padding_idx`` has no gradient, and counts as an input of zeros.

    Under ``"reduce"`` the mean of an example's one-hot rows has a second moment that is not
    diagonal; of that only the diagonal is kept.
    """

    module_types = (nn.Embedding,)
    module: nn.Embedding

    def leading_size(self, x: Tensor) -> int:
        """Size of the first axis; 1 for a single token."""
        return x.shape[0] if x.dim() else 1

    def tells_examples(self, x: Tensor, examples: int) -> bool:
        """Not if there are more tokens along one axis: they may be positions, for all examples."""
        return x.dim() > 1 or tuple(x.shape) == (examples,)

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

    def leading_shape(self, x: Tensor) -> tuple[int, ...]:
        """All axes."""
        return tuple(x.shape)

    def masked_moment(self, x: Tensor, mask: Tensor) -> Tensor:
        """How often each token occurs where the mask is 1."""
        return self._counts(x.reshape(1, -1), mask.reshape(1, -1))

    def masked_sum(self, x: Tensor, mask: Tensor) -> Tensor:
        """How often each token occurs in each example where the mask is 1."""
        return self._counts(x.reshape(mask.shape), mask).unsqueeze(1)

    def entries(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every token in a row of its own, with the coefficient 1, or 0 for padding."""
        tokens = x.reshape(-1).long()
        coefficients = torch.ones_like(tokens, dtype=self.dtype)
        if self.module.padding_idx is not None:
            coefficients = (tokens != self.module.padding_idx).to(self.dtype)
        return torch.arange(len(tokens), device=tokens.device), tokens, coefficients

    def _counts(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Occurrences of each token per row of ``tokens [n, m]``, ``[n, num_embeddings]``."""
        counts = torch.zeros(
            len(tokens), self.module.num_embeddings, dtype=self.dtype, device=tokens.device
        )
        ones = torch.ones_like(tokens, dtype=self.dtype) if mask is None else mask.to(self.dtype)
        counts.scatter_add_(1, tokens.long(), ones)
        if self.module.padding_idx is not None:
            counts[:, self.module.padding_idx] = 0
        return counts


class EmbeddingBagLayer(TableLayer):
    """A table whose rows are summed or averaged over bags of tokens: one row per bag.

    The input of bag b is the vector of its tokens' coefficients: how often each occurs for
    ``mode="sum"``, weighted by ``per_sample_weights`` if there are any, and that divided by the
    number of tokens for ``mode="mean"``. Tokens that are ``padding_idx`` belong to no bag.

    Tokens of one bag occur together, so the second moment of these vectors is not diagonal; of that
    only the diagonal is kept.
    """

    module_types = (nn.EmbeddingBag,)
    module: nn.EmbeddingBag

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """A maximum over rows is not linear in them."""
        assert isinstance(module, nn.EmbeddingBag)
        return 'mode="max" is not linear' if module.mode == "max" else super().refusal(module)

    @torch.no_grad()
    def observed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The contents of the bags ``[bags, slots, 3]``, in float64.

        Each slot holds a bag, a token and its coefficient. Slots belong to no particular bag: the
        first axis only tells the number of bags, empty ones included. Left-over slots have the
        coefficient 0.
        """
        names = ("input", "offsets", "per_sample_weights")
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens, weights = call["input"], call.get("per_sample_weights")
        bags, count = self._bags(tokens, call.get("offsets"))
        tokens = tokens.reshape(-1)
        coefficients = self._coefficients(tokens, bags, count, weights)
        return _slots(torch.stack([bags.double(), tokens.double(), coefficients], -1), count)

    def leading_size(self, x: Tensor) -> int:
        """Number of bags."""
        return len(x)

    def leading_part(self, x: Tensor, size: int) -> tuple[Layer, Tensor]:
        """The first bags; slots of others are left over, since their number is not known."""
        entries = x.reshape(-1, 3)
        return self, _slots(torch.where(entries[:, :1] < size, entries, 0.0), size)

    def row_count(self, x: Tensor) -> int:
        """Number of bags."""
        return len(x)

    def input_moment(self, x: Tensor) -> Tensor:
        """For each token, the sum over bags of its squared coefficient ``[1, num_embeddings]``.

        Cost: sorts the contents of the bags, so as to add up the coefficients of equal tokens.
        """
        bags, tokens, coefficients = self.entries(x)
        totals = _totals(coefficients, bags * self.shape.d_in + tokens)
        moment = coefficients.new_zeros(self.shape.d_in)
        return moment.index_add_(0, tokens, coefficients * totals).unsqueeze(0)

    def input_mean(self, x: Tensor, examples: int) -> Tensor:
        """Mean vector of each example's bags."""
        return self._sums(x, examples).unsqueeze(1) * (examples / len(x))

    def input_rows(self, x: Tensor, examples: int) -> Tensor:
        """The vectors ``[examples, bags, 1, num_embeddings]``.

        Cost: ``num_embeddings`` numbers per bag.
        """
        return self._sums(x, len(x)).reshape(examples, -1, 1, self.shape.d_in)

    def _bags(self, tokens: Tensor, offsets: Tensor | None) -> tuple[Tensor, int]:
        """The bag of each token, and the number of bags."""
        positions = torch.arange(tokens.numel(), device=tokens.device)
        if offsets is None:
            return positions // max(tokens.shape[1], 1), len(tokens)
        starts = offsets[:-1] if self.module.include_last_offset else offsets
        return torch.searchsorted(starts.long(), positions, right=True) - 1, len(starts)

    def _coefficients(
        self, tokens: Tensor, bags: Tensor, count: int, weights: Tensor | None
    ) -> Tensor:
        """What each token is multiplied by in its bag, in float64."""
        kept = torch.ones_like(tokens, dtype=torch.float64)
        if self.module.padding_idx is not None:
            kept = (tokens != self.module.padding_idx).double()
        if self.module.mode == "mean":
            lengths = kept.new_zeros(count).index_add_(0, bags, kept)
            return kept / lengths.clamp(min=1)[bags]
        return kept if weights is None else kept * weights.reshape(-1)

    def entries(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bags, tokens and coefficients of all slots."""
        bags, tokens, coefficients = x.reshape(-1, 3).unbind(-1)
        return bags.long(), tokens.long(), coefficients.to(self.dtype)

    def _sums(self, x: Tensor, parts: int) -> Tensor:
        """Sum of the bags' vectors in each of equal parts, ``[parts, num_embeddings]``."""
        bags, tokens, coefficients = self.entries(x)
        cells = bags // (len(x) // parts) * self.shape.d_in + tokens
        sums = coefficients.new_zeros(parts * self.shape.d_in)
        return sums.index_add_(0, cells, coefficients).reshape(parts, -1)


def _slots(entries: Tensor, bags: int) -> Tensor:
    """Fill entries ``[n, 3]`` up with zeros to ``[bags, slots, 3]``."""
    slots = -(-len(entries) // max(bags, 1))
    return F.pad(entries, (0, 0, 0, bags * slots - len(entries))).reshape(bags, slots, 3)


def _totals(parts: Tensor, cells: Tensor) -> Tensor:
    """For each part ``[n, ...]``, the sum of all parts in the same cell ``[n]``."""
    cells, order = cells.sort()
    run = torch.cat([cells.new_zeros(1), cells.diff().ne(0).cumsum(0)])[: len(cells)]
    totals = torch.zeros_like(parts).index_add_(0, run, parts[order])
    return torch.empty_like(parts).index_copy_(0, order, totals[run])
