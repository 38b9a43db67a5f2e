"""The optimizer: K-FAC's preconditioned gradients, trust region, momentum and weight decay."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from kfac.arguments import (
    FRACTION,
    NON_NEGATIVE_INTEGER,
    POSITIVE,
    Constraint,
    argument_error,
    check,
)
from kfac.automatic import Auto, AutomaticStep, ModelSettings
from kfac.calls import OutputSelector, PositionMask
from kfac.compilation import STEP_BREAKS_GRAPHS, not_compiled
from kfac.directions import Directions
from kfac.fallback import Fallback, FallbackName, OptimizerFactory
from kfac.fisher import FisherType, Likelihood, LossReduction
from kfac.grafting import GRAFT, Graft, GraftName
from kfac.group_settings import (
    WHEN_ADDED,
    check_added,
    check_in_use,
    check_same,
    refuse_unknown,
    with_usable_rates,
)
from kfac.inverse import Inverse, InverseName
from kfac.kronecker import CurvatureBlocks
from kfac.layers import Layer
from kfac.levenberg_marquardt import LevenbergMarquardt
from kfac.param_groups import SharingRule, Skip
from kfac.preconditioner import Damping, Period, Preconditioner
from kfac.schedules import Scheduled, growing_period, growing_refresh_period
from kfac.state import Parts
from kfac.summary import Summary
from kfac.trainable import entries, members_of, refuse_meta, refuse_twice, unnamed
from kfac.update import all_finite, descend, kl_clip_scale, predicted_change, stays_finite

_CLOSURE = Constraint(
    "a function that returns the loss or None", lambda v: v is None or callable(v)
)
_KL_CLIP = Constraint("a finite number > 0 or None", lambda v: v is None or POSITIVE.accepts(v))


class _Move(NamedTuple):
    """Parameters that move together."""

    members: list[nn.Parameter]
    directions: list[Tensor]
    momentum: list[Tensor] | None
    group: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What the group says about a move, other than its sign."""
        return {k: self.group[k] for k in ("lr", "momentum", "nesterov", "weight_decay")}


