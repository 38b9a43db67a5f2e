"""Hooks that see a layer's inputs and output gradients, and whose backward pass they are in.

On a factor step every layer's output carries a *tap*: an identity in the autograd graph that
holds the layer's input and, when a gradient arrives, hands both to the layer. Two kinds of
backward pass visit it. The user's own feeds the empirical Fisher. For the true Fisher, a *Fisher
pass* of our own starts from the model's output when the user's backward reaches it: vectors are
sent to the taps through ``torch.autograd.grad`` with respect to a scalar *probe* that every tap
takes as an input, which visits the taps without computing a single weight gradient.

Statistics thus enter only with a backward pass of the user, so ``zero_grad`` can discard those of
a batch that was given up, wherever in the loop it stands.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac.fisher import CrossEntropy, FisherType, Likelihood
from kfac.layers import Layer
from kfac.layers.base import row_moment

OutputSelector = str | int | Callable[[Any], Tensor]


class Sink(Protocol):
    """Where second moments go."""

    def __call__(self, layer: str, factor: str, moment: Tensor, rows: int) -> None:
        """Add a moment of factor "A" or "G" (``rows`` counts the rows of an "A")."""


@dataclass(eq=False)
class ForwardRecord:
    """One call of the root module: its batch size, and sums over a module's calls within it."""

    loss_terms: int | None
    batch_size: int | None
    counted: bool = False
    sums: dict[str, "PositionSums"] = field(default_factory=dict)


@dataclass
class PositionSums:
    """Inputs and gradients of one layer summed over positions and calls (``"reduce"``)."""

    layer: Layer
    rows: int = 0
    inputs: Tensor | None = None
    gradients: Tensor | None = None


