"""Takes the tensors of one layer by name, and refuses what does not fit in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from sailfish.base.errors import CheckpointError, UnsupportedModelError
from sailfish.checkpoint.files import shown
from sailfish.checkpoint.formats.tensors import FloatType, StoredTensor

FLOATS: tuple[FloatType, ...] = ("BF16", "F16", "F32")


class Parts:
    """The tensors of one layer, each to be taken once."""

    def __init__(self, tensors: Mapping[str, StoredTensor], where: str) -> None:
        """Name the layer's tensors by what follows its own name ("qweight", "scales", ...)."""
        self._tensors = dict(tensors)
        self.where = where

    def has(self, name: str) -> bool:
        """Say whether the tensor is there and was not taken yet."""
        return name in self._tensors

    def take(self, name: str, *dtypes: str) -> StoredTensor:
        """Return a tensor of one of these types; CheckpointError if it is absent or of another."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.where} lacks {name}", hint="download it again")
        tensor = self._tensors.pop(name)
        if tensor.dtype not in dtypes:
            raise CheckpointError(f"{self.where}: {name} is {tensor.dtype}, not {' or '.join(dtypes)}")
        return tensor

    def array(self, name: str, dtype: str, *shape: int) -> NDArray[Any]:
        """Return the array of a tensor of just this type and shape."""
        return self.shaped(name, self.take(name, dtype), *shape).array

    def matrix(self, name: str, dtype: str) -> tuple[NDArray[Any], int, int]:
        """Return an array of two axes with its sizes, neither of them 0."""
        array = self.take(name, dtype).array
        if array.ndim != 2 or 0 in array.shape:
            raise CheckpointError(f"{self.where}: {name} has shape {shown(list(array.shape))}, not two axes")
        return array, *array.shape

    def shaped(self, name: str, tensor: StoredTensor, *shape: int) -> StoredTensor:
        """Return the tensor if it has this shape."""
        if tensor.array.shape != shape:
            found, wanted = list(tensor.array.shape), list(shape)
            raise CheckpointError(f"{self.where}: {name} has shape {shown(found)}, not {shown(wanted)}")
        return tensor

    def floats(self, name: str, *shape: int) -> tuple[NDArray[Any], FloatType]:
        """Return the values of a float tensor of this shape in float32, and the type they were stored as."""
        tensor = self.shaped(name, self.take(name, *FLOATS), *shape)
        return tensor.floats(), next(dtype for dtype in FLOATS if dtype == tensor.dtype)

    def finish(self) -> None:
        """Refuse what no reader took."""
        if self._tensors:
            raise UnsupportedModelError(
                f"{self.where}: {shown(min(self._tensors))} is not read in this format"
            )
