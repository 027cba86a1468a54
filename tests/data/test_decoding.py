"""Decoding against Pillow's own, refused files, and bad images in a batch."""

import contextlib
import dataclasses
import io
import itertools
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks import photos
from xception_flax import data
from xception_flax.data import pipeline, sources
from xception_flax.data.decoding import MAX_PIXELS, BadImageError, decode, largest_value
from xception_flax.text.errors import UserError

PHOTO = photos.photo("chelsea.png")[:150, :200]
COLOR = Image.fromarray(PHOTO)
GRAY = COLOR.convert("L")


def encode(image: Image.Image, form: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(GRAY)
    return image


def rotated_by_exif(form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: a quarter turn
    return encode(COLOR, form, exif=exif)


def unknown_version(jpeg: bytes) -> bytes:
    """JFIF version 0.00: libjpeg warns, and no pixel changes."""
    place = jpeg.index(b"JFIF\0") + 5
    return jpeg[:place] + b"\0\0" + jpeg[place + 2 :]


JPEG = encode(COLOR, "JPEG", quality=95)
PROGRESSIVE = encode(COLOR, "JPEG", quality=95, progressive=True)
ANIMATION = dict(save_all=True, append_images=[COLOR.rotate(90), COLOR.rotate(180)], duration=100)

GOOD = {
    "JPEG": JPEG,
    "JPEG 4:4:4": encode(COLOR, "JPEG", subsampling=0),
    "JPEG progressive": PROGRESSIVE,
    "JPEG gray": encode(GRAY, "JPEG"),
    "JPEG of RGB": encode(COLOR, "JPEG", keep_rgb=True),
    "JPEG turned by EXIF": rotated_by_exif("JPEG"),
    "JPEG of one pixel": encode(COLOR.crop((0, 0, 1, 1)), "JPEG"),
    "JPEG of an unknown version": unknown_version(JPEG),
    "JPEG with bytes behind its end": JPEG + b"photo editor",
    "PNG": encode(COLOR, "PNG"),
    "PNG gray": encode(GRAY, "PNG"),
    "PNG gray with alpha": encode(with_alpha(GRAY), "PNG"),
    "PNG with alpha": encode(with_alpha(COLOR), "PNG"),
    "PNG with a palette": encode(COLOR.convert("P"), "PNG"),
    "PNG with a transparent colour": encode(COLOR.convert("P"), "PNG", transparency=3),
    "PNG of bits": encode(COLOR.convert("1"), "PNG"),
    "PNG turned by EXIF": rotated_by_exif("PNG"),
    "PNG of one pixel": encode(COLOR.crop((0, 0, 1, 1)), "PNG"),
    "PNG of 16 bits": cv2.imencode(".png", PHOTO[..., ::-1].astype(np.uint16) * 257)[1].tobytes(),
    "GIF": encode(COLOR, "GIF"),
    "GIF animated": encode(COLOR, "GIF", **ANIMATION),
    "WebP": encode(COLOR, "WEBP"),
    "WebP with alpha": encode(with_alpha(COLOR), "WEBP", lossless=True),
    "WebP animated": encode(COLOR, "WEBP", lossless=True, **ANIMATION),
    "BMP": encode(COLOR, "BMP"),
    "TIFF of CMYK": encode(COLOR.convert("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("name", GOOD)
def test_files_are_read_as_pillow_reads_them(name):
    """Bit for bit. Gray is within 1, since Pillow and OpenCV round luma differently (a JPEG stores its luma)."""
    with Image.open(io.BytesIO(GOOD[name])) as file:
        color, gray = np.asarray(file.convert("RGB")), np.asarray(file.convert("RGB").convert("L"))
    np.testing.assert_array_equal(decode(GOOD[name], 3), color)
    decoded = decode(GOOD[name], 1)
    assert (decoded.shape, decoded.dtype) == ((*color.shape[:2], 1), np.uint8)
    if name == "JPEG of RGB" or "JPEG" not in name:
        assert np.abs(decoded[..., 0].astype(int) - gray).max() <= 1
    else:
        assert np.abs(decoded[..., 0].astype(int) - gray).mean() < 1


def test_cmyk_is_read_as_pillow_reads_it():
    """Within 1: both multiply by the black channel, and round differently."""
    content = encode(COLOR.convert("CMYK"), "JPEG", quality=95)
    with Image.open(io.BytesIO(content)) as file:
        rgb = file.convert("RGB")
    expected, gray = (np.asarray(image).astype(int) for image in (rgb, rgb.convert("L")))
    assert np.abs(decode(content, 3) - expected).max() <= 1
    assert np.abs(decode(content, 1)[..., 0] - gray).max() <= 2


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_of_gray_become_the_upper_eight(form):
    """Pillow's own conversion clips at 255."""
    gray = np.asarray(GRAY)
    content = encode(Image.fromarray(gray.astype(np.uint16) * 256 + 200), form)
    np.testing.assert_array_equal(decode(content, 1)[..., 0], gray)
    np.testing.assert_array_equal(decode(content, 3), np.repeat(gray[..., None], 3, -1))


VALUES = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # all values of 12 bits
COLORS = np.stack([VALUES, VALUES[::-1], VALUES.T], -1)


# Formats with alpha, without loss.
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": dict(lossless=True, exact=True)}


def pnm(values: np.ndarray, largest: int) -> bytes:
    height, width = values.shape[:2]
    return f"P{5 if values.ndim == 2 else 6}\n{width} {height}\n{largest}\n".encode() + values.astype(">u2").tobytes()


WIDE = {
    "PNG": (encode(Image.fromarray(VALUES), "PNG"), VALUES),
    "TIFF": (encode(Image.fromarray(VALUES), "TIFF"), VALUES),
    "PGM": (pnm(VALUES, 65535), VALUES),
    "PNG of colours": (cv2.imencode(".png", COLORS[..., ::-1])[1].tobytes(), COLORS),
    "PNG of colours with alpha": (
        cv2.imencode(".png", np.dstack([COLORS[..., ::-1], np.full_like(VALUES, 65535)]))[1].tobytes(),
        COLORS,
    ),
    "TIFF of colours": (cv2.imencode(".tiff", COLORS[..., ::-1])[1].tobytes(), COLORS),
    "PPM": (pnm(COLORS, 65535), COLORS),
}


@pytest.mark.parametrize("name", WIDE)
def test_twelve_of_sixteen_bits_are_scaled_by_what_is_white(name):
    """4,095 becomes 255, which is the upper 8 of its 12 bits. Without `max_value` only 16 shades are left."""
    content, values = WIDE[name]
    values = values if values.ndim == 3 else np.repeat(values[..., None], 3, -1)
    np.testing.assert_array_equal(decode(content, 3, max_value=4095), values >> 4)
    assert np.abs(decode(content, 3).astype(int) - (values >> 8)).max() <= (name == "PPM")  # Pillow rounds it
    np.testing.assert_array_equal(decode(content, 3, max_value=65535), decode(content, 3))
    np.testing.assert_array_equal(decode(content, 3, max_value=9999), values.astype(int) * 256 // 10_000)
    assert largest_value(content) == 4095
    with pytest.raises(BadImageError, match=r"it has values up to 4,095, more than data\.max_value=4094\."):
        decode(content, 3, max_value=4094)


ALPHA = {
    **{form: (encode(with_alpha(COLOR), form, **options), COLOR) for form, options in LOSSLESS.items()},
    "PNG gray": (encode(with_alpha(GRAY), "PNG"), GRAY.convert("RGB")),
    "PNG of 16 bits": (WIDE["PNG of colours with alpha"][0], COLORS >> 8),
}


@pytest.mark.parametrize("name", ALPHA)
def test_alpha_is_kept_with_four_channels(name):
    """The colours are those of three channels, and alpha is the gray image that was written; 16 bits are opaque."""
    content, colors = ALPHA[name]
    image = decode(content, 4)
    np.testing.assert_array_equal(image[..., :3], colors)
    np.testing.assert_array_equal(image[..., :3], decode(content, 3))
    np.testing.assert_array_equal(image[..., 3], 255 if name == "PNG of 16 bits" else GRAY)


def test_alpha_of_a_palette_and_of_twelve_bits():
    """Of a palette one colour is transparent. With `max_value`, alpha of 16 bits is opaque at 65,535 all the same."""
    palette = COLOR.convert("P")
    image = decode(GOOD["PNG with a transparent colour"], 4)
    np.testing.assert_array_equal(image[..., 3], np.where(np.asarray(palette) == 3, 0, 255))
    np.testing.assert_array_equal(image[..., :3], palette.convert("RGB"))
    opacity = VALUES.T * 16 + 15
    pixels = np.dstack([COLORS[..., ::-1], opacity])
    content = cv2.imencode(".png", pixels)[1].tobytes()
    expected = np.dstack([COLORS >> 4, opacity >> 8])
    np.testing.assert_array_equal(decode(content, 4, max_value=4095), expected)
    np.testing.assert_array_equal(decode(content, 4)[..., 3], opacity >> 8)


@pytest.mark.parametrize("name", [name for name in GOOD if "alpha" not in name and "transparent" not in name])
def test_an_image_without_alpha_is_opaque(name):
    image = decode(GOOD[name], 4)
    np.testing.assert_array_equal(image[..., :3], decode(GOOD[name], 3))
    assert (image[..., 3] == 255).all()


def test_pixels_with_four_channels():
    pixels = np.dstack([np.asarray(COLOR), np.asarray(GRAY)])
    assert decode(pixels, 4) is pixels
    for image in (np.asarray(COLOR), np.asarray(GRAY)):
        np.testing.assert_array_equal(decode(image, 4), np.dstack([decode(image, 3), np.full_like(GRAY, 255)]))


def test_a_white_that_a_file_names_is_taken():
    """The header of PNM names its largest value. In a TIFF of 12 bits, white is 4,095."""
    np.testing.assert_array_equal(
        decode(pnm(VALUES, 4095), 1)[..., 0], np.round(VALUES / 4095 * 65535).astype(int) >> 8
    )
    assert np.abs(decode(pnm(COLORS, 4095), 3) - COLORS / 4095 * 255).max() <= 1
    packed = np.unpackbits(VALUES.astype(">u2").view(np.uint8).reshape(-1, 16 // 8), axis=1)[:, 4:]
    tags = [(256, 64), (257, 64), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 64), (279, 6144)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    content = struct.pack("<2sHI", b"II", 42, 8 + 6144) + np.packbits(packed).tobytes()
    content += struct.pack("<H", len(tags)) + entries + bytes(4)
    np.testing.assert_array_equal(decode(content, 1)[..., 0], VALUES >> 4)
    assert largest_value(content) == 65535


def test_of_eight_bits_there_is_nothing_to_scale():
    for name in ("JPEG", "PNG", "PNG gray with alpha", "GIF", "WebP", "BMP", "TIFF of CMYK"):
        np.testing.assert_array_equal(decode(GOOD[name], 3, max_value=4095), decode(GOOD[name], 3))
        assert largest_value(GOOD[name]) is None
    damaged = WIDE["PNG of colours"][0]
    damaged = damaged[:3000] + bytes(4) + damaged[3004:]
    for call in (largest_value, lambda content: decode(content, 3, max_value=4095)):
        with pytest.raises(BadImageError, match="cannot be decoded"):
            call(damaged)


def test_pixels_are_taken_as_they_are():
    gray = PHOTO[..., 0]
    np.testing.assert_array_equal(decode(PHOTO, 3), PHOTO)
    np.testing.assert_array_equal(decode(gray, 1), gray[..., None])
    np.testing.assert_array_equal(decode(gray, 3), np.repeat(gray[..., None], 3, -1))
    assert np.abs(decode(PHOTO, 1)[..., 0] - PHOTO @ np.array([0.299, 0.587, 0.114])).max() <= 1


def test_a_large_jpeg_may_be_decoded_small():
    """A JPEG of 400 x 300 becomes as small as both sides allow. Files of other formats are decoded whole."""
    large = photos.photo("chelsea.png")[:300, :400]
    content = encode(Image.fromarray(large), "JPEG", quality=95)
    for min_side, shape in [
        (0, (300, 400, 3)),
        (151, (300, 400, 3)),
        (150, (150, 200, 3)),
        (113, (113, 150, 3)),
        (38, (38, 50, 3)),
    ]:
        assert decode(content, 3, min_side).shape == shape
    means = decode(content, 3).reshape(150, 2, 200, 2, 3).mean((1, 3))
    difference = np.abs(decode(content, 3, 150) - means)
    assert difference.mean() < 1  # the mean of the pixels it replaces, except for 4:2:0 chroma
    assert decode(encode(COLOR, "PNG"), 3, 20).shape == (150, 200, 3)


# Phones ----------------------------------------------------------------------------------------------


def turned_by_exif(form: str, orientation: int, image: Image.Image = COLOR, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, form, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "HEIF"])
def test_images_are_turned_as_pillow_turns_them(form, orientation):
    """Bit for bit, in colours and in gray; and left as they are stored by default, but for TIFF and HEIF."""
    content = turned_by_exif(form, orientation)
    with Image.open(io.BytesIO(content)) as file:
        stored = np.asarray(file.convert("RGB"))
        seen = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    np.testing.assert_array_equal(decode(content, 3, orientation="apply"), seen)
    np.testing.assert_array_equal(decode(content, 3), stored)
    assert decode(content, 1, orientation="apply").shape == (*seen.shape[:2], 1)
    if form not in ("TIFF", "HEIF"):
        assert (stored.shape, seen.shape) == ((150, 200, 3), (200, 150, 3) if orientation > 4 else (150, 200, 3))
        assert np.array_equal(seen, stored) == (orientation == 1)
    else:
        np.testing.assert_array_equal(seen, stored)


def test_sixteen_bits_and_small_jpegs_are_turned_too():
    wide = Image.fromarray(VALUES[:, :40])
    with Image.open(io.BytesIO(turned_by_exif("PNG", 6, wide))) as file:
        seen = np.asarray(ImageOps.exif_transpose(file))
    assert seen.shape == (40, 64)
    content = turned_by_exif("PNG", 6, wide)
    np.testing.assert_array_equal(decode(content, 1, max_value=4095, orientation="apply")[..., 0], seen >> 4)
    small = decode(turned_by_exif("JPEG", 8), 3, 75, orientation="apply")
    assert small.shape == (100, 75, 3)
    np.testing.assert_array_equal(small, np.rot90(decode(turned_by_exif("JPEG", 8), 3, 75)))
    np.testing.assert_array_equal(decode(PHOTO, 3, orientation="apply"), PHOTO)  # pixels say nothing


@pytest.mark.parametrize("form", ["AVIF", "HEIF"])
def test_files_of_phones_are_read_as_pillow_reads_them(form):
    """Bit for bit, also gray and with alpha; cut anywhere they are refused."""
    for image in (COLOR, GRAY, with_alpha(COLOR)):
        content = encode(image, form)
        with Image.open(io.BytesIO(content)) as file:
            np.testing.assert_array_equal(decode(content, 3), np.asarray(file.convert("RGB")))
    content = encode(COLOR, form)
    for length in np.linspace(1, len(content) - 1, 20).astype(int):
        with pytest.raises(BadImageError):
            decode(content[:length], 3)


def test_a_run_sees_images_turned(tmp_path):
    """Worker processes too. The recipe's key has two values."""
    for split, i in itertools.product(("train", "test"), range(4)):
        path = tmp_path / split / "ab"[i % 2] / f"{i}.{('jpg', 'heic', 'avif', 'png')[i]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(turned_by_exif(("JPEG", "HEIF", "AVIF", "PNG")[i], 6))
    files = sources.folder.folder("test", data_dir=str(tmp_path))
    assert (len(files), files.unread) == (4, ())
    for orientation, num_workers in itertools.product(("ignore", "apply"), (0, 1)):
        split = load(tmp_path, train=False, batch_size=4, orientation=orientation, num_workers=num_workers)
        (batch,) = split.batches()
        for image, i in zip(batch["images"], range(4), strict=True):
            decoded = decode(files[i]["image"], 3, orientation=orientation)
            np.testing.assert_array_equal(
                image, pipeline.prepare_image(decoded, split.transforms, (32, 32, 3), 0, None, None)
            )
    with pytest.raises(
        UserError, match=r"unknown data\.orientation 'aply'; did you mean 'apply'\? There are: apply, ignore"
    ):
        load(tmp_path, train=False, orientation="aply")


def test_without_pillow_heif_its_files_are_counted_and_how_to_read_them_is_said(tmp_path):
    """In a process of its own, to which the library is not there."""
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "a.jpg").write_bytes(JPEG)
    (tmp_path / "train" / "cat" / "b.heic").write_bytes(encode(COLOR, "HEIF"))
    program = """
import sys
sys.modules["pillow_heif"] = None
from pathlib import Path
from xception_flax import data
from xception_flax.data import decoding
print(data.unread_of([data.SOURCES["folder"]("train", data_dir=sys.argv[1])]))
try:
    decoding.decode((Path(sys.argv[1]) / "train" / "cat" / "b.heic").read_bytes(), 3)
except decoding.BadImageError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    first, second = result.stdout.splitlines()
    how = "pip install pillow-heif."
    assert first == f"1 of 2 files is not read: 1 .heic (cat/b.heic). To read .heic and .heif, {how}"
    assert second.endswith(
        f"that are no JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM, AVIF. It is a HEIF: to read .heic and .heif, {how}"
    )


# What is refused -------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, in pixels of one bit."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + encode(Image.new("1", (8, 8)), "PNG")[33:]


def claiming(jpeg: bytes, width: int, height: int) -> bytes:
    place = jpeg.index(b"\xff\xc0") + 5  # SOF0: length, precision, height, width
    return jpeg[:place] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpeg[place + 4 :]


BAD = {
    "empty": (b"", "the file is empty"),
    "garbage": (b"garbage", "7 bytes that are no JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM"),
    "a text": (b"<html>404 Not Found</html>" * 50, "1,300 bytes that are no JPEG"),
    "the mark of a JPEG alone": (b"\xff\xd8\xff\xe0", r"cannot be decoded \(4 bytes\)"),
    "JPEG without an end": (JPEG[:-2], "Premature end of JPEG file"),
    "JPEG ended in the middle": (JPEG[: len(JPEG) // 2] + b"\xff\xd9", "premature end of data segment"),
    "progressive JPEG ended in the middle": (
        PROGRESSIVE[: len(PROGRESSIVE) // 2] + b"\xff\xd9",
        "premature end of data segment",
    ),
    "JPEG with a hole": (JPEG[:8000] + JPEG[8400:], "Corrupt JPEG data"),
    "JPEG, zeros from the middle": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "Premature end of JPEG file"),
    "JPEG of an unknown version, cut": (unknown_version(JPEG)[:-300], "Premature end of JPEG file"),
    "JPEG without rows": (claiming(JPEG, 200, 0), "cannot be decoded"),
    "JPEG bomb": (claiming(JPEG, 65000, 65000), "claims 65,000 x 65,000 pixels, more than the 89,478,485"),
    "PNG bomb": (png_of(20_000, 20_000), "claims .*more than .* 89,478,485"),
    "PNG a little too large": (png_of(9_460, 9_460), "claims 9,460 x 9,460 pixels"),
    "PNG with a wrong byte": (GOOD["PNG"][:3000] + b"\0\0\0\0" + GOOD["PNG"][3004:], "cannot be decoded"),
    "32 bits": (encode(Image.new("F", (9, 9)), "TIFF"), "32 bits a channel"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_refused(name, channels):
    content, message = BAD[name]
    with pytest.raises(BadImageError, match=message):
        decode(content, channels)


@pytest.mark.parametrize(
    "name",
    ["JPEG", "JPEG 4:4:4", "JPEG progressive", "JPEG gray", "PNG", "GIF", "WebP", "WebP with alpha", "BMP"],
)
def test_a_file_cut_anywhere_is_refused(name):
    """At 50 places. The last bytes of PNG and GIF are an end mark; without it all pixels are still there."""
    content = GOOD[name]
    whole = decode(content, 3)
    for length in np.linspace(1, len(content) - 1, 50).astype(int):
        try:
            cut = decode(content[:length], 3)
        except BadImageError:
            continue
        assert name in ("PNG", "GIF")
        assert length >= len(content) - 12
        np.testing.assert_array_equal(cut, whole)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.float32), r"must be uint8 \[H, W\] or \[H, W, C\], got float32 \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"has 4 channels, but data.channels is 3"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8 \(0, 4, 3\)"),
    ],
)
def test_arrays_that_are_no_image_are_refused(image, message):
    with pytest.raises(BadImageError, match=message):
        decode(image, 3)


def test_a_bomb_takes_no_memory():
    """A process refuses images that claim 1.2 and 12 GB, and takes less than 50 MB for it."""
    assert MAX_PIXELS * 3 <= 2**28
    program = f"""
import resource
from tests.data.test_decoding import BAD, decode, BadImageError
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("JPEG bomb", "PNG bomb"):
    try:
        decode(BAD[name][0], 3)
    except BadImageError:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < {50 * 1024})
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "True\nTrue\n"


# In a batch ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve images, of which 3 and 7 are bad."""
    for split, i in itertools.product(("train", "test"), range(12)):
        path = tmp_path / split / "ab"[i % 2] / f"{i:02}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes({3: BAD["JPEG ended in the middle"][0], 7: b""}.get(i, list(GOOD.values())[i]))
    return tmp_path


def load(folder: Path, **options) -> data.Split:
    return data.load("folder", data_dir=str(folder), image_size=32, **dict(batch_size=5, num_workers=0) | options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stop_names_the_file(folder, num_workers):
    (folder / "test" / "b" / "07.JPEG").unlink()
    split = load(folder, train=False, num_workers=num_workers)
    expected = (
        r"test/b/03\.JPEG: the image cannot be decoded \([\d,]+ bytes\): Corrupt JPEG data: premature end of data "
        r"segment\. Repair it, .*--config\.data\.on_bad_image=replace"
    )
    with contextlib.closing(split.batches()) as batches:
        assert next(batches)["mask"].sum() == 5  # the batch before it is not lost
        with pytest.raises(data.InputError, match=expected):
            next(batches)


def test_a_file_that_is_gone_is_named(folder, monkeypatch):
    monkeypatch.setattr(pipeline, "READ_AGAIN_SECONDS", 0.01)
    split = load(folder, train=False)
    (folder / "test" / "a" / "02.JPEG").unlink()
    with pytest.raises(data.InputError, match=r"the data cannot be read: .*No such file.*a/02\.JPEG"):
        next(split.batches())


def test_a_file_that_is_gone_for_a_moment_is_read(folder, monkeypatch):
    """As when the server of a network file system starts again."""
    monkeypatch.setattr(pipeline, "READ_AGAIN_SECONDS", 2.0)
    split = load(folder, train=False)
    with contextlib.closing(split.batches()) as batches:
        expected = next(batches)["images"]
    file = folder / "test" / "a" / "02.JPEG"
    file.rename(away := file.with_suffix(".away"))
    begin, back = time.monotonic(), threading.Timer(0.5, away.rename, [file])
    back.start()
    with contextlib.closing(split.batches()) as batches:
        np.testing.assert_array_equal(next(batches)["images"], expected)
    assert time.monotonic() - begin >= 2  # it was read in vain first
    back.join()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_replace_masks_and_keeps_its_place(folder, num_workers):
    """Files are in the order of their classes: a has 00, 02, ..., b has 01, 03, ..."""
    split = load(folder, train=False, on_bad_image="replace", num_workers=num_workers)
    batches = list(split.batches())
    mask = np.concatenate([b["mask"] for b in batches])
    images = np.concatenate([b["images"] for b in batches])
    labels = np.concatenate([b["labels"] for b in batches])
    assert mask.tolist() == [1] * 7 + [0, 1, 0, 1, 1] + [0] * 3  # the last three are padding
    assert not images[[7, 9]].any()
    assert labels[:12].tolist() == [0] * 6 + [1] * 6


def test_nobody_trains_on_near_black_without_a_word(tmp_path, monkeypatch):
    """A run begins on images of 16 bits only if most use the upper half, or if `max_value` is set."""
    for split, i in itertools.product(("train", "test"), range(40)):
        path = tmp_path / split / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPEG if i % 4 == 1 else encode(Image.fromarray(np.minimum(VALUES, 3000)), "PNG"))
    split = load(tmp_path, train=True, num_threads=1)
    with pytest.raises(
        UserError, match=r"up to 3,000 of 65,535 \(in 25 .*at most 11 of 255.*data\.max_value=4095, or by 65535"
    ):
        split.check_max_value()
    for max_value, brightest in ((4095, 3000 >> 4), (65535, 3000 >> 8)):
        dataclasses.replace(split, max_value=max_value).check_max_value()
        with contextlib.closing(load(tmp_path, train=False, max_value=max_value).batches()) as batches:
            assert next(batches)["images"].max() == brightest
    bright = encode(Image.fromarray(VALUES * 16), "PNG")
    (tmp_path / "train" / "a" / "00.png").write_bytes(bright)
    with pytest.raises(
        UserError, match=r"up to 3,000 of 65,535 \(in 2\d of 2\d that"
    ):  # one bright image is not enough
        split.check_max_value()
    paths = sorted((tmp_path / "train").glob("*/*.png"))
    for path in paths[3:]:
        path.write_bytes(bright)
    (tmp_path / "train" / "a" / "00.png").write_bytes(bright)
    monkeypatch.setattr(pipeline, "IMAGES_LOOKED_AT", 40)
    assert split.check_max_value() == (
        "the training data: 2 of 40 images of 16 bits looked at have no value in the upper half; "
        "if white is less than 65535 there, set data.max_value."
    )
    for path in paths:
        path.write_bytes(bright)
    assert split.check_max_value() == ""
    assert data.load("digits", train=True, batch_size=5, image_size=8, channels=1).check_max_value() == ""


def test_one_image_of_each_class_is_looked_at(tmp_path, monkeypatch):
    """A folder is sorted by classes, and evenly spread images may leave out whole classes."""
    dark, bright = (encode(Image.fromarray(np.full((4, 4), v, np.uint16)), "PNG") for v in (4000, 40_000))
    for i in range(60):
        path = tmp_path / "train" / f"{i // 10}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dark if i // 10 in (2, 3) else bright)
    monkeypatch.setattr(pipeline, "IMAGES_LOOKED_AT", 2)
    split = load(tmp_path, train=True)
    assert split._sample() == [0, 10, 20, 30, 40, 50, 59]
    assert "2 of 7 images of 16 bits looked at have no value in the upper half" in split.check_max_value()
    monkeypatch.setattr(pipeline, "CLASSES_LOOKED_AT", 3)
    assert split._sample() == [0, 20, 50, 59]


def test_in_training_a_mask_is_there_only_where_bad_images_are_replaced(folder):
    with contextlib.closing(load(folder, train=True, on_bad_image="replace", batch_size=12).batches()) as batches:
        assert next(batches)["mask"].sum() == 10
    good = data.load("digits", train=True, batch_size=5, image_size=8, channels=1)
    with contextlib.closing(good.batches()) as batches:
        assert set(next(batches)) == set(good.batch_shapes) == {"images", "labels"}
