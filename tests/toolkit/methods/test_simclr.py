import math

import pytest
import torch

from noisyssl.errors import ConfigError
from noisyssl.methods.simclr import SimCLR, nt_xent


def test_nt_xent_is_equation_one():
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    z = [row / row.norm() for row in torch.cat([a, b])]
    total = 0.0
    for i in range(10):
        j = (i + 5) % 10
        others = sum(math.exp(float(z[i] @ z[k]) / 0.3) for k in range(10) if k != i)
        total -= math.log(math.exp(float(z[i] @ z[j]) / 0.3) / others)
    assert nt_xent(a, b, 0.3)[0].item() == pytest.approx(total / 10, rel=1e-5)


def test_nt_xent_knows_its_limits():
    eye = torch.eye(8)
    loss, agreement = nt_xent(eye, eye, 0.05)  # partners equal, all others orthogonal
    assert loss.item() == pytest.approx(math.log(1 + 14 * math.exp(-20)), abs=1e-6)
    assert agreement.item() == 1.0
    same = torch.ones(8, 3)
    assert nt_xent(same, same, 0.5)[0].item() == pytest.approx(
        math.log(15), rel=1e-6
    )  # nothing to tell apart
    a, b = torch.randn(2, 6, 4).unbind()
    assert torch.allclose(nt_xent(a, b, 0.2)[0], nt_xent(b, a, 0.2)[0])
    assert torch.allclose(nt_xent(a, b, 0.2)[0], nt_xent(3 * a, 0.1 * b, 0.2)[0])


@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5])
def test_nt_xent_is_finite_and_agrees_in_every_precision(temperature):
    a, b = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0)).unbind()
    b = a + 0.3 * b
    full = nt_xent(a, b, temperature)[0]
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            half = nt_xent(a.to(dtype), b.to(dtype), temperature)[0]
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0.05, atol=0.02)


def test_simclr_refuses_a_temperature_of_zero():
    with pytest.raises(ConfigError, match=r"pretrain\.simclr\.temperature is 0"):
        SimCLR.Config(temperature=0.0)
