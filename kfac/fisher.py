"""From the loss function to the vectors that turn back-propagation into the Fisher matrix.

A likelihood describes a loss as a sum of *terms* divided by a *normaliser*. For curvature of the
mean loss, vectors v with Σ v vᵀ = Hessian of the **summed** loss with respect to the model's
output (exactly, or in expectation) are sent through the network, and what arrives at a layer is
divided by the normaliser. Neither the batch size nor a gradient scaler ever touches the vectors.

Source:
    Martens 2020, "New Insights and Perspectives on the Natural Gradient Method", sections 8-10
    (the Fisher of these likelihoods is the generalised Gauss-Newton matrix).
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from kfac.arguments import argument_error, check, one_of

FisherType = Literal["empirical", "mc", "type-2", "forward-only"]
LossReduction = Literal["mean", "sum"]


@runtime_checkable
class Likelihood(Protocol):
    """What ``criterion=`` has to provide; implement it for a loss of your own.

    ``target`` is None where the loss was computed by something that cannot be observed; raise an
    error that says so where the curvature depends on it. All vectors have the shape of ``output``.

    Optional: ``hessian_products(output, target, tangents)``, the matrix zᵢᵀ H zⱼ of some vectors z
    with the Hessian H of the summed loss; otherwise it is computed from :meth:`vectors`.
    """

    @property
    def reduction(self) -> LossReduction:
        """Whether the loss is the mean of its terms or their sum."""

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """What the sum of the loss terms is divided by to give the mean loss, a scalar."""

    def sample(self, output: Tensor, target: Tensor | None, generator: torch.Generator) -> Tensor:
        """One random v with E[v vᵀ] = Hessian of the summed loss, from labels that are sampled."""

    def num_vectors(self, output: Tensor, examples: int) -> int:
        """How many vectors :meth:`vectors` yields."""

    def vectors(self, output: Tensor, target: Tensor | None, examples: int) -> Iterator[Tensor]:
        """Vectors with Σ v vᵀ = Hessian of the summed loss within each of ``examples`` examples.

        No vector may touch two output positions of one example: a model may mix positions, and
        they would then arrive as one.
        """


class _TermwiseLikelihood:
    """A likelihood whose terms are rows ``[terms, classes]`` of the output, independent of others.

    Subclasses say how rows are had from the output and back, and give one row's Hessian root.
    """

    def __init__(self, criterion: nn.Module, loss_reduction: LossReduction | None) -> None:
        self.criterion = criterion
        self._loss_reduction = loss_reduction

    @property
    def reduction(self) -> LossReduction:
        """That of the criterion, or ``loss_reduction`` for an unreduced one."""
        declared = self.criterion.reduction
        return self._loss_reduction if declared == "none" else declared  # type: ignore[return-value]

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """The number of loss terms.

        Raises:
            ValueError: If target or weights would spread the output over more terms than it has.
        """
        self.check_shapes(output, target)
        terms = self.rows(output).shape[0]
        return output.new_full((), terms, dtype=_at_least_float32(output), requires_grad=False)

    def sample(self, output: Tensor, target: Tensor | None, generator: torch.Generator) -> Tensor:
        """Gradient of the summed loss at labels that are drawn from the model's distribution."""
        rows = self.rows(output).detach().to(_at_least_float32(output))
        scale = self.curvature_weights(output, target, rows).sqrt()
        return self.unrows(scale * self.sample_rows(rows, generator), output)

    def num_vectors(self, output: Tensor, examples: int) -> int:
        """Output positions of one example times classes."""
        terms, classes = self.rows(output).shape
        if terms % examples:
            raise ValueError(
                f"fisher='type-2' sends one vector per output element of an example, but the "
                f"{terms} loss terms are not a multiple of the batch size {examples}. "
                "Use fisher='mc', which samples every term by itself."
            )
        return terms // examples * classes

    def vectors(self, output: Tensor, target: Tensor | None, examples: int) -> Iterator[Tensor]:
        """One vector per output element of an example, for all examples at once."""
        rows = self.rows(output).detach().to(_at_least_float32(output))
        scale = self.curvature_weights(output, target, rows).sqrt()
        positions = len(rows) // examples
        for column in range(rows.shape[1]):
            root = (scale * self.root_column(rows, column)).view(examples, positions, -1)
            for position in range(positions):
                vector = torch.zeros_like(root)
                vector[:, position] = root[:, position]
                yield self.unrows(vector.flatten(0, 1), output)

    def hessian_products(
        self, output: Tensor, target: Tensor | None, tangents: Sequence[Tensor]
    ) -> Tensor:
        """zᵢᵀ H zⱼ of n vectors z of the output's shape, H the Hessian of the summed loss.

        Returns:
            ``[n, n]``, in float32 or better.
        """
        rows = self.rows(output).detach().to(_at_least_float32(output))
        scale = self.curvature_weights(output, target, rows).sqrt()
        roots = [scale * self.root_product(rows, self.rows(z).to(rows)) for z in tangents]
        stacked = torch.stack(roots).flatten(1)
        return stacked @ stacked.mT

    def check_shapes(self, output: Tensor, target: Tensor | None) -> None:
        """Refuse what torch's loss would broadcast; it refuses the rest itself."""

    def rows(self, output: Tensor) -> Tensor:
        """Arrange the output as ``[terms, classes]``, examples first."""
        return output.reshape(-1, 1)

    def unrows(self, rows: Tensor, output: Tensor) -> Tensor:
        """Undo :meth:`rows`, in the output's own dtype."""
        return rows.reshape(output.shape).to(output.dtype)

    def curvature_weights(self, output: Tensor, target: Tensor | None, rows: Tensor) -> Tensor:
        """What multiplies each term's Hessian beyond the plain likelihood, ``[terms, 1]``."""
        return torch.ones_like(rows[:, :1])

    def sample_rows(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Random rows v with E[v vᵀ] = Hessian of each plain term, ``[terms, classes]``."""
        raise NotImplementedError

    def root_column(self, rows: Tensor, column: int) -> Tensor:
        """Column of a root of each plain term's Hessian, ``[terms, classes]``."""
        raise NotImplementedError

    def root_product(self, rows: Tensor, tangents: Tensor) -> Tensor:
        """Rᵀz of each plain term, with R of :meth:`root_column`, ``[terms, classes]``."""
        raise NotImplementedError

    def _need_target(self, target: Tensor | None, reason: str) -> Tensor:
        if target is None:
            raise ValueError(
                f"The Fisher of {type(self.criterion).__name__} with {reason} depends on the "
                "targets, which are seen only when the criterion object itself is called. "
                "Compute the loss as criterion(output, target), not by a function."
            )
        return target


class CrossEntropy(_TermwiseLikelihood):
    """Categorical likelihood of :class:`torch.nn.CrossEntropyLoss`.

    A term's Hessian is s·(diag p − p pᵀ), where s is the total weight of its target distribution:
    class weights, label smoothing, ``ignore_index`` and class probabilities as targets enter
    through s. The normaliser is torch's own: the sum of the targets' weights, or the number of
    terms where targets are probabilities.
    """

    criterion: nn.CrossEntropyLoss

    def rows(self, output: Tensor) -> Tensor:
        """Classes are the second axis (the first of an unbatched output)."""
        return output.movedim(_class_axis(output), -1).reshape(-1, self._classes(output))

    def unrows(self, rows: Tensor, output: Tensor) -> Tensor:
        """Move the classes back to their axis."""
        axis = _class_axis(output)
        moved = rows.reshape(output.movedim(axis, -1).shape)
        return moved.movedim(-1, axis).to(output.dtype)

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Σ of the targets' class weights without ignored terms; else the number of terms."""
        plain = super().normalizer(output, target)
        if self.criterion.reduction == "none" or (target is None and self._weight is None):
            return plain
        target = self._need_target(target, "class weights")
        if target.is_floating_point():
            return plain
        return self._target_weights(target).sum().to(plain.dtype)

    def curvature_weights(self, output: Tensor, target: Tensor | None, rows: Tensor) -> Tensor:
        """Total weight of each term's target distribution."""
        if target is None:
            if self._weight is not None:
                self._need_target(target, "class weights")
            return torch.ones_like(rows[:, :1])
        weight = rows.new_ones(rows.shape[1]) if self._weight is None else self._weight.to(rows)
        smoothing = self.criterion.label_smoothing
        if target.is_floating_point():
            probabilities = self.rows(target.to(rows))
            smoothed = (1 - smoothing) * probabilities + smoothing / rows.shape[1]
            return (smoothed * weight).sum(1, keepdim=True)
        hard = self._target_weights(target).flatten().to(rows)
        counted = (target.flatten() != self.criterion.ignore_index).to(rows)
        total = (1 - smoothing) * hard + smoothing * weight.mean() * counted
        return total.unsqueeze(1)

    def sample_rows(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """``p - onehot(label)`` with the label drawn from p.

        By inversion of the distribution function: unlike ``torch.multinomial`` it neither raises on
        NaN nor synchronises, so a bad batch reaches the check that drops it.
        """
        p = rows.softmax(1)
        uniform = torch.rand(
            len(rows), 1, generator=generator, dtype=rows.dtype, device=rows.device
        )
        cumulative = p.cumsum(1)
        labels = (cumulative <= uniform * cumulative[:, -1:]).sum(1).clamp(max=p.shape[1] - 1)
        return p.scatter_add(1, labels.unsqueeze(1), -torch.ones_like(uniform))

    def root_column(self, rows: Tensor, column: int) -> Tensor:
        """√p_c (e_c − p): Σ_c of the outer products is diag p − p pᵀ."""
        p = rows.softmax(1)
        root = -p
        root[:, column] += 1
        return root * p[:, column : column + 1].sqrt()

    def root_product(self, rows: Tensor, tangents: Tensor) -> Tensor:
        """√p_c (z_c − pᵀz)."""
        p = rows.softmax(1)
        return p.sqrt() * (tangents - (p * tangents).sum(1, keepdim=True))

    def _classes(self, output: Tensor) -> int:
        return output.shape[_class_axis(output)]

    @property
    def _weight(self) -> Tensor | None:
        return self.criterion.weight

    def _target_weights(self, target: Tensor) -> Tensor:
        counted = target != self.criterion.ignore_index
        if self._weight is None:
            return counted.to(torch.float32)
        return torch.where(counted, self._weight[torch.where(counted, target, 0)], 0.0)


class Bernoulli(_TermwiseLikelihood):
    """Independent binary likelihoods of :class:`torch.nn.BCEWithLogitsLoss`.

    A term's Hessian is w·(pos_weight·y + 1 − y)·σ(1 − σ) for the target y and the weight w.
    """

    criterion: nn.BCEWithLogitsLoss

    def check_shapes(self, output: Tensor, target: Tensor | None) -> None:
        """``weight`` and ``pos_weight`` have one element for every output, or for several."""
        for name in ("weight", "pos_weight"):
            _check_spread("BCEWithLogitsLoss", name, getattr(self.criterion, name), output)

    def curvature_weights(self, output: Tensor, target: Tensor | None, rows: Tensor) -> Tensor:
        """``weight`` and, through the target, ``pos_weight``."""
        total = torch.ones_like(output, dtype=rows.dtype)
        if self.criterion.pos_weight is not None:
            y = self._need_target(target, "pos_weight").to(rows)
            total = total * (self.criterion.pos_weight.to(rows) * y + 1 - y)
        if self.criterion.weight is not None:
            total = total * self.criterion.weight.to(rows)
        return total.reshape(-1, 1)

    def sample_rows(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """σ − label with the label drawn from σ."""
        p = rows.sigmoid()
        uniform = torch.rand(rows.shape, generator=generator, dtype=rows.dtype, device=rows.device)
        return p - (uniform < p).to(rows)

    def root_column(self, rows: Tensor, column: int) -> Tensor:
        """√(σ(1 − σ))."""
        return (rows.sigmoid() * (-rows).sigmoid()).sqrt()

    def root_product(self, rows: Tensor, tangents: Tensor) -> Tensor:
        """√(σ(1 − σ)) z."""
        return self.root_column(rows, 0) * tangents


class Gaussian(_TermwiseLikelihood):
    """Gaussian likelihood with variance ½ of :class:`torch.nn.MSELoss`; a term's Hessian is 2."""

    criterion: nn.MSELoss

    def check_shapes(self, output: Tensor, target: Tensor | None) -> None:
        """The target has one element for every output, or for several."""
        _check_spread("MSELoss", "target", target, output)

    def sample_rows(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """2·(output − label) with the label drawn from N(output, ½)."""
        noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype, device=rows.device)
        return noise * 2**0.5

    def root_column(self, rows: Tensor, column: int) -> Tensor:
        """√2."""
        return torch.full_like(rows, 2**0.5)

    def root_product(self, rows: Tensor, tangents: Tensor) -> Tensor:
        """√2 z."""
        return 2**0.5 * tangents


def _check_spread(owner: str, argument: str, given: Tensor | None, output: Tensor) -> None:
    """Refuse a tensor that, combined with the output, gives more elements than the output has."""
    if given is None:
        return
    sizes = zip(reversed(given.shape), reversed(output.shape), strict=False)
    if given.dim() > output.dim() or any(mine not in (1, theirs) for mine, theirs in sizes):
        raise argument_error(
            owner, argument, f"of a shape that broadcasts to {tuple(output.shape)}, the output's",
            tuple(given.shape),
            "The loss would have other terms than the output; reshape one of them, for example by "
            "target.view_as(output).",
        )  # fmt: skip


_LIKELIHOODS: dict[type[nn.Module], type[_TermwiseLikelihood]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.BCEWithLogitsLoss: Bernoulli,
    nn.MSELoss: Gaussian,
}


def checked_fisher(owner: str, fisher: FisherType | None, criterion: object) -> FisherType:
    """Return the Fisher matrix that a ``fisher=`` argument stands for.

    Raises:
        ValueError: If there is none of this name, or it needs a criterion and has none.
    """
    if fisher is None:
        return "empirical" if criterion is None else "mc"
    check(owner, "fisher", fisher, one_of(get_args(FisherType)), "Leave it out for the default.")
    if criterion is None and fisher in ("mc", "type-2"):
        raise argument_error(
            owner, "fisher", "'empirical' or 'forward-only' without a criterion", fisher,
            "Pass criterion=, the loss module that the training loop calls.",
        )  # fmt: skip
    return fisher


def likelihood_of(
    criterion: object, loss_reduction: LossReduction | None, owner: str
) -> Likelihood:
    """Return the likelihood that a ``criterion=`` argument stands for.

    Args:
        criterion: A supported loss module (its exact type), or an object with the
            :class:`Likelihood` protocol.
        loss_reduction: How an unreduced loss is reduced afterwards.
        owner: Class name for error messages.

    Raises:
        ValueError: If the criterion is of another kind or the two reductions disagree.
    """
    likelihood_type = _LIKELIHOODS.get(type(criterion))  # type: ignore[arg-type]
    is_protocol = isinstance(criterion, Likelihood) and not isinstance(criterion, type)
    if likelihood_type is None and not is_protocol:
        names = ", ".join(f"nn.{module_type.__name__}" for module_type in _LIKELIHOODS)
        raise argument_error(
            owner, "criterion", f"one of {names} or an object with the Likelihood protocol",
            criterion, "Leave it out to train with the empirical Fisher, which suits any loss.",
        )  # fmt: skip
    kind = type(criterion).__name__
    declared = criterion.reduction  # type: ignore[attr-defined]
    # Only of the losses above is it known what they are before their reduction.
    choices = ("mean", "sum", "none") if likelihood_type is not None else ("mean", "sum")
    check(
        kind,
        "reduction",
        declared,
        one_of(choices),
        "Let it be that of the loss in the training loop.",
    )
    for name in ("weight", "pos_weight"):
        weight = getattr(criterion, name, None) if likelihood_type is not None else None
        if weight is not None and not (weight.isfinite() & (weight >= 0)).all():
            raise argument_error(
                kind, name, "finite and >= 0 everywhere", weight,
                "A loss of negative weight has no Fisher matrix.",
            )  # fmt: skip
    if declared == "none" and loss_reduction is None:
        raise argument_error(
            kind, "reduction", "'mean' or 'sum'", declared,
            "Say with loss_reduction= how the unreduced loss is reduced afterwards.",
        )  # fmt: skip
    if declared != "none" and loss_reduction not in (None, declared):
        raise argument_error(
            owner, "loss_reduction", f"the criterion's own reduction {declared!r}", loss_reduction,
            "Leave it out: it is read from the criterion.",
        )  # fmt: skip
    if likelihood_type is None:
        return cast(Likelihood, criterion)
    return likelihood_type(cast(nn.Module, criterion), loss_reduction)


def empirical_scale(
    terms: Tensor, reduction: LossReduction, gradient_scale: Tensor | float
) -> Tensor:
    """What turns Σ g gᵀ of the gradients that autograd delivered into G of the mean loss.

    With b = ∂ℓₙ/∂s the gradient of one example's loss, G = (1/N) Σ b bᵀ. Autograd delivers
    g = S·b/N for a mean loss and g = S·b for a summed one, S being the gradient scaler's factor.

    Args:
        terms: N, the loss terms since the last step, a scalar tensor.
        reduction: Whether the loss is the mean or the sum of its terms.
        gradient_scale: S.
    """
    per_term = terms if reduction == "mean" else terms.reciprocal()
    return per_term / gradient_scale**2


def _class_axis(output: Tensor) -> int:
    return 0 if output.dim() == 1 else 1


def _at_least_float32(output: Tensor) -> torch.dtype:
    return torch.promote_types(output.dtype, torch.float32)
