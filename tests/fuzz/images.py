"""Images of each format. What is accepted must be Pillow's own pixels; JPEG has no checksum, so that is all to know."""

import io
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tests.fuzz import mutation
from tests.fuzz.kinds import Files, Kind, WrongError
from xception_flax.data import decoding

SIZE = (40, 28)


def _picture() -> Image.Image:
    """Slopes, edges and noise, so that each part of a format is used."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    noise = np.random.default_rng(0).integers(0, 60, (SIZE[1], SIZE[0]))
    return Image.fromarray(np.stack([x * 6, y * 8, (x * y + noise) % 256], -1).astype(np.uint8))


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@cache
def originals() -> dict[str, tuple[bytes, ...]]:
    """Good files of each format."""
    color = _picture()
    gray, palette = color.convert("L"), color.convert("P")
    alpha = color.copy()
    alpha.putalpha(gray)
    sixteen = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    moving = dict(save_all=True, append_images=[color.rotate(90), color.rotate(180)], duration=100)
    found = {
        "jpeg": (
            _encoded(color, "JPEG", exif=_turned()),
            _encoded(color, "JPEG", subsampling=0, quality=95),
            _encoded(color, "JPEG", progressive=True),
            _encoded(gray, "JPEG", restart_marker_blocks=2),
            _encoded(color.convert("CMYK"), "JPEG"),
        ),
        "png": (
            _encoded(color, "PNG", exif=_turned()),
            _encoded(gray, "PNG"),
            _encoded(alpha, "PNG"),
            _encoded(palette, "PNG", transparency=3),
            _encoded(color.convert("1"), "PNG"),
            _encoded(sixteen, "PNG"),
            sixteen_bit_png(np.asarray(color)),
        ),
        "gif": (_encoded(color, "GIF"), _encoded(color, "GIF", **moving), _encoded(palette, "GIF", transparency=3)),
        "bmp": (
            _encoded(color, "BMP"),
            _encoded(palette, "BMP"),
            _encoded(gray, "BMP"),
            _encoded(color.convert("1"), "BMP"),
        ),
        "webp": (
            _encoded(color, "WEBP", exif=_turned()),
            _encoded(alpha, "WEBP", lossless=True),
            _encoded(color, "WEBP", lossless=True, **moving),
        ),
        "tiff": (
            _encoded(color, "TIFF"),
            _encoded(color, "TIFF", compression="tiff_lzw", exif=_turned()),
            _encoded(color, "TIFF", compression="jpeg"),
            _encoded(alpha, "TIFF", compression="tiff_adobe_deflate"),
            _encoded(sixteen, "TIFF"),
            _encoded(color.convert("CMYK"), "TIFF"),
            _encoded(color.convert("1"), "TIFF", compression="group4"),
        ),
        "ppm": (
            _encoded(color, "PPM"),
            _encoded(gray, "PPM"),
            _encoded(sixteen, "PPM"),
            b"P3 2 2 255\n1 2 3 4 5 6 7 8 9 10 11 12\n",
            b"P6 3 1 65535\n" + bytes(range(18)),
        ),
    }
    if "AVIF" in decoding.FORMATS:
        found["avif"] = (_encoded(color, "AVIF"), _encoded(alpha, "AVIF", exif=_turned()))
    if "HEIF" in decoding.FORMATS:
        found["heif"] = (_encoded(color, "HEIF"), _encoded(alpha, "HEIF"))
    return found


def sixteen_bit_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, `[H, W, 3]`, which Pillow does not write."""
    height, width = pixels.shape[:2]
    rows = (pixels.astype(">u2") * 257).reshape(height, -1)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([16, 2, 0, 0, 0])
    return mutation.png_of([(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")])


def _make(form: str) -> Any:
    def make(draw: random.Random) -> Files:
        whole = draw.choice(originals()[form])
        options = {
            "channels": draw.choice((1, 3, 3, 3, 4)),
            "min_side": draw.choice((0, 0, 10)),
            "max_value": draw.choice((None, None, 65535, 4095, 255)),
            "orientation": draw.choice(("ignore", "apply")),
        }
        files = {"options.json": json.dumps(options).encode()}
        if draw.random() < 0.15:
            return files | {"image": whole[: draw.randrange(len(whole))], "whole": whole}
        if form == "png" and draw.random() < 0.5:
            return files | {"image": mutation.changed_png(draw, whole)}
        others = originals()[form if draw.random() < 0.7 else draw.choice(list(originals()))]
        return files | {"image": mutation.changed_bytes(draw, whole, others)}

    return make


def read(folder: Path) -> None:
    """Decodes an image as every command does, and compares it with Pillow's."""
    content = (folder / "image").read_bytes()
    options = json.loads((folder / "options.json").read_text())
    found = decoding.decode(content, **options)
    decoding.largest_value(content)  # as training and `prepare check` do
    if found.dtype != np.uint8 or found.ndim != 3 or found.shape[-1] != options["channels"] or not found.size:
        raise WrongError(f"pixels are {found.dtype} {found.shape}")
    # A picture in decimal numbers that was cut within the last of them is as whole as any.
    is_cut_in_a_number = content[:2] in (b"P1", b"P2", b"P3") and not content[-1:].isspace()
    if (folder / "whole").exists() and not is_cut_in_a_number:
        whole = decoding.decode((folder / "whole").read_bytes(), **options)
        if not np.array_equal(found, whole):
            raise WrongError("a file that was cut gives another picture than the whole one")
    if content.startswith(mutation.PNG_SIGNATURE):
        for kind, data, checksum in mutation.png_chunks(content):
            if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT") and zlib.crc32(kind + data) != checksum:
                raise WrongError(f"the chunk {kind!r} of a PNG has another checksum than its content")
            if kind == b"IEND":
                break
    compare(content, found, options)


def compare(content: bytes, found: np.ndarray, options: Mapping[str, Any]) -> None:
    """Raises WrongError where these are not the pixels that Pillow reads."""
    is_jpeg = content[:2] == b"\xff\xd8"
    if options["max_value"] not in (None, decoding.WHITE) or (is_jpeg and options["min_side"]):
        return  # Pillow has no such option
    try:
        expected, tolerance = _by_pillow(content, options)
    except Exception as error:
        raise WrongError(f"Pillow refuses it: {type(error).__name__}: {error}") from None
    if expected.shape != found.shape:
        raise WrongError(f"it has the shape {found.shape}, and by Pillow {expected.shape}")
    if (worst := int(np.abs(expected.astype(np.int16) - found).max())) > tolerance:
        raise WrongError(f"its pixels differ from Pillow's by {worst}")


def _by_pillow(content: bytes, options: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    """Pixels by Pillow alone, and how far rounding may lead away from them."""
    channels = options["channels"]
    with Image.open(io.BytesIO(content), formats=("JPEG", *decoding.FORMATS)) as file:
        if file.format == "JPEG" and channels == 1 and file.mode == "RGB":
            file.draft("L", file.size)  # the luma as it is stored
        if file.mode.startswith("I;16") or (file.format == "PPM" and file.mode == "I"):
            bits = file.tag_v2.get(258, (16,))[0] if file.format == "TIFF" else 16
            values = np.asarray(file).astype(np.int64)
            file = Image.fromarray((values >> (bits - 8 if bits == 12 else 8)).astype(np.uint8))
            file.format = "L of 16 bits"
            if options["orientation"] == "apply":
                oriented = Image.open(io.BytesIO(content))
                oriented.load()
                file.getexif().update(oriented.getexif())
        alpha = channels == 4 and file.has_transparency_data
        tolerance = 2 if file.mode == "CMYK" else 0  # both multiply by black, and round differently
        mode = "RGBA" if alpha else "L" if file.mode in ("1", "L", "LA") else "RGB"
        exif_of = file
        image = file.convert(mode)
        if options["orientation"] == "apply":
            orientation = exif_of.getexif().get(0x0112, 1)
            image.getexif()[0x0112] = orientation
            image = ImageOps.exif_transpose(image)
    if channels == 1 and mode != "L":
        return np.asarray(image.convert("RGB").convert("L"))[..., None], tolerance + 1
    if channels == 3:
        return np.asarray(image.convert("RGB")), tolerance
    if channels == 4:
        return np.asarray(image.convert("RGBA")), tolerance
    return np.asarray(image)[..., None], tolerance


def _kinds(forms: Sequence[str]) -> dict[str, Kind]:
    return {form: Kind(_make(form), read, share=1.6 if form in ("jpeg", "png", "tiff") else 1) for form in forms}


KINDS = _kinds(["jpeg", "png", "gif", "bmp", "webp", "tiff", "ppm", *(["avif"] if "AVIF" in decoding.FORMATS else [])])
if "HEIF" in decoding.FORMATS:
    KINDS |= _kinds(["heif"])
