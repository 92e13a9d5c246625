"""What fine-tuning trains, evaluation measures and export writes: a backbone and one linear layer."""

from torch import Tensor, nn

from noisyssl.backbones import Backbone, build_backbone


class Classifier(nn.Module):
    """(B, 3, H, W) bytes to (B, K) logits."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.features, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def build_classifier(backbone: str, stem: str, classes: int) -> Classifier:
    """A randomly initialised classifier; see `build_backbone` for the names."""
    return Classifier(build_backbone(backbone, stem), classes)
