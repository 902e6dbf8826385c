"""Write tensors one shard at a time, so that a large set is never in memory as a whole."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

SHARD_BYTES = 2**30


class Shards:
    """Writes the tensors given to `add`; call `close` at the end. Files are `<folder>/<prefix>-00000.safetensors` and
    so on, each of at least SHARD_BYTES except the last. The folder is made with the first file.

    `num_bytes`: of all tensors added. `files`: tensor name -> name of the file that holds it, after it is written.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.files: dict[str, str] = {}
        self.num_bytes = 0
        self._held: dict[str, Tensor] = {}
        self._num_held = 0
        self._num_files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, and write a file if SHARD_BYTES are held."""
        self._held[name] = tensor.contiguous()
        self._num_held += tensor.nbytes
        self.num_bytes += tensor.nbytes
        if self._num_held >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Write the tensors that are still held."""
        from safetensors.torch import save_file

        if not self._held:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.prefix}-{self._num_files:05d}.safetensors"
        save_file(self._held, str(self.folder / name), metadata={"format": "pt"})
        self.files.update(dict.fromkeys(self._held, name))
        self._held, self._num_held, self._num_files = {}, 0, self._num_files + 1
