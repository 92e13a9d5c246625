"""Every error noisyssl raises on purpose; the CLI prints these in one line, without a traceback."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import ClassVar, TypeVar

T = TypeVar("T")


class NoisySSLError(Exception):
    """The user can fix this: what is wrong with its value; what is allowed; what to do."""

    code: ClassVar[int] = 1
    """Exit code of the command that raised it."""


class ConfigError(NoisySSLError):
    """A setting is missing, unknown or out of range, or a path given on the command line is wrong."""

    code = 2


class TrainingError(NoisySSLError):
    """Training cannot go on."""

    code = 3


class ExportError(NoisySSLError):
    """The exported file does not compute what was trained."""

    code = 4


class DataError(NoisySSLError):
    """Something inside the data or its CSV is wrong."""

    code = 5


class BundleError(NoisySSLError):
    """An exported bundle is incomplete, altered or not for this machine."""

    code = 6


class MachineError(NoisySSLError):
    """Disk full, port taken; a package, driver or GPU is missing."""

    code = 7


def near_miss(name: str, choices: Iterable[str]) -> str:
    """The question 'Did you mean X?' for the closest of `choices`, after a space; or nothing."""
    by_case = {choice.lower(): choice for choice in choices}
    close = get_close_matches(name.lower(), by_case, n=1)
    return f" Did you mean {by_case[close[0]]!r}?" if close else ""


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry of `table` called `name`.

    Raises:
        ConfigError: no such entry; the message lists the choices.
    """
    if name in table:
        return table[name]
    raise ConfigError(
        f"{what} {name!r} is unknown; choose one of {', '.join(sorted(table))}.{near_miss(name, table)}"
    )


class Stopped(NoisySSLError):
    """A signal asked to end and the checkpoint is written; not a failure, but not finished either."""

    def __init__(self, signal: int) -> None:
        super().__init__(
            f"stopped by signal {signal} after a checkpoint; the same command with --resume goes on."
        )
        self.code = 128 + signal  # type: ignore[misc]
