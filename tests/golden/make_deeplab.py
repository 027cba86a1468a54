"""Writes deeplab.tar.xz: narrow Xceptions of DeepLab in checkpoints of TensorFlow, with their features and logits.

    git clone --depth 1 https://github.com/tensorflow/models /tmp/models
    python3 -m venv /tmp/tfenv && /tmp/tfenv/bin/pip install tensorflow-cpu tf_slim tf_keras
    TF_USE_LEGACY_KERAS=1 /tmp/tfenv/bin/python tests/golden/make_deeplab.py /tmp/models/research

The one that is there is of tensorflow 2.21.0, tf_slim 1.1.0 and the code of DeepLab's `core/xception.py`, which runs as
it is; none of it is here. Its imports of TensorFlow 1 get what took their place, and its numbers of channels are
multiplied by `WIDTHS`. Weights have 8 significant bits, so that they compress.

`xception_65/` and `xception_71/` are for classification, with slots of an optimizer in the former. `xception_41/` is of
segmentation: with layers of the names of DeepLab's decoder and averages of the weights, and without classifier.
"""

import importlib
import io
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import tensorflow
import tf_slim as slim
from seeded import disturbed, draw, structured_images
from tf_keras.src import legacy_tf_layers
from tf_slim.nets import resnet_utils

tf = tensorflow.compat.v1
# Where TensorFlow looks for the layers that tf_slim is built on; tf_keras has moved them.
for part in ("base", "convolutional", "core", "normalization", "pooling"):
    moved = importlib.import_module(f"tf_keras.src.legacy_tf_layers.{part}")
    sys.modules[f"tf_keras.legacy_tf_layers.{part}"] = moved
sys.modules["tf_keras.legacy_tf_layers"] = legacy_tf_layers
CLASSES = 7
# Xception 71 is wider, since its blocks without stride must change the number of channels, as they do at full width.
WIDTHS = {"xception_41": 0.02, "xception_65": 0.02, "xception_71": 0.047}
width = 1.0  # of the network that is being made


def scaled(channels: int) -> int:
    return max(8, 8 * int(channels * width / 8 + 0.5))


def deeplab(research: str) -> ModuleType:
    """DeepLab's module, with TensorFlow 2 in place of what it imports, and narrow."""
    modules = {
        "tensorflow": tf,
        "tensorflow.contrib": SimpleNamespace(slim=slim),
        "tensorflow.contrib.slim": slim,
        "tensorflow.contrib.slim.nets": SimpleNamespace(resnet_utils=resnet_utils),
        "deeplab.core.utils": SimpleNamespace(get_batch_norm_fn=lambda method: slim.batch_norm),
        "nets.mobilenet": SimpleNamespace(conv_blocks=None),
    }
    kept = {name: sys.modules.get(name) for name in modules}
    sys.modules |= modules
    sys.path.insert(0, research)
    deeplab_core = ModuleType("deeplab.core")
    deeplab_core.__path__ = [f"{research}/deeplab/core"]
    deeplab_core.utils = modules["deeplab.core.utils"]
    sys.modules["deeplab"], sys.modules["deeplab.core"] = ModuleType("deeplab"), deeplab_core
    xception = importlib.import_module("deeplab.core.xception")
    sys.modules |= {name: module for name, module in kept.items() if module is not None}
    block = xception.xception_block
    xception.xception_block = lambda scope, depth_list, **rest: block(scope, [scaled(d) for d in depth_list], **rest)
    xception.resnet_utils = SimpleNamespace(
        conv2d_same=lambda net, channels, *rest, **more: resnet_utils.conv2d_same(net, scaled(channels), *rest, **more)
    )
    return xception


