"""De-identification: what is planted in a slide is gone from what is written, all else is there."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import example, given
from hypothesis import strategies as st
from slides import DESCRIPTION, data_slide, tissue, write_svs

import wsicodec
from benchmarks.mosaic import (
    CMU,
    IN_DESCRIPTION,
    MACRO_LABEL,
    SECRETS,
    VENDOR_TAG,
    block_sums,
    build_mosaic,
    profile_tags,
    srgb_profile,
    with_profile_tag,
)
from wsicodec.bitstream import Mode, Tile, parse
from wsicodec.codec.transcoded import jpeg_of
from wsicodec.convert import ConvertSettings, convert
from wsicodec.convert.deidentify import (
    NEUTRAL_NAME,
    blanked_macro,
    cleaned,
    deidentified,
    leaks,
    neutral_history,
    neutral_profile,
    search,
    secrets_of,
    stripped,
    technical_description,
)
from wsicodec.errors import FormatError, SettingsError, SlideError, UnsupportedError
from wsicodec.slide.ometiff import CodedLevel, SlideMetadata, write_slide
from wsicodec.slide.opening import open_slide
from wsicodec.slide.protocol import AssociatedImage, SlideInfo, StoredImage
from wsicodec.slide.record import FileRecord

TECHNICAL = (
    "Aperio Image Library v12.0.15\r\n{width}x{height} [0,100 {inner}] (240x240) JPEG/YCC Q=70"
    "|AppMag = 20|MPP = 0.4990"
)


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mosaic under a name that is a secret itself."""
    folder = tmp_path_factory.mktemp("Ward-B-Smith")
    return build_mosaic(folder / "S21-004711-A3.svs", 3)


@pytest.fixture(scope="module")
def info(slide_file: Path) -> SlideInfo:
    with open_slide(slide_file) as slide:
        return slide.info


@pytest.fixture(scope="module")
def images(slide_file: Path) -> tuple[AssociatedImage, ...]:
    with open_slide(slide_file) as slide:
        return tuple(slide.read_associated(name) for name in slide.info.associated)


