"""Question "audit": does an audit find the labels that were flipped on purpose?

Known noise is put into all labels of a set, the audit sees only the result. AUROC of its score for flipped
against kept labels, the share of flipped ones among the tenth that it suspects most, and the estimated rate
beside the true one.
"""

import time

import numpy as np

from noisyssl import noise as noises
from noisyssl.benchmarks.records import Record, record
from noisyssl.config import Config
from noisyssl.pipelines.audit import judged
from noisyssl.pipelines.embed import Frozen, features_of
from noisyssl.pipelines.labels import instance_shares
from noisyssl.pipelines.samples import Samples


def measure(
    data: str, samples: Samples, frozen: Frozen, config: Config, specs: list[str], seeds: int = 3
) -> Record:
    """One record; a row per kind of noise, means over seeds of the noise with their spread.

    Args:
        data: name of the set.
        samples: labelled; their labels are the truth here.
        frozen: whose features the audit looks at.
        config: device, threads and geometry.
        specs: kinds and rates, such as symmetric:0.2.
        seeds: of the noise.
    """
    from noisyssl.baselines import colour_histogram
    from noisyssl.pipelines.setup import device_of

    rows = np.flatnonzero(samples.labels >= 0)
    truth, groups, classes = samples.labels[rows], np.array(samples.groups)[rows], len(samples.classes)
    began = time.perf_counter()
    device = device_of(config.device)
    features = np.concatenate(
        features_of(frozen, samples, rows, device, config.threads, (colour_histogram,)), 1
    )
    looked = time.perf_counter() - began
    figures = {}
    for spec in specs:
        noise, found = noises.parse(spec), []
        for seed in range(seeds):
            given = put_in(noise, config, samples, rows, seed)
            began = time.perf_counter()
            audit = judged(features, given, groups, rows, classes)
            found.append(
                {
                    **scores(audit.score, given != truth),
                    "estimated rate": audit.rate[0],
                    "true rate": float((given != truth).mean()),
                    "judging, s": time.perf_counter() - began,
                }
            )
        figures[spec] = {name: float(np.mean([one[name] for one in found])) for name in found[0]} | {
            "largest error of the rate": max(abs(one["estimated rate"] - one["true rate"]) for one in found)
        }
    settings = {
        "data": data, "images": len(rows), "features": frozen.what, "size": frozen.size, "seeds": seeds,
        "threads": config.threads, "looking, s": round(looked, 1),
    }  # fmt: skip
    return record("audit", settings=settings, figures=figures, n=seeds)


def scores(score: np.ndarray, flipped: np.ndarray) -> dict[str, float]:
    """AUROC of (M,) suspicion for flipped labels, and the share of these in the most suspicious tenth."""
    from sklearn.metrics import roc_auc_score

    top = np.argsort(-score, kind="stable")[: max(1, len(score) // 10)]
    return {
        "AUROC": float(roc_auc_score(flipped, score)),
        "precision in the top tenth": float(flipped[top].mean()),
    }


def put_in(noise: noises.Noise, config: Config, samples: Samples, rows: np.ndarray, seed: int) -> np.ndarray:
    """(M,) labels of `rows` after noise in all of them."""
    from dataclasses import replace

    if noise.kind == "instance":
        seeded = replace(config, train=replace(config.train, noise_seed=seed))
        shares = instance_shares(noise, seeded, samples, rows)
        return noises.inject_each(samples.labels, shares, seed, rows)[rows]
    return noises.inject(samples.labels, noises.matrix(noise, samples.classes), seed, rows)[rows]
