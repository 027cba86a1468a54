"""The object from Python: what it computes is what the network and Keras compute, whatever images come as."""

import collections
import importlib.resources
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import numpy as np
import PIL.Image
import pytest

import xception_flax
from golden.seeded import structured_images
from tests.weights.test_writing import random_network
from xception_flax import ops
from xception_flax.inference import predictor, preprocessing
from xception_flax.text.errors import UserError
from xception_flax.weights import writing
from xception_flax.weights.word import told

NARROW = dict(name="xception", num_classes=4, width=0.02, middle_repeats=0)


@pytest.fixture(autouse=True, scope="module")
def keras_promotes_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Eleven images of three sizes, one of them gray."""
    folder, paths = tmp_path_factory.mktemp("photos"), []
    for i, image in enumerate(structured_images(11, 120, 96)):
        pixels = np.uint8((image + 1) * 127.5)[: 80 + 20 * (i % 3)]
        paths.append(folder / f"{i:02}.png")
        PIL.Image.fromarray(pixels[..., 0] if i == 5 else pixels).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def network():
    return random_network(**NARROW)


@pytest.fixture(scope="module")
def loaded(network, tmp_path_factory) -> predictor.Predictor:
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    writing.write(network, path)
    return xception_flax.load(path, batch_size=4)


def test_it_computes_what_the_network_does(network, loaded, photos):
    """Preprocessing as the source says, then the network, then its activation; any number of images, in order."""
    assert loaded.preprocessing == preprocessing.Preprocessing(
        71, 3, "center_crop(fraction=0.9, kernel=bicubic)", (0.0,), (255.0,)
    )
    images = np.stack([loaded.preprocessing.prepare(path) for path in photos])
    assert images.dtype == np.uint8
    outputs = xception_flax.create_model(**NARROW).apply(
        network.variables, images.astype(np.float32) / 255, train=False, method="endpoints"
    )
    logits = np.asarray(outputs["logits"])
    np.testing.assert_allclose(loaded.predict(photos), 1 / (1 + np.exp(-logits)), atol=1e-6)
    np.testing.assert_allclose(loaded.embed(photos), outputs["pooled"], atol=1e-6)
    found = loaded.endpoints(photos)
    assert found.keys() == outputs.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, outputs[name], atol=1e-5, err_msg=name)
    assert (loaded.class_names, loaded.notes) == (network.class_names, ())
    assert loaded.batch_size == jax.device_count() == 8


def test_images_of_every_kind(loaded, photos):
    """A path, its text, the content, PIL's image, pixels of any library: the same image, the same result."""
    path = photos[0]
    with PIL.Image.open(path) as image:
        kinds = [path, str(path), path.read_bytes(), image, np.asarray(image), image.convert("RGBA")]
        kinds.append(jnp.asarray(np.asarray(image)))
        expected = loaded.predict(path)
        assert expected.shape == (1, 4)
        for kind in kinds:
            np.testing.assert_array_equal(loaded.predict(kind), expected)
        for several in (kinds, collections.deque(kinds)):
            np.testing.assert_array_equal(loaded.predict(several), np.repeat(expected, len(kinds), axis=0))
        batch = np.stack([np.asarray(image)] * 3)
    for array in (batch, jnp.asarray(batch)):
        np.testing.assert_array_equal(loaded.predict(array), np.repeat(expected, 3, axis=0))


def test_how_the_forward_pass_is_compiled(network, one_device):
    """With XLA's own options for small images; 8 at a time on CPUs, unless told otherwise."""
    small = predictor.from_pretrained(network, one_device)
    assert (small.compiler_options, small.batch_size) == (None, 8)
    large = predictor.from_pretrained(told(network, image_size=128), one_device, batch_size=3)
    assert (large.compiler_options, large.batch_size) == (ops.compiler_options("cpu", 128, 128), 3)
    assert large.compiler_options is not None


def test_mistakes_are_named(loaded, photos, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for images, message in [
        ([*photos, tmp_path / "text.png"], rf"^{tmp_path}/text\.png: the image cannot be decoded"),
        ([tmp_path / "none.png"], r"none\.png: No such file or directory\."),
        ([np.zeros((4, 4, 3))], r"^image 0: an image must be uint8 \[H, W\] or \[H, W, C\], got float64"),
        ([3], r"an image must be a path, bytes, an array or an image of PIL, got 3\."),
        ([], r"there are no images"),
    ]:
        with pytest.raises(UserError, match=message):
            loaded.predict(images)


def test_options_of_load_are_checked(whole, tmp_path):
    """A checkpoint's number may be a number; what is refused is named, and the checkpoint is not called damaged."""
    assert xception_flax.load(whole, checkpoint=157).origin["step"] == 157
    for options, message in [
        (dict(checkpoint=3), r"no checkpoint '3' in .*; take latest, best or a step of"),
        (dict(weights="last"), r"^weights must be 'raw' or 'ema', got 'last'\.$"),
        (dict(batch_size=0), r"^batch_size must be at least 1, got 0\.$"),
        (dict(batch_size=-3), r"^batch_size must be at least 1, got -3\.$"),
    ]:
        with pytest.raises(UserError, match=message):
            xception_flax.load(whole, **options)


def test_a_backbone_has_features_and_no_classes(tmp_path, photos):
    backbone = random_network(**NARROW | {"num_classes": 0})
    writing.write(backbone, tmp_path / "w.npz")
    loaded = xception_flax.load(tmp_path / "w.npz")
    assert loaded.embed(photos).shape == (11, 40)
    with pytest.raises(UserError, match="this network has no classifier"):
        loaded.predict(photos)


def test_what_a_source_does_not_say_is_assumed_and_named(network, one_device):
    """The user's word counts most, then the source's, then the library's."""
    silent = network._replace(
        framework="timm", class_names=(), image_size=None, transforms=None, normalize=None, activation="softmax"
    )
    found = predictor.from_pretrained(silent, one_device)
    # timm's default_cfgs of legacy_xception: 299 px, crop_pct 0.8975, bicubic, mean and std 0.5.
    chain = "resize_center_crop(resize_size=333, kernel=bicubic, antialias=True)"
    assert found.preprocessing == preprocessing.Preprocessing(299, 3, chain, (127.5,), (127.5,))
    assert found.notes == (
        "the source does not say, and so assumed: images of 299 x 299 pixels, resized as timm does, by "
        f"'{chain}', values in [-1, 1], classes are known by their numbers (--class-names FILE gives them names)",
    )
    assert found.class_names == ("0", "1", "2", "3")
    options = dict(image_size=71, transforms="resize", mean=(1.0, 2.0, 3.0), std=(4.0,) * 3, class_names=tuple("abcd"))
    found = predictor.from_pretrained(told(silent, **options), one_device)
    assert found.preprocessing == preprocessing.Preprocessing(71, 3, "resize", (1.0, 2.0, 3.0), (4.0,) * 3)
    assert (found.notes, found.class_names) == ((), tuple("abcd"))
    for wrong, message in [
        (dict(class_names=("a", "b")), "got 2 names of classes for 4 logits; give each a name, in a file"),
        (dict(class_names=tuple("abca")), "two classes are named 'a'; give each a name of its own"),
        (dict(mean=(1.0,)), "mean and std go together"),
        (dict(mean=(1.0, 2.0), std=(1.0, 2.0)), "mean has 2 values, and images have 3 channels"),
        (dict(mean=(1.0,), std=(0.0,)), "normalize.std"),
        (dict(mean=(0.5,), std=(0.25,)), r"std=0\.25 is for values of 0 to 1, .* give mean=127\.5 and std=63\.75\."),
        (dict(image_size=10**6), "image_size must be in"),
        (dict(transforms="resiz"), "unknown transform 'resiz'; did you mean 'resize'"),
    ]:
        with pytest.raises(UserError, match=message):
            told(silent, **wrong)


@pytest.mark.parametrize("kind", [str, Path])
def test_the_names_of_classes_may_be_a_file(network, tmp_path, kind):
    """A text is no list of letters: it is the file that the command's option of the same name takes."""
    writing.write(network, tmp_path / "w.npz")
    (tmp_path / "abcd").write_bytes("\ufeffa cat\r\n\r\nb, c\nd\ne\n".encode())
    file = kind(tmp_path / "abcd")
    assert xception_flax.load(tmp_path / "w.npz", class_names=file).class_names == ("a cat", "b, c", "d", "e")
    (tmp_path / "abcd").write_text("a,b,c,d\n")
    with pytest.raises(UserError, match=r"got 1 name of classes for 4 logits; .* \(--class-names FILE\) a line each"):
        told(network, class_names=file)
    for missing, message in [("none", "No such file"), ("no\0ne", "null byte")]:
        with pytest.raises(UserError, match=rf"the class names 'no.*ne' cannot be read: .*{message}"):
            told(network, class_names=missing)


def test_the_whole_image_as_keras_has_it(network, one_device, photos, tmp_path):
    """`image_dataset_from_directory`'s pixels, to 1e-3 of 255, which are no whole numbers."""
    found = predictor.from_pretrained(network._replace(framework="keras", transforms=None, normalize=None), one_device)
    assert found.preprocessing == preprocessing.Preprocessing(71, 3, "resize", (127.5,), (127.5,), rounded=False)
    for path in photos[:3]:
        with PIL.Image.open(path) as image:
            pixels = np.asarray(image, np.float32)
        theirs = keras.ops.image.resize(pixels, (71, 71), interpolation="bilinear", antialias=False)
        ours = found.preprocessing.prepare(path)
        assert ours.dtype == np.float32
        assert np.abs(ours - np.asarray(theirs)).max() < 0.01
        assert np.abs(ours - np.round(ours)).max() > 0.1
    silent = network._replace(framework="keras", transforms=None)
    chosen = predictor.from_pretrained(told(silent, transforms="resize(kernel=bicubic, antialias=True)"), one_device)
    assert chosen.preprocessing.prepare(photos[0]).dtype == np.uint8  # what PIL scales


def test_the_names_of_imagenet():
    """Keras', timm's and torchvision's order: the synsets' (class 0 is n01440764, 'tench'; 999 'toilet tissue')."""
    names = predictor.known_names.of(1000)
    assert len(set(names)) == 1000
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 817: "sports car", 999: "toilet tissue"}
    assert {i: names[i] for i in known} == known
    text = importlib.resources.files("xception_flax.inference").joinpath("imagenet_classes.LICENSE").read_text()
    assert "BSD 3-Clause License" in text
