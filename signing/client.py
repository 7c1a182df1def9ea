"""The repository as a host sees it, that only knows a root.json."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, Targets
from tuf.ngclient import FetcherInterface, Updater

from signing.releases import Offered, check_release, offered
from signing.repository import Repository
from vmm.errors import die


class FolderFetcher(FetcherInterface):
    """Fetches file: addresses."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = Path(unquote(urlparse(url).path))
        if not path.is_file():
            # The client takes 404 as "there is no newer root".
            raise DownloadHTTPError(f"{path} does not exist", 404)
        return iter([path.read_bytes()])


def look(repository: Repository, root: bytes) -> Targets:
    """What targets.json a client that trusts ``root`` arrives at today.

    Raises: UserError when the client refuses: signatures, versions, hashes, expiry.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "root.json").write_bytes(root)
        try:
            Updater(folder, repository.metadata.absolute().as_uri(), fetcher=FolderFetcher()).refresh()
        except (RepositoryError, DownloadError) as error:
            die(f"hosts refuse {repository.folder}: {error}", hint="if it has expired: holdfast-release refresh --all")
        return Metadata[Targets].from_file(str(Path(folder, "targets.json"))).signed


def verify(repository: Repository, root: bytes) -> list[Offered]:
    """All releases that a client is offered, once every file of theirs was read and fits.

    Raises: UserError naming what a client would refuse.
    """
    targets = look(repository, root)
    found = offered(repository, targets)
    belongs = {name for item in found for name in item.targets}
    for name, target in targets.targets.items():
        if name not in belongs:
            repository.check_target(target)
    for item in found:
        check_release(repository, item)
    return found
