"""Slide files: ``SlideReader`` opens them, ``write_slide`` writes pyramids of coded tiles."""

from wsicodec.slide.ometiff import CodedLevel, SlideMetadata, write_slide
from wsicodec.slide.reader import Level, SlideInfo, SlideReader
from wsicodec.slide.record import FileRecord, ModelId

__all__ = [
    "CodedLevel",
    "FileRecord",
    "Level",
    "ModelId",
    "SlideInfo",
    "SlideMetadata",
    "SlideReader",
    "write_slide",
]
