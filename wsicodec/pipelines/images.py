"""Pixels of a batch where they were decoded: on the host or in a GPU's memory.

``Images`` speaks the array protocols of either place, so that torch, CuPy, JAX or NumPy take the
pixels without a copy.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

_CPU, _CUDA = 1, 2  # DLDeviceType
_UNSIGNED = 1  # DLDataTypeCode
_NAME = b"dltensor"


class _Tensor(ctypes.Structure):
    """DLTensor of DLPack 0.x and DLManagedTensor's other fields, in their order."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_lent: dict[int, tuple[Any, ...]] = {}
"""What capsules point to, by the address of their tensor: until its deleter is called."""


def _give_back(address: int) -> None:
    _lent.pop(address, None)


def _drop(capsule: int) -> None:
    # a consumer renames a capsule that it takes over; one that nobody took gives back itself
    api = _declare()
    if api.PyCapsule_IsValid(capsule, _NAME):
        _give_back(api.PyCapsule_GetPointer(capsule, _NAME))


_deleter, _destructor = _CALLBACK(_give_back), _CALLBACK(_drop)


def _declare() -> Any:
    api = ctypes.pythonapi
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    api.PyCapsule_IsValid.restype = ctypes.c_int
    api.PyCapsule_IsValid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return api


def capsule(owner: Any, address: int, shape: tuple[int, ...], device: tuple[int, int]) -> Any:
    """A DLPack capsule (0.x) of C-contiguous bytes at an address, which ``owner`` keeps alive.

    device: type and number, as DLPack counts them.
    """
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    tensor = _Tensor(
        data=address, device_type=device[0], device_id=device[1], ndim=len(shape),
        code=_UNSIGNED, bits=8, lanes=1, shape=sizes, strides=None, byte_offset=0,
        context=None, deleter=ctypes.cast(_deleter, ctypes.c_void_p),
    )  # fmt: skip
    at = ctypes.addressof(tensor)
    _lent[at] = (tensor, sizes, owner)
    return _declare().PyCapsule_New(at, _NAME, ctypes.cast(_destructor, ctypes.c_void_p))


class Images:
    """uint8 (N, height, width, 3) of a batch, C-contiguous; valid as long as this object or a view
    of it lives.

    array: NumPy's, or one with ``__cuda_array_interface__``. All work on it is done.
    """

    def __init__(self, array: Any, device: int | None = None) -> None:
        """device: number of the GPU that holds the array; None: it is NumPy's."""
        self.array, self.device = array, device
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        # one of both, so that hasattr() tells where the pixels are
        if name == "__cuda_array_interface__" and self.device is not None:
            return self.array.__cuda_array_interface__
        if name == "__array_interface__" and self.device is None:
            return self.array.__array_interface__
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def first(self, count: int) -> Images:
        """The pixels of the first tiles."""
        return Images(self.array[:count], self.device)

    def to_host(self, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """The pixels as a NumPy array: a copy of a GPU's, the array itself on the host."""
        if self.device is not None:
            found: npt.NDArray[np.uint8] = self.array.copy_to_host(out)
            return found
        if out is None:
            return np.asarray(self.array)
        out[...] = self.array
        return out

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0) if self.device is None else (_CUDA, self.device)

    def __dlpack__(self, *, stream: Any = None, **_versions: Any) -> Any:
        """stream: nothing to wait for, all work on the pixels is done."""
        if self.device is None:
            return self.array.__dlpack__()
        address = self.array.__cuda_array_interface__["data"][0]
        return capsule(self.array, address, self.shape, self.__dlpack_device__())
