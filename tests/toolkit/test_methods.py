"""The contract of every method in the table; a new one is tested by being in it. Laws stand in `methods/`."""

import pytest
import torch
from torch import nn

from noisyssl.backbones import build_backbone
from noisyssl.batch import Batch
from noisyssl.errors import ConfigError
from noisyssl.methods import METHODS

SIZE = 32
NARROW = {  # the papers' widths would make these tests take minutes
    "moco2": {"queue": 64, "splits": 2},
    "moco3": {"hidden": 64},
    "byol": {"hidden": 64},
    "barlow": {"width": 64},
    "vicreg": {"width": 64},
    "dino": {"prototypes": 128, "hidden": 64},
    "jigsaw": {"permutations": 10, "hidden": 32},
}
every_method = pytest.mark.parametrize("name", METHODS)


def build(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return METHODS[name](build_backbone("resnet18-w16"), METHODS[name].Config(**NARROW.get(name, {})), SIZE)


def batch_for(name: str, count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    views = tuple(
        torch.randint(0, 256, (count, 3, view.size, view.size), dtype=torch.uint8, generator=generator).to(
            memory_format=torch.channels_last
        )
        for view in METHODS[name].views(SIZE)
    )
    key = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    return Batch(views=views, index=torch.arange(count), key=key)


def permuted(batch: Batch, order: torch.Tensor) -> Batch:
    return Batch(views=tuple(v[order] for v in batch.views), index=batch.index[order], key=batch.key[order])


@every_method
def test_gradient_reaches_every_parameter_that_is_trained_and_no_other(name):
    method = build(name)
    terms = method(batch_for(name))
    assert terms["loss"].dtype == torch.float32
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    terms["loss"].backward()
    for where, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, where
        assert parameter.grad is None or parameter.grad.isfinite().all(), where
    assert all(parameter.requires_grad for parameter in method.backbone.parameters())
    # the last BatchNorm of a block starts at weight 0, so what lies before it inside the block gets none yet
    assert method.backbone.trunk.conv1.weight.grad.abs().sum() > 0


@every_method
def test_the_order_of_a_batch_does_not_matter(name):
    batch = batch_for(name)
    order = torch.randperm(len(batch.index), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        build(name)(permuted(batch, order))["loss"], build(name)(batch)["loss"], rtol=1e-4, atol=1e-5
    )


@every_method
def test_a_method_is_a_function_of_its_batch(name):
    """No hidden randomness: what a method draws comes from the batch's keys."""
    batch = batch_for(name)
    first = build(name)(batch)["loss"]
    torch.manual_seed(99)
    method = build(name)
    torch.manual_seed(100)
    assert torch.equal(method(batch)["loss"], first)


@every_method
def test_labels_are_never_read(name):
    batch = batch_for(name)
    labelled = Batch(views=batch.views, index=batch.index, key=batch.key, label=torch.arange(8))
    assert torch.equal(build(name)(batch)["loss"], build(name)(labelled)["loss"])


@every_method
def test_every_trained_parameter_is_optimised_once(name):
    method = build(name)
    grouped = [p for group in method.parameter_groups() for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in method.parameters() if p.requires_grad}
    assert len(grouped) == len({id(p) for p in grouped})


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_finite_in_half_precision(name, dtype):
    batch = batch_for(name)
    full = build(name)(batch)["loss"]
    with torch.autocast("cpu", dtype):
        half = build(name)(batch)["loss"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)


@every_method
def test_nothing_moves_after_a_step_that_was_skipped(name):
    method = build(name)
    method(batch_for(name))["loss"].backward()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.after_step(0.5, torch.tensor(False))
    moved = [key for key, value in method.state_dict().items() if not torch.equal(value, before[key])]
    assert moved in ([], ["progress"])


@every_method
def test_two_steps_from_a_state_dict_are_the_same_two_steps(name):
    """Whatever a method remembers is in its state dict: the promise of an exact resume."""

    def two_steps(method):
        losses = []
        for progress in (0.5, 1.0):
            loss = method(batch_for(name))["loss"]
            method.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in method.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.05 * parameter.grad
            method.after_step(progress, torch.tensor(True))
            losses.append(loss.item())
        return losses

    first = build(name)
    two_steps(first)
    second = build(name, seed=5)
    second.load_state_dict(first.state_dict())
    assert two_steps(second) == two_steps(first)


@every_method
def test_a_batch_too_small_is_refused_with_the_setting_to_change(name):
    method = build(name)
    if method.least_batch > 1:
        with pytest.raises(ConfigError, match=r"^pretrain\.batch is 1, .*set pretrain\.batch at least"):
            method.must_accept(1)
    method.must_accept(8)


@every_method
def test_the_page_about_methods_finds_what_it_needs(name):
    import sys

    page = (sys.modules[METHODS[name].__module__].__doc__ or "").strip().split("\n\n")
    assert len(page) == 3
    assert "arXiv:" in page[1]
    assert METHODS[name].family in ("contrastive", "joint-embedding", "pretext", "generative")


@every_method
def test_the_backbone_keeps_its_names(name):
    """What pretraining saves is loaded into a plain backbone."""
    plain = build_backbone("resnet18-w16")
    assert build(name).backbone.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(plain, nn.Module)
