"""What colour alone tells on the same noisy labels: the two baselines of every training."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from noisyssl.baselines import colour_histogram, fit_predict, mean_rgb
from noisyssl.config import Config
from noisyssl.geometry import evaluation_view
from noisyssl.images import BadImage
from noisyssl.pipelines.evaluate import whole
from noisyssl.pipelines.samples import Samples


def baseline_logits(
    samples: Samples,
    labels: np.ndarray,
    test_images: np.ndarray,
    config: Config,
    dropped: dict[int, str],
) -> dict[str, np.ndarray]:
    """Test logits of mean RGB and of a colour histogram, by logistic regression on the same noisy labels.

    A file that broke since the last epoch joins `dropped` with quarantine; otherwise it raises BadImage.
    """

    def features(index: int) -> tuple[np.ndarray, np.ndarray] | None:
        try:
            image = evaluation_view(samples.image(index), config.data.size, config.data.fit)
        except BadImage as error:
            if not config.data.quarantine:
                raise
            dropped[index] = str(error)
            return None
        return mean_rgb(image), colour_histogram(image)

    train = samples.where("train")
    rows = train[whole(train, dropped)]
    with ThreadPoolExecutor(config.threads) as pool:
        both = [pair for pair in pool.map(features, rows.tolist()) if pair is not None]
    rows, out = rows[whole(rows, dropped)], {}
    for k, (name, feature) in enumerate((("mean_rgb", mean_rgb), ("colour_histogram", colour_histogram))):
        tested = np.stack([feature(image) for image in test_images])
        trained = np.stack([pair[k] for pair in both])
        out[name] = fit_predict(trained, labels[rows], tested, len(samples.classes))
    return out
