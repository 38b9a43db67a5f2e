"""Whether what two runs have left is the same to the last bit."""

from collections.abc import Iterable, Set
from itertools import count

import torch
from torch import Tensor


def differences(
    key: str, one: object, other: object, ignored: Set[object] = frozenset()
) -> list[str]:
    """The entries in which two containers differ, but those under `ignored` keys.

    Args:
        key: what stands in front of the keys of the entries.
    """
    pairs: Iterable[tuple[object, object, object]]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{key}: other keys"]
        pairs = ((name, one[name], other[name]) for name in one if name not in ignored)
    elif isinstance(one, list | tuple) and type(one) is type(other):
        if len(one) != len(other):
            return [f"{key}: {len(one)} and {len(other)} entries"]
        pairs = zip(count(), one, other, strict=False)
    else:
        return [] if same_bits(one, other) else [key]
    return [
        found
        for name, left, right in pairs
        for found in differences(f"{key}.{name}", left, right, ignored)
    ]


def same_bits(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))
    # The representation tells -0.0 from 0.0 and takes nan for nan.
    return type(one) is type(other) and repr(one) == repr(other)
