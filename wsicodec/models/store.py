"""Where models come from: shipped with the package, the user's folder, or allowed from a file.

A model is found by the SHA-256 of its file alone. Names are for people.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsicodec.errors import ModelError, UnknownModelError
from wsicodec.models import container
from wsicodec.models.decoder import DecoderModel, load_decoder
from wsicodec.models.encoder import EncoderModel, load_encoder

DECODER_SUFFIX = ".wscm"
ENCODER_SUFFIX = ".encoder.wscm"
SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class ModelRecord:
    """A model that is installed.

    digest: SHA-256 of the decoder's file, hex. kmac_per_pixel: multiply-accumulates per pixel in
    thousands of a full decode. path: the decoder's file. encoder_path: None where only decoding
    is possible. card_path: description, None where there is none.
    """

    name: str
    digest: str
    kmac_per_pixel: float
    licence: str
    path: Path
    encoder_path: Path | None
    card_path: Path | None
    shipped: bool


def user_folder() -> Path:
    """Folder of the user's own models: ``WSICODEC_MODELS``, else the XDG data folder's."""
    if folder := os.environ.get("WSICODEC_MODELS"):
        return Path(folder)
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "wsicodec" / "models"


def models() -> tuple[ModelRecord, ...]:
    """All installed models, shipped ones first. Reads headers and digests, loads no network."""
    return _store.records()


def find_model(name_or_digest: str) -> ModelRecord:
    """The model of this name, or of this digest (8 hex digits or more); else UnknownModelError."""
    records = models()
    for record in records:
        if record.name == name_or_digest:
            return record
    if len(name_or_digest) >= 8:
        for record in records:
            if record.digest.startswith(name_or_digest.lower()):
                return record
    known = ", ".join(f"{r.name} ({r.digest[:8]})" for r in records) or "none"
    raise UnknownModelError(f"model {name_or_digest!r} is not installed; installed: {known}")


def decoder_of_prefix(prefix: bytes) -> DecoderModel:
    """The decoder whose digest starts with these four bytes, loaded once per process."""
    return _store.decoder(prefix)


def encoder_of(record: ModelRecord) -> tuple[DecoderModel, EncoderModel]:
    """Decoder and encoder of an installed model, loaded once per process."""
    return _store.encoder(record)


def allow_model(data: bytes) -> DecoderModel:
    """Let this process decode with a model that came from elsewhere, such as from a slide.

    The caller vouches for it; it is still parsed under caps and proved. Returns the decoder.
    """
    decoder = load_decoder(data)
    _store.add(decoder, data)
    return decoder


def allowed_models() -> tuple[tuple[str, bytes], ...]:
    """Digest (hex) and file of every model that ``allow_model`` got here, for ``take_over``."""
    return _store.allowed()


def take_over(allowed: Iterable[tuple[str, bytes]]) -> None:
    """Allow what another process of the same user was allowed, by its ``allowed_models``.

    Raises ModelError for a file that has not the digest that was said.
    """
    for digest, data in allowed:
        if hashlib.sha256(data).hexdigest() != digest:
            raise ModelError(f"model {digest[:8]} came as another model's bytes")
        allow_model(data)


def install_model(data: bytes) -> ModelRecord:
    """Put a decoder model into the user's folder, so that every process here decodes with it.

    The caller vouches for it; it is still parsed under caps and proved. Raises ModelError, OSError.
    """
    decoder = load_decoder(data)
    digest = decoder.digest.hex()
    for record in models():
        if record.digest == digest:
            return record
    folder = user_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # named by digest alone: the model's own name is a stranger's text
    path = folder / f"{digest[:16]}{DECODER_SUFFIX}"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _store.forget()
    return find_model(digest)


class _Store:
    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._records: tuple[ModelRecord, ...] | None = None
        self._scanned = ""
        self._decoders: dict[bytes, DecoderModel] = {}
        self._encoders: dict[str, EncoderModel] = {}
        self._allowed: dict[str, bytes] = {}

    def renew_lock(self) -> None:
        self._lock = threading.RLock()

    def records(self) -> tuple[ModelRecord, ...]:
        folder = str(user_folder())
        with self._lock:
            if self._records is None or self._scanned != folder:
                found = [*_scan(SHIPPED, True), *_scan(Path(folder), False)]
                seen: dict[str, ModelRecord] = {}
                for record in found:
                    seen.setdefault(record.digest, record)
                self._records, self._scanned = tuple(seen.values()), folder
            return self._records

    def forget(self) -> None:
        with self._lock:
            self._records = None

    def allowed(self) -> tuple[tuple[str, bytes], ...]:
        with self._lock:
            return tuple(self._allowed.items())

    def add(self, decoder: DecoderModel, data: bytes) -> None:
        # four bytes can be met by search: a stranger must not take a known model's place
        prefix = decoder.digest[:4]
        with self._lock:
            known = {bytes.fromhex(record.digest) for record in self.records()}
            if prefix in self._decoders:
                known.add(self._decoders[prefix].digest)
            if any(d[:4] == prefix and d != decoder.digest for d in known):
                raise ModelError(f"another model's digest starts with {prefix.hex()}, too")
            self._decoders.setdefault(prefix, decoder)
            self._allowed[decoder.digest.hex()] = data

    def decoder(self, prefix: bytes) -> DecoderModel:
        found = self._decoders.get(prefix)
        if found is not None:
            return found
        with self._lock:
            if prefix not in self._decoders:
                for record in self.records():
                    if bytes.fromhex(record.digest[:8]) == prefix:
                        decoder = load_decoder(record.path.read_bytes())
                        if decoder.digest.hex() != record.digest:
                            raise ModelError(f"{record.path}: changed since it was listed")
                        self._decoders[prefix] = decoder
                        break
                else:
                    known = ", ".join(r.digest[:8] for r in self.records()) or "none"
                    raise UnknownModelError(
                        f"tile was coded with model {prefix.hex()}, which is not installed "
                        f"(installed: {known}); put its file into {user_folder()}"
                    )
            return self._decoders[prefix]

    def encoder(self, record: ModelRecord) -> tuple[DecoderModel, EncoderModel]:
        decoder = self.decoder(bytes.fromhex(record.digest[:8]))
        with self._lock:
            if record.digest not in self._encoders:
                if record.encoder_path is None:
                    raise UnknownModelError(f"model {record.name!r} is installed for decoding only")
                encoder = load_encoder(record.encoder_path.read_bytes())
                if encoder.decoder_digest != decoder.digest:
                    raise ModelError(f"{record.encoder_path}: made for another decoder")
                with np.errstate(divide="ignore", over="ignore"):
                    gains = [1 / f.inverse_gain for f in decoder.factors]
                if not np.isfinite(gains).all():
                    raise ModelError(f"{record.path}: a latent's gain is infinite")
                self._encoders[record.digest] = encoder
            return decoder, self._encoders[record.digest]


def _number(value: object) -> float:
    """A header's number, which is for people alone; 0 where it is none."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if known and abs(value) < 1e9 else 0.0  # type: ignore[arg-type]


def _scan(folder: Path, shipped: bool) -> list[ModelRecord]:
    """Records of a folder's models."""
    if not folder.is_dir():
        return []
    records = []
    for path in sorted(folder.glob(f"*{DECODER_SUFFIX}")):
        if path.name.endswith(ENCODER_SUFFIX) or path.stat().st_size > container.MAX_BYTES:
            continue
        try:
            file = container.parse(path.read_bytes())
        except (ModelError, OSError) as error:
            # one broken file must not hide the models beside it
            warnings.warn(f"{path} is left out: {error}", RuntimeWarning, stacklevel=2)
            continue
        header = file.header
        stem = path.name.removesuffix(DECODER_SUFFIX)
        encoder, card = folder / (stem + ENCODER_SUFFIX), folder / f"{stem}.md"
        records.append(
            ModelRecord(
                name=str(header.get("name")),
                digest=file.digest.hex(),
                kmac_per_pixel=_number(header.get("kmac_per_pixel")),
                licence=str(header.get("licence", "unknown")),
                path=path,
                encoder_path=encoder if encoder.is_file() else None,
                card_path=card if card.is_file() else None,
                shipped=shipped,
            )
        )
    return records


_store = _Store()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_store.renew_lock)
