"""Robust losses of one network by name. Adding one: write its file, add its line."""

from noisyssl.losses.base import Loss
from noisyssl.losses.ce import CrossEntropy
from noisyssl.losses.gce import GeneralizedCrossEntropy

LOSSES: dict[str, type[Loss]] = {
    "ce": CrossEntropy,
    "gce": GeneralizedCrossEntropy,
}
