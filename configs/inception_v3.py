"""Inception V3 on ImageNet, as the Xception paper trained it to compare with (section 4, table 1).

    python train.py --config configs/inception_v3.py --workdir WORKDIR --config.data.data_dir=DIR

Recipe, data and hardware: those of imagenet.py, except for the network and the weight decay: "the models are
trained with the same settings" (sections 4.2 and 4.3).
Expected (paper, table 1, single crop, single model, no auxiliary tower): top-1 0.782, top-5 0.941.
Measured by us: not yet run.
"""

from ml_collections import ConfigDict

from configs import imagenet


def get_config() -> ConfigDict:
    config = imagenet.get_config()
    config.model.name = "inception_v3"  # [paper] table 1; without auxiliary tower, 4.3
    config.loss.weight_decay = 4e-5  # [paper] 4.3: tuned for Inception V3; Xception has 1e-5
    return config
