"""A bundle run by torch from `model.safetensors`: the unfolded network, as it was trained."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from noisyssl.classifier import build_classifier
from noisyssl.deploy import bundle
from noisyssl.deploy.runtime import checked
from noisyssl.errors import BundleError, ConfigError, MachineError


class TorchRuntime:
    """The classifier in eval mode, float32 without TF32, channels-last."""

    def __init__(
        self, folder: Path, device: str | None = None, threads: int | None = None, precision: str = "fp32"
    ) -> None:
        if precision != "fp32":
            raise ConfigError(
                f"precision is {precision}; the torch runtime computes in fp32 only. Use --runtime onnx."
            )
        self.manifest = bundle.read(folder)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise MachineError(
                "device cuda is asked, but torch finds no GPU; run `noisyssl doctor`, or leave --device out."
            )
        if threads:
            torch.set_num_threads(threads)
        made = self.manifest.architecture
        try:
            network = build_classifier(made.backbone, made.stem, len(self.manifest.classes))
            network.load_state_dict(load(bundle.content(folder, self.manifest, bundle.WEIGHTS)))
        except (ConfigError, SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BundleError(
                f"{folder / bundle.WEIGHTS} does not fit {made.backbone} with the {made.stem} stem: "
                f"{reason}. Export the bundle again."
            ) from error
        self._network = network.eval().to(self.device).to(memory_format=torch.channels_last)

    def __enter__(self) -> "TorchRuntime":
        return self

    def __exit__(self, *exc: object) -> None:
        pass  # torch frees its memory with the last reference

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(B, K) float32; safe to keep."""
        batch = torch.tensor(checked(images, self.manifest.input.size)).permute(0, 3, 1, 2)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self._network(batch.to(self.device)).cpu().numpy()
