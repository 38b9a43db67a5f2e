"""How the first forward pass has used the layers' weights, and whether taps have seen it all."""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from kfac.graph import count_uses
from kfac.layers import Layer


class Uses:
    """Counts of the first forward pass, by weight.

    Attributes:
        taps: How often a layer with this weight was tapped.
        calls: How often of these its module was called.
    """

    def __init__(self) -> None:
        self.taps: Counter[nn.Parameter] = Counter()
        self.calls: Counter[nn.Parameter] = Counter()
        self._names: dict[nn.Parameter, str] = {}

    def add_taps(self, layers: Iterable[Layer]) -> None:
        """Count the layers that one tap is for."""
        for layer in layers:
            self.taps[layer.weight.parameter] += 1
            self._names.setdefault(layer.weight.parameter, layer.name)

    def add_call(self, layer: Layer) -> None:
        """Count a call of a layer's module."""
        self.calls[layer.weight.parameter] += 1

    def were_only_called(self, layers: Iterable[Layer]) -> bool:
        """Whether all of some layers have run, and only by calling their modules."""
        weights = {layer.weight.parameter for layer in layers}
        return all(self.taps[weight] == self.calls[weight] > 0 for weight in weights)

    def warn_of_unseen(self, outputs: Sequence[Tensor]) -> list[nn.Parameter]:
        """Warn of weights that also enter the model's outputs where no tap sees it.

        Returns:
            These weights.
        """
        unseen = []
        uses = count_uses(outputs, {name: weight for weight, name in self._names.items()})
        for weight, name in self._names.items():
            if uses[name] > self.taps[weight]:
                unseen.append(weight)
                warnings.warn(
                    f"The weight of the layer {name!r} is used {uses[name]} times in the forward "
                    f"pass, but K-FAC sees only {self.taps[weight]} of them. Leave the layer to "
                    "the fallback with skip=, or use the weight by calling its module.",
                    stacklevel=2,
                )
        return unseen
