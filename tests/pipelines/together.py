"""What several processes compute together, written down for test_together.py: started by its fixtures.

    python together.py FOLDER QUESTION ...

Each question is a function here; its answer goes to FOLDER/QUESTION-RANK.json, tensors beside it. A process
that is alone gets from `gradients` and `training` what one process computes of the joined batches.
"""

import dataclasses
import json
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from noisyssl import objective as contract
from noisyssl.backbones import build_backbone
from noisyssl.batch import Batch
from noisyssl.checkpoint import digest
from noisyssl.config import AutoBatch, Config, PretrainConfig
from noisyssl.distributed import alone, exchange, gather, rank, world
from noisyssl.errors import NoisySSLError
from noisyssl.losses import LOSSES
from noisyssl.methods import METHODS
from noisyssl.objective import Objective
from noisyssl.pipelines import batch_size, launch, pretrain
from noisyssl.pipelines.fit import fit, prepare
from noisyssl.pipelines.loader import open_loader
from noisyssl.pipelines.samples import Samples
from noisyssl.views import View

CPU = torch.device("cpu")
SIZE, COUNT = 32, 12
WIDEST = 48
"""Of a method's numbers in these tests: a multiple of twice COUNT, so that it can be a queue."""


def small(name: str):
    """The method's own settings, with whatever is large cut down."""
    config = METHODS[name].Config()
    wide = {
        f.name: WIDEST
        for f in dataclasses.fields(config)
        if isinstance(value := getattr(config, f.name), int) and value > WIDEST
    }
    return dataclasses.replace(config, **wide)


def build(name: str):
    torch.manual_seed(0)
    return METHODS[name](build_backbone("resnet18-w16"), small(name), SIZE)


def joined_batch(views: tuple[View, ...], seed: int, count: int = COUNT) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = tuple(
        torch.randint(0, 256, (count, 3, v.size, v.size), dtype=torch.uint8, generator=generator).to(
            memory_format=torch.channels_last
        )
        for v in views
    )
    key = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    return Batch(views=images, index=torch.arange(count), key=key, label=torch.arange(count) % 2)


def share(batch: Batch) -> Batch:
    """This process's part."""
    each = len(batch.index) // world()
    mine = slice(rank() * each, (rank() + 1) * each)
    return Batch(
        views=tuple(v[mine] for v in batch.views), index=batch.index[mine], key=batch.key[mine],
        label=batch.label[mine],
    )  # fmt: skip


class Given:
    """A loader of made-up batches that are a function of (epoch, position)."""

    def __init__(self, views: tuple[View, ...], count: int = 4) -> None:
        self.views, self.count = views, count
        self.position, self.dropped = (0, 0), {}

    def __len__(self):
        return self.count

    def start(self, epoch, position, dropped=None):
        self.position = (epoch, position)

    def __iter__(self):
        epoch, position = self.position
        for place in range(position, self.count):
            self.position = (epoch, place + 1) if place + 1 < self.count else (epoch + 1, 0)
            yield share(joined_batch(self.views, 100 * epoch + place))


