"""DivideMix: two networks sort each other's labels, and learn from the images of the wrong ones without them.

Li et al., ICLR 2020, arXiv:2002.07394, algorithm 1, with MixMatch (Berthelot et al., NeurIPS 2019,
arXiv:1905.02249) as its semi-supervised part. Where this departs from the authors' code:

- One stream of two views per sample, the same for both networks: a batch's samples count as labelled or
  unlabelled by each network's own split, and an epoch has as many steps as any other objective's. The paper
  draws as many unlabelled samples as labelled ones, and an epoch is one pass over the labelled ones.
- Both networks step together; in the paper one stands still while the other learns for an epoch.
- The unlabelled term's weight rises from epoch to epoch, not from step to step.
- The prior of the regulariser is the share of each class among the given labels. With classes of one size it
  is the paper's, which is uniform; with rare ones a uniform prior would make the networks invent them.
- Each class keeps at least half the share of its labels that is kept overall, those with the smallest losses:
  see `noisyssl.selection`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from noisyssl import mixture
from noisyssl.batch import Batch, Terms
from noisyssl.blending import beta_quantiles, blended, partners
from noisyssl.classifier import Classifier
from noisyssl.config import require
from noisyssl.objective import Given, Objective, Predict
from noisyssl.philox import uniform
from noisyssl.selection import LEAST, no_class_starved

STREAM = 2
"""Of a sample's key; MixUp has 1, streams from 65,536 on belong to the loader."""


