"""A narrow Xception on Fashion-MNIST, from its four IDX files.

    python train.py --config configs/fashion_mnist.py --workdir runs/fashion --config.data.data_dir=DIR
    xception-flax evaluate runs/fashion --split test

Data: 55,000 images to train on, 5,000 to validate, 10,000 to test. Debian: apt install
dataset-fashion-mnist puts the files into the default data_dir.
Hardware: a laptop CPU. Expected, measured by us: not yet run.
Every value is ours.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128
    config.epochs = 20.0
    config.model = dict(name="xception", num_classes=10, width=0.125, middle_repeats=2, dropout_rate=0.5, bn_decay=0.95)
    config.normalize = dict(mean=(127.5,), std=(127.5,))
    config.loss = dict(name="softmax", label_smoothing=0.1)
    config.metrics = dict(name="single_label")
    config.optimizer = dict(name="adamw", learning_rate=0.003, decoupled_weight_decay=0.05)
    config.schedule = dict(name="cosine", warmup_epochs=1.0)
    config.step = dict(ema_decay=0.999)
    config.data = dict(
        source="fashion_mnist",
        image_size=32,
        channels=1,
        train_split="train",
        eval_split="validation",
        train_transforms="resize | random_affine(max_shift=0.08, max_scale=1.1) | flip_left_right",
        eval_transforms="resize",
    )
    return config
