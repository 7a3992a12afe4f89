"""MNIST in its own idx format: each image a document, whose bytes are its pixels, row after row.

Held out are the images of the test file, or "valid", the last of the training images, 5,000 of 60,000, which are never
trained on. Source: "Gradient-Based Learning Applied to Document Recognition", LeCun et al., 1998.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from training.config import DataConfig
from training.data_folder import named_file
from training.errors import DataError
from training.sources import Document, read_bytes

_FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_FOLDERS = ("mnist/", "")
_SUFFIXES = (".xz", ".gz", "")
_MAGIC = bytes([0, 0, 8, 3])  # unsigned bytes in three dimensions
_HEADER = 16  # bytes: this number, and the three sizes
_VALID = 12  # one training image in so many is held out


class Images(NamedTuple):
    """Training and held-out images.

    Attributes:
        train: uint8 [N rows columns]; 0 is the background.
        held_out: uint8 [M rows columns].
    """

    train: UInt8[np.ndarray, "N rows columns"]
    held_out: UInt8[np.ndarray, "M rows columns"]

    def documents(self) -> tuple[list[Document], list[Document]]:
        """Training and held-out images, each as the bytes of its pixels."""
        train, held_out = (
            [Document(f"{name}/{number}", image.tobytes()) for number, image in enumerate(images)]
            for name, images in zip(self._fields, self, strict=True)
        )
        return train, held_out


def read_mnist(config: DataConfig) -> Images:
    """The images that the settings train on and hold out.

    Raises:
        DataError: a file is missing or damaged, has too few images, or images of another size than the other file.
    """
    train, valid = _split(*_read(config, "train"))
    if config.held_out == "valid":
        return Images(train, valid)
    test, path = _read(config, "test")
    if test.shape[1:] != train.shape[1:]:
        raise DataError(
            f"{path}: images of {_size(test.shape[1:])} pixels, where those to train on have {_size(train.shape[1:])}"
        )
    return Images(train, test)


def read_images(path: Path) -> UInt8[np.ndarray, "N rows columns"]:
    """The images of an idx file, decompressed if it ends in .gz or .xz.

    Raises:
        DataError: it cannot be read, holds no images, or more or fewer bytes than it says.
    """
    contents = read_bytes(path)
    if contents[: len(_MAGIC)] != _MAGIC:
        begins = contents[: len(_MAGIC)].hex(" ") or "nothing"
        raise DataError(f"{path}: not an idx file of images: it begins with {begins}, not with {_MAGIC.hex(' ')}")
    if len(contents) < _HEADER:
        raise DataError(f"{path}: cut off after {len(contents)} bytes, within its header of {_HEADER}")
    shape = tuple(np.frombuffer(contents, ">u4", 3, len(_MAGIC)).tolist())
    if 0 in shape:
        raise DataError(f"{path}: no images in it: it says {shape[0]} of {_size(shape[1:])} pixels")
    if len(contents) != _HEADER + math.prod(shape):
        raise DataError(
            f"{path}: damaged: {shape[0]:,} images of {_size(shape[1:])} pixels take {_HEADER + math.prod(shape):,}"
            f" bytes, it has {len(contents):,}"
        )
    return np.frombuffer(contents, np.uint8, offset=_HEADER).reshape(shape)


def _read(config: DataConfig, part: str) -> tuple[np.ndarray, Path]:
    candidates = [f"{folder}{_FILES[part]}{suffix}" for folder in _FOLDERS for suffix in _SUFFIXES]
    path = named_file(config, config.source, candidates)
    return read_images(path), path


def _split(images: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if len(images) < 2:
        raise DataError(f"{path}: one image is too few to train on some and hold out others")
    valid = max(len(images) // _VALID, 1)
    return images[:-valid], images[-valid:]


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
