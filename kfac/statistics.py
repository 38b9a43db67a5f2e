"""From what taps see to second moments, under ``"expand"`` and under ``"reduce"``."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kfac.example_gradients import Basis, squared_gradients
from kfac.layers import Layer
from kfac.layers.base import row_moment
from kfac.recorder import RecordedCall

# Block name, factor "A", "G" or "S", its second moment, the number of rows in it (of an "A").
Sink = Callable[[str, str, Tensor, int | Tensor], None]
# Eigenbasis of a block by name, None before there is one.
Bases = Callable[[str], Basis | None]


@dataclass(eq=False)
class ForwardRecord:
    """One call of the model.

    Attributes:
        batch_size: Size of the first axis of the model's first tensor argument.
        loss_terms: Number of terms in its loss, where there is no criterion to tell.
        mask: Which positions are real and not padding ``[examples, positions]``, None for all.
        counted: In which count its loss terms were included, -1 for none.
        normalizer: What was counted for it, where there is a criterion.
        uses: How often each block's layers were called, those in checkpointed regions included.
        has_own_weights, has_other_weights: Whether layers were called with the weights that are
            trained, and with others in their place (``torch.func.functional_call``).
        is_recomputed: Whether layers run again in the backward pass, as in reentrant regions.
        is_differentiable: Whether a gradient of its weights has been computed with a graph.
        seen_in: The backward pass of the user that has visited it last.
        calls: Of each block whose example gradients are wanted, the calls of this backward pass.
        sums: Of each block under ``"reduce"``, what has been summed over positions so far.
        repeatable: What it takes to make the call again, where that is wanted.
    """

    batch_size: int | None
    loss_terms: int | None
    mask: Tensor | None = None
    counted: int = -1
    normalizer: Tensor | None = None
    uses: Counter[str] = field(default_factory=Counter)
    has_own_weights: bool = False
    has_other_weights: bool = False
    is_recomputed: bool = False
    is_differentiable: bool = False
    seen_in: int | None = None
    calls: dict[str, list["Call"]] = field(default_factory=dict)
    sums: dict[str, "PositionSums"] = field(default_factory=dict)
    repeatable: RecordedCall | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether all of its layers were called with other weights."""
        return self.has_other_weights and not self.has_own_weights


class Call(NamedTuple):
    """What a tap has seen of one call of a layer."""

    layer: Layer
    x: Tensor
    gradient: Tensor


@dataclass
class PositionSums:
    """Inputs and gradients of one layer, summed over the positions of all its calls.

    Attributes:
        layer: The layer.
        positions: Positions in ``inputs``, of all examples alike or of each ``[examples]``.
        inputs: Σₜ a ``[examples, groups, d_in]``.
        gradients: Σₜ g ``[examples, groups, d_out]`` of the current backward pass.
    """

    layer: Layer
    positions: int | Tensor = 0
    inputs: Tensor | None = None
    gradients: Tensor | None = None


