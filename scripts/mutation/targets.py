"""Which modules are mutated, and the fast tests of each file, the most specific first."""

from pathlib import Path

MODULES = {
    "factors": "kfac/factors.py",
    "fisher": "kfac/fisher.py",
    "damping": "kfac/damping.py",
    "quadratic_model": "kfac/quadratic_model.py",
    "update": "kfac/update.py",
    "inverse": "kfac/inverse",
    "covariance": "kfac/covariance",
}
# The tests of a file, by the start of its path: the first that fits.
_SUITES = {
    "kfac/factors.py": ("tests/test_factors.py", "tests/test_ties.py"),
    "kfac/fisher.py": (
        "tests/test_fisher_products.py",
        "tests/test_monte_carlo.py",
        "tests/test_arguments.py",
    ),
    "kfac/damping.py": ("tests/test_damping.py",),
    "kfac/quadratic_model.py": ("tests/test_quadratic_model.py",),
    "kfac/update.py": ("tests/test_update.py",),
    "kfac/inverse/decompose.py": ("tests/inverse/test_decompose.py",),
    "kfac/inverse/base.py": ("tests/inverse/test_kinds.py",),
    "kfac/inverse/eigen.py": (
        "tests/inverse/test_kinds.py",
        "tests/inverse/test_warm_start.py",
        "tests/inverse/test_staleness.py",
    ),
    "kfac/inverse/ekfac.py": ("tests/inverse/test_ekfac.py",),
    "kfac/inverse/factored.py": (
        "tests/inverse/test_kinds.py",
        "tests/inverse/test_newton_schulz.py",
        "tests/inverse/test_staleness.py",
    ),
    "kfac/inverse/inverse_free.py": (
        "tests/inverse/test_inverse_free.py",
        "tests/test_arguments.py",
    ),
    "kfac/inverse/newton_schulz.py": ("tests/inverse/test_newton_schulz.py",),
    "kfac/inverse/rotations.py": ("tests/inverse/test_warm_start.py",),
    "kfac/inverse/staleness.py": ("tests/inverse/test_staleness.py",),
    "kfac/inverse": ("tests/inverse",),
    "kfac/covariance/cost.py": ("tests/covariance/test_cost.py",),
    "kfac/covariance/channels.py": ("tests/covariance/test_channels.py",),
    "kfac/covariance/gram.py": ("tests/covariance/test_channels.py",),
    "kfac/covariance/geometry.py": ("tests/covariance/test_patches.py",),
    "kfac/covariance/patches.py": ("tests/covariance/test_patches.py",),
    "kfac/covariance/unfold.py": ("tests/covariance/test_patches.py",),
    "kfac/covariance": ("tests/covariance/test_methods.py",),
}


def sources_of(root: Path, module: str) -> list[Path]:
    path = root / MODULES[module]
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def suite_of(path: str) -> tuple[str, ...]:
    """Test files and folders for a source, in the order in which they are run."""
    return next(tests for start, tests in _SUITES.items() if path.startswith(start))