def _codings(text: str) -> list[bytes]:
    """Without the code under test: the plainest search there is."""
    return [text.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be")]


def _held(content: bytes) -> set[str]:
    """Places of SECRETS whose values are in some bytes."""
    return {
        place for place, text in SECRETS.items() if any(code in content for code in _codings(text))
    }


def _metadata(info: SlideInfo) -> SlideMetadata:
    return SlideMetadata(
        name=info.path.stem,
        mpp_x=info.mpp_x,
        mpp_y=info.mpp_y,
        magnification=info.magnification,
        description=info.description,
        icc_profile=info.icc_profile,
        acquisition_date=info.acquisition_date,
    )


def _info(path: str | Path = "slide.svs", **changes: Any) -> SlideInfo:
    with open_slide(CMU) as slide:
        return dataclasses.replace(slide.info, path=Path(path), **changes)


def _written(
    target: Path,
    metadata: SlideMetadata,
    associated: Sequence[AssociatedImage],
    layout: str = "subifd",
) -> bytes:
    """A file with one tile of pixels, made with the real writer."""
    tile = imagecodecs.jpeg8_encode(tissue(256, 256), level=80)
    record = FileRecord("1.0", "jpeg", 80, history=neutral_history(["jpeg q70"]))
    with target.open("wb+") as file:
        levels = [CodedLevel(250, 250, 256, iter([bytes(tile)]))]
        write_slide(file, levels, "jpeg", metadata, record, layout=layout, associated=associated)
    return target.read_bytes()


class TestPlanted:
    def test_every_secret_is_in_the_source(self, slide_file: Path) -> None:
        """Else nothing below could fail."""
        content = slide_file.read_bytes()
        assert _held(content) == set(SECRETS)
        for place, code in (
            ("vendor tag", "utf-16-le"),
            ("vendor tag", "utf-16-be"),
            ("Exif author", "utf-16-le"),
            ("ICC profile", "utf-16-be"),
        ):
            assert SECRETS[place].encode(code) in content
        with tifffile.TiffFile(slide_file) as file:
            tags = file.pages[0].tags
            assert tags["DateTime"].value == "2021:03:17 14:35:52"
            assert tags["XMP"].value
            assert VENDOR_TAG in tags

    def test_nothing_is_lost_in_the_plain_way(
        self, info: SlideInfo, images: tuple[AssociatedImage, ...], tmp_path: Path
    ) -> None:
        """Without de-identification the writer keeps what identifies: the tests see it."""
        content = _written(tmp_path / "a.tiff", _metadata(info), images)
        assert {*IN_DESCRIPTION, "ICC profile", "Exif author"} <= _held(content)

    @pytest.mark.parametrize("layout", ["subifd", "flat"])
    @pytest.mark.parametrize("macro", ["drop", "blank"])
    def test_no_secret_is_written(
        self,
        info: SlideInfo,
        images: tuple[AssociatedImage, ...],
        tmp_path: Path,
        macro: str,
        layout: str,
    ) -> None:
        metadata, kept, findings = deidentified(info, _metadata(info), images, macro=macro)
        content = _written(tmp_path / "a.tiff", metadata, kept, layout)
        assert not _held(content)
        for text in ("S21-004711", "Ward-B-Smith", "Mustermann", "2021-03-17", "2021:03:17"):
            assert not any(code in content for code in _codings(text))
        assert not leaks(tmp_path / "a.tiff", secrets_of(info))
        assert [image.name for image in kept] == ["thumbnail", "macro"][: 1 + (macro == "blank")]
        for text in json.dumps(findings.as_dict()), *findings.kinds:
            assert not any(value in text for value in SECRETS.values())

    def test_technical_facts_are_kept(
        self, info: SlideInfo, images: tuple[AssociatedImage, ...], tmp_path: Path
    ) -> None:
        metadata, kept, _ = deidentified(info, _metadata(info), images)
        _written(tmp_path / "a.tiff", metadata, kept)
        with open_slide(tmp_path / "a.tiff") as slide:
            clean = slide.info
        assert (clean.mpp_x, clean.mpp_y) == (0.499, 0.499)
        assert clean.magnification == 20
        assert clean.acquisition_date is None
        size = f"{info.levels[0].width}x{info.levels[0].height}"
        assert clean.description is not None
        assert clean.description.startswith("Aperio Image Library v12.0.15")
        assert f"[0,100 {size}] (240x240) JPEG/YCC Q=70" in clean.description
        assert clean.description.endswith("|AppMag = 20|MPP = 0.4990")
        assert clean.history == ("jpeg q70",)
        assert info.icc_profile is not None
        assert clean.icc_profile is not None
        before, after = profile_tags(info.icc_profile), profile_tags(clean.icc_profile)
        for name in (b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC", b"wtpt", b"chad"):
            assert before[name] == after[name]

    def test_findings_name_kinds(
        self, info: SlideInfo, images: tuple[AssociatedImage, ...]
    ) -> None:
        _, _, findings = deidentified(info, _metadata(info), images)
        assert {
            "user",
            "file name",
            "barcode",
            "title",
            "date of acquisition",
            "time of acquisition",
            "identity of the scanner",
            "unknown field of the description",  # "Patient Name": an unknown key may be a name
            "name of the slide",
            "label image",
            "macro image",
            "text of the colour profile",
        } <= set(findings.kinds)

    def test_what_is_clean_stays_as_it_is(self) -> None:
        profile = srgb_profile()
        clean = SlideMetadata(NEUTRAL_NAME, 0.25, 0.25, 40.0, None, profile)
        metadata, kept, findings = deidentified(_info(description=None), clean, [])
        assert (metadata, kept, findings.removed) == (clean, (), {})

    def test_wrong_macro_setting(self, info: SlideInfo) -> None:
        with pytest.raises(SettingsError, match="macro 'keep'"):
            deidentified(info, _metadata(info), [], macro="keep")

    def test_new_metadata_stays_out_until_allowed(self, info: SlideInfo) -> None:
        """Every field of SlideMetadata is known here: a new one needs a decision, and this list."""
        assert {field.name for field in dataclasses.fields(SlideMetadata)} == {
            "name",
            "mpp_x",
            "mpp_y",
            "magnification",
            "description",
            "icc_profile",
            "acquisition_date",
        }


class TestConvert:
    """The whole way, through the pipeline."""

    @pytest.mark.parametrize(
        "settings",
        [
            {"codec": "jpeg"},
            {"codec": "jpeg", "layout": "flat"},
            {"codec": "jpeg", "macro": "blank"},
            # the source's own streams, with a comment in the first tile
            {"codec": "copy"},
            {"codec": "jpegxl", "lossless_transcode": True},
        ],
        ids=str,
    )
    def test_file_holds_no_secret(
        self, slide_file: Path, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        target = tmp_path / "1.ome.tiff"
        chosen = ConvertSettings(deidentify=True, tissue="otsu", **settings)
        convert(slide_file, target, chosen)
        content = target.read_bytes()
        assert not _held(content)
        for text in (slide_file.name, slide_file.parent.name, "2021-03-17", "Mustermann"):
            assert not any(code in content for code in _codings(text))
        with open_slide(target) as slide:
            assert (slide.info.mpp_x, slide.info.magnification) == (0.499, 20)
            assert "label" not in slide.info.associated
            assert slide.info.record is not None
            assert slide.info.record.source is None  # a digest finds the source, and the patient

    def test_file_without_it_holds_them(self, slide_file: Path, tmp_path: Path) -> None:
        target = tmp_path / "1.ome.tiff"
        convert(slide_file, target, ConvertSettings(codec="jpeg", tissue="otsu"))
        assert set(IN_DESCRIPTION) <= _held(target.read_bytes())

    def test_zarr_holds_no_secret(self, slide_file: Path, tmp_path: Path) -> None:
        target = tmp_path / "1.ome.zarr"
        convert(slide_file, target, ConvertSettings(codec="jpeg", deidentify=True, tissue="otsu"))
        files = [path for path in target.rglob("*") if path.is_file()]
        assert files
        assert not _held(b"".join(path.read_bytes() for path in files))

    def test_history_of_a_stranger(self, slide_file: Path, tmp_path: Path) -> None:
        """A converted file may claim anything in its history."""
        with open_slide(slide_file) as slide:
            metadata = dataclasses.replace(_metadata(slide.info), description=None)
        tile = bytes(imagecodecs.jpeg8_encode(tissue(256, 256), level=80))
        record = FileRecord("1.0", "jpeg", 80, history=("jpeg q70 of Erika Mustermann", "jpeg q80"))
        with (tmp_path / "a.ome.tiff").open("wb+") as file:
            write_slide(file, [CodedLevel(250, 250, 256, iter([tile]))], "jpeg", metadata, record)
        settings = ConvertSettings(codec="jpeg", deidentify=True, tissue="otsu")
        convert(tmp_path / "a.ome.tiff", tmp_path / "b.ome.tiff", settings)
        assert b"Mustermann" in (tmp_path / "a.ome.tiff").read_bytes()
        assert b"Mustermann" not in (tmp_path / "b.ome.tiff").read_bytes()


# keys, values and separators as strangers write them; a value keeps a mark to look for
_MARK = "Zz9Secret"
_SPACES = st.sampled_from(["", " ", "  ", "\t", " \r\n", "\n"])
_FREE = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
_SEPARATORS = st.sampled_from(["|", " | ", "||", "\r\n|", "|\t", "| |", "|;"])


@st.composite
def _descriptions(draw: st.DrawFn) -> str:
    parts = [draw(st.sampled_from(["Aperio Image Library v11.2.1 ", "Aperio", "Aperio v9;"]))]
    parts.append(draw(st.sampled_from(["\r\n", "\n", ";", " "])))
    parts.append(draw(st.sampled_from(["100x200 (240x240) JPEG/RGB Q=30", "", f"{_MARK} 4x4"])))
    for _ in range(draw(st.integers(0, 6))):
        key = draw(st.sampled_from(["User", "AppMag", "MPP", "mpp", "Date", "Gamma", f"{_MARK}"]))
        value = draw(_FREE) + _MARK + draw(_FREE)
        equals = draw(st.sampled_from(["=", " = ", "= ", " ==", ":", ""]))
        parts.append(draw(_SEPARATORS) + draw(_SPACES) + key + equals + value)
    return "".join(parts)


class TestDescription:
    @given(_descriptions())
    @example(f"Aperio Image Library v1\r\n{_MARK}|MPP = 0.25{_MARK}")
    @example(f"Aperio|MPP = {_MARK}|MPP = 0.25")
    def test_no_value_survives_odd_separators(self, description: str) -> None:
        clean = technical_description(description) or ""
        assert _MARK not in clean
        # what is left is made of known words and numbers
        assert set(clean) <= set(
            "0123456789.-,()[]> \r\n;|=xvQAperioImageLibryMPPgJGRBEYCKDUVLZW/Tc5DX"
        )

    @given(st.text(max_size=200))
    def test_any_text(self, description: str) -> None:
        clean = technical_description("Aperio" + description) or "Aperio"
        assert clean.startswith("Aperio")
        assert technical_description(clean) in (clean, None)
        assert technical_description(description) is None or description.startswith("Aperio")

    @pytest.mark.parametrize(
        ("description", "expected"),
        [
            (None, None),
            ("", None),
            ("Philips DP v1.0", None),
            ('<?xml version="1.0"?><DataObject PIM_DP_SCANNER="x"/>', None),
            ("Aperio", None),
            (
                DESCRIPTION,
                "Aperio Image Library v11.2.1\r\n1000x1000 [0,0 450x333] (240x240) JPEG/RGB Q=70"
                "|AppMag = 40|MPP = 0.2527",
            ),
            (
                "Aperio Leica Biosystems GT450 v1.0.1\n120320x94210 [0,0 120320x94210] (256x256)"
                " J2K/YUV16 Q=91|MPP = 0.263|ScanScope ID = SS45002|AppMag = 40",
                "Aperio Leica Biosystems GT450 v1.0.1\r\n120320x94210 [0,0 120320x94210] (256x256)"
                " J2K/YUV16 Q=91|MPP = 0.263|AppMag = 40",
            ),
            # two steps, the thumbnail's arrow
            (
                "Aperio Image Library v11.0.37\r\n4443x3567 -> 956x768 - |MPP = 0.25",
                "Aperio Image Library v11.0.37|MPP = 0.25",
            ),
            ("Aperio Image Library v11\r\n4x4|AppMag = 20|AppMag = 4711", None),
            ("Aperio Image Library v11\r\n4x4|AppMag = nan|MPP = 1e9|MPP = -1", None),
        ],
        ids=str,
    )
    def test_known_forms(self, description: str | None, expected: str | None) -> None:
        clean = technical_description(description)
        if expected is None and description and "4x4" in description:
            first = "|AppMag = 20" if "20" in description else ""
            expected = f"Aperio Image Library v11\r\n4x4{first}"
        assert clean == expected

    def test_history(self) -> None:
        steps = ("jpeg q70", "jpeg2000 q30", "learned quality 70", "learned target_ssim 0.95")
        assert neutral_history(steps) == steps
        assert neutral_history(["jpeg q70 by Smith", "4711081500", "jpeg\nq70", ""]) == (
            "unknown",
            "unknown",
            "unknown",
            "unknown",
        )


class TestSecrets:
    def test_of_a_real_slide(self) -> None:
        with open_slide(CMU) as slide:
            found = secrets_of(slide.info)
        assert {
            "CPAPERIOCS",
            "CMU-1",
            "12/29/09",
            "2009-12-29",
            "2009:12:29",
            "20091229",
            "09:59:15",
            "b414003d-95c6-48b0-9369-8010ed517ba7",
            "1004486",
            CMU.name,
            CMU.stem,
        } <= found
        # what is kept, settings of the optics, numbers like any other
        assert not found & {"0.4990", "20", "USM Filter", "2040", "46920", "JPEG/RGB Q=30"}

    def test_of_the_mosaic(self, info: SlideInfo, slide_file: Path) -> None:
        found = secrets_of(info)
        assert {SECRETS[place] for place in IN_DESCRIPTION} <= found
        assert {slide_file.name, slide_file.stem, str(slide_file), "2021-03-17"} <= found

    @pytest.mark.parametrize(
        ("description", "secret"),
        [
            ('<A PatientName="Erika Mustermann" n="1"/>', "Erika Mustermann"),
            ("<A>Erika &amp; Max</A>", "Erika & Max"),
            ('{"patient": "Erika Mustermann", "n": 1}', "Erika Mustermann"),
            ("hamamatsu.Reference = 22-0815-III\nx = 1", "22-0815-III"),
            ("Patient: Erika Mustermann", "Erika Mustermann"),
            ("<A n='4'\n who = 'Erika \"M\" Mustermann'>x", 'Erika "M" Mustermann'),
            ('<OME UUID="urn:uuid:1"><Image Name="S21-4711"/></OME>', "S21-4711"),
            ('[{"a": ["Erika Mustermann", null, true]}]', "Erika Mustermann"),
            ('{"a": "Erika Mustermann", ', "Erika Mustermann"),
            ("scanned for Erika Mustermann", "scanned for Erika Mustermann"),
            ("Date = 2021-03-17T10:00:00", "20210317"),
            ("Date: 17.03.2021", "2021-03-17"),
            ("Aperio Image Library v11\r\nfor Mrs Smith|MPP = 0.25", "for Mrs Smith"),
            ("Aperio Image Library v11|written by Smith", "written by Smith"),
        ],
        ids=str,
    )
    def test_of_other_descriptions(self, description: str, secret: str) -> None:
        assert secret in secrets_of(_info(description=description))

    @pytest.mark.parametrize(
        ("value", "dates"),
        [
            ("17 March 2021", {"2021-03-17", "20210317", "17.03.2021", "17 Mar 2021"}),
            ("Mar. 17, 2021", {"2021-03-17", "2021:03:17", "03/17/2021"}),
            ("17-MAR-21", {"2021-03-17", "17-MAR-21"}),
            ("scan_20210317_1435", {"2021-03-17", "20210317", "17.03.2021"}),
            ("12/29/09", {"2009-12-29", "12/29/09", "29.12.2009"}),
            ("03/17/85", {"1985-03-17"}),
            ("2021_03_17", {"2021-03-17", "17/03/2021"}),
        ],
    )
    def test_dates_in_other_forms(self, value: str, dates: set[str]) -> None:
        for description in (f"Aperio Image Library v1|When = {value}", f"<A when='{value}'/>"):
            assert dates <= secrets_of(_info(description=description))

    def test_lines_of_a_value(self) -> None:
        found = secrets_of(_info(description="Aperio|Note = for Erika\r\nMustermann, ward 7"))
        assert {"for Erika", "Mustermann, ward 7"} <= found

    @pytest.mark.parametrize("unit", ["a", "a=", "a ", "<a", ">", "a='", '="', "12/", "jan", "{"])
    def test_time_follows_the_length(self, unit: str) -> None:
        """A description is a stranger's, and may be as long as its tag."""
        description = "<A " + unit * (300_000 // len(unit))
        started = time.process_time()
        secrets_of(_info(description=description))
        assert time.process_time() - started < 5

    def test_what_every_file_of_ours_holds_is_no_secret(self, tmp_path: Path) -> None:
        """A slide called "version.svs" can be converted too."""
        small = write_svs(tmp_path / "small.svs", tissue(300, 400), levels=1)
        words: set[str] = set()
        for name, settings in (
            ("a.ome.tiff", {"codec": "jpeg"}),
            ("b.ome.tiff", {"codec": "jpeg", "layout": "flat", "macro": "blank"}),
            ("c.ome.tiff", {"codec": "copy"}),
            ("d.ome.tiff", {"codec": "learned", "glass": "drop", "floor_ssim": 0.9}),
            ("e.ome.tiff", {"codec": "jpegxl", "lossless_transcode": True}),
            ("f.ome.zarr", {"codec": "learned", "glass": "fill"}),
        ):
            target = tmp_path / name
            source = small if settings["codec"] == "learned" else CMU
            convert(source, target, ConvertSettings(deidentify=True, tissue="otsu", **settings))
            for file in target.rglob("zarr.json") if target.is_dir() else [target]:
                content = bytearray(file.read_bytes())
                for start, end in search.tile_ranges(file):
                    content[start:end] = b"\0" * (end - start)
                # in XML and JSON; in binary parts there is anything
                found = re.findall(rb"""[ "</:]([A-Za-z][A-Za-z_-]{3,})(?=[ "=>/:,])""", content)
                words.update(word.decode() for word in found)
        assert {"version", "format", "SizeX", "multiscales"} <= words
        items = "|".join(f"{n} = {word}" for n, word in enumerate(sorted(words)))
        description = f"Aperio|{items}"
        secret = secrets_of(_info("x.svs", description=description, acquisition_date=None)) & words
        assert not secret

    def test_what_is_no_secret(self) -> None:
        """It would stop every conversion: words and numbers that files of ours hold anyway."""
        description = (
            "Aperio Image Library v11\r\n2220x2967|Title = abc|User = Image|A = 2220|B = 12345|"
            "C = 1.25|D = JPEG|E = 0.499"
        )
        info = _info("slide.svs", description=description, acquisition_date=None)
        assert secrets_of(info) == {str(Path("slide.svs").absolute()), "slide.svs"}

    def test_words_of_ome_xml(self, tmp_path: Path) -> None:
        """A file without a scanner's description has its OME-XML for one."""
        metadata = SlideMetadata("S21-004711-A3", 0.25, 0.25, 40.0)
        _written(tmp_path / "a.tiff", metadata, [])
        with tifffile.TiffFile(tmp_path / "a.tiff") as file:
            description = file.ome_metadata
        assert description is not None
        found = secrets_of(_info("b.tiff", description=description, acquisition_date=None))
        assert found == {"S21-004711-A3", "b.tiff", str(Path("b.tiff").absolute())}

    @given(st.text(max_size=300))
    def test_any_description(self, description: str) -> None:
        for start in ("", "Aperio|A = ", "<A b=", "{"):
            found = secrets_of(_info(description=start + description))
            assert all(len(text) >= 4 for text in found)

    def test_names_of_images(self) -> None:
        names = ("thumbnail", "Smith's slide", "image 3 of 5 x 6 pixels", "label of Smith")
        found = secrets_of(_info(associated=names, description=None))
        assert "Smith's slide" in found
        assert not {"thumbnail", "image 3 of 5 x 6 pixels"} & found


class TestLeaks:
    @pytest.mark.parametrize(
        "secret", ["Smith", "4711", 'A "q" & <b>', "Müller", "日本太郎", "a'bc"]
    )
    @pytest.mark.parametrize("code", ["utf-8", "utf-16-le", "utf-16-be"])
    @pytest.mark.parametrize("escape", ["plain", "json", "json ascii", "xml", "xml text"])
    def test_every_way_of_writing(
        self, tmp_path: Path, secret: str, code: str, escape: str
    ) -> None:
        text = {
            "plain": secret,
            "json": json.dumps(secret, ensure_ascii=False)[1:-1],
            "json ascii": json.dumps(secret)[1:-1],
            "xml": html.escape(secret),
            "xml text": html.escape(secret, quote=False),
        }[escape]
        path = tmp_path / "a.bin"
        for lead in (0, 1, 2, 3):
            path.write_bytes(b"\0" * lead + b"\x01:" + text.encode(code) + b";\0")
            assert leaks(path, [secret, "not there"]) == [secret]
        path.write_bytes(b"\1".join(bytes([byte]) for byte in text.encode(code)))
        assert leaks(path, [secret]) == []

    @pytest.mark.parametrize(
        "written",
        [
            "ERIKA MUSTERMANN",
            "erika mustermann",
            "Erika\nMustermann",
            "Erika\r\nMustermann",
            "Erika_Mustermann",
            "ERIKA^MUSTERMANN",
            "Erika%20Mustermann",
            "erika+mustermann",
            r"Erika\nMustermann",
        ],
    )
    @pytest.mark.parametrize("code", ["utf-8", "utf-16-le", "utf-16-be"])
    def test_other_case_and_other_spaces(self, tmp_path: Path, written: str, code: str) -> None:
        path = tmp_path / "a.bin"
        path.write_bytes(b"\x01:" + written.encode(code) + b"\0\0")
        secrets = ["Erika  Mustermann", "Max Mustermann"]
        assert leaks(path, secrets) == secrets[:1]

    def test_in_an_address(self, tmp_path: Path) -> None:
        path = tmp_path / "a.bin"
        path.write_bytes(quote("Müller & Söhne".upper(), "").encode())
        assert leaks(path, ["Müller & Söhne"]) == ["Müller & Söhne"]

    def test_across_the_borders_of_pieces(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.bin"
        secrets = ["Mustermann^Erika", "4711"]
        monkeypatch.setattr(search, "_CHUNK", 64)
        for start in range(40, 140):
            for secret in secrets:
                content = bytearray(b"." * 300)
                content[start : start + len(secret)] = secret.encode()
                path.write_bytes(content)
                assert leaks(path, secrets) == [secret]
                # a longer word is another, wherever the border lies
                content[start + len(secret)] = ord("8")
                path.write_bytes(content)
                assert leaks(path, secrets) == ([secret] if len(secret) > 6 else [])

    def test_short_ones_in_pixels_are_chance(self, tmp_path: Path) -> None:
        """Four bytes turn up in every few gigabytes of a compressed slide."""
        path = tmp_path / "a.tif"
        for description, expected in (("a slide", []), ("of 4711", ["4711"])):
            tile = b"\xff\xd8 4711 Mustermann^Erika"
            tifffile.imwrite(
                path,
                iter([tile]),
                shape=(16, 16, 3),
                dtype="uint8",
                tile=(16, 16),
                photometric="rgb",
                compression="jpeg",
                description=description,
                metadata=None,
            )
            assert leaks(path, ["4711"]) == expected
            assert leaks(path, ["Mustermann^Erika"]) == ["Mustermann^Erika"]
            assert leaks(path, ["4711", "Mustermann^Erika"]) == [*expected, "Mustermann^Erika"]

    def test_folder(self, tmp_path: Path) -> None:
        store = tmp_path / "a.zarr"
        (store / "0" / "c").mkdir(parents=True)
        (store / "zarr.json").write_text('{"by": "Smith"}')
        (store / "0" / "c" / "0").write_bytes(b". 4711 . Mustermann^Erika")
        (store / "0" / "Jones").write_bytes(b"")
        secrets = ["Smith", "4711", "Mustermann^Erika", "Jones", "Miller"]
        assert leaks(store, secrets) == ["Jones", "Mustermann^Erika", "Smith"]

    def test_missing_file_and_no_secrets(self, tmp_path: Path) -> None:
        with pytest.raises(SlideError, match="gone"):
            leaks(tmp_path / "gone.bin", ["Mustermann"])
        (tmp_path / "a.bin").write_bytes(b"abc")
        assert leaks(tmp_path / "a.bin", []) == []
        assert leaks(tmp_path / "a.bin", ["abc"]) == []  # too short to mean anything

    def test_memory_is_bounded(self, tmp_path: Path) -> None:
        import tracemalloc

        path = tmp_path / "a.bin"
        with path.open("wb") as file:
            for _ in range(48):
                file.write(np.random.default_rng(1).bytes(2**20))
            file.write(b"Mustermann^Erika")
        tracemalloc.start()
        try:
            assert leaks(path, ["Mustermann^Erika"]) == ["Mustermann^Erika"]
            assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
        finally:
            tracemalloc.stop()


def _desc(text: str) -> bytes:
    """A text of ICC version 2."""
    plain = text.encode() + b"\0"
    return b"desc" + bytes(4) + struct.pack(">I", len(plain)) + plain + bytes(78)


class TestProfile:
    @pytest.mark.parametrize(
        "text",
        [
            "sRGB IEC61966-2.1",
            "IEC 61966-2-1:1999 Default RGB colour space - sRGB",
            "Adobe RGB (1998)",
            "Copyright (c) 1998 Hewlett-Packard Company",
            "ISO 22028-2 ROMM RGB, D50",
            "Aperio ScanScope v1.0.1 AT2",
        ],
    )
    def test_texts_of_standards_stay(self, text: str) -> None:
        profile = with_profile_tag(srgb_profile(), b"dmdd", _desc(text))
        assert neutral_profile(profile) == profile

    @pytest.mark.parametrize(
        "text",
        [
            "SS12877XT",
            "Scanner SN 40021-77",
            "serial A7",
            "calibrated 2021-03-17",
            "17.03.2021",
            "10:22",
            "unit 1234567",
            "b414003d-95c6-48b0-9369-8010ed517ba7",
            "Leica of Erika Mustermann",
        ],
    )
    @pytest.mark.parametrize("wide", [False, True])
    def test_texts_that_tell(self, text: str, wide: bool) -> None:
        profile = srgb_profile(text)
        if not wide:
            profile = with_profile_tag(profile, b"dmdd", _desc(text))
        clean = neutral_profile(profile, {"Erika Mustermann"})
        assert clean is not None
        assert not any(code in clean for code in _codings(text))
        imagecodecs.cms_profile_validate(clean)
        before, after = profile_tags(profile), profile_tags(clean)
        assert set(after) == {*(name for name in before if name != b"dmdd"), b"desc", b"cprt"}
        for name in set(before) - {b"dmdd", b"desc", b"cprt"}:
            assert before[name] == after[name]
        assert neutral_profile(clean, {"Erika Mustermann"}) == clean

    def test_colours_are_the_same(self) -> None:
        """To every bit, by a colour management system that knows nothing of this."""
        profile = srgb_profile("SN 4711-0815")
        clean = neutral_profile(profile)
        assert clean is not None
        assert clean != profile
        other = bytes(imagecodecs.cms_profile("adobergb"))
        image = np.ascontiguousarray(tissue(64, 64))
        rgb = {"colorspace": "rgb", "outcolorspace": "rgb"}
        converted = [imagecodecs.cms_transform(image, p, other, **rgb) for p in (profile, clean)]
        assert not np.array_equal(converted[0], image)
        np.testing.assert_array_equal(*converted)

    def test_secret_in_a_tag_that_nobody_knows(self) -> None:
        profile = with_profile_tag(srgb_profile(), b"priv", b"data\0\0\0\0Mustermann")
        assert neutral_profile(profile) == profile
        clean = neutral_profile(profile, {"Mustermann"})
        assert clean is not None
        assert b"Mustermann" not in clean
        assert b"priv" not in profile_tags(clean)

    def test_dates(self) -> None:
        profile = bytearray(srgb_profile())
        profile[24:36] = struct.pack(">6H", 2021, 3, 17, 14, 35, 52)
        assert neutral_profile(bytes(profile)) == bytes(profile)
        clean = neutral_profile(bytes(profile), {"2021-03-17"})
        assert clean is not None
        assert clean[24:36] == struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
        date = b"dtim" + bytes(4) + struct.pack(">6H", 2021, 3, 17, 14, 35, 52)
        clean = neutral_profile(with_profile_tag(srgb_profile(), b"calt", date))
        assert clean is not None
        assert b"calt" not in profile_tags(clean)

    def test_real_profile_of_a_slide(self) -> None:
        with open_slide(data_slide("tcga-cr-7395-01a-01-ts1.svs")) as slide:
            profile = slide.info.icc_profile
            assert profile is not None
            assert neutral_profile(profile, secrets_of(slide.info)) == profile

    def test_what_is_no_profile(self) -> None:
        profile = srgb_profile("SN 4711-0815")
        assert neutral_profile(b"") is None
        assert neutral_profile(bytes(range(256)) * 9) is None
        for length in range(0, len(profile), 7):
            assert neutral_profile(profile[:length]) is None
        broken = bytearray(profile)
        broken[128:132] = b"\xff\xff\xff\xff"
        assert neutral_profile(bytes(broken)) is None

    @given(st.binary(max_size=400), st.integers(0, 700))
    def test_any_bytes(self, data: bytes, place: int) -> None:
        profile = bytearray(srgb_profile("SN 4711-0815"))
        profile[place : place + len(data)] = data
        clean = neutral_profile(bytes(profile), {"Mustermann"})
        assert clean is None or clean == bytes(profile) or profile_tags(clean)


class TestTiles:
    """Compressed tiles that are copied: what is more than picture is taken out, or refused."""

    def test_jpeg_segments_of_unknown_purpose(self) -> None:
        stream = bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(tissue(64, 64)), level=80))
        assert imagecodecs.jpeg8_decode(cleaned(7, stream)).shape == (64, 64, 3)
        planted = stream[:2] + b"\xff\xf3\x00\x0cMustermann" + stream[2:]
        with pytest.raises(UnsupportedError, match="ff f3"):
            cleaned(7, planted)

    def test_segments_that_decoders_skip(self) -> None:
        """A number of lines that is a name; segments that no decoder of pictures knows."""
        image = np.ascontiguousarray(tissue(64, 64))
        stream = bytes(imagecodecs.jpeg8_encode(image, level=80))
        planted = stream[:-2] + b"\xff\xdc\x00\x0cMustermann" + stream[-2:]
        with pytest.raises(UnsupportedError, match="ff dc"):
            cleaned(7, planted)
        stream = bytes(imagecodecs.jpeg2k_encode(image, level=0, codecformat="j2k"))
        at = stream.index(b"\xff\x52")
        planted = stream[:at] + b"\xff\x6f\x00\x0cMustermann" + stream[at:]
        np.testing.assert_array_equal(imagecodecs.jpeg2k_decode(planted), image)
        with pytest.raises(UnsupportedError, match="ff 6f"):
            cleaned(33005, planted)

    @pytest.mark.parametrize("known_length", [True, False])
    def test_comment_in_a_tile_part(self, known_length: bool) -> None:
        image = np.ascontiguousarray(tissue(64, 64))
        stream = bytes(imagecodecs.jpeg2k_encode(image, level=0, codecformat="j2k"))
        start = stream.index(b"\xff\x90")
        comment = b"\xff\x64\x00\x0e\0\1Mustermann"
        length = int.from_bytes(stream[start + 6 : start + 10]) + len(comment)
        planted = (
            stream[: start + 6]
            + (length if known_length else 0).to_bytes(4)
            + stream[start + 10 : start + 12]
            + comment
            + stream[start + 12 :]
            + b"Mustermann"
        )
        np.testing.assert_array_equal(imagecodecs.jpeg2k_decode(planted), image)
        clean = cleaned(33005, planted)
        assert b"Mustermann" not in clean
        assert clean[-2:] == b"\xff\xd9"
        np.testing.assert_array_equal(imagecodecs.jpeg2k_decode(clean), image)
        assert cleaned(33005, clean) == clean

    def test_broken_tile_parts(self) -> None:
        image = np.ascontiguousarray(tissue(64, 64))
        stream = bytes(imagecodecs.jpeg2k_encode(image, level=0, codecformat="j2k"))
        start = stream.index(b"\xff\x90")
        for length in (1, 13, 2**32 - 1):
            broken = stream[: start + 6] + length.to_bytes(4) + stream[start + 10 :]
            with pytest.raises(FormatError, match="JPEG-2000"):
                cleaned(33005, broken)

    def test_chunks_that_no_flag_announces(self) -> None:
        """WebP says in VP8X what follows; nobody has to."""
        stream = bytes(imagecodecs.webp_encode(np.ascontiguousarray(tissue(64, 64))))
        body = stream[8:] + b"EXIF\x0a\0\0\0Mustermann"
        planted = b"RIFF" + len(body).to_bytes(4, "little") + body
        with pytest.raises(UnsupportedError, match="metadata cannot be removed"):
            cleaned(50001, planted)
        assert cleaned(50001, stream + b"Mustermann") == stream

    @pytest.mark.parametrize("kind", [b"JXL ", b"ftyp", b"jxll", b"jxlc", b"jxlp", b"xml "])
    def test_boxes_behind_a_codestream(self, kind: bytes) -> None:
        """Decoders of JPEG XL have seen enough by then, whatever the box says it is."""
        image = np.ascontiguousarray(tissue(64, 64))
        stream = bytes(imagecodecs.jpegxl_encode(image, usecontainer=True))
        assert cleaned(50002, stream) == stream
        planted = stream + b"\0\0\0\x12" + kind + b"Mustermann"
        np.testing.assert_array_equal(imagecodecs.jpegxl_decode(planted), image)
        with pytest.raises(UnsupportedError, match="metadata cannot be removed"):
            cleaned(50002, planted)
        with pytest.raises(FormatError, match="JPEG XL box"):
            cleaned(50002, planted[:-1])

    def test_codestream_in_parts(self) -> None:
        image = np.ascontiguousarray(tissue(64, 64))
        whole = bytes(imagecodecs.jpegxl_encode(image, usecontainer=True))
        start, code = whole[:32], bytes(imagecodecs.jpegxl_encode(image))
        parts = [(0, code[:500]), (1, code[500:900]), (1 << 31 | 2, code[900:])]
        boxes = [
            (12 + len(data)).to_bytes(4) + b"jxlp" + number.to_bytes(4) + data
            for number, data in parts
        ]
        stream = b"".join([start, b"\0\0\0\x09jxll\x05", *boxes])
        np.testing.assert_array_equal(imagecodecs.jpegxl_decode(stream), image)
        assert cleaned(50002, stream) == stream
        with pytest.raises(UnsupportedError, match="metadata cannot be removed"):
            cleaned(50002, stream + boxes[1])
        with pytest.raises(UnsupportedError, match="metadata cannot be removed"):
            cleaned(50002, start)

    def test_streams_inside_our_own_tiles(self) -> None:
        """A tile may hold a stranger's JPEG, as it is or transcoded; what unfolds counts, too."""
        image = np.ascontiguousarray(tissue(64, 64))
        stream = bytes(imagecodecs.jpeg8_encode(image, level=80))
        planted = stream[:2] + b"\xff\xfe\x00\x0cMustermann" + stream[2:]
        packed = bytes(imagecodecs.jpegxl_encode_jpeg(planted))
        boxed = bytes(imagecodecs.jpegxl_encode(image, usecontainer=True))
        boxed += b"\0\0\0\x12xml Mustermann"
        for mode, payload in ((Mode.JPEG, planted), (Mode.TRANSCODED, packed)):
            tile = Tile(mode, 64, 64, payload)
            clean = cleaned(60642, tile.pack())
            np.testing.assert_array_equal(wsicodec.decode(clean), wsicodec.decode(tile.pack()))
            found = parse(clean)
            jpeg = jpeg_of(found) if mode is Mode.TRANSCODED else found.payload
            assert jpeg == stream
            assert cleaned(60642, clean) == clean
        with pytest.raises(UnsupportedError, match="metadata cannot be removed"):
            cleaned(60642, Tile(Mode.JPEGXL, 64, 64, boxed).pack())
        constant = Tile(Mode.CONSTANT, 64, 64, b"abc").pack()
        assert cleaned(60642, constant) == constant


class TestImages:
    def test_stored_thumbnail_decodes_alike(self, images: tuple[AssociatedImage, ...]) -> None:
        """Exif, XMP and comments are gone, every pixel is there."""
        (thumbnail,) = (image for image in images if image.name == "thumbnail")
        stored = thumbnail.stored
        assert stored is not None
        assert b"Exif" in stored.segments[0]
        bare = stripped(stored)
        assert bare is not None
        joined = b"".join(bare.segments)
        assert not _held(joined)
        assert b"Exif" not in joined
        assert bare.segments[1:] == stored.segments[1:]
        for before, after in zip(stored.segments, bare.segments, strict=True):
            tables = {"tables": stored.jpegtables, "colorspace": 2, "outcolorspace": 2}
            np.testing.assert_array_equal(
                imagecodecs.jpeg8_decode(before, **tables),
                imagecodecs.jpeg8_decode(after, **tables),
            )

    @pytest.mark.parametrize("colours", ["rgb", "ycbcr"])
    def test_bytes_behind_the_end(self, colours: str) -> None:
        image = np.ascontiguousarray(tissue(64, 64))
        stream = bytes(
            imagecodecs.jpeg8_encode(image, level=90, colorspace="rgb", outcolorspace=colours)
        )
        bare = stripped(_stored(stream + b"Mustermann", stream[:2] + b"\xff\xd9Mustermann"))
        assert bare is not None
        assert b"Mustermann" not in bare.segments[0] + (bare.jpegtables or b"")
        np.testing.assert_array_equal(
            imagecodecs.jpeg8_decode(bare.segments[0]), imagecodecs.jpeg8_decode(stream)
        )

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"II*\0",
            b"\xff\xd8\xff",
            b"\xff\xd8\xff\xf3\x00\x08Smith!\xff\xd9",
            b"\xff\xd8Smith",
        ],
    )
    def test_what_is_no_jpeg_is_coded_anew(self, content: bytes) -> None:
        assert stripped(_stored(content)) is None
        assert stripped(None) is None

    def test_other_codecs_are_coded_anew(self, images: tuple[AssociatedImage, ...]) -> None:
        (label,) = (image for image in images if image.name == "label")
        assert label.stored is not None
        assert stripped(label.stored) is None

    @given(st.binary(max_size=200))
    def test_any_stream(self, data: bytes) -> None:
        bare = stripped(_stored(b"\xff\xd8" + data))
        assert bare is None or bare.segments[0].startswith(b"\xff\xd8")

    def test_unknown_images_are_dropped(self, info: SlideInfo) -> None:
        pixels = np.full((30, 40, 3), 200, np.uint8)
        given_images = [
            AssociatedImage(name, pixels)
            for name in ("Slide Label", "BARCODE", "overview", "image 5", "Erika Mustermann")
        ]
        _, kept, findings = deidentified(info, _metadata(info), given_images)
        assert kept == ()
        assert findings.removed["label image"] == 2
        assert findings.removed["unknown image"] == 2
        assert not any("Mustermann" in kind for kind in findings.kinds)

    def test_thumbnail_that_shows_more_than_the_scan(
        self, info: SlideInfo, images: tuple[AssociatedImage, ...], slide_file: Path
    ) -> None:
        with open_slide(slide_file) as slide:
            last = slide.levels[-1]
            overview = slide.read_region(last.index, 0, 0, last.height, last.width)
        by_name = {image.name: image.pixels for image in images}
        # the macro, under the name of the thumbnail: other proportions
        assert self._kept(info, by_name["macro"], None) == ()
        # the label of the scan's proportions: other contents
        ratio = info.levels[0].width / info.levels[0].height
        label = by_name["label"][: int(387 / ratio)]
        assert self._kept(info, label, None) == ("thumbnail",)
        assert self._kept(info, label, overview) == ()
        assert self._kept(info, by_name["thumbnail"], overview) == ("thumbnail",)
        # a label pasted over a corner
        pasted = by_name["thumbnail"].copy()
        pasted[: pasted.shape[0] // 3, : pasted.shape[1] // 4] = (20, 20, 120)
        assert self._kept(info, pasted, overview) == ()

    def _kept(
        self, info: SlideInfo, pixels: np.ndarray, overview: np.ndarray | None
    ) -> tuple[str, ...]:
        image = AssociatedImage("thumbnail", pixels)
        _, kept, _ = deidentified(info, _metadata(info), [image], overview=overview)
        return tuple(image.name for image in kept)

    def test_real_thumbnail_is_kept(self) -> None:
        with open_slide(CMU) as slide:
            thumbnail = slide.read_associated("thumbnail")
            small = slide.read_region(0, 0, 0, slide.levels[0].height, slide.levels[0].width)
            assert self._kept(slide.info, thumbnail.pixels, small[::4, ::4]) == ("thumbnail",)


def _stored(stream: bytes, tables: bytes | None = None) -> StoredImage:
    return StoredImage(
        height=64,
        width=64,
        compression=7,
        photometric=6,
        segments=(stream,),
        tile=None,
        rows_per_strip=64,
        jpegtables=tables,
    )


class TestMacro:
    @pytest.mark.parametrize("turn", range(8))
    def test_label_is_white_whichever_way_it_lies(
        self, images: tuple[AssociatedImage, ...], turn: int
    ) -> None:
        (macro,) = (image for image in images if image.name == "macro")

        def turned(image: np.ndarray) -> np.ndarray:
            flipped = image[:, ::-1] if turn >= 4 else image
            return np.rot90(flipped, turn % 4)

        # marks where the label is and nowhere else: all of them must go
        where = np.zeros(macro.pixels.shape[:2], bool)
        where[:, :MACRO_LABEL] = True
        before = turned(macro.pixels).copy()
        clean = blanked_macro(before)
        assert clean is not None
        assert clean.shape == before.shape
        assert (clean[turned(where)] == 255).all()
        np.testing.assert_array_equal(before, turned(macro.pixels))  # the input is left alone
        # the sections, right of the middle, are still there
        where[:] = False
        where[:, 580:] = True
        np.testing.assert_array_equal(clean[turned(where)], before[turned(where)])

    def test_marks_at_both_ends(self, images: tuple[AssociatedImage, ...]) -> None:
        """Writing at the other end may be the label: unsure, both go."""
        (macro,) = (image for image in images if image.name == "macro")
        pixels = macro.pixels.copy()
        pixels[200:203, 1200:1203] = 0
        clean = blanked_macro(pixels)
        assert clean is not None
        assert (clean[:, :MACRO_LABEL] == 255).all()
        assert (clean[:, 760:] == 255).all()

    def test_faint_label_and_a_section_at_the_other_end(self) -> None:
        """Pencil on a frosted end is fainter than a stain: the end that looks clean may be it."""
        pixels = np.full((100, 300, 3), 230, np.uint8)
        pixels[40:45, 20:60] = 215
        pixels[30:60, 260:290] = (160, 60, 120)
        clean = blanked_macro(pixels)
        assert clean is not None
        assert (clean[:, :126] == 255).all()

    def test_no_marks_at_all(self) -> None:
        clean = blanked_macro(np.full((100, 300, 3), 230, np.uint8))
        assert clean is not None
        assert (clean[:, :126] == 255).all()
        assert (clean[:, 174:] == 255).all()
        assert (clean[:, 130:170] == 230).all()

    @pytest.mark.parametrize("shape", [(100, 100), (100, 150), (100, 500), (1, 1), (500, 100)])
    def test_not_of_a_whole_glass(self, shape: tuple[int, int]) -> None:
        assert blanked_macro(np.full((*shape, 3), 230, np.uint8)) is None

    def test_real_macro(self) -> None:
        with open_slide(CMU) as slide:
            clean = blanked_macro(slide.read_associated("macro").pixels)
        assert clean is not None
        assert (clean[:, : int(0.42 * 1280)] == 255).all()

    def test_dropped_when_it_cannot_be_told(self, info: SlideInfo) -> None:
        image = AssociatedImage("macro", np.full((100, 100, 3), 230, np.uint8))
        _, kept, findings = deidentified(info, _metadata(info), [image], macro="blank")
        assert kept == ()
        assert findings.removed["macro image"] == 1


class TestMosaic:
    """The slide that all this is tried on is like a scanner's."""

    def test_levels_agree(self, slide_file: Path) -> None:
        """Level 1 is the area average of the decoded level 0, coded once; level 2 likewise."""
        with tifffile.TiffFile(slide_file) as file:
            level0, level1, level2 = (level.asarray() for level in file.series[0].levels)
        whole = level0[: level1.shape[0] * 4, : level1.shape[1] * 4]
        sums = block_sums(np.ascontiguousarray(whole))
        whole = sums[: level2.shape[0] * 4, : level2.shape[1] * 4]
        exact = block_sums(np.ascontiguousarray(whole))
        for coded, mean in ((level1, sums / 16), (level2, exact / 256)):
            # JPEG keeps the means of its blocks, up to the step of the first coefficient
            rows, columns = coded.shape[0] // 16, coded.shape[1] // 16
            blocks = (coded - mean)[: rows * 16, : columns * 16].reshape(rows, 16, columns, 16, 3)
            assert np.abs(blocks.mean((1, 3))).max() < 4
            assert np.abs(blocks.mean((1, 3))).mean() < 1

    @pytest.mark.parametrize("settings", [{}, {"photometric": "rgb", "tile_size": 256}], ids=str)
    def test_openslide_reads_it(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        import openslide

        path = build_mosaic(tmp_path / "a.svs", 1, **settings)
        pixels = tifffile.imread(path, key=0)
        with openslide.OpenSlide(path) as slide:
            assert slide.properties["openslide.vendor"] == "aperio"
            assert float(slide.properties["openslide.mpp-x"]) == 0.499
            assert slide.properties["openslide.objective-power"] == "20"
            assert slide.properties["aperio.User"] == SECRETS["User"]
            assert set(slide.associated_images) == {"thumbnail", "label", "macro"}
            assert slide.level_count == 3
            assert slide.dimensions == pixels.shape[1::-1]
            assert slide.color_profile is not None
            region = np.asarray(slide.read_region((100, 200), 0, (300, 400)))[..., :3]
        difference = np.abs(region.astype(int) - pixels[200:600, 100:400])
        assert difference.mean() < 1  # of two JPEG decoders

    @pytest.mark.parametrize("glass", [0.0, 0.3, 1.0])
    def test_glass_is_as_asked(self, tmp_path: Path, glass: float) -> None:
        path = build_mosaic(tmp_path / "a.svs", 0.8, glass=glass, secrets=None)
        with tifffile.TiffFile(path) as file:
            bright = file.pages[2].asarray().min(-1) > 225
        # lumina and holes within the sections are bright too
        whole = build_mosaic(tmp_path / "b.svs", 0.8, glass=0.0, secrets=None)
        with tifffile.TiffFile(whole) as file:
            lumina = (file.pages[2].asarray().min(-1) > 225).mean()
        assert lumina < 0.8
        assert bright.mean() == pytest.approx(glass + (1 - glass) * lumina, abs=0.06)
        assert not _held(path.read_bytes())
        with open_slide(path) as slide:
            assert slide.info.icc_profile == srgb_profile()
