"""Xception on JFT as the paper trained it: many labels an image (section 4, table 2).

    python train.py --config configs/jft.py --workdir WORKDIR --config.data.name=NAME --config.data.data_dir=DIR
    python train.py --config configs/jft.py:fc --workdir WORKDIR ...     with the two 4096-wide layers

Data: JFT (350 million images, 17,000 classes) and FastEval14k are private to Google. Use any TFDS data set
with a sequence of class labels (`data.label_key` names the feature), or arrays of an .npz file:

    --config.data.source=arrays --config.data.path=FILE.npz --config.model.num_classes=N

Hardware: any number of devices that divides the batch; the paper had 60 NVIDIA K80 for over a month.
Expected (paper, table 2, MAP@100 on FastEval14k): 6.70 without, 6.78 with the fully connected layers.
Measured by us: not yet run. Figures on other data do not compare with the paper's.

Tags as in imagenet.py: [paper], [Inception V3], [ours].
"""

from ml_collections import ConfigDict

from xception_flax import UserError


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "fc"):
        raise UserError(f"the argument must be 'fc' or nothing, got {variant!r}.")
    config = ConfigDict()
    config.seed = 0  # [ours]
    config.batch_size = 1536  # [ours] not in the paper
    config.epochs = 10.0  # [ours] the paper trained for a month, without convergence
    config.log_every_steps = 100  # [ours]
    config.eval_every_epochs = 0.02  # [ours] every 7 million images of JFT
    config.checkpoint_every_epochs = 0.02  # [ours]

    config.model = dict(
        name="xception",
        num_classes=17_000,  # [paper] 4.1
        dropout_rate=0.0,  # [paper] 4.3: none on JFT
        fc_layers=(4096, 4096) if variant == "fc" else (),  # [paper] table 2; a ReLU after each is [ours]
        bn_decay=0.99,  # [ours]
        bn_epsilon=1e-3,  # [ours]
        dtype="bfloat16",  # [ours]
    )
    config.normalize = dict(mean=(127.5,), std=(127.5,))  # [ours]
    config.loss = dict(
        name="sigmoid",  # [paper] 4.2: 'logistic regression', several labels an image
        weight_decay=1e-5,  # [paper] 4.3
    )
    config.metrics = dict(
        name="multi_label",
        k=100,  # [paper] 4.1: MAP over the top-100 guesses
        class_weights=None,  # [paper] weights classes by how common they are; its weights are private
    )
    config.optimizer = dict(
        name="rmsprop",  # [paper] 4.2
        learning_rate=0.001,  # [paper] 4.2
        momentum=0.9,  # [paper] 4.2
        decay=0.9,  # [Inception V3] section 8
        epsilon=1.0,  # [Inception V3] section 8
    )
    config.schedule = dict(
        name="exponential",
        decay_rate=0.9,  # [paper] 4.2
        every_images=3_000_000,  # [paper] 4.2: samples, not steps
        staircase=True,  # [ours]
    )
    config.step = dict(ema_decay=0.9999)  # [paper] 4.2: Polyak averaging; its decay is [ours]
    config.data = dict(
        source="tfds",
        name=None,  # to be given
        train_split="train",
        eval_split="validation",
        image_size=299,  # [paper] figure 5
        train_transforms="random_resized_crop(min_area=0.08) | flip_left_right",  # [ours]
        eval_transforms="center_crop(fraction=0.875)",  # [ours]
    )
    config.mesh = dict(data=-1, fsdp=1)  # [ours] synchronous; the paper trained asynchronously on JFT (4.4)
    config.checkpoint = dict(keep_latest=2, keep_best=1)  # [ours]
    return config
