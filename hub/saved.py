"""Files of weights, read again after they were written."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


def check_saved(files: Iterable[Path], weights: Mapping[str, Tensor]) -> None:
    """Whether the headers of safetensors files say that they hold these tensors, and no others.

    Raises:
        ValueError: naming a file that is not whole, or the first tensor that is missing or of another shape.
    """
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as reader:
                names = reader.keys()
                found |= {name: tuple(reader.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    held = {weights[name].data_ptr() for name in found if name in weights}
    wanted = {
        # The whole shape of what ZeRO-3 gives each process a part of.
        name: tuple(getattr(value, "ds_shape", value.shape))
        for name, value in weights.items()
        # Of tensors that share their memory, as tied embeddings do, one is enough.
        if name in found or value.data_ptr() not in held
    }
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(f"{name} is {wanted.get(name, 'nothing')}, but was saved as {found.get(name, 'nothing')}")
