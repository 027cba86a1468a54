"""Xception on ImageNet as one would train it today: RandAugment, mixup, CutMix, erasing, weight averages, cosine.

    python train.py --config configs/imagenet_modern.py --workdir WORKDIR --config.data.data_dir=DIR

Data: TFDS `imagenet2012`, prepared once by `xception-flax prepare imagenet` (docs/imagenet.md).
Hardware: any number of devices that divides the batch; antialiasing and RandAugment double the
host's work for an image.
Expected: not known for Xception; the original recipe raised a ResNet-50 from top-1 0.761 to 0.809.
Measured by us: not yet run.

Each value is tagged: [torchvision] for the recipe of torchvision's ResNets (V. Vryniotis, "How to
train state-of-the-art models using TorchVision's latest primitives", pytorch.org, 2021),
[paper] for Xception's, or [ours]. Two parts of torchvision's recipe are left out: repeated
augmentation, and training on smaller images than in evaluation. RandAugment (Cubuk et al. 2019,
arXiv 1909.13719) replaces its relative TrivialAugment.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # [ours]
    config.batch_size = 1024  # [torchvision] 8 GPUs x 128
    config.epochs = 600.0  # [torchvision]
    config.log_every_steps = 100  # [ours]
    config.eval_every_epochs = 5.0  # [ours]
    config.checkpoint_every_epochs = 1.0  # [ours]

    config.model = dict(
        name="xception",
        num_classes=1000,
        dropout_rate=0.5,  # [paper] 4.3
        bn_decay=0.99,  # [ours] as imagenet.py
        bn_epsilon=1e-3,  # [ours] as imagenet.py
        dtype="bfloat16",  # [ours] compute; parameters, statistics, softmax and optimizer are float32
    )
    config.normalize = dict(mean=(127.5,), std=(127.5,))  # [ours] to [-1, 1], as the published weights expect

    config.loss = dict(
        name="softmax",
        label_smoothing=0.1,  # [torchvision]
        weight_decay=2e-5,  # [torchvision] L2, without normalizations; also without the classifier's bias: [ours]
    )
    config.metrics = dict(name="single_label")  # [paper] table 1: top-1 and top-5
    config.mix = dict(
        mixup_alpha=0.2,  # [torchvision]
        cutmix_alpha=1.0,  # [torchvision]
        probability=1.0,  # [torchvision] of mixing a batch
        switch_probability=0.5,  # [torchvision] of CutMix, not mixup
    )

    config.optimizer = dict(
        name="sgd",  # [torchvision]
        learning_rate=0.5,  # [torchvision] for a batch of 1024
        momentum=0.9,  # [torchvision]
        nesterov=False,  # [torchvision]
        clip_norm=None,  # [torchvision]
    )
    config.schedule = dict(
        name="cosine",  # [torchvision]
        warmup_epochs=5.0,  # [torchvision] linear; from 0, not from a hundredth: [ours]
        final_factor=0.0,  # [torchvision]
    )
    config.step = dict(
        # torchvision's script turns 0.99998 into 1 - 0.00002 * 1024 * 32 / 600 every 32 steps, or 0.99997 a step.
        ema_decay=0.99997,  # [torchvision]
        accumulation_steps=1,  # [ours] raise it if a batch does not fit into memory
    )

    config.data = dict(
        source="tfds",
        name="imagenet2012",
        train_split="train",
        eval_split="validation",
        on_bad_image="replace",  # [ours] libjpeg warns of some of the 1.28 million images
        image_size=299,  # [paper] figure 5; torchvision trains at 176 and evaluates at 224
        channels=3,
        train_transforms=" | ".join(  # [torchvision] in this order
            (
                "random_resized_crop(min_area=0.08, kernel='bilinear', antialias=True)",  # [torchvision]
                "flip_left_right",  # [torchvision]
                # torchvision's defaults. The paper's M of 9 for a ResNet-50 is out of 10, and would be 27 here.
                "rand_augment(num_ops=2, magnitude=9, kernel='bilinear')",  # [ours]
                "random_erasing(probability=0.1, fill='gray')",  # [torchvision]
            )
        ),
        eval_transforms="resize_center_crop(resize_size=310, antialias=True)",  # [torchvision] 299 * 232 / 224
    )
    config.mesh = dict(data=-1, fsdp=1)  # [ours]
    config.checkpoint = dict(keep_latest=2, keep_best=1)  # [ours]
    return config
