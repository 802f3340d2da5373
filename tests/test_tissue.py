"""Tissue against glass: the mask's contract, overviews in bounded memory, both methods."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tests.slides import CMU, DATA, ROOT, data_slide
from tools.tissue.evaluate import figures
from tools.tissue.labels import load_one
from tools.tissue.made import GLASS, fat, glass, mucus, on_glass, pale, pictured, section
from wsicodec.errors import (
    FormatError,
    LimitError,
    ModelError,
    SettingsError,
    TruncatedError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.models.proof import check_operators
from wsicodec.slide.opening import open_slide
from wsicodec.slide.protocol import Level
from wsicodec.tissue import METHODS, TissueMask, find_tissue, network
from wsicodec.tissue.finding import DILATION_MICROMETRES, background_of, tissue_in
from wsicodec.tissue.mask import MAX_CELLS
from wsicodec.tissue.morphology import dilated, without_specks
from wsicodec.tissue.overview import READ_PIXELS, cell_of, read_overview


def mask_of(tissue: Any, cell: int = 16) -> TissueMask:
    return TissueMask(np.asarray(tissue, np.bool_), cell, "otsu", (240, 241, 242))


# --- the mask -----------------------------------------------------------------------------------


@st.composite
def masks(draw: st.DrawFn) -> TissueMask:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    share = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    seed = draw(st.integers(0, 2**32 - 1))
    tissue = np.random.default_rng(seed).random((rows, columns)) < share
    background = tuple(draw(st.lists(st.integers(0, 255), min_size=3, max_size=3)))
    cell = 2 ** draw(st.integers(0, 8))
    return TissueMask(tissue, cell, draw(st.sampled_from(METHODS)), background)


@given(masks())
def test_a_packed_mask_comes_back(mask: TissueMask) -> None:
    back = TissueMask.parse(mask.pack())
    assert np.array_equal(back.tissue, mask.tissue)
    assert (back.cell, back.method, back.background) == (mask.cell, mask.method, mask.background)
    assert back.tissue_share == mask.tissue.mean()


@given(
    masks(),
    st.sampled_from([1.0, 2.0, 4.0, 16.0, 64.0, 1.0037, 3.9993, 15.97, 40.3]),
    st.tuples(*[st.integers(0, 60)] * 2),
    st.tuples(*[st.integers(0, 30)] * 2),
)
@settings(deadline=None)
def test_a_pixel_is_glass_where_no_cell_under_it_is_tissue(
    mask: TissueMask, downsample: float, corner: tuple[int, int], size: tuple[int, int]
) -> None:
    found = mask.glass(downsample, *corner, *size)
    spans = [
        [cells_under(start + i, downsample, mask.cell, count) for i in range(length)]
        for start, length, count in zip(corner, size, mask.tissue.shape, strict=True)
    ]
    expected = np.array(
        [
            [not mask.tissue[np.ix_(rows, columns)].any() for columns in spans[1]]
            for rows in spans[0]
        ]
    ).reshape(size)
    assert found.dtype == np.bool_ and np.array_equal(found, expected)
    assert mask.all_glass(downsample, *corner, *size) == expected.all()


def cells_under(pixel: int, downsample: float, cell: int, count: int) -> list[int]:
    """Cells of a line that a pixel overlaps by more than a rounding error, in exact fractions."""
    low = pixel * Fraction(downsample) / cell
    high = (pixel + 1) * Fraction(downsample) / cell
    error = Fraction(1, 10**9)
    found = [c for c in range(count) if c + 1 > low + error and c < high - error]
    return found or [count - 1]


def test_a_mask_is_read_only_and_refuses_what_it_cannot_be() -> None:
    mask = mask_of(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="read-only"):
        mask.tissue[0, 0] = True
    for broken in (
        lambda: mask_of(np.zeros((0, 3))),
        lambda: mask_of(np.zeros(3)),
        lambda: mask_of(np.zeros((2, 2)), cell=12),
        lambda: mask_of(np.zeros((2, 2)), cell=0),
        lambda: TissueMask(np.zeros((2, 2)), 8, "otsu", GLASS),  # type: ignore[arg-type]
        lambda: TissueMask(np.zeros((2, 2), np.bool_), 8, "", GLASS),
        lambda: TissueMask(np.zeros((2, 2), np.bool_), 8, "otsu", (1, 2, 256)),
        lambda: mask.glass(0.0, 0, 0, 4, 4),
        lambda: mask.glass(math.nan, 0, 0, 4, 4),
        lambda: mask.glass(1.0, -1, 0, 4, 4),
        lambda: mask.all_glass(1.0, 0, 0, 4, -1),
    ):
        with pytest.raises(SettingsError):
            broken()


def test_broken_bytes_are_refused_by_name() -> None:
    data = mask_of(np.eye(50) > 0).pack()
    for end in range(len(data)):
        with pytest.raises((TruncatedError, FormatError)):
            TissueMask.parse(data[:end])
    with pytest.raises(FormatError, match="more than"):
        TissueMask.parse(data + b"\0")
    with pytest.raises(FormatError, match="start like"):
        TissueMask.parse(b"x" + data[1:])
    with pytest.raises(UnsupportedError, match="version 2"):
        TissueMask.parse(data[:3] + b"\2" + data[4:])
    with pytest.raises(FormatError, match="cells of"):
        TissueMask.parse(data[:4] + b"\x1f" + data[5:])


def test_a_mask_that_claims_or_inflates_to_much_allocates_little() -> None:
    head = mask_of(np.zeros((8, 8))).pack()[: struct.calcsize("<3sBBIIBBBB")]

    def claiming(rows: int, columns: int, body: bytes) -> bytes:
        return head[:5] + struct.pack("<II", rows, columns) + head[13:] + b"otsu" + body

    bomb = zlib.compress(bytes(2**27), 9)
    tracemalloc.start()
    try:
        for rows, columns in ((2**32 - 1, 2**32 - 1), (2**25, 2), (MAX_CELLS + 1, 1)):
            with pytest.raises(LimitError):
                TissueMask.parse(claiming(rows, columns, bomb))
        with pytest.raises(FormatError, match="more than"):
            TissueMask.parse(claiming(8, 8, bomb))
        with pytest.raises(FormatError):
            TissueMask.parse(claiming(0, 8, bomb))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@given(st.integers(0, 10**6), st.integers(1, 255), masks())
def test_a_changed_byte_is_an_error_of_ours_or_another_mask(
    at: int, change: int, mask: TissueMask
) -> None:
    data = bytearray(mask.pack())
    data[at % len(data)] ^= change
    with contextlib.suppress(WsicodecError):
        assert TissueMask.parse(bytes(data)).tissue.size <= MAX_CELLS


# --- morphology -----------------------------------------------------------------------------------


@given(masks(), st.sampled_from([0.0, 0.9, 1.0, 1.5, 2.3, 5.0, 10.0]))
@settings(deadline=None, max_examples=60)
def test_a_margin_reaches_as_far_as_its_radius(mask: TissueMask, radius: float) -> None:
    if mask.tissue.any():
        expected = ndimage.distance_transform_edt(~mask.tissue) <= radius
    else:
        expected = mask.tissue
    assert np.array_equal(dilated(mask.tissue, radius), expected)


def test_specks_go_and_thin_lines_stay() -> None:
    cells = np.zeros((30, 30), np.bool_)
    cells[3, 3:6] = True
    cells[20, 2:28] = True
    kept = without_specks(cells, 4)
    assert not kept[3].any()
    assert kept[20, 3:27].all()


# --- overviews ------------------------------------------------------------------------------------


class MadeSlide:
    """A slide whose pixels are computed when asked for; records the largest read."""

    def __init__(self, pixels: Any, *sides: tuple[int, int], mpp: float = 0.5) -> None:
        self._pixels, self.largest = pixels, 0
        self.levels = tuple(
            Level(i, h, w, sides[0][1] / w, 256, 256) for i, (h, w) in enumerate(sides)
        )
        self.info = SimpleNamespace(
            levels=self.levels, mpp_x=mpp, mpp_y=mpp, magnification=None, path=Path("made")
        )

    def read_region(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        grid = self.levels[level]
        assert 0 <= y < y + height <= grid.height and 0 <= x < x + width <= grid.width
        self.largest = max(self.largest, height * width)
        image: np.ndarray = self._pixels(level, y, x, height, width)
        return image


def test_an_overview_of_a_huge_slide_takes_little_memory() -> None:
    def pixels(level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        shade = np.full((height, width, 3), 240, np.uint8)
        lit = slice(max(0, 2600 - y), max(0, 3600 - y)), slice(max(0, 5000 - x), None)
        shade[lit] = 100
        return shade

    slide = MadeSlide(pixels, (6000, 8001))
    tracemalloc.start()
    try:
        overview = read_overview(slide, 16)  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert overview.shape == (375, 501, 3)
    assert slide.largest <= READ_PIXELS
    assert peak < 48 * READ_PIXELS  # bytes
    expected = np.full((375, 501, 3), 240, np.uint8)
    expected[163:225, 313:] = 100  # 2600 / 16 = 162.5, 5000 / 16 = 312.5
    expected[162, 313:], expected[163:225, 312], expected[162, 312] = 170, 170, 205
    assert np.array_equal(overview, expected)


def test_an_overview_is_the_mean_of_real_pixels() -> None:
    with open_slide(CMU) as slide:
        overview = read_overview(slide, 16)
        top = slide.levels[0]
        pixels = slide.read_region(0, 0, 0, top.height, top.width)
    rows, columns = top.height // 16, top.width // 16
    blocks = pixels[: rows * 16, : columns * 16].reshape(rows, 16, columns, 16, 3)
    expected = np.rint(blocks.mean((1, 3)))
    assert np.abs(overview[:rows, :columns] - expected).max() <= 1
    assert overview.shape[:2] == (math.ceil(top.height / 16), math.ceil(top.width / 16))


def test_the_cheapest_level_is_read_and_odd_ratios_stay_in_place() -> None:
    asked = []

    def pixels(level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        asked.append(level)
        across = (np.arange(x, x + width) * (1, 4.004, 31.9)[level] * 0.05).astype(np.uint8)
        return np.broadcast_to(across[None, :, None], (height, width, 3)).copy()

    sides = ((3000, 4000), (750, 999), (94, 125))  # downsamples 1, 4.004, 32
    overview = read_overview(MadeSlide(pixels, *sides), 16)  # type: ignore[arg-type]
    assert set(asked) == {1}
    centres = (np.arange(250) + 0.5) * 16 * 0.05
    assert np.abs(overview[100, :, 0] - centres).max() < 1.5
    asked.clear()
    read_overview(MadeSlide(pixels, *sides), 32)  # type: ignore[arg-type]
    assert set(asked) == {2}


@pytest.mark.parametrize(
    ("mpp", "magnification", "cell"),
    [
        (0.25, None, 32), (0.2528, 40, 32), (0.499, 20, 16), (0.5, None, 16), (1.0, None, 8),
        (None, 40, 32), (None, 20, 16), (None, None, 16), (1e-9, None, 16), (1e9, 40, 32),
        (9.0, None, 1),
    ],
)  # fmt: skip
def test_a_cell_is_near_eight_micrometres(
    mpp: float | None, magnification: float | None, cell: int
) -> None:
    level = Level(0, 5000, 5000, 1.0, 256, 256)
    info: Any = SimpleNamespace(levels=(level,), mpp_x=mpp, mpp_y=mpp, magnification=magnification)
    assert cell_of(info) == cell


def test_a_slide_beyond_all_sizes_gets_larger_cells() -> None:
    level = Level(0, 2**20, 2**20, 1.0, 256, 256)
    info: Any = SimpleNamespace(levels=(level,), mpp_x=0.5, mpp_y=0.5, magnification=None)
    assert (2**20 / cell_of(info)) ** 2 <= MAX_CELLS < (2**21 / cell_of(info)) ** 2


# --- both methods ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("colour", [GLASS, (255, 255, 255), (186, 186, 184), (228, 215, 224)])
def test_glass_alone_is_glass(method: str, colour: tuple[int, int, int]) -> None:
    found = tissue_in(pictured(glass(400, 500, colour)), method)
    # thresholds take the darkest of uneven light for tissue here and there
    assert found.mean() < {"network": 0.001, "otsu": 0.01}[method]


@pytest.mark.parametrize("method", METHODS)
def test_tissue_alone_is_tissue(method: str) -> None:
    light = section()
    everywhere = np.tile(np.concatenate([light, light[::-1]]), (2, 3, 1))
    tissue = everywhere.min(axis=2) < 0.9
    found = tissue_in(pictured(everywhere * 240), method)
    assert (tissue & ~dilated(found, 4)).sum() < 0.005 * tissue.sum()


def test_where_there_is_no_glass_its_colour_is_white() -> None:
    image = pictured(section() * 240)
    assert background_of(image, np.ones(image.shape[:2], np.bool_)) == (255, 255, 255)
    image[:50, :50] = (231, 225, 228)
    tissue = np.ones(image.shape[:2], np.bool_)
    tissue[10:40, 10:40] = False
    tissue[:, 119] = False  # a few cells that are not glass do not move the median
    assert background_of(image, tissue) == (231, 225, 228)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [pale, fat, mucus])
def test_faint_tissue_does_not_vanish(method: str, kind: Any) -> None:
    image, tissue = on_glass(kind())
    mask = dilated(tissue_in(pictured(image), method), DILATION_MICROMETRES[method] / 8)
    assert (tissue & ~mask).sum() <= 0.01 * tissue.sum()
    assert mask.mean() < 0.25


@pytest.mark.parametrize("method", METHODS)
def test_an_islet_of_a_hundred_micrometres_is_kept(method: str) -> None:
    image = glass(300, 300)
    image[140:153, 140:153] *= np.minimum(section()[20:33, 40:53], (0.9, 0.8, 0.88))
    found = tissue_in(pictured(image), method)
    assert dilated(found, 4)[140:153, 140:153].all()


@pytest.mark.parametrize("method", METHODS)
def test_one_small_grey_blue_piece_on_a_slide_is_found(method: str) -> None:
    with open_slide(data_slide("kidney-48-5.tif")) as slide:
        mask = find_tissue(slide, method, dilation_um=0)
    rows, columns = np.nonzero(mask.tissue)
    assert 20 <= len(rows) <= 80
    assert (np.ptp(rows), np.ptp(columns)) < (8, 12)


@pytest.mark.parametrize("method", METHODS)
def test_black_that_was_not_scanned_is_no_tissue_and_shifts_nothing(method: str) -> None:
    image = glass(400, 500)
    image[150:260, 300:420] *= section()
    alone = tissue_in(pictured(image), method)
    image[:, :150] = 0
    beside = tissue_in(pictured(image), method)
    assert not beside[:, :140].any()
    assert (alone != beside)[:, 200:].mean() < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_a_fluorescent_slide_is_kept_whole(method: str) -> None:
    rng = np.random.default_rng(0)
    image = np.abs(rng.normal(0, 6, (200, 300, 3)))
    image[50:120, 100:200, 1] += 120
    assert tissue_in(pictured(image), method).all()


def test_the_network_takes_pen_for_glass() -> None:
    image, tissue = on_glass(section(), (150, 300))
    y, x = np.mgrid[0:400, 0:500]
    stroke = ndimage.gaussian_filter((np.abs(x - 130 - 0.2 * y) < 8).astype(float), 1.0)
    image *= 1 - stroke[..., None] * np.array([0.9, 0.4, 0.5])
    found = tissue_in(pictured(image), "network")
    assert (found & (stroke > 0.5)).sum() < 0.1 * (stroke > 0.5).sum()
    assert (found & tissue).sum() > 0.98 * tissue.sum()


def write_made(path: Path, image: np.ndarray) -> Path:
    """An overview as a slide of 4 µm per pixel."""
    large = image.repeat(2, 0).repeat(2, 1)
    tifffile.imwrite(
        path, large, photometric="rgb", tile=(128, 128), compression="deflate",
        resolution=(2500, 2500), resolutionunit="CENTIMETER", metadata=None,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("method", METHODS)
def test_the_mask_of_a_slide_knows_its_margin_and_its_glass(tmp_path: Path, method: str) -> None:
    image = glass(300, 400, (220, 214, 218))
    image[100:210, 140:260] *= section()
    with open_slide(write_made(tmp_path / "made.tif", pictured(image))) as slide:
        bare = find_tissue(slide, method, dilation_um=0)
        mask = find_tissue(slide, method)
    assert (mask.cell, mask.method, mask.tissue.shape) == (2, method, (300, 400))
    assert np.abs(np.array(mask.background) - (220, 214, 218)).max() <= 4
    assert np.array_equal(mask.tissue, dilated(bare.tissue, DILATION_MICROMETRES[method] / 8))
    assert mask.all_glass(1.0, 0, 0, 100, 100)
    assert np.array_equal(mask.glass(2.0, 90, 0, 100, 300), ~mask.tissue[90:190, :300])
    assert np.array_equal(mask.glass(4.0, 0, 0, 150, 200), ~halves(mask.tissue))
    assert np.array_equal(find_tissue(slide_again(tmp_path), method).tissue, mask.tissue)


def halves(tissue: np.ndarray) -> np.ndarray:
    return tissue.reshape(150, 2, 200, 2).any((1, 3))


def slide_again(folder: Path) -> Any:
    return open_slide(folder / "made.tif")


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with open_slide(write_made(tmp_path / "made.tif", pictured(glass(64, 64)))) as slide:
        with pytest.raises(SettingsError, match="no tissue method 'magic'"):
            find_tissue(slide, "magic")
        for margin in (-1.0, math.nan, 1e9):
            with pytest.raises(SettingsError, match="margin"):
                find_tissue(slide, "otsu", dilation_um=margin)


# --- the shipped network --------------------------------------------------------------------------


def test_the_shipped_network_is_what_its_card_says() -> None:
    data = network.SHIPPED.read_bytes()
    card = (ROOT / "docs" / "tissue.md").read_text("utf-8")
    digest = hashlib.sha256(data).hexdigest()
    assert digest == network.SHA256
    assert f"`{digest}`" in card
    assert f"{len(data):,} bytes" in card
    assert len(data) <= 300_000


def test_the_shipped_network_holds_allowed_operators_only() -> None:
    graph = check_operators(network.SHIPPED.read_bytes(), network.OPERATORS, "tissue network")
    assert {node.op_type for node in graph.node} == network.OPERATORS


def test_another_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tissue.onnx"
    path.write_bytes(network.SHIPPED.read_bytes()[:-1])
    monkeypatch.setattr(network, "SHIPPED", path)
    network._runner.cache_clear()
    try:
        with pytest.raises(ModelError, match=re.escape(str(path))):
            tissue_in(pictured(glass(64, 64)), "network")
    finally:
        network._runner.cache_clear()


def test_the_network_says_the_same_again_and_wherever_tiles_fall() -> None:
    image = glass(200, 700)
    image[50:160, 450:570] *= section()
    image = pictured(image)
    found = tissue_in(image, "network")
    network._runner.cache_clear()
    assert np.array_equal(tissue_in(image, "network"), found)
    moved = tissue_in(np.ascontiguousarray(image[:, 64:]), "network")
    assert (moved != found[:, 64:]).mean() < 0.002


def test_without_onnxruntime_there_is_otsu() -> None:
    script = """
