"""Whole slides: ``convert`` one, ``verify`` a result, ``export`` it for everyone else's readers."""

from wsicodec.codec import PRESETS
from wsicodec.convert.export import export
from wsicodec.convert.pipeline import convert
from wsicodec.convert.plan import ConvertPlan, ConvertSettings, make_plan
from wsicodec.convert.results import ConvertProgress, ConvertReport
from wsicodec.convert.verify import VerifyReport, verify

__all__ = [
    "PRESETS",
    "ConvertPlan",
    "ConvertProgress",
    "ConvertReport",
    "ConvertSettings",
    "VerifyReport",
    "convert",
    "export",
    "make_plan",
    "verify",
]
