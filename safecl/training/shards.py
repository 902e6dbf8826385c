"""Tensors written a shard at a time, so that what is large is never held as a whole."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

SHARD_BYTES = 2**30


class Shards:
    """`add` tensors, then `close`. Writes `<folder>/<prefix>-00000.safetensors` and so on, each of at least SHARD_BYTES but
    for the last; the folder is made with the first.

    `num_bytes`: of all tensors added; `files`: tensor name -> name of the file that holds it, once it is written.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.files: dict[str, str] = {}
        self.num_bytes = 0
        self._held: dict[str, Tensor] = {}
        self._num_held = 0
        self._num_files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._held[name] = tensor.contiguous()
        self._num_held += tensor.nbytes
        self.num_bytes += tensor.nbytes
        if self._num_held >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Write what is held."""
        from safetensors.torch import save_file

        if not self._held:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.prefix}-{self._num_files:05d}.safetensors"
        save_file(self._held, str(self.folder / name), metadata={"format": "pt"})
        self.files.update(dict.fromkeys(self._held, name))
        self._held, self._num_held, self._num_files = {}, 0, self._num_files + 1
