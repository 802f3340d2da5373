"""Everything wsicodec raises on purpose.

WsicodecError
├── FormatError (ValueError)          bytes or a file break the format
│   ├── TruncatedError                fewer bytes than the header promises
│   └── ChecksumError                 the bytes changed after they were written
├── LimitError (ValueError)           a size beyond what the format or the settings allow
├── UnsupportedError (ValueError)     valid input that this codec does not take (dtype, shape …)
├── UnknownModelError (LookupError)   no model with this digest is installed
├── ModelError (ValueError)           a model file breaks its format or fails its proof
├── RuntimeMissingError (ImportError) an optional library is not installed
├── SettingsError (ValueError)        an argument out of its range
├── SlideError (OSError)              a slide cannot be read or written
└── VerifyError (RuntimeError)        a file does not hold what it promises
"""

from __future__ import annotations


class WsicodecError(Exception):
    """Root of all errors raised by wsicodec."""


class FormatError(WsicodecError, ValueError):
    """Bytes break the tile or file format."""


class TruncatedError(FormatError):
    """Fewer bytes than the header promises."""


class ChecksumError(FormatError):
    """The checksum does not match: the bytes changed after they were written."""


class LimitError(WsicodecError, ValueError):
    """A size beyond what the format or the settings allow."""


class UnsupportedError(WsicodecError, ValueError):
    """Valid input that this codec does not take."""


class UnknownModelError(WsicodecError, LookupError):
    """No model with the digest that a tile names is installed or allowed."""


class ModelError(WsicodecError, ValueError):
    """A model file breaks its format, an operator rule or an integer proof."""


class RuntimeMissingError(WsicodecError, ImportError):
    """An optional library is missing; the message holds the install line."""


class SettingsError(WsicodecError, ValueError):
    """An argument is out of its range."""


class SlideError(WsicodecError, OSError):
    """A slide cannot be read or written. ``str()`` says which file and why."""


class VerifyError(WsicodecError, RuntimeError):
    """A written file does not hold what it promises."""
