"""Changes of bytes, texts and JSON values at random: the same for the same generator."""

import json
import random
import re
import zlib
from collections.abc import Sequence
from typing import Any

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Numbers at which programs break: the ends of integer types, of floats, of counts that are multiplied.
EXTREMES = [0, 1, -1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53]
EXTREMES += [2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30, 10**400]
HOSTILE_NUMBERS: list[Any] = [
    *EXTREMES,
    0.5,
    -0.0,
    1e-320,
    1e38,
    1e39,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
]
HOSTILE_TEXTS = [
    "",
    " ",
    "\0",
    "\n",
    "a\nb",
    "\x1b[2J",
    "\ud800",
    "\udce9",
    "\u202eabc",
    "\\xe9",
    "../../etc/passwd",
    "/dev/null",
    "~",
    "~nobody-of-this-name/x",
    "x" * 5000,
    "9" * 5000,
    "(" * 300,
    "[" * 3000,
    "{}",
    "%s%n",
    "1_000",
    "0x10",
    "1e999",
    "nan",
    "None",
    "é",
    "e\u0301",
    "\ufeffx",
]


def value(draw: random.Random) -> Any:
    """A value that nobody expects where it is put."""
    match draw.randrange(8):
        case 0 | 1 | 2:
            return draw.choice(HOSTILE_NUMBERS)
        case 3 | 4:
            return draw.choice(HOSTILE_TEXTS)
        case 5:
            return draw.choice([None, True, False, [], {}])
        case 6:
            return [value(draw) for _ in range(draw.randrange(4))]
    return {draw.choice(["", "a", "name", "config"]): value(draw)}


