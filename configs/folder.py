"""Xception from scratch on a folder of your own images.

    python train.py --config configs/folder.py:FOLDER --workdir WORKDIR

Data: FOLDER/CLASS/*.jpg; a tenth of it, by a hash of the files' names, is held out as 'val'. Or
FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg, the same classes in both. Or a table of images and labels
in place of FOLDER: labels.csv, .parquet, .jsonl (docs/data.md).
Hardware: one GPU for tens of thousands of images; a CPU for a try.
Expected, measured by us: depends on your images; not yet run at full size.
Every value is ours.
"""

from ml_collections import ConfigDict

from xception_flax import data


def get_config(folder: str) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.epochs = 100.0
    config.log_every_steps = 20
    config.model = dict(name="xception", num_classes=-1, dropout_rate=0.5, bn_decay=0.95)
    config.normalize = dict(mean=(127.5,), std=(127.5,))
    config.loss = dict(name="softmax", label_smoothing=0.1, weight_decay=1e-5)
    config.metrics = dict(name="single_label")
    config.optimizer = dict(name="sgd", learning_rate=0.02, momentum=0.9, clip_norm=2.0)
    config.schedule = dict(name="cosine", warmup_epochs=5.0)
    config.step = dict(ema_decay=0.999)
    config.data = dict(
        **data.source_at(folder),
        train_split="train",
        eval_split="val",
        image_size=299,
        train_transforms="random_resized_crop(min_area=0.25) | flip_left_right",
        eval_transforms="center_crop(fraction=0.875)",
    )
    return config
