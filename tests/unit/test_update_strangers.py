"""Calls of the updater by processes that may not make them: refused, and on record."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.test_update_machine import World
from tests.unit.test_update_service import Client, serve
from vmm import wire
from vmm.errors import Forbidden


def test_a_foreign_call_is_on_record_some_of_many_are(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: Client) -> None:
        for uid, methods in ((902, ("settle", "bless")), (70000, ("status", "x" * 99, *["check"] * 10))):
            monkeypatch.setattr(wire.Channel, "peer", wire.Peer(1, uid, uid))
            for method in methods:
                with pytest.raises(Forbidden):
                    await client(method)
        await asyncio.sleep(0)

    serve(world, body, frozenset({902}))
    assert {(entry.type, entry.phase, entry.outcome) for entry in world.records} == {
        ("update.foreign-peer", "outcome", "failure")
    }
    assert [(entry.actor.id, entry.reason, entry.extra) for entry in world.records] == [
        ("uid 902", "settle is for the host itself", {"method": "settle"}),
        ("uid 902", "bless is for the host itself", {"method": "bless"}),
        ("uid 70000", "uid 70000 may not use the updater", {"method": "status"}),
        ("uid 70000", "uid 70000 may not use the updater", {"method": "x" * 64}),
        ("uid 70000", "uid 70000 may not use the updater", {"method": "check"}),
    ]