def changed_bytes(draw: random.Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to four changes: bits, the end, bytes put in or taken out, integers at their extremes, parts of `others`."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place = draw.randrange(len(changed) + 1) if draw.random() < 0.6 else draw.randrange(min(len(changed), 64) + 1)
        match draw.randrange(9):
            case 0 | 1 if changed:
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            case 2:
                del changed[place:]
            case 3:
                changed[place:place] = draw.randbytes(draw.choice((1, 4, 64)))
            case 4:
                del changed[place : place + draw.choice((1, 2, 8, 64))]
            case 5:  # an integer
                size = draw.choice((1, 2, 4, 8))
                number = draw.choice(EXTREMES) % 256**size
                changed[place : place + size] = number.to_bytes(size, draw.choice(("little", "big")))
            case 6:  # a part over another
                source, length = draw.randrange(len(changed) + 1), draw.choice((1, 8, 256))
                part = changed[source : source + length]
                changed[place : place + len(part)] = part
            case 7 if others:  # what follows, of another file
                other = draw.choice(others)
                changed[place:] = other[min(place, draw.randrange(len(other) + 1)) :]
            case _:
                changed[place : place + 4] = bytes([draw.choice((0, 255))]) * draw.choice((1, 4, 16))
    return bytes(changed)


def changed_text(draw: random.Random, text: str) -> str:
    """The same for a text: its numbers, its words, its lines."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        match draw.randrange(6):
            case 0 | 1:
                numbers = list(re.finditer(r"-?\d+(\.\d+)?", text))
                if numbers:
                    span = draw.choice(numbers).span()
                    text = text[: span[0]] + str(draw.choice(HOSTILE_NUMBERS)) + text[span[1] :]
            case 2:
                words = list(re.finditer(r"\w+", text))
                if words:
                    span = draw.choice(words).span()
                    text = text[: span[0]] + draw.choice(HOSTILE_TEXTS) + text[span[1] :]
            case 3:
                lines = text.splitlines(keepends=True)
                if lines:
                    place = draw.randrange(len(lines))
                    lines[place : place + 1] = draw.choice(([], [lines[place]] * 2, [lines[place].strip()]))
                    text = "".join(lines)
            case 4:
                place = draw.randrange(len(text) + 1)
                text = text[:place] + draw.choice([*"\"'{}[](),;:=\t\r\n#\\", *HOSTILE_TEXTS]) + text[place:]
            case _:
                place = draw.randrange(len(text) + 1)
                text = text[:place] if draw.random() < 0.5 else text[:place] + text[place + draw.choice((1, 5, 40)) :]
    return text


def encoded(text: str) -> bytes:
    """Bytes of a text that may have lone surrogates."""
    return text.encode("utf-8", "surrogatepass" if "\ud800" in text else "surrogateescape")


def changed_json(draw: random.Random, whole: Any) -> Any:
    """One to three values of a JSON replaced, left out, moved or put deep into lists."""
    whole = json.loads(json.dumps(whole))
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(whole))
        if not places:
            return value(draw)
        parent, key = draw.choice(places)
        match draw.randrange(8):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[draw.choice([*HOSTILE_TEXTS, str(key).upper(), f"{key}s"])] = parent.pop(key)
            case 2:
                other, name = draw.choice(places)
                parent[key] = json.loads(json.dumps(other[name])) if _has(other, name) else None
            case 3:
                deep = parent[key]
                for _ in range(draw.choice((3, 90, 250))):
                    deep = [deep]
                parent[key] = deep
            case 4 if isinstance(parent[key], list) and parent[key]:
                parent[key] = parent[key] * draw.choice((0, 2, 100))
            case 5 if isinstance(parent[key], str):
                parent[key] = changed_text(draw, parent[key])
            case _:
                parent[key] = value(draw)
    return whole


def json_bytes(draw: random.Random, whole: Any) -> bytes:
    """A JSON with changed values, or sometimes with changed text."""
    text = json.dumps(changed_json(draw, whole), indent=draw.choice((None, 2)))
    return encoded(changed_text(draw, text)) if draw.random() < 0.2 else text.encode()


def _places(whole: Any) -> list[tuple[Any, Any]]:
    found, waiting = [], [whole]
    while waiting:
        item = waiting.pop()
        keys = item if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            found.append((item, key))
            waiting.append(item[key])
    return found


def _has(parent: Any, key: Any) -> bool:
    return key in parent if isinstance(parent, dict) else key < len(parent)


# Checksums -----------------------------------------------------------------------------------------


def png_chunks(content: bytes) -> list[tuple[bytes, bytes, int]]:
    """Kind, data and checksum of each whole chunk of a PNG, as far as there are any."""
    found, place = [], len(PNG_SIGNATURE)
    while place + 12 <= len(content):
        length, kind = int.from_bytes(content[place : place + 4]), content[place + 4 : place + 8]
        if place + 12 + length > len(content):
            break
        data = content[place + 8 : place + 8 + length]
        found.append((kind, data, int.from_bytes(content[place + 8 + length : place + 12 + length])))
        place += 12 + length
    return found


def png_of(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A PNG of these chunks, with right checksums."""
    parts = (len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in chunks)
    return PNG_SIGNATURE + b"".join(parts)


def changed_png(draw: random.Random, content: bytes) -> bytes:
    """A PNG with a chunk changed, left out, repeated or moved, and right checksums."""
    chunks = [(kind, data) for kind, data, _ in png_chunks(content)]
    place = draw.randrange(len(chunks))
    kind, data = chunks[place]
    match draw.randrange(6):
        case 0:
            del chunks[place]
        case 1:
            chunks.insert(draw.randrange(len(chunks) + 1), chunks[place])
        case 2 if kind == b"IDAT":
            chunks[place] = kind, zlib.compress(changed_bytes(draw, zlib.decompress(data)))
        case 3:
            name = draw.choice([b"tRNS", b"PLTE", b"gAMA", b"eXIf", b"iCCP", b"zTXt", b"acTL", b"QUIT"])
            chunks.insert(1, (name, draw.randbytes(draw.choice((0, 1, 6, 768)))))
        case _:
            chunks[place] = kind, changed_bytes(draw, data)
    return png_of(chunks)
