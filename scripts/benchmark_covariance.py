"""Time the covariance kernels against the ways in which they are usually written.

    python scripts/benchmark_covariance.py              # channels of feature maps [N, C, H, W]
    python scripts/benchmark_covariance.py --patches    # patches that a convolution sees
    python scripts/benchmark_covariance.py --calibrate  # every method of patch_covariance
    python scripts/benchmark_covariance.py --device cuda --json runs/covariance.json

Every implementation is first compared with float64. Then all of them are sampled in turn,
`--repeats` times; the medians are printed beside how many times longer each took than ours.
`--calibrate` prints beside them what the cost model expects, and what its choice loses.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac.covariance import channel_covariance, patch_covariance
from kfac.covariance.cost import axes_of, choose, expected_seconds, methods
from kfac.covariance.geometry import Layout, layout_of
from kfac.covariance.patches import second_moment

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


class Case(NamedTuple):
    """A convolution of feature maps ``[N, C, H, W]`` with a square kernel."""

    shape: tuple[int, ...]
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1

    @property
    def layout(self) -> Layout:
        return layout_of(
            "benchmark", self.shape[2:], self.kernel, stride=self.stride, padding=self.padding,
            dilation=self.dilation, groups=self.groups,
        )  # fmt: skip

    @property
    def geometry(self) -> dict[str, int]:
        return dict(zip(self._fields[2:], self[2:], strict=True))

    @property
    def name(self) -> str:
        settings = {"kernel": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1}
        changed = [
            f"{k[0]}{getattr(self, k)}" for k, v in settings.items() if getattr(self, k) != v
        ]
        return " ".join([",".join(map(str, self.shape)), *changed])


OTHER_CASES = [
    Case((64, 64, 32, 32), stride=2),
    Case((64, 128, 16, 16), stride=2),
    Case((128, 32, 16, 16), kernel=5, padding=2),
    Case((64, 16, 28, 28), kernel=5, padding=0),
    Case((32, 3, 112, 112), kernel=7, stride=2, padding=3),
    Case((32, 3, 224, 224), kernel=7, stride=2, padding=3),
    Case((64, 64, 32, 32), groups=64),
    Case((32, 192, 14, 14), groups=192),
    Case((64, 64, 16, 16), dilation=2, padding=2),
]
"""Beyond 3×3, stride 1, padding 1: strides, large kernels, stems, depthwise, dilated."""
CALIBRATION_CASES = [
    *(Case((n, c, size, size)) for n, c, size in [
        (8, 3, 32), (128, 3, 32), (128, 8, 28), (128, 16, 32), (32, 16, 8), (128, 32, 16),
        (32, 64, 56), (128, 64, 8), (64, 64, 32), (16, 64, 8), (64, 128, 16), (16, 128, 28),
        (8, 128, 4), (64, 256, 8), (8, 256, 14), (64, 256, 4), (64, 512, 4), (8, 512, 7),
        (256, 512, 2), (4, 16, 6), (1, 64, 64),
    ]),
    *OTHER_CASES,
    Case((16, 64, 14, 14), padding=0),
    Case((128, 6, 14, 14), kernel=5, padding=0),
    Case((32, 32, 7, 7), kernel=7, padding=3),
    Case((32, 96, 14, 14), kernel=7, padding=3, groups=96),
    Case((32, 128, 28, 28), stride=2),
    Case((32, 256, 8, 8), stride=2),
    Case((16, 256, 14, 14), dilation=2, padding=2),
    Case((16, 64, 28, 28), dilation=4, padding=4),
    Case((32, 128, 14, 14), groups=32),
    Case((32, 64, 28, 28), groups=2),
    Case((8, 3, 64, 64), kernel=8, stride=4, padding=2),
]  # fmt: skip


def unfold(x: Tensor, case: Case) -> Tensor:
    """Collect the patches ``[N, groups, d, T]``."""
    patches = F.unfold(x, case.kernel, case.dilation, case.padding, case.stride)
    return torch.unflatten(patches, 1, (case.groups, -1))


def unfold_einsum(x: Tensor, case: Case) -> Tensor:
    patches = unfold(x, case)
    return torch.einsum("ngit,ngjt->gij", patches, patches)


def unfold_bmm(x: Tensor, case: Case) -> Tensor:
    patches = unfold(x, case)
    return (patches @ patches.mT).sum(0)


def padded_unfold_gemm(x: Tensor, case: Case) -> Tensor:
    span = case.dilation * (case.kernel - 1) + 1
    windows = F.pad(x, (case.padding,) * 4)
    for dim in (2, 3):
        windows = windows.unfold(dim, span, case.stride)[..., :: case.dilation]
    split = torch.unflatten(windows, 1, (case.groups, -1))
    rows = split.permute(1, 0, 3, 4, 2, 5, 6)
    rows = rows.reshape(case.groups, -1, x.shape[1] // case.groups * case.kernel**2)
    return rows.mT @ rows


def ours_on_patches(x: Tensor, case: Case) -> Tensor:
    return patch_covariance(
        x, case.kernel, stride=case.stride, padding=case.padding, dilation=case.dilation,
        groups=case.groups,
    )  # fmt: skip


def forward_convolution(x: Tensor, case: Case) -> Tensor:
    channels = x.shape[1]
    weight = x.new_ones(channels, channels // case.groups, case.kernel, case.kernel)
    return F.conv2d(x, weight, None, case.stride, case.padding, case.dilation, case.groups)


class Implementation(NamedTuple):
    name: str
    function: Callable[[Tensor], Tensor]
    intermediate: Callable[..., int]
    """Numbers that it writes at once, from N, C, H, W."""


class Result(NamedTuple):
    case: str
    shape: list[int]
    name: str
    milliseconds: float
    times_ours: float
    relative_error: float | None
    samples: int


class Calibration(NamedTuple):
    shape: list[int]
    geometry: dict[str, int]
    milliseconds: dict[str, float]
    expected: dict[str, float]
    choice: str
    loss: float
    """Time of the choice of the model as a multiple of the shortest one."""


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
FORWARD = "forward convolution"
IM2COL = ["unfold + einsum", "unfold + bmm", "padded unfold + GEMM"]


def implementations_on_patches(case: Case) -> list[Implementation]:
    functions = {
        OURS: ours_on_patches,
        **dict(zip(IM2COL, [unfold_einsum, unfold_bmm, padded_unfold_gemm], strict=True)),
        FORWARD: forward_convolution,
    }

    def intermediate(name: str) -> int:
        examples, channels = case.shape[:2]
        rows = channels // case.groups * case.kernel**2
        positions = case.layout.positions
        written = examples * case.groups * rows * positions
        squares = examples * case.groups * rows**2 if name == "unfold + bmm" else 0
        return max(written, squares) if name in IM2COL else math.prod(case.shape)

    return [
        Implementation(name, partial(function, case=case), lambda *_, n=name: intermediate(n))
        for name, function in functions.items()
    ]


def methods_on_patches(case: Case, itemsize: int) -> list[Implementation]:
    """Every method that `patch_covariance` has for a case, used whatever the cost model says."""
    layout = case.layout
    available = methods(case.shape, layout, axes_of(case.shape[2:], layout), itemsize)
    return [
        Implementation(method, partial(second_moment, layout=layout, method=method), lambda *_: 0)
        for method in available
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


def random_input(shape: Sequence[int], device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(device, dtype)


def measure(
    case: str,
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
        Result(case, shape, name, 1e3 * median, median / ours, errors[name], samples)
        for name, (median, samples) in medians.items()
    ]


def calibrate(case: Case, x: Tensor, repeats: int) -> Calibration:
    """Time every method, and compare with what the cost model expects."""
    medians = interleaved_medians(methods_on_patches(case, x.element_size()), x, repeats)
    measured = {str(name): 1e3 * median for name, (median, _) in medians.items()}
    layout = case.layout
    problem = (case.shape, layout, axes_of(case.shape[2:], layout), x.device.type, x.element_size())
    available = methods(*problem[:3], x.element_size())
    expected = {str(method): 1e3 * expected_seconds(method, *problem) for method in available}
    choice = choose(*problem)
    loss = measured[choice] / min(measured.values())
    geometry = {"kernel_size": case.kernel, **case.geometry}
    return Calibration(list(case.shape), geometry, measured, expected, choice, loss)


def print_table(results: Sequence[Result]) -> None:
    heading = ("ms", "× ours", "rel. error", "samples")
    print(f"{'input':<22}{'implementation':<24}" + "".join(f"{word:>12}" for word in heading))
    for result in results:
        error = "" if result.relative_error is None else f"{result.relative_error:.1e}"
        print(
            f"{result.case:<22}{result.name:<24}{result.milliseconds:>12.3f}"
            f"{result.times_ours:>12.1f}{error:>12}{result.samples:>12}"
        )


def print_calibration(rows: Sequence[Calibration], cases: Sequence[Case]) -> None:
    print("measured / expected milliseconds, the choice of the model, what it loses")
    for row, case in zip(rows, cases, strict=True):
        times = (
            f"{name} {ms:.2f} / {row.expected[name]:.2f}" for name, ms in row.milliseconds.items()
        )
        print(f"{case.name:<28}{', '.join(times)} | {row.choice} {row.loss:.2f}×")


def summary(results: Sequence[Result]) -> dict[str, float]:
    """Geometric means over cases: best im2col against ours, ours against the forward pass."""
    by_case: dict[str, dict[str, float]] = {}
    for result in results:
        by_case.setdefault(result.case, {})[result.name] = result.times_ours
    gains = [min(times[name] for name in IM2COL if name in times) for times in by_case.values()]
    return {
        "best_im2col_over_ours": statistics.geometric_mean(gains),
        "worst_best_im2col_over_ours": min(gains),
        "ours_over_forward": statistics.geometric_mean(
            1 / times[FORWARD] for times in by_case.values()
        ),
    }


def print_summary(title: str, results: Sequence[Result]) -> None:
    numbers = summary(results)
    print(
        f"{title}: {numbers['best_im2col_over_ours']:.2g}× faster than the best im2col "
        f"(at least {numbers['worst_best_im2col_over_ours']:.2g}×), "
        f"{numbers['ours_over_forward']:.2f}× the forward convolution"
    )


def check(results: Sequence[Result], dtype: torch.dtype) -> None:
    """Stop with an error where ours is inaccurate: it sums in float32 or better."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for result in results:
        if result.name == OURS and not (result.relative_error or 0.0) <= tolerance:
            raise SystemExit(f"{OURS} is off by {result.relative_error:.1e} on {result.case}")


