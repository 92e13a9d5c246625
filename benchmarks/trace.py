"""Where the time of a step goes: a trace for chrome://tracing or Perfetto, and its first lines as a table."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from noisyssl.errors import MachineError


def traced(step: Callable[[], object], path: Path, steps: int = 5, rows: int = 12) -> str:
    """Write the trace of some steps to `path`; a table of the operators that took longest themselves.

    Raises:
        MachineError: the file cannot be written.
    """
    gpu = torch.cuda.is_available()
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities) as found:
        for _ in range(steps):
            step()
        if gpu:
            torch.cuda.synchronize()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {error.strerror}. Name another file.") from None
    found.export_chrome_trace(str(path))

    def took(event: object) -> float:
        return float(getattr(event, "self_device_time_total" if gpu else "self_cpu_time_total"))

    events = sorted(found.key_averages(), key=took, reverse=True)
    whole = sum(map(took, events)) or 1.0
    lines = [f"{'operator':<48} {'ms / step':>10} {'share':>7} {'calls':>7}"]
    for event in events[:rows]:
        milliseconds, calls = took(event) / 1e3 / steps, event.count / steps
        lines.append(f"{event.key[:48]:<48} {milliseconds:>10.3f} {took(event) / whole:>7.1%} {calls:>7.1f}")
    return "\n".join(lines)
