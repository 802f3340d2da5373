"""Slide files: ``open_slide`` opens them, ``write_slide`` writes pyramids of coded tiles."""

from wsicodec.slide.ometiff import CodedLevel, SlideMetadata, write_slide
from wsicodec.slide.opening import open_slide
from wsicodec.slide.protocol import AssociatedImage, Level, SlideInfo, SlideReader
from wsicodec.slide.record import FileRecord, ModelId

__all__ = [
    "AssociatedImage",
    "CodedLevel",
    "FileRecord",
    "Level",
    "ModelId",
    "SlideInfo",
    "SlideMetadata",
    "SlideReader",
    "open_slide",
    "write_slide",
]
