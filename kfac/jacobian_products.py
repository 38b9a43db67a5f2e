"""Products J d of the Jacobian of a model's output by its parameters.

By forward mode, one pass for each direction, which costs about two forward passes, see
:mod:`kfac.forward_mode`. An operation without a forward-mode derivative is left to two reverse
passes,

    J d = ∂/∂u ((Jᵀu)ᵀ d),

which cost more and hold a graph. To batch the directions with ``torch.vmap`` saves nothing for
two of them, and a BatchNorm that counts its batches does not take it.

Source:
    Martens & Grosse 2015, section 7 and appendix C; Pearlmutter 1994, "Fast Exact Multiplication
    by the Hessian" (forward mode).
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from kfac.forward_mode import SharedPrimals, dual, load_forward_mode, parts
from kfac.hooks import silent_hooks
from kfac.recorder import RecordedCall, with_state

Mode = Literal["forward", "double-backward"]
# A value for some or all parameters.
Direction = Mapping[nn.Parameter, Tensor]
_Named = Mapping[str, Tensor]


class JacobianProducts:
    """Computes J d on recorded calls of a model, in a mode that is found to be right for it.

    The first call is checked. Repeating the forward pass has to give the recorded outputs, and
    products have to fit a backward pass, (Jᵀu)ᵀd = uᵀ(J d): forward mode differentiates what is
    inside of ``no_grad``, too, which no backward pass does.

    Args:
        model: The module without wrappers.

    Attributes:
        mode: How products are computed from now on.
        reason: Why not by forward mode; empty if they are.
        is_checked: Whether the mode is known to be right.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mode: Mode = "forward"
        self.reason = ""
        self._model = model
        self.is_checked = False
        self._repeats = True  # until a repeated forward pass gives another output
        load_forward_mode()

    def __call__(self, call: RecordedCall, directions: Sequence[Direction]) -> list[list[Tensor]]:
        """J d for every direction, on one call of the model.

        Args:
            call: The call.
            directions: d, by parameter; parameters that are left out do not move.

        Returns:
            For every direction, a tensor of the shape of the input of every loss of the call.

        Raises:
            RuntimeError: If an operation can be differentiated in neither way.
        """
        names = {parameter: name for name, parameter in self._model.named_parameters()}
        named = [{names[p]: d.detach().to(p) for p, d in each.items()} for each in directions]
        # Checkpointed regions run again in backward passes, too, and may change buffers then.
        with with_state(self._model, call.buffers, call.attributes):
            tangents = self._by_forward_mode(call, named) if self.mode == "forward" else None
            if tangents is None:
                tangents = self._by_double_backward(call, named)
                # A function that is differentiable once need not raise: its derivative may be lost.
                if not (self.is_checked or self._fit_backward(call, named, tangents)):
                    raise self._refusal()
        self.is_checked = True
        return tangents

    def _refusal(self) -> RuntimeError:
        return RuntimeError(
            "The model can be differentiated neither in forward mode nor twice in reverse mode, so "
            f"the curvature along a step is unknown. {self.reason} Give the operation a "
            "derivative, or use numbers as lr and momentum."
        )

    # --- forward mode --------------------------------------------------------------------------

    def _by_forward_mode(
        self, call: RecordedCall, directions: Sequence[_Named]
    ) -> list[list[Tensor]] | None:
        """The products, None if they cannot be had or are not those of the backward pass."""
        self.mode = "double-backward"
        try:
            shared = SharedPrimals(keep=len(directions) > 1)
            tangents = [
                self._pushed_forward(
                    call, direction, shared if self._repeats else SharedPrimals(keep=False)
                )
                for direction in directions
            ]
        except NotImplementedError as error:
            self.reason = str(error).split("\n")[0]
            return None
        if not (self.is_checked or self._fit_backward(call, directions, tangents)):
            self.reason = "Forward mode does not agree with the backward pass."
            return None
        self.mode = "forward"
        return tangents

    def _pushed_forward(
        self, call: RecordedCall, direction: _Named, rules: SharedPrimals
    ) -> list[Tensor]:
        parameters = dict(self._model.named_parameters())
        with torch.no_grad(), forward_ad.dual_level():
            duals = {
                name: dual(parameters[name].detach(), tangent)
                for name, tangent in direction.items()
            }
            with rules:
                outputs = self._outputs(call, duals)
            return [_tangent(output) for output in outputs]

    def _fit_backward(
        self,
        call: RecordedCall,
        directions: Sequence[_Named],
        tangents: Sequence[Sequence[Tensor]],
    ) -> bool:
        """Whether (Jᵀu)ᵀd = uᵀ(J d) for a vector u without structure, if that can be told."""
        if not self._repeats:
            return True
        leaves, outputs = self._with_graph(call, directions)
        vectors = [_unstructured(output) for output in outputs]
        pulled_back = _gradients(outputs, list(leaves.values()), vectors)
        gradients = dict(zip(leaves, pulled_back, strict=True))
        for direction, products in zip(directions, tangents, strict=True):
            backward = sum(float((gradients[n] * d).sum()) for n, d in direction.items())
            pairs = list(zip(vectors, products, strict=True))
            forward = sum(float((u * z).sum()) for u, z in pairs)
            size = sum(float(u.norm() * z.norm()) / max(z.numel(), 1) ** 0.5 for u, z in pairs)
            if abs(forward - backward) > call.precision ** (1 / 3) * (size + abs(backward)):
                return False
        return True

    # --- reverse mode --------------------------------------------------------------------------

    def _by_double_backward(
        self, call: RecordedCall, directions: Sequence[_Named]
    ) -> list[list[Tensor]]:
        leaves, outputs = self._with_graph(call, directions)
        vectors = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        try:
            pulled_back = _gradients(outputs, list(leaves.values()), vectors, create_graph=True)
            gradients = dict(zip(leaves, pulled_back, strict=True))
            return [
                _gradients([gradients[name] for name in direction], vectors, direction.values())
                for direction in directions
            ]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._refusal() from error

    def _with_graph(
        self, call: RecordedCall, directions: Sequence[_Named]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Copies of the parameters that move, and the call's outputs as functions of them."""
        moving = {name for direction in directions for name in direction}
        leaves = {
            name: parameter.detach().requires_grad_()
            for name, parameter in self._model.named_parameters()
            if name in moving
        }
        with torch.enable_grad():
            return leaves, self._outputs(call, leaves)

    def _outputs(self, call: RecordedCall, parameters: _Named) -> list[Tensor]:
        outputs = call.run(self._model, parameters)
        if self._repeats and not self.is_checked:
            self._repeats = _is_repeated(call, outputs)
        return outputs


def _is_repeated(call: RecordedCall, outputs: Sequence[Tensor]) -> bool:
    """Whether a repeated forward pass gives what was recorded; warn if it does not."""
    for loss, output in zip(call.losses, outputs, strict=True):
        recorded, repeated = loss.output.get(), output.detach()
        if repeated.shape != recorded.shape:
            raise RuntimeError(
                f"The loss was computed from a tensor of shape {tuple(recorded.shape)}, but "
                f"outputs= picks one of shape {tuple(repeated.shape)} from the model's output."
            )
        size = float(recorded.float().norm())
        if float((repeated - recorded).float().norm()) > call.precision ** (1 / 3) * size:
            warnings.warn(
                "Repeating the forward pass with the same arguments, buffers and random numbers "
                "gives another output, so the curvature along the step is that of another draw. "
                "The model may depend on state of its own, or draw numbers elsewhere than from "
                "torch's generators.",
                stacklevel=2,
            )
            return False
    return True


def _tangent(output: Tensor) -> Tensor:
    """The derivative along the direction, zeros where it has no influence."""
    primal, tangent = parts(output)
    return torch.zeros_like(primal) if tangent is None else tangent


def _unstructured(output: Tensor) -> Tensor:
    """A vector that is orthogonal to nothing in particular, without any random numbers."""
    count = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
    return (count + 1).cos().view(output.shape).to(output)


def _gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Iterable[Tensor],
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """Σ Jᵀv over several outputs, zeros where an input has no influence."""
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    with silent_hooks():  # checkpointed regions run again, as they ran: without taps
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            list(inputs),
            [vector for _, vector in pairs],
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    return list(found)
