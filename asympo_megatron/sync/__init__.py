"""Weight transports over an iterator of named tensors."""

from asympo_megatron.sync.disk import write_version
from asympo_megatron.sync.manifest import (
    Manifest,
    list_versions,
    prune_versions,
    read_manifest,
    verify_version,
    version_path,
)

__all__ = [
    "Manifest",
    "list_versions",
    "prune_versions",
    "read_manifest",
    "verify_version",
    "version_path",
    "write_version",
]
