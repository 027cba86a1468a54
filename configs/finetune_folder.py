"""Xception, fine-tuned on a folder of your own images from the weights that Keras publishes.

    python train.py --config configs/finetune_folder.py:FOLDER --workdir WORKDIR
    xception-flax predict WORKDIR IMAGE...

    ... --config.init.weights=SOURCE            other weights: a file of Keras or timm, a workdir, timm:NAME
    ... --config.optimizer.backbone_factor=0    train only the classifier, in half of the time

Data: FOLDER/CLASS/*.jpg; a tenth of it, by a hash of the files' names, is held out as 'val'. Or
FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg, the same classes in both. Or a table of images and labels
in place of FOLDER: labels.csv, .parquet, .jsonl (docs/data.md).
Weights: fetched into ~/.keras/models by the first run. Weights of timm's
legacy_xception also need --config.model.padding=SYMMETRIC --config.model.bn_epsilon=1e-5.
Hardware: one GPU; a CPU for some hundred images.
Measured by us, from the published weights on 200 images of Fashion-MNIST at 72 px, five seeds (docs/fine-tuning.md):

    this recipe 73.8 %, with backbone_factor=0 70.1 %
    backbone_factor=1, bn_frozen=False, bn_decay=0.9: 79.8 %; the same from random weights: 73.6 %

On small data: pretrained by configs/folder.py on
four photographs (width 0.25, two middle blocks, 64 px), fine-tuned to tell crops of four others apart (per class, 12
from the left halves to train on, 60 from the right halves to evaluate), 40 epochs, batches of 16, one seed:

    this recipe 77.5 %, with backbone_factor=0 73.8 %, 0.1 84.6 %, 1 95.4 %
    backbone_factor=1, bn_frozen=False, bn_decay=0.9: 97.1 %; the same from random weights: 95.4 %

So weights that were pretrained on little data need backbone_factor=1.

Tags: [Keras] for the guide 'Transfer learning & fine-tuning' (keras.io/guides/transfer_learning), which
fine-tunes this network on cats and dogs, in two runs instead of one; [ours] for the rest.
"""

from ml_collections import ConfigDict

from xception_flax import data


def get_config(folder: str) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # [ours]
    config.batch_size = 32  # [ours] the guide: 64
    config.epochs = 20.0  # [ours]
    config.log_every_steps = 20  # [ours]

    config.init = dict(weights="keras")  # [Keras] ImageNet's
    config.model = dict(
        name="xception",  # [Keras]
        num_classes=-1,  # as many as there are
        dropout_rate=0.2,  # [Keras]
        bn_frozen=True,  # [Keras] normalization stays in inference mode, even when all layers are trained
    )
    config.normalize = dict(mean=(127.5,), std=(127.5,))  # [Keras] to [-1, 1], as the weights expect
    config.loss = dict(name="softmax", label_smoothing=0.1)  # [ours]
    config.metrics = dict(name="single_label")  # [ours]
    config.optimizer = dict(
        name="adamw",  # [Keras] Adam
        learning_rate=1e-3,  # [Keras] of the classifier; Adam's default
        backbone_factor=0.01,  # [Keras] 1e-5 for the other layers; both in one run is [ours]
    )
    config.schedule = dict(name="cosine", warmup_epochs=1.0)  # [ours]
    config.step = dict(ema_decay=0.99)  # [ours]
    config.data = dict(
        **data.source_at(folder),
        train_split="train",
        eval_split="val",
        image_size=299,  # [ours] as the weights were trained; the guide: 150
        train_transforms="random_resized_crop(min_area=0.25) | flip_left_right",  # [ours]; the flip: [Keras]
        eval_transforms="center_crop(fraction=0.875)",  # [ours]
    )
    return config
