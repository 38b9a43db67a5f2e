"""Second moments of feature maps: pure functions of tensors, independent of the optimizer."""

from kfac.covariance.channels import channel_covariance
from kfac.covariance.geometry import PatchGeometry
from kfac.covariance.gram import gram
from kfac.covariance.patches import (
    extract_patches,
    patch_count,
    patch_covariance,
    patch_mean,
    patch_second_moment_diagonal,
)

__all__ = [
    "PatchGeometry",
    "channel_covariance",
    "extract_patches",
    "gram",
    "patch_count",
    "patch_covariance",
    "patch_mean",
    "patch_second_moment_diagonal",
]
