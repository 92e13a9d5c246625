"""A run's log entries as TensorBoard events."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from noisyssl.errors import MachineError


def summary_writer() -> Any:
    """TensorBoard's writer class.

    Raises:
        MachineError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MachineError(
            f"tensorboard = true needs the package {error.name!r}; run `pip install 'noisyssl[report]'`."
        ) from None
    return SummaryWriter


@contextmanager
def tensorboard(folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callable that takes log entries and writes every number of them."""
    writer = summary_writer()(str(folder))

    def write(entry: dict[str, Any], prefix: str = "") -> None:
        for name, value in entry.items():
            if isinstance(value, dict):
                write(value | {"step": entry["step"]}, f"{name}/")
            elif isinstance(value, int | float) and name != "step" and "step" in entry:
                writer.add_scalar(prefix + name, value, entry["step"])

    try:
        yield write
    finally:
        writer.close()
