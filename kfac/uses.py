"""How the first forward pass has used the layers' weights, and whether taps have seen it all."""

import warnings
from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from kfac.graph import count_uses
from kfac.layers import Layer


class Uses:
    """Counts of the first forward pass.

    Attributes:
        taps: How often each layer was tapped.
        calls: How often of these its module was called.
    """

    def __init__(self) -> None:
        self.taps: Counter[Layer] = Counter()
        self.calls: Counter[Layer] = Counter()

    def were_only_called(self, layers: Sequence[Layer]) -> bool:
        """Whether all of some layers have run, and only by calling their modules."""
        return all(self.taps[layer] == self.calls[layer] > 0 for layer in layers)

    def warn_of_unseen(self, outputs: Sequence[Tensor]) -> None:
        """Warn of weights that also enter the model's outputs where no tap sees it."""
        seen: Counter[nn.Parameter] = Counter()
        names: dict[nn.Parameter, str] = {}
        for layer, taps in self.taps.items():
            seen[layer.weight.parameter] += taps
            names.setdefault(layer.weight.parameter, layer.name)
        uses = count_uses(outputs, {name: parameter for parameter, name in names.items()})
        for parameter, name in names.items():
            if uses[name] > seen[parameter]:
                warnings.warn(
                    f"The weight of the layer {name!r} is used {uses[name]} times in the forward "
                    f"pass, but K-FAC sees only {seen[parameter]} of them. Leave the layer to the "
                    "fallback with skip=, or use the weight by calling its module.",
                    stacklevel=2,
                )
