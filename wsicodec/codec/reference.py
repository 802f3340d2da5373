"""The codecs that the learned one is measured against, and falls back on, through imagecodecs.

``encode`` returns the codec's own stream, readable by any software that knows it. JPEG,
JPEG-2000 (bare codestream), JPEG XL (bare codestream; containers are read too), AVIF, WebP, and
``lossless``, which is JPEG XL without loss. The same streams are payloads inside wsicodec tiles.

Decoding takes bytes from strangers. Every stream is walked by the parsers of ``headers`` first;
only then does the library see it, with an output array of exactly the announced shape.

Quality is one scale for all codecs: 70, the default, keeps a mean luma SSIM of at least 0.95 on
tissue whatever the codec (measured: 0.952 ... 0.964). It is the codec's own number for JPEG and
WebP; JPEG-2000 goes from 24 over 33.5 to 48 dB, JPEG XL from distance 12 over 1.9 to 0.1, AVIF from
level 1 over 62 to 99. Each codec also takes its native parameter as an option.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

import numpy as np

from wsicodec.codec.headers import (
    J2K_MAGIC,
    JP2_MAGIC,
    JXL_BOX_MAGIC,
    JXL_MAGIC,
    avif_brands,
    avif_size,
    jpeg2000_size,
    jpeg_size,
    jpegxl_size,
    webp_size,
)
from wsicodec.codec.protocol import DEFAULT_QUALITY, Codec, Image, TileInfo
from wsicodec.errors import (
    FormatError,
    RuntimeMissingError,
    SettingsError,
    TruncatedError,
    UnsupportedError,
    WsicodecError,
)

INSTALL = "pip install --upgrade imagecodecs"


# ---------------------------------------------------------------------------------------------
# options


Check = Callable[[str, Any], Any]


def _choice(*names: str) -> Check:
    def check(what: str, value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise SettingsError(f"{what}={value!r} is none of {', '.join(map(repr, names))}")
        return value

    return check


def _flag(what: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise SettingsError(f"{what}={value!r} is neither True nor False")
    return bool(value)


def _integer(low: int, high: int) -> Check:
    def check(what: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise SettingsError(f"{what}={value!r} is not an integer")
        if not low <= value <= high:
            raise SettingsError(f"{what}={value} is not within {low} ... {high}")
        return int(value)

    return check


def _number(low: float, high: float) -> Check:
    def check(what: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise SettingsError(f"{what}={value!r} is not a number")
        number = float(value)  # numpy numbers compare, print and pickle unlike Python's
        if not low <= number <= high:
            raise SettingsError(f"{what}={number:g} is not within {low:g} ... {high:g}")
        return number

    return check


def _piecewise(quality: int, low: float, default: float, high: float) -> float:
    """The line through ``low`` at quality 1, ``default`` at the default quality and ``high`` at
    100."""
    return float(np.interp(quality, (1, DEFAULT_QUALITY, 100), (low, default, high)))


# ---------------------------------------------------------------------------------------------
# codecs


class ReferenceCodec:
    """A codec of imagecodecs. Stateless: one instance serves all threads."""

    name: str
    library: ClassVar[str]
    """The attribute of imagecodecs that says whether it was built with this codec."""
    options: ClassVar[Mapping[str, Check]]
    lossy_options: ClassVar[frozenset[str]] = frozenset()
    """Options that mean nothing without loss."""

    def encode(
        self, image: Image, *, quality: int, lossless: bool = False, **options: Any
    ) -> bytes:
        """The codec's own stream of a checked image (rows, columns, 3), one thread.

        quality: 1 ... 100. lossless: exact pixels, quality is then ignored.
        options: of this codec, see ``self.options``; a native parameter overrides quality.

        Raises SettingsError (an option that this codec does not have, or out of its range),
        RuntimeMissingError, UnsupportedError (the library refused the image).
        """
        settings = self._checked(options, lossless=lossless)
        library = _imagecodecs(self)
        try:
            return bytes(self._encode(library, image, quality, lossless, settings))
        except MemoryError:
            raise
        except Exception as error:
            height, width = image.shape[:2]
            raise UnsupportedError(
                f"{self.name} cannot code an image of {width} x {height} pixels: {error}"
            ) from error

    def decode(self, data: bytes) -> Image:
        """(rows, columns, 3) uint8 of a stream.

        Raises FormatError (TruncatedError), LimitError, UnsupportedError (not 8-bit RGB),
        RuntimeMissingError. Nothing is allocated before the sizes are checked.
        """
        height, width = self._measure(data, whole=True)
        library = _imagecodecs(self)
        out = np.zeros((height, width, 3), np.uint8)
        try:
            result = self._decode(library, data, out)
        except MemoryError:
            raise
        except Exception as error:
            self._refuse(error)
        # a library that ignored ``out`` decoded something other than what the header says
        if result is not out and (result.shape != out.shape or result.dtype != out.dtype):
            raise FormatError(
                f"{self.name} stream of {width} x {height} pixels decoded to "
                f"{result.dtype} {result.shape}"
            )
        return np.ascontiguousarray(result)

    def probe(self, data: bytes) -> TileInfo:
        """Size of a stream, from its header alone. Raises as ``decode`` does."""
        height, width = self._measure(data, whole=False)
        return TileInfo(self.name, self.name, height, width, len(data))

    def check(self, data: bytes) -> bool:
        """True when the stream starts like one of this codec."""
        raise NotImplementedError

    def _checked(self, options: Mapping[str, Any], *, lossless: bool) -> dict[str, Any]:
        checked = {}
        for key, value in options.items():
            if key not in self.options:
                raise SettingsError(
                    f"codec {self.name!r} has no option {key!r}; "
                    f"it has {', '.join(sorted(self.options))}"
                )
            if lossless and key in self.lossy_options:
                raise SettingsError(f"{key}={value!r} means nothing to {self.name} without loss")
            checked[key] = self.options[key](key, value)
        return checked

    def _measure(self, data: bytes, *, whole: bool) -> tuple[int, int]:
        if not self.check(data):
            if len(data) < 12:
                raise TruncatedError(f"{self.name} stream of {len(data)} bytes")
            raise FormatError(f"not a {self.name} stream: starts with {data[:12].hex(' ')}")
        return self._size(data, whole=whole)

    def _refuse(self, error: Exception) -> NoReturn:
        if isinstance(error, WsicodecError):
            raise error
        text = f"{self.name} stream is damaged: {error or type(error).__name__}"
        # libjxl and libavif say so; the parsers above find it for the others
        short = "NEED_MORE_INPUT" in text or "Truncated" in text
        raise (TruncatedError if short else FormatError)(text) from error

    def _size(self, data: bytes, *, whole: bool) -> tuple[int, int]:
        raise NotImplementedError

    def _encode(
        self, library: Any, image: Image, quality: int, lossless: bool, settings: dict[str, Any]
    ) -> Any:
        raise NotImplementedError

    def _decode(self, library: Any, data: bytes, out: Image) -> Any:
        raise NotImplementedError


def _imagecodecs(codec: ReferenceCodec) -> Any:
    """The imagecodecs module, built with the codec, or RuntimeMissingError."""
    try:
        import imagecodecs
    except ImportError as error:
        raise RuntimeMissingError(
            f"codec {codec.name!r} needs imagecodecs ({error}): {INSTALL}"
        ) from error
    try:
        available = bool(getattr(imagecodecs, codec.library).available)
    except (AttributeError, ImportError):
        available = False
    if not available:
        version = getattr(imagecodecs, "__version__", "?")
        raise RuntimeMissingError(
            f"codec {codec.name!r}: imagecodecs {version} was built without it: {INSTALL}"
        )
    return imagecodecs


class Jpeg(ReferenceCodec):
    """Baseline JPEG by libjpeg-turbo.

    level: JPEG quality 1 ... 100; ``quality`` is just that. subsampling: "420", "422" or "444".
    optimize: fitted Huffman tables, about 5 % fewer bytes at half the encoding speed.
    """

    name = "jpeg"
    library = "JPEG8"
    options: ClassVar[Mapping[str, Check]] = {
        "level": _integer(1, 100),
        "subsampling": _choice("420", "422", "444"),
        "optimize": _flag,
    }

    def check(self, data: bytes) -> bool:
        return data[:3] == b"\xff\xd8\xff"

    def _checked(self, options: Mapping[str, Any], *, lossless: bool) -> dict[str, Any]:
        if lossless:
            raise SettingsError("codec 'jpeg' always loses; use 'lossless', 'jpegxl' or 'jpeg2000'")
        return super()._checked(options, lossless=lossless)

    def _encode(
        self, library: Any, image: Image, quality: int, lossless: bool, settings: dict[str, Any]
    ) -> Any:
        return library.jpeg8_encode(
            image,
            level=settings.get("level", quality),
            subsampling=settings.get("subsampling", "420"),
            optimize=settings.get("optimize", True),
        )

    def _decode(self, library: Any, data: bytes, out: Image) -> Any:
        return library.jpeg8_decode(data, out=out)

    def _size(self, data: bytes, *, whole: bool) -> tuple[int, int]:
        return jpeg_size(data, whole=whole)


class Jpeg2000(ReferenceCodec):
    """JPEG-2000 by OpenJPEG, a bare codestream: 9/7 wavelet, or 5/3 without loss.

    psnr: target in dB.
    """

    name = "jpeg2000"
    library = "JPEG2K"
    options: ClassVar[Mapping[str, Check]] = {"psnr": _number(10, 100)}
    lossy_options = frozenset({"psnr"})

    def check(self, data: bytes) -> bool:
        return data[:4] == J2K_MAGIC or data[:12] == JP2_MAGIC

    def _encode(
        self, library: Any, image: Image, quality: int, lossless: bool, settings: dict[str, Any]
    ) -> Any:
        level = settings.get("psnr", _piecewise(quality, 24, 33.5, 48))
        return library.jpeg2k_encode(
            image,
            level=0 if lossless else level,
            reversible=lossless,
            mct=True,
            codecformat="j2k",
            numthreads=1,
        )

    def _decode(self, library: Any, data: bytes, out: Image) -> Any:
        return library.jpeg2k_decode(data, numthreads=1, out=out)

    def _size(self, data: bytes, *, whole: bool) -> tuple[int, int]:
        if data[:4] != J2K_MAGIC:
            # its boxes may hold palettes and profiles that change the pixels
            raise UnsupportedError("JP2 file; wsicodec reads bare JPEG-2000 codestreams")
        return jpeg2000_size(data, whole=whole)


class JpegXl(ReferenceCodec):
    """JPEG XL by libjxl.

    distance: Butteraugli distance, 0.01 ... 25; 1 is about visually lossless.
    effort: 1 (fast) ... 10, default 7.
    """

    name = "jpegxl"
    library = "JPEGXL"
    options: ClassVar[Mapping[str, Check]] = {
        "distance": _number(0.01, 25),
        "effort": _integer(1, 10),
    }
    lossy_options = frozenset({"distance"})

    def check(self, data: bytes) -> bool:
        return data[:2] == JXL_MAGIC or data[:12] == JXL_BOX_MAGIC

    def _encode(
        self, library: Any, image: Image, quality: int, lossless: bool, settings: dict[str, Any]
    ) -> Any:
        effort = settings.get("effort", 7)
        if lossless:
            return library.jpegxl_encode(image, lossless=True, effort=effort, numthreads=1)
        # equal steps of quality are equal factors of distance
        distance = math.exp(_piecewise(quality, math.log(12), math.log(1.9), math.log(0.1)))
        return library.jpegxl_encode(
            image,
            lossless=False,
            distance=settings.get("distance", distance),
            effort=effort,
            numthreads=1,
        )

    def _decode(self, library: Any, data: bytes, out: Image) -> Any:
        # index: without it imagecodecs counts frames and wants room for all
        return library.jpegxl_decode(data, index=0, numthreads=1, out=out)

    def _size(self, data: bytes, *, whole: bool) -> tuple[int, int]:
        return jpegxl_size(data, whole=whole)


class Lossless(JpegXl):
    """JPEG XL without loss; quality is ignored. effort: as for ``jpegxl``."""

    name = "lossless"
    options: ClassVar[Mapping[str, Check]] = {"effort": _integer(1, 10)}

    def _encode(
        self, library: Any, image: Image, quality: int, lossless: bool, settings: dict[str, Any]
    ) -> Any:
        return super()._encode(library, image, quality, True, settings)


class Avif(ReferenceCodec):
    """AVIF by libaom, read by dav1d.

    level: libavif quality 0 ... 99. subsampling: "444" (default), "422" or "420".
    speed: 0 (slow) ... 10, default 6.
    """

    name = "avif"
    library = "AVIF"
    options: ClassVar[Mapping[str, Check]] = {
        "level": _integer(0, 99),  # 100 would be lossless
        "speed": _integer(0, 10),
        "subsampling": _choice("444", "422", "420"),
    }
    lossy_options = frozenset({"level", "subsampling"})

    def check(self, data: bytes) -> bool:
        return not avif_brands(data).isdisjoint((b"avif", b"avis"))

    def _encode(
        self, library: Any, image: Image, quality: int, lossless: bool, settings: dict[str, Any]
    ) -> Any:
        level = settings.get("level", round(_piecewise(quality, 1, 62, 99)))
        return library.avif_encode(
            image,
            level=100 if lossless else level,
            speed=settings.get("speed", 6),
            pixelformat="yuv" + settings.get("subsampling", "444"),
            numthreads=1,
        )

    def _decode(self, library: Any, data: bytes, out: Image) -> Any:
        return library.avif_decode(data, index=0, numthreads=1, out=out)

    def _size(self, data: bytes, *, whole: bool) -> tuple[int, int]:
        return avif_size(data, whole=whole)


class WebP(ReferenceCodec):
    """WebP by libwebp (4:2:0, or VP8L without loss).

    level: WebP quality 0 ... 100. method: 0 (fast) ... 6, default 4.
    """

    name = "webp"
    library = "WEBP"
    options: ClassVar[Mapping[str, Check]] = {
        "level": _number(0, 100),
        "method": _integer(0, 6),
    }
    lossy_options = frozenset({"level"})

    def check(self, data: bytes) -> bool:
        return data[:4] == b"RIFF" and data[8:12] == b"WEBP"

    def _encode(
        self, library: Any, image: Image, quality: int, lossless: bool, settings: dict[str, Any]
    ) -> Any:
        return library.webp_encode(
            image,
            # above 98 the PSNR falls; without loss, level means effort
            level=75 if lossless else settings.get("level", min(quality, 98)),
            lossless=lossless,  # unless told, imagecodecs codes without loss
            method=settings.get("method", 4),
            numthreads=0,  # any other number starts a thread
        )

    def _decode(self, library: Any, data: bytes, out: Image) -> Any:
        return library.webp_decode(data, index=0, hasalpha=False, out=out)

    def _size(self, data: bytes, *, whole: bool) -> tuple[int, int]:
        return webp_size(data, whole=whole)


# jpegxl before lossless: a stream does not say which of the two wrote it
REFERENCE_CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (Jpeg(), Jpeg2000(), JpegXl(), Avif(), WebP(), Lossless())
}


def decode_payload(name: str, payload: bytes, height: int, width: int) -> Image:
    """Pixels of a stream inside a tile of ``height`` x ``width``.

    name: a key of REFERENCE_CODECS. A stream of another size is refused before it is decoded.
    Raises as ``decode`` does.
    """
    codec = REFERENCE_CODECS[name]
    info = codec.probe(payload)
    if (info.height, info.width) != (height, width):
        raise FormatError(
            f"tile of {width} x {height} pixels holds a {name} stream of "
            f"{info.width} x {info.height}"
        )
    return codec.decode(payload)
