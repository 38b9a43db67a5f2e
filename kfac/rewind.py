"""What a step starts from, to repeat it or to undo it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kfac.curvature import Curvature
from kfac.hooks import silent_hooks
from kfac.preconditioner import Preconditioner


class Start:
    """What a step started from: random numbers, buffers and curvature, to come back to."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Curvature,
        random: dict[torch.device | None, Tensor],
        with_curvature: bool,
    ) -> None:
        self._model = model
        self._random = random
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self._blocks = blocks
        self._curvature = blocks.snapshot() if with_curvature else None

    @classmethod
    def of(cls, engine: Preconditioner, with_curvature: bool = True) -> "Start":
        """Here and now."""
        random: dict[torch.device | None, Tensor] = {None: torch.get_rng_state()}
        for device in {p.device for p in engine.params if p.device.type == "cuda"}:
            random[device] = torch.cuda.get_rng_state(device)
        return cls(engine.model, engine.blocks, random, with_curvature)

    def restore(self) -> None:
        """Go back."""
        self._restore_surroundings()
        if self._curvature is not None:
            self._blocks.restore(self._curvature)

    def _restore_surroundings(self) -> None:
        for device, state in self._random.items():
            if device is None:
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)
        self.restore_buffers()

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Go back as far as the model's buffers go, those that it had with these shapes."""
        for name, buffer in self._model.named_buffers():
            # One that a forward pass has made or resized is a cache, and the module counts on it.
            if name in self._buffers and self._buffers[name].shape == buffer.shape:
                buffer.copy_(self._buffers[name])

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within it, the step starts again as far as the model can tell; no trace is left."""
        now = Start(
            self._model,
            self._blocks,
            {
                d: torch.get_rng_state() if d is None else torch.cuda.get_rng_state(d)
                for d in self._random
            },
            with_curvature=False,
        )
        gradients = [(p, p.grad) for p in self._model.parameters()]
        for parameter, _ in gradients:
            parameter.grad = None
        self._restore_surroundings()
        try:
            with silent_hooks():
                yield
        finally:
            now._restore_surroundings()
            for parameter, gradient in gradients:
                parameter.grad = gradient
