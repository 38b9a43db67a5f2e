"""Time the covariance kernels against the ways in which they are usually written.

    python scripts/benchmark_covariance.py              # channels of feature maps [N, C, H, W]
    python scripts/benchmark_covariance.py --patches    # patches: 3×3, stride 1, padding 1
    python scripts/benchmark_covariance.py --device cuda --json runs/covariance.json

Every implementation is first compared with float64. Then all of them are sampled in turn,
`--repeats` times; the medians are printed beside how many times longer each took than ours.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac.covariance import channel_covariance, patch_covariance

CHANNEL_SHAPES = ["64,3,64,64", "128,16,32,32", "128,64,8,8", "64,128,16,16", "64,512,4,4"]
PATCH_SHAPES = [
    "128,16,32,32", "128,32,16,16", "128,64,8,8", "64,64,32,32", "64,128,16,16", "64,256,8,8",
    "64,512,4,4", "32,64,56,56",
]  # fmt: skip
LARGEST_INTERMEDIATE = 2**29  # numbers; an implementation that writes more at once is left out
SLOW_SECONDS = 1.0  # an implementation that takes longer in its first run is not repeated
SAMPLE_SECONDS = 0.01  # a sample is the mean of as many calls in a row as take about this long


def loop_over_positions(x: Tensor) -> Tensor:
    total = x.new_zeros(x.shape[1], x.shape[1])
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            pixel = x[:, :, row, column]
            total += pixel.T @ pixel
    return total


def batched_over_positions(x: Tensor) -> Tensor:
    pixels = x.permute(2, 3, 0, 1).flatten(0, 1)
    return (pixels.mT @ pixels).sum(0)


def einsum_over_positions(x: Tensor) -> Tensor:
    return torch.einsum("nihw,njhw->ijhw", x, x).sum((2, 3))


def unfold_einsum(x: Tensor) -> Tensor:
    patches = F.unfold(x, 3, padding=1)
    return torch.einsum("nit,njt->ij", patches, patches)


def unfold_bmm(x: Tensor) -> Tensor:
    patches = F.unfold(x, 3, padding=1)
    return (patches @ patches.mT).sum(0)


def padded_unfold_gemm(x: Tensor) -> Tensor:
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    rows = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 9 * x.shape[1])
    return rows.T @ rows


def ours_on_patches(x: Tensor) -> Tensor:
    return patch_covariance(x, 3, padding=1)[0]


def forward_convolution(x: Tensor) -> Tensor:
    weight = torch.ones(x.shape[1], x.shape[1], 3, 3, dtype=x.dtype, device=x.device)
    return F.conv2d(x, weight, padding=1)


class Implementation(NamedTuple):
    name: str
    function: Callable[[Tensor], Tensor]
    intermediate: Callable[..., int]
    """Numbers that it writes at once, from N, C, H, W."""


class Result(NamedTuple):
    shape: list[int]
    name: str
    milliseconds: float
    times_ours: float
    relative_error: float | None
    samples: int


OURS = "kfac.covariance"
CHANNELS = [
    Implementation(OURS, channel_covariance, lambda n, c, h, w: n * c * min(c, h * w)),
    Implementation("loop over positions", loop_over_positions, lambda n, c, h, w: n * c),
    Implementation(
        "batched over positions", batched_over_positions, lambda n, c, h, w: c * c * h * w
    ),
    Implementation(
        "einsum over positions", einsum_over_positions, lambda n, c, h, w: c * c * h * w
    ),
]
PATCHES = [
    Implementation(OURS, ours_on_patches, lambda n, c, h, w: n * c * h * w),
    Implementation("unfold + einsum", unfold_einsum, lambda n, c, h, w: 9 * n * c * h * w),
    Implementation("unfold + bmm", unfold_bmm, lambda n, c, h, w: n * 9 * c * max(9 * c, h * w)),
    Implementation(
        "padded unfold + GEMM", padded_unfold_gemm, lambda n, c, h, w: 9 * n * c * h * w
    ),
    Implementation("forward convolution", forward_convolution, lambda n, c, h, w: n * c * h * w),
]


def seconds(function: Callable[[Tensor], Tensor], x: Tensor, calls: int = 1) -> float:
    """Time one call, averaged over some that follow each other."""
    synchronize(x)
    start = time.perf_counter()
    for _ in range(calls):
        function(x)
    synchronize(x)
    return (time.perf_counter() - start) / calls


def synchronize(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def relative_error(result: Tensor, reference: Tensor) -> float | None:
    """Frobenius norm of the difference; None where the result is another quantity."""
    if result.shape != reference.shape:
        return None
    return float((result.double() - reference).norm() / reference.norm())


def interleaved_medians(
    implementations: Sequence[Implementation], x: Tensor, repeats: int
) -> dict[str, tuple[float, int]]:
    """Run all implementations in turn and return median seconds and number of samples of each."""
    for implementation in implementations:
        implementation.function(x)
    once = {i.name: seconds(i.function, x) for i in implementations}
    samples = {name: [time] for name, time in once.items() if time >= SLOW_SECONDS}
    for _ in range(repeats):
        for name, function, _ in implementations:
            if once[name] < SLOW_SECONDS:
                calls = min(1000, math.ceil(SAMPLE_SECONDS / once[name]))
                samples.setdefault(name, []).append(seconds(function, x, calls))
    return {
        i.name: (statistics.median(samples[i.name]), len(samples[i.name])) for i in implementations
    }


def measure(
    implementations: Sequence[Implementation],
    reference: Callable[[Tensor], Tensor],
    x: Tensor,
    repeats: int,
) -> list[Result]:
    """Compare and time the implementations on one input."""
    shape = list(x.shape)
    feasible = [i for i in implementations if i.intermediate(*shape) <= LARGEST_INTERMEDIATE]
    expected = reference(x.double())
    errors = {i.name: relative_error(i.function(x), expected) for i in feasible}
    medians = interleaved_medians(feasible, x, repeats)
    ours = medians[OURS][0]
    return [
        Result(shape, name, 1e3 * median, median / ours, errors[name], samples)
        for name, (median, samples) in medians.items()
    ]


def print_table(results: Sequence[Result]) -> None:
    heading = ("ms", "× ours", "rel. error", "samples")
    print(f"{'input':<18}{'implementation':<24}" + "".join(f"{word:>12}" for word in heading))
    for result in results:
        error = "" if result.relative_error is None else f"{result.relative_error:.1e}"
        print(
            f"{','.join(map(str, result.shape)):<18}{result.name:<24}{result.milliseconds:>12.3f}"
            f"{result.times_ours:>12.1f}{error:>12}{result.samples:>12}"
        )


def check(results: Sequence[Result], dtype: torch.dtype) -> None:
    """Stop with an error where ours is inaccurate: it sums in float32 or better."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for result in results:
        if result.name == OURS and not (result.relative_error or 0.0) <= tolerance:
            raise SystemExit(f"{OURS} is off by {result.relative_error:.1e} on {result.shape}")


def parse_shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split(","))
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be N,C,H,W with positive sizes, but got {text!r}")
    return shape


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--patches", action="store_true", help="time patch_covariance")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"]
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="N,C,H,W")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="CPU threads; torch decides if left out")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures here")
    return parser.parse_args()


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    on_cuda = torch.device(arguments.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(arguments.device) if on_cuda else platform.machine(),
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(", ".join(f"{key} {value}" for key, value in settings(arguments).items()), flush=True)
    implementations = PATCHES if arguments.patches else CHANNELS
    reference = padded_unfold_gemm if arguments.patches else loop_over_positions
    dtype = getattr(torch, arguments.dtype)
    defaults = PATCH_SHAPES if arguments.patches else CHANNEL_SHAPES
    results: list[Result] = []
    for shape in arguments.shapes or map(parse_shape, defaults):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator).to(arguments.device, dtype)
        results += measure(implementations, reference, x, arguments.repeats)
    print_table(results)
    check(results, dtype)
    if arguments.json:
        rows = [result._asdict() for result in results]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(settings(arguments) | {"results": rows}, indent=2))


if __name__ == "__main__":
    main()
