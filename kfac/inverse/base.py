"""What a strategy for (A ⊗ G + damping)⁻¹ has to provide, and what all strategies share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kfac.arguments import POSITIVE_INTEGER, argument_error, check
from kfac.factors import BlockShape

InverseName = Literal["cholesky", "eigen", "ekfac", "newton-schulz", "inverse-free"]


@dataclass(frozen=True)
class Inverse(ABC):
    """A way to apply the inverse of a damped Kronecker product, with its own settings.

    A strategy holds settings and no tensors. Its state is a flat dict of stacked tensors
    ``[layers, ...]`` that belongs to a bucket, so that memory reports and checkpoints are generic
    loops.

    Args:
        max_consecutive_failures: Refreshes in a row, of one step each, in which a layer may keep
            its last good inverse because the new factors could not be decomposed, before it is an
            error.
    """

    # Whether the strategy needs second moments of per-example gradients in its own basis; it then
    # derives from :class:`kfac.inverse.Ekfac`.
    has_second_moments: ClassVar[bool] = False

    max_consecutive_failures: int = 10

    def __post_init__(self) -> None:
        check(
            type(self).__name__,
            "max_consecutive_failures",
            self.max_consecutive_failures,
            POSITIVE_INTEGER,
            "The default is 10.",
        )

    @property
    @abstractmethod
    def name(self) -> str:
        """The word for this strategy in ``inverse=`` and in checkpoints."""

    @property
    @abstractmethod
    def damping_is_live(self) -> bool:
        """Whether a new λ takes effect at once rather than at the next refresh."""

    @abstractmethod
    def state_shapes(self, block: BlockShape) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's state by key, without the leading axis of layers."""

    @abstractmethod
    def refresh(
        self,
        block: BlockShape,
        factors: Mapping[str, Tensor],
        damping: Tensor,
        previous: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute a new state from the factors.

        Args:
            block: Shape of each layer's block.
            factors: "A" and "G" as in :class:`kfac.factors.Bucket`; an identity factor is absent.
            damping: λ per layer ``[layers]``.
            previous: The state of these layers at the last refresh, zeros before the first. For
                factors and damping that have not changed since, the result must not either, bit
                for bit.

        Returns:
            The state, and a boolean ``[layers]``: which layers could not be decomposed.
        """

    @abstractmethod
    def staleness(
        self,
        block: BlockShape,
        factors: Mapping[str, Tensor],
        damping: Tensor,
        state: Mapping[str, Tensor],
    ) -> Tensor:
        """How wrong the inverse has become since it was made, for far less than a refresh.

            ‖M X V − V‖/‖V‖, the larger of both factors

        in the Frobenius norm, for the damped factor M of now, the inverse X of the one that the
        state was made from and a few random directions V that are always the same. Its square is
        ‖M X − I‖²/d on average.

        Args:
            block: Shape of each layer's block.
            factors: As in :meth:`refresh`.
            damping: λ per layer ``[layers]``.
            state: What :meth:`refresh` returned.

        Returns:
            ``[layers]``.
        """

    @abstractmethod
    def precondition(
        self, state: Mapping[str, Tensor], gradient: Tensor, damping: Tensor
    ) -> Tensor:
        """Apply the inverse to gradients ``[layers, groups, d_out, d_in]``.

        Args:
            state: What :meth:`refresh` returned, and the running averages by name.
            gradient: The gradients.
            damping: λ per layer ``[layers]``.
        """


def merge(
    old: dict[str, Tensor], new: Mapping[str, Tensor], kept: Tensor, members: Sequence[int]
) -> None:
    """Write new state into old, but where it is to be kept.

    Args:
        old: State of a bucket, ``[layers, ...]``.
        new: State of some of its layers, ``[len(members), ...]``.
        kept: Boolean ``[len(members)]``: whose old state stays.
        members: Which layers these are.
    """
    for key, tensor in new.items():
        mask = kept.view(-1, *[1] * (tensor.dim() - 1))
        for i, index in enumerate(members):
            old[key][index].copy_(torch.where(mask[i], old[key][index], tensor[i]))


def resolve(
    inverse: "InverseName | Inverse", strategies: Mapping[str, type[Inverse]], owner: str
) -> Inverse:
    """Turn the ``inverse=`` argument into a strategy object."""
    if isinstance(inverse, Inverse):
        return inverse
    if isinstance(inverse, str) and inverse in strategies:
        return strategies[inverse]()
    names = ", ".join(repr(name) for name in strategies)
    raise argument_error(
        owner, "inverse", f"one of {names} or a strategy object", inverse,
        "An object is made by a call: Eigen(), not Eigen.",
    )  # fmt: skip
