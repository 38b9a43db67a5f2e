"""Products dᵢᵀ F dⱼ with the exact Fisher matrix of a step's batch, for a few directions.

F is the generalised Gauss-Newton matrix JᵀHJ of the mean loss: J the Jacobian of the model's output
by all parameters at once, H the Hessian of the loss with respect to that output. Nothing is
approximated by layers or Kronecker products here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfac.fisher import Likelihood
from kfac.jacobian_products import Direction, JacobianProducts
from kfac.recorder import RecordedCall, RecordedLoss


class FisherProducts:
    """dᵢᵀ F dⱼ = (1/Z) Σ (J dᵢ)ᵀ H (J dⱼ), summed over recorded calls of a model.

    Args:
        model: The module without wrappers.
        likelihood: The loss.

    Attributes:
        jacobian: How J d is computed.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood) -> None:
        self.jacobian = JacobianProducts(model)
        self._likelihood = likelihood

    @torch.no_grad()
    def __call__(
        self,
        calls: Sequence[RecordedCall],
        directions: Sequence[Direction],
        normalizer: Tensor | float,
        fraction: float = 1.0,
    ) -> Tensor:
        """The matrix of products.

        Args:
            calls: The micro-batches since the last step.
            directions: n directions d, by parameter; the parameters that are left out do not move.
            normalizer: Z, by which the sum of all loss terms is divided to give the mean loss.
            fraction: Estimate the matrix from so many of each call's examples, the first ones.

        Returns:
            ``[n, n]``, float64.

        Raises:
            RuntimeError: If the model can be differentiated neither in forward mode nor twice in
                reverse mode, or if an argument or target was modified in place since the call.

        Cost:
            A forward pass, and for every direction two more in forward mode, or up to three times a
            forward and a backward pass with double backward; the first time a forward and a
            backward pass more. In forward mode with several directions, the outputs of
            convolutions, linear layers and BatchNorm are kept from the first to the last. No
            gradient, buffer or generator of random numbers is touched.

        Source:
            Martens & Grosse 2015, section 7; Martens 2020, section 8.
        """
        total: Tensor | float = 0.0
        for call in calls:
            share = 1.0
            if fraction < 1 and self.jacobian.is_checked:
                call, share = call.part(fraction)
            tangents = self.jacobian(call, directions)
            for index, loss in enumerate(call.losses):
                along = [of_direction[index] for of_direction in tangents]
                total = total + self._through_loss(loss, along).double() * (loss.share / share)
        assert isinstance(total, Tensor), "there are no recorded calls"
        return total / torch.as_tensor(normalizer).to(total)

    def _through_loss(self, loss: RecordedLoss, tangents: Sequence[Tensor]) -> Tensor:
        target = None if loss.target is None else loss.target.get()
        with torch.autocast(tangents[0].device.type, enabled=False):
            return hessian_products(
                self._likelihood, loss.output.get(), target, tangents, loss.examples
            )


def hessian_products(
    likelihood: Likelihood,
    output: Tensor,
    target: Tensor | None,
    tangents: Sequence[Tensor],
    examples: int,
) -> Tensor:
    """zᵢᵀ H zⱼ, H the Hessian of the summed loss with respect to the output.

    Args:
        likelihood: The loss. If it has no ``hessian_products(output, target, tangents)`` of its
            own, H is built from all of its vectors, example by example.
        output: What the loss is computed from, examples first.
        target: Its target, if known.
        tangents: n vectors z of the output's shape.
        examples: Number of examples.

    Returns:
        ``[n, n]``, in float32 or better.
    """
    own = getattr(likelihood, "hessian_products", None)
    if own is not None:
        products: Tensor = own(output, target, tangents)
        return products
    if output.dim() == 0 or len(output) % examples:
        examples = 1
    precise = torch.promote_types(output.dtype, torch.float32)
    z = torch.stack([tangent.to(precise).reshape(examples, -1) for tangent in tangents])
    total = z.new_zeros(len(z), len(z))
    for vector in likelihood.vectors(output, target, examples):
        along = (z * vector.to(precise).reshape(examples, -1)).sum(-1)
        total += along @ along.mT
    return total
