"""Kronecker-factored natural gradient for PyTorch."""

from kfac import averaging, covariance
from kfac.fisher import Likelihood
from kfac.inverse import Cholesky, Eigen, Ekfac, InverseFree, NewtonSchulz
from kfac.levenberg_marquardt import LevenbergMarquardt
from kfac.optimizer import KFAC
from kfac.preconditioner import Preconditioner

__version__ = "0.1.0"

__all__ = [
    "KFAC",
    "Cholesky",
    "Eigen",
    "Ekfac",
    "InverseFree",
    "LevenbergMarquardt",
    "Likelihood",
    "NewtonSchulz",
    "Preconditioner",
    "averaging",
    "covariance",
]
