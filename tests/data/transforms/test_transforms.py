"""Augmentation against PIL, golden images, and the distributions of torchvision's and TensorFlow's crops."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from golden.make_boxes import AREA, ASPECT, SHAPES, figures
from golden.make_transforms import CHAINS, photograph, transformed
from xception_flax import data
from xception_flax.data import transforms
from xception_flax.data.transforms import colors, geometry, rand_augment, resampling
from xception_flax.data.transforms.crops import SAMPLINGS
from xception_flax.text.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return cv2.resize(photograph(), (211, 140), interpolation=cv2.INTER_AREA)


def apply(chain: str, image: np.ndarray, seed: int = 0, image_size: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    for transform in transforms.parse_transforms(chain, image_size):
        image = transform(image, rng)
    return image


# All transforms ------------------------------------------------------------------------------------


def test_every_transform_has_a_golden_image():
    names = {call.partition("(")[0].strip() for chain in CHAINS for call in chain.split("|")}
    assert names == set(transforms.TRANSFORMS)


@pytest.mark.parametrize("black", [True, False], ids=["when it is parsed", "on the first image"])
def test_a_defect_of_a_transform_is_no_mistake_of_the_user(black, monkeypatch):
    """NumPy's own ValueError must keep its type, with which a command shows the traceback."""

    def broken(image, rng):
        return image if image.any() == black else image + np.zeros(5)

    monkeypatch.setitem(transforms.TRANSFORMS, "broken", broken)
    with pytest.raises(ValueError, match="could not be broadcast") as caught:
        data.load("digits", image_size=8, channels=3, train_transforms="broken", train=True, batch_size=8)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize(
    ("function", "made"),
    [
        (lambda image, rng: image / 2, r"float64 of shape \(8, 8, 3\)"),
        (lambda image, rng: image[..., 0], r"uint8 of shape \(8, 8\)"),
        (lambda image, rng: None, "None"),
    ],
)
def test_a_transform_that_makes_no_image_is_refused(function, made, monkeypatch):
    monkeypatch.setitem(transforms.TRANSFORMS, "new", function)
    with pytest.raises(UserError, match=rf"transform 'new' must make an image of uint8, \[H, W, C\], made {made}\."):
        transforms.parse_transforms("new | resize", 8)


@pytest.mark.parametrize(
    ("change", "made"), [(lambda x: x * 1.5, r"float64 of shape \(8, 8, 1\)"), (lambda x: None, "None")]
)
def test_pixels_are_never_wrapped(change, made, monkeypatch):
    """Of a transform that changes some images alone: not the black one on which a chain is tried."""
    monkeypatch.setitem(transforms.TRANSFORMS, "new", lambda image, rng: change(image) if image.any() else image)
    with pytest.raises(UserError, match=rf"data.train_transforms: a transform made {made}, expected an image of uint8"):
        data.load("digits", image_size=8, channels=1, train_transforms="new | resize", train=True, batch_size=8)


def test_a_keyword_without_a_type_is_named(monkeypatch):
    monkeypatch.setitem(transforms.TRANSFORMS, "new", lambda image, rng, *, amount=1: image)
    with pytest.raises(UserError, match=r"parameter 'amount' of \S*test_transforms\.\S+ must have a type .*, got none"):
        transforms.parse_transforms("new(amount=2)", 8)


@pytest.mark.parametrize("chain", CHAINS)
def test_golden_image(chain):
    """98 % of the values are within 2 of 255, since versions of OpenCV round differently."""
    with np.load(GOLDEN / "transforms.npz") as golden:
        difference = np.abs(transformed(chain).astype(int) - golden[chain])
    assert np.mean(difference > 2) <= 0.02


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_transform_is_a_function_of_image_and_seed(chain, channels, photo):
    """It also leaves its input unchanged, which may be a view of the whole data set."""
    image = np.dstack([photo, photo[..., 0]])[..., :channels].copy()
    image.setflags(write=False)
    first, again = (apply(chain, image, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first.dtype, first.shape) == (np.uint8, (32, 32, channels))


ADJUSTMENTS = {
    "brightness": lambda image: colors.adjust_brightness(image, 1.4),
    "contrast": lambda image: colors.adjust_contrast(image, 1.4),
    "saturation": lambda image: colors.adjust_saturation(image, 0.3),
    "sharpness": lambda image: colors.adjust_sharpness(image, 2.0),
    "hue": lambda image: colors.adjust_hue(image, 0.2),
    "posterize": lambda image: colors.posterize(image, 3),
    "solarize": lambda image: colors.solarize(image, 100),
    "autocontrast": colors.autocontrast,
    "equalize": colors.equalize,
    "jitter": lambda image: apply("color_jitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.3)", image),
}


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_colours_change_as_without_alpha_and_alpha_stays(name, photo):
    opacity = photo[::-1, ::-1, 1]
    changed = ADJUSTMENTS[name](np.dstack([photo, opacity]))
    np.testing.assert_array_equal(changed[..., :3], ADJUSTMENTS[name](photo))
    np.testing.assert_array_equal(changed[..., 3], opacity)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("kernel", resampling.KERNELS)
def test_alpha_is_scaled_as_a_channel_of_its_own(kernel, antialias, photo):
    """The colours are those of the image without alpha, where it is 0 too."""
    opacity = np.where(photo[..., 1] < 128, 0, photo[..., 1])
    scaled = resampling.resample(np.dstack([photo, opacity]), 50, 70, kernel, antialias)
    np.testing.assert_array_equal(scaled[..., :3], resampling.resample(photo, 50, 70, kernel, antialias))
    expected = resampling.resample(opacity[..., None], 50, 70, kernel, antialias)
    np.testing.assert_array_equal(scaled[..., 3:], expected)


# Which rectangle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_boxes_are_distributed_as_the_librarys_own(sampling, shape):
    """Kolmogorov-Smirnov test of 40,000 of its boxes and 20,000 of ours, for six figures; the 0.1 % level is 0.017."""
    rng, draws = np.random.default_rng(0), 20_000
    options = dict(min_area=AREA[0], max_area=AREA[1], max_aspect=ASPECT[1])
    boxes = np.array([SAMPLINGS[sampling](rng, *shape, **options) for _ in range(draws)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= shape).all()
    with np.load(GOLDEN / "boxes.npz") as golden:
        for figure, values in figures(boxes).items():
            key = f"{sampling}/{shape[0]}x{shape[1]}/{figure}"
            ours = np.searchsorted(np.sort(values), golden[f"{key}/points"], side="right") / draws
            assert np.abs(ours - golden[f"{key}/share"]).max() < 0.017, key


def test_the_two_samplings_differ():
    """The median area of torchvision's boxes is 0.42 of a photo, of TensorFlow's 0.33."""
    with np.load(GOLDEN / "boxes.npz") as golden:
        areas = {
            name: np.interp(0.5, golden[f"{name}/375x500/area/share"], golden[f"{name}/375x500/area/points"])
            for name in SAMPLINGS
        }
    assert areas["torchvision"] / (375 * 500) == pytest.approx(0.42, abs=0.01)
    assert areas["tensorflow"] / (375 * 500) == pytest.approx(0.33, abs=0.01)


def test_where_no_box_fits():
    """For a strip of 4 x 400, torchvision takes the central box of aspect 4/3, TensorFlow the whole image."""
    options = dict(min_area=0.9, max_area=1.0, max_aspect=4 / 3)
    rng = np.random.default_rng(0)
    assert SAMPLINGS["torchvision"](rng, 4, 400, **options) == (0, 197, 4, 5)
    assert SAMPLINGS["torchvision"](rng, 400, 4, **options) == (197, 0, 5, 4)
    assert SAMPLINGS["tensorflow"](rng, 4, 400, **options) == (0, 0, 4, 400)


# Size and place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", resampling.KERNELS)
@pytest.mark.parametrize("size", [(60, 60), (120, 300), (300, 400)], ids=str)
def test_antialiased_resampling_is_pils(photo, kernel, size):
    resized = resampling.resample(photo, *size, kernel, antialias=True)
    expected = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling[kernel.upper()]))
    assert np.abs(resized.astype(int) - expected).max() <= 1
    plain = resampling.resample(photo, *size, kernel).astype(int)
    if kernel == "bicubic" or min(size) < 140:  # enlarged bilinearly, both are the same
        assert np.abs(plain - expected).max() > 1


def test_resize_center_crop_is_torchvisions():
    """Resize(60) of 100 x 151 gives 60 x 90 (90.6 cut off); CenterCrop(32) starts at 14 and 29."""
    photo = np.random.default_rng(0).integers(0, 256, (100, 151, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(photo).resize((90, 60), Image.Resampling.BILINEAR))[14:46, 29:61]
    np.testing.assert_array_equal(apply("resize_center_crop(resize_size=60, antialias=True)", photo), expected)


def test_resize_center_crop_of_a_strip_is_its_middle():
    """A strip of 1 x 200,000, scaled whole, would be 60 x 12,000,000."""
    strip = np.zeros((1, 200_000, 3), np.uint8)
    strip[:, 99_000:101_000] = 255
    assert (apply("resize_center_crop(resize_size=60)", strip) == 255).all()


def test_random_crop_with_padding_shifts_by_at_most_the_padding(rng):
    image = rng.integers(1, 256, (32, 32, 3), dtype=np.uint8)
    shifts = set()
    for seed in range(400):
        crop = apply("random_crop_with_padding(padding=2)", image, seed)
        rows, columns = (np.flatnonzero(crop.any(axis)) for axis in ((1, 2), (0, 2)))
        top = -rows[0] if rows[0] else 31 - rows[-1]
        left = -columns[0] if columns[0] else 31 - columns[-1]
        shifts.add((int(top), int(left)))
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        np.testing.assert_array_equal(crop, padded[2 + top : 34 + top, 2 + left : 34 + left])
    assert shifts == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    with pytest.raises(UserError, match=r"cannot take 32 x 32 pixels of an image of 20 x 20; put a resize before"):
        geometry.random_crop_with_padding(image[:20, :20], rng, image_size=32)


# Colour --------------------------------------------------------------------------------------------

OPS = [  # ours, PIL's, largest difference of a value
    *(
        (lambda x, f=f: colors.adjust_brightness(x, f), lambda x, f=f: ImageEnhance.Brightness(x).enhance(f), 1)
        for f in (0.1, 0.73, 1.9)
    ),
    *(
        (lambda x, f=f: colors.adjust_contrast(x, f), lambda x, f=f: ImageEnhance.Contrast(x).enhance(f), 1)
        for f in (0.1, 0.73, 1.9)
    ),
    *(
        (lambda x, f=f: colors.adjust_saturation(x, f), lambda x, f=f: ImageEnhance.Color(x).enhance(f), 2)
        for f in (0.1, 0.73, 1.9)
    ),
    *(
        (lambda x, f=f: colors.adjust_sharpness(x, f), lambda x, f=f: ImageEnhance.Sharpness(x).enhance(f), 2)
        for f in (0.1, 0.73, 1.9)
    ),
    *((lambda x, b=b: colors.posterize(x, b), lambda x, b=b: ImageOps.posterize(x, b), 0) for b in (1, 4, 8)),
    *((lambda x, t=t: colors.solarize(x, t), lambda x, t=t: ImageOps.solarize(x, t), 0) for t in (0, 76.5, 255)),
    (colors.autocontrast, ImageOps.autocontrast, 0),
    (colors.equalize, ImageOps.equalize, 0),
]


@pytest.mark.parametrize("i", range(len(OPS)))
def test_colour_operation_is_pils(photo, i):
    ours, pils, tolerance = OPS[i]
    dark = (photo // 3 + 20).astype(np.uint8)  # so that there is contrast to stretch
    for image in (photo, dark, np.full((9, 9, 3), 77, np.uint8)):
        expected = np.asarray(pils(Image.fromarray(image))).astype(int)
        assert np.abs(ours(image) - expected).max() <= tolerance
        gray = image[..., :1]
        expected = np.asarray(pils(Image.fromarray(gray[..., 0]))).astype(int)
        assert np.abs(ours(gray)[..., 0] - expected).max() <= tolerance


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.25, 0.4])
def test_hue_is_pils(photo, turn):
    """torchvision uses PIL's 8-bit HSV. Both round in it; 99 % of our values are within 6 of PIL's."""
    hsv = np.array(Image.fromarray(photo).convert("HSV"))
    hsv[..., 0] += np.uint8(int(turn * 255) % 256)
    expected = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")).astype(int)
    difference = np.abs(colors.adjust_hue(photo, turn) - expected)
    assert np.mean(difference > 6) < 0.01
    assert difference.mean() < 2


def test_color_jitter_draws_factors_and_order(monkeypatch, photo):
    """Uniform in [0.6, 1.4], [0.7, 1.3], [0, 2.5] and +-0.1; all 24 orders."""
    calls: list[tuple[str, float]] = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(colors, f"adjust_{name}", lambda x, f, name=name: (calls.append((name, f)), x)[1])
    chain = "color_jitter(brightness=0.4, contrast=0.3, saturation=1.5, hue=0.1)"
    (transform,) = transforms.parse_transforms(chain, 8)
    calls.clear()
    rng = np.random.default_rng(0)
    for _ in range(1000):
        transform(photo, rng)
    orders = {tuple(name for name, _ in calls[i : i + 4]) for i in range(0, len(calls), 4)}
    assert len(orders) == 24
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.0, 2.5),
        ("hue", -0.1, 0.1),
    ):
        factors = np.array([f for n, f in calls if n == name])
        assert low <= factors.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < factors.max() <= high
        assert factors.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


