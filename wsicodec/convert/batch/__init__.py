"""Many slides: ``convert_batch`` a folder of them, with a journal of what became of each."""

from wsicodec.convert.batch.results import BatchProgress, BatchReport, Progress
from wsicodec.convert.batch.run import convert_batch, preview, summary
from wsicodec.convert.batch.settings import JOURNAL_NAME, BatchSettings

__all__ = [
    "JOURNAL_NAME",
    "BatchProgress",
    "BatchReport",
    "BatchSettings",
    "Progress",
    "convert_batch",
    "preview",
    "summary",
]
