"""Handwritten digits: real data inside the package, one to two minutes on two CPU cores."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 64
    config.epochs = 40.0
    config.seed = 0
    config.log_every_steps = 20
    config.eval_every_epochs = 4.0
    config.checkpoint_every_epochs = 4.0
    config.model = dict(name="xception", num_classes=10, width=0.125, middle_repeats=2, dropout_rate=0.5, bn_decay=0.9)
    config.normalize = dict(mean=(127.5,), std=(127.5,))
    config.loss = dict(name="softmax", label_smoothing=0.0, weight_decay=0.0)
    config.metrics = dict(name="single_label")
    config.optimizer = dict(name="adamw", learning_rate=0.003, decoupled_weight_decay=0.05)
    config.schedule = dict(name="cosine", warmup_epochs=2.0)
    config.step = dict(ema_decay=0.99)
    config.data = dict(
        source="digits",
        image_size=48,
        channels=1,
        train_split="train",
        eval_split="validation",
        train_transforms="resize | random_affine(max_degrees=12, max_shift=0.08, max_scale=1.12)",
        eval_transforms="resize",
    )
    return config
