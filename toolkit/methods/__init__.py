"""Self-supervised methods by name. Adding one: write its file, add its line."""

from noisyssl.methods.barlow import BarlowTwins
from noisyssl.methods.base import SSLMethod
from noisyssl.methods.byol import BYOL
from noisyssl.methods.dino import DINO
from noisyssl.methods.jigmag import JigMag
from noisyssl.methods.jigsaw import Jigsaw
from noisyssl.methods.masked import Masked
from noisyssl.methods.moco2 import MoCoV2
from noisyssl.methods.moco3 import MoCoV3
from noisyssl.methods.rotation import Rotation
from noisyssl.methods.simclr import SimCLR
from noisyssl.methods.simsiam import SimSiam
from noisyssl.methods.vicreg import VICReg

METHODS: dict[str, type[SSLMethod]] = {
    "simclr": SimCLR,
    "moco2": MoCoV2,
    "moco3": MoCoV3,
    "byol": BYOL,
    "simsiam": SimSiam,
    "barlow": BarlowTwins,
    "vicreg": VICReg,
    "dino": DINO,
    "rotation": Rotation,
    "jigsaw": Jigsaw,
    "jigmag": JigMag,
    "masked": Masked,
}
