"""Which release is taken, by whom and when."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from tests.unit.test_update_rig import NOW
from vmm.update import choice
from vmm.update.choice import Choice, Host
from vmm.update.errors import Refused
from vmm.update.targets import Target
from vmm.update.types import Part, Parts, Release, Wave

HOST = Host(version="1.0.0", epoch=1, floor=1, machine_id="a" * 32, channel="stable")


def release(version: str, **fields: Any) -> Release:
    part = {
        name: Part(10, "0" * 96, f"holdfast_{version}/{name}.zst") for name in ("root", "verity", "signature", "uki")
    }
    made = Release(
        format=1,
        version=version,
        epoch=1,
        minimum_source="0.1.0",
        root_hash="ab" * 32,
        root_uuid="abababab-abab-abab-abab-abababababab",
        verity_uuid="abababab-abab-abab-abab-abababababab",
        signature_uuid="00000000-0000-0000-0000-000000000000",
        pcr11="0" * 64,
        parts=Parts(**part),
    )
    return msgspec.structs.replace(made, **fields)


class Offered:
    """What targets.json says, and the release.json files behind it."""

    def __init__(self) -> None:
        self.targets: dict[str, Target] = {}
        self.files: dict[str, bytes] = {}
        self.read: list[str] = []

    def add(self, version: str, custom: Any = None, **fields: Any) -> Offered:
        path = f"holdfast_{version}/release.json"
        self.targets[path] = Target(path, 1, "0" * 96, custom or {"channel": "stable"})
        self.files[path] = msgspec.json.encode(release(version, **fields))
        return self

    def load(self, target: Target) -> bytes:
        self.read.append(target.path)
        return self.files[target.path]

    def choose(self, host: Host = HOST, now: datetime = NOW) -> Choice:
        return choice.choose(self.targets, self.load, host, now)

    def named(self, version: str, host: Host = HOST, *, retry: bool = False) -> Release:
        return choice.choose_version(self.targets, self.load, host, version, retry_failed=retry)


def chosen(found: Choice) -> str:
    return found.release.version if found.release else ""


def test_the_newest_wins_by_number_not_by_letter() -> None:
    offered = Offered().add("1.9.0").add("1.10.0").add("1.2.0").add("0.9.0")
    assert chosen(offered.choose()) == "1.10.0"
    assert offered.read == ["holdfast_1.10.0/release.json"]
    assert chosen(offered.choose(msgspec.structs.replace(HOST, version="1.10.0"))) == ""
    assert chosen(Offered().choose()) == ""


def test_channels() -> None:
    offered = Offered().add("1.1.0").add("1.2.0", {"channel": "testing"})
    assert chosen(offered.choose()) == "1.1.0"
    assert chosen(offered.choose(msgspec.structs.replace(HOST, channel="testing"))) == "1.2.0"
    assert offered.named("1.2.0").version == "1.2.0"


def test_waves() -> None:
    waves = [{"share": 10, "after": "2026-12-01T00:00:00Z"}, {"share": 100, "after": "2026-12-08T00:00:00Z"}]
    offered = Offered().add("1.1.0", {"channel": "stable", "waves": waves})
    hosts = [msgspec.structs.replace(HOST, machine_id=f"{number:032x}") for number in range(300)]
    early = [host for host in hosts if offered.choose(host).release]
    assert 10 < len(early) < 60
    assert all(choice.place(host.machine_id, "1.1.0") < 10 for host in early)
    assert all(offered.choose(host, datetime(2026, 12, 8, tzinfo=UTC)).release for host in hosts)
    assert not any(offered.choose(host, datetime(2026, 11, 30, tzinfo=UTC)).release for host in hosts)
    late = next(host for host in hosts if host not in early)
    assert offered.choose(late).passed_over[0][1].layer == "wave"
    # A person need not wait.
    assert offered.named("1.1.0", late).version == "1.1.0"
    # Another version finds another tenth of the hosts.
    assert {choice.place("a" * 32, f"1.{minor}.0") for minor in range(2000)} >= set(range(0, 100, 7))


def test_no_wave_is_for_all_and_no_share_for_none() -> None:
    assert choice.is_open((), 99, NOW)
    assert not choice.is_open((Wave(0, "2020-01-01T00:00:00Z"),), 0, NOW)
    assert choice.is_open((Wave(100, "2020-01-01T00:00:00Z"),), 99, NOW)


def test_failed_versions_are_left_out_until_asked_for() -> None:
    offered = Offered().add("1.1.0").add("1.2.0")
    host = msgspec.structs.replace(HOST, failed={"1.2.0": "the probe guest did not start"})
    assert chosen(offered.choose(host)) == "1.1.0"
    with pytest.raises(Refused, match="failed versions: 1.2.0 failed here before: the probe guest"):
        offered.named("1.2.0", host)
    assert offered.named("1.2.0", host, retry=True).version == "1.2.0"


def test_a_spoilt_release_json_does_not_lead_to_an_older_release() -> None:
    offered = Offered().add("1.1.0").add("1.2.0")

    def load(target: Target) -> bytes:
        if target.path.startswith("holdfast_1.2.0/"):
            raise Refused("TUF target", "it is not the file that was signed")
        return offered.load(target)

    with pytest.raises(Refused, match="^TUF target: "):
        choice.choose(offered.targets, load, HOST, NOW)


def test_a_release_that_is_too_far_ahead_is_reached_by_way_of_another() -> None:
    offered = Offered().add("1.1.0").add("2.0.0", minimum_source="1.1.0")
    found = offered.choose()
    assert chosen(found) == "1.1.0"
    assert found.passed_over[0][1].message == ("minimum source: 2.0.0 can be taken from 1.1.0 on, this host runs 1.0.0")
    assert chosen(offered.choose(msgspec.structs.replace(HOST, version="1.1.0"))) == "2.0.0"


@pytest.mark.parametrize(("epoch", "floor", "layer"), [(2, 1, "epoch"), (1, 2, "epoch floor"), (3, 3, "epoch floor")])
def test_epochs(epoch: int, floor: int, layer: str) -> None:
    host = msgspec.structs.replace(HOST, epoch=epoch, floor=floor)
    offered = Offered().add("1.1.0")
    assert offered.choose(host).passed_over[0][1].layer == layer
    with pytest.raises(Refused, match=f"^{layer}: "):
        offered.named("1.1.0", host)
    assert chosen(Offered().add("1.1.0", epoch=3).choose(host)) == "1.1.0"


@pytest.mark.parametrize("version", ["1.0.0", "0.9.0"])
def test_nothing_older_by_name(version: str) -> None:
    with pytest.raises(Refused, match=f"version: {version} is not newer"):
        Offered().add(version).named(version)
    with pytest.raises(Refused, match="offers no release"):
        Offered().named(version)


@pytest.mark.parametrize(
    "custom",
    [None, [], 7, {}, {"channel": "Stable"}, {"channel": "stable", "waves": [{"share": 101, "after": "x"}]}]
    + [{"channel": "stable", "waves": [{"share": 1, "after": "2026-13-99T99:99:99Z"}]}],
)
def test_offers_of_another_form_are_none(custom: Any) -> None:
    offered = Offered()
    path = "holdfast_1.1.0/release.json"
    offered.targets[path] = Target(path, 1, "0" * 96, custom)
    assert offered.choose() == Choice(None)


def damaged(change: Callable[[dict[str, Any]], None]) -> bytes:
    content = msgspec.to_builtins(release("1.1.0"))
    change(content)
    return msgspec.json.encode(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "release.json: 1.1.0"),
        (b"[" * 5000, "release.json: 1.1.0"),
        (b'{"version": "\xff"}', "release.json: 1.1.0"),
        (damaged(lambda r: r.update(version="1.2.0")), "describes 1.2.0 where 1.1.0"),
        (damaged(lambda r: r.update(root_uuid="00000000-0000-0000-0000-000000000000")), "halves of root_hash"),
        (damaged(lambda r: r.update(epoch=0)), "epoch"),
        (damaged(lambda r: r.update(format=2)), "format"),
        (damaged(lambda r: r.update(extra=1)), "extra"),
        (damaged(lambda r: r["parts"]["root"].update(size=1 << 40)), "size"),
        (damaged(lambda r: r["parts"]["root"].update(target="../../etc/passwd")), "target"),
        (damaged(lambda r: r["parts"]["uki"].update(target="holdfast_9.9.9/uki.zst")), "lies in another release"),
        (damaged(lambda r: r["parts"]["uki"].update(deltas={"1.0.0": "holdfast_9.9.9/x"})), "lies in another release"),
    ],
)
def test_release_json_is_taken_at_nothing(content: bytes, message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        choice.read_release(content, "1.1.0")
    assert refused.value.layer == "release.json"