class Capture:
    """Owns all hooks on a model and the state that they share.

    Args:
        model: The outermost module that the user calls.
        layers: The layers under K-FAC.
        sink: Receives every second moment.
        fisher: Which Fisher matrix the statistics are for.
        likelihood: What ``criterion=`` stands for, if given.
        criterion: The object that the user calls to compute the loss, if it is a module.
        outputs: Picks the tensor that the loss is computed from out of the model's output.
        loss_terms: Number of loss terms in a batch where it is not the batch size.
        num_samples: Vectors per Fisher pass of ``"mc"``.
        max_vectors: Upper limit to the vectors of a Fisher pass of ``"type-2"``.
        seed: Seeds the generator of the sampled labels.
    """

    # A Fisher pass of one optimizer may run through the taps of another on the same graph.
    # A plain global, because autograd runs backward passes on threads of its own.
    _running: "Capture | None" = None

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        sink: Sink,
        *,
        fisher: FisherType,
        likelihood: Likelihood | None,
        criterion: object,
        outputs: OutputSelector | None,
        loss_terms: int | Callable[..., int] | None,
        num_samples: int,
        max_vectors: int,
        seed: int,
    ) -> None:
        self.sink = sink
        self.fisher = fisher
        self.likelihood = likelihood
        self.outputs = outputs
        self.loss_terms = loss_terms
        self.num_samples = num_samples
        self.max_vectors = max_vectors
        self.seed = seed
        self.active = True
        self.terms: Tensor | float = 0.0
        self.expanded: set[str] = set()
        self.criterion_called = False
        self._generators: dict[torch.device, torch.Generator] = {}
        self._probes: dict[torch.device, Tensor] = {}
        self._record: ForwardRecord | None = None  # of the latest forward
        self._open: list[ForwardRecord] = []  # with sums that are not yet moments
        self._pass: object | None = None
        self._unclaimed: tuple[Tensor, ForwardRecord] | None = None
        self._handles = self._register(model, layers, criterion)

    def _register(
        self, model: nn.Module, layers: Sequence[Layer], criterion: object
    ) -> list[RemovableHandle]:
        handles = [
            model.register_forward_pre_hook(RootPreHook(self, model), with_kwargs=True),
            model.register_forward_hook(RootHook(self, model), with_kwargs=True),
        ]
        for layer in layers:
            hook = LayerHook(self, layer)
            # First in line: what other hooks make of the output is not the layer's own output.
            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        if isinstance(criterion, nn.Module):
            hook_ = CriterionHook(self, criterion)
            handles.append(criterion.register_forward_pre_hook(hook_, with_kwargs=True))
        return handles

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def needs_pass(self) -> bool:
        """Whether statistics come from Fisher passes rather than from the user's backward."""
        return self.fisher in ("mc", "type-2")

    # --- forward -------------------------------------------------------------------------------

    def begin_forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note a call of the root module."""
        self.flush()
        batch_size = next((t.shape[0] for t in tensors_in((args, kwargs)) if t.dim() > 0), None)
        terms = self.loss_terms if self.loss_terms is not None else batch_size
        if callable(terms):
            terms = terms(*args, **kwargs)
        self._record = ForwardRecord(terms, batch_size)

    def end_forward(self, output: Any) -> None:
        """Watch the root module's output for the user's backward pass."""
        record = self._record
        if record is None or not torch.is_grad_enabled():
            return
        if self.likelihood is None:
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(CountTerms(self, record))
        elif not self.criterion_called:
            selected = self._select(output)
            if selected is not None and selected.requires_grad:
                self._unclaimed = selected, record
                selected.register_hook(UnclaimedOutput(self, record))

    def _select(self, output: Any) -> Tensor | None:
        if callable(self.outputs):
            return self.outputs(output)
        if self.outputs is not None:
            selected = output[self.outputs]
            assert isinstance(selected, Tensor)
            return selected
        return output if isinstance(output, Tensor) else None

    def tap(self, layer: Layer, x: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output with a tap on it."""
        tapped: Tensor = Tap.apply(  # type: ignore[no-untyped-call]
            output, self._probe(output.device), x.detach(), (self, layer, self._record)
        )
        return tapped

    def _probe(self, device: torch.device) -> Tensor:
        if device not in self._probes:
            self._probes[device] = torch.zeros((), device=device, requires_grad=True)
        return self._probes[device]

    def claim(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the criterion's input so that the user's backward pass announces itself there."""
        self.criterion_called = True
        self._unclaimed = None
        claimed: Tensor = OutputTap.apply(  # type: ignore[no-untyped-call]
            output, target, (self, self._record)
        )
        return claimed

    # --- backward ------------------------------------------------------------------------------

    def count_terms(self, record: ForwardRecord) -> None:
        """Add a batch's loss terms once its backward pass has begun (without a criterion)."""
        if not record.counted and record.loss_terms is not None and not torch.is_grad_enabled():
            record.counted = True
            self.terms = self.terms + record.loss_terms

    def reach_output(
        self, output: Tensor, target: Tensor | None, record: ForwardRecord | None
    ) -> None:
        """The user's backward pass has reached the model's output: count terms, run ours."""
        assert self.likelihood is not None
        self.terms = self.terms + self.likelihood.normalizer(output.detach(), target)
        if not (self.active and self.needs_pass):
            return
        previous, Capture._running = Capture._running, self
        self._pass = object()
        try:
            for vector in self._vectors(output, target, record):
                probe = self._probe(output.device)
                torch.autograd.grad(output, probe, vector, retain_graph=True, allow_unused=True)
                self._flush_gradients()
            self.flush()
        finally:
            self._pass = None
            Capture._running = previous

    def reach_unclaimed_output(self, record: ForwardRecord) -> None:
        """As :meth:`reach_output`, where the criterion object was not called by the user."""
        if self._unclaimed is None or self._unclaimed[1] is not record:
            return
        output, _ = self._unclaimed
        self._unclaimed = None  # our own pass fires this hook again
        self._warn_of_unseen_targets(output)
        self.reach_output(output, None, record)

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

    def _vectors(
        self, output: Tensor, target: Tensor | None, record: ForwardRecord | None
    ) -> Iterator[Tensor]:
        assert self.likelihood is not None
        if self.fisher == "mc":
            generator = self.generator(output.device)
            for _ in range(self.num_samples):
                vector = self.likelihood.sample(output.detach(), target, generator)
                yield vector / self.num_samples**0.5
            return
        examples = len(output) if record is None else record.batch_size or len(output)
        count = self.likelihood.num_vectors(output.detach(), examples)
        if count > self.max_vectors:
            raise ValueError(
                f"KFAC(max_vectors=...) must be >= {count}, the back-propagated vectors that "
                f"fisher='type-2' needs for an output of shape {tuple(output.shape)}, but got "
                f"{self.max_vectors}. Raise it, or use fisher='mc', which needs num_samples."
            )
        yield from self.likelihood.vectors(output.detach(), target, examples)

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of the sampled labels on a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def generator_states(self) -> dict[str, Tensor]:
        """State of each device's generator."""
        return {str(device): g.get_state() for device, g in self._generators.items()}

    def load_generator_states(self, states: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`generator_states` returned."""
        self._generators.clear()
        for device, state in states.items():
            self.generator(torch.device(device)).set_state(state.cpu())

    def visit(
        self, layer: Layer, record: ForwardRecord | None, x: Tensor, gradient: Tensor, last: object
    ) -> object:
        """A gradient has arrived at a tap: take the statistics that this pass is for.

        Args:
            layer: The tapped layer.
            record: The root module's call in which the layer was called.
            x: The layer's input.
            gradient: The gradient of its output.
            last: The Fisher pass in which this call's input was counted last.

        Returns:
            The Fisher pass in which this call's input is counted now.
        """
        foreign = Capture._running is not None and Capture._running is not self
        if foreign or not self.active or self.needs_pass != (self._pass is not None):
            return last
        if self._pass is None and torch.is_grad_enabled():
            return last  # create_graph: a derivative inside the loss, not the gradient of the loss
        count_input = self._pass is None or last is not self._pass
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            if self._reduces(layer, record, x):
                assert record is not None
                self._sum_positions(layer, record, x if count_input else None, gradient)
            else:
                if count_input:
                    self.sink(layer.name, "A", layer.input_moment(x), layer.rows(x))
                if self.fisher != "forward-only":
                    self.sink(layer.name, "G", layer.gradient_moment(gradient), 0)
        return self._pass

    def _reduces(self, layer: Layer, record: ForwardRecord | None, x: Tensor) -> bool:
        if layer.weight_sharing == "expand":
            return False
        batch_size = None if record is None else record.batch_size
        if not batch_size or layer.leading_size(x) % batch_size:
            self.expanded.add(layer.name)
            return False
        return True

    def _sum_positions(
        self, layer: Layer, record: ForwardRecord, x: Tensor | None, gradient: Tensor
    ) -> None:
        examples = record.batch_size
        assert examples
        if record not in self._open:
            self._open.append(record)
        sums = record.sums.setdefault(layer.name, PositionSums(layer))
        if x is not None:
            rows = layer.rows(x)
            inputs = layer.input_mean(x, examples) * (rows // examples)
            sums.inputs = inputs if sums.inputs is None else sums.inputs + inputs
            sums.rows += rows
        if self.fisher != "forward-only":
            summed = layer.gradient_sum(gradient, examples)
            sums.gradients = summed if sums.gradients is None else sums.gradients + summed

    def flush(self) -> None:
        """Turn the sums over positions of finished backward passes into second moments."""
        self._flush_gradients()
        for record in self._open:
            for name, sums in record.sums.items():
                if sums.inputs is not None:
                    examples = len(sums.inputs)
                    mean = sums.inputs * (examples / sums.rows)
                    moment = row_moment(mean, sums.layer.shape.a_kind)
                    self.sink(name, "A", moment, examples)
        self._forget_sums()

    def _flush_gradients(self) -> None:
        for record in self._open:
            for name, sums in record.sums.items():
                if sums.gradients is not None:
                    moment = row_moment(sums.gradients, sums.layer.shape.g_kind)
                    self.sink(name, "G", moment, 0)
                    sums.gradients = None

    def _forget_sums(self) -> None:
        for record in self._open:
            record.sums.clear()
        self._open.clear()

    def discard(self) -> None:
        """Forget everything that has been counted since the last step."""
        self.terms = 0.0
        self._forget_sums()


class Tap(torch.autograd.Function):
    """Identity on a layer's output that shows the layer each gradient passing through."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor, x: Tensor, watcher: Any) -> Tensor:
        """Mark the output as modified in place: no copy, and later in-place use stays legal."""
        ctx.save_for_backward(x)
        ctx.watcher = watcher
        ctx.counted = None
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:  # type: ignore[override]
        """Let the layer take its statistics; the gradient passes as it is."""
        if gradient is not None:
            capture, layer, record = ctx.watcher
            (x,) = ctx.saved_tensors
            ctx.counted = capture.visit(layer, record, x, gradient, ctx.counted)
        return gradient, None, None, None


class OutputTap(torch.autograd.Function):
    """Identity on the criterion's input that starts the Fisher pass of the user's backward.

    It sits downstream of the output that it saves, so the graph owns it and not the other way
    round: an evaluation that never calls backward leaves nothing behind.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor | None, watcher: Any) -> Tensor:
        """Save the output, still attached to its graph, and the target."""
        ctx.save_for_backward(output, target)
        ctx.watcher = watcher
        ctx.set_materialize_grads(False)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:  # type: ignore[override]
        """Announce the user's backward pass."""
        if gradient is not None:
            capture, record = ctx.watcher
            output, target = ctx.saved_tensors
            capture.reach_output(output, target, record)
        return gradient, None, None


class _ModelHook:
    """A hook that copies and pickles as one that does nothing.

    A deep copy of the model (an exponential moving average, say) takes its hooks along; those
    must neither feed the original's statistics nor drag its optimizer into the copy.
    """

    def __init__(self, capture: Capture | None = None, module: nn.Module | None = None) -> None:
        self.capture = capture
        self.module = module

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def watching(self, module: nn.Module) -> Capture | None:
        """The capture, if this hook is alive and on the module that it was made for."""
        return self.capture if module is self.module else None


class RootPreHook(_ModelHook):
    """Notes the batch size of each call of the model."""

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        capture = self.watching(module)
        if capture is not None and torch.is_grad_enabled():
            capture.begin_forward(args, kwargs)


class RootHook(_ModelHook):
    """Watches the output of each call of the model."""

    @torch.compiler.disable
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        capture = self.watching(module)
        if capture is not None:
            capture.end_forward(output)


class LayerHook(_ModelHook):
    """Puts a tap on a layer's output when its statistics are due."""

    def __init__(self, capture: Capture | None = None, layer: Layer | None = None) -> None:
        super().__init__(capture, None if layer is None else layer.module)
        self.layer = layer

    @torch.compiler.disable
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        capture, layer = self.watching(module), self.layer
        if capture is None or layer is None or not capture.active:
            return None
        trains = module.weight is layer.weight and layer.weight.requires_grad
        if not (trains and torch.is_grad_enabled() and output.requires_grad):
            return None
        if torch._C._are_functorch_transforms_active():
            return None
        return capture.tap(layer, args[0] if args else kwargs["input"], output)


class CriterionHook(_ModelHook):
    """Sees what the criterion is called with."""

    @torch.compiler.disable
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        capture = self.watching(module)
        output = args[0] if args else kwargs.get("input")
        if capture is None or not isinstance(output, Tensor):
            return None
        if not (torch.is_grad_enabled() and output.requires_grad):
            return None
        target = args[1] if len(args) > 1 else kwargs.get("target")
        claimed = capture.claim(output, target)
        if args:
            return (claimed, *args[1:]), kwargs
        return (), kwargs | {"input": claimed}


class CountTerms:
    """Tensor hook that counts a batch's loss terms when the user's backward pass begins."""

    def __init__(self, capture: Capture, record: ForwardRecord) -> None:
        self.capture = weakref.ref(capture)
        self.record = record

    def __call__(self, gradient: Tensor) -> None:
        capture = self.capture()
        if capture is not None and Capture._running is None:
            capture.count_terms(self.record)


class UnclaimedOutput(CountTerms):
    """Tensor hook that starts the Fisher pass where the criterion object is not called."""

    def __call__(self, gradient: Tensor) -> None:
        capture = self.capture()
        if capture is not None and Capture._running is None:
            capture.reach_unclaimed_output(self.record)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and objects with attributes, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))
