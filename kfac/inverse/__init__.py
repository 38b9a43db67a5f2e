"""Strategies for applying the inverse of a damped Kronecker product."""

from kfac.inverse.base import Inverse, InverseName, merge, resolve
from kfac.inverse.cholesky import Cholesky
from kfac.inverse.eigen import Eigen

STRATEGIES: dict[str, type[Inverse]] = {"cholesky": Cholesky, "eigen": Eigen}

__all__ = ["STRATEGIES", "Cholesky", "Eigen", "Inverse", "InverseName", "merge", "resolve"]
