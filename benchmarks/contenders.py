"""The codecs that benchmarks compare, each with fixed options and one parameter that is varied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wsicodec.metrics import Image


@dataclass(frozen=True)
class Contender:
    """A codec with fixed options and the native parameter that is varied.

    codec: name as for ``wsicodec.encode``. points: values of the parameter, cheapest first.
    low, high: the range in which another value may be searched for; integral: whole numbers only.
    """

    codec: str
    parameter: str
    points: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    low: float = 1
    high: float = 100
    integral: bool = True

    def encode(self, image: Image, value: float) -> bytes:
        import wsicodec

        settings: dict[str, Any] = {**self.options, self.parameter: value}
        stream: bytes = wsicodec.encode(image, codec=self.codec, **settings)
        return stream

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: what is fixed, and which parameter is not."""
        return {"codec": self.codec, "parameter": self.parameter, **self.options}


_JPEG = (20, 32, 44, 55, 64, 72, 79, 85, 90, 94, 97, 99)
# rates rise slowly up to quality 70 and by a sixth with every second quality above: dense there,
# where SSIM 0.95 lies, because interpolation over a wider gap was 9 % off
_LEARNED = (1, 16, 34, 52, 61, 70, 73, 76, 79, 83, 87, 90, 93, 96, 100)

REFERENCES: dict[str, Contender] = {
    "jpeg420": Contender("jpeg", "level", _JPEG, {"subsampling": "420", "optimize": True}),
    "jpeg444": Contender("jpeg", "level", _JPEG, {"subsampling": "444", "optimize": True}),
    "jpeg2000": Contender(
        "jpeg2000",
        "psnr",
        (24.5, 26.5, 28.5, 30.5, 32.5, 34.5, 36.5, 38.5, 41, 44, 48),
        low=20,
        high=55,
        integral=False,
    ),
    "jpegxl": Contender(
        "jpegxl",
        "distance",
        (9, 6.5, 4.8, 3.6, 2.7, 2.0, 1.5, 1.1, 0.8, 0.5, 0.25, 0.12),
        {"effort": 7},
        low=0.05,
        high=15,
        integral=False,
    ),
    "avif": Contender(
        "avif",
        "level",
        (22, 32, 40, 47, 53, 59, 65, 71, 78, 85, 92, 97),
        {"speed": 6, "subsampling": "444"},
        high=99,
    ),
    "webp": Contender(
        "webp", "level", (4, 14, 26, 38, 50, 61, 71, 79, 85, 90, 95, 98), {"method": 6}, high=98
    ),
}

LEARNED: dict[str, dict[str, Any]] = {
    "learned": {},
    "learned-ssim": {"tune": "ssim"},
    "learned-psnr": {"tune": "psnr"},
}
"""Ways to use a learned model, by codec name: the options of each beside the model."""

CODECS = (*REFERENCES, *LEARNED)


def contenders(codecs: Sequence[str], models: Sequence[str]) -> dict[str, Contender]:
    """Contenders by label: a learned codec's name for one model, or "NAME:MODEL" for several."""
    chosen: dict[str, Contender] = {}
    for codec in codecs:
        if codec in REFERENCES:
            chosen[codec] = REFERENCES[codec]
            continue
        for model in models:
            label = codec if len(models) == 1 else f"{codec}:{model}"
            options = {"model": model, **LEARNED[codec]}
            chosen[label] = Contender("learned", "quality", _LEARNED, options)
    return chosen


def titles(described: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """How tables and plots name each label, from what ``Contender.as_dict`` says of it."""
    return {
        label: f"{entry['model']}{', tune=' + entry['tune'] if 'tune' in entry else ''}"
        if entry["codec"] == "learned"
        else label
        for label, entry in described.items()
    }
