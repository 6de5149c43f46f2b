"""Hidden states on their way through the blocks, in files, so that any amount of text passes a device a batch at a time.

Files are read and written, not mapped: writing to a mapped file on a full disk kills the process. What has just been written is
in the machine's file cache, so that where there is memory, nothing waits for the disk.
"""

import math
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """Hidden states of blocks of tokens, [rows, seq_len, width] (or with several streams of a model's own, before the width).

    Attributes:
        checksum: CRC-32 of what has been written, from the first row on.

    Args:
        file: where they are; its whole space is reserved.
        shape: their shape.
        dtype: their number format.

    Raises:
        OSError: the disk is too full.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.file, self.shape, self.dtype = file, shape, dtype
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self.checksum = 0
        with file.open("ab") as opened:
            if opened.tell() != shape[0] * self.row_bytes:
                try:
                    os.posix_fallocate(opened.fileno(), 0, shape[0] * self.row_bytes)
                except OSError as error:  # which does not name the file
                    raise OSError(error.errno, error.strerror, str(file)) from error

    def read(self, rows: range, device: torch.device) -> Tensor:
        """Some rows' hidden states, [len(rows), seq_len, width].

        Raises:
            OSError: they cannot be read.
        """
        data = bytearray(len(rows) * self.row_bytes)
        with self.file.open("rb") as opened:
            opened.seek(rows.start * self.row_bytes)
            if opened.readinto(data) != len(data):
                raise OSError(f"{self.file} ends before its row {rows.stop}")
        return torch.frombuffer(data, dtype=self.dtype).view(len(rows), *self.shape[1:]).to(device)

    def write(self, rows: range, hidden: Tensor) -> None:
        """Replace some rows' hidden states; in order, from the first row on.

        Raises:
            OSError: they cannot be written.
        """
        data = hidden.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
        self.checksum = zlib.crc32(data, self.checksum if rows.start else 0)
        with self.file.open("r+b") as opened:
            opened.seek(rows.start * self.row_bytes)
            opened.write(data)
