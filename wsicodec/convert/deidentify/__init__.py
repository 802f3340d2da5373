"""Takes out of a slide's metadata whatever could tell whose it is, and checks that it is gone.

Everything is an allow-list: what is known to be technical is kept in a form that is rebuilt here
(numbers, sizes, codecs), and all else is dropped, whether it looks harmless or not. A file that is
written from what ``deidentified`` returns holds

- the pixels, µm per pixel, magnification and colour profile;
- of the scanner's description: maker and version of its software, sizes, tile sizes, codec and
  quality of every step, AppMag, MPP; never names, dates, times, barcodes, identifiers, free text;
- of the other images the thumbnail, without Exif, XMP or comments, and where asked for the macro
  with its label's end made white. A label is never kept, nor an image of unknown content.

What writes the file must leave out besides: the source's path and name, its SHA-256 (whoever has
the source, or a list of digests of an archive, finds the patient by it), and all dates. The
history of a source must pass through ``neutral_history``: a file may claim anything there.

``secrets_of`` lists the values that were dropped and ``leaks`` looks for them in what was written,
so that a mistake is caught before the file gets its name.
"""

from wsicodec.convert.deidentify.cleaning import cleaned
from wsicodec.convert.deidentify.colourprofile import neutral_profile
from wsicodec.convert.deidentify.description import neutral_history, technical_description
from wsicodec.convert.deidentify.images import blanked_macro, stripped
from wsicodec.convert.deidentify.rules import NEUTRAL_NAME, Findings, deidentified
from wsicodec.convert.deidentify.search import leaks
from wsicodec.convert.deidentify.secrets import secrets_of

__all__ = [
    "NEUTRAL_NAME",
    "Findings",
    "blanked_macro",
    "cleaned",
    "deidentified",
    "leaks",
    "neutral_history",
    "neutral_profile",
    "secrets_of",
    "stripped",
    "technical_description",
]
