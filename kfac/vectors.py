"""Which vectors a Fisher pass sends, how many, and how the random ones are seeded."""

import hashlib
from collections.abc import Iterator, Sequence
from math import gcd

import torch
from torch import Tensor

from kfac.fisher import FisherType, Likelihood


class OutputVectors:
    """Vectors v at the model's output with Σ v vᵀ = Hessian of the summed loss.

    Args:
        likelihood: The loss.
        fisher: ``"mc"`` for sampled vectors, ``"type-2"`` for a root of the Hessian.
        num_samples: Vectors per pass of ``"mc"``.
        max_vectors: Upper limit to the vectors of a pass of ``"type-2"``.
        seed: Seeds the generator of the sampled labels, with the step and the rank.
        rank: Number of this process, whose labels are its own.

    Attributes:
        step: Number of completed steps.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        fisher: FisherType,
        *,
        num_samples: int,
        max_vectors: int,
        seed: int,
        rank: int,
    ) -> None:
        self.likelihood = likelihood
        self.fisher = fisher
        self.num_samples = num_samples
        self.max_vectors = max_vectors
        self.seed = seed
        self.rank = rank
        self.step = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def start_step(self, step: int) -> None:
        """Seed the labels of the step that follows ``step`` completed ones."""
        self.step = step
        self._generators.clear()

    def draw(
        self, output: Tensor, target: Tensor | None, batch_sizes: Sequence[int]
    ) -> Iterator[Tensor]:
        """The vectors of one pass, of the shape of ``output``.

        Args:
            output: What the criterion was called with, detached.
            target: Its target, if known.
            batch_sizes: Examples in each of the forwards that the output comes from.

        Raises:
            ValueError: If ``"type-2"`` needs more than ``max_vectors``.
        """
        if self.fisher == "mc":
            generator = self._generator(output.device)
            for _ in range(self.num_samples):
                vector = self.likelihood.sample(output, target, generator)
                yield self._checked("sample", vector, output) / self.num_samples**0.5
            return
        examples = _examples_in(output, batch_sizes)
        count = self.likelihood.num_vectors(output, examples)
        if count > self.max_vectors:
            raise ValueError(
                f"KFAC(max_vectors=...) must be >= {count}, the back-propagated vectors that "
                f"fisher='type-2' needs for an output of shape {tuple(output.shape)}, but got "
                f"{self.max_vectors}. Raise it, or use fisher='mc', which needs num_samples."
            )
        for vector in self.likelihood.vectors(output, target, examples):
            yield self._checked("vectors", vector, output)

    def _checked(self, method: str, vector: object, output: Tensor) -> Tensor:
        """A vector of a likelihood, which may be the user's own."""
        if isinstance(vector, Tensor) and vector.shape == output.shape:
            return vector
        given = tuple(vector.shape) if isinstance(vector, Tensor) else vector
        raise ValueError(
            f"{type(self.likelihood).__name__}.{method}() must give tensors of the output's shape "
            f"{tuple(output.shape)}, but gave {given!r}. See kfac.Likelihood."
        )

    def _generator(self, device: torch.device) -> torch.Generator:
        """The generator of this step's labels, apart from torch's own and different on every rank.

        Seeded anew in every step, so that a resumed run draws the same labels on any number of
        processes without a generator's state in the checkpoint.
        """
        if device not in self._generators:
            key = f"{self.seed}/{self.rank}/{self.step}".encode()
            seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest())
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]


def _examples_in(output: Tensor, batch_sizes: Sequence[int]) -> int:
    """Into how many examples the leading axis of the criterion's input falls.

    Outputs of several forwards may have been concatenated or combined element by element; the
    greatest common divisor is right for both, and merely costs more vectors for the former.
    """
    total = sum(batch_sizes)
    return total if len(output) == total else gcd(*batch_sizes)
