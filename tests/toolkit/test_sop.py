"""SOP: what u and v descend on, where that leads, and whose they are. The formula itself: test_losses.py."""

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from noisyssl.errors import ConfigError
from noisyssl.losses.sop import BATCH, FLOOR, SparseOverParameterisation
from noisyssl.objective import Given

TAKEN = torch.tensor(True)
"""What a step that was taken says afterwards."""


def built(count=20, **settings):
    torch.manual_seed(0)
    given = Given(count=count, train=torch.arange(count).numpy(), classes=4)
    return SparseOverParameterisation(SparseOverParameterisation.Config(**settings), given)


def batch(scale=2.0):
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(12, 4, generator=generator)
    return logits, torch.randint(4, (12,), generator=generator), torch.randperm(20, generator=generator)[:12]


def descended(u, v, logits, label, lr_u, lr_v):
    """By autograd, as the paper has it: u on both terms, v on the squared distance alone."""
    u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
    y, hard = one_hot(label, 4).float(), one_hot(logits.argmax(1), 4).float()
    added, taken = (u**2 * y).clamp(0, 1), (v**2 * (1 - y)).clamp(0, 1)
    p = (logits.softmax(1) + added - taken.detach()).clamp(min=FLOOR)
    entropy = -(y * (p / p.sum(1, keepdim=True)).clamp(min=FLOOR).log()).sum()
    (entropy + (hard + added - taken - y).square().sum()).backward()
    return (u - lr_u / BATCH * u.grad).detach(), (v - lr_v / BATCH * v.grad).detach()


@pytest.mark.parametrize("scale", [2.0, 30.0])  # at 30 most probabilities lie at the floor
@pytest.mark.parametrize("size", [0.3, 1.1])  # at 1.1 many squares are clamped
def test_u_and_v_take_the_steps_that_autograd_says(scale, size):
    loss, (logits, label, index) = built(lr_u=3.0, lr_v=5.0), batch(scale)
    loss.u.copy_(size * torch.rand(20, 1))
    loss.v.copy_(size * torch.rand(20, 4))
    u, v = loss.u.clone(), loss.v.clone()
    expected = descended(u[index], v[index], logits, label, 3.0, 5.0)
    loss(logits, label, index)
    assert torch.equal(loss.u, u)  # the backward pass of a compiled step may read it yet
    loss.after_step(TAKEN)
    torch.testing.assert_close(loss.u[index], expected[0])
    torch.testing.assert_close(loss.v[index], expected[1])
    others = [i for i in range(20) if i not in index.tolist()]
    assert torch.equal(loss.u[others], u[others])  # nobody else moves
    assert torch.equal(loss.v[others], v[others])
    assert not torch.equal(loss.u[index], u[index])
    assert not torch.equal(loss.v[index], v[index])


def test_it_begins_as_cross_entropy_for_the_network():
    loss, (logits, label, index) = built().eval(), batch()
    logits.requires_grad_()
    (found,) = torch.autograd.grad(loss(logits, label, index), logits)
    (plain,) = torch.autograd.grad(cross_entropy(logits, label), logits)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


def test_a_contradicted_label_is_explained_away_and_a_right_one_is_not():
    loss = built(count=2)
    logits, label, index = torch.tensor([[6.0, 0, 0, 0]] * 2), torch.tensor([1, 0]), torch.arange(2)
    for _ in range(200):
        loss(logits, label, index)
        loss.after_step(TAKEN)
    wrong, right = (loss.u**2).clamp(max=1)[:, 0].tolist()
    assert wrong > 0.9  # s makes up for the whole label
    assert right < 1e-6
    assert float((loss.v[0, 0] ** 2).clamp(max=1)) > 0.9  # and takes the network's class away
    assert float(loss.v[1].square().max()) < 1e-6
    logits.requires_grad_()
    (pull,) = torch.autograd.grad(loss(logits, label, index), logits)
    (plain,) = torch.autograd.grad(cross_entropy(logits, label), logits)
    assert pull[0].norm() < 0.1 * plain[0].norm()


def test_a_network_in_evaluation_leaves_it_alone_and_a_checkpoint_holds_it():
    loss, one = built(), batch()
    before = loss.u.clone()
    loss.eval()(*one)
    loss.after_step(TAKEN)
    assert torch.equal(loss.u, before)
    assert set(loss.state_dict()) == {"u", "v"}
    assert list(loss.parameters()) == []


def test_a_step_does_not_hang_on_the_size_of_the_batch():
    whole, parts, (logits, label, index) = built(), built(), batch()
    whole(logits, label, index)
    for part in (slice(0, 4), slice(4, 12)):
        parts(logits[part], label[part], index[part])
        parts.after_forward()
    before = whole.u.clone()
    whole.after_step(TAKEN), parts.after_step(TAKEN)
    assert not torch.equal(whole.u, before)
    torch.testing.assert_close(whole.u, parts.u, rtol=1e-5, atol=0)
    torch.testing.assert_close(whole.v, parts.v, rtol=1e-5, atol=0)


def test_a_short_training_takes_longer_steps_and_a_long_one_the_papers():
    def moved(epochs):
        given = Given(count=20, train=torch.arange(20).numpy(), classes=4, epochs=epochs)
        loss, (logits, label, index) = (
            SparseOverParameterisation(SparseOverParameterisation.Config(), given),
            batch(),
        )
        loss.u.fill_(0.01), loss.v.fill_(0.01)
        loss(logits, label, index)
        loss.after_step(TAKEN)
        return (loss.u[index] - 0.01), (loss.v[index] - 0.01)

    for short, paper in zip(moved(30), moved(120), strict=True):
        torch.testing.assert_close(short, 4 * paper, rtol=1e-3, atol=1e-6)
    for long, unknown in zip(moved(500), moved(None), strict=True):
        assert torch.equal(long, unknown)


def test_negative_rates_are_refused():
    with pytest.raises(ConfigError, match=r"train\.sop\.lr_u is -1\.0; it must be 0 or above"):
        SparseOverParameterisation.Config(lr_u=-1.0)
