"""Images of smooth curves, drawn after the CURVES set of Hinton & Salakhutdinov 2006."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

SIZE = 28
MARGIN = 4.0  # pixels between the control points and the edge
WIDTH = 0.6  # standard deviation of the brush, in pixels
CONTRAST = 1.6  # ink in the middle of a straight stroke; all above 1 is white
SAMPLES = 48
CHUNK = 1000


def draw_curves(count: int, seed: int) -> Tensor:
    """Images ``[count, 784]`` in [0, 1]: parabolas through three random control points.

    Ink is the integral of a Gaussian brush along the curve, so that strokes are soft and a long
    curve is as dark as a short one. The first images do not depend on `count`.
    """
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, 2, generator=generator) * (SIZE - 1 - 2 * MARGIN) + MARGIN
    return torch.cat([strokes(chunk).flatten(1) for chunk in torch.split(points, CHUNK)])


def strokes(points: Tensor) -> Tensor:
    """Images ``[N, 28, 28]`` of the curves through points ``[N, 3, 2]`` (row, column) in turn."""
    t = (2 * torch.arange(SAMPLES) + 1) / SAMPLES - 1
    position = torch.stack([t * (t - 1) / 2, 1 - t**2, t * (t + 1) / 2], 1) @ points
    velocity = 2 * torch.stack([t - 0.5, -2 * t, t + 0.5], 1) @ points
    length = velocity.norm(dim=-1) / SAMPLES
    # The brush is a product of a Gaussian over rows and one over columns, so is every dab.
    offsets = position[..., None] - torch.arange(SIZE)
    rows, columns = torch.exp(-0.5 * (offsets / WIDTH) ** 2).unbind(2)
    straight_stroke = (2 * torch.pi) ** 0.5 * WIDTH
    ink = torch.einsum("nsr,nsc->nrc", rows * length[..., None], columns) / straight_stroke
    # In 256 shades, as files hold them; the tails of the brush are denormal numbers, and slow.
    shades: Tensor = (255 * CONTRAST * ink).clamp(max=255).round()
    return shades / 255


def contact_sheet(path: Path, images: Tensor, rows: int = 8, columns: int = 16) -> None:
    """Write the first images ``[N, 784]`` side by side as one picture."""
    sheet = images[: rows * columns].view(rows, columns, SIZE, SIZE)
    sheet = torch.nn.functional.pad(sheet, (1, 1, 1, 1), value=0.5)
    figure = Figure(figsize=(columns * 0.75, rows * 0.75), layout="constrained")
    axis = figure.subplots()
    axis.imshow(sheet.transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
