"""The paper's ablations, and the towers that it left unexplored: imagenet.py with exactly one change.

    python train.py --config configs/ablations.py:NAME --workdir WORKDIR --config.data.data_dir=DIR

NAME is one of

    no_residual       without residual connections (section 4.6): clearly slower and worse
    mid_relu          ReLU between depthwise and pointwise convolution (section 4.7): worse than none
    mid_elu           ELU in the same place (section 4.7): worse than none
    fc                two fully connected layers of 4096 before the classifier (table 2, on JFT)
    wd_4e-5           the weight decay of Inception V3 (section 4.3): 'quite suboptimal' for Xception
    towers_K          every separable convolution as K convolutions of K segments of the channels, from
                      1 (regular convolution) to 64; 3 or 4 is Inception (sections 1.2 and 5). Fewer
                      towers have more parameters: 1 has 8.0, 2 has 4.5, 4 has 2.8 times Xception's
    towers_K_equal    the same, with a width that gives as many parameters as Xception, to 1 % (0.35,
                      0.46, 0.60 for K of 1, 2, 4), so that only the structure differs. K is at most 60:
                      with more, the narrower network lacks a channel for each tower

Data, hardware: as for imagenet.py. Measured by us: not yet run.
"""

import re

from ml_collections import ConfigDict

from configs import imagenet
from xception_flax import UserError

CHANGES = {
    "no_residual": {"model.residual": False},  # [paper] 4.6
    "mid_relu": {"model.mid_activation": "relu"},  # [paper] 4.7
    "mid_elu": {"model.mid_activation": "elu"},  # [paper] 4.7
    "fc": {"model.fc_layers": (4096, 4096)},  # [paper] table 2
    "wd_4e-5": {"loss.weight_decay": 4e-5},  # [paper] 4.3
}


def get_config(name: str) -> ConfigDict:
    config = imagenet.get_config()
    towers = re.fullmatch(r"towers_([1-9]\d*)(_equal)?", name)
    if towers is None and name not in CHANGES:
        raise UserError(
            f"the argument must be one of {', '.join(CHANGES)}, towers_K, towers_K_equal (K from 1), got {name!r}."
        )
    for key, value in CHANGES.get(name, {}).items():
        group, option = key.split(".")
        config[group][option] = value
    if towers:
        # [ours] All three values: sections 1.2 and 5 ask for such networks.
        config.model.name = "xception_towers"
        config.model.towers = int(towers[1])
        if towers[2]:
            from xception_flax.models.towers import equal_width

            config.model.width = equal_width(config.model.towers)
    return config
