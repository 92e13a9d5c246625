"""The figures of a finished training as lines of text."""

from typing import Any


def summary(metrics: dict[str, Any]) -> list[str]:
    """BEST, LAST and the two colour baselines with their intervals."""
    best, last, noise = metrics["best"], metrics["last"], metrics["noise"]
    rows = {
        f"BEST (epoch {best['epoch']}, {best['chosen_on']})": best["figures"],
        f"LAST (mean of epochs {last['epochs'][0]}-{last['epochs'][-1]})": last["figures"],
    } | {f"baseline {name.replace('_', ' ')}": value for name, value in metrics["baselines"].items()}
    columns = ("balanced_accuracy", "accuracy", "macro_auroc")
    width = max(len(name) for name in rows)
    header = "  ".join(f"{name.replace('_', ' '):<20}" for name in columns)
    return [
        f"noise {noise['spec']}: {injected(noise)}",
        f"{'test figures [95 % interval]':<{width}}  {header}".rstrip(),
        *(f"{name:<{width}}  {'  '.join(interval(f[c]) for c in columns)}" for name, f in rows.items()),
    ]


def injected(noise: dict[str, Any]) -> str:
    """What is known of the training labels: without true labels, only what was flipped on purpose."""
    if not noise["realised"]:
        return "no label was flipped on purpose"
    changed = f"{noise['flips']} labels changed in training and validation"
    return f"{noise['realised']:.3f} of the training labels are wrong ({changed})"


def interval(figure: dict[str, Any]) -> str:
    """`0.893 [0.871, 0.914]`; a dash where the figure is undefined, such as AUROC of one class."""
    if figure["value"] is None:
        return f"{'-':<20}"
    if figure["low"] is None:
        return f"{figure['value']:.3f}" + " " * 16
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