class KFAC(torch.optim.Optimizer):
    """Kronecker-factored natural gradient as a drop-in optimizer.

        A ← average of a aᵀ,   G ← average of b bᵀ,   Δ = (A ⊗ G + λI)⁻¹ g
        m ← momentum·m + ν·Δ,   θ ← (1 − lr·weight_decay)·θ − lr·m

    for every layer with inputs a, output gradients b and the gradient g of the mean loss; λ is the
    damping and ν the scale of the trust region. All other parameters are trained by the fallback;
    :meth:`summary` says which.

        optimizer = KFAC(model, criterion=criterion)
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    Args:
        model: The outermost module that the training loop calls (after wrapping or compiling).
        params: Parameters or parameter groups as for any optimizer; all parameters of the model by
            default. Groups may set ``lr``, ``momentum``, ``nesterov``, ``weight_decay``,
            ``maximize`` and ``damping``; a layer takes the damping of its weight's group.
        lr: Learning rate >= 0, or ``"auto"``: the size of each step is where the quadratic model of
            the objective is smallest. Needs a criterion, and a closure in every :meth:`step`.
        momentum: In [0, 1), or ``"auto"``, likewise.
        nesterov: Nesterov momentum.
        weight_decay: Decoupled weight decay >= 0, per unit of learning rate. Where anything is
            automatic, the factor of ½‖θ‖² in the objective.
        maximize: Ascend instead of descend.
        kl_clip: Trust region κ: the step is scaled down so that lr²·Δᵀg stays below κ. None for
            no trust region. Has no part in steps with ``lr="auto"``, nor with ``graft``.
        graft: ``"sgd"`` or ``"adam"``: each layer's preconditioned gradient gets the norm of its
            gradient, or of Adam's update (without a first moment), so that ``lr`` is that of the
            other optimizer; see :class:`kfac.grafting.Graft`. None for its own norm. Parameters of
            the fallback are not grafted.
        burn_in: So many calls of :meth:`step` come before the first step and only update the
            factors, each of them: neither parameters nor anything else moves, and no inverse is
            made. They do not count as steps.
        model_fraction: In automatic steps, the share of a batch's examples (the first ones) that
            the curvature of the quadratic model is estimated from, in (0, 1]. Where it is not known
            which axes hold the examples, all are used.
        damping: As in :class:`kfac.Preconditioner`, or :class:`kfac.LevenbergMarquardt`: λ follows
            how well the quadratic model predicts the loss.
        factor_update_period: As there; by default 10, and with anything automatic
            :func:`kfac.schedules.growing_period`.
        inverse_update_period: As there; by default 100, and with anything automatic
            :func:`kfac.schedules.growing_refresh_period`.
        fallback: ``"sgd"`` (this optimizer's own learning rate and momentum on the plain
            gradient), ``"adamw"``, or a function from parameter groups to an optimizer. The
            learning rate of the latter two is their own and follows the schedule of ``lr``.

    The other arguments are those of :class:`kfac.Preconditioner`.

    Raises:
        ValueError: If an argument violates its constraint; the message says which and what to do.

    Note:
        A step whose gradient is not finite changes nothing and is counted by :meth:`diagnostics`.
        So does one that would make a parameter or its momentum infinite; but the factors take in
        its batch.

    Source:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature"; differs in the trust region (:func:`kfac.update.kl_clip_scale`) and in the exact
        running average. See docs/method.md.
    """

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None = None,
        *,
        lr: float | Tensor | Literal["auto"] = 0.01,
        momentum: float | Literal["auto"] = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
        damping: Damping | LevenbergMarquardt = 0.1,
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
        factor_update_period: Period | None = None,
        inverse_update_period: Period | None = None,
        stagger_refreshes: bool = True,
        refresh_tolerance: float | None = None,
        kl_clip: float | None = 1e-3,
        graft: GraftName | None = None,
        burn_in: int = 0,
        model_fraction: float = 1.0,
        grad_scaler: Any = None,
        skip: Sequence[Skip] = (),
        fallback: FallbackName | OptimizerFactory = "sgd",
        max_factor_dim: int = 1024,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise argument_error("KFAC", "model", "a torch.nn.Module", model, "Pass KFAC(model).")
        check("KFAC", "kl_clip", kl_clip, _KL_CLIP, "Pass None for no trust region.")
        check("KFAC", "graft", graft, GRAFT, "Pass None for no graft.")
        check("KFAC", "burn_in", burn_in, NON_NEGATIVE_INTEGER, "Pass 0 for none.")
        check("KFAC", "model_fraction", model_fraction, FRACTION, "Pass 1 for the whole batch.")
        self.kl_clip = kl_clip
        self.burn_in = burn_in
        self._graft = None if graft is None else Graft(graft)
        rule: LevenbergMarquardt | None = None
        if isinstance(damping, LevenbergMarquardt):
            rule, damping = damping, damping.initial or 1.0  # until the first batch is seen
        self._is_automatic = rule is not None or "auto" in (
            value for value in (lr, momentum) if isinstance(value, str)
        )
        if self._is_automatic:
            _check_automatic(criterion, fallback, graft, nesterov, maximize, grad_scaler)
        elif model_fraction != 1:
            raise argument_error(
                "KFAC", "model_fraction", "1 without automatic steps", model_fraction,
                "Only with lr='auto', momentum='auto' or damping=LevenbergMarquardt() is there a "
                "quadratic model.",
            )  # fmt: skip
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "damping": damping,
        }
        self._constructed = False
        self._damping_schedules: list[Scheduled[float]] = []
        super().__init__(entries("KFAC", model, params), defaults)
        self.defaults["damping"] = Scheduled("KFAC", "damping", damping, POSITIVE).at(0)
        self._engine = Preconditioner(
            model,
            [p for group in self.param_groups for p in group["params"]],
            criterion=criterion,
            outputs=outputs,
            fisher=fisher,
            num_samples=num_samples,
            max_vectors=max_vectors,
            loss_reduction=loss_reduction,
            loss_terms=loss_terms,
            position_mask=position_mask,
            weight_sharing=weight_sharing,
            inverse=inverse,
            factor_decay=factor_decay,
            factor_fraction=factor_fraction,
            **self._periods(factor_update_period, inverse_update_period),
            stagger_refreshes=stagger_refreshes,
            refresh_tolerance=refresh_tolerance,
            grad_scaler=grad_scaler,
            skip=skip,
            max_factor_dim=max_factor_dim,
            seed=seed,
            owner="KFAC",
            records_calls=self._is_automatic,
        )
        self._automatic = None
        if self._is_automatic:
            given = [None if isinstance(v, str) else float(v) for v in (lr, momentum)]
            settings = ModelSettings(given[0], given[1], rule, kl_clip, model_fraction)
            self._automatic = AutomaticStep(self._engine, settings)
        rest = self._left_by(self._engine.layers)
        self._fallback_ids = _ids(rest)
        self._fallback_choice = fallback
        try:
            self._fallback = self._make_fallback(fallback, rest)
        except BaseException:
            self.remove_hooks()
            raise
        self._kl_clip_scale = torch.ones(())
        # GradScaler then hands over its scale and found_inf instead of deciding by itself.
        self._step_supports_amp_scaling = True
        self._constructed = True

    def _periods(self, factors: Period | None, inverses: Period | None) -> dict[str, Period]:
        """The periods of factor updates and refreshes, where they were not left to the engine."""
        if self._is_automatic:
            factors = growing_period if factors is None else factors
            inverses = growing_refresh_period if inverses is None else inverses
        given = {"factor_update_period": factors, "inverse_update_period": inverses}
        return {name: period for name, period in given.items() if period is not None}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and after construction find its layers; see :meth:`update_layers`.

        Raises:
            ValueError: If a setting of the group violates its constraint or cannot be set per
                group. After this and any other exception, as of a function that makes the fallback,
                the optimizer is as it was.
        """
        found = members_of("KFAC", param_group)
        refuse_unknown(param_group)
        param_group["params"] = found
        others = [p for group in self.param_groups for p in group["params"]]
        refuse_twice("KFAC", others + unnamed(found))
        settings = self.defaults | param_group
        check_added(settings)
        if self._is_automatic:
            check_same(settings, self.defaults)
        schedule = Scheduled("KFAC", "damping", settings["damping"], POSITIVE)
        param_group |= {k: _plain(settings[k]) for k in self.defaults if k != "damping"}
        # Schedules stay out of the groups, whose values go into checkpoints.
        param_group["damping"] = _plain(schedule.at(self._engine.steps if self._constructed else 0))
        super().add_param_group(param_group)
        self._damping_schedules.append(schedule)
        if self._constructed:
            try:
                self.update_layers()
            except BaseException:
                self.param_groups.pop()
                self._damping_schedules.pop()
                raise

    def update_layers(self) -> None:
        """Follow a model whose modules were added, removed, replaced, frozen or unfrozen.

        As :meth:`kfac.Preconditioner.update_layers`, with the parameters of all groups. Parameters
        that are new to the model have to be in a group: pass them to :meth:`add_param_group`, which
        calls this. A function that makes the fallback is called anew; whatever it raises, nothing
        has changed.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        # All that may fail comes before the first change.
        rest = self._left_by(self._engine.layers_among(params))
        fallback = self._make_fallback(self._fallback_choice, rest)
        if self._fallback is not None and fallback is not None:
            fallback.adopt(self._fallback)
        self._engine.update_layers(params)
        self._fallback, self._fallback_ids = fallback, _ids(rest)

    def _left_by(self, layers: Iterable[Layer]) -> list[list[nn.Parameter]]:
        """The parameters of every group that are in none of some layers."""
        taken = {id(p) for layer in layers for p in layer.parameters}
        return [[p for p in g["params"] if id(p) not in taken] for g in self.param_groups]

    def _make_fallback(
        self, fallback: FallbackName | OptimizerFactory, rest: Sequence[Sequence[nn.Parameter]]
    ) -> Fallback | None:
        if fallback == "sgd":
            return None
        if fallback != "adamw" and not callable(fallback):
            raise argument_error(
                "KFAC", "fallback", "'sgd', 'adamw' or a function that makes one", fallback,
                "Others are made by a function: lambda groups: torch.optim.Adam(groups).",
            )  # fmt: skip
        return Fallback(fallback, self.param_groups, rest) if any(rest) else None

    # --- the algorithm -------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model anew, calls ``backward`` and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            ValueError: If a setting of a parameter group is not usable any more; nothing changes.
            RuntimeError: If statistics are due and there are none, or cannot be scaled (only the
                batch is given up then), or if a layer's factors could not be decomposed too many
                times in a row (the factors have changed, the parameters have not).
        """
        return self._step(closure)

    @not_compiled(STEP_BREAKS_GRAPHS)
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        check("KFAC.step", "closure", closure, _CLOSURE, "Call loss.backward(), then step().")
        try:
            for group in self.param_groups:
                refuse_meta("KFAC", group["params"])
            check_in_use(self.param_groups, is_automatic=self._is_automatic)
            return self._take_step(closure)
        except BaseException:
            for note in ("grad_scale", "found_inf"):  # a scaler takes them back only after a step
                self.__dict__.pop(note, None)
            raise

    def _take_step(self, closure: Callable[[], Any] | None) -> Any:
        engine = self._engine
        try:
            if self._automatic is not None and (closure is None or not self._is_burning_in):
                return self._take_automatic_step(self._automatic, closure)
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with torch.autocast(engine.params[0].device.type, enabled=False):
                self._update()
            return loss
        except BaseException:
            engine.discard()  # the batch is given up
            raise

    @property
    def _is_burning_in(self) -> bool:
        """Whether the next call of :meth:`step` only updates the factors."""
        return self._engine.steps == 0 and self._engine.burned_in < self.burn_in

    def _take_automatic_step(self, step: AutomaticStep, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            raise RuntimeError(
                "With lr='auto', momentum='auto' or damping=LevenbergMarquardt() a step needs to "
                "evaluate the model: call optimizer.step(closure), where closure() clears the "
                "gradients, computes the loss, calls backward() and returns the loss."
            )
        self._damping_by_layer()  # reads the schedule
        loss = step.take(self.param_groups, self.state, closure)
        for group in self.param_groups:
            group["damping"] = group["damping"] if step.damping is None else step.damping
        return loss

    def _update(self) -> None:
        """Turn the gradients into a step of the parameters."""
        engine = self._engine
        gradient_scale, scale_seen = self._amp_scales()
        if self._overflowed():
            engine.discard()
            return
        plan = engine.plan()
        damping = self._damping_by_layer()
        gradients = engine.mean_gradients(gradient_scale)
        # Where nothing is folded in, it is enough to look at what becomes of the gradients.
        accept = all_finite(list(gradients.values()) if engine.capture.active else [])
        accept = accept.to(engine.params[0].device)
        accept = with_usable_rates(accept, self.param_groups)
        engine.update_factors(accept, scale_seen)
        if self._is_burning_in:
            engine.advance_burn_in(accept)
            return
        engine.blocks.refresh(damping, plan.refresh)
        directions = engine.blocks.precondition(gradients, damping)
        accept = accept & self._rescale(directions, gradients).to(accept)
        by_parameter = directions.by_parameter()
        # The update overwrites what it is given, and gradients are the user's.
        steps = {
            p: by_parameter[p].to(p.dtype) if p in by_parameter else g.clone()
            for p, g in gradients.items()
        }
        moves = list(self._moves(steps))
        accept = self._step_fallback(gradients, accept & self._stays_finite(moves).to(accept))
        copies = [
            step
            for p, step in steps.items()
            if p not in directions.whole or by_parameter[p].dtype != p.dtype
        ]
        for tensor in [stack.direction for stack in directions.stacks] + copies:
            tensor.masked_fill_(~accept.to(tensor.device), 0.0)
        self._descend(moves, accept)
        if self._graft is not None:
            self._graft.commit(self.state, accept)
        engine.advance(plan, accept)

    def _overflowed(self) -> bool:
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and bool(found_inf.item())

    def _amp_scales(self) -> tuple[Tensor | float, Tensor | float]:
        """The gradient scaler's factor that is still in ``.grad``, and that the hooks saw."""
        still_there: Tensor | None = getattr(self, "grad_scale", None)
        if still_there is not None:
            return still_there, still_there
        if self._engine.scaler_is_enabled:
            return 1.0, float(self._engine.grad_scaler.get_scale())
        if getattr(self, "found_inf", None) is None:
            return 1.0, 1.0
        if self._engine.fisher == "empirical" and self._engine.capture.active:
            raise RuntimeError(
                "The gradients were unscaled before step(), so the scale that the hooks of the "
                "empirical Fisher saw is unknown. Construct KFAC with grad_scaler=scaler."
            )
        return 1.0, 1.0

    def _damping_by_layer(self) -> dict[str, float]:
        by_parameter: dict[int, float] = {}
        for group, schedule in zip(self.param_groups, self._damping_schedules, strict=True):
            if not schedule.is_constant:
                group["damping"] = _plain(schedule.at(self._engine.steps))
            by_parameter |= {id(p): group["damping"] for p in group["params"]}
        return {
            layer.name: by_parameter[id(layer.weight.parameter)] for layer in self._engine.layers
        }

    def _rescale(self, directions: Directions, gradients: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """Graft the preconditioned gradients, or scale them into the trust region.

        Returns:
            Whether they and their gradients are finite, a boolean scalar.
        """
        if self._graft is not None:
            return self._graft.apply(directions, gradients, self.state)
        return self._clip(directions, gradients)

    def _clip(self, directions: Directions, gradients: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """Scale into the trust region; likewise."""
        stacks = directions.stacks
        if self.kl_clip is None or not stacks:
            return all_finite([t for stack in stacks for t in (stack.direction, stack.gradient)])
        lrs = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        rates = [lrs[p] for p in directions.parameters]
        if len({id(lr) if isinstance(lr, Tensor) else lr for lr in rates}) == 1:
            change = predicted_change(
                [stack.direction for stack in stacks],
                [stack.gradient for stack in stacks],
                rates[: len(stacks)],
            )
        else:
            by_parameter = directions.by_parameter()
            change = predicted_change(
                list(by_parameter.values()),
                [gradients[p] for p in by_parameter],
                [lrs[p] for p in by_parameter],
            )
        self._kl_clip_scale = kl_clip_scale(change, self.kl_clip)
        for stack in stacks:
            stack.direction.mul_(self._kl_clip_scale.to(stack.direction))
        return change.isfinite()

    def _moves(self, directions: Mapping[nn.Parameter, Tensor]) -> Iterator[_Move]:
        elsewhere = self._fallback_ids if self._fallback is not None else set()
        for group in self.param_groups:
            batches: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter in directions and id(parameter) not in elsewhere:
                    batches[parameter.dtype, parameter.device].append(parameter)
            for members in batches.values():
                buffers = self._momentum_buffers(members) if group["momentum"] else None
                yield _Move(members, [directions[p] for p in members], buffers, group)

    def _stays_finite(self, moves: Iterable[_Move]) -> Tensor:
        """Whether parameters and momentum will be finite after :meth:`_descend`."""
        device = self._engine.params[0].device
        answers = [
            stays_finite(move.members, move.directions, move.momentum, **move.settings).to(device)
            for move in moves
        ]
        return torch.stack(answers).all() if answers else torch.ones((), dtype=torch.bool)

    def _descend(self, moves: Iterable[_Move], accept: Tensor) -> None:
        for move in moves:
            descend(
                move.members,
                move.directions,
                move.momentum,
                maximize=move.group["maximize"],
                accept=accept,
                **move.settings,
            )

    def _momentum_buffers(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            # The model may have been moved or converted.
            state["momentum_buffer"] = state["momentum_buffer"].to(parameter)
            buffers.append(state["momentum_buffer"])
        return buffers

    def _step_fallback(self, gradients: Mapping[nn.Parameter, Tensor], accept: Tensor) -> Tensor:
        """Take the fallback's step if K-FAC's is accepted; whether that is so, and it was sound."""
        if self._fallback is None or not bool(accept):
            return accept
        return accept & self._fallback.step(gradients, self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse copies: they would watch the original's model."""
        raise TypeError(
            "KFAC cannot be pickled or deep-copied, since it belongs to a model. Construct one for "
            "the copy of the model and load_state_dict() the state_dict() of this one."
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over loaded groups, where "auto" is a plain string."""
        super().__setstate__(state)
        for group in self.param_groups:
            group |= {key: Auto(value) for key, value in group.items() if value == "auto"}

    @not_compiled(STEP_BREAKS_GRAPHS)
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the statistics of a batch that was given up."""
        super().zero_grad(set_to_none)
        if self._automatic is None or not self._automatic.is_evaluating:
            self._engine.discard()

    # --- reports -------------------------------------------------------------------------------

    def factor(self, layer: str) -> tuple[Tensor | None, Tensor | None]:
        """See :meth:`kfac.Preconditioner.factor`."""
        return self._engine.factor(layer)

    def curvature(self) -> CurvatureBlocks:
        """See :meth:`kfac.Preconditioner.curvature`."""
        return self._engine.curvature()

    def summary(self) -> Summary:
        """One row per parameter: how it is trained, its factors' shapes, and why."""
        return self._engine.summary()

    def memory_estimate(self) -> dict[str, int]:
        """Bytes that the optimizer holds between steps, by kind, known before the first step.

        As :meth:`kfac.Preconditioner.memory_estimate`, "momentum" for the buffers and, where there
        is a graft, "graft" for its averages. What a fallback other than ``"sgd"`` allocates is its
        own and not counted.
        """
        elsewhere = self._fallback_ids if self._fallback is not None else set()
        momentum = sum(
            p.numel() * p.element_size()
            for group in self.param_groups
            if group["momentum"]
            for p in group["params"]
            if p.requires_grad and id(p) not in elsewhere
        )
        estimate = self._engine.memory_estimate() | {"momentum": momentum}
        if self._graft is not None:
            taken = {p for la in self._engine.layers if la.is_trained for p in la.parameters}
            estimate["graft"] = self._graft.memory(taken)
        return estimate

    def diagnostics(self) -> dict[str, float]:
        """Numbers of the last step and counts so far; reading them waits for the device.

        As :meth:`kfac.Preconditioner.diagnostics`, and "burn_in_steps" (those before the first),
        "kl_clip_scale" (ν of the last step, 1 where the trust region did not bind), "damping"
        (largest over groups) and "lr" (likewise).
        """
        found = self._engine.diagnostics() | {
            "burn_in_steps": self._engine.burned_in,
            "kl_clip_scale": float(self._kl_clip_scale),
            "damping": max(float(group["damping"]) for group in self.param_groups),
        }
        if self._automatic is None:
            return found | {"lr": max(float(group["lr"]) for group in self.param_groups)}
        found |= self._automatic.figures | {"rejected_steps": self._automatic.rejected}
        own = self._automatic.preconditioner_damping
        return found if own is None else found | {"preconditioner_damping": own}

    def remove_hooks(self) -> None:
        """Remove every hook from the model and the criterion; the factors stay as they are."""
        self._engine.remove_hooks()

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, loadable by ``torch.load(weights_only=True)``.

        Besides torch's "state" and "param_groups": "kfac" (factors in their own dtype and
        inverses by layer name, seed, counters), "update" (what the former holds) and, if there is
        one, "fallback", and "automatic" (λ) where the quadratic model chooses the steps.
        """
        own = super().state_dict()
        for group in own["param_groups"]:
            group |= {key: str(value) for key, value in group.items() if isinstance(value, Auto)}
        return own | self._parts.state_dict(own["state"], float(self._kl_clip_scale))

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        """Restore what :meth:`state_dict` returned; a resumed run continues bit for bit.

        Tensors take the dtype and the device that they have here, and statistics of an unfinished
        step are dropped.

        Args:
            state_dict: The state, of this version of the format or an older one.
            strict: Whether the same layers, and the same parameters of the fallback, have to be on
                both sides. If not, what both have is loaded, and the rest starts anew; parameters
                and groups have to be the same in any case.

        Raises:
            ValueError: If the state does not fit this optimizer or is damaged; the message names
                the layer, parameter or entry, and nothing has changed.
            RuntimeError: If a part of the model was moved or converted, and :meth:`update_layers`
                was not called since.
        """
        saved = self._parts.checked(state_dict, strict=strict)
        self._parts.load(saved, self)
        scale = saved["update"]["kl_clip_scale"]
        self._kl_clip_scale = torch.tensor(scale, dtype=torch.float64)

    @property
    def _parts(self) -> Parts:
        return Parts(
            self.param_groups,
            WHEN_ADDED,
            self._engine,
            self._graft,
            self._automatic,
            self._fallback,
        )


def _check_automatic(
    criterion: object,
    fallback: object,
    graft: object,
    nesterov: bool,
    maximize: bool,
    grad_scaler: object,
) -> None:
    """Refuse what a step that a quadratic model chooses cannot honour."""
    means = "with lr='auto', momentum='auto' or damping=LevenbergMarquardt()"
    if criterion is None:
        raise argument_error(
            "KFAC", "criterion", f"the loss module {means}", None,
            "The quadratic model needs the curvature of the loss.",
        )  # fmt: skip
    if fallback != "sgd":
        raise argument_error(
            "KFAC", "fallback", f"'sgd' {means}", fallback,
            "Their gradients are one more direction of the model.",
        )  # fmt: skip
    if grad_scaler is not None:
        raise argument_error(
            "KFAC", "grad_scaler", f"None {means}", grad_scaler,
            "Its step() takes no closure; train in bfloat16, which needs no scaling.",
        )  # fmt: skip
    if graft is not None:
        raise argument_error(
            "KFAC", "graft", f"None {means}", graft,
            "The quadratic model decides how long the steps are.",
        )  # fmt: skip
    for argument, value in (("nesterov", nesterov), ("maximize", maximize)):
        if value:
            raise argument_error("KFAC", argument, f"False {means}", value, "Leave it out.")


def _ids(parameters: Iterable[Iterable[nn.Parameter]]) -> set[int]:
    return {id(p) for members in parameters for p in members}


def _plain(value: Any) -> Any:
    """A number as Python's own type, which checkpoints hold; tensors and schedules as they are."""
    if isinstance(value, str):
        return Auto(value) if value == "auto" else value
    if isinstance(value, bool | Tensor) or callable(value):
        return value
    return float(value)
