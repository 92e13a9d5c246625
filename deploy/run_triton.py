"""A bundle served by Triton: a client of a running server, which must serve exactly this bundle."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http
from tritonclient.utils import InferenceServerException

from noisyssl.deploy import bundle
from noisyssl.deploy.runtime import checked
from noisyssl.deploy.triton_models import bundle_digest
from noisyssl.errors import BundleError, ConfigError, MachineError

ADDRESS = "NOISYSSL_TRITON"
"""Environment variable: HOST:PORT of the server's HTTP side, with /MODEL where it is not `noisyssl`."""
DEFAULT = "127.0.0.1:8000/noisyssl"
TIMEOUT_S = 120.0


class TritonRuntime:
    """`logits` asks the server; the bundle says classes and geometry, and that it is the one served."""

    def __init__(
        self, folder: Path, device: str | None = None, threads: int | None = None, precision: str = "fp32"
    ) -> None:
        if device is not None or threads is not None:
            raise ConfigError(
                "--device and --threads are the server's matter with runtime triton; leave them out."
            )
        self.manifest = bundle.read(folder)
        self.device = "server"
        place, _, model = os.environ.get(ADDRESS, DEFAULT).partition("/")
        self._place, self._model = place, model or DEFAULT.partition("/")[2]
        self._client = tritonclient.http.InferenceServerClient(
            place, connection_timeout=10.0, network_timeout=TIMEOUT_S
        )
        try:
            self._batch = self._largest_batch(folder, precision)
        except BaseException:
            self._client.close()  # a server waits for idle connections when it stops
            raise

    def __enter__(self) -> "TritonRuntime":
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(B, K) float32; safe to keep. More than the server's largest batch goes in several requests."""
        images = checked(images, self.manifest.input.size)
        parts = [self._one(images[i : i + self._batch]) for i in range(0, len(images), self._batch)]
        return np.concatenate([np.empty((0, len(self.manifest.classes)), np.float32), *parts])

    def _largest_batch(self, folder: Path, precision: str) -> int:
        """What the server takes at once, after it was asked which bundle it serves."""
        config = self._asked(self._client.get_model_config, self._model)
        told = {key: value.get("string_value") for key, value in config["parameters"].items()}
        if told.get("bundle_sha256") != bundle_digest(folder):
            raise BundleError(
                f"{self._model} at {self._place} serves another bundle than {folder}; "
                f"name the bundle that it serves, or another server in {ADDRESS}."
            )
        if (served := str(told.get("bundle_precision")).partition("-")[0]) != precision:
            raise ConfigError(
                f"--precision is {precision}; {self._model} at {self._place} serves {served}. Ask for that."
            )
        return int(config["max_batch_size"])

    def _one(self, images: np.ndarray) -> np.ndarray:
        sent = tritonclient.http.InferInput("image", list(images.shape), "UINT8")
        sent.set_data_from_numpy(images)
        wanted = tritonclient.http.InferRequestedOutput("logits")
        answer = self._asked(self._client.infer, self._model, [sent], outputs=[wanted])
        found: np.ndarray = answer.as_numpy("logits")
        return found

    def _asked(self, call: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return call(*arguments, **named)
        except InferenceServerException as error:
            raise MachineError(
                f"Triton at {self._place} says: {error.message()}. Check that it serves {self._model}; "
                f"{ADDRESS}=HOST:PORT/MODEL names another."
            ) from None
        except (OSError, EOFError) as error:
            raise MachineError(
                f"no Triton answers at {self._place} ({error}); start `noisyssl serve BUNDLE`, or name "
                f"another in {ADDRESS}=HOST:PORT."
            ) from None
