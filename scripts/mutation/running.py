"""Tests of mutants, each in a process forked from one that has imported torch.

A mutant lives in a copy of the package in a temporary folder, which the child puts first on its
path before it imports the package.
"""

import gc
import importlib
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import hypothesis
import pytest
import torch

from mutation.mutants import Mutant

Status = Literal["killed", "timed out", "crashed", "survived"]
PACKAGE = "kfac"
MOST_MEMORY = 12 * 2**30  # bytes of one child
SLOWER = 10  # a mutant whose tests take so many times those of the package counts as hanging
LEAST_SECONDS = 20
FAILED_BEFORE_TESTS = 90
PASSED = int(pytest.ExitCode.OK)
FAILED = {int(pytest.ExitCode.TESTS_FAILED), int(pytest.ExitCode.INTERRUPTED), FAILED_BEFORE_TESTS}


class Outcome(NamedTuple):
    """What the tests said of a mutant."""

    status: Status
    test: str
    seconds: float


@dataclass(frozen=True)
class Job:
    """A child that is to be run: a mutant, or the package itself, under some tests."""

    mutant: Mutant | None
    tests: tuple[str, ...]
    cpu_seconds: float = math.inf


class FirstFailure:
    """Notes the first test that fails, and that the tests saw the copy of the package."""

    def __init__(self, path: Path, package: Path) -> None:
        self.path = path
        self.package = package

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)

    def pytest_collection_finish(self) -> None:
        found = sys.modules.get(PACKAGE)
        if found is not None and Path(str(found.__file__)).parent != self.package:
            pytest.exit(f"{PACKAGE} is not the copy", returncode=int(pytest.ExitCode.USAGE_ERROR))


def outcomes(root: Path, jobs: Sequence[Job], at_once: int) -> Iterator[tuple[Job, Outcome]]:
    """Run children, some of them at the same time; results come as they end.

    Args:
        root: The repository, which holds the package and its tests; nothing is written there.
        jobs: What to run.
        at_once: How many children live at a time.

    Raises:
        RuntimeError: A child could not run its tests.
    """
    if PACKAGE in sys.modules:
        raise RuntimeError(f"{PACKAGE} is already imported; children would test it unchanged.")
    prepare(root)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so as to clean up
    waiting = list(reversed(jobs))
    running: dict[int, tuple[Job, Path]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop()
                folder = Path(tempfile.mkdtemp(prefix="mutant-"))
                running[start(root, job, folder)] = job, folder
            pid, status, usage = os.wait4(-1, 0)
            job, folder = running.pop(pid)
            outcome = judged(status, folder, usage.ru_utime + usage.ru_stime)
            shutil.rmtree(folder)
            yield job, outcome
    finally:
        for pid, (_, folder) in running.items():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            shutil.rmtree(folder)


def prepare(root: Path) -> None:
    """Do in this process what every child would have to do."""
    torch.set_num_threads(1)  # no threads exist then, which a fork would lose
    hypothesis.settings.register_profile(
        "mutation",
        database=None,
        derandomize=True,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # any failure will do
    )
    hypothesis.settings.load_profile("mutation")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in imported_by_package(root):
        importlib.import_module(name)
    gc.freeze()  # children need not look through all of it for garbage


def imported_by_package(root: Path) -> list[str]:
    """Modules of torch that importing the package imports."""
    code = f"import sys, {PACKAGE}; print(*(m for m in sys.modules if m.startswith('torch.')))"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()


def start(root: Path, job: Job, folder: Path) -> int:
    """Fork a child; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = int(pytest.ExitCode.INTERNAL_ERROR)
    try:
        code = run_tests(root, job, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_tests(root: Path, job: Job, folder: Path) -> int:
    """What a child does; pytest's exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with (folder / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    package = folder / PACKAGE
    shutil.copytree(root / PACKAGE, package)
    if job.mutant is not None:
        sys.dont_write_bytecode = True
        (folder / job.mutant.path).write_text(job.mutant.source)
        limit(resource.RLIMIT_CPU, math.ceil(job.cpu_seconds))
        limit(resource.RLIMIT_DATA, MOST_MEMORY)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10 * math.ceil(job.cpu_seconds))  # asleep, it uses no processor time
    os.chdir(root)
    sys.path[:] = [str(folder), *(p for p in sys.path if p not in ("", str(root)))]
    try:
        importlib.import_module(PACKAGE)
    except Exception as error:
        (folder / "failure").write_text(f"import: {error!r}")
        return FAILED_BEFORE_TESTS
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "--tb=short", "--rootdir", str(root)]
    arguments += ["-p", "_hypothesis_pytestplugin"]
    arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is imported
    watcher: Any = FirstFailure(folder / "failure", package)
    return int(pytest.main([*arguments, *job.tests], plugins=[watcher]))


def limit(what: int, amount: int) -> None:
    resource.setrlimit(what, (amount, amount))


def judged(status: int, folder: Path, seconds: float) -> Outcome:
    """Read a child's end off its wait status and its folder."""
    failure = folder / "failure"
    test = failure.read_text() if failure.exists() else ""
    if os.WIFSIGNALED(status):
        hung = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
        return Outcome("timed out" if hung else "crashed", test, seconds)
    code = os.WEXITSTATUS(status)
    if code == PASSED:
        return Outcome("survived", "", seconds)
    if code in FAILED:
        return Outcome("killed", test, seconds)
    raise RuntimeError(f"pytest ended with {code}:\n{(folder / 'output').read_text()[-2000:]}")
