"""Self-supervised methods by name. Adding one: write its file, add its line."""

from noisyssl.methods.base import SSLMethod
from noisyssl.methods.rotation import Rotation
from noisyssl.methods.simclr import SimCLR

METHODS: dict[str, type[SSLMethod]] = {
    "simclr": SimCLR,
    "rotation": Rotation,
}