class Line(Objective):
    """Least squares; its loss is not a number where the batch holds sample `poison`."""

    def __init__(self, poison: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.poison = nn.Linear(3, 1), poison

    def forward(self, batch):
        loss = F.mse_loss(self.net(batch.views[0].float().mean((2, 3)) / 255)[:, 0], batch.label.float())
        return {"loss": loss * torch.where((batch.index == self.poison).any(), torch.nan, 1.0)}


ONE = (View(size=8),)


def train(state, loader, stage, **more):
    """The log, and (step, tensors, record) of each checkpoint."""
    log, saved = [], []

    def save():
        tensors = {name: value.clone() for name, value in state.tensors().items()}
        saved.append((state.step, tensors, json.loads(json.dumps(state.record()))))

    for _ in fit(state, loader, stage, device=CPU, predict=len, log=log.append, save=save, **more):
        pass
    return log, saved


def gradients(name: str) -> dict[str, torch.Tensor]:
    """Gradients of one batch, and the buffers after the step: running statistics, queues, centres.

    Where a method wants statistics of shares, its BatchNorms keep still: those would differ, and shall.
    """
    method = build(name)
    state = prepare(method, PretrainConfig(), CPU)
    if not METHODS[name].sync_batchnorm:
        for module in method.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    state.network(share(joined_batch(METHODS[name].views(SIZE), 0)))["loss"].backward()
    out = {f"gradient.{k}": p.grad.clone() for k, p in method.named_parameters() if p.requires_grad}
    method.after_step(0.5, torch.tensor(True))
    return out | {f"buffer.{k}": value for k, value in method.named_buffers()}


def methods(folder):
    """Per method, whether all processes have the same bits; the first one's tensors go to a file."""
    same = {}
    for name in METHODS:
        tensors = {key: value.contiguous() for key, value in gradients(name).items()}
        gradient = {key: value for key, value in tensors.items() if key.startswith("gradient.")}
        same[name] = len(set(exchange(digest(gradient)))) == 1
        if rank() == 0:
            save_file(tensors, folder / f"{name}.safetensors")
    return same


def training(folder=None):
    """Two epochs with everything switched on that happens around a step: the log, all that is trained."""
    views = METHODS["simclr"].views(SIZE)
    stage = PretrainConfig(
        epochs=2,
        batch=COUNT,
        optimizer="sgd",
        lr=0.05,
        warmup=0.0,
        accumulate=2,
        clip=1.0,
        ema=0.9,
        log_every=1,
    )
    state = prepare(build("simclr"), stage, CPU)
    log, _ = train(state, Given(views), stage)
    if folder is not None and rank() == 0:
        save_file({k: v.contiguous() for k, v in state.tensors().items()}, folder / "training.safetensors")
    return log if folder is not None else (log, state.tensors())


def stopping(folder):
    """The last process is told to stop after its second question: how far each process gets.

    First within an epoch; then with one step an epoch, so that only the ends of epochs ask.
    """
    return [stopped_training(steps_of_an_epoch) for steps_of_an_epoch in (4, 1)]


def stopped_training(steps_of_an_epoch: int) -> dict:
    asked, saved, stage = [], [], PretrainConfig(epochs=4, optimizer="sgd", checkpoint_minutes=100)
    state, loader = prepare(Line(), stage, CPU), Given(ONE, steps_of_an_epoch)

    def stopped():
        asked.append(1)
        return 15 if rank() == world() - 1 and len(asked) >= 2 else None

    def save():
        saved.append(state.step)

    try:
        for _ in fit(state, loader, stage, device=CPU, predict=len, log=len, save=save, stopped=stopped):
            pass
    except NoisySSLError as error:
        return {"code": error.code, "step": state.step, "saved": saved}
    return {"code": 0, "step": state.step, "saved": saved}


def poisoned(folder):
    """A loss that is no number in one process: what each one says, and whether weights stayed."""
    stage = PretrainConfig(epochs=1, optimizer="sgd", log_every=2)
    objective = Line(poison=COUNT - 1)
    before = objective.net.weight.detach().clone()
    try:
        train(prepare(objective, stage, CPU), Given(ONE), stage)
    except NoisySSLError as error:
        return {"said": str(error), "moved": not torch.equal(objective.net.weight, before)}


def dropping(folder):
    """Batches of ten images, of which the last process's first file is broken; and what was dropped."""
    paths = sorted(p.name for p in (folder / "images").iterdir())
    side = np.full(len(paths), 8, np.int32)
    samples = Samples(
        root=folder / "images", paths=paths, classes=(), labels=np.full(len(paths), -1), groups=paths,
        splits=np.full(len(paths), "train"), heights=side, widths=side, native=np.ones(len(paths), bool),
        digests=[""] * len(paths),
    )  # fmt: skip
    loader = open_loader(
        samples, np.arange(len(paths)), ONE, batch=4, seed=0, device=CPU, kind="batched",
        drop_last=True, threads=1, quarantine=True, rank=rank(), world=world(),
    )  # fmt: skip
    try:
        seen = [[batch.index.tolist() for batch in loader] for _ in range(2)]
    finally:
        loader.close()
    return {"seen": seen, "dropped": sorted(loader.dropped)}


def messages(folder):
    return {"heard": exchange({"rank": rank(), "text": "é" * rank()})}


class Crossed(Objective):
    """A layer, a BatchNorm and a loss over the embeddings of all processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def forward(self, batch):
        z = self.net(batch.views[0].float().mean((2, 3)) / 255)
        return {"loss": F.cross_entropy(z @ gather(z).T, torch.arange(len(z)) + rank() * len(z))}


def compiling(folder):
    """Losses of four steps without and with torch.compile."""
    losses = []
    for compiled in ("off", "on"):
        stage = PretrainConfig(epochs=1, optimizer="sgd", lr=0.5, warmup=0.0, log_every=1, compile=compiled)
        log, _ = train(prepare(Crossed(), stage, CPU), Given(ONE, 4), stage)
        losses.append([entry["loss"] for entry in log])
    return losses


def resuming(folder):
    """Whether training from the first checkpoint ends with the same bits as training that went on."""
    stage = PretrainConfig(epochs=1, optimizer="sgd", lr=0.1, warmup=0.0, checkpoint_minutes=1e-9)
    views = METHODS["simclr"].views(SIZE)
    whole = prepare(build("simclr"), stage, CPU)
    _, saved = train(whole, Given(views, 4), stage)
    step, tensors, record = saved[0]
    state = prepare(build("simclr"), stage, CPU)
    state.restore(tensors, record)
    train(state, Given(views, 4), stage)
    ours, theirs = state.tensors(), whole.tensors()
    return {"from": step, "to": whole.step, "same": all(torch.equal(ours[k], v) for k, v in theirs.items())}


def memories(folder=None):
    """What ELR and SOP remember after two batches of logits, each process seeing its part."""
    given, out = contract.Given(count=20, train=np.arange(20), classes=3), {}
    for name in ("elr", "sop"):
        torch.manual_seed(0)
        loss = LOSSES[name](LOSSES[name].Config(), given)
        for first in (0, 5):
            index = torch.arange(first, first + COUNT).flip(0)
            each = COUNT // world()
            mine = slice(rank() * each, (rank() + 1) * each)
            loss(torch.randn(COUNT, 3)[mine], (index % 3)[mine], index[mine])
            loss.after_step(torch.tensor(True))
        out |= {f"{name}.{key}": value.tolist() for key, value in loss.state_dict().items()}
    return out


def batches(folder):
    """What all take for a batch of auto that only the first process measures, as if it were alone."""

    def measured(config, stage, samples, module, sizes, processes):
        assert rank() == 0
        with alone():
            assert world() == 1
            assert exchange("nobody answers") == ["nobody answers"]
        return {size: 100.0 * min(size, 64) / processes for size in sizes}

    batch_size.device_of, batch_size.measured = lambda name: torch.device("cuda"), measured
    rows = np.zeros(2000, np.int32)
    samples = Samples(
        root=folder, paths=[""] * 2000, classes=(), labels=rows, groups=[""] * 2000,
        splits=np.full(2000, "train"), heights=rows, widths=rows, native=rows, digests=[""] * 2000,
    )  # fmt: skip
    config = Config(pretrain=PretrainConfig(batch=AutoBatch(256), options=METHODS["simclr"].Config()))
    config, facts = batch_size.settle(config, "pretrain", samples, pretrain)
    return {"batch": config.pretrain.batch, "speeds": facts["images_per_s"], "world": world()}


QUESTIONS = (
    batches,
    memories,
    methods,
    training,
    stopping,
    poisoned,
    dropping,
    messages,
    compiling,
    resuming,
)


def main(folder: Path, asked: list[str]) -> None:
    launch.PATIENCE = timedelta(minutes=1)  # who lose each other shall fail the test, not hold it up
    torch.set_num_threads(1)
    with launch.joined():
        for question in QUESTIONS:
            if question.__name__ in asked:
                found = question(folder)
                (folder / f"{question.__name__}-{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
