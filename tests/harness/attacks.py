"""What somebody who has the repository's server, but not enough of its keys, can put in front of a host."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from securesystemslib.signer import SSlibKey

from signing.root import now
from tests.harness.forging import OTHER_CHANNEL, Forgery, flip, replace

OLDER, OFFERED, BOMB = "0.1.8", "0.1.9", "0.9.9"
"""Releases of the honest repository: an older and a newer one, and one of another channel that lies about its size."""

Change = Callable[[Forgery], None]


@dataclass(frozen=True)
class Attack:
    """``change`` spoils a copy of the honest repository; ``layer`` must refuse it in ``job``, and say ``says``.

    The server never lets files end whose names end with ``endless``.
    """

    name: str
    layer: str
    says: str
    change: Change
    job: str = "check"
    arguments: Mapping[str, str] = field(default_factory=dict)
    endless: str = ""


def honest(origin: Path, folder: Path, keys: Path | None = None) -> tuple[Path, Forgery]:
    """An honest repository at two times, made of an empty one: the folder as it was before, and as it is now."""
    earlier = Forgery(origin, folder / "earlier", keys)
    earlier.release(OLDER)
    earlier.publish()
    present = Forgery(earlier.folder, folder / "present", keys)
    present.release(OFFERED)
    present.release(BOMB, channel=OTHER_CHANNEL, stated={"root": 1000})
    present.publish()
    return earlier.folder, present


def _nothing(_: Forgery) -> None:
    """The files are right; the server is not."""


def _frozen(forged: Forgery) -> None:
    """What a repository looks like that was good once and is kept from changing."""
    forged.publish(expires={"timestamp": now() - datetime.timedelta(hours=1)})


def _mixed(role: str) -> Change:
    """The file of one version under the name of the next."""

    def change(forged: Forgery) -> None:
        forged.publish()
        replace(forged.metadata(role), forged.metadata(role, age=1).read_bytes())

    return change


def _of_another_release(forged: Forgery) -> None:
    replace(forged.stored(f"holdfast_{OFFERED}/uki.zst"), forged.stored(f"holdfast_{OLDER}/uki.zst").read_bytes())


def _longer(forged: Forgery) -> None:
    path = forged.metadata("timestamp")
    replace(path, path.read_bytes() + b" " * (8 << 20))


def _root_by(*names: str) -> Change:
    return lambda forged: forged.new_root(*names)


def _weak_key(make: Callable[[], PublicKeyTypes]) -> Change:
    """A root that enough of the right keys have signed, with another kind of key for the timestamp."""
    return lambda forged: forged.new_root("root1", "root2", timestamp=SSlibKey.from_crypto(make()))


def _role_by(role: str, key: str) -> Change:
    return lambda forged: forged.publish(by={role: key})


def _flipped(role: str) -> Change:
    def change(forged: Forgery) -> None:
        forged.publish()
        flip(forged.metadata(role))

    return change


def _flipped_root(forged: Forgery) -> None:
    forged.new_root("root1", "root2")
    flip(forged.folder / "metadata/2.root.json")


def _flipped_target(name: str) -> Change:
    return lambda forged: flip(forged.stored(f"holdfast_{OFFERED}/{name}"))


def _part(part: str, name: str, says: str, change: Change) -> Attack:
    return Attack(f"{name}: {part}", "TUF target", f"{part}.zst {says}", change, "download")


_LONG = "longer than any such file may be"
_MIXED = f"mixed and matched|{_LONG}"
_UNSIGNED = "not signed by enough of the right keys"
_NOT_SIGNED = "is not the file that was signed"
_KIND = "is not ECDSA with P-384"

ATTACKS = (
    Attack("frozen", "TUF timestamp", "expired: frozen or abandoned repository", _frozen),
    # A signature in DER, and with it the file, may be some bytes shorter or longer than its successor.
    Attack("mixed and matched: snapshot", "TUF snapshot", _MIXED, _mixed("snapshot")),
    Attack("mixed and matched: targets", "TUF targets", _MIXED, _mixed("targets")),
    Attack("endless data: announced", "length", "announces [0-9]+ bytes where at most", _longer),
    Attack("endless data: timestamp", "TUF timestamp", _LONG, _nothing, endless="timestamp.json"),
    Attack("endless data: release.json", "length", "sends more than the", _nothing, endless="release.json"),
    Attack("root: one of two keys", "TUF root", _UNSIGNED, _root_by("root1")),
    Attack("root: one root key, and others", "TUF root", _UNSIGNED, _root_by("root1", "targets", "snapshot")),
    Attack("kind of key: Ed25519", "TUF root", _KIND, _weak_key(lambda: Ed25519PrivateKey.generate().public_key())),
    Attack("kind of key: P-256", "TUF root", _KIND, _weak_key(lambda: generate_private_key(SECP256R1()).public_key())),
    Attack("wrong key: timestamp by snapshot's", "TUF timestamp", _UNSIGNED, _role_by("timestamp", "snapshot")),
    Attack("wrong key: snapshot by timestamp's", "TUF snapshot", _UNSIGNED, _role_by("snapshot", "timestamp")),
    Attack("wrong key: targets by snapshot's", "TUF targets", _UNSIGNED, _role_by("targets", "snapshot")),
    Attack("wrong key: targets by a root key", "TUF targets", _UNSIGNED, _role_by("targets", "root1")),
    Attack("bit flip: root", "TUF root", f"{_UNSIGNED}|not valid metadata|{_KIND}", _flipped_root),
    Attack("bit flip: timestamp", "TUF timestamp", f"{_UNSIGNED}|not valid metadata", _flipped("timestamp")),
    Attack("bit flip: snapshot", "TUF snapshot", "mixed and matched", _flipped("snapshot")),
    Attack("bit flip: targets", "TUF targets", "mixed and matched", _flipped("targets")),
    Attack("bit flip: release.json", "TUF target", f"release.json {_NOT_SIGNED}", _flipped_target("release.json")),
    # In the order in which parts are brought: what has come whole stays, and is not fetched by the next one.
    _part("signature", "bit flip", _NOT_SIGNED, _flipped_target("signature.zst")),
    _part("verity", "bit flip", _NOT_SIGNED, _flipped_target("verity.zst")),
    _part("root", "bit flip", _NOT_SIGNED, _flipped_target("root.zst")),
    Attack("endless data: part", "length", "sends more than the", _nothing, "download", endless="root.zst"),
    _part("uki", "bit flip", _NOT_SIGNED, _flipped_target("uki.zst")),
    _part("uki", "mixed and matched", _NOT_SIGNED, _of_another_release),
    Attack("endless data: bomb", "unpacking", "unpacks to more than the 1000", _nothing, "download", {"version": BOMB}),
)
"""In an order that must be kept, as parts that came whole in one attack are not fetched in the next."""

_FIRST = {attack.layer: attack for attack in reversed(ATTACKS)}
SAMPLE = tuple(attack for attack in ATTACKS if attack is _FIRST[attack.layer])
"""The first attack of each layer."""