class DivideMix(Objective):
    """The first network is evaluated and exported: one network's time in a hospital, not two.

    The paper tests the sum of both networks' outputs.
    """

    copies = 2

    clean: Tensor
    """(2, N) for each network: how sure the other one is that a sample's label is right."""
    prior: Tensor
    weight: Tensor
    rate: Tensor
    error: Tensor
    refilled: Tensor
    quantiles: Tensor
    epochs: Tensor

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        warmup: int = 10
        """Epochs of cross entropy on all labels before the first split; at most a third of the training."""
        confidence_penalty: float = 0.0
        """Weight of the negative entropy in the warm-up; the paper takes 1 for asymmetric noise."""
        threshold: float = 0.5
        """A label that is right with a higher probability is kept (tau)."""
        temperature: float = 0.5
        """Of sharpening (T): below 1 makes targets more certain."""
        alpha: float = 4.0
        """Of the Beta distribution of MixUp."""
        unlabelled: float = 25.0
        """Weight of the unlabelled term (lambda_u); the paper goes from 0 for few wrong labels to 150."""
        ramp: int = 16
        """Epochs over which that weight rises; at most a third of the training."""

        def __post_init__(self) -> None:
            require(self.warmup >= 1, "train.dividemix.warmup", self.warmup, "at least 1")
            require(
                self.confidence_penalty >= 0,
                "train.dividemix.confidence_penalty",
                self.confidence_penalty,
                "0 or above",
            )
            require(0 < self.threshold < 1, "train.dividemix.threshold", self.threshold, "in (0, 1)")
            require(0 < self.temperature <= 1, "train.dividemix.temperature", self.temperature, "in (0, 1]")
            require(self.alpha > 0, "train.dividemix.alpha", self.alpha, "above 0")
            require(self.unlabelled >= 0, "train.dividemix.unlabelled", self.unlabelled, "0 or above")
            require(self.ramp >= 1, "train.dividemix.ramp", self.ramp, "at least 1")

    def __init__(self, network: Classifier, config: Config, given: Given) -> None:
        super().__init__()
        assert given.another is not None
        assert given.labels is not None
        self.network, self.other = network, given.another()
        self.config = config
        known = given.labels[given.train] >= 0
        self.rows = given.train[known]
        self.labels = given.labels[self.rows]
        self.warmup, self.ramp = given.at_most_a_third(config.warmup), given.at_most_a_third(config.ramp)
        share = torch.from_numpy(np.bincount(self.labels, minlength=given.classes) / len(self.labels))
        self.register_buffer("prior", share.float(), persistent=False)
        self.register_buffer("quantiles", beta_quantiles(config.alpha), persistent=False)
        self.register_buffer("clean", torch.zeros(2, given.count))
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("rate", torch.zeros((), dtype=torch.float64))
        self.register_buffer("error", torch.zeros((), dtype=torch.float64))
        self.register_buffer("refilled", torch.zeros(given.classes, dtype=torch.int64))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        self._divided: bool | None = None

    def forward(self, batch: Batch) -> Terms:
        assert batch.label is not None
        return self.mixmatch(batch) if self.divided() else self.warm_up(batch)

    def warm_up(self, batch: Batch) -> Terms:
        """Cross entropy on every given label; for asymmetric noise with the confidence penalty of eq. 2."""
        assert batch.label is not None
        answers = [network(batch.views[0]) for network in (self.network, self.other)]
        loss = answers[0].new_zeros((), dtype=torch.float32)
        with torch.autocast(loss.device.type, enabled=False):
            for answer in (one.float() for one in answers):
                log_p = answer.log_softmax(1)
                certainty = (log_p.exp() * log_p).sum(1).mean()
                loss = loss + cross_entropy(answer, batch.label) + self.config.confidence_penalty * certainty
        return {"loss": loss, **self.seen(batch.label, *answers)}

    def mixmatch(self, batch: Batch) -> Terms:
        """One step on both networks, lines 8 to 26 of algorithm 1."""
        assert batch.label is not None
        networks, images = (self.network, self.other), torch.cat(batch.views).float()
        blends = [self.draw(batch.key, number) for number in range(2)]
        answers = [n(blended(images, *blend)) for n, blend in zip(networks, blends, strict=True)]
        with (
            torch.no_grad()
        ):  # after the above: autocast keeps weights that it has cast, also without gradients
            plain = [network(images) for network in networks]
        loss = images.new_zeros(())
        terms = {"labelled": loss, "labelled_loss": loss, "unlabelled_loss": loss}
        with torch.autocast(images.device.type, enabled=False):
            said = [one.float().softmax(1).unflatten(0, (2, -1)).mean(0) for one in plain]
            guess = self.sharpened((said[0] + said[1]) / 2)
            label = one_hot(batch.label, len(self.prior)).float()
            for number, answer in enumerate(answers):
                clean = self.clean[number][batch.index][:, None]
                kept = clean > self.config.threshold
                refined = self.sharpened(clean * label + (1 - clean) * said[number])
                target = blended(torch.where(kept, refined, guess).repeat(2, 1), *blends[number])
                labelled, unlabelled, prior = self.terms(answer.float(), target, kept[:, 0].repeat(2))
                loss = loss + labelled + self.weight * unlabelled + prior
                own = {
                    "labelled": kept.float().mean(),
                    "labelled_loss": labelled,
                    "unlabelled_loss": unlabelled,
                }
                terms = {name: terms[name] + value.detach() / 2 for name, value in own.items()}
        first, second = (one[: len(batch.label)] for one in plain)
        return {"loss": loss, **terms, **self.seen(batch.label, first, second)}

    def draw(self, key: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """(2B,) share, at least a half, and partner of the blends of both views, for one of the networks."""
        numbers = uniform(key, STREAM, 8)[:, 4 * number : 4 * number + 4]
        share, partner = partners(torch.cat([numbers[:, :2], numbers[:, 2:]]), self.quantiles)
        return torch.maximum(share, 1 - share), partner

    def sharpened(self, p: Tensor) -> Tensor:
        """(B, K) p ** (1 / T), rows sum to 1; eq. 4."""
        sharp = p ** (1 / self.config.temperature)
        return sharp / sharp.sum(1, keepdim=True)

    def terms(self, logits: Tensor, target: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L_X, L_U and L_reg of (M, K) logits, eq. 9 to 11; an empty mean is 0.

        Args:
            target: (M, K) rows sum to 1.
            labelled: (M,) bool.
        """
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        ours, rest = labelled.float(), 1 - labelled.float()
        entropy = -(target * log_p).sum(1)
        distance = (p - target).square().mean(1)
        prior = torch.xlogy(self.prior, self.prior) - self.prior * p.mean(0).clamp(min=1e-8).log()
        return (
            (ours * entropy).sum() / ours.sum().clamp(min=1),
            (rest * distance).sum() / rest.sum().clamp(min=1),
            prior.sum(),
        )

    @torch.no_grad()
    def seen(self, label: Tensor, first: Tensor, second: Tensor) -> Terms:
        """What the log shows of both networks' (B, K) logits."""
        return {
            "agreement": (first.argmax(1) == label).float().mean(),
            "networks_differ": (first.argmax(1) != second.argmax(1)).float().mean(),
        }

    def before_epoch(self, predict: Predict) -> None:
        over = int(self.epochs) - self.warmup
        if over >= 0:
            self.divide(predict)
            self.weight.fill_(self.config.unlabelled * min((over + 0.5) / self.ramp, 1.0))
        self.epochs += 1
        self._divided = None

    def divide(self, predict: Predict) -> None:
        """Co-divide, lines 4 to 7 of algorithm 1: each network gets the other one's probabilities."""
        logits = predict(self.rows, Both(self.network, self.other))
        rates = []
        for number, own in enumerate(reversed(np.split(logits, 2, axis=1))):
            losses = mixture.cross_entropies(own, self.labels)
            clean = mixture.clean_probability(losses)
            rates.append(mixture.rate_of(clean))
            kept = clean > self.config.threshold
            least = max(LEAST, kept.mean() / 2)
            filled, refilled = no_class_starved(kept, losses, self.labels, len(self.prior), least)
            clean[filled & ~kept] = 1.0
            rows = torch.from_numpy(self.rows).to(self.clean.device)
            self.clean[number, rows] = torch.from_numpy(clean).to(self.clean)
            self.refilled[refilled] += 1
        self.rate.fill_(sum(rate for rate, _ in rates) / 2)
        self.error.fill_(max(error for _, error in rates))

    def divided(self) -> bool:
        """Whether the warm-up is over; the buffer is read once an epoch: no step waits for the GPU."""
        if self._divided is None:
            self._divided = int(self.epochs) > self.warmup
        return self._divided

    def heaviest(self) -> None:
        self._divided = True

    def facts(self) -> dict[str, Any]:
        """Noise rate of the last split with its standard error; how often each class was refilled."""
        return {
            "noise_rate": float(self.rate),
            "error": float(self.error),
            "oracle": False,
            "warmup": self.warmup,
            "refilled": {str(k): count for k, count in enumerate(self.refilled.tolist()) if count},
        }

    def apart(self) -> tuple[nn.Module, ...]:
        return self.network, self.other

    def classifier(self) -> nn.Module:
        """The module that is evaluated and exported."""
        return self.network


class Both(nn.Module):
    """The (B, 2K) logits of two networks side by side: images are decoded once for both."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([network(images) for network in self.networks], 1)
