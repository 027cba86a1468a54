"""Xception on ImageNet as the paper trained it (section 4, table 1).

    python train.py --config configs/imagenet.py --workdir WORKDIR --config.data.data_dir=DIR

Data: TFDS `imagenet2012`, prepared once by `xception-flax prepare imagenet` (docs/imagenet.md).
Hardware: any number of devices that divides the batch; the paper had 60 NVIDIA K80 for about 3 days.
Expected (paper, table 1, single crop, single model): top-1 0.790, top-5 0.945.
Measured by us: not yet run.

Each value is tagged: [paper] with its section; [Inception V3] for Szegedy et al. 2015 (arXiv 1512.00567),
whose network the paper trains with the same settings to compare; or [ours] where neither says anything.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # [ours]
    config.batch_size = 1536  # [ours] near Inception V3's 50 replicas x 32, and a multiple of 512; not in the paper
    config.epochs = 100.0  # [Inception V3] section 8; not in the paper
    config.log_every_steps = 100  # [ours]
    config.eval_every_epochs = 1.0  # [ours]
    config.checkpoint_every_epochs = 1.0  # [ours]

    config.model = dict(
        name="xception",
        num_classes=1000,
        dropout_rate=0.5,  # [paper] 4.3
        bn_decay=0.99,  # [ours] Keras' default, with which the published weights were trained
        bn_epsilon=1e-3,  # [ours] as for the published weights
        dtype="bfloat16",  # [ours] compute; parameters, statistics, softmax and optimizer are float32
    )
    config.normalize = dict(mean=(127.5,), std=(127.5,))  # [ours] to [-1, 1], as the published weights expect

    config.loss = dict(
        name="softmax",
        label_smoothing=0.1,  # [Inception V3] section 7; not in the paper
        weight_decay=1e-5,  # [paper] 4.3, L2 in the loss: 1e-5 * |w|^2 / 2; only for kernels: [ours]
    )
    config.metrics = dict(name="single_label")  # [paper] table 1: top-1 and top-5

    config.optimizer = dict(
        name="sgd",  # [paper] 4.2
        learning_rate=0.045,  # [paper] 4.2
        momentum=0.9,  # [paper] 4.2
        nesterov=False,  # [ours]
        clip_norm=None,  # [ours] not in the paper; Inception V3 clips at 2.0 under RMSprop
    )
    config.schedule = dict(
        name="exponential",
        decay_rate=0.94,  # [paper] 4.2
        every_epochs=2.0,  # [paper] 4.2
        staircase=True,  # [ours] 'every 2 epochs' read as a step
    )
    config.step = dict(
        ema_decay=0.9999,  # [paper] 4.2: Polyak averaging at inference; its decay is [ours]
        accumulation_steps=1,  # [ours] raise it if a batch does not fit into memory
    )

    config.data = dict(
        source="tfds",
        name="imagenet2012",  # [paper] 4.1
        train_split="train",
        eval_split="validation",  # [paper] table 1
        image_size=299,  # [paper] figure 5
        channels=3,
        train_transforms="random_resized_crop(min_area=0.08) | flip_left_right",  # [ours] Inception's crop and flip
        eval_transforms="center_crop(fraction=0.875)",  # [ours] the paper says 'single crop', not which
        on_bad_image="replace",  # [ours] libjpeg warns of some of the 1.28 million images
    )
    config.mesh = dict(data=-1, fsdp=1)  # [ours] synchronous data parallelism, as [paper] 4.4
    config.checkpoint = dict(keep_latest=2, keep_best=1)  # [ours]
    return config
