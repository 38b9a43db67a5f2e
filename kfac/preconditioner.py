"""The engine: from backward passes to preconditioned gradients, without the update."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac import checkpoint
from kfac.arguments import (
    BOOLEAN,
    FRACTION,
    INTEGER,
    NON_NEGATIVE_INTEGER,
    POSITIVE,
    POSITIVE_INTEGER,
    UNIT_INTERVAL,
    Constraint,
    argument_error,
    check,
    one_of,
)
from kfac.calls import (
    LOSS_TERMS,
    OUTPUTS,
    POSITION_MASK,
    CallReader,
    OutputSelector,
    PositionMask,
)
from kfac.capture import Capture
from kfac.curvature import Curvature
from kfac.distributed.communication import Ranks
from kfac.fisher import (
    FisherType,
    Likelihood,
    LossReduction,
    checked_fisher,
    empirical_scale,
    likelihood_of,
)
from kfac.hooks import ModuleHook
from kfac.inverse import STRATEGIES, Inverse, InverseName, resolve
from kfac.kronecker import CurvatureBlocks, KroneckerBlock
from kfac.layers import Layer
from kfac.param_groups import SKIP, SharingRule, Skip, find_layers
from kfac.schedules import Scheduled
from kfac.summary import Summary, summarize
from kfac.trainable import checked_params, refuse_meta, refuse_strangers
from kfac.update import all_finite
from kfac.vectors import OutputVectors

Period = int | Callable[[int], int]
Damping = float | Callable[[int], float]

_GRAD_SCALER = Constraint(
    "a torch.amp.GradScaler or None",
    lambda v: v is None or (hasattr(v, "get_scale") and hasattr(v, "is_enabled")),
)
_TOLERANCE = Constraint("a finite number > 0 or None", lambda v: v is None or POSITIVE.accepts(v))


_COUNTS = {
    "captures_next": BOOLEAN,
    **dict.fromkeys(
        ("steps", "burned_in", "dropped_statistics", "nonfinite_batches"), NON_NEGATIVE_INTEGER
    ),
}
_NO_SEED = Constraint("None with this fisher", lambda v: v is None)
_STATE_KEYS = ("version", "fisher", "seed", "inverse", "counters", "layers", *_COUNTS)


class StepPlan(NamedTuple):
    """What the schedules say of a step: whose inverses to refresh, statistics for the next."""

    refresh: frozenset[str]
    capture_next: bool


class Preconditioner:
    """Replaces gradients by K-FAC's preconditioned gradients, for use before any optimizer.

    Block by block, Δ = (F + λI)⁻¹ g with F ≈ A ⊗ G: A is the second moment of a layer's inputs, G
    that of the gradients of its outputs, both averaged over steps.

        preconditioner = Preconditioner(model, criterion=criterion, damping=1e-2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...
        loss.backward()
        preconditioner.step()
        optimizer.step()

    There is no trust region here, since it depends on the learning rate: see :class:`kfac.KFAC`.

    Args:
        model: The outermost module that is called (after wrapping or compiling).
        params: The parameters that are trained; all of the model's by default. Layers whose weight
            is not among them are left alone.
        damping: λ > 0, or a function of the number of completed steps; in units of the Fisher.
        criterion: The loss module that the training loop calls (``nn.CrossEntropyLoss``,
            ``nn.BCEWithLogitsLoss``, ``nn.MSELoss``) or an object with the
            :class:`kfac.Likelihood` protocol.
        outputs: Picks the tensor that the loss is computed from out of the model's output (key,
            index or function); needed where that is not a tensor and the criterion object is not
            called.
        fisher: ``"mc"`` (labels sampled from the model; default with a criterion), ``"type-2"``
            (exact), ``"empirical"`` (the user's own backward pass; default without a criterion)
            or ``"forward-only"`` (G = I).
        num_samples: Vectors per batch for ``"mc"``.
        max_vectors: Upper limit to the vectors per batch for ``"type-2"``.
        loss_reduction: ``"mean"`` or ``"sum"``; read from ``criterion`` where there is one.
        loss_terms: Number of terms in a batch's loss, or a function of the model's arguments that
            returns it; the batch size by default. Not used with a criterion.
        position_mask: Which positions of a batch are real and not padding: the name of an argument
            of the model, or a function of its arguments, ``[N, T]`` with 0 for padding. Inputs of
            padded positions then stay out of A.
        weight_sharing: ``"expand"``, ``"reduce"`` or a function of name and module.
        inverse: ``"cholesky"`` (factored damping), ``"eigen"`` (exact damping), ``"ekfac"`` (exact
            damping, measured eigenvalues), ``"newton-schulz"`` (factored damping by matrix
            products), ``"inverse-free"`` (a root of that inverse, updated) or a strategy.
        factor_decay: β in [0, 1) of the running averages of A and G.
        factor_fraction: Share of a batch's examples (the first ones, one at least) that A, G and
            the second moments of ``"ekfac"`` are estimated from, in (0, 1]. Where a layer's
            leading axis does not tell the examples, all of its rows are used.
        factor_update_period: Steps between updates of the factors, or a function of the step.
        inverse_update_period: Steps between refreshes of the inverses, or a function of the step.
        stagger_refreshes: Spread the layers' refreshes over the period, so that no step has to wait
            for all of them.
        refresh_tolerance: Skip a refresh that is due where the inverse is off by no more than this,
            ‖M X V − V‖ ≤ tolerance·‖V‖ for each damped factor M of now, its last inverse X and some
            random directions V. None to skip none. See :meth:`kfac.inverse.Inverse.staleness`.
        grad_scaler: The ``GradScaler`` in use, needed where ``unscale_`` is called before
            ``step()`` and the Fisher is empirical.
        skip: Names, globs or types of modules to leave out.
        max_factor_dim: A factor larger than this keeps up to 32 equal blocks on its diagonal, none
            larger than this; one that would need more keeps its diagonal only.
        seed: Seeds the generator of the sampled labels.
        owner: Class name in error messages.
        records_calls: Whether the model's calls are kept until the step, to be made again.

    Raises:
        ValueError: If an argument violates its constraint; the message says which and what to do.

    Source:
        Martens & Grosse 2015; Grosse & Martens 2016; Eschenhagen et al. 2023.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter] | None = None,
        *,
        damping: Damping = 0.1,
        criterion: nn.Module | Likelihood | None = None,
        outputs: OutputSelector | None = None,
        fisher: FisherType | None = None,
        num_samples: int = 1,
        max_vectors: int = 1024,
        loss_reduction: LossReduction | None = None,
        loss_terms: int | Callable[..., int] | None = None,
        position_mask: PositionMask | None = None,
        weight_sharing: SharingRule = "expand",
        inverse: InverseName | Inverse = "cholesky",
        factor_decay: float = 0.95,
        factor_fraction: float = 1.0,
        factor_update_period: Period = 10,
        inverse_update_period: Period = 100,
        stagger_refreshes: bool = True,
        refresh_tolerance: float | None = None,
        grad_scaler: Any = None,
        skip: Sequence[Skip] = (),
        max_factor_dim: int = 1024,
        seed: int = 0,
        owner: str = "Preconditioner",
        records_calls: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise argument_error(
                owner, "model", "a torch.nn.Module", model, f"Pass {owner}(model)."
            )
        for argument, value, constraint, remedy in (
            (
                "outputs",
                outputs,
                OUTPUTS,
                "It picks the tensor of the loss out of the model's output.",
            ),
            ("num_samples", num_samples, POSITIVE_INTEGER, "The default is 1."),
            ("max_vectors", max_vectors, POSITIVE_INTEGER, "The default is 1024."),
            (
                "loss_reduction",
                loss_reduction,
                one_of(["mean", "sum", None]),
                "Leave it out for a mean.",
            ),
            ("loss_terms", loss_terms, LOSS_TERMS, "Leave it out for the batch size."),
            (
                "position_mask",
                position_mask,
                POSITION_MASK,
                "A mask itself differs from batch to batch.",
            ),
            ("factor_decay", factor_decay, UNIT_INTERVAL, "The default is 0.95."),
            ("factor_fraction", factor_fraction, FRACTION, "Pass 1 for whole batches."),
            ("stagger_refreshes", stagger_refreshes, BOOLEAN, "The default is True."),
            ("refresh_tolerance", refresh_tolerance, _TOLERANCE, "Pass None to skip no refresh."),
            ("grad_scaler", grad_scaler, _GRAD_SCALER, "Pass the object that scales the loss."),
            ("skip", skip, SKIP, "A single entry still goes into a tuple."),
            ("max_factor_dim", max_factor_dim, POSITIVE_INTEGER, "The default is 1024."),
            ("seed", seed, INTEGER, "The default is 0."),
        ):
            check(owner, argument, value, constraint, remedy)
        self.damping = Scheduled(owner, "damping", damping, POSITIVE)
        self.factor_update_period = Scheduled(
            owner, "factor_update_period", factor_update_period, POSITIVE_INTEGER
        )
        self.inverse_update_period = Scheduled(
            owner, "inverse_update_period", inverse_update_period, POSITIVE_INTEGER
        )
        self.factor_decay = factor_decay
        self.stagger_refreshes = stagger_refreshes
        self.refresh_tolerance = refresh_tolerance
        self.grad_scaler = grad_scaler
        self.inverse = resolve(inverse, STRATEGIES, owner)
        self.likelihood = (
            None if criterion is None else likelihood_of(criterion, loss_reduction, owner)
        )
        self.fisher = checked_fisher(owner, fisher, criterion)
        if self.inverse.has_second_moments and self.fisher == "forward-only":
            raise argument_error(
                owner, "inverse", f"{_without_second_moments()} with fisher='forward-only'",
                self.inverse.name, "There are no output gradients to measure eigenvalues with.",
            )  # fmt: skip
        _refuse_unused(owner, criterion, self.fisher, outputs, loss_terms, num_samples)
        self.loss_reduction: LossReduction = (
            self.likelihood.reduction if self.likelihood else loss_reduction or "mean"
        )
        self.model = model
        self.ranks = Ranks.of(model)
        self._given_params = params
        self._finding: dict[str, Any] = {
            "owner": owner,
            "skip": skip,
            "weight_sharing": weight_sharing,
            "max_factor_dim": max_factor_dim,
            "identity_g": self.fisher == "forward-only",
        }
        self.params = self._checked_params(params)
        refuse_strangers(owner, model, self.params)
        self.layers, self._reasons = find_layers(model, self.params, **self._finding)
        self.blocks = Curvature(self.layers, self.inverse, refresh_tolerance)
        self.steps = 0
        self.burned_in = 0
        self._dropped = torch.zeros((), dtype=torch.int64, device=self.params[0].device)
        self._nonfinite = torch.zeros_like(self._dropped)
        self._vectors = None
        if self.likelihood is not None and self.fisher in ("mc", "type-2"):
            self._vectors = OutputVectors(
                self.likelihood,
                self.fisher,
                num_samples=num_samples,
                max_vectors=max_vectors,
                seed=int(seed),
                rank=self.ranks.rank,
            )
        self._watching: dict[str, Any] = {
            "fisher": self.fisher,
            "likelihood": self.likelihood,
            "criterion": criterion,
            "reader": CallReader(
                model,
                outputs=outputs,
                loss_terms=loss_terms,
                position_mask=position_mask,
                owner=owner,
            ),
            "fraction": factor_fraction,
            "vectors": self._vectors,
            "records_calls": records_calls,
        }
        self.capture = self._watch()
        self._joining = model.register_forward_pre_hook(ModuleHook(model, self._join))

    def _join(self, _: tuple[Any, ...]) -> None:
        """Belong to the processes over which a wrapper averages that was put on the model later."""
        if self.ranks.size > 1:
            return
        self.ranks = Ranks.of_call()
        if self._vectors is not None:
            self._vectors.rank = self.ranks.rank

    def _checked_params(self, params: Sequence[nn.Parameter] | None) -> list[nn.Parameter]:
        return checked_params(self._finding["owner"], self.model, params)

    def _watch(self) -> Capture:
        """Put the hooks for the present layers on the model."""
        bases = self.blocks.basis if self.inverse.has_second_moments else None
        return Capture(
            self.model, self.layers, self.blocks.accumulate,
            forget=self.blocks.discard, bases=bases, **self._watching,
        )  # fmt: skip

    def layers_among(self, params: Sequence[nn.Parameter] | None) -> list[Layer]:
        """The layers that :meth:`update_layers` would find; changes nothing."""
        return find_layers(self.model, self._checked_params(params), **self._finding)[0]

    def update_layers(self, params: Sequence[nn.Parameter] | None = None) -> None:
        """Follow a model whose modules were added, removed, replaced, frozen or unfrozen.

        Call it between two steps. Layers whose weight is still the same parameter keep their
        factors and inverses, new layers start without, and the next backward pass updates the
        factors of all. Statistics of an unfinished step are forgotten.

        Args:
            params: The parameters that are trained from now on; by default what was passed at
                construction, or all of the model's if nothing was.

        Raises:
            ValueError: If an entry of ``skip`` matches nothing any more, or no parameter is left to
                train; nothing has changed then.
        """
        params = self._checked_params(self._given_params if params is None else params)
        layers, reasons = find_layers(self.model, params, **self._finding)
        blocks = Curvature(layers, self.inverse, self.refresh_tolerance)
        blocks.adopt(self.blocks)
        self.capture.remove()
        self.params, self.layers, self._reasons, self.blocks = params, layers, reasons, blocks
        self.capture = self._watch()
        self.capture.end_step(self._turn)

    # --- one step, in the order in which it happens --------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Replace ``.grad`` of every layer under K-FAC by its preconditioned gradient.

        Under a summed loss the other gradients become those of the mean loss, for one scale of all.
        A batch with a gradient that is not finite leaves everything as it was.

        Raises:
            RuntimeError: If a factor update is due and no statistics could be collected.
        """
        refuse_meta(self._finding["owner"], self.params)
        with torch.autocast(self.params[0].device.type, enabled=False):
            try:
                self._precondition()
            except BaseException:
                self.discard()  # the batch is given up
                raise

    def _precondition(self) -> None:
        scale = float(self.grad_scaler.get_scale()) if self.scaler_is_enabled else 1.0
        plan = self.plan()
        gradients = self.mean_gradients(1.0)
        finite = all_finite(list(gradients.values()))
        damping = dict.fromkeys(self.blocks.layers, self.damping.at(self.steps))
        self.update_factors(finite, scale)
        self.blocks.refresh(damping, plan.refresh)
        exact = self.blocks.precondition(gradients, damping).by_parameter()
        directions = {p: d.to(p.dtype) for p, d in exact.items()}
        accept = finite & all_finite(list(directions.values()))
        for parameter, gradient in gradients.items():
            assert parameter.grad is not None
            direction = directions.get(parameter, gradient)
            parameter.grad.copy_(torch.where(accept, direction, parameter.grad))
        self.advance(plan, accept)

    def plan(self) -> StepPlan:
        """Read the schedules before anything changes, so that a bad value fails harmlessly."""
        return StepPlan(
            refresh=self.blocks.due(
                self.steps,
                self.inverse_update_period.at(self.steps),
                staggered=self.stagger_refreshes,
            ),
            capture_next=self._factors_due(self.steps + 1),
        )

    def _factors_due(self, step: int) -> bool:
        return step % self.factor_update_period.at(step) == 0

    @property
    def scaler_is_enabled(self) -> bool:
        """Whether there is a gradient scaler and it scales."""
        return self.grad_scaler is not None and self.grad_scaler.is_enabled()

    def mean_gradients(self, gradient_scale: Tensor | float) -> dict[nn.Parameter, Tensor]:
        """Gradients of the mean loss, free of the scaler's factor; ``.grad`` is not changed."""
        gradients = {p: p.grad for p in self.params if p.grad is not None}
        if any(gradient.is_sparse for gradient in gradients.values()):
            raise RuntimeError(
                "K-FAC does not take sparse gradients. Construct the embedding with sparse=False, "
                "or train it with another optimizer by leaving it out of params=."
            )
        divisor = gradient_scale
        if self.loss_reduction == "sum" and gradients:
            divisor = divisor * self.mean_loss_terms()
        if not isinstance(divisor, Tensor) and divisor == 1.0:
            return gradients
        return {p: g / torch.as_tensor(divisor).to(g) for p, g in gradients.items()}

    def update_factors(self, accept: Tensor, gradient_scale: Tensor | float) -> None:
        """Fold the statistics of the batch into the running averages, if an update is due.

        Args:
            accept: Boolean scalar tensor; False drops the batch.
            gradient_scale: The gradient scaler's factor on the gradients that the hooks saw.
        """
        if self.capture.active:
            self._fold_statistics(accept, gradient_scale)

    def _fold_statistics(self, accept: Tensor, gradient_scale: Tensor | float) -> None:
        self.capture.statistics.flush()
        if self._mask_misfits():
            raise argument_error(
                self._finding["owner"], "position_mask", "[N, T] like the input of a layer",
                "a mask that no layer's input has the shape of",
                "Pass a function of the model's arguments that returns one of that shape.",
            )  # fmt: skip
        pending = self.blocks.has_pending
        if pending or self.ranks.size > 1:
            g_scale = self._g_scale(gradient_scale) if pending else torch.ones(())
            dropped = self.blocks.fold(self.factor_decay, g_scale, accept, self.ranks)
            self._dropped = self._dropped.to(dropped.device) + dropped
        else:
            self._explain_missing_statistics()

    def _mask_misfits(self) -> bool:
        """Whether a mask fits no layer; the same in all processes, so that none waits."""
        misfits = self.capture.statistics.mask_fits is False
        if self.ranks.size == 1 or not self._watching["reader"].masks:
            return misfits
        count = torch.tensor([misfits], dtype=torch.int64, device=self.params[0].device)
        self.ranks.sum_([count])
        return int(count) > 0

    def _g_scale(self, gradient_scale: Tensor | float) -> Tensor:
        """What turns the pending sum of G into that of the mean loss."""
        if self.fisher == "forward-only":
            return torch.ones(())
        if self.fisher == "empirical":
            return empirical_scale(self._loss_terms(), self.loss_reduction, gradient_scale)
        return self._loss_terms().reciprocal()

    def mean_loss_terms(self) -> Tensor:
        """Loss terms per process, which averaged gradients of a summed loss are divided by."""
        terms = self._loss_terms().clone()
        if self.ranks.size > 1:
            terms = terms.to(self.params[0].device)
            self.ranks.sum_([terms])
        return terms / self.ranks.size

    def _loss_terms(self) -> Tensor:
        terms = self.capture.terms
        if not isinstance(terms, Tensor) and terms == 0:
            raise RuntimeError(
                "No loss terms were counted since the last step. Call the model that K-FAC was "
                "given (not one of its parts) and, where there is one, the criterion object; or "
                "pass loss_terms=." + self.why_missing
            )
        return terms if isinstance(terms, Tensor) else torch.tensor(terms, dtype=torch.float64)

    def _explain_missing_statistics(self) -> None:
        if all(layer.weight.parameter.grad is None for layer in self.layers):
            return
        remedy = "."
        if self.capture.needs_pass:
            remedy = (
                " and compute the loss with the criterion object that K-FAC was given, or pass "
                "outputs= to pick the loss's input out of the model's output."
            )
        raise RuntimeError(
            "A factor update is due, but no statistics were collected since the last step. Call "
            "the model that K-FAC was given, with gradients enabled" + remedy + self.why_missing
        )

    @property
    def why_missing(self) -> str:
        """What is known of backward passes that were not counted, as a further sentence."""
        return self.capture.missing and f" {self.capture.missing}"

    @property
    def _turn(self) -> int:
        """Seeds the next labels: no two steps have the same, those before the first included."""
        return self.steps or -self.burned_in

    def _end_step(self, accept: Tensor) -> None:
        self._nonfinite = self._nonfinite.to(accept.device) + ~accept
        self.capture.end_step(self._turn)
        self.blocks.discard()

    def advance_burn_in(self, accept: Tensor) -> None:
        """Count a step before the first, which has only updated the factors, as the next one will.

        There is no schedule to follow: an update of the factors is always due in the first step.
        """
        self.burned_in += 1
        self._end_step(accept)

    def advance(self, plan: StepPlan, accept: Tensor) -> None:
        """Count a completed step, and whether it was accepted."""
        self.steps += 1
        self._end_step(accept)
        self.capture.schedule(active=plan.capture_next or self.blocks.is_waiting)

    def discard(self) -> None:
        """Forget the statistics that were collected since the last step."""
        self.capture.discard()
        self.blocks.discard()

    def zero_grad(self) -> None:
        """Forget the statistics of a batch that is given up; call it beside the optimizer's own."""
        self.discard()

    # --- reports -------------------------------------------------------------------------------

    def factor(self, layer: str) -> tuple[Tensor | None, Tensor | None]:
        """Copies of a layer's running averages, A ``[groups, d_in, d_in]`` and G likewise.

        A diagonal factor has one dimension fewer; one of blocks on the diagonal is
        ``[groups, blocks, b, b]``, zeros filling up the last block; an identity is None.

        Raises:
            KeyError: If K-FAC has no layer of this name.
        """
        return self.blocks.factor(layer)

    def curvature(self) -> CurvatureBlocks:
        """The curvature of every layer that has statistics, as matrices A ⊗ G by layer name.

        With ``inverse="ekfac"`` they have the measured eigenvalues from the first refresh on.

        A snapshot of the running averages: copies that no later step changes. For the curvature of
        a whole data set at fixed parameters call ``backward`` on every batch, then once ``step`` of
        a :class:`Preconditioner`, which moves nothing.

        Returns:
            A mapping from layer names to :class:`kfac.kronecker.KroneckerBlock`. Looking up a layer
            without statistics raises a ``KeyError``.

        Cost:
            Memory of the factors.

        Source:
            Martens & Grosse 2015, section 4.2.
        """
        return CurvatureBlocks(
            {
                name: KroneckerBlock(layer, self.blocks.matrix(name))
                if self.blocks.has_statistics(name)
                else None
                for name, layer in self.blocks.layers.items()
            }
        )

    def summary(self) -> Summary:
        """One row per parameter: how it is trained, its factors' shapes, and why."""
        return summarize(
            self.model, self.layers, self._reasons, self.params, self.capture.statistics.expanded
        )

    def memory_estimate(self) -> dict[str, int]:
        """Bytes that the engine holds between steps, by kind.

        "factors" are the running averages, "pending" the sums of the current step, "inverses" the
        strategy's state.
        """
        return self.blocks.memory_estimate()

    def diagnostics(self) -> dict[str, float]:
        """Counts so far; reading them waits for the device.

        "inverse_refreshes" counts refreshes of layers of one shape, "skipped_refreshes" layers that
        were left out of one for ``refresh_tolerance``, "failed_refreshes" layers that kept their
        last inverse because the new factors could not be decomposed.
        "dropped_statistics" counts layers' statistics that were not finite or came with a gradient
        that was not; "nonfinite_batches" counts steps with such a gradient or such a preconditioned
        gradient, or with a move to what is not finite, which changed no parameter.
        """
        return {
            "steps": self.steps,
            **self.blocks.counters,
            "dropped_statistics": int(self._dropped),
            "nonfinite_batches": int(self._nonfinite),
        }

    def remove_hooks(self) -> None:
        """Remove every hook from the model and the criterion; the factors stay as they are."""
        self._joining.remove()
        self.capture.remove()

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors, numbers, strings and dicts."""
        return {
            "version": checkpoint.VERSION,
            "fisher": self.fisher,
            "steps": self.steps,
            "burned_in": self.burned_in,
            "captures_next": self.capture.active,
            "dropped_statistics": int(self._dropped),
            "nonfinite_batches": int(self._nonfinite),
            "seed": None if self._vectors is None else self._vectors.seed,
            **self.blocks.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        """Restore what :meth:`state_dict` returned; statistics of an unfinished step are dropped.

        Tensors take the dtype and the device that they have here.

        Args:
            state_dict: The state, of this version of the format or an older one.
            strict: Whether the same layers have to be on both sides. If not, the layers that both
                have are loaded, and the others start anew.

        Raises:
            ValueError: If the state does not fit this model or these settings, or is damaged; the
                message says what and where, and nothing has changed.
            RuntimeError: If a part of the model was moved or converted, and :meth:`update_layers`
                was not called since.
        """
        self.load_checked(self.checked_state(state_dict, strict=strict))

    def checked_state(self, state_dict: Any, *, strict: bool) -> Mapping[str, Any]:
        """Return the state in the present format if it can be loaded; changes nothing.

        Raises:
            ValueError: As :meth:`load_state_dict`.
        """
        saved = checkpoint.checked_version(state_dict)
        checkpoint.check_keys(saved, "kfac", _STATE_KEYS)
        checkpoint.check_setting(saved, "fisher", self.fisher)
        for key, constraint in _COUNTS.items():
            checkpoint.check_value(saved[key], f"{key} in kfac", constraint)
        seed = _NO_SEED if self._vectors is None else INTEGER
        checkpoint.check_value(saved["seed"], "seed in kfac", seed)
        self.blocks.check_loadable(saved, strict=strict)
        self._factors_due(saved["steps"])  # the schedule may refuse
        return saved

    def load_checked(self, saved: Mapping[str, Any]) -> None:
        """Load what :meth:`checked_state` returned."""
        is_new = not self.blocks.layers.keys() <= saved["layers"].keys()
        self.blocks.load_state_dict(saved)
        if self._vectors is not None:
            self._vectors.seed = saved["seed"]
        self.steps = saved["steps"]
        self.burned_in = saved["burned_in"]
        self.capture.end_step(self._turn)
        self._dropped.fill_(saved["dropped_statistics"])
        self._nonfinite.fill_(saved["nonfinite_batches"])
        due = self._factors_due(self.steps) or saved["captures_next"]
        self.capture.schedule(active=due or is_new or self.blocks.is_waiting)


def _without_second_moments() -> str:
    """The names of the strategies that need no gradients of single examples."""
    *others, last = (repr(n) for n, kind in STRATEGIES.items() if not kind.has_second_moments)
    return f"{', '.join(others)} or {last}"


def _refuse_unused(
    owner: str,
    criterion: object,
    fisher: FisherType,
    outputs: object,
    loss_terms: object,
    num_samples: int,
) -> None:
    """Refuse arguments that would have no effect."""
    if criterion is not None and loss_terms is not None:
        raise argument_error(
            owner, "loss_terms", "None with a criterion", loss_terms,
            "The criterion says how many terms its loss has.",
        )  # fmt: skip
    if criterion is None and outputs is not None:
        raise argument_error(
            owner, "outputs", "None without a criterion", outputs, "Pass criterion= as well."
        )
    if fisher != "mc" and num_samples != 1:
        raise argument_error(
            owner, "num_samples", f"1 with fisher={fisher!r}", num_samples,
            "Only fisher='mc' samples.",
        )  # fmt: skip
