"""Robust losses of one network by name. Adding one: write its file, add its line."""

from noisyssl.losses.base import Loss
from noisyssl.losses.ce import CrossEntropy
from noisyssl.losses.elr import EarlyLearning
from noisyssl.losses.forward import ForwardCorrection
from noisyssl.losses.gce import GeneralizedCrossEntropy
from noisyssl.losses.sce import SymmetricCrossEntropy
from noisyssl.losses.smoothing import LabelSmoothing
from noisyssl.losses.sop import SparseOverParameterisation

LOSSES: dict[str, type[Loss]] = {
    "ce": CrossEntropy,
    "smoothing": LabelSmoothing,
    "gce": GeneralizedCrossEntropy,
    "sce": SymmetricCrossEntropy,
    "elr": EarlyLearning,
    "forward": ForwardCorrection,
    "sop": SparseOverParameterisation,
}
