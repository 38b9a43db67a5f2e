"""What the user has told about the model's arguments and outputs: how to read a call."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from kfac.arguments import POSITIVE_INTEGER, Constraint, argument_error, check, nearest
from kfac.names import unwrapped
from kfac.recorder import tensors_in
from kfac.statistics import ForwardRecord

OutputSelector = str | int | Callable[[Any], Tensor]

OUTPUTS = Constraint(
    "a key, an index, a callable or None",
    lambda v: v is None or callable(v) or (isinstance(v, (str, int)) and not isinstance(v, bool)),
)
PositionMask = str | Callable[..., Tensor | None]

POSITION_MASK = Constraint(
    "the name of an argument of the model, a callable or None",
    lambda v: v is None or callable(v) or isinstance(v, str),
)
LOSS_TERMS = Constraint(
    "an integer >= 1, a callable or None",
    lambda v: v is None or callable(v) or POSITIVE_INTEGER.accepts(v),
)


class CallReader:
    """Finds the loss terms, the mask and the input of the loss in a call of the model.

    Args:
        model: The outermost module that the user calls.
        outputs: Picks the tensor that the loss is computed from out of the model's output.
        loss_terms: Number of loss terms in a batch where it is not the batch size.
        position_mask: Where a call's argument or a function of all tells which positions are real.
        owner: Class name in error messages.

    Raises:
        ValueError: If the model has no argument of the mask's name.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        outputs: OutputSelector | None,
        loss_terms: int | Callable[..., int] | None,
        position_mask: PositionMask | None,
        owner: str,
    ) -> None:
        self._outputs = outputs
        self._loss_terms = loss_terms
        self._position_mask = position_mask
        self._owner = owner
        self._has_seen_mask = False
        self._signature = inspect.signature(unwrapped(model).forward)
        if isinstance(position_mask, str):
            _check_parameter(owner, position_mask, self._signature)

    @property
    def selects(self) -> bool:
        """Whether it was told where in the model's output the loss's input is."""
        return self._outputs is not None

    @property
    def masks(self) -> bool:
        """Whether it was told where the mask of a call is."""
        return self._position_mask is not None

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForwardRecord:
        """What the arguments of a call say, before it is made."""
        batch_size = next((t.size(0) for t in tensors_in((args, kwargs)) if t.dim() > 0), None)
        terms = self._loss_terms if self._loss_terms is not None else batch_size
        if callable(terms):
            terms = terms(*args, **kwargs)
            check(
                self._owner,
                "loss_terms",
                terms,
                POSITIVE_INTEGER,
                "It was returned by the function for this batch.",
            )
        return ForwardRecord(batch_size, terms, self._mask(args, kwargs))

    def _mask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Which positions of a call are real, as a boolean tensor."""
        if self._position_mask is None:
            return None
        if callable(self._position_mask):
            mask = self._position_mask(*args, **kwargs)
        elif self._position_mask in kwargs:
            mask = kwargs[self._position_mask]
        else:
            mask = self._signature.bind_partial(*args, **kwargs).arguments.get(self._position_mask)
        if mask is None:
            return None
        found: object = mask
        if isinstance(mask, Tensor):
            # Looked at once, since it waits for the device.
            is_new = not self._has_seen_mask
            if not (is_new and mask.is_floating_point() and bool((mask < 0).any())):
                self._has_seen_mask = True
                return mask.detach() != 0
            found = "a tensor with negative elements, as for adding to attention scores"
        raise argument_error(
            self._owner, "position_mask",
            "the name of a tensor argument, or a function that returns a tensor [N, T]", found,
            "Let it be 1 where a position is real and 0 where it is padding.",
        )  # fmt: skip

    def output(self, output: Any) -> Tensor | None:
        """The tensor that the loss is computed from, out of what the model returned.

        Returns:
            None where it was not told how to find it, and the output is not a tensor.

        Raises:
            ValueError: If there is none where ``outputs`` looks.
            RuntimeError: If it is nested.
        """
        found = output
        if self._outputs is not None and output is not None:
            try:
                found = self._outputs(output) if callable(self._outputs) else output[self._outputs]
            except (LookupError, TypeError) as error:
                raise self._no_such_output(output, "nothing") from error
            if not isinstance(found, Tensor):
                raise self._no_such_output(output, f"a {type(found).__name__}")
        if not isinstance(found, Tensor):
            return None
        if found.is_nested:
            raise RuntimeError(
                "The model's output is a nested tensor, of which K-FAC cannot tell the loss terms. "
                "Let the model return a padded one."
            )
        return found

    def _no_such_output(self, output: Any, found: str) -> ValueError:
        keys = f" with the keys {list(output)}" if isinstance(output, Mapping) else ""
        return argument_error(
            self._owner, "outputs", "what picks a tensor out of the model's output", self._outputs,
            f"It picks {found} out of a {type(output).__name__}{keys}. Pass the key or the index "
            "of the tensor that the loss is computed from, or a function that returns it.",
        )  # fmt: skip


def _check_parameter(owner: str, name: str, signature: inspect.Signature) -> None:
    """Refuse the name of an argument that a model does not take."""
    parameters = signature.parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if name not in parameters and not takes_any:
        raise argument_error(
            owner, "position_mask", f"one of the model's arguments {list(parameters)}", name,
            nearest(name, parameters) or "Or pass a function of them.",
        )  # fmt: skip
