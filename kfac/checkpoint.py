"""State to and from plain containers that ``torch.load(weights_only=True)`` accepts.

Whatever is loaded is checked before anything changes. Every check raises a ``ValueError`` that
names the entry and where it is: a layer, a parameter, a parameter group or a part of the optimizer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isnan
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kfac.arguments import BOOLEAN, NON_NEGATIVE_INTEGER, POSITIVE, Constraint
from kfac.factors import Bucket

VERSION = 2

NUMBER = Constraint("a number", lambda v: isinstance(v, Real) and not isinstance(v, bool))
MAPPING = Constraint("a dict", lambda v: isinstance(v, Mapping))
_MADE_FROM = Constraint("a finite number > 0 or None", lambda v: v is None or POSITIVE.accepts(v))

# What is known of a layer besides its tensors: whether it has an inverse, whether it has run, how
# many refreshes in a row have failed, and the damping that the inverse was made with if it was made
# from the present factors.
_RECORDS: dict[str, tuple[Any, Constraint]] = {
    "ready": (False, BOOLEAN),
    "seen": (False, BOOLEAN),
    "failures": (0, NON_NEGATIVE_INTEGER),
    "made_from": (None, _MADE_FROM),
}
_DAMAGED = "It is damaged, or not one of K-FAC."

Records = dict[str, Mapping[str, Any]]


# --- entries -----------------------------------------------------------------------------------


def checked_version(saved: Any) -> dict[str, Any]:
    """Return the engine's state in this format, older formats included, else raise."""
    found = saved.get("version") if isinstance(saved, Mapping) else None
    if type(found) is int and found > VERSION:
        raise ValueError(
            f"The state dict is of format version {found} and was saved by a newer release, which "
            f"this one, of format version {VERSION}, cannot read. Upgrade kfac."
        )
    if type(found) is not int or found < 1:
        raise ValueError(
            f"The state dict must hold K-FAC state of format version {VERSION}, but has "
            f"{_shown(found)}. It was saved by another optimizer, or is damaged."
        )
    return dict(saved) if found == VERSION else _upgraded(saved)


def _upgraded(saved: Mapping[str, Any]) -> dict[str, Any]:
    """State of version 1 with the entries that version 2 has added."""
    state = {"burned_in": 0, "captures_next": False} | dict(saved) | {"version": VERSION}
    if isinstance(state.get("counters"), Mapping):
        state["counters"] = {"skipped_refreshes": 0, "failed_refreshes": 0} | state["counters"]
    if isinstance(state.get("layers"), Mapping):
        state["layers"] = {
            name: _upgraded_layer(layer) if isinstance(layer, Mapping) else layer
            for name, layer in state["layers"].items()
        }
    return state


def _upgraded_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    weight = layer.get("weight")
    has_run = isinstance(weight, Tensor) and bool((weight > 0).any())
    seen = layer.get("ready") is True or has_run
    return {"seen": seen, "failures": 0, "made_from": None} | dict(layer)


def check_keys(
    saved: Any, where: str, required: Iterable[str], *, others: bool = False
) -> Mapping[str, Any]:
    """Return ``saved`` if it is a dict with these keys, and with no others unless they may be."""
    check_value(saved, where, MAPPING)
    assert isinstance(saved, Mapping)
    wanted = set(required)
    if missing := wanted - saved.keys():
        raise ValueError(f"The state dict lacks {_listed(missing)} in {where}. {_DAMAGED}")
    if not others and (extra := saved.keys() - wanted):
        raise ValueError(
            f"The state dict has {_listed(extra)} in {where}, which this optimizer does not have. "
            "Construct it with the saved settings."
        )
    return saved


def check_entries(saved: Any, where: str, constraints: Mapping[str, Constraint]) -> None:
    """Raise unless ``saved`` is a dict with exactly these keys, and values that may be."""
    check_keys(saved, where, constraints)
    for key, constraint in constraints.items():
        check_value(saved[key], f"{key} in {where}", constraint)


def check_value(value: Any, what: str, constraint: Constraint) -> None:
    """Raise unless a value meets its constraint."""
    if not constraint.accepts(value):
        raise ValueError(
            f"The state dict has {_shown(value)} for {what}, which must be {constraint.text}. "
            f"{_DAMAGED}"
        )


