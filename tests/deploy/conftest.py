"""One real bundle for the whole session: a narrow ResNet with lived-in statistics, exported once."""

import contextlib
import shutil
import sys

import numpy as np
import pytest

SIZE = 32
CLASSES = ("benign", "malignant", "=other")


@contextlib.contextmanager
def one_thread():
    """Networks this small are slower on many threads, and much slower on a busy machine."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def classifier():
    import torch

    from noisyssl.classifier import build_classifier

    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(0)
        network = build_classifier("resnet18-w16", "plain", len(CLASSES))
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.uniform_(module.bias, -0.5, 0.5)
        with torch.no_grad():
            for _ in range(10):
                network(torch.randint(0, 256, (16, 3, SIZE, SIZE), dtype=torch.uint8))
            network.head.weight.mul_(4)
    return network.eval()


@pytest.fixture(scope="session")
def images():
    """Three batches of different sizes, of smooth colours: classes and channels matter."""
    generator = np.random.default_rng(0)
    batches = []
    for count in (16, 16, 5):
        colour = generator.integers(0, 256, (count, 1, 1, 3))
        noise = generator.integers(-40, 40, (count, SIZE, SIZE, 3))
        batches.append(np.clip(colour + noise, 0, 255).astype(np.uint8))
    return batches


@pytest.fixture(scope="session")
def wishes(classifier, images):
    """What `export_bundle` is asked for."""
    return {
        "classifier": classifier,
        "architecture": {"backbone": "resnet18-w16", "stem": "plain"},
        "classes": CLASSES,
        "size": SIZE,
        "fit": "crop",
        "images": lambda: iter(images),
        "figures": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}, "auroc": float("nan")},
        "training": {"method": "simclr", "noise": {"spec": "symmetric:0.4", "realised": 0.397}},
        "checkpoint": {"which": "best", "epoch": 3},
    }


@pytest.fixture(scope="session")
def exported(wishes, tmp_path_factory):
    """The bundle, never to be changed; with an engine where TensorRT for RTX is installed."""
    from noisyssl.deploy import to_tensorrt
    from noisyssl.deploy.export import export_bundle

    out = tmp_path_factory.mktemp("exported") / "deep" / "bundle"
    engines = ["SM86", "SM120"] if "tensorrt_rtx" in to_tensorrt.flavours() else None
    with one_thread():
        export_bundle(out, **wishes, tensorrt=engines, flavour="tensorrt_rtx")
    return out


@pytest.fixture(scope="session")
def labels(classifier, images):
    """(37,) classes that the classifier can tell: each image's largest logit above that logit's mean."""
    import torch

    with torch.no_grad(), one_thread():
        logits = classifier(torch.tensor(np.concatenate(images)).permute(0, 3, 1, 2)).numpy()
    return (logits - logits.mean(0)).argmax(1)


@pytest.fixture(scope="session")
def wishes_lower(wishes, images, labels):
    """The same in every precision; a network that tells nothing apart may lose some AUROC."""
    from noisyssl.deploy.gates import Gates

    return wishes | {
        "precisions": ("fp32", "fp16", "int8"),
        "calibration": lambda: iter(images[:2]),
        "labels": labels,
        "gates": Gates(int8_auroc_drop=0.1),
        "reduced": True,
    }


@pytest.fixture(scope="session")
def lowered(wishes_lower, exported, tmp_path_factory):
    """A bundle in every precision, never to be changed; with engines where TensorRT for RTX is installed."""
    from noisyssl.deploy import bundle, to_onnx, to_tensorrt
    from noisyssl.deploy.export import export_bundle

    out = tmp_path_factory.mktemp("lowered") / "bundle"
    engines = ["SM75", "SM86"] if "tensorrt_rtx" in to_tensorrt.flavours() else None
    data = (exported / "model.onnx").read_bytes()
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "export", lambda classifier, path, **_: bundle.save(path, data))
        export_bundle(out, **wishes_lower, tensorrt=engines, flavour="tensorrt_rtx")
    return out


@pytest.fixture
def bundle(exported, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield
