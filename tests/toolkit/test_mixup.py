"""MixUp: the blend, its loss, and that all of it hangs on keys alone."""

import numpy as np
import pytest
import torch
from torch import nn

from noisyssl.batch import Batch
from noisyssl.errors import ConfigError
from noisyssl.objective import Given
from noisyssl.objectives.mixup import MixUp

GIVEN = Given(count=100, train=np.arange(100), classes=3)


class Flat(nn.Module):
    """Logits are a linear map of the pixels: of a blend they are the blend of the logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 4 * 4, 3)

    def forward(self, images):
        return self.linear(images.flatten(1) / 255)


def batch(size=16, first=0):
    index = torch.arange(first, first + size)
    images = torch.randint(
        0, 256, (size, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return Batch(views=(images,), index=index, key=index * 7919 + 13, label=index % 3)


def test_the_loss_is_the_papers_loop():
    method, one = MixUp(Flat(), MixUp.Config(alpha=0.4), GIVEN), batch()
    share, partner = method.draw(one.key)
    total = 0.0
    for i in range(16):
        j, own = int(partner[i]), share[i]
        x = own * one.views[0][i].float() + (1 - own) * one.views[0][j].float()
        log_p = method.network(x[None]).log_softmax(1)[0]
        total -= own * log_p[one.label[i]] + (1 - own) * log_p[one.label[j]]
    torch.testing.assert_close(method(one)["loss"], total / 16)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha):
    from scipy.stats import beta

    share, _ = MixUp(Flat(), MixUp.Config(alpha=alpha), GIVEN).draw(torch.arange(50_000) * 7919)
    below = beta.cdf(np.quantile(share.double().numpy(), places := np.linspace(0.1, 0.9, 9)), alpha, alpha)
    np.testing.assert_allclose(below, places, atol=4 * 0.5 / np.sqrt(50_000))
    assert 0 <= share.min() < share.max() <= 1


def test_partners_are_a_permutation_and_draws_hang_on_keys_alone():
    method, one = MixUp(Flat(), MixUp.Config(), GIVEN), batch(64)
    share, partner = method.draw(one.key)
    assert sorted(partner.tolist()) == list(range(64))
    assert (partner != torch.arange(64)).float().mean() > 0.9
    torch.manual_seed(99)
    again, same = method.draw(one.key)
    assert torch.equal(share, again)
    assert torch.equal(partner, same)
    alone, _ = method.draw(one.key[5:6])
    assert torch.equal(alone[0], share[5])
    other, _ = method.draw(one.key + 1)
    assert (other != share).float().mean() > 0.9


def test_a_small_alpha_is_nearly_cross_entropy():
    method, one = MixUp(Flat(), MixUp.Config(alpha=1e-3), GIVEN), batch()
    share, partner = method.draw(one.key)
    assert ((share < 1e-3) | (share > 1 - 1e-3)).float().mean() > 0.9
    kept = torch.where(share > 0.5, torch.arange(16), partner)
    plain = nn.functional.cross_entropy(method.network(one.views[0][kept].float()), one.label[kept])
    torch.testing.assert_close(method(one)["loss"], plain, rtol=0.05, atol=0.01)


def test_an_alpha_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"train\.mixup\.alpha is 0\.0; it must be above 0"):
        MixUp.Config(alpha=0.0)
