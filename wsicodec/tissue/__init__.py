"""Where a slide holds tissue and where glass, found on an overview of about 8 µm per pixel."""

from wsicodec.tissue.finding import METHODS, find_tissue
from wsicodec.tissue.mask import TissueMask

__all__ = ["METHODS", "TissueMask", "find_tissue"]
