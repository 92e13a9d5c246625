"""What colour alone can tell: two classifiers no network may fall below.

Mean RGB and a colour histogram separate some histology sets surprisingly well (Ignatov & Malivenko,
arXiv:2409.11546), so their figures stand beside every accuracy.
"""

import numpy as np

LOWEST = -100.0
"""Log-probability of a class the training labels never show; finite, so softmax and AUROC stay defined."""


def mean_rgb(image: np.ndarray) -> np.ndarray:
    """(3,) float64 mean of each channel in [0, 1] of an (H, W, 3) uint8 image."""
    return image.reshape(-1, 3).mean(axis=0) / 255


def colour_histogram(image: np.ndarray) -> np.ndarray:
    """(512,) float64 shares of the pixels in a joint 8x8x8 RGB histogram of an (H, W, 3) uint8 image."""
    red, green, blue = (image.reshape(-1, 3) >> 5).T.astype(np.int64)
    counts = np.bincount(red * 64 + green * 8 + blue, minlength=512)
    return counts / counts.sum()


def fit_predict(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    classes: int,
    strength: float = 1.0,
) -> np.ndarray:
    """(N, K) float64 log-probabilities of the test rows, usable as logits: standardised logistic regression.

    Deterministic. Training rows labelled -1 are left out; needs scikit-learn.

    Args:
        strength: scikit-learn's C, the inverse of the penalty on the weights.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = train_labels >= 0
    features, labels = train_features[known], train_labels[known]
    out = np.full((len(test_features), classes), LOWEST)
    seen = np.unique(labels)
    if len(seen) == 1:  # nothing to separate
        out[:, seen] = 0.0
        return out
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
    model.fit(features, labels)
    out[:, seen] = np.log(np.maximum(model.predict_proba(test_features), np.exp(LOWEST)))
    return out
