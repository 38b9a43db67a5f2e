"""Checkpoint files that are whole or not there, and are loaded only if no bit has changed."""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from experiment.errors import RunError
from experiment.whole_files import replacing

LATEST = "latest.pt"
BEST = "best.pt"

COMMENT_LENGTH = 2
"""Bytes at the end of a zip archive that say how long the comment is."""
DIGEST = 32
CHUNK = 2**20


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a file that `torch.load` reads, with a checksum; a crash leaves the previous one."""
    with replacing(path) as file:
        torch.save(content, file)
        # torch checks nothing that it reads. The seal is the comment of the zip archive that it
        # writes, so every reader of such files takes this one too.
        end = file.seek(-COMMENT_LENGTH, os.SEEK_END)
        seal = seal_of(file, end)
        file.seek(end)
        file.write(seal)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to continue from, onto the CPU.

    Only tensors and plain values are ever read: no code in the file can run.

    Raises:
        RunError: If there is none, or it is not exactly what was saved.
    """
    content = load_sealed(path)
    if not isinstance(content, dict) or "optimizer" not in content:
        raise RunError(f"{path} holds no training state; resume from {path.with_name(LATEST)}.")
    return content


def load_sealed(path: Path) -> object:
    remedy = "resume from another copy of it, or leave --resume out to start anew"
    try:
        with path.open("rb") as file:
            if not is_sealed(file):
                raise RunError(
                    f"{path} is damaged, or was not written by this version of the script: "
                    f"its checksum does not match; {remedy}."
                )
            file.seek(0)
            return load_plain(path, file)
    except FileNotFoundError:
        raise RunError(f"No checkpoint at {path}; leave --resume out to start anew.") from None
    except OSError as error:
        raise RunError(f"Cannot read {path}: {error.strerror}; {remedy}.") from None


def load_plain(path: Path, file: BinaryIO) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever somebody else's file makes of torch's reader
        raise RunError(
            f"{path} was not written by this script: it is no file of tensors and plain values "
            "alone, and is not loaded; resume from a checkpoint of your own."
        ) from error


def is_sealed(file: BinaryIO) -> bool:
    end = file.seek(0, os.SEEK_END) - COMMENT_LENGTH - DIGEST
    if end < 0:
        return False
    seal = seal_of(file, end)
    return file.read() == seal


def seal_of(file: BinaryIO, end: int) -> bytes:
    """Comment, and its length, of an archive whose first `end` bytes are these; reads so far."""
    digest = hashlib.sha256()
    file.seek(0)
    while end and (part := file.read(min(end, CHUNK))):
        digest.update(part)
        end -= len(part)
    return DIGEST.to_bytes(COMMENT_LENGTH, "little") + digest.digest()
