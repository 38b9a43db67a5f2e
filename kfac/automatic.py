"""Steps whose size and momentum minimise a quadratic model, with damping that adapts itself."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from kfac.arguments import NON_NEGATIVE_INTEGER, POSITIVE, Constraint
from kfac.checkpoint import MAPPING, NUMBER, check_entries
from kfac.fisher_products import FisherProducts
from kfac.levenberg_marquardt import LevenbergMarquardt, Trial, reduction_ratio
from kfac.names import unwrapped
from kfac.objective import ByParameter, Objective
from kfac.preconditioner import Preconditioner
from kfac.quadratic_model import quadratic_model
from kfac.rewind import Start
from kfac.update import all_finite, kl_clip_scale, predicted_change

_DAMPING = Constraint("a finite number > 0 or None", lambda v: v is None or POSITIVE.accepts(v))
_LOSSES = Constraint(
    "two finite numbers in order or None",
    lambda v: (
        v is None
        or (
            isinstance(v, list | tuple)
            and len(v) == 2
            and all(NUMBER.accepts(loss) and math.isfinite(loss) for loss in v)
            and v[0] <= v[1]
        )
    ),
)
_STATE = {
    "damping": _DAMPING,
    "preconditioner_damping": _DAMPING,
    "rejected": NON_NEGATIVE_INTEGER,
    "losses": _LOSSES,
    "figures": MAPPING,
}


class Auto(str):
    """The "auto" that stands in a parameter group, and says why no scheduler can change it."""

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(
            "There is nothing to schedule where lr or momentum is 'auto': the quadratic model "
            "chooses it in every step. Give KFAC a number, or leave the scheduler away."
        )

    __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __float__ = _refuse


@dataclass(frozen=True)
class ModelSettings:
    """What of a step is given, and what the quadratic model chooses.

    Attributes:
        lr: Learning rate of the step at hand; None for the model's choice.
        momentum: Momentum of the step at hand; None for the model's choice.
        levenberg_marquardt: The rule for λ; None where λ is given.
        kl_clip: Trust region of a given learning rate.
        fraction: Of a batch's examples, those that the model's curvature is estimated from.
    """

    lr: float | None
    momentum: float | None
    levenberg_marquardt: LevenbergMarquardt | None
    kl_clip: float | None
    fraction: float = 1.0

    def at(self, groups: Sequence[Mapping[str, Any]]) -> "ModelSettings":
        """The same with the learning rate and the momentum that the groups hold now.

        Raises:
            RuntimeError: If they are not those of a single step.
        """
        return replace(
            self, lr=_held_by_all(groups, "lr"), momentum=_held_by_all(groups, "momentum")
        )


def _held_by_all(groups: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The value that all groups hold, None for "auto"."""
    held = [None if isinstance(group[key], str) else float(group[key]) for group in groups]
    if any(value != held[0] for value in held):
        raise RuntimeError(
            "A step that a quadratic model chooses is the same for all groups, but their "
            f"{key} is {held}. Give all of them the same {key}."
        )
    return held[0]


@dataclass
class ModelStep:
    """A step δ = Σ cᵢ dᵢ, and what the quadratic model expects of it.

    Attributes:
        step: δ by parameter.
        coefficients: c: of the preconditioned gradient, of the last step, and of the gradient of
            the parameters that K-FAC does not take, if there are any.
        change: M(δ) − M(0), or what M(0) is measured by.
    """

    step: dict[nn.Parameter, Tensor]
    coefficients: list[float]
    change: float


@dataclass(frozen=True)
class TriedStep(Trial):
    """A step that was tried from some λ.

    Attributes:
        chosen: The step.
    """

    chosen: ModelStep


