import math

import numpy as np
import pytest
import torch
from torch import nn

from noisyssl.errors import ConfigError
from noisyssl.losses import LOSSES
from noisyssl.losses.forward import estimate
from noisyssl.objective import Given


def build(name, classes=5, **settings):
    """In evaluation mode, so that calling it changes nothing; what it remembers is random."""
    given = Given(count=64, train=np.arange(32), classes=classes)
    loss = LOSSES[name](LOSSES[name].Config(**settings), given).eval()
    generator = torch.Generator().manual_seed(1)
    for buffer in ("targets", "transition", "u", "v"):
        if hasattr(loss, buffer):
            random = torch.rand(getattr(loss, buffer).shape, generator=generator)
            whole = random.sum(1, keepdim=True) if buffer in ("targets", "transition") else 1
            getattr(loss, buffer).copy_(random / whole)
    return loss


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(32, 5, generator=generator, dtype=dtype)
    return logits, torch.randint(5, (32,), generator=generator), torch.arange(32)


def naive_ce(logits, label):
    total = 0.0
    for row, y in zip(logits.double().tolist(), label.tolist(), strict=True):
        total -= math.log(math.exp(row[y]) / sum(map(math.exp, row)))
    return total / len(label)


def naive_gce(logits, label, q=0.7):
    total = 0.0
    for row, y in zip(logits.double().tolist(), label.tolist(), strict=True):
        total += (1 - (math.exp(row[y]) / sum(map(math.exp, row))) ** q) / q
    return total / len(label)


def probabilities(logits):
    """Lists of floats in double precision."""
    return [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits.double().tolist()]


def naive_smoothing(logits, label, epsilon=0.1):
    total = 0.0
    for p, y in zip(probabilities(logits), label.tolist(), strict=True):
        for k in range(len(p)):
            total -= ((1 - epsilon) * (k == y) + epsilon / len(p)) * math.log(p[k])
    return total / len(label)


def naive_sce(logits, label, alpha=0.1, beta=1.0, a=-4.0):
    total = 0.0
    for p, y in zip(probabilities(logits), label.tolist(), strict=True):
        for k in range(len(p)):
            if k == y:
                total -= alpha * math.log(p[k])  # CE; RCE has log 1 = 0 here
            else:
                total -= beta * p[k] * a  # log 0
    return total / len(label)


def naive_elr(logits, label, strength=3.0):
    targets = build("elr").targets.tolist()
    total = 0.0
    for i, (p, y) in enumerate(zip(probabilities(logits), label.tolist(), strict=True)):
        inner = sum(min(max(p[k], 1e-4), 1 - 1e-4) * targets[i][k] for k in range(len(p)))
        total += -math.log(p[y]) + strength * math.log(1 - inner)
    return total / len(label)


def naive_forward(logits, label):
    matrix = build("forward").transition.tolist()
    total = 0.0
    for p, y in zip(probabilities(logits), label.tolist(), strict=True):
        total -= math.log(sum(p[i] * matrix[i][y] for i in range(len(p))))
    return total / len(label)


def naive_sop(logits, label):
    loss, total = build("sop"), 0.0
    for i, (p, y) in enumerate(zip(probabilities(logits), label.tolist(), strict=True)):
        added, hard = float(loss.u[i, 0]) ** 2, max(range(len(p)), key=lambda k, p=p: p[k])
        s = [added if k == y else -(float(loss.v[i, k]) ** 2) for k in range(len(p))]
        corrected = [max(p[k] + s[k], 1e-4) for k in range(len(p))]
        total -= math.log(corrected[y] / sum(corrected))
        total += sum(((k == hard) + s[k] - (k == y)) ** 2 for k in range(len(p)))
    return total / len(label)


