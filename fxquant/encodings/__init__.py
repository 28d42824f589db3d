"""Encodings files in AIMET's three formats, written and read.

`Entry` is what all three say of one tensor; `formats` writes them, `parsing` reads them, `fitting` holds an entry to
the spec of the value that it is for.
"""

from fxquant.encodings.load import LoadedEncodings, load_encodings
from fxquant.encodings.save import VERSIONS, save_encodings

__all__ = ["VERSIONS", "LoadedEncodings", "load_encodings", "save_encodings"]
