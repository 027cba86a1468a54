"""A narrow Xception on CIFAR-10. Images are scaled up threefold, since the network halves them five times.

    python train.py --config configs/cifar10.py --workdir WORKDIR --config.data.data_dir=DATA

Data: TFDS `cifar10`, prepared once. For that, TFDS needs TensorFlow, to write the images as PNG, and access to the
internet. In a separate environment (pip install tensorflow-datasets tensorflow importlib_resources):

    python -c "import tensorflow_datasets as tfds; tfds.builder('cifar10', data_dir='DATA', \\
        file_format='array_record').download_and_prepare()"

Hardware: one GPU.
Measured by us: not yet run.

Each value is tagged: [WRN] for Wide ResNets (Zagoruyko & Komodakis 2016, arXiv 1605.07146, section 3),
[CutMix] for Yun et al. 2019 (arXiv 1905.04899, section 4.1), or [ours].
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # [ours]
    config.batch_size = 128  # [WRN]
    config.epochs = 200.0  # [WRN]
    config.log_every_steps = 100  # [ours]
    config.eval_every_epochs = 5.0  # [ours]
    config.checkpoint_every_epochs = 5.0  # [ours]

    config.model = dict(
        name="xception",
        num_classes=10,
        width=0.5,  # [ours] 5.4 million parameters
        dropout_rate=0.0,  # [ours]
        bn_decay=0.9,  # [ours]
        dtype="bfloat16",  # [ours]
    )
    config.normalize = dict(mean=(127.5,), std=(127.5,))  # [ours]
    config.loss = dict(name="softmax", weight_decay=5e-4)  # [WRN] the value; only for kernels: [ours]
    config.metrics = dict(name="single_label")
    # The probability is from the authors' command for CIFAR (clovaai/CutMix-PyTorch), not from the paper.
    config.mix = dict(cutmix_alpha=1.0, probability=0.5)  # [CutMix]

    config.optimizer = dict(name="sgd", learning_rate=0.1, momentum=0.9, nesterov=True)  # [WRN]
    config.schedule = dict(name="cosine", warmup_epochs=5.0)  # [ours] WRN lowers the rate in three steps
    config.step = dict(ema_decay=0.999)  # [ours]

    config.data = dict(
        source="tfds",
        name="cifar10",
        train_split="train",
        eval_split="test",
        image_size=96,  # [ours] scaled up from 32 pixels
        # Padded by 4 as in He et al. 2016 (section 4.2), with black; [WRN] pads with reflections of the image.
        train_transforms="random_crop_with_padding(image_size=32, padding=4) | flip_left_right | resize",  # [ours]
        eval_transforms="resize",  # [ours]
    )
    return config
