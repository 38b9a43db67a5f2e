"""Modules and their names, free of what wrappers put around them and into them."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Names that wrappers give to what they wrap, beside the common "module" of the parallel ones.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def clean_names(model: nn.Module) -> dict[str, str]:
    """Names of all modules without what DDP, ``torch.compile`` and other wrappers put into them.

    Returns:
        From the name in ``model.named_modules()`` to the clean one.
    """
    clean = {"": ""}
    parents = {"": model}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name:
            continue
        parent, _, leaf = name.rpartition(".")
        parents[name] = module
        is_wrapper = leaf in _WRAPPERS or (
            leaf == "module" and isinstance(parents[parent], DistributedDataParallel | DataParallel)
        )
        clean[name] = clean[parent] if is_wrapper else f"{clean[parent]}.{leaf}".lstrip(".")
    return clean


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DDP, ``torch.compile`` and other wrappers."""
    while True:
        inside = [
            child
            for name, child in model.named_children()
            if name in _WRAPPERS or isinstance(model, DistributedDataParallel | DataParallel)
        ]
        if not inside:
            return model
        model = inside[0]


def joined(module: str, parameter: str) -> str:
    """Dotted name of a parameter of a module, whose own name may be empty."""
    return f"{module}.{parameter}".lstrip(".")
