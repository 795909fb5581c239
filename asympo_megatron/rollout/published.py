"""The weight versions of the journal: which of them engines are to load, and whether their files are good."""

import logging

from asympo_megatron.config import Config
from asympo_megatron.errors import PublishError
from asympo_megatron.rollout.evaluator import evaluation_due
from asympo_megatron.rollout.journal import Journal
from asympo_megatron.rollout.ledger import Ledger
from asympo_megatron.rollout.rows import VersionRow
from asympo_megatron.rollout.targets import Targets

log = logging.getLogger(__name__)


def targets_of(config: Config, journal: Journal, ledger: Ledger) -> Targets:
    """The newest version of the journal, and those whose evaluation is still owed: of this trainer, and the newest,
    which a trainer that resumes with these very weights does not publish again."""
    rows = list(ledger.versions.values())
    if not rows or not _is_loadable(config, rows[-1]):
        return Targets()
    owed = [
        row
        for row in rows
        if (row.incarnation == journal.incarnation or (row == rows[-1] and not row.in_memory))
        and evaluation_due(config, row.step)
        and not journal.has_evaluation(row.step, row.checksum)
        and (row == rows[-1] or _is_loadable(config, row))
    ]
    return Targets(rows[-1], owed)


def verify_version(row: VersionRow) -> None:
    """Raises PublishError: its files are not those that were published."""
    from asympo_megatron.sync import verify_version as verify_files  # imports torch: only when an engine is there

    manifest = verify_files(row.path)
    described = (manifest.version, manifest.step, manifest.checksum)
    if described != (row.version, row.step, row.checksum):
        raise PublishError(
            f"{row.path} holds version {manifest.version} of step {manifest.step} with checksum {manifest.checksum}, "
            f"expected version {row.version} of step {row.step} with {row.checksum}: another run wrote there. Give "
            "each run a run.name of its own; remove the directory and resume, and the weights are published again."
        )


def _is_loadable(config: Config, row: VersionRow) -> bool:
    """Whether engines can be given a version that was published before this controller began.

    Its files may be gone (a scratch disk was cleaned, the run was moved), and one that was published as changes needs
    mirrors. Then engines wait for a trainer, which publishes when it begins.
    """
    if row.in_memory:
        return True
    from asympo_megatron.sync import read_manifest  # imports torch: only for files

    try:
        manifest = read_manifest(row.path)
    except PublishError as error:
        log.warning("version %d of the journal cannot be loaded: %s", row.version, error)
        return False
    return manifest.base is None or config.sync.deltas > 0
