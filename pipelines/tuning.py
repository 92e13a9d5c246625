"""Which part of a classifier learns: all of it, its head alone, or first its head and then all of it.

A backbone that stays cannot memorise wrong labels. Fitting the head first and all of it afterwards keeps the
features from being torn apart by a head that knows nothing yet: Kumar et al., ICLR 2022, arXiv:2202.10054.
"""

from torch import nn

from noisyssl.backbones import Backbone


def head_epochs(tune: str, epochs: int) -> int:
    """Epochs at the start of a training of `epochs` in which backbones stay; `tune` as in the settings."""
    if tune == "all":
        return 0
    return epochs if tune == "head" else int(tune.removeprefix("head:"))


def hold(module: nn.Module, held: bool) -> None:
    """Let every backbone in `module` stay as it is, or learn again.

    One that nobody trains, such as an average that follows another, is left alone.
    """
    for part in module.modules():
        if isinstance(part, Backbone) and (part.held or any(p.requires_grad for p in part.parameters())):
            part.hold(held)
