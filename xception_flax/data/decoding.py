"""From the bytes of a file to uint8 `[H, W, C]`, or a `BadImageError` that says what is wrong.

JPEGs are decoded by libjpeg-turbo (simplejpeg), other formats by Pillow. A file is decoded to its end or refused.
Where libjpeg only warns, OpenCV, Pillow and TensorFlow return an image that is gray or displaced below some row; here
its warnings are errors. A JPEG has no checksum, so damage that leaves a valid file cannot be detected.
"""

import contextlib
import importlib.util
import io
import warnings
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, features
from PIL import Image as pillow

from xception_flax.text.errors import UserError

Image = np.ndarray

# 256 MiB as RGB: 9,459 x 9,459 pixels, Pillow's own limit too. The header is checked before memory is taken.
MAX_PIXELS = 2**28 // 3

FORMATS = ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # of Pillow's 40; some of the others start programs
if "avif" in features.modules and features.check("avif"):  # from Pillow 11.3 on, where it was built with libavif
    FORMATS += ("AVIF",)
if importlib.util.find_spec("pillow_heif") is not None:
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS += ("HEIF",)

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")  # of ISO/IEC 23008-12, of single images
HOW_TO_READ_HEIF = "to read .heic and .heif, pip install pillow-heif"

CHANNELS = (1, 3, 4)  # gray, RGB, RGBA
ALPHA = 3  # its number among the channels of RGBA

ORIENTATIONS = ("ignore", "apply")

# White in 16 bits. Only PNM's header says which value is white. PNG's sBIT says how precise the values are, which are
# scaled to 16 bits anyway. TIFF's MaxSampleValue describes one image, and by its definition is not for display.
WHITE = 2**16 - 1
TIFF_BITS = 258  # the tag BitsPerSample

# The only warning of libjpeg that is not about pixels. Cameras and web sites have written such files.
_UNKNOWN_VERSION = "unknown JFIF revision number"

warnings.filterwarnings("ignore", category=pillow.DecompressionBombWarning)  # `_check_size` raises an error
warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)  # alpha is dropped on purpose


class BadImageError(UserError):
    """A file or a record does not hold a valid image."""


def decode(
    image: bytes | np.ndarray,
    channels: int,
    min_side: int = 0,
    max_value: int | None = None,
    orientation: str = "ignore",
) -> Image:
    """Returns uint8 `[H, W, channels]` from an encoded file or from `[H, W]` / `[H, W, C]` uint8.

    One channel becomes three by repetition; three become one by JPEG's luma (ITU-R BT.601). Four channels are RGBA:
    colours as they are stored, whatever alpha is, and alpha, or 255 (opaque) where there is none. With one or three
    channels alpha is dropped. Only the first frame of an animation is read. Orientation tags are ignored by default, as
    by ImageNet's readers, except those of TIFF and HEIF, which Pillow and libheif apply. The format is recognized by
    the content, not by the file's name.

    Args:
      image: the content of a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM file, of an AVIF file where Pillow reads it, or of
        a HEIF file where pillow-heif is installed; or pixels.
      channels: 1, 3 or 4.
      min_side: if positive, a JPEG is decoded at the smallest of 1/2, 3/8, 1/4 and 1/8 of its size that leaves at
        least `min_side` pixels on both sides, or else whole. This is far faster for photos of many megapixels. The
        result differs from the whole image scaled down, since libjpeg leaves out frequencies.
      max_value: for files of 16 bits, the value that becomes 255, from 255 to 65,535: a value becomes
        `value * 256 // (max_value + 1)`. None means 65,535, which keeps the upper 8 bits; only the colours of a PPM
        file are rounded to the nearest by Pillow, `value * 255 / 65,535`.
      orientation: 'apply' turns and mirrors an image as its EXIF (or XMP) says, as
        `PIL.ImageOps.exif_transpose` does; 'ignore' leaves it as it is stored.

    Raises:
      BadImageError: the file cannot be decoded to its end, is larger than `MAX_PIXELS`, has values above
        `max_value`, or an EXIF that cannot be read and is to be applied; or the array is not a uint8 image.
    """
    if isinstance(image, bytes):
        if image[:2] == b"\xff\xd8":
            pixels = _decode_jpeg(image, channels, min_side)
            image = turned(pixels, _orientation_of_jpeg(image)) if orientation == "apply" else pixels
        else:
            image = _decode_other(image, max_value, orientation, alpha=channels == ALPHA + 1)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
        raise BadImageError(f"an image must be uint8 [H, W] or [H, W, C], got {image.dtype} {image.shape}.")
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[-1] == 1 and channels in (3, 4):
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.shape[-1] == 3 and channels == 4:
        return cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)  # with 255
    if image.shape[-1] == 3 and channels == 1:
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    if image.shape[-1] != channels:
        raise BadImageError(f"an image has {image.shape[-1]} channels, but data.channels is {channels}.")
    return image