import sys
import numpy as np
import wsicodec.tissue
heavy = {"onnxruntime", "onnx", "numba", "zarr", "tifffile", "imagecodecs"} & set(sys.modules)
assert not heavy, heavy
sys.modules["onnxruntime"] = None
from wsicodec.errors import RuntimeMissingError
from wsicodec.tissue.finding import DILATION_MICROMETRES, background_of, tissue_in
image = np.full((50, 60, 3), 240, np.uint8)
image[10:30, 10:40] = (150, 60, 120)
assert tissue_in(image, "otsu")[12:28, 12:38].all()
try:
    tissue_in(image, "network")
except RuntimeMissingError as error:
    assert "otsu" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)


HELD = {  # image of sources that training never saw: most tissue lost, most glass kept
    "borda_lung-cc10_001": (0.02, 1.0),
    "borda_lung-prospc_001": (0.02, 1.0),
    "histoqc_coverslip_001": (0.02, 0.75),
    "histoqc_pen_001": (0.0, 0.3),
    "tupac_breast_002": (0.02, 0.4),
    "tupac_pen_004": (0.02, 0.6),
    "valis_ihc_001": (0.02, 0.4),
    "valis_ihc_005": (0.02, 0.4),
}


@pytest.mark.parametrize("name", HELD)
def test_little_tissue_is_lost_on_sections_never_trained_on(name: str) -> None:
    folder = DATA / "overviews"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set WSICODEC_DATA")
    most_lost, most_kept = HELD[name]
    found = figures(load_one(folder, name), "network")
    assert not found.lost > most_lost
    assert found.kept <= most_kept