class Statistics:
    """Takes what taps see and sends second moments to a sink.

    Under ``"expand"`` every row is an outer product of its own. Under ``"reduce"`` the positions
    of an example are first averaged (inputs) or summed (gradients), over all calls of the module
    in one forward; so the moments are due only when the backward pass is over, at :meth:`flush`.

    Args:
        sink: Receives every moment.
        with_gradients: Whether G is wanted at all.
        bases: Where second moments of per-example gradients are wanted, the bases to take them in.
        fraction: Share of a call's examples (the first ones, one at least) that moments are
            estimated from, in (0, 1]. G and S are divided by the share that was taken, to be those
            of all examples in expectation. A call whose examples are not known is used whole.

    Attributes:
        expanded: Layers that are under ``"reduce"`` and whose examples were not known.
        mask_fits: Whether the masks since the last step had the positions of any layer; None
            without a mask, and where no layer that is trained has positions.

    Source:
        Eschenhagen et al. 2023, sections 3.1 and 3.2.
    """

    def __init__(
        self, sink: Sink, *, with_gradients: bool, bases: Bases | None, fraction: float
    ) -> None:
        self.sink = sink
        self.bases = bases
        self.fraction = fraction
        self.with_gradients = with_gradients
        self.expanded: set[str] = set()
        self.mask_fits: bool | None = None
        self._open: list[ForwardRecord] = []

    def take(
        self,
        layer: Layer,
        record: ForwardRecord | None,
        x: Tensor,
        gradient: Tensor,
        *,
        count_input: bool,
    ) -> None:
        """Take the input (unless it was counted before) and the output gradient of one call."""
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            examples = self._examples(layer, record, x, gradient)
            mask = _mask_of(layer, record, x) if count_input else None
            if count_input and record is not None and record.mask is not None:
                self._note_fit(layer, x, mask)
            share = 1.0 if examples is None else self._share(examples)
            if examples is not None and share < 1:
                size = layer.leading_size(gradient)
                kept = size // examples * self._kept(examples)
                if mask is not None:
                    mask = mask.reshape(size, -1)[:kept]
                (layer, x), gradient = layer.leading_part(x, kept), gradient[:kept]
            if examples is None or record is None or layer.weight_sharing == "expand":
                if count_input:
                    self._take_input(layer, mask, x)
                if self.with_gradients:
                    moment = layer.gradient_moment(gradient)
                    self.sink(layer.block, "G", _of_all(moment, share), 0)
            else:
                self._sum(layer, record, x if count_input else None, mask, gradient)
            if self.bases is not None:
                known = None if examples is None else record
                self._keep_call(Call(layer, x, gradient), known, self.bases)

    def _note_fit(self, layer: Layer, x: Tensor, mask: Tensor | None) -> None:
        """Note whether a layer needs a mask, and found it to be of its positions."""
        if mask is not None:
            self.mask_fits = True
        elif self.mask_fits is None and _has_positions(layer, x):
            self.mask_fits = False

    def _take_input(self, layer: Layer, mask: Tensor | None, x: Tensor) -> None:
        if mask is None:
            self.sink(layer.block, "A", layer.input_moment(x), layer.row_count(x))
        else:
            self.sink(layer.block, "A", layer.masked_moment(x, mask.flatten()), mask.sum())

    def _examples(
        self, layer: Layer, record: ForwardRecord | None, x: Tensor, gradient: Tensor
    ) -> int | None:
        """Number of examples in a call, None where every row has to count as one."""
        is_asked_for = layer.weight_sharing == "reduce" or self.bases is not None
        if not is_asked_for and self.fraction == 1:
            return None
        batch_size = None if record is None else record.batch_size
        if (
            not batch_size
            or layer.leading_size(gradient) % batch_size
            or (self.fraction < 1 and not layer.tells_examples(x, batch_size))
        ):
            if is_asked_for:
                self.expanded.add(layer.name)
            return None
        return batch_size

    def _kept(self, examples: int) -> int:
        """How many of a call's examples moments are estimated from."""
        return max(1, round(self.fraction * examples))

    def _share(self, examples: int) -> float:
        """Share of a call's examples that moments are estimated from."""
        return self._kept(examples) / examples

    # --- per-example gradients -----------------------------------------------------------------

    def _keep_call(self, call: Call, record: ForwardRecord | None, bases: Bases) -> None:
        """Square a call's example gradients once all calls of its block have come.

        Args:
            call: The call.
            record: The call of the model, None where the examples are not known.
            bases: The bases to square them in.
        """
        block = call.layer.primary.name
        basis = bases(block)
        if basis is None:
            return
        if record is None:
            self._square([call], call.layer.row_count(call.x), basis)
            return
        if record not in self._open:
            self._open.append(record)
        calls = record.calls.setdefault(block, [])
        calls.append(call)
        if len(calls) == record.uses[block]:
            self._square_examples(record, record.calls.pop(block), basis)

    def _square_examples(self, record: ForwardRecord, calls: list[Call], basis: Basis) -> None:
        examples = record.batch_size or 1
        self._square(calls, self._kept(examples), basis, self._share(examples))

    def _square(self, calls: list[Call], examples: int, basis: Basis, share: float = 1.0) -> None:
        """Send on the squares of the example gradients that some calls add up to.

        Args:
            calls: Calls of layers of one block.
            examples: Examples in what was kept of each.
            basis: The basis to square them in.
            share: Share of all examples that these are.
        """
        layer, x, gradient = calls[0]
        # A model may have changed its dtype since its factors were made.
        basis = Basis(*(None if v is None else v.to(layer.dtype) for v in basis))
        if len(calls) == 1 and not layer.is_transposed:
            moment = layer.squared_gradients(x, gradient, examples, basis)
        else:
            rows = [call.layer.block_rows(call.x, call.gradient, examples) for call in calls]
            inputs, gradients = (torch.cat(side, dim=1) for side in zip(*rows, strict=True))
            moment = squared_gradients(inputs, gradients, basis)
        self.sink(layer.primary.name, "S", _of_all(moment, share), 0)

    # --- sums over positions -------------------------------------------------------------------

    def _sum(
        self,
        layer: Layer,
        record: ForwardRecord,
        x: Tensor | None,
        mask: Tensor | None,
        gradient: Tensor,
    ) -> None:
        if record not in self._open:
            self._open.append(record)
        examples = self._kept(record.batch_size or 1)
        sums = record.sums.setdefault(layer.block, PositionSums(layer))
        if x is not None:
            if mask is None:
                positions: int | Tensor = layer.row_count(x) // examples
                inputs = layer.input_mean(x, examples) * positions
            else:
                mask = mask.reshape(examples, -1)
                positions, inputs = mask.sum(1), layer.masked_sum(x, mask)
            sums.inputs = inputs if sums.inputs is None else sums.inputs + inputs
            sums.positions = sums.positions + positions
        if self.with_gradients:
            total = layer.gradient_sum(gradient, examples)
            sums.gradients = total if sums.gradients is None else sums.gradients + total

    def flush_gradients(self, only: ForwardRecord | None = None) -> None:
        """One backward pass is over: turn its summed gradients into moments, of one call or all."""
        for record in self._open:
            if only is not None and record is not only:
                continue
            while record.calls:
                block, calls = record.calls.popitem()
                basis = None if self.bases is None else self.bases(block)
                if basis is not None:
                    self._square_examples(record, calls, basis)
            for name, sums in record.sums.items():
                if sums.gradients is not None:
                    moment = row_moment(sums.gradients, sums.layer.shape.factor_shapes()["G"])
                    share = self._share(record.batch_size or 1)
                    self.sink(name, "G", _of_all(moment, share), 0)
                    sums.gradients = None

    def flush(self) -> None:
        """All backward passes are over: turn every sum into a moment."""
        self.flush_gradients()
        for record in self._open:
            for name, sums in record.sums.items():
                if sums.inputs is not None:
                    positions = sums.positions
                    if isinstance(positions, Tensor):
                        positions = positions.clamp(min=1).to(sums.inputs).view(-1, 1, 1)
                    shape = sums.layer.shape.factor_shapes()["A"]
                    moment = row_moment(sums.inputs / positions, shape)
                    self.sink(name, "A", moment, len(sums.inputs))
        self.discard()

    def discard(self) -> None:
        """Forget the sums."""
        for record in self._open:
            record.sums.clear()
            record.calls.clear()
        self._open.clear()


def _of_all(moment: Tensor, share: float) -> Tensor:
    """What a sum over a share of the examples tells of the sum over all."""
    return moment if share == 1 else moment / share


def _has_positions(layer: Layer, x: Tensor) -> bool:
    """Whether a layer's input has more than one axis beside that of its features."""
    return max(len(layer.leading_shape(x)), x.dim() - 1) > 1


def _mask_of(layer: Layer, record: ForwardRecord | None, x: Tensor) -> Tensor | None:
    """The mask of the model's positions, if a layer's input has just these."""
    if record is None or record.mask is None:
        return None
    shape = layer.leading_shape(x)
    is_flat = shape == (record.mask.numel(),)
    return record.mask if is_flat or shape == tuple(record.mask.shape) else None
