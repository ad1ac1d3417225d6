"""Reading torch's checkpoints without running code: their metadata is a pickle."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

ALLOWED = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.Metadata,
        metadata.TensorStorageMetadata,
        metadata.TensorProperties,
        metadata.ChunkStorageMetadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
    )
} | {
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Where the checkpoint was written; only its text is kept.
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
    ("pathlib._local", "PosixPath"): lambda *parts: "/".join(parts),
}


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint asks for something that its tensors do not need; nothing of it was run."""


class MetadataUnpickler(pickle.Unpickler):
    """Reads torch's checkpoint metadata, a pickle, and refuses every name but its plain records."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class or dtype.

        Raises:
            UnsafeCheckpointError: the pickle names anything else.
        """
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeCheckpointError(
            f"checkpoint metadata asks for {module}.{name}, which is not a record of a tensor: "
            "the file was not written by this program; delete the checkpoint"
        )


class TensorReader(filesystem.FileSystemReader):
    """A reader like torch's, for checkpoints that hold tensors alone.

    torch reads the metadata and every non-tensor with plain pickle, which runs what the file says.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Return the metadata, unpickled with `MetadataUnpickler`.

        Raises:
            UnsafeCheckpointError: the metadata holds something else than tensors in plain files.
        """
        with open(Path(self.path) / ".metadata", "rb") as file:
            found: metadata.Metadata = MetadataUnpickler(file).load()
        entries = found.state_dict_metadata.values()
        if not all(type(entry) is metadata.TensorStorageMetadata for entry in entries):
            raise UnsafeCheckpointError("checkpoint metadata lists an entry that is not a tensor")
        for info in found.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise UnsafeCheckpointError(
                    f"checkpoint metadata points outside its folder: {info.relative_path!r}"
                )
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found
