"""A narrow Xception on Fashion-MNIST, from its four IDX files; about an hour on one CPU core.

    python train.py --config configs/fashion_mnist.py --workdir runs/fashion --config.data.data_dir=DIR
    xception-flax evaluate runs/fashion --split test

Data: 55,000 images of 28 x 28 pixels to train on, 5,000 for 'validation', 10,000 for 'test'. Debian:
apt install dataset-fashion-mnist puts the files into the default data_dir.
Hardware: a laptop CPU.
Measured by us: 93.36 % of the test images (93.54 and 93.18, two seeds), of the validation's 94.1 and 93.6, by
python -m benchmarks.recipes fashion_mnist. The size was chosen on the validation split, by three runs of equal
time with a fifth to a third of the width: 90.7 % at 48 pixels (4 epochs), 90.5 % at 64 (2.5 epochs), 89.6 % at 32
(5 epochs).
Every value is ours.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.epochs = 18.0
    # A quarter of the width and two middle blocks: 729,770 parameters.
    config.model = dict(name="xception", num_classes=10, width=0.25, middle_repeats=2, dropout_rate=0.2, bn_decay=0.95)
    config.normalize = dict(mean=(127.5,), std=(127.5,))
    config.loss = dict(name="softmax", label_smoothing=0.1)
    config.metrics = dict(name="single_label")
    config.optimizer = dict(name="adamw", learning_rate=0.003, decoupled_weight_decay=0.05)
    config.schedule = dict(name="cosine", warmup_epochs=1.0)
    config.step = dict(ema_decay=0.999)
    config.data = dict(
        source="fashion_mnist",
        image_size=56,  # twice 28, since the network halves it five times
        channels=1,
        train_split="train",
        eval_split="validation",
        train_transforms="resize | random_affine(max_shift=0.08, max_scale=1.1) | flip_left_right",
        eval_transforms="resize",
    )
    return config