# RandAugment ---------------------------------------------------------------------------------------


def pil_affine(level: float, kind: str, size: tuple[int, int]) -> tuple[float, ...]:
    return {
        "shear_x": (1, level, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, level, 1, 0),
        "translate_x": (1, 0, -int(level * size[0]), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -int(level * size[1])),
    }[kind]


@pytest.mark.parametrize("kernel", ["nearest", "bilinear"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_geometric_operation_is_pils(photo, name, sign, kernel):
    """98 % of the values are within 3: OpenCV's fixed point sometimes takes another neighbour, mostly at the edge."""
    operation = rand_augment.OPERATIONS[name]
    level = sign * operation.level(0.7)
    flag = {"nearest": rand_augment.NEAREST, "bilinear": rand_augment.BILINEAR}[kernel]
    image, resampling_ = Image.fromarray(photo), Image.Resampling[kernel.upper()]
    if name == "rotate":
        expected = image.rotate(level, resampling_)
    else:
        expected = image.transform(image.size, Image.Transform.AFFINE, pil_affine(level, name, image.size), resampling_)
    difference = np.abs(operation.function(photo, level, flag).astype(int) - np.asarray(expected))
    assert np.mean(difference > 3) < 0.02


def test_levels_are_torchvisions():
    """`RandAugment._augmentation_space` at magnitudes 9 and 30 of 31 bins, for an image of 331 pixels."""
    levels = {m: {n: o.level(m / 30) for n, o in rand_augment.OPERATIONS.items()} for m in (9, 30)}
    scale = {"translate_x": 331, "translate_y": 331}
    expected = {
        9: {"shear_x": 0.09, "translate_y": 45, "rotate": 9, "color": 0.27, "posterize": 7, "solarize": 178.5},
        30: {"shear_x": 0.3, "translate_y": 150, "rotate": 30, "color": 0.9, "posterize": 4, "solarize": 0},
    }
    for magnitude, values in expected.items():
        for name, value in values.items():
            assert levels[magnitude][name] * scale.get(name, 1) == pytest.approx(value), (magnitude, name)
    assert len(rand_augment.OPERATIONS) == 14
    signed = {name for name, operation in rand_augment.OPERATIONS.items() if operation.signed}
    assert signed == {
        *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
        *("brightness", "color", "contrast", "sharpness"),
    }


def test_rand_augment_draws_each_operation_as_often(monkeypatch, photo):
    """Each of 14 operations comes 429 +- 100 times in 6,000 (5 standard deviations), with either sign."""
    seen = {name: [] for name in rand_augment.OPERATIONS}
    recorders = tuple(
        operation._replace(function=lambda image, level, _, name=name: (seen[name].append(level), image)[1])
        for name, operation in rand_augment.OPERATIONS.items()
    )
    monkeypatch.setattr(rand_augment, "_OPERATIONS", recorders)
    (transform,) = transforms.parse_transforms("rand_augment(num_ops=3)", 8)
    for levels in seen.values():
        levels.clear()
    rng = np.random.default_rng(0)
    for _ in range(2000):
        transform(photo, rng)
    assert sum(map(len, seen.values())) == 6000
    assert all(abs(len(levels) - 6000 / 14) < 100 for levels in seen.values())
    negative = [level < 0 for name, levels in seen.items() for level in levels if recorders_signed(name)]
    assert np.mean(negative) == pytest.approx(0.5, abs=0.04)
    assert not any(level < 0 for name, levels in seen.items() for level in levels if not recorders_signed(name))


def recorders_signed(name: str) -> bool:
    return rand_augment.OPERATIONS[name].signed


# Random erasing ------------------------------------------------------------------------------------


def test_random_erasing_covers_a_rectangle_of_the_promised_size():
    """2,000 images with a probability of 0.3, areas of 0.02 to 1/3, aspects up to 10/3."""
    black, areas, aspects = np.zeros((100, 120, 3), np.uint8), [], []
    (transform,) = transforms.parse_transforms("random_erasing(probability=0.3, fill='gray')", 8)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        covered = transform(black, rng)[..., 0]
        if covered.any():
            rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
            h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert (covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 128).all()
            assert np.count_nonzero(covered) == h * w
            areas.append(h * w / covered.size)
            aspects.append(math.log(h / w))
    assert len(areas) / 2000 == pytest.approx(0.3, abs=0.04)
    assert 0.019 < min(areas) < 0.03
    assert 0.31 < max(areas) < 0.34
    assert np.mean(areas) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert np.abs(aspects).max() <= math.log(10 / 3) + 0.1
    assert np.mean(aspects) == pytest.approx(0, abs=0.1)
    assert not black.any()


def test_noise_is_uniform():
    covered = apply("random_erasing(probability=1.0, min_area=0.3)", np.zeros((300, 300, 3), np.uint8), seed=1)
    values = covered[covered.any(-1)]
    assert (values.min(), values.max()) == (0, 255)
    assert values.mean() == pytest.approx(127.5, abs=2)


# Chains --------------------------------------------------------------------------------------------


def test_chains_are_parsed():
    chain = transforms.parse_transforms("random_affine(max_degrees=5, max_shift=0.1) | resize", 24)
    assert [f.func.__name__ for f in chain] == ["random_affine", "resize"]
    assert chain[0].keywords == {"max_degrees": 5, "max_shift": 0.1}
    assert chain[1].keywords == {"image_size": 24}
    assert transforms.parse_transforms("resize(image_size=7)", 24)[0].keywords == {"image_size": 7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rezise", "unknown transform 'rezise'; did you mean 'resize'"),
        ("resize(size=3)", "transform 'resize' takes no 'size'; .*image_size"),
        ("resize(", "must be written as name or name"),
        ("resize(3)", "must be written as name or name"),
        ("resize | ", "must be written as name or name"),
        ("__import__('os').system('true')", "must be written as name or name"),
    ],
)
def test_bad_chains_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        transforms.parse_transforms(text, 24)


def test_values_of_every_type_are_parsed():
    chain = "random_resized_crop(min_area=0.1, kernel='bicubic', antialias=True, sampling=\"tensorflow\") | resize"
    first, second = transforms.parse_transforms(chain, 24)
    assert first.keywords == {
        "min_area": 0.1, "kernel": "bicubic", "antialias": True, "sampling": "tensorflow", "image_size": 24
    }  # fmt: skip
    assert second.keywords == {"image_size": 24}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("center_crop(fraction='big')", "transform 'center_crop': fraction must be a number, got 'big'"),
        ("center_crop(fraction=True)", "fraction must be a number, got True"),
        ("resize(antialias=1)", "antialias must be True or False, got 1"),
        ("resize(kernel='linear')", "unknown kernel 'linear'; did you mean 'bilinear'"),
        ("rand_augment(num_ops=2.5)", "num_ops must be an integer, got 2.5"),
        ("center_crop(fraction=big)", "transform 'center_crop': fraction must be a number, got 'big'"),
        ("resize(kernel=7)", "unknown kernel '7'; there are: bicubic, bilinear"),
        ("rand_augment(magnitude={[]: 1})", "magnitude must be an integer, got '{\\[\\]: 1}'"),
        ('resize(kernel="bilinear", kernel="bicubic")', "gives a keyword twice"),
        ("rand_augment(magnitude=31)", r"magnitude must be in \[0, 30\], got 31"),
        ("random_resized_crop(min_area=-0.1)", r"min_area must be in \(0, 1\], got -0.1"),
        ("random_resized_crop(min_area=0.5, max_area=0.2)", r"min_area must be in \(0, 0.2\], got 0.5"),
        ("random_resized_crop(max_aspect=0.75)", r"max_aspect must be in \[1, 1,000\], got 0.75"),
        ("random_resized_crop(sampling='tf')", "unknown sampling 'tf'; there are: tensorflow, torchvision"),
        ("resize_center_crop", r"transform 'resize_center_crop' needs 'resize_size': resize_center_crop\(resize"),
        ("resize_center_crop(resize_size=20)", r"resize_size must be in \[24, 10,000\], got 20"),
        ("color_jitter(hue=0.6)", r"hue must be in \[0, 0.5\], got 0.6"),
        ("color_jitter(hue=1e999)", "hue must be a finite number, got inf"),
        ("random_erasing(fill='blak')", "unknown fill 'blak'; there are: gray, noise"),
        ("random_erasing(probability=1.5)", r"probability must be in \[0, 1\], got 1.5"),
        ("resize(**options)", "must be written as name or name"),
    ],
)
def test_wrong_values_are_refused_when_the_recipe_is_read(text, message):
    with pytest.raises(UserError, match=message):
        transforms.parse_transforms(text, 24)