def _decode_jpeg(content: bytes, channels: int, min_side: int) -> Image:
    options = dict(colorspace="GRAY" if channels == 1 else "RGB")
    if min_side:
        options |= dict(min_height=min_side, min_width=min_side, min_factor=2)
    try:
        _check_size(*simplejpeg.decode_jpeg_header(content)[:2])
        return simplejpeg.decode_jpeg(content, **options)
    except BadImageError:
        raise
    except ValueError as error:
        version = content.find(b"JFIF\0") + len(b"JFIF\0")
        if _UNKNOWN_VERSION in str(error) and content[version : version + 2] != b"\1\1":
            # libjpeg reports only the first warning. With a version that it knows, it would report the next.
            return _decode_jpeg(content[:version] + b"\1\1" + content[version + 2 :], channels, min_side)
        raise _undecodable(content, error) from None


def turned(image: Image, orientation: int) -> Image:
    """Returns an image `[H, W]` or `[H, W, C]` as EXIF's orientation says it is to be seen.

    Args:
      image: as it is stored.
      orientation: 1 to 8, of which 1 changes nothing; so do other values, as in Pillow.
    """
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def orientation_of(content: bytes) -> int:
    """Returns by which of EXIF's orientations `decode` turns an image if `orientation` is 'apply'; 1 for none.

    Raises:
      BadImageError: see `decode`.
    """
    if content[:2] == b"\xff\xd8":
        return _orientation_of_jpeg(content)
    with _opened(content) as file:
        file.load()
        return _orientation(file)


def _orientation(file: pillow.Image) -> int:
    # Of other files than JPEGs once they are loaded: a PNG may say it at its end, and of a TIFF Pillow has then applied
    # and removed it.
    return file.getexif().get(ExifTags.Base.Orientation, 1)


def _orientation_of_jpeg(content: bytes) -> int:
    with _opened(content, ("JPEG",)) as file:  # reads the header alone
        pillow.Exif().load(file.info.get("exif"))  # raises an error that Pillow has met before, and hides from then on
        return _orientation(file)


def _decode_other(content: bytes, max_value: int | None, orientation: str, *, alpha: bool) -> Image:
    with _opened(content) as file:
        # Gray of 16 bits has no alpha in Pillow but one value that is transparent, which is not looked at.
        alpha = alpha and file.has_transparency_data and not file.mode.startswith("I")
        pixels = _pixels(file, content, max_value or WHITE, alpha=alpha)
        return turned(pixels, _orientation(file)) if orientation == "apply" else pixels


def _pixels(file: pillow.Image, content: bytes, max_value: int, *, alpha: bool) -> Image:
    """Returns uint8 `[H, W]` or `[H, W, 3]`; with `alpha` `[H, W, 4]`."""
    # With the default white, Pillow reads colours as wanted: it keeps their upper 8 bits.
    values = _sixteen_bits(file, content, colors=max_value != WHITE)
    if values is not None and alpha:
        # Opaque is 65,535 whatever white is, and Pillow keeps the upper 8 bits.
        opacity = np.asarray(file.convert("RGBA"))[..., ALPHA:]
        colors = _scaled(values, max_value)
        colors = cv2.cvtColor(colors, cv2.COLOR_GRAY2RGB) if colors.ndim == 2 else colors
        return np.concatenate([colors, opacity], axis=-1)
    if values is not None:
        return _scaled(values, max_value)
    if file.mode in ("I", "F"):
        raise BadImageError(
            f"an image of 32 bits a channel, or of negative values (Pillow's mode {file.mode!r}); expected 8 or 16 "
            "bits."
        )
    gray = file.mode in ("1", "L", "LA")
    return np.array(file.convert("RGBA" if alpha else "L" if gray else "RGB"))


