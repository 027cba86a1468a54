"""Compares a network, stage by stage, with the library that its weights are from, on the same images."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from xception_flax import models
from xception_flax.text.errors import UserError
from xception_flax.text.sizes import sides
from xception_flax.weights import timm, writing
from xception_flax.weights.pretrained import Pretrained

MAX_DIFFERENCE = 1e-4  # of the spread; float32 alone makes about 1e-5 of deep networks
IMAGES = 4
IMAGE_SIZE = 299  # pixels a side, where the source does not say

# Keras' layers whose outputs are our stages.
_XCEPTION_STAGES = (
    "block1_conv2_act",
    "block3_sepconv1_act",
    "block4_sepconv1_act",
    "block13_sepconv1_act",
    "block14_sepconv2_act",
)


class Verification(NamedTuple):
    """How far a network is from another library's.

    Attributes:
      against: that library's name and version.
      differences: of each stage by name, in the order of the computation: the largest difference of two values, as a
        share of what an image changes.
    """

    against: str
    differences: dict[str, float]

    @property
    def first(self) -> str | None:
        """The first stage that differs by more than `MAX_DIFFERENCE`; None where all agree. NaN does not agree."""
        return next((stage for stage, value in self.differences.items() if not value <= MAX_DIFFERENCE), None)


def verify(pretrained: Pretrained, images: np.ndarray | None = None) -> Verification:
    """Builds the library's own network with these weights, and runs both.

    Args:
      pretrained: the network; its `framework` says which library.
      images: `[N, H, W, C]` as the network takes them, N at least 2; None for `random_images`.

    Raises:
      UserError: the library is not installed, or does not have this network.
    """
    images = random_images(pretrained) if images is None else images
    if pretrained.framework == "keras":
        library, theirs = _of_keras(pretrained, images)
    elif pretrained.framework in ("timm", "deeplab"):  # timm has DeepLab's networks
        library, theirs = _of_timm(pretrained, images)
    else:
        raise UserError(
            f"these weights are from {pretrained.framework}, which nothing compares with; expected a file of Keras, "
            "timm, torchvision or DeepLab."
        )
    network = models.create_model(**pretrained.model)
    ours = jax.jit(lambda v, x: network.apply(v, x, train=False, method="endpoints"))(pretrained.variables, images)
    return Verification(library, {stage: difference(np.asarray(ours[stage]), theirs[stage]) for stage in theirs})


def random_images(pretrained: Pretrained, seed: int = 0) -> np.ndarray:
    """Returns `[IMAGES, H, W, C]` in [-1, 1]: squares of random colours, of another size in each image."""
    rng = np.random.default_rng(seed)
    height, width = sides(pretrained.image_size or IMAGE_SIZE)
    images = []
    for i in range(IMAGES):
        side = 4 << i
        squares = rng.uniform(-1, 1, (-(-height // side), -(-width // side), pretrained.channels))
        images.append(squares.repeat(side, axis=0).repeat(side, axis=1)[:height, :width])
    return np.stack(images).astype(np.float32)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest difference as a share of the spread over images; infinite where the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    spread = np.ptp(theirs, axis=0).max() or np.abs(theirs).max() or 1.0
    return float(np.abs(ours - theirs).max() / spread)


def reason(pretrained: Pretrained, stage: str) -> str:
    """Says what may make the networks differ from this stage on."""
    theirs: Mapping[str, Any] = {"name": pretrained.model["name"]}
    if pretrained.framework != "keras":
        theirs = timm.NETWORKS[str(writing.architecture_of(pretrained))]
    if known := writing.differences(pretrained, theirs, "the library"):
        return known[0]
    return {
        "stage1": "the order of the channels, the range of the images, or the epsilon of the normalization",
        "pooled": "how the last features are averaged",
        "logits": "the classifier: its arrays, or layers that only one of them has",
    }.get(stage, "the padding of strided layers or pooling, or a layer that only one of them has")


def _of_keras(pretrained: Pretrained, images: np.ndarray) -> tuple[str, dict[str, np.ndarray]]:
    """Returns Keras' version, and its outputs by our names. Widths and heights are those of the images."""
    model = writing.keras_model(pretrained._replace(image_size=images.shape[1:3]))
    import keras

    if pretrained.model["name"] == "xception":
        stages = [model.get_layer(name).output for name in _XCEPTION_STAGES]
    else:
        pools = [layer for layer in model.layers if isinstance(layer, keras.layers.MaxPooling2D)]
        stages = [pools[0].input, pools[1].input, *(model.get_layer(f"mixed{i}").output for i in (2, 7, 10))]
    outputs = {f"stage{i}": stage for i, stage in enumerate(stages, start=1)}
    pooling = [layer for layer in model.layers if isinstance(layer, keras.layers.GlobalAveragePooling2D)]
    outputs["pooled"] = pooling[-1].output
    if pretrained.model["num_classes"]:
        model.layers[-1].activation = keras.activations.linear
        outputs["logits"] = model.output
    with jax.numpy_rank_promotion("allow"):  # as Keras' layers do
        found = keras.Model(model.input, outputs).predict_on_batch(images)
    return f"Keras {keras.__version__}", {name: np.asarray(found[name]) for name in outputs}


def _of_timm(pretrained: Pretrained, images: np.ndarray) -> tuple[str, dict[str, np.ndarray]]:
    """Returns timm's version, and its outputs by our names."""
    if (architecture := writing.architecture_of(pretrained)) is None:
        raise UserError(f"timm has no {pretrained.model['name']} of these widths and depths; nothing was compared.")
    try:
        import timm as library
        import torch
    except ImportError as error:
        raise UserError(f"timm computes what is compared, and cannot be imported: {error}; pip install timm") from None
    classes = pretrained.model["num_classes"]
    options = {"aux_logits": True} if pretrained.model.get("auxiliary") else {}
    model = library.create_model(architecture, num_classes=classes, in_chans=pretrained.channels, **options).eval()
    state = {name: torch.tensor(array) for name, array in timm.to_timm(pretrained.variables).items()}
    missing, superfluous = model.load_state_dict(state, strict=False)
    if left := superfluous + [name for name in missing if not name.endswith("num_batches_tracked")]:
        raise UserError(f"timm's {architecture} has other arrays: {', '.join(left[:5])}; nothing was compared.")
    model.aux_logits = False  # in Inception V3; what it computes in evaluation is the classifier's alone
    with torch.no_grad():
        # The last features are not the last stage: networks with pre-activation have a ReLU between them.
        features, stages = model.forward_intermediates(torch.tensor(images).permute(0, 3, 1, 2))
        outputs = {f"stage{i}": stage.permute(0, 2, 3, 1).numpy() for i, stage in enumerate(stages, start=1)}
        outputs["pooled"] = model.forward_head(features, pre_logits=True).numpy()
        if classes:
            outputs["logits"] = model.forward_head(features).numpy()
    return f"timm {library.__version__}", outputs
