"""A real Triton answers as a user asks it: over HTTP and gRPC, right and wrong, many at once."""

import http.client
import json
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from noisyssl.deploy import triton_install
from noisyssl.deploy.runtime import open_runtime
from noisyssl.deploy.triton_models import version, with_ensemble
from noisyssl.deploy.triton_repository import deploy
from noisyssl.deploy.triton_server import Server
from noisyssl.errors import BundleError, ConfigError, MachineError
from noisyssl.geometry import evaluation_view
from noisyssl.images import decode

grpc = pytest.importorskip("tritonclient.grpc", reason="pip install 'noisyssl[triton]'")
web = pytest.importorskip("tritonclient.http", reason="pip install 'noisyssl[triton]'")
pytest.importorskip("nvidia.dali")
try:
    triton_install.find()
except MachineError as error:
    pytest.skip(str(error), allow_module_level=True)

CLIENTS = {"http": web, "grpc": grpc}
CANARY = "DOE-JANE-19700101"
ANY = {"http": 0, "grpc": 0, "metrics": 0}


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory):
    from noisyssl.pipelines.dali_serving import serialized

    new = with_ensemble(version(exported, precision="fp32", batch=16), serialized(32, "crop", 16), {})
    with Server(deploy(tmp_path_factory.mktemp("t") / "r", new, "lung"), ports=ANY) as running:
        yield running


@pytest.fixture(scope="module")
def truth(exported):
    with open_runtime(exported, "onnx", "cpu") as runtime:
        yield runtime.logits


@pytest.fixture(params=["http", "grpc"])
def ask(server, request):
    """ask(images, name="image", model="lung", kind="UINT8", classes=0, want="logits", id="") -> array."""
    library = CLIENTS[request.param]
    with library.InferenceServerClient(server.url(request.param)) as client:

        def call(images, name="image", model="lung", kind="UINT8", classes=0, want="logits", id=""):
            sent = library.InferInput(name, list(images.shape), kind)
            sent.set_data_from_numpy(images)
            wanted = library.InferRequestedOutput(want, class_count=classes)
            return client.infer(model, [sent], outputs=[wanted], request_id=id).as_numpy(want)

        yield call


def test_it_gives_the_bundles_logits(ask, truth, images):
    for batch in images:
        assert np.abs(ask(batch[:16]) - truth(batch[:16])).max() < 1e-5


def test_it_gives_labels(ask, truth, images):
    found = ask(images[0], want="probabilities", classes=3)
    for row, logits in zip(found, truth(images[0]), strict=True):
        answers = [text.decode().split(":", 2) for text in row]
        assert [int(index) for _, index, _ in answers] == np.argsort(-logits).tolist()
        assert [label for _, _, label in answers] == [
            ("benign", "malignant", "=other")[int(index)] for _, index, _ in answers
        ]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"images": np.zeros((1, 32, 31, 3), np.uint8)}, "unexpected shape"),
        ({"images": np.zeros((8, 32, 3), np.uint8)}, "unexpected shape"),
        ({"images": np.zeros((1, 1, 32, 32, 3), np.uint8)}, "unexpected shape"),
        ({"images": np.zeros((17, 32, 32, 3), np.uint8)}, "batch-size must be <= 16"),
        ({"images": np.zeros((1, 32, 32, 3), np.float32), "kind": "FP32"}, "data-type is 'FP32'"),
        ({"images": np.zeros((1, 32, 32, 3), np.uint8), "name": "picture"}, "picture"),
        ({"images": np.zeros((1, 32, 32, 3), np.uint8), "want": "secrets"}, "secrets"),
        ({"images": np.zeros((1, 32, 32, 3), np.uint8), "model": "other"}, "other"),
        ({"images": np.zeros((0, 32, 32, 3), np.uint8)}, "lung"),
    ],
)
def test_a_wrong_request_is_answered_with_its_reason(ask, truth, images, server, wrong, why):
    with pytest.raises(Exception, match=re.escape(why)) as raised:
        ask(id=CANARY, **wrong)
    assert "/tmp" not in str(raised.value)  # nor where the server's files are
    assert np.abs(ask(images[2]) - truth(images[2])).max() < 1e-5


