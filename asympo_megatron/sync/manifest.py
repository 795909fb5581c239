"""What a published version contains: file sizes and digests, and the rules by which versions are found and removed."""

import hashlib
import re
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from asympo_megatron.errors import PublishError

MANIFEST_NAME = "manifest.json"
_VERSION_NAME = re.compile(r"v(\d{6,})")
_TEMPORARY_NAME = re.compile(r"\.v(\d{6,})\..*")
_HASHERS = 8
_AGAIN = "Remove the directory of this version and resume: the trainer publishes it again when it begins."


class FileEntry(msgspec.Struct, frozen=True):
    """Size and digest of one file of a version."""

    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """Everything needed to tell a complete version from a damaged one."""

    version: int
    step: int
    checksum: str
    """Checksum of the weights, as the trainer computes and logs it."""
    files: dict[str, FileEntry]
    format: int = 1
    base: int | None = None
    """Version of which these files are changes; None: they are a version by themselves."""
    result: dict[str, FileEntry] = {}
    """With a base: the files of the whole version, as they are once the changes are applied."""

    @property
    def whole(self) -> dict[str, FileEntry]:
        """The files of the whole version, wherever they lie."""
        return self.files if self.base is None else self.result


def version_path(root: str | Path, version: int) -> Path:
    """Directory of a version: ``root/vNNNNNN``."""
    return Path(root) / f"v{version:06d}"


def temporary_path(root: str | Path, version: int, suffix: str) -> Path:
    """Directory in which a version is written before its rename; its name never looks like a version."""
    return Path(root) / f".v{version:06d}.{suffix}"


def list_versions(root: str | Path) -> list[int]:
    """Versions under ``root`` that have a manifest, ascending."""
    root = Path(root)
    if not root.is_dir():
        return []
    matches = ((entry, _VERSION_NAME.fullmatch(entry.name)) for entry in root.iterdir())
    return sorted(int(match[1]) for entry, match in matches if match and (entry / MANIFEST_NAME).is_file())


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of one version directory.

    Raises:
        PublishError: no manifest, or one that cannot be parsed.
    """
    file = Path(path) / MANIFEST_NAME
    try:
        return msgspec.json.decode(file.read_bytes(), type=Manifest)
    except OSError as error:
        raise PublishError(
            f"{path} has no readable {MANIFEST_NAME} ({error}): it is not a published version."
        ) from error
    except msgspec.DecodeError as error:
        raise PublishError(f"{file} is damaged ({error}). {_AGAIN}") from error


def verify_version(path: str | Path) -> Manifest:
    """Compare every file of a version with its manifest.

    Raises:
        PublishError: the message names the first file that is missing, or has another size or digest.
    """
    path = Path(path)
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise PublishError(f"{file} is missing, though {MANIFEST_NAME} lists it. {_AGAIN}")
        size = file.stat().st_size
        if size != entry.bytes:
            raise PublishError(f"{file} has {size} bytes, expected {entry.bytes}. {_AGAIN}")
    digests = file_digests([path / name for name in manifest.files])
    for (name, entry), digest in zip(manifest.files.items(), digests, strict=True):
        if digest != entry.sha256:
            raise PublishError(
                f"{path / name} has sha256 {digest[:16]}..., expected {entry.sha256[:16]}...: it was changed after it "
                f"was written. Check the file system. {_AGAIN}"
            )
    return manifest


def file_digests(files: Sequence[Path]) -> list[str]:
    """Hexadecimal sha256 of files, several at a time: a thread hashes 1 GB/s at best, which many disks outrun."""
    with ThreadPoolExecutor(_HASHERS) as hashers:
        return list(hashers.map(file_digest, files))


def file_digest(file: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def prune_versions(root: str | Path, keep_last: int, in_use: Collection[int] = ()) -> list[int]:
    """Remove old versions and abandoned temporaries.

    The newest ``keep_last`` versions (at least one) and every version in ``in_use`` stay, with all that they are
    changes of. A temporary directory is abandoned when a version at least as new is complete: versions are never used
    twice.

    Returns:
        The versions removed.
    """
    root = Path(root)
    versions = list_versions(root)
    if not versions:
        return []
    kept = {*versions[-max(keep_last, 1) :], *in_use}
    kept |= {base for version in kept & {*versions} for base in _bases(root, version)}
    removed = [version for version in versions if version not in kept]
    for version in removed:
        # Renamed first: a removal cut short must not leave a directory that looks like a version.
        doomed = temporary_path(root, version, "removed")
        shutil.rmtree(doomed, ignore_errors=True)
        version_path(root, version).rename(doomed)
    for entry in root.iterdir():
        match = _TEMPORARY_NAME.fullmatch(entry.name)
        if match and int(match[1]) <= versions[-1]:
            shutil.rmtree(entry, ignore_errors=True)
    return removed


def _bases(root: Path, version: int) -> list[int]:
    """The versions that one is made from, newest first; of a damaged one, as many as can be told."""
    bases: list[int] = []
    try:
        while (base := read_manifest(version_path(root, version)).base) is not None and base < version:
            bases.append(version := base)
    except PublishError:
        pass
    return bases
