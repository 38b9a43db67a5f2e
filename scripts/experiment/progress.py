"""A progress bar per epoch on a terminal, a line per epoch anywhere else."""

import sys
from shutil import get_terminal_size

from tqdm import tqdm

from experiment.metrics import Row, Tally

BAR = "{desc} |{bar:12}| {rate_noinv_fmt} {elapsed}<{remaining}{postfix}"


class Progress:
    def __init__(
        self, label: str, epochs: int, steps_per_epoch: int, batch_size: int, visible: bool
    ) -> None:
        self.label, self.epochs = label, epochs
        self.steps_per_epoch, self.batch_size = steps_per_epoch, batch_size
        self.visible = visible
        self.bar: tqdm | None = None
        self.test = ""

    def advance(self, step: int, tally: Tally) -> None:
        """Show that step number `step` (from 0) is done."""
        if not (self.visible and sys.stderr.isatty()):
            return
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.bar is None or position == 0:
            self.close()
            self.bar = self.open(epoch, position)
        drawn = self.bar.update(self.batch_size)
        # Reading the tally waits for the device, so only when there was something to see.
        if drawn or position + 1 == self.steps_per_epoch:
            self.bar.set_postfix_str(self.numbers(*tally.means()))

    def evaluated(self, row: Row) -> None:
        self.test = f", test {row.test_accuracy:.2%}"
        numbers = self.numbers(row.train_loss, row.train_accuracy)
        if self.bar is not None:
            self.bar.set_postfix_str(numbers)
        elif self.visible and row.step % self.steps_per_epoch == 0:
            title = self.title(row.step // self.steps_per_epoch)
            print(f"{title}: {row.images_per_second:.0f} images/s, {numbers}", flush=True)

    def numbers(self, loss: float, accuracy: float) -> str:
        return f"loss {loss:.4f}, accuracy {accuracy:.2%}{self.test}"

    def open(self, epoch: int, position: int) -> tqdm:
        # A terminal that says it has no size, as in many containers, gets the usual 80 x 24.
        size = get_terminal_size()
        return tqdm(
            desc=self.title(epoch + 1),
            total=self.steps_per_epoch * self.batch_size,
            initial=position * self.batch_size,
            unit=" images",
            bar_format=BAR,
            ncols=size.columns,
            nrows=size.lines,
        )

    def title(self, epoch: int) -> str:
        return f"{self.label} epoch {epoch:>{len(str(self.epochs))}}/{self.epochs}".lstrip()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
