"""Which backward pass feeds which statistics.

On a factor step every layer's output carries a *tap*: an identity in the autograd graph that
holds the layer's input and, when a gradient arrives, hands both over. Two kinds of backward pass
visit it. The user's own feeds the empirical Fisher. For the true Fisher, a *Fisher pass* of our
own starts from the model's output when the user's backward pass reaches it: vectors are sent to
the taps through ``torch.autograd.grad`` with respect to a scalar *probe* that every tap takes as
an input, which visits the taps without computing a single weight gradient.

Statistics thus enter only with a backward pass of the user, so ``zero_grad`` can discard those of
a batch that was given up, wherever in the loop it stands.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from kfac.calls import CallReader
from kfac.compilation import EagerForward, compiled_parts
from kfac.fisher import CrossEntropy, FisherType, Likelihood
from kfac.gradient_check import GradientCheck
from kfac.graph import (
    Fate,
    current_pass,
    fate_of_gradient,
    mark,
    mark_of,
    marks_behind,
    reaches_every_leaf,
)
from kfac.hooks import ModuleHook, OutputTap, argument, on_backward
from kfac.layers import Layer
from kfac.linear_calls import Target
from kfac.names import unwrapped
from kfac.recorder import Recorder, tensors_in
from kfac.statistics import Bases, ForwardRecord, Sink, Statistics
from kfac.taps import Taps
from kfac.vectors import OutputVectors

# Why a backward pass was not counted; continues "No statistics were collected".
_DERIVATIVE = (
    "A gradient from torch.autograd.grad(..., create_graph=True), and a derivative of one, count "
    "as parts of a loss: where they are the training pass, call loss.backward(create_graph=True)."
)
_FOREIGN = (
    "The model was called with other weights than its own (torch.func.functional_call), which "
    "says nothing about the curvature of its own: call it with its parameters, or train with an "
    "optimizer that needs no curvature."
)


class Capture:
    """Owns all hooks on a model and the state that they share.

    Args:
        model: The outermost module that the user calls.
        layers: The layers under K-FAC.
        sink: Receives every second moment.
        forget: Discards what the sink has received since the last step.
        fisher: Which Fisher matrix the statistics are for.
        likelihood: What ``criterion=`` stands for, if given.
        criterion: The object that the user calls to compute the loss, if it is a module.
        reader: What the user has told about the model's arguments and outputs.
        vectors: What a Fisher pass sends; None where the user's backward pass feeds the factors.
        bases: Where second moments of per-example gradients are wanted, the bases to take them in.
        fraction: Share of a batch's examples that moments are estimated from.
        records_calls: Whether the model's calls are kept until the step, to be made again.

    Attributes:
        recorder: The calls that are kept; None if none are.
        taps: What sits on the layers' outputs.
        terms: Loss terms since the last step.
        statistics: What has been taken and not yet sent on.
    """

    # A Fisher pass of one optimizer may run through the taps of another on the same graph.
    # A plain class attribute, because autograd runs backward passes on threads of its own.
    _running: "Capture | None" = None

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        sink: Sink,
        *,
        forget: Callable[[], None],
        fisher: FisherType,
        likelihood: Likelihood | None,
        criterion: object,
        reader: CallReader,
        vectors: OutputVectors | None,
        bases: Bases | None,
        fraction: float,
        records_calls: bool = False,
    ) -> None:
        self._forget = forget
        self.fisher = fisher
        self.likelihood = likelihood
        self.vectors = vectors
        self._reader = reader
        select = reader.output if reader.selects else None
        self.recorder = Recorder(unwrapped(model), select) if records_calls else None
        self.terms: Tensor | float = 0.0
        self._count = 0  # changes whenever ``terms`` starts anew
        self.statistics = Statistics(
            sink, with_gradients=fisher != "forward-only", bases=bases, fraction=fraction
        )
        self._record: ForwardRecord | None = None  # of the latest call of the model
        self._criterion_called = False
        self._has_looked_for_mixing = False
        # Outputs that no criterion has claimed; held until the backward pass or the next step.
        self._unclaimed: dict[ForwardRecord, Tensor] = {}
        self._in_forward = False
        self._foreign_pass: int | None = None  # through a call with other weights
        self._counts: Fate = "none"  # the gradients that this step's statistics come with
        self.missing = ""  # why a backward pass since the last step has not been counted
        self._check = GradientCheck(layers)
        self._key = f"kfac-{id(self)}"  # of this capture in the metadata of graph nodes
        self._pass: object | None = None  # the Fisher pass that is under way
        self._model = model
        self._layers = layers
        self.taps = Taps(model, layers, self._visit, self._key)
        self._handles = self._register(model, criterion)
        self._eager = [EagerForward(part, self._takes_statistics) for part in compiled_parts(model)]
        self._handles += [handle for eager in self._eager for handle in eager.handles]

    def _register(self, model: nn.Module, criterion: object) -> list[RemovableHandle]:
        before, after = ModuleHook(model, self._begin_forward), ModuleHook(model, self._end_forward)
        given_up = ModuleHook(model, self.taps.give_up)
        handles = [
            model.register_forward_pre_hook(given_up, prepend=True),
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        if isinstance(criterion, nn.Module):
            hook = ModuleHook(criterion, self._claim)
            handles.append(criterion.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.taps.remove()
        self._give_up_calls()

    def schedule(self, *, active: bool) -> None:
        """Say whether the next step updates the factors; never once the hooks are removed."""
        self.taps.active = active and bool(self._handles)

    @property
    def active(self) -> bool:
        """Whether layers are tapped: whether the next step updates the factors."""
        return self.taps.active

    def _takes_statistics(self) -> bool:
        return self.active

    @property
    def needs_pass(self) -> bool:
        """Whether statistics come from Fisher passes rather than from the user's backward."""
        return self.vectors is not None

    def end_step(self, step: int) -> None:
        """Forget what belongs to the step that is over; ``step`` steps are completed now."""
        if self.vectors is not None:
            self.vectors.step = step
        self._unclaimed.clear()
        self._check.report()
        self.discard()

    def discard(self) -> None:
        """Forget everything that has been counted since the last step."""
        self.terms = 0.0
        self._count += 1
        self._counts = "none"
        self.missing = ""
        self.statistics.discard()
        self.statistics.mask_fits = None
        self._check.give_up()
        if current_pass() is None:
            self._give_up_calls()
        if self.vectors is not None:
            self.vectors.start_step(self.vectors.step)
        if self.recorder is not None:
            self.recorder.clear()

    def _give_up_calls(self) -> None:
        """No call of the model is under way; one may have been interrupted."""
        self.taps.give_up()
        for eager in self._eager:
            eager.give_up()

    def _start_anew(self) -> None:
        """As if there had been no backward pass since the last step."""
        self._forget()
        self.discard()

    # --- forward -------------------------------------------------------------------------------

    def _begin_forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note a call of the model."""
        if not torch.is_grad_enabled():
            return
        if current_pass() is None:
            self.statistics.flush()
        self._record = self._reader.read(args, kwargs)
        if self.recorder is not None:
            self._record.repeatable = self.recorder.begin(args, kwargs)
        self.taps.begin_call(self._record)
        self._in_forward = True

    def _end_forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Watch the model's output for the user's backward pass."""
        record = self._record
        self._in_forward = False
        if record is None or not torch.is_grad_enabled():
            return
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        self.taps.end_call(tensors)
        if not tensors:
            return  # the call has failed, or there is nothing to train
        if self.recorder is not None and record.repeatable is not None:
            self.recorder.end(record.repeatable, output)
        self._check.leave_out(self.taps.unseen_weights(tensors))
        for tensor in tensors:
            mark(tensor, self._key, record)
            on_backward(tensor, self._enter, record)
        if self.likelihood is not None and not self._criterion_called:
            self._watch_unclaimed(record, self._reader.output(output), tensors)

    def _watch_unclaimed(
        self, record: ForwardRecord, output: Tensor | None, tensors: Sequence[Tensor]
    ) -> None:
        """Be ready for a loss that is not computed by the criterion object.

        Args:
            record: The call of the model.
            output: What its loss is computed from; a function may have computed it anew from the
                model's output, and then it is not itself in the graph of the loss.
            tensors: All tensors in the model's output.
        """
        if output is None or not output.requires_grad or output.dim() == 0:
            return
        if self.active and self.needs_pass:
            if current_pass() is not None:
                return  # checkpointing has called the model again; no pass of ours starts here
            if not self._model.training:
                self._unclaimed.clear()  # an evaluation with gradients never calls backward
            self._unclaimed[record] = output
        is_computed_anew = all(tensor is not output for tensor in tensors)
        for tensor in tensors if is_computed_anew else [output]:
            on_backward(tensor, self._reach_unclaimed, record, output.detach())

    def _claim(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Let the criterion's input announce the user's backward pass."""
        output = argument(args, kwargs, 0, "input")
        if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
            return None
        records = self._records_behind(output)
        if not records:
            return None  # the loss of another model
        self._criterion_called = True
        self._unclaimed.clear()
        claims = mark_of(output, f"{self._key} claims")
        if claims is None:
            claims = Claims(records)
            mark(output, f"{self._key} claims", claims)
            on_backward(output, self._settle, claims)
        claimed = OutputTap.apply(output, argument(args, kwargs, 1, "target"), claims.reach)
        return ((claimed, *args[1:]), kwargs) if args else ((), kwargs | {"input": claimed})

    def _records_behind(self, output: Tensor) -> list[ForwardRecord]:
        """The calls of the model that a tensor was computed from, by walking its graph."""
        if self._in_forward and self._record is not None:
            return [self._record]  # the model computes its own loss
        return marks_behind(output, self._key)

    # --- backward ------------------------------------------------------------------------------

    def _trains(self, fates: set[Fate], records: Sequence[ForwardRecord]) -> bool:
        """Whether the backward pass that is under way computes gradients to train with.

        What it accumulates is for training, and then nothing else since the last step is. Without
        that, what ``torch.autograd.grad`` returns is, unless it is to be differentiated in turn or
        is the derivative of such a gradient.

        Args:
            fates: What the pass does with the gradients of some weights.
            records: The calls of the model that it has come to.
        """
        if not fates & {"accumulated", "returned"}:
            return False
        was_differentiable = any(record.is_differentiable for record in records)
        if torch.is_grad_enabled():
            for record in records:
                record.is_differentiable = True
        if "accumulated" in fates:
            if self._counts == "returned":
                self._start_anew()
            self._counts = "accumulated"
        elif torch.is_grad_enabled() or was_differentiable:
            self.missing = _DERIVATIVE
            return False
        elif self._counts == "none":
            self._counts = "returned"
        if self._foreign_pass == current_pass() or any(map(self._is_foreign, records)):
            self.missing = _FOREIGN
            return False
        return self._counts in fates

    def _is_training_pass(self, records: Sequence[ForwardRecord]) -> bool:
        """Whether the backward pass that is under way is the user's and trains the model."""
        if Capture._running:
            return False
        fates = _fates(layer for layer in self._layers if layer.is_trained)
        if fates == {"none"} and any(record.is_recomputed for record in records):
            # Of weights that are used only in regions the engine does not know before it is there.
            fates = {"accumulated"} if reaches_every_leaf() else fates
        return not fates or self._trains(fates, records)

    def _enter(self, record: ForwardRecord) -> None:
        """A backward pass has come to an output of a call of the model."""
        if Capture._running:
            return
        if self._is_foreign(record):
            self._foreign_pass = current_pass()
        self._meet(record)
        if self.likelihood is None:
            self._count_terms(record)

    def _meet(self, record: ForwardRecord) -> None:
        """Tell the backward passes of the user through one call from each other."""
        if record.seen_in not in (None, current_pass()):
            self.statistics.flush_gradients(record)
        record.seen_in = current_pass()

    def _count_terms(self, record: ForwardRecord) -> None:
        """The user's backward pass has begun: count a batch's loss terms, once."""
        if record.loss_terms is None or not self._is_training_pass([record]):
            return
        if record.counted != self._count:
            record.counted = self._count
            self.terms = self.terms + record.loss_terms

    def _reach_unclaimed(self, record: ForwardRecord, output: Tensor) -> None:
        """As :meth:`_settle`, where the user does not call the criterion object.

        Args:
            record: The call of the model.
            output: Its output, detached.
        """
        if self._criterion_called or not self._is_training_pass([record]):
            return
        if record.counted == self._count:
            return
        self._warn_of_unseen_targets(output)
        if self.active and self.needs_pass:
            if record not in self._unclaimed:
                raise RuntimeError(
                    "The model was called several times in evaluation mode before the backward "
                    "pass, and of its outputs only the last was kept. Compute the loss as "
                    "criterion(output, target) with the criterion that K-FAC was given."
                )
            output = self._unclaimed[record]
            if self._counts == "accumulated":
                del self._unclaimed[record]
        record.counted = self._count  # our own pass fires this hook again
        self._reach_output([record], output, None, 1)

    def _settle(self, claims: "Claims") -> None:
        """All calls of the criterion on one output have been reached: count, run our pass."""
        reached, claims.reached = claims.reached, []  # our own pass fires this hook again
        if reached and self._is_training_pass(claims.records):
            for output, target in reached:
                self._reach_output(claims.records, output, target, len(reached))

    def _warn_of_unseen_targets(self, output: Tensor) -> None:
        likelihood = self.likelihood
        if not isinstance(likelihood, CrossEntropy):
            return
        if output.dim() > 2 or likelihood.criterion.ignore_index >= 0:
            warnings.warn(
                "The criterion object was not called, so K-FAC does not see the targets: terms "
                "whose target is ignore_index count as ordinary ones. Compute the loss as "
                "criterion(output, target) to leave them out.",
                stacklevel=2,
            )

    def _warn_of_mixed_examples(self) -> None:
        """Type-2 sends one vector for an output element of all examples at once; warn once."""
        if self.fisher != "type-2" or self._has_looked_for_mixing:
            return
        self._has_looked_for_mixing = True
        for name, module in self._model.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                warnings.warn(
                    f"fisher='type-2' is exact only if the examples of a batch do not mix, but "
                    f"the {type(module).__name__} {name!r} normalises by the statistics of the "
                    "batch. Use fisher='mc', which is unbiased there.",
                    stacklevel=2,
                )
                return

    def _reach_output(
        self,
        records: Sequence[ForwardRecord],
        output: Tensor,
        target: Tensor | None,
        calls: int,
    ) -> None:
        """The user's backward pass has reached the model's output: count terms, run ours.

        Args:
            records: The calls of the model that the output comes from.
            output: What the criterion was called with.
            target: The criterion's target, if it was called.
            calls: How many calls of the criterion on this very output the loss combines.
        """
        assert self.likelihood is not None
        with torch.no_grad():
            normalizer = _scalar(self.likelihood, output.detach(), target)
            counted = self._count_once(records, normalizer)
            share: Tensor | None = None
            if calls > 1 or counted is not normalizer:
                share = torch.full_like(normalizer, 1 / calls)
                if self.likelihood.reduction == "mean":
                    share = share * counted / normalizer
            batch_sizes = [record.batch_size or 1 for record in records]
            if self.recorder is not None:
                self._refuse_to_repeat(records)
                repeatable = [r.repeatable for r in records if r.repeatable is not None]
                self.recorder.add_loss(
                    repeatable, output, target,
                    share=1.0 if share is None else share, examples=sum(batch_sizes),
                )  # fmt: skip
            if not self.active or self.vectors is None:
                return
            self._warn_of_mixed_examples()
            vectors = self.vectors.draw(output.detach(), target, batch_sizes)
            if share is not None:
                root = share.sqrt()
                vectors = (vector * root.to(vector) for vector in vectors)
            try:
                self._run_pass(output, vectors)
            except RuntimeError as error:
                if any(record.is_recomputed for record in records):
                    raise RuntimeError(self._reentrant("A layer")) from error
                raise

    def _is_foreign(self, record: ForwardRecord) -> bool:
        """Whether a call with other weights says nothing about the curvature, or misleads."""
        is_repeated = self.recorder is not None  # with all of the model's own weights
        return record.is_foreign or (is_repeated and record.has_other_weights)

    def _refuse_to_repeat(self, records: Sequence[ForwardRecord]) -> None:
        """Derivatives along a direction pass by layers that run without gradients at first."""
        if any(record.is_recomputed for record in records):
            raise RuntimeError(
                "Layers run without gradients inside of a torch.autograd.Function, as under "
                "reentrant activation checkpointing, and an automatic step cannot tell how the "
                "output changes with their weights. Use torch.utils.checkpoint.checkpoint(..., "
                "use_reentrant=False), or numbers as lr, momentum and damping."
            )

    def _count_once(self, records: Sequence[ForwardRecord], normalizer: Tensor) -> Tensor:
        """Count the terms of a loss, unless another loss on the same forward has been counted.

        The losses of several heads add up, and so do their curvatures; the number of examples
        that they are means over does not.

        Returns:
            What was counted for that forward.
        """
        for record in records:
            if record.counted == self._count and record.normalizer is not None:
                return record.normalizer
        for record in records:
            record.counted, record.normalizer = self._count, normalizer
        self.terms = self.terms + normalizer
        return normalizer

    def _run_pass(self, output: Tensor, vectors: Iterator[Tensor]) -> None:
        previous, Capture._running = Capture._running, self
        self._pass = object()
        try:
            for vector in vectors:
                probe = self.taps.probe(output.device)
                torch.autograd.grad(output, probe, vector, retain_graph=True, allow_unused=True)
                self.statistics.flush_gradients()
            self.statistics.flush()
        finally:
            self._pass = None
            Capture._running = previous

    def _visit(
        self,
        targets: Sequence[Target],
        record: ForwardRecord | None,
        recomputed: bool,
        x: Tensor,
        gradient: Tensor,
        last: object,
    ) -> object:
        """A gradient has arrived at a tap: take the statistics that this pass is for.

        ``last`` is the Fisher pass in which this call's input was counted last, and so is the
        return value: a pass sends many vectors, but the input is the same for all of them.
        """
        foreign = Capture._running is not None and Capture._running is not self
        if foreign or not self.active:
            return last
        if recomputed and record is not None and self.recorder is not None:
            self._refuse_to_repeat([record])
        if self._pass is None:
            if self.needs_pass:
                self._refuse_reentrant(targets[0].layer, recomputed)
            if not self._is_counted(targets, record, recomputed):
                return last
            for target in targets:
                self._check.add(target.layer, target.input(x), target.gradient(gradient))
            if self.needs_pass:
                return last
        is_counted = self._pass is not None and last is self._pass
        for target in targets:
            inputs, gradients = target.input(x), target.gradient(gradient)
            self.statistics.take(
                target.layer, record, inputs, gradients, count_input=not is_counted
            )
        return self._pass

    def _is_counted(
        self, targets: Sequence[Target], record: ForwardRecord | None, recomputed: bool
    ) -> bool:
        """Whether a visit of the user's backward pass is for training."""
        if record is not None and not recomputed:
            self._meet(record)
        fates = _fates(target.layer for target in targets)
        if fates == {"none"} and torch.is_grad_enabled():
            # What is made of this derivative by an input uses the weights out of our sight.
            self._check.leave_out(target.layer.weight.parameter for target in targets)
        return self._trains(fates, [] if record is None else [record])

    def _refuse_reentrant(self, layer: Layer, recomputed: bool) -> None:
        """The user's backward pass visits a tap that was made during it: no pass of ours can."""
        if recomputed:
            raise RuntimeError(self._reentrant(f"The layer {layer.name!r}"))

    def _reentrant(self, layer: str) -> str:
        return (
            f"{layer} is in a region under reentrant activation checkpointing, which the Fisher "
            f"pass of fisher={self.fisher!r} cannot enter. Use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or fisher='empirical'."
        )


def _fates(layers: Iterable[Layer]) -> set[Fate]:
    """What the backward pass that is under way does with the gradients of layers' weights."""
    fates: set[Fate] = set()
    for layer in layers:
        fates.add(fate_of_gradient(layer.weight.parameter))
        if "accumulated" in fates:
            break  # that settles it, and there may be many layers
    return fates


def _scalar(likelihood: Likelihood, output: Tensor, target: Tensor | None) -> Tensor:
    """The normaliser of a likelihood, which may be the user's own."""
    normalizer = likelihood.normalizer(output, target)
    if isinstance(normalizer, Tensor) and normalizer.dim() == 0:
        return normalizer
    raise ValueError(
        f"{type(likelihood).__name__}.normalizer() must give a tensor without dimensions, but gave "
        f"{normalizer!r}. See kfac.Likelihood."
    )


class Claims:
    """Calls of the criterion on one tensor, and which of them a backward pass has reached."""

    def __init__(self, records: Sequence[ForwardRecord]) -> None:
        self.records = records
        self.reached: list[tuple[Tensor, Tensor | None]] = []

    def reach(self, output: Tensor, target: Tensor | None) -> None:
        """A backward pass has come to one of the calls."""
        self.reached.append((output, target))
