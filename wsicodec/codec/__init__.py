"""Tiles in memory: ``encode``, ``decode``, ``decode_batch``, ``probe`` over all codecs.

``learned`` writes wsicodec tiles (docs/format.md); the other names write the stream of that codec
itself. ``decode`` and ``probe`` tell them apart by their first bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from wsicodec import bitstream
from wsicodec.bitstream import Tile
from wsicodec.codec.protocol import (
    DEFAULT_QUALITY as DEFAULT_QUALITY,
)
from wsicodec.codec.protocol import (
    Codec,
    Image,
    TileInfo,
    check_image,
    check_quality,
)
from wsicodec.errors import FormatError, SettingsError, TruncatedError
from wsicodec.settings import thread_budget

DEFAULT_MODEL = "he-fast"
PRESETS = {"preview": 40, "diagnostic": DEFAULT_QUALITY, "archive": 90}
"""Qualities by their use."""
TARGETS = ("target_ssim", "target_psnr")
"""Options of the learned codec that take the place of quality."""
CODECS = ("learned", "jpeg", "jpeg2000", "jpegxl", "avif", "webp", "lossless")

Buffer = bytes | bytearray | memoryview
DEVICES = ("auto", "cpu", "cuda")
AUTO_PIXELS: int | None = None
"""Pixels of learned tiles of one kind from which device "auto" asks for a GPU; None: never. So it
is until decoding has been measured on one."""


def codec_named(name: str) -> Codec:
    """The codec of this name, or SettingsError listing the names."""
    if name not in CODECS:
        raise SettingsError(f"codec {name!r} is none of {', '.join(CODECS)}")
    if name == "learned":
        from wsicodec.codec.learned import LearnedCodec

        return LearnedCodec()
    from wsicodec.codec.reference import REFERENCE_CODECS

    return REFERENCE_CODECS[name]


def codec_of(data: bytes) -> Codec:
    """The codec that wrote a stream, by its first bytes, or FormatError."""
    if bitstream.is_tile(data):
        return codec_named("learned")
    from wsicodec.codec.reference import REFERENCE_CODECS

    for codec in REFERENCE_CODECS.values():
        if codec.check(data):
            return codec
    if len(data) < 4:
        raise TruncatedError(f"stream of {len(data)} bytes is too short for any codec")
    raise FormatError(f"no codec knows a stream that starts with {data[:8].hex(' ')}")


def encode(
    image: object,
    *,
    codec: str = "learned",
    model: str = DEFAULT_MODEL,
    quality: int | None = None,
    preset: str | None = None,
    lossless: bool = False,
    **codec_options: Any,
) -> bytes:
    """Code an image as one tile.

    image: uint8 (rows, columns, 3) RGB, sides 1 ... 4096, any strides.
    quality: 1 ... 100, by default that of the preset ``diagnostic``, which keeps a mean luma SSIM
    of at least 0.95 on tissue. preset: a quality by its use, one of ``PRESETS``.
    lossless: exact pixels; learned tiles then carry a lossless payload.
    codec_options: of the codec, e.g. ``subsampling="444"`` for jpeg, ``effort=7`` for jpegxl,
    ``target_ssim=0.97`` for learned, which then takes no quality.

    Raises UnsupportedError, LimitError, SettingsError, UnknownModelError.
    """
    pixels = check_image(image)
    level = _level(quality, preset, codec_options)
    if codec == "learned":
        codec_options["model"] = model
    return codec_named(codec).encode(pixels, quality=level, lossless=lossless, **codec_options)


def _level(quality: int | None, preset: str | None, options: Mapping[str, Any]) -> int:
    """The quality that is asked for, by whatever name."""
    targets = [name for name in TARGETS if options.get(name) is not None]
    given = [n for n, v in (("quality", quality), ("preset", preset)) if v is not None] + targets
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} exclude each other")
    if preset is not None:
        if preset not in PRESETS:
            raise SettingsError(f"preset {preset!r} is none of {', '.join(PRESETS)}")
        return PRESETS[preset]
    return DEFAULT_QUALITY if quality is None else check_quality(quality)


def decode(data: Buffer, *, out: Image | None = None, device: str = "auto") -> Image:
    """Pixels of a tile, (rows, columns, 3) uint8, C-contiguous.

    out: array of exactly that shape to write into; it is returned.
    device: ``auto`` and ``cpu`` run on the CPU; ``cuda`` decodes learned tiles on a GPU.

    Raises FormatError (TruncatedError, ChecksumError), LimitError, UnknownModelError;
    RuntimeMissingError where CUDA is asked for and cannot be used.
    """
    _check_device(device)
    stream = bytes(data)
    if device == "cuda" and bitstream.is_tile(stream):
        image = _decode_on_gpu([bitstream.parse(stream)], None, device).get(0)
        if image is not None:
            return _into(out, image)
    image = codec_of(stream).decode(stream)
    return _into(out, image)


def decode_batch(
    data: Sequence[Buffer],
    *,
    out: Image | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> Image | list[Image]:
    """Pixels of many tiles, decoded by up to ``threads`` threads (default: the thread budget).

    Returns one (count, rows, columns, 3) array when all tiles have one size, else a list. Where it
    raises, what ``out`` holds is undefined.
    device: ``auto`` runs on the CPU, for now; ``cuda`` decodes learned tiles on a CUDA GPU, and
    tiles of other modes on the CPU.

    Raises what ``decode`` raises.
    """
    _check_device(device)
    workers = thread_budget() if threads is None else threads
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise SettingsError(f"threads must be a positive integer, not {threads!r}")
    streams = [bytes(item) for item in data]
    if not streams:
        return np.empty((0, 0, 0, 3), np.uint8) if out is None else out
    tiles = [bitstream.parse(s) if bitstream.is_tile(s) else None for s in streams]
    shapes = {_size_of(s, t) for s, t in zip(streams, tiles, strict=True)}
    uniform = len(shapes) == 1
    target: Image | None = None
    if uniform:
        height, width = shapes.pop()
        shape = (len(streams), height, width, 3)
        target = np.empty(shape, np.uint8) if out is None else out
        _check_out(target, shape)
    elif out is not None:
        raise SettingsError("out= needs tiles of one size")

    results: list[Image | None] = [None] * len(streams)

    def run(group: list[int]) -> None:
        outs = None if target is None else [target[i] for i in group]
        images = _decode_group([(streams[i], tiles[i]) for i in group], outs)
        for i, image in zip(group, images, strict=True):
            results[i] = image

    done = _decode_on_gpu(tiles, target, device)
    for i, image in done.items():
        results[i] = image
    # what the GPU has done is not done again
    waiting = [i for i in range(len(streams)) if i not in done]
    groups = _groups([tiles[i] for i in waiting], workers)
    _share_out([[waiting[n] for n in group] for group in groups], run, workers)
    return [r for r in results if r is not None] if target is None else target


def _decode_on_gpu(
    tiles: Sequence[Tile | None], target: Image | None, device: str
) -> dict[int, Image]:
    """Pixels of the tiles that a GPU decoded, by index, in ``target`` where that is given."""
    if device == "cpu" or (device == "auto" and AUTO_PIXELS is None):
        return {}
    # above this layer, and only used where a GPU may be
    from wsicodec.pipelines.dispatch import decode_on_gpu, on_gpu

    done: dict[int, Image] = {}
    for group in on_gpu(tiles, device):
        outs = None if target is None else [target[i] for i in group]
        images = decode_on_gpu([t for i in group if (t := tiles[i]) is not None], outs, device)
        if images is not None:
            done.update(zip(group, images, strict=True))
    return done


def _groups(tiles: Sequence[Tile | None], workers: int) -> list[list[int]]:
    """Indices of tiles that are decoded in one go: learned ones of one model, size and number of
    stages, as many as the model's networks want, and no fewer groups than there are workers."""
    alike: dict[object, list[int]] = {}
    for i, tile in enumerate(tiles):
        key: object = i
        if tile is not None and tile.learned is not None:
            key = (tile.learned.model, tile.learned.stages, tile.height, tile.width)
        alike.setdefault(key, []).append(i)
    groups = []
    for members in alike.values():
        most, first = 1, tiles[members[0]]
        if first is not None and first.learned is not None:
            from wsicodec.codec.learned import most_alike

            # as many groups for one worker as for the next
            rounds = -(-len(members) // (workers * most_alike(first)))
            most = -(-len(members) // (workers * rounds))
        groups += [members[i : i + most] for i in range(0, len(members), most)]
    return groups


def _share_out(groups: Sequence[list[int]], run: Callable[[list[int]], None], workers: int) -> None:
    """Run all groups, each worker taking the next when it has done one: cores are never equally
    free. This thread is one of the workers: one that only waits for a pool costs a tenth of the
    speed. Raises what a group raised; no other is begun after that."""
    workers = min(workers, len(groups))
    waiting, lock, failed = iter(groups), threading.Lock(), threading.Event()

    def work() -> None:
        try:
            while not failed.is_set():
                with lock:
                    group = next(waiting, None)
                if group is None:
                    return
                run(group)
        except BaseException:
            failed.set()
            raise

    if workers <= 1:
        work()
        return
    with ThreadPoolExecutor(workers - 1) as pool:
        helpers = [pool.submit(work) for _ in range(workers - 1)]
        work()
        for helper in helpers:
            helper.result()


def _decode_group(
    group: Sequence[tuple[bytes, Tile | None]], outs: list[Image] | None
) -> list[Image]:
    stream, tile = group[0]
    if tile is None or tile.learned is None:
        return [decode(stream, out=None if outs is None else outs[0])]
    from wsicodec.codec.learned import decode_alike

    return decode_alike([tile for _, tile in group if tile is not None], outs)


def probe(data: Buffer) -> TileInfo:
    """What a stream says of itself; decodes no pixel. Raises as ``decode`` does."""
    stream = bytes(data)
    return codec_of(stream).probe(stream)


def _size_of(stream: bytes, tile: Tile | None) -> tuple[int, int]:
    """(height, width) of a stream, without looking up its model as ``probe`` does."""
    info = tile or probe(stream)
    return info.height, info.width


def _check_device(device: str) -> None:
    if device not in DEVICES:
        raise SettingsError(f"device {device!r} is none of {', '.join(DEVICES)}")
    if device == "cuda":
        from wsicodec.models.provider import require_cuda

        require_cuda()


def _check_out(out: Image, shape: tuple[int, ...]) -> None:
    if out.shape != shape or out.dtype != np.uint8:
        raise SettingsError(f"out must be uint8 {shape}, not {out.dtype} {out.shape}")
    if not out.flags.writeable:
        raise SettingsError("out is read-only")


def _into(out: Image | None, image: Image) -> Image:
    if out is None:
        return image
    _check_out(out, image.shape)
    out[...] = image
    return out