def posted(server, length, chunk=1 << 20):
    """(status, body) of a POST of zeros."""
    host, port = server.url("http").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    connection.putrequest("POST", "/v2/models/lung/infer")
    connection.putheader("Content-Length", str(length))
    connection.endheaders()
    try:
        for _ in range(length // chunk):
            connection.send(bytes(chunk))
    except OSError:
        return 413, b""  # hung up on us
    with connection.getresponse() as answer:
        connection.close()
        return answer.status, answer.read()


@pytest.mark.parametrize("length", [80 << 20, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_a_body_that_is_too_large_does_no_harm(server, ask, truth, images, length):
    status, _ = posted(server, length)
    assert status >= 400
    assert np.abs(ask(images[2]) - truth(images[2])).max() < 1e-5


def test_32_clients_at_once_get_their_own_answers(server, truth, images):
    pool = np.concatenate(images)
    expected = truth(pool)

    def one(place):
        with grpc.InferenceServerClient(server.url("grpc")) as client:
            worst = 0.0
            for i in range(8):
                picks = [(7 * place + i) % len(pool)]
                sent = grpc.InferInput("image", [1, 32, 32, 3], "UINT8")
                sent.set_data_from_numpy(pool[picks])
                found = client.infer("lung", [sent]).as_numpy("logits")
                worst = max(worst, float(np.abs(found - expected[picks]).max()))
            return worst

    def counted(what):
        page = urllib.request.urlopen(f"http://{server.url('metrics')}/metrics").read().decode()
        return float(re.search(rf'^nv_inference_{what}{{model="lung",[^}}]*}} (\S+)$', page, re.MULTILINE)[1])

    def settled(found=None):
        """Both, once they rest: a run is counted after its answers, that of the warm-up too."""
        while found != (found := (counted("count"), counted("exec_count"))):
            time.sleep(0.5)
        return found

    before = settled()
    with ThreadPoolExecutor(32) as threads:
        assert max(threads.map(one, range(32))) < 1e-5
    requests, runs = (now - then for now, then in zip(settled(), before, strict=True))
    assert requests == 256
    assert runs < requests  # some shared a batch


def jpeg(folder, shape, seed=0):
    colour = np.random.default_rng(seed).integers(0, 256, (1, 1, 3))
    Image.fromarray(np.broadcast_to(colour, (*shape, 3)).astype(np.uint8)).save(folder / "one.jpg")
    return (folder / "one.jpg").read_bytes()


def test_the_ensemble_takes_files(ask, truth, tmp_path):
    def encoded(*files):
        length = max(map(len, files))
        return np.stack([np.frombuffer(file.ljust(length, b"\0"), np.uint8) for file in files])

    files = [jpeg(tmp_path, (50, 70), 1), jpeg(tmp_path, (41, 40), 2)]
    expected = truth(np.stack([evaluation_view(decode(file), 32, "crop") for file in files]))
    whole = {"name": "encoded", "model": "lung_ensemble"}
    assert np.abs(ask(encoded(*files), **whole) - expected).max() < 0.05
    with pytest.raises(Exception, match="cannot be decoded"):
        ask(encoded(b"no image"), **whole)
    labels = ask(encoded(files[1]), want="probabilities", classes=1, **whole)
    assert labels[0, 0].decode().split(":", 2)[2] == ("benign", "malignant", "=other")[expected[1].argmax()]


def test_a_broken_file_fails_alone(server, truth, tmp_path):
    good = jpeg(tmp_path, (50, 70), 3)
    expected = truth(evaluation_view(decode(good), 32, "crop")[None])

    def one(place):
        data = np.frombuffer(good if place % 4 else b"broken", np.uint8)[None]
        with grpc.InferenceServerClient(server.url("grpc")) as client:
            sent = grpc.InferInput("encoded", list(data.shape), "UINT8")
            sent.set_data_from_numpy(data)
            try:
                return client.infer("lung_ensemble", [sent]).as_numpy("logits")
            except grpc.InferenceServerException:
                return None

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(one, range(16)))
    assert [answer is None for answer in answers] == [place % 4 == 0 for place in range(16)]
    assert all(np.abs(answer - expected).max() < 0.05 for answer in answers if answer is not None)


def test_models_and_memory_cannot_be_changed_from_outside(server):
    with web.InferenceServerClient(server.url("http")) as client:
        for call in (
            lambda: client.get_model_repository_index(),
            lambda: client.load_model("lung"),
            lambda: client.unload_model("lung"),
            lambda: client.register_system_shared_memory("a", "/a", 16),
            lambda: client.update_trace_settings(settings={"trace_level": ["TENSORS"]}),
            lambda: client.update_log_settings({"log_verbose_level": 9}),
        ):
            with pytest.raises(web.InferenceServerException, match="restricted"):
                call()
    with grpc.InferenceServerClient(server.url("grpc")) as client:
        for call in (
            lambda: client.load_model("lung"),
            lambda: client.register_system_shared_memory("a", "/a", 16),
        ):
            with pytest.raises(grpc.InferenceServerException, match="restricted"):
                call()
        assert client.is_server_ready()


def test_it_listens_on_this_machine_only(server):
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
            (address, port), state = line.split()[1].split(":"), line.split()[3]
            if state == "0A" and int(port, 16) in server.ports.values():
                listening.add((int(port, 16), address))
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, as IPv4 and mapped into IPv6
    assert {port for port, _ in listening} == set(server.ports.values())
    assert {address for _, address in listening} <= loopback


def test_its_log_has_nothing_of_a_request(server, ask, images):
    ask(images[2], id=CANARY)
    with pytest.raises(Exception, match=r"shape|Shape"):
        ask(np.zeros((1, 2), np.uint8), id=CANARY)
    assert CANARY not in server._log.read_text()


def test_the_runtime_is_a_client(server, exported, bundle, truth, images, monkeypatch):
    monkeypatch.setenv("NOISYSSL_TRITON", f"{server.url('http')}/lung")
    many = np.concatenate(images)
    with open_runtime(exported, "triton") as runtime:
        assert np.abs(runtime.logits(many) - truth(many)).max() < 1e-5  # 37 images, batches of 16
        assert runtime.logits(many[:0]).shape == (0, 3)
    with pytest.raises(ConfigError, match="--device"):
        open_runtime(exported, "triton", device="cpu")
    with pytest.raises(ConfigError, match="serves fp32"):
        open_runtime(exported, "triton", precision="fp16")
    manifest = json.loads((bundle / "manifest.json").read_text())
    from noisyssl.deploy.bundle import own_digest

    manifest["figures"] = {}
    manifest["sha256"] = own_digest(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="serves another bundle"):
        open_runtime(bundle, "triton")
    monkeypatch.setenv("NOISYSSL_TRITON", f"{server.url('http')}/absent")
    with pytest.raises(MachineError, match="absent"):
        open_runtime(exported, "triton")
    monkeypatch.setenv("NOISYSSL_TRITON", "127.0.0.1:9")
    with pytest.raises(MachineError, match=r"no Triton answers at 127\.0\.0\.1:9"):
        open_runtime(exported, "triton")