def _scaled(values: np.ndarray, max_value: int) -> Image:
    """Returns uint8 of values of 16 bits, in which `max_value` becomes 255."""
    if (largest := int(values.max(initial=0))) > max_value:
        raise BadImageError(f"it has values up to {largest:,}, more than data.max_value={max_value}.")
    return (np.arange(largest + 1) * 256 // (max_value + 1)).astype(np.uint8)[values]  # by a table: no larger copies


def largest_value(content: bytes) -> int | None:
    """Returns the largest value in a file of 16 bits a channel; None for one of 8.

    Raises:
      BadImageError: see `decode`.
    """
    if content[:2] == b"\xff\xd8":
        return None
    with _opened(content) as file:
        values = _sixteen_bits(file, content, colors=True)
        return None if values is None else int(values.max(initial=0))


def is_dark(largest: int) -> bool:
    """Whether 16-bit values up to `largest` are all in the lower half."""
    return largest <= WHITE // 2


def white(largest: int) -> int:
    """Returns the white of the fewest bits, from 8 to 16, that hold values up to `largest`."""
    return 2 ** max(8, largest.bit_length()) - 1


@contextlib.contextmanager
def _opened(content: bytes, formats: tuple[str, ...] = FORMATS) -> Iterator[pillow.Image]:
    try:
        with pillow.open(io.BytesIO(content), formats=formats) as file:
            _check_size(file.height, file.width)
            if file.format == "PNG":
                _check_pixels_of_png(content)
            yield file
    except (BadImageError, MemoryError):
        raise
    except pillow.DecompressionBombError:
        raise BadImageError(f"it claims more than the {MAX_PIXELS:,} pixels that an image may have.") from None
    except Exception as error:  # Pillow's readers raise any exception for what is not an image
        raise _undecodable(content, error) from None


def _sixteen_bits(file: pillow.Image, content: bytes, *, colors: bool) -> np.ndarray | None:
    """Returns the values `[H, W]` or `[H, W, 3]` of a file of 16 bits a channel; None for one of 8.

    Args:
      colors: also look at files with colours or alpha; otherwise the result is None for them.
    """
    bits = file.tag_v2.get(TIFF_BITS, (8,))[0] if file.format == "TIFF" else 16
    if file.mode.startswith("I;16"):
        values = np.asarray(file)
        return values << 4 | values >> 8 if bits == 12 else values  # a file of 12 bits has a known white; scale it
    if file.format == "PPM" and file.mode == "I":
        return np.asarray(file).astype(np.uint16)  # scaled by Pillow from the largest value that the header names
    if not colors or file.format not in ("PNG", "TIFF", "PPM") or file.mode not in ("RGB", "RGBA", "RGBX", "L", "LA"):
        return None
    args = file.tile[0][3]  # the format of the pixels in the file: 'RGB;16B', or ('RGB', 65535)
    rawmode, *rest = args if isinstance(args, tuple) else (args,)
    if "16" not in str(rawmode) and rest != [WHITE]:
        return None
    file.load()  # Pillow refuses damaged files, many of which OpenCV reads
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.shape[:2] != (file.height, file.width):
        raise BadImageError("the 16 bits of its colours cannot be read; write it anew, as a PNG.")
    return values if values.ndim == 2 else values[..., 2::-1]


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImageError(
            f"it claims {width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} that an image may have."
        )


def _check_pixels_of_png(content: bytes) -> None:
    """Raises BadImageError if the PNG is cut, or pixels have another CRC-32 than it says; Pillow sees other chunks'."""
    whole, place = memoryview(content), 8  # behind the signature
    while place + 8 <= len(whole):
        kind, end = whole[place + 4 : place + 8], place + 8 + int.from_bytes(whole[place : place + 4], "big")
        if kind == b"IEND":
            return  # some files have more behind it
        if end + 4 > len(whole):
            raise BadImageError("the image cannot be decoded: the file is cut.")
        if kind == b"IDAT" and zlib.crc32(whole[place + 4 : end]) != int.from_bytes(whole[end : end + 4], "big"):
            raise BadImageError("the image cannot be decoded: its pixels have another checksum than the PNG says.")
        place = end + 4


def _undecodable(content: bytes, error: Exception) -> BadImageError:
    if not content:
        return BadImageError("the image cannot be decoded: the file is empty.")
    if isinstance(error, pillow.UnidentifiedImageError):  # its text is only the address of an object
        is_heif = content[4:8] == b"ftyp" and content[8:12] in HEIF_BRANDS and "HEIF" not in FORMATS
        return BadImageError(
            f"the image cannot be decoded: {len(content):,} bytes that are no JPEG, {', '.join(FORMATS)}."
            + (f" It is a HEIF: {HOW_TO_READ_HEIF}." if is_heif else "")
        )
    return BadImageError(f"the image cannot be decoded ({len(content):,} bytes): {str(error).rstrip('.')}.")