def parse_shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split(","))
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be N,C,H,W with positive sizes, but got {text!r}")
    return shape


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--patches", action="store_true", help="time patch_covariance")
    mode.add_argument("--calibrate", action="store_true", help="time every method it has")
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
        "kind": torch.device(arguments.device).type,
        "device": torch.cuda.get_device_name(arguments.device) if on_cuda else platform.machine(),
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def benchmark(
    cases: Sequence[Case], arguments: argparse.Namespace, dtype: torch.dtype
) -> list[Result]:
    results: list[Result] = []
    for case in cases:
        x = random_input(case.shape, arguments.device, dtype)
        reference: Callable[[Tensor], Tensor] = loop_over_positions
        implementations = CHANNELS
        if arguments.patches:
            reference = partial(padded_unfold_gemm, case=case)
            implementations = implementations_on_patches(case)
        results += measure(case.name, implementations, reference, x, arguments.repeats)
    print_table(results)
    check(results, dtype)
    return results


def run_calibration(
    cases: Sequence[Case], arguments: argparse.Namespace, dtype: torch.dtype
) -> list[Calibration]:
    rows = [
        calibrate(case, random_input(case.shape, arguments.device, dtype), arguments.repeats)
        for case in cases
    ]
    print_calibration(rows, cases)
    return rows


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(", ".join(f"{key} {value}" for key, value in settings(arguments).items()), flush=True)
    dtype = getattr(torch, arguments.dtype)
    given = [Case(shape) for shape in arguments.shapes or ()]
    rows: Sequence[Result | Calibration]
    if arguments.calibrate:
        rows = run_calibration(given or CALIBRATION_CASES, arguments, dtype)
    elif arguments.patches:
        plain = given or [Case(parse_shape(shape)) for shape in PATCH_SHAPES]
        rows = results = benchmark([*plain, *(() if given else OTHER_CASES)], arguments, dtype)
        names = {case.name for case in plain}
        print_summary("3×3, stride 1, padding 1", [r for r in results if r.case in names])
        if not given:
            print_summary("all others", [r for r in results if r.case not in names])
    else:
        rows = benchmark(given or [Case(parse_shape(s)) for s in CHANNEL_SHAPES], arguments, dtype)
    if arguments.json:
        figures = settings(arguments) | {"results": [row._asdict() for row in rows]}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