NAIVE = {
    "ce": naive_ce, "gce": naive_gce, "smoothing": naive_smoothing, "sce": naive_sce, "elr": naive_elr,
    "forward": naive_forward, "sop": naive_sop,
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop_written_from_the_paper(name):
    logits, label, index = batch()
    assert build(name)(logits, label, index).item() == pytest.approx(NAIVE[name](logits, label), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_the_formula(name):
    logits, label, index = batch(torch.float64)
    loss = build(name)
    assert torch.autograd.gradcheck(lambda x: loss.formula(x, label, index), logits.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_added_to_all_logits_changes_nothing(name):
    logits, label, index = batch()
    loss = build(name)
    torch.testing.assert_close(loss(logits + 20, label, index), loss(logits, label, index), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_finite_float32_loss_even_under_autocast(name, dtype):
    logits = torch.tensor([[60.0, -60, 0], [-60, 60, 0]], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = build(name, classes=3)(logits, torch.tensor([0, 0]), torch.arange(2))
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    wide = build(name, classes=3)(logits.detach().float(), torch.tensor([0, 0]), torch.arange(2))
    torch.testing.assert_close(loss, wide)


def test_gce_meets_its_two_limits():
    logits, label, index = batch()
    ce = nn.functional.cross_entropy(logits, label)
    mae = (1 - logits.softmax(1).gather(1, label[:, None])).mean()
    torch.testing.assert_close(build("gce", q=1e-4)(logits, label, index), ce, rtol=2e-3, atol=0)
    torch.testing.assert_close(build("gce", q=1.0)(logits, label, index), mae)


def test_gce_pulls_a_contradicted_label_with_p_to_the_q():
    logits, label, index = batch(torch.float64)
    weights = logits.softmax(1).gather(1, label[:, None]) ** 0.7
    (gce,) = torch.autograd.grad(build("gce").formula(logits.requires_grad_(), label, index), logits)
    (ce,) = torch.autograd.grad(build("ce").formula(logits, label, index), logits)
    torch.testing.assert_close(gce, weights * ce)


@pytest.mark.parametrize("q", [0.0, -0.5, 1.2, float("nan")])
def test_gce_refuses_q_outside_its_range(q):
    with pytest.raises(ConfigError, match=r"train\.gce\.q is .*\(0, 1\]\. Use --objective ce"):
        LOSSES["gce"].Config(q=q)


def test_smoothing_and_sce_meet_cross_entropy():
    logits, label, index = batch()
    ce = build("ce")(logits, label, index)
    torch.testing.assert_close(build("smoothing", epsilon=0.0)(logits, label, index), ce)
    torch.testing.assert_close(build("sce", alpha=1.0, beta=0.0)(logits, label, index), ce)
    torch.testing.assert_close(build("elr", strength=0.0)(logits, label, index), ce)
    mae = (1 - logits.softmax(1).gather(1, label[:, None])).mean()
    reverse = build("sce", alpha=0.0, beta=0.5, log_zero=-9.2)(logits, label, index)
    torch.testing.assert_close(reverse, 0.5 * 9.2 * mae)


def test_forward_through_the_identity_is_cross_entropy_even_where_p_underflows():
    logits, label, index = batch()
    loss = LOSSES["forward"](LOSSES["forward"].Config(), Given(count=64, train=np.arange(4), classes=5))
    ce = build("ce")(logits, label, index)
    torch.testing.assert_close(loss(logits, label, index), ce)
    far = torch.tensor([[200.0, 0, 0, 0, 0]], requires_grad=True)
    loss(far, torch.tensor([1]), torch.arange(1)).backward()
    torch.testing.assert_close(far.grad, torch.tensor([[1.0, -1, 0, 0, 0]]))


def test_elr_remembers_by_row_and_only_while_it_trains():
    loss = LOSSES["elr"](LOSSES["elr"].Config(memory=0.6), Given(count=10, train=np.arange(10), classes=3))
    first, second = torch.tensor([[2.0, 0, -1], [0, 3, 0]]), torch.tensor([[0.0, 1, 0], [1, 0, 2]])
    label = torch.tensor([0, 1])
    loss(first, label, torch.tensor([7, 2]))
    loss.after_step(torch.tensor(True))
    loss(second, label, torch.tensor([2, 7]))  # shuffled: memory follows the row, not the place
    loss.after_step(torch.tensor(True))
    p, q = first.softmax(1), second.softmax(1)
    expected = torch.zeros(10, 3)
    expected[7] = 0.6 * 0.4 * p[0] + 0.4 * q[1]
    expected[2] = 0.6 * 0.4 * p[1] + 0.4 * q[0]
    torch.testing.assert_close(loss.targets, expected)
    before = loss.targets.clone()
    loss(first * torch.nan, label, torch.tensor([7, 2]))
    loss.after_step(torch.tensor(False))  # a step that was not taken
    loss.after_step(torch.tensor(True))
    loss.eval()(first, label, torch.tensor([7, 2]))
    loss.after_step(torch.tensor(True))
    assert torch.equal(loss.targets, before)
    assert "targets" in loss.state_dict()  # a checkpoint holds it


def test_elr_gradient_is_the_papers():
    """Eq. 5: p - y + strength * g, g_c = p_c / (1 - <p, t>) * sum_k (t_k - t_c) p_k."""
    logits, label, index = batch(torch.float64)
    loss = build("elr").double()
    (found,) = torch.autograd.grad(loss.formula(logits.requires_grad_(), label, index), logits)
    p, t = logits.detach().softmax(1), loss.targets[index]
    inner = (p * t).sum(1, keepdim=True)
    g = p / (1 - inner) * (inner - t)  # sum_k (t_k - t_c) p_k = <p, t> - t_c
    expected = (p - nn.functional.one_hot(label, 5) + 3.0 * g) / len(label)
    inside = ((p > 1e-4) & (p < 1 - 1e-4)).all(1)  # the clamp stops gradients outside
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-5, atol=1e-8)
    assert inside.sum() > 10


def test_the_estimated_matrix_is_that_of_a_network_that_learnt_the_given_labels():
    """Such a network answers with the row of the true class; a few outliers must not decide."""
    truth = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]], dtype=torch.float64)
    rows = truth.repeat_interleave(200, 0)
    rows[:3] = torch.tensor([1.0, 0, 0])
    found = estimate(rows.numpy(), 97.0)
    np.testing.assert_allclose(found, truth.numpy())
    outlier = estimate(rows.numpy(), 100.0)
    np.testing.assert_allclose(outlier[0], [1.0, 0, 0])


def test_a_rare_class_is_read_off_its_own_images():
    """1.5 % of the images: the 97th percentile over all of them would be an image of another class."""
    rows = np.concatenate([np.tile([0.97, 0.02, 0.01], (700, 1)), np.tile([0.02, 0.97, 0.01], (285, 1))])
    rows = np.concatenate([rows, np.tile([0.01, 0.02, 0.97], (15, 1))])
    np.testing.assert_allclose(
        estimate(rows, 97.0), [[0.97, 0.02, 0.01], [0.02, 0.97, 0.01], [0.01, 0.02, 0.97]]
    )
    never = estimate(rows[:985], 97.0)  # nobody is taken for class 2: its likeliest image stands for it
    assert np.isfinite(never).all()
    np.testing.assert_allclose(never.sum(1), 1)


def test_forward_estimates_once_after_its_warm_up():
    loss = LOSSES["forward"](
        LOSSES["forward"].Config(warmup=2), Given(count=300, train=np.arange(100, 300), classes=2)
    )
    asked = []

    def predict(rows):
        asked.append(rows)
        p = np.where(np.arange(len(rows))[:, None] % 2 == 0, [0.9, 0.1], [0.3, 0.7])
        return np.log(p).astype(np.float32)

    states = []
    for _ in range(5):
        loss.before_epoch(predict)
        states.append(loss.transition.clone())
    assert len(asked) == 1
    assert np.array_equal(asked[0], np.arange(100, 300))
    assert torch.equal(states[0], torch.eye(2))
    assert torch.equal(states[1], torch.eye(2))
    torch.testing.assert_close(states[2], torch.tensor([[0.9, 0.1], [0.3, 0.7]]))
    other = LOSSES["forward"](
        LOSSES["forward"].Config(warmup=2), Given(count=300, train=np.arange(9), classes=2)
    )
    other.load_state_dict(loss.state_dict())  # a resumed run does not estimate again
    other.before_epoch(predict)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("smoothing", {"epsilon": 1.0}, r"train\.smoothing\.epsilon is 1\.0; it must be in \[0, 1\)"),
        ("sce", {"log_zero": 0.0}, r"train\.sce\.log_zero is 0\.0; it must be below 0"),
        ("sce", {"alpha": -1.0}, r"train\.sce\.alpha"),
        ("elr", {"memory": 1.0}, r"train\.elr\.memory is 1\.0; it must be in \[0, 1\)"),
        ("forward", {"warmup": 0}, r"train\.forward\.warmup is 0; it must be at least 1"),
    ],
)
def test_settings_outside_their_range_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        LOSSES[name].Config(**settings)