def eight_bits(array: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, in float32."""
    return ((array.astype("<f4").view("<u4") + 0x8000) & 0xFFFF0000).view("<f4")


def load(session: object, values: dict) -> None:
    """Gives variables their values, all in one run: each run of its own would prune the graph anew."""
    places = {variable.initializer.inputs[1]: value for variable, value in values.items()}
    session.run([variable.initializer for variable in values], places)


def fill(variables: list, session: object) -> None:
    kinds = {"gamma": "scale", "beta": "bias", "biases": "bias", "moving_mean": "mean", "moving_variance": "var"}
    values = {}
    for variable in variables:
        name, shape = variable.op.name, variable.shape.as_list()
        kind = kinds.get(name.rpartition("/")[2], "kernel")
        if kind not in ("mean", "var"):  # these are calibrated later
            fan_in = int(np.prod(shape[:2] if "depthwise_weights" in name else shape[:-1]))
            values[variable] = eight_bits(draw(name, kind, shape, fan_in))
    load(session, values)


def network(xception: ModuleType, name: str, images: object, classes: int, **options: object) -> tuple:
    with slim.arg_scope(xception.xception_arg_scope(batch_norm_decay=0.0)):
        return getattr(xception, name)(images, num_classes=classes, **options)


def heads(features: object) -> None:
    """Layers of the names of DeepLab's decoder, which nothing here computes with."""
    net = slim.conv2d(features, 8, 1, scope="aspp0")
    slim.conv2d(features, 8, 1, scope="image_pooling")
    net = slim.conv2d(net, 8, 1, scope="concat_projection")
    net = slim.separable_conv2d(net, None, 3, 1, scope="decoder/decoder_conv0_depthwise")
    slim.conv2d(net, 5, 1, activation_fn=None, scope="logits/semantic")


def make(xception: ModuleType, name: str, folder: Path, images: np.ndarray, segmentation: bool, slots: bool) -> None:
    golden = {}
    classes = 0 if segmentation else CLASSES
    with tf.Graph().as_default(), tf.Session() as session:
        tf.train.create_global_step()
        placeholder = tf.placeholder(tf.float32, (None, *images.shape[1:]))
        network(xception, name, placeholder, classes, is_training=True)
        calibration = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        logits, points = network(xception, name, placeholder, classes, is_training=False, reuse=True)
        if segmentation:
            heads(points["global_pool"])
        variables = [v for v in tf.global_variables() if v.op.name != "global_step"]
        saved = [*variables, tf.train.get_global_step()]
        if slots:
            optimizer = tf.train.MomentumOptimizer(0.1, 0.9)
            optimizer.apply_gradients([(0.5 * v, v) for v in tf.trainable_variables()])
            saved += optimizer.variables()
        if segmentation:
            average = tf.train.ExponentialMovingAverage(0.9)
            with tf.control_dependencies(None):
                average.apply(tf.trainable_variables())
            shadows = {v: average.average(v) for v in tf.trainable_variables()}
            saved += shadows.values()
        session.run(tf.global_variables_initializer())
        fill(variables, session)
        session.run(calibration, {placeholder: images})
        statistics = [v for v in variables if v.op.name.endswith(("/moving_mean", "/moving_variance"))]
        kinds = ["var" if v.op.name.endswith("/moving_variance") else "mean" for v in statistics]
        calibrated = zip(statistics, kinds, session.run(statistics), strict=True)
        load(session, {v: eight_bits(disturbed(v.op.name, kind, value)) for v, kind, value in calibrated})
        fetched = {"pooled": points["global_pool"]} | ({} if segmentation else {"logits": logits})
        for key, value in session.run(fetched, {placeholder: images}).items():
            golden[key] = value[:, 0, 0]
        if segmentation:
            # The weights themselves are changed: only their averages give the golden features.
            values = session.run(list(shadows))
            load(session, dict(zip(shadows.values(), values, strict=True)))
            load(session, {v: eight_bits(value * 0.5) for v, value in zip(shadows, values, strict=True)})
        folder.mkdir()
        tf.train.Saver(saved).save(session, str(folder / "model.ckpt"), write_meta_graph=False)
    np.savez(folder / "golden.npz", **golden)


def main(research: str) -> None:
    global width
    xception = deeplab(research)
    images = structured_images(3, 64, 75)
    with tempfile.TemporaryDirectory() as scratch:
        for name in WIDTHS:
            width = WIDTHS[name]
            make(xception, name, Path(scratch, name), images, name == "xception_41", name == "xception_65")
        with tarfile.open(Path(__file__).with_name("deeplab.tar.xz"), "w:xz", preset=9) as archive:
            for path in sorted(Path(scratch).rglob("*.*")):
                member = tarfile.TarInfo(str(path.relative_to(scratch)))
                member.size = path.stat().st_size
                archive.addfile(member, io.BytesIO(path.read_bytes()))


if __name__ == "__main__":
    tf.disable_eager_execution()
    main(*sys.argv[1:])
