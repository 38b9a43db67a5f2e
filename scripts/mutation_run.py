"""Change the package in one place at a time, at random, and count the changes that a test notices.

    python scripts/mutation_run.py
    python scripts/mutation_run.py --count 100 --modules factors update --jobs 2
    python scripts/mutation_run.py --retry        # after new tests: the survivors once more

Draws from all mutants of the modules, each as likely as the others, and runs the fast tests of
the changed file. Nothing is written to the package: a mutant is a copy. Results are kept in the
output file and not repeated unless the mutated file changes. Ends with an error if fewer than nine
of ten mutants are noticed, or if a survivor lacks a reason in scripts/mutation/survivors.json.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mutation.mutants import Mutant, read
from mutation.report import (
    Record,
    append,
    digest,
    load,
    record_of,
    share_killed,
    survivors,
    table,
    unexplained,
)
from mutation.running import LEAST_SECONDS, SLOWER, Job, outcomes
from mutation.targets import MODULES, sources_of, suite_of

ROOT = Path(__file__).resolve().parent.parent
REASONS = "scripts/mutation/survivors.json"
LEAST_SHARE = 0.9


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    root: Path = options.root
    output: Path = options.output or root / "runs" / "mutants.jsonl"
    drawn = draw(root, options.modules, options.count, options.seed)
    known = load(output)
    left = {
        mutant: module
        for mutant, module in drawn.items()
        if digest(mutant) not in known or (options.retry and known[digest(mutant)].survived)
    }
    run(root, left, options.jobs, output)
    known = load(output)
    order = list(MODULES)
    records = [known[digest(mutant)] for mutant in drawn]
    records.sort(key=lambda record: (order.index(record.module), record.key))
    return report(records, json.loads((root / REASONS).read_text()))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--count", type=int, default=400, help="how many mutants to draw")
    result.add_argument("--seed", type=int, default=0, help="of the draw")
    result.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    result.add_argument("--jobs", type=int, default=os.cpu_count(), help="tests at a time")
    result.add_argument("--retry", action="store_true", help="run known survivors again")
    result.add_argument("--root", type=Path, default=ROOT, help="the repository")
    result.add_argument("--output", type=Path, help="default: runs/mutants.jsonl")
    return result


def draw(root: Path, modules: Sequence[str], count: int, seed: int) -> dict[Mutant, str]:
    """Mutants and the module of each; a change of the package replaces only those that it touches.

    Every mutant has a random number, a hash of the seed and of what it changes; the smallest win.
    """
    everything = [
        (hashlib.sha256(f"{seed} {name}".encode()).digest(), module, source, index)
        for module in modules
        for source in (read(path, root) for path in sources_of(root, module))
        for index, name in enumerate(source.names)
    ]
    chosen = sorted(everything, key=lambda item: item[0])[:count]
    print(f"{len(chosen)} of {len(everything)} mutants, seed {seed}", flush=True)
    return {source.mutant(index): module for _, module, source, index in chosen}


def run(root: Path, left: dict[Mutant, str], at_once: int, output: Path) -> None:
    """Test mutants and append what becomes of them to a file."""
    if not left:
        return
    limits = time_limits(root, {suite_of(mutant.path) for mutant in left}, at_once, output)
    jobs = [Job(mutant, suite_of(mutant.path), limits[suite_of(mutant.path)]) for mutant in left]
    survived = 0
    with tqdm(total=len(jobs), unit=" mutants", desc="mutants") as bar:
        for job, outcome in outcomes(root, jobs, at_once):
            assert job.mutant is not None
            append(output, record_of(left[job.mutant], job.mutant, outcome))
            survived += outcome.status == "survived"
            bar.update()
            bar.set_postfix_str(f"{survived} survived")


def time_limits(
    root: Path, suites: set[tuple[str, ...]], at_once: int, output: Path
) -> dict[tuple[str, ...], float]:
    """Processor time that a mutant may take for some tests, from that of the package itself.

    It is kept beside the results.
    """
    path = output.with_suffix(".limits.json")
    kept: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    jobs = [Job(None, tests) for tests in sorted(suites) if " ".join(tests) not in kept]
    with tqdm(total=len(jobs), unit=" suites", desc="tests of the package") as bar:
        for job, outcome in outcomes(root, jobs, at_once):
            if outcome.status != "survived":
                raise SystemExit(f"{outcome.test} fails on the package itself.")
            kept[" ".join(job.tests)] = max(LEAST_SECONDS, SLOWER * outcome.seconds)
            write(path, json.dumps(kept, indent=1))
            bar.update()
    return {tests: kept[" ".join(tests)] for tests in suites}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def report(records: Sequence[Record], reasons: dict[str, str]) -> int:
    print(f"\n{survivors(records, reasons)}\n\n{table(records)}")
    missing = unexplained(records, reasons)
    share = share_killed(records)
    if share < LEAST_SHARE:
        print(f"Only {share:.1%} of the mutants are killed.", file=sys.stderr)
    if missing:
        print(f"{len(missing)} survivors have no reason in {REASONS}.", file=sys.stderr)
    return int(share < LEAST_SHARE or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