def check_setting(saved: Mapping[str, Any], key: str, mine: str) -> None:
    """Raise unless the state was saved with the same setting."""
    if not (isinstance(saved[key], str) and saved[key] == mine):
        raise ValueError(
            f"The state dict was saved with {key}={_shown(saved[key])}, but this optimizer has "
            f"{key}={mine!r}. Construct it with the saved setting."
        )


def check_tensor(value: Any, what: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise unless a value is a tensor of this shape whose elements are finite in this dtype."""
    if not isinstance(value, Tensor) or value.is_sparse or not value.is_floating_point():
        raise ValueError(
            f"The state dict has {_shown(value)} for {what}, which must be a dense tensor of "
            f"floating-point numbers. {_DAMAGED}"
        )
    if value.shape != torch.Size(shape):
        raise ValueError(
            f"The state dict has a tensor of shape {tuple(value.shape)} for {what}, but this model "
            f"needs {tuple(shape)}. Load it into an optimizer of the model that it was saved with."
        )
    if not value.to(dtype).isfinite().all():
        raise ValueError(
            f"The state dict has a tensor for {what} that is not finite in {dtype}. It is damaged, "
            "or was saved in a wider type."
        )


def _shown(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, str | Real) else type(value).__name__


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, names)))


# --- contents ----------------------------------------------------------------------------------


def contents(state: Any) -> dict[Any, dict[Any, str]]:
    """What a state by parameter holds: for each entry its type and shape, in words.

    Parts of it may be absent for good reasons, as momentum of a parameter that never had a
    gradient. With its contents beside it one can tell whether something is missing.
    """
    if not isinstance(state, Mapping):
        return {}
    return {
        key: {name: _outline(value) for name, value in _entries(entries).items()}
        for key, entries in state.items()
    }


def _entries(found: Any) -> Mapping[Any, Any]:
    return found if isinstance(found, Mapping) else {"value": found}


def _outline(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "tensor" if value.is_floating_point() else f"tensor of {value.dtype}"
        return f"{kind} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_outline(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_outline, value)) + "]"
    return "number" if NUMBER.accepts(value) else type(value).__name__


def check_contents(what: str, saved: Any, noted: Any, named: Callable[[Any], str]) -> None:
    """Raise unless a state by parameter holds what it did when it was saved, and no NaN.

    Args:
        what: How messages call the state.
        saved: The state.
        noted: Its :func:`contents` when it was saved.
        named: How messages call what is under a key.
    """
    check_value(saved, what, MAPPING)
    check_value(noted, f"what {what} held", MAPPING)
    for key in [*saved, *(key for key in noted if key not in saved)]:
        where = named(key)
        entries, expected = _entries(saved.get(key, {})), noted.get(key, {})
        check_value(expected, where, MAPPING)
        if (key in saved) != (key in noted):
            raise ValueError(f"The state dict lacks a part of what it had for {where}. {_DAMAGED}")
        found = {name: _outline(value) for name, value in entries.items()}
        for name in {**found, **expected}:
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"The state dict has {found.get(name, 'nothing')} for {name} of {where}, but "
                    f"had {expected.get(name, 'nothing')} when it was saved. {_DAMAGED}"
                )
            if not _is_sound(entries[name]):
                raise ValueError(
                    f"The state dict has {name} of {where} that is not finite. {_DAMAGED}"
                )


def _is_sound(value: Any) -> bool:
    """Whether no number in a value is NaN and no tensor infinite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return all(map(_is_sound, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_sound, value))
    return not (isinstance(value, float) and isnan(value))


# --- layers ------------------------------------------------------------------------------------


def layers_to_dict(
    buckets: Sequence[Bucket], states: Sequence[Mapping[str, Tensor]], records: Records
) -> dict[str, Any]:
    """Factors, inverse state and records of each layer, by its name.

    Args:
        buckets: The layers.
        states: Inverse state of each bucket.
        records: Values by layer name, under the names of the records.
    """
    return {
        name: {
            "factors": {k: f[i].clone() for k, f in bucket.factors.items()},
            "weight": bucket.weight[i].clone(),
            "inverse": {k: t[i].clone() for k, t in state.items()},
            **{key: records[key].get(name, default) for key, (default, _) in _RECORDS.items()},
        }
        for bucket, state in zip(buckets, states, strict=True)
        for i, name in enumerate(bucket.names)
    }


def check_layers(
    layers: Any,
    buckets: Sequence[Bucket],
    states: Sequence[Mapping[str, Tensor]],
    *,
    strict: bool,
) -> None:
    """Raise unless saved layers fit these buckets; the message names the layer.

    Args:
        layers: What :func:`layers_to_dict` returned.
        buckets: Where they are to be loaded.
        states: Inverse state of each bucket.
        strict: Whether the same layers have to be on both sides.
    """
    check_value(layers, "layers in kfac", MAPPING)
    expected = {name for bucket in buckets for name in bucket.names}
    for problem, names in (
        ("lacks the layers", expected - layers.keys()),
        ("has layers that this optimizer does not have:", layers.keys() - expected),
    ):
        if names and strict:
            raise ValueError(
                f"The state dict {problem} {_listed(names)}. Construct the optimizer with the "
                "saved model, params= and skip=, or load with strict=False, which takes the layers "
                "that both have and starts the others anew."
            )
    for bucket, state in zip(buckets, states, strict=True):
        for name in bucket.names:
            if name in layers:
                _check_layer(name, layers[name], bucket, state)


def _check_layer(name: str, saved: Any, bucket: Bucket, state: Mapping[str, Tensor]) -> None:
    where = f"the layer {name!r}"
    check_keys(saved, where, ("factors", "weight", "inverse", *_RECORDS))
    for key, (_, constraint) in _RECORDS.items():
        check_value(saved[key], f"{key} of {where}", constraint)
    check_tensor(saved["weight"], f"weight of {where}", (), bucket.dtype)
    if saved["weight"] < 0:
        raise ValueError(f"The state dict has a negative weight of {where}. {_DAMAGED}")
    for kind, mine in (("factors", bucket.factors), ("inverse", state)):
        theirs = saved[kind]
        check_value(theirs, f"{kind} of {where}", MAPPING)
        if _shapes(theirs) != _shapes(mine, 1):
            raise ValueError(
                f"The state dict has {kind} of shapes {_shapes(theirs)} for {where}, but this "
                f"model needs {_shapes(mine, 1)}. Construct the optimizer with the saved model, "
                "max_factor_dim= and weight_sharing=, or leave the layer out with skip= and load "
                "with strict=False."
            )
        for key, tensor in theirs.items():
            check_tensor(tensor, f"{key} of {where}", mine[key].shape[1:], bucket.dtype)


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


def _shapes(tensors: Mapping[str, Any], skipped: int = 0) -> dict[str, tuple[int, ...] | None]:
    """Shapes by key; None of what is no tensor."""
    return {
        key: tuple(tensor.shape[skipped:]) if isinstance(tensor, Tensor) else None
        for key, tensor in tensors.items()
    }


@torch.no_grad()
def load_layers(
    layers: Mapping[str, Any],
    buckets: Sequence[Bucket],
    states: Sequence[Mapping[str, Tensor]],
) -> Records:
    """Copy saved layers into the buckets, in the buckets' dtype and device.

    Layers that were not saved start anew.

    Returns:
        The records of all layers, as in :func:`layers_to_dict`.
    """
    records: dict[str, dict[str, Any]] = {key: {} for key in _RECORDS}
    for bucket, state in zip(buckets, states, strict=True):
        for i, name in enumerate(bucket.names):
            saved = layers.get(name)
            bucket.weight[i] = 0.0 if saved is None else saved["weight"]
            for kind, mine in (("factors", bucket.factors), ("inverse", state)):
                for key, tensor in mine.items():
                    if saved is None:
                        tensor[i].zero_()
                    else:
                        tensor[i].copy_(saved[kind][key])
            for key, (default, _) in _RECORDS.items():
                records[key][name] = default if saved is None else saved[key]
    return dict(records)
