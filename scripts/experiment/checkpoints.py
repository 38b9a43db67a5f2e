"""Checkpoint files that are either whole or not there."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from experiment.errors import RunError

LATEST = "latest.pt"
BEST = "best.pt"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write beside `path`, flush to disk, then rename: a crash leaves the previous file."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to continue from, onto the CPU; a folder stands for its latest one."""
    path = path / LATEST if path.is_dir() else path
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"No checkpoint at {path}; leave --resume out to start anew.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise RunError(f"{path} is not a readable checkpoint: {error}") from None
    if not isinstance(content, dict) or "optimizer" not in content:
        raise RunError(f"{path} holds no training state; resume from {path.with_name(LATEST)}.")
    return content