class AutomaticStep:
    """Chooses and takes the steps of :class:`kfac.KFAC` where anything about them is "auto".

        δ = −α Δ + μ δ₀,   Δ = (A ⊗ G + (λ + η) I)⁻¹ ∇h,   δ₀ the last step

    with α and μ at the minimum of the quadratic model of the objective h(θ) = L(θ) + ½ η‖θ‖², see
    :mod:`kfac.quadratic_model`. Parameters that K-FAC does not take have a coefficient of their
    own, for their gradient.

    Args:
        engine: Factors, inverses and preconditioned gradients.
        settings: What is given.

    Attributes:
        damping: λ, None before it is known.
        preconditioner_damping: γ² in place of λ, None where it is λ.
        figures: Numbers of the last step, for ``diagnostics()``.
        rejected: Number of steps that were undone.

    Source:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", sections 6 and 7.
    """

    def __init__(self, engine: Preconditioner, settings: ModelSettings) -> None:
        assert engine.likelihood is not None
        self._engine = engine
        self._settings = settings
        self._products = FisherProducts(unwrapped(engine.model), engine.likelihood)
        rule = settings.levenberg_marquardt
        self.damping = None if rule is None else rule.initial
        self.preconditioner_damping: float | None = None
        self.rejected = 0
        self.figures = dict.fromkeys(("lr", "momentum", "reduction_ratio"), float("nan"))
        self.is_evaluating = False
        self._has_warned = False
        self._losses: tuple[float, float] | None = None  # lowest and highest of late

    def take(
        self, groups: Sequence[Mapping[str, Any]], state: dict[Any, Any], closure: Callable[[], Any]
    ) -> Any:
        """Evaluate the closure, and move the parameters.

        Args:
            groups: The optimizer's parameter groups.
            state: Its state by parameter, which holds the last step.
            closure: Evaluates the model on the step's batch, calls ``backward`` and returns the
                loss. It is called again where λ is adapted or looked for, once for every step that
                is tried, and where the batch shows that the last step may have gone wrong.

        Returns:
            What the closure returned.
        """
        self._settings = self._settings.at(groups)
        for parameter, mine in state.items():  # the model may have been moved or converted
            if "last_step" in mine:
                mine["last_step"] = mine["last_step"].to(parameter)
        engine, rule = self._engine, self._settings.levenberg_marquardt
        is_watched = rule is not None and (self.damping is None or rule.is_due(engine.steps))
        start = Start.of(engine, with_curvature=is_watched)
        recorder = engine.capture.recorder
        before = [] if recorder is None else list(recorder.calls)
        with torch.enable_grad():
            loss = closure()
        if recorder is None or not recorder.calls:
            raise RuntimeError(
                "The closure has not computed a gradient that the quadratic model can be made of. "
                "It must call the model that K-FAC was given, the criterion, and backward()."
                + engine.why_missing
            )
        if rule is not None and before and before[0] in recorder.calls:
            raise RuntimeError(
                "Gradients were accumulated before the closure, so its loss is not the one that "
                "they are of, and damping=LevenbergMarquardt() cannot tell how well the step was "
                "predicted. Let the closure clear the gradients and go through all micro-batches, "
                "or give a number as damping."
            )
        with torch.autocast(engine.params[0].device.type, enabled=False):
            evaluated = Evaluated(closure, self._mean(loss), start, is_watched)
            if not self._is_sound(evaluated.loss) and self._retreat(groups, state, evaluated):
                evaluated = evaluated._replace(is_stale=True)
            self._move(groups, state, evaluated)
        return loss

    def _is_sound(self, loss: float) -> bool:
        """Whether loss and gradients are finite, and the loss is not far above the last ones.

        Far means above the highest of them by twice their range. Where λ is given, any finite loss
        will do: after a step that is taken back, the same one would follow.
        """
        gradients = [p.grad for p in self._engine.params if p.grad is not None]
        if not (math.isfinite(loss) and all_finite(gradients)):
            return False
        if self._losses is None or self._settings.levenberg_marquardt is None:
            return True
        lowest, highest = self._losses
        return loss <= highest + 2 * (highest - lowest)

    def _move(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: dict[Any, Any],
        evaluated: "Evaluated",
    ) -> None:
        engine = self._engine
        plan = engine.plan()
        objective = Objective.of(engine, groups, state)
        finite = all_finite([*objective.gradients.values(), torch.tensor(evaluated.loss)])
        saved = [p.detach().clone() for p in objective.parameters] if evaluated.is_watched else []
        own, is_done = self.preconditioner_damping, False
        usable = finite & (not evaluated.is_stale)
        try:
            engine.update_factors(usable, 1.0)
            is_done = not usable or self._step(groups, state, objective, evaluated, plan.refresh)
            self.rejected += not is_done
        finally:
            if not usable:
                evaluated.start.restore_buffers()
            if evaluated.is_watched and not is_done:
                evaluated.start.restore()
                objective.restore(saved)
                self.preconditioner_damping = own
        engine.advance(plan, finite)

    def _step(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: dict[Any, Any],
        objective: Objective,
        evaluated: "Evaluated",
        due: frozenset[str],
    ) -> bool:
        """Choose a step, take it, and adapt λ.

        Returns:
            Whether it is good enough to be kept.
        """
        rule = self._settings.levenberg_marquardt
        found = self._find_damping(objective, evaluated, due)
        damping = self._damping(groups)
        if rule is not None and rule.is_searched(self._engine.steps):
            found, chosen = None, self._search(rule, objective, damping)
        elif found is not None:
            chosen = found.chosen
        else:
            self._engine.blocks.refresh(self._by_layer(objective, damping), due)
            chosen = self._choose(objective, damping)
        if not (math.isfinite(chosen.change) and objective.stays_finite(chosen.step)):
            self._raise_damping()
            return False
        objective.move(chosen.step)
        if evaluated.is_watched:
            if found is None:
                change = self._change(objective, chosen, evaluated)
                ratio = reduction_ratio(change, chosen.change)
            else:
                ratio = found.ratio
            if not self._adapt(ratio):
                return False
        for parameter, step in chosen.step.items():
            state[parameter]["last_step"] = step
        expected = evaluated.loss + chosen.change * objective.terms
        self._losses = _with_recent(self._losses or (expected, evaluated.loss), evaluated.loss)
        self.figures |= {"lr": -chosen.coefficients[0], "momentum": chosen.coefficients[1]}
        return True

    @torch.no_grad()
    def _retreat(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: dict[Any, Any],
        evaluated: "Evaluated",
    ) -> bool:
        """Take the last step back, if it is why the batch is not sound, and raise λ.

        Returns:
            Whether it was, and the batch's gradient is one from where the parameters no longer are.
        """
        moved = [p for group in groups for p in group["params"] if "last_step" in state.get(p, {})]
        saved = [p.detach().clone() for p in moved]
        for parameter in moved:
            parameter.sub_(state[parameter]["last_step"])
        is_why = False
        try:
            is_why = bool(moved) and self._evaluates_soundly(evaluated)
        finally:
            if not is_why:
                for parameter, value in zip(moved, saved, strict=True):
                    parameter.copy_(value)
        if is_why:
            for parameter in moved:
                del state[parameter]["last_step"]
            self._raise_damping()
            self._warn_of_repetition()
            self.rejected += 1
        return is_why

    def _warn_of_repetition(self) -> None:
        """Where λ is given, nothing keeps the next step from going wrong as the last one did."""
        if self._settings.levenberg_marquardt is None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "The last step led to a loss or a gradient that is not finite and was taken back, "
                "but without damping=LevenbergMarquardt() nothing makes the next step shorter, and "
                "it may go wrong in the same way. Lower lr where it is a number, raise damping, or "
                "use LevenbergMarquardt().",
                stacklevel=2,
            )

    def _raise_damping(self) -> None:
        """Raise λ after a step that went wrong."""
        rule = self._settings.levenberg_marquardt
        if rule is not None and self.damping is not None:
            self.damping = rule.adapted(self.damping, math.nan, rule.period * 4)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the last steps."""
        return {
            "damping": self.damping,
            "preconditioner_damping": self.preconditioner_damping,
            "rejected": self.rejected,
            "losses": self._losses,
            "figures": dict(self.figures),
        }

    def check_loadable(self, saved: Any, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ``ValueError`` unless :meth:`load_state_dict` would succeed; changes nothing.

        Args:
            saved: What :meth:`state_dict` returned.
            groups: The parameter groups that were saved with it.
        """
        check_entries(saved, "automatic", _STATE)
        check_entries(saved["figures"], "figures in automatic", dict.fromkeys(self.figures, NUMBER))
        rule = self._settings.levenberg_marquardt
        if (saved["damping"] is not None and rule is None) or (
            saved["damping"] is None and rule is not None and rule.initial is not None
        ):
            raise ValueError(
                f"The state dict has the damping {saved['damping']} in automatic, but this "
                f"optimizer has {rule}. Construct it with the saved damping."
            )
        try:
            self._settings.at(groups)
        except RuntimeError as error:
            raise ValueError(f"The state dict cannot be loaded. {error}") from error

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, once :meth:`check_loadable` has passed."""
        self.damping, self.rejected = saved["damping"], saved["rejected"]
        self.figures = dict(saved["figures"])
        self.preconditioner_damping = saved["preconditioner_damping"]
        self._losses = saved["losses"]

    # --- damping -------------------------------------------------------------------------------

    def _damping(self, groups: Sequence[Mapping[str, Any]]) -> float:
        if self.damping is not None:
            return self.damping
        damping: float = groups[0]["damping"]
        return damping

    def _find_damping(
        self, objective: Objective, evaluated: "Evaluated", due: frozenset[str]
    ) -> "TriedStep | None":
        """Look for λ by trying steps from here, where it is time to.

        Args:
            objective: The objective.
            evaluated: What the closure has returned.
            due: The layers whose inverses this step refreshes. Where they contain λ, those of all
                are refreshed for another λ, and as they were if λ stays.

        Returns:
            The step from the λ that was found; None if none was looked for.
        """
        rule = self._settings.levenberg_marquardt
        if rule is None or not (self.damping is None or rule.is_sought(self._engine.steps)):
            return None
        if self.preconditioner_damping is not None:
            return None  # γ² is searched for instead
        saved = [p.detach().clone() for p in objective.parameters]
        blocks, here = self._engine.blocks, self.damping
        is_live = self._engine.inverse.damping_is_live
        inverses: dict[str, Any] | None = None

        def trial_at(damping: float) -> TriedStep:
            nonlocal inverses
            if is_live or damping == here:
                blocks.refresh(objective.preconditioner_damping(damping), due)
            else:
                inverses = inverses or blocks.snapshot()
                self._refresh(objective, damping)
            chosen = self._choose(objective, damping)
            objective.move(chosen.step)
            try:
                change = self._change(objective, chosen, evaluated)
            finally:
                objective.restore(saved)
            return TriedStep(damping, change, reduction_ratio(change, chosen.change), chosen)

        found = rule.calibrate(trial_at) if here is None else rule.lowered(here, trial_at)
        if inverses is not None:
            if found.damping == here:
                blocks.restore(inverses)
            else:
                self._refresh(objective, found.damping)
        self.damping = found.damping
        return found

    def _by_layer(self, objective: Objective, damping: float) -> dict[str, float]:
        """The preconditioner's damping by layer: γ² + η, or λ + η where there is no γ."""
        own = self.preconditioner_damping
        return objective.preconditioner_damping(damping if own is None else own)

    def _search(self, rule: LevenbergMarquardt, objective: Objective, damping: float) -> ModelStep:
        """Choose γ² with the step, and refresh all inverses with it."""
        center = self.preconditioner_damping
        best: tuple[float, ModelStep] | None = None
        for candidate in rule.candidates(damping if center is None else center):
            self.preconditioner_damping = candidate
            self._refresh(objective, candidate)
            chosen = self._choose(objective, damping)
            if best is None or chosen.change < best[1].change:
                best = candidate, chosen
        assert best is not None
        if best[0] != self.preconditioner_damping:
            self.preconditioner_damping = best[0]
            self._refresh(objective, best[0])
        return best[1]

    def _refresh(self, objective: Objective, damping: float) -> None:
        """Refresh all inverses with a damping."""
        by_layer = objective.preconditioner_damping(damping)
        self._engine.blocks.refresh(by_layer, by_layer.keys())

    def _adapt(self, ratio: float) -> bool:
        """Adapt λ to ρ; whether the step is good enough to be kept."""
        rule = self._settings.levenberg_marquardt
        assert rule is not None
        assert self.damping is not None
        self.figures["reduction_ratio"] = ratio
        self.damping = rule.adapted(self.damping, ratio, self._engine.steps)
        return rule.accepts(ratio)

    def _change(self, objective: Objective, chosen: ModelStep, evaluated: "Evaluated") -> float:
        """h(θ + δ) − h(θ) of a step that has been taken."""
        there = self._evaluate(evaluated)
        change = (there - evaluated.loss) / objective.terms
        return change + objective.decay_change(chosen.step)

    def _evaluate(self, evaluated: "Evaluated") -> float:
        """The loss at the present parameters, by calling the closure once more."""
        with self._again(evaluated):
            return self._mean(evaluated.closure())

    def _evaluates_soundly(self, evaluated: "Evaluated") -> bool:
        """Whether loss and gradients are at the present parameters."""
        with self._again(evaluated):
            return self._is_sound(self._mean(evaluated.closure()))

    @contextmanager
    def _again(self, evaluated: "Evaluated") -> Iterator[None]:
        with evaluated.start.again(), torch.enable_grad():
            self.is_evaluating = True
            try:
                yield
            finally:
                self.is_evaluating = False

    def _mean(self, loss: Any) -> float:
        """A closure's loss as a number, over all processes: all of them have to do the same."""
        ranks = self._engine.ranks
        if ranks.size == 1:
            return float(loss.detach() if isinstance(loss, Tensor) else loss)
        device = self._engine.params[0].device
        value = torch.as_tensor(loss, dtype=torch.float64, device=device).detach().clone()
        ranks.sum_([value])
        return float(value) / ranks.size

    # --- the model -----------------------------------------------------------------------------

    def _choose(self, objective: Objective, damping: float) -> ModelStep:
        engine, settings = self._engine, self._settings
        recorder = engine.capture.recorder
        assert recorder is not None
        by_layer = self._by_layer(objective, damping)
        stacks = engine.blocks.precondition(objective.gradients, by_layer)
        preconditioned = {p: d.to(p.dtype) for p, d in stacks.by_parameter().items()}
        if settings.lr is not None and settings.kl_clip is not None and preconditioned:
            self._clip(preconditioned, objective)
        rest = {p: g for p, g in objective.gradients.items() if p not in preconditioned}
        given = None if settings.lr is None else -settings.lr
        directions: list[ByParameter] = [preconditioned, objective.last]
        fixed: list[float | None] = [given, settings.momentum]
        if rest:
            directions.append(rest)
            fixed.append(given)
        moving = [i for i, (d, c) in enumerate(zip(directions, fixed, strict=True)) if d and c != 0]
        fisher = self._products(
            recorder.calls,
            [directions[i] for i in moving],
            engine.capture.terms,
            settings.fraction,
        )
        engine.ranks.sum_([fisher])
        model = quadratic_model(
            fisher / engine.ranks.size,
            [objective.aligned(directions[i]) for i in moving],
            objective.aligned(objective.loss_gradients),
            [p.detach() for p in objective.parameters],
            damping=[damping] * len(objective.parameters),
            weight_decay=objective.decays,
        )
        found = model.minimizer([fixed[i] for i in moving])
        coefficients = [0.0] * max(2, len(directions))
        for i, c in zip(moving, found.tolist(), strict=True):
            coefficients[i] = c
        step = {p: torch.zeros_like(p) for p in objective.parameters}
        for direction, coefficient in zip(directions, coefficients, strict=False):
            for parameter, d in direction.items():
                step[parameter].add_(d, alpha=coefficient)
        return ModelStep(step, coefficients, float(model.change(found)))

    def _clip(self, directions: dict[nn.Parameter, Tensor], objective: Objective) -> None:
        settings = self._settings
        assert settings.lr is not None
        assert settings.kl_clip is not None
        tensors = list(directions.values())
        gradients = [objective.gradients[p] for p in directions]
        change = predicted_change(tensors, gradients, [settings.lr] * len(tensors))
        scale = kl_clip_scale(change, settings.kl_clip)
        for parameter, direction in directions.items():
            directions[parameter] = direction * scale.to(direction)


def _with_recent(known: tuple[float, float], loss: float) -> tuple[float, float]:
    """Lowest and highest loss of late: what lies further off is forgotten by 5% per step."""
    lowest, highest = (loss + 0.95 * (value - loss) for value in known)
    return min(lowest, loss), max(highest, loss)


class Evaluated(NamedTuple):
    """A closure, the loss that it has returned, and what it started from.

    Attributes:
        closure: The closure.
        loss: What it has returned, as a number.
        start: What it started from.
        is_watched: Whether λ is adapted, or looked for, in this step.
        is_stale: Whether the last step has been taken back since, so that loss and gradients are
            those of where the parameters no longer are.
    """

    closure: Callable[[], Any]
    loss: float
    start: Start
    is_watched: bool
    is_stale: bool = False
