"""Whether loaded containers are made as they should be, before anything is done with them."""

from torch import Tensor


def check_layout(key: str, found: object, expected: object) -> None:
    """Raise `ValueError` unless `found` has the keys, types and shapes of `expected`.

    Args:
        key: where `found` stands, for the message.
        expected: a value, or in place of one its type.
    """
    if isinstance(expected, type):
        fits = isinstance(found, expected)
    else:
        fits = describe(found) == describe(expected)
    if not fits:
        raise ValueError(f"{key} is {describe(found)} instead of {describe(expected)}.")
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return
    if missing := expected.keys() - found.keys():
        raise ValueError(f"{key} lacks {names(missing)}.")
    if unknown := found.keys() - expected.keys():
        raise ValueError(f"{key} has an unknown {names(unknown)}.")
    for name, value in expected.items():
        check_layout(f"{key}.{name}", found[name], value)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    kind = value if isinstance(value, type) else type(value)
    return "a dict" if issubclass(kind, dict) else f"of type {kind.__name__}"


def names(keys: set[object]) -> str:
    return ", ".join(sorted(map(str, keys)))
