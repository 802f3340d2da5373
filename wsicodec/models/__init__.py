"""Model files, their proofs, and the store that finds them by digest."""

from wsicodec.models.store import ModelRecord, find_model, models

__all__ = ["ModelRecord", "find_model", "models"]
