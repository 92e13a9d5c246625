"""Each loss against somebody else's implementation, or a loop written from its paper, to 1e-5 in float32."""

import math

import pytest
import torch
from torch.nn import functional as F

from noisyssl.methods import barlow, byol, dino, jigmag, jigsaw, masked, moco2, moco3, simclr, simsiam, vicreg

lightly = pytest.importorskip("lightly.loss", reason="needs lightly")
SEEDS = pytest.mark.parametrize("seed", range(3))


def embeddings(seed: int, count: int = 12, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Two (B, D) tensors that agree about as much as two views do."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, width, generator=generator)
    return first, first + 0.7 * torch.randn(count, width, generator=generator)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@SEEDS
def test_nt_xent_is_lightlys(seed):
    first, second = embeddings(seed)
    same(simclr.nt_xent(first, second, 0.2)[0], lightly.NTXentLoss(temperature=0.2)(first, second))


@SEEDS
def test_barlow_twins_is_lightlys(seed):
    first, second = embeddings(seed)
    correlation = barlow.cross_correlation(first, second)
    diagonal = correlation.diagonal()
    redundancy = correlation.square().sum() - diagonal.square().sum()
    ours = (diagonal - 1).square().sum() + 0.0051 * redundancy
    same(ours, lightly.BarlowTwinsLoss(lambda_param=0.0051)(first, second))


@SEEDS
def test_the_method_weighs_barlows_terms_as_its_loss_says(seed):
    first, second = embeddings(seed)
    method = whose_embeddings_are(barlow.BarlowTwins, first, second, redundancy=0.0051)
    same(method(None)["loss"], lightly.BarlowTwinsLoss(lambda_param=0.0051)(first, second))


@SEEDS
def test_vicreg_is_lightlys(seed):
    first, second = embeddings(seed)
    method = whose_embeddings_are(vicreg.VICReg, first, second, weights=(25.0, 25.0, 1.0))
    terms = method(None)
    same(terms["loss"], lightly.VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=1.0)(first, second))
    assert terms["variance"] > 0, "the hinge is at work, or a wrong weight of it would not show"


@SEEDS
def test_byols_distance_is_two_plus_twice_lightlys_cosine(seed):
    first, second = embeddings(seed)
    same(byol.distance(first, second), 2 + 2 * lightly.NegativeCosineSimilarity()(first, second))


@SEEDS
def test_simsiams_agreement_is_lightlys_cosine_and_stops_the_gradient(seed):
    first, second = (z.requires_grad_() for z in embeddings(seed))
    ours = simsiam.agreement(first, second)
    same(ours, lightly.NegativeCosineSimilarity()(first, second))
    ours.backward()
    assert first.grad is not None
    assert second.grad is None


@SEEDS
def test_simsiams_loss_is_half_of_each_predicted_view(seed):
    first, second = embeddings(seed)
    method = whose_embeddings_are(simsiam.SimSiam, first, second, predictor=torch.nn.Tanh())
    peer = lightly.NegativeCosineSimilarity()
    same(method(None)["loss"], (peer(first.tanh(), second) + peer(second.tanh(), first)) / 2)


@SEEDS
def test_moco2_is_lightlys_loss_with_a_memory_bank(seed):
    query, key = (F.normalize(z, dim=1) for z in embeddings(seed))
    queue = F.normalize(torch.randn(20, 7, generator=torch.Generator().manual_seed(seed + 9)), dim=1)
    peer = lightly.NTXentLoss(temperature=0.2, memory_bank_size=(20, 7))
    peer.memory_bank.bank = queue.clone()
    same(moco2.contrast(query, key, queue, 0.2)[0], peer(query, key))


@SEEDS
def test_moco3_is_the_papers_algorithm(seed):
    query, key = embeddings(seed)
    total = 0.0
    for i in range(len(query)):
        scores = [float(F.cosine_similarity(query[i], key[j], dim=0)) / 0.2 for j in range(len(key))]
        total -= scores[i] - math.log(sum(map(math.exp, scores)))
    same(moco3.contrast(query, key, 0.2), torch.tensor(2 * 0.2 * total / len(query)))


@SEEDS
def test_dino_is_lightlys(seed):
    generator = torch.Generator().manual_seed(seed)
    students = tuple(torch.randn(5, 11, generator=generator) for _ in range(4))
    teachers = tuple(torch.randn(5, 11, generator=generator) for _ in range(2))
    centre = torch.randn(11, generator=generator)
    peer = lightly.DINOLoss(output_dim=11, teacher_temp=0.04, student_temp=0.1)
    peer.center.data = centre.view(1, 1, -1)
    same(dino.cross_entropy(students, teachers, centre, 0.1, 0.04), peer(list(teachers), list(students)))


def test_masked_reconstruction_is_the_mean_error_over_hidden_pixels():
    method, batch = method_and_batch(masked.Masked, 4, ratio=0.5, patch=8)
    painted: dict[str, torch.Tensor] = {}
    decode = method.decoder.forward
    method.decoder.forward = lambda features: painted.setdefault("map", decode(features))
    loss = method(batch)["loss"].item()
    hidden = masked.mask(batch.key, 4, 0.5)
    images = method.backbone.normalise(batch.views[0])
    out = painted[
        "map"
    ].detach()  # (B, 3 * 32 * 32, 1, 1): channel c, row r, column k stand at (c * 32 + r) * 32 + k
    total, count = 0.0, 0
    for b in range(4):
        for r in range(0, 32):
            for k in range(0, 32):
                if hidden[b, 0, r // 8, k // 8]:
                    for c in range(3):
                        total += abs(float(out[b, (c * 32 + r) * 32 + k, 0, 0]) - float(images[b, c, r, k]))
                        count += 1
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert count == 4 * 3 * 8 * 64


def test_jigsaw_and_jigmag_are_cross_entropy_over_their_labels():
    for kind, options in (
        (jigsaw.Jigsaw, {"permutations": 6, "hidden": 16}),
        (jigmag.JigMag, {"hidden": 16}),
    ):
        method, batch = method_and_batch(kind, 5, **options)
        logits = {}
        last = (method.all if kind is jigsaw.Jigsaw else method.head)[-1]
        last.register_forward_hook(
            lambda module, inputs, output, kept=logits: kept.update(out=output.detach())
        )
        loss = method(batch)["loss"].item()
        count = logits["out"].shape[1]
        from noisyssl.philox import uniform

        labels = (uniform(batch.key, 0, 1)[:, 0] * count).long().tolist()
        expected = sum(
            math.log(sum(math.exp(float(x)) for x in row)) - float(row[label])
            for row, label in zip(logits["out"], labels, strict=True)
        )
        assert loss == pytest.approx(expected / 5, rel=1e-5)


def whose_embeddings_are(kind, first, second, **attributes):
    """A method of this kind that sees these embeddings in place of its network's."""
    method = kind.__new__(kind)
    torch.nn.Module.__init__(method)
    for name, value in attributes.items():
        setattr(method, name, value)
    method.projector = torch.nn.Identity()
    method.embed = lambda head, views: (first, second)

    class NoBatch:
        views = ()

    return lambda batch: method.forward(NoBatch())


def method_and_batch(kind, count, **options):
    from noisyssl.backbones import build_backbone
    from noisyssl.batch import Batch

    torch.manual_seed(0)
    method = kind(build_backbone("resnet18-w16"), kind.Config(**options), 32)
    views = tuple(
        torch.randint(0, 256, (count, 3, v.size, v.size), dtype=torch.uint8) for v in kind.views(32)
    )
    return method, Batch(views=views, index=torch.arange(count), key=torch.arange(count) * 7 - 3)
