"""Fixtures shared by unit tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from securesystemslib.signer import Signature, SSlibKey

from tests.unit.test_cli_rig import FakeApi, enrolled, fake_api, holdfast
from tests.unit.test_core_rig import Rig
from tests.unit.test_update_machine import World, make_world

_LONGEST_ID = 60


@pytest.fixture(scope="session", autouse=True)
def verified_once() -> Iterator[None]:
    """Have each good signature of TUF metadata verified once: P-384 is slow, and every step verifies all there is.

    What is remembered is all that the answer depends on; what does not verify never is.
    """
    verify, good = SSlibKey.verify_signature, set()

    def once(key: SSlibKey, signature: Signature, data: bytes) -> None:
        case = (key.keyid, key.keytype, key.scheme, key.keyval["public"], signature.keyid, signature.signature, data)
        if case not in good:
            verify(key, signature, data)
            good.add(case)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SSlibKey, "verify_signature", once)
        yield


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """A server that knows our identity, and is pinned as the command's default remote; the banner was shown."""
    enrolled(tmp_path / "user", monkeypatch)
    with fake_api(tmp_path / "server") as server:
        holdfast("remote", "add", "hf1", server.url, "--fingerprint", server.fingerprint)
        server.seen.clear()
        yield server


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Core's parts on a database of their own, as after a start of the service."""
    made = Rig(tmp_path)
    asyncio.run(made.recover())
    yield made
    made.database.close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A host at 1.0.0 that is offered 1.1.0, as the updater sees it."""
    made = make_world(tmp_path)
    made.repository.add("1.1.0", base="1.0.0")
    made.offer()
    return made


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Long values are named by their argument: certificates differ between the processes that share the tests."""
    return argname if isinstance(val, str | bytes) and len(val) > _LONGEST_ID else None
