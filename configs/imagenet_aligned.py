"""Aligned Xception on ImageNet: xception41, 65, 71 (DeepLab v3+), 41p, 65p (timm, pre-activation).

    python train.py --config configs/imagenet_aligned.py --workdir WORKDIR --config.data.data_dir=DIR
    python train.py --config configs/imagenet_aligned.py:xception41 ...     another of the family

(Choose by the argument, not by --config.model.name: xception41p needs another epsilon.)

Recipe, data and hardware: those of imagenet.py, except for the network. xception65 has about 1.7 times the
multiply-adds of Xception (`xception-flax summary --all`). Neither DeepLab's paper nor timm gives a whole
recipe for these networks on ImageNet.
Measured by us: not yet run.
"""

from ml_collections import ConfigDict

from configs import imagenet
from xception_flax import UserError

NETWORKS = ("xception41", "xception65", "xception71", "xception41p", "xception65p")


def get_config(network: str = "xception65") -> ConfigDict:
    if network not in NETWORKS:
        raise UserError(f"the argument must be one of {', '.join(NETWORKS)}, got {network!r}.")
    config = imagenet.get_config()
    config.model.name = network  # [ours] the rest is imagenet.py's
    if network == "xception41p":
        config.model.bn_epsilon = 1e-5  # [ours] timm's value for this network
    return config
