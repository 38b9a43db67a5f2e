"""Strategies for applying the inverse of a damped Kronecker product."""

from kfac.inverse.base import Inverse, InverseName, merge, resolve
from kfac.inverse.cholesky import Cholesky
from kfac.inverse.eigen import Eigen
from kfac.inverse.ekfac import Ekfac
from kfac.inverse.inverse_free import InverseFree
from kfac.inverse.newton_schulz import NewtonSchulz

STRATEGIES: dict[str, type[Inverse]] = {
    "cholesky": Cholesky,
    "eigen": Eigen,
    "ekfac": Ekfac,
    "newton-schulz": NewtonSchulz,
    "inverse-free": InverseFree,
}

__all__ = [
    "STRATEGIES",
    "Cholesky",
    "Eigen",
    "Ekfac",
    "Inverse",
    "InverseFree",
    "InverseName",
    "NewtonSchulz",
    "merge",
    "resolve",
]
