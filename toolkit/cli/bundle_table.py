"""What an export wrote and proved, as lines of text."""

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noisyssl.deploy.bundle import Manifest

COLUMNS = ("form", "images", "changes", "max |dp|", "bal. acc.", "AUROC", "ECE")


def summary(out: Path, manifest: "Manifest") -> list[str]:
    """What was written and what was proved."""
    parity = manifest.parity
    lines = [
        f"{out}: {manifest.architecture.backbone}, {len(manifest.classes)} classes, "
        f"{manifest.checkpoint['which']} weights (epoch {manifest.checkpoint['epoch']})",
        f"gate: {parity['n']} test images, largest logit difference {parity['max_logit_difference']:.1e}, "
        f"{parity['top1_changes']} top-1 changes",
    ]
    lines += answers_lines(manifest.answers)
    if len(manifest.precisions) > 1:
        lines += precision_table(manifest.precisions)
    for name in sorted(manifest.files):
        size = (out / name).stat().st_size / 1e6
        note = _engine_note(out / name) if name.endswith(".plan") else ""
        lines.append(f"  {name:<28} {size:8.2f} MB  {note}".rstrip())
    if not any(name.endswith(".plan") for name in manifest.files):
        from noisyssl.deploy.to_tensorrt import flavours

        why = "none was asked for" if flavours() else "run `pip install 'noisyssl[rtx]'` and export again"
        lines.append(f"  no TensorRT engine: {why}")
    lines.append(f"Next: noisyssl predict {quote(str(out))} IMAGES")
    return lines


def answers_lines(answers: dict[str, Any]) -> list[str]:
    """The temperature, the threshold and what it gives, and what to beware of."""
    if not answers:
        return []
    lines = [f"temperature {answers['temperature']:.3f}, fitted on {answers['fitted_on']}"]
    if "threshold" in answers:
        right = answers["test_accuracy"]
        lines.append(
            f"sure from probability {answers['threshold']:.4f} on: {100 * answers['test_coverage']:.1f} % of "
            f"the test images, {'none' if right is None else f'{100 * right:.1f} %'} of them right "
            f"(wanted: {100 * answers['wanted_accuracy']:g} %)"
        )
    if answers["warning"]:
        lines.append(f"warning: {answers['warning']}")
    return lines


def _engine_note(plan: Path) -> str:
    sidecar = json.loads(plan.with_name(plan.name + ".json").read_text(encoding="utf-8"))
    return f"{sidecar['flavour']} {sidecar['version']} for {', '.join(sidecar['compute_capabilities'])}"


def precision_table(precisions: dict[str, dict[str, Any]]) -> list[str]:
    """One line per form: what its gate measured on the test images, and why it was left out."""
    lines = ["  " + "".join(f"{word:>11}" if i else f"{word:<9}" for i, word in enumerate(COLUMNS))]
    for form, row in precisions.items():
        cells = [
            _cell(row.get(name), style)
            for name, style in (
                ("n", "d"), ("top1_changes", "d"), ("max_probability_difference", ".1e"),
                ("balanced_accuracy", ".4f"), ("macro_auroc", ".4f"), ("calibration_error", ".4f"),
            )
        ]  # fmt: skip
        end = "" if row["passed"] else f"  left out: {row['why']}"
        lines.append(f"  {form:<9}" + "".join(f"{cell:>11}" for cell in cells) + end)
    return lines


def _cell(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
