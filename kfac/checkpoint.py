"""Curvature state to and from plain containers that ``torch.load(weights_only=True)`` accepts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac.factors import Bucket

VERSION = 1


def layers_to_dict(
    buckets: Sequence[Bucket], states: Sequence[Mapping[str, Tensor]], ready: Mapping[str, bool]
) -> dict[str, Any]:
    """Factors and inverse state of each layer, by its name."""
    return {
        name: {
            "factors": {k: f[i].clone() for k, f in bucket.factors.items()},
            "weight": bucket.weight[i].clone(),
            "inverse": {k: t[i].clone() for k, t in state.items()},
            "ready": ready.get(name, False),
        }
        for bucket, state in zip(buckets, states, strict=True)
        for i, name in enumerate(bucket.names)
    }


def checked_version(saved: Any) -> Mapping[str, Any]:
    """Return ``saved`` if it is K-FAC state of this format, else raise ``ValueError``."""
    found = saved.get("version") if isinstance(saved, Mapping) else None
    if found != VERSION:
        raise ValueError(
            f"The state dict must hold K-FAC state of format version {VERSION}, but has {found!r}. "
            "It was saved by another optimizer or another release."
        )
    assert isinstance(saved, Mapping)
    return saved


def check_complete(saved: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``saved`` has every one of ``keys``."""
    missing = ", ".join(sorted(set(keys) - saved.keys()))
    if missing:
        raise ValueError(f"The state dict lacks {missing}. It is truncated, or not one of K-FAC.")


def check_setting(saved: Mapping[str, Any], key: str, mine: str) -> None:
    """Raise ``ValueError`` unless the state was saved with the same setting."""
    if saved[key] != mine:
        raise ValueError(
            f"The state dict was saved with {key}={saved[key]!r}, but this optimizer has "
            f"{key}={mine!r}. Construct it with the saved setting."
        )


def check_layers(
    layers: Mapping[str, Any],
    buckets: Sequence[Bucket],
    states: Sequence[Mapping[str, Tensor]],
) -> None:
    """Raise ``ValueError`` unless saved layers fit these buckets; the message names the layer."""
    expected = {name for bucket in buckets for name in bucket.names}
    for problem, names in (
        ("lacks the layers", expected - layers.keys()),
        ("has layers that this optimizer does not have:", layers.keys() - expected),
    ):
        if names:
            raise ValueError(f"The state dict {problem} {', '.join(sorted(names))}.")
    for bucket, state in zip(buckets, states, strict=True):
        for name in bucket.names:
            check_complete(layers[name], ("factors", "weight", "inverse", "ready"))
            _check_shapes(name, "factors", layers[name]["factors"], bucket.factors)
            _check_shapes(name, "inverse", layers[name]["inverse"], state)


def fitting(
    layers: Mapping[str, Any],
    buckets: Sequence[Bucket],
    states: Sequence[Mapping[str, Tensor]],
) -> dict[str, Any]:
    """Those of the saved layers that have a place of the same shapes in these buckets."""
    found = {}
    for bucket, state in zip(buckets, states, strict=True):
        for name in bucket.names:
            saved = layers.get(name)
            if saved is not None and _fits(saved, bucket, state):
                found[name] = saved
    return found


def _fits(saved: Mapping[str, Any], bucket: Bucket, state: Mapping[str, Tensor]) -> bool:
    pairs = ((saved["factors"], bucket.factors), (saved["inverse"], state))
    return all(_shapes(theirs) == _shapes(mine, 1) for theirs, mine in pairs)


def _shapes(tensors: Mapping[str, Tensor], skipped: int = 0) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape[skipped:]) for key, tensor in tensors.items()}


def _check_shapes(
    layer: str, kind: str, saved: Mapping[str, Tensor], stacked: Mapping[str, Tensor]
) -> None:
    theirs, mine = _shapes(saved), _shapes(stacked, 1)
    if theirs != mine:
        raise ValueError(
            f"The state dict has {kind} of shapes {theirs} for the layer {layer!r}, "
            f"but this model needs {mine}."
        )


@torch.no_grad()
def load_layers(
    layers: Mapping[str, Any],
    buckets: Sequence[Bucket],
    states: Sequence[Mapping[str, Tensor]],
) -> dict[str, bool]:
    """Copy saved layers into the buckets, in the buckets' dtype and device.

    Returns:
        Whether each layer has an inverse; not for layers that were not saved.
    """
    ready = {}
    for bucket, state in zip(buckets, states, strict=True):
        for i, name in enumerate(bucket.names):
            if name not in layers:
                continue
            saved = layers[name]
            bucket.weight[i] = saved["weight"]
            for key, tensor in saved["factors"].items():
                bucket.factors[key][i].copy_(tensor)
            for key, tensor in saved["inverse"].items():
                state[key][i].copy_(tensor)
            ready[name] = saved["ready"]
    return ready
