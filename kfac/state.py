"""The state of the whole optimizer: torch's part and that of everything beside it."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfac import checkpoint
from kfac.automatic import AutomaticStep
from kfac.fallback import Fallback, check_fallback
from kfac.grafting import Graft
from kfac.preconditioner import Preconditioner


@dataclass(frozen=True)
class Parts:
    """What of :class:`kfac.KFAC` has state besides torch's "state" and "param_groups".

    Attributes:
        engine: Factors, inverses, seed and counters: "kfac".
        graft: Reads its averages from "state".
        automatic: "automatic", where the quadratic model chooses the steps.
        fallback: "fallback", if there is one.
    """

    engine: Preconditioner
    graft: Graft | None
    automatic: AutomaticStep | None
    fallback: Fallback | None

    def state_dict(self) -> dict[str, Any]:
        """The state of every part, by its name."""
        state_dict: dict[str, Any] = {"kfac": self.engine.state_dict()}
        if self.fallback is not None:
            state_dict["fallback"] = self.fallback.state_dict()
        if self.automatic is not None:
            state_dict["automatic"] = self.automatic.state_dict()
        return state_dict

    def check_loadable(self, saved: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless :meth:`load` would succeed; changes nothing."""
        self.engine.check_loadable(saved.get("kfac"))
        check_fallback(self.fallback, saved.get("fallback"))
        if self.automatic is not None:
            checkpoint.check_complete(saved.get("automatic") or {}, self.automatic.state_dict())

    def load(
        self,
        saved: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
        state: MutableMapping[Any, Any],
    ) -> None:
        """Restore what :meth:`state_dict` returned, after torch has loaded its part.

        Args:
            saved: A state dict of the optimizer.
            groups: The optimizer's parameter groups.
            state: Its state by parameter.
        """
        if self.graft is not None:
            self.graft.load(groups, state, saved)
        self.engine.load_state_dict(saved["kfac"])
        if self.automatic is not None:
            self.automatic.load_state_dict(saved["automatic"])
        if self.fallback is not None:
            self.fallback.load_state_dict(saved["fallback"])
