"""The `holdfast-release` command: publishes releases and keeps the update repository fresh (docs/updates.md)."""

from __future__ import annotations

import argparse
import datetime
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tuf.api.metadata import Metadata, Root, Snapshot, Targets

from signing import client, offline, releases, rotation
from signing.built import open_built
from signing.repository import Repository, State, parse_root
from signing.roles import KeyRing
from signing.root import LIFETIMES, now, provide_root, require_keys, sign, successor
from vmm import errors
from vmm.errors import UserError, die
from vmm.update.types import Offer

Change = Metadata[Root] | Metadata[Targets]
Changer = Callable[[argparse.Namespace, State, datetime.datetime], Change]

_ROLES = ("root", "targets", "snapshot", "timestamp")

_EPILOG = """\
a key set is a folder: NAME.pub, and NAME.key (PEM) or NAME.pkcs11 (a pkcs11: URI; PIN in HOLDFAST_PIN)

keys without a network:
  holdfast-release prepare change.json publish build/image/release     where the repository is
  holdfast-release sign change.json --key targets --keys KEYS          where the key is
  holdfast-release adopt change.json                                   where the repository is
"""


def _ring(args: argparse.Namespace) -> KeyRing:
    folder: Path = args.keys
    if not folder.is_dir():
        die(f"there is no key set in {folder}", hint="--keys names it; docs/key-ceremony.md says how to make one")
    return KeyRing(folder)


# -- commands that change root.json or targets.json, done at once or prepared for another machine --------------------


def _publish(args: argparse.Namespace, state: State, time: datetime.datetime) -> Change:
    offer = Offer(args.channel, releases.parse_waves(args.wave, time))
    return releases.publish(Repository(args.repository), state, open_built(args.folder), offer, time)


def _withdraw(args: argparse.Namespace, state: State, time: datetime.datetime) -> Change:
    return releases.withdraw(Repository(args.repository), state, args.version, time)


def _waves(args: argparse.Namespace, state: State, time: datetime.datetime) -> Change:
    waves = releases.parse_waves(args.wave, time)
    return releases.set_offer(Repository(args.repository), state, args.version, waves, args.channel, time)


def _renew_targets(args: argparse.Namespace, state: State, time: datetime.datetime) -> Change:
    return successor(state.targets, time)


def _rotate(args: argparse.Namespace, state: State, time: datetime.datetime) -> Change:
    return rotation.rotate(state, _ring(args), args.role, args.old, args.new, time)


def _add_key(args: argparse.Namespace, state: State, time: datetime.datetime) -> Change:
    return rotation.add_key(state, _ring(args), args.role, args.new, time)


def _remove_key(args: argparse.Namespace, state: State, time: datetime.datetime) -> Change:
    return rotation.remove_key(state, _ring(args), args.role, args.old, time)


def _renew_root(args: argparse.Namespace, state: State, time: datetime.datetime) -> Change:
    return rotation.renew(state, time)


_OF_ROOT = (_rotate, _add_key, _remove_key, _renew_root)


def _change(args: argparse.Namespace) -> None:
    repository, ring, time = Repository(args.repository), _ring(args), now()
    with repository.changing():
        state = repository.load()
        roots = [state.root.signed]
        for role in args.signs:
            # Packing takes a while; a key that is missing is found out before.
            require_keys(state.root.signed, role, ring)
        metadata = args.changer(args, state, time)
        if isinstance(metadata.signed, Root):
            root = sign(Metadata(metadata.signed), [*roots, metadata.signed], ring)
            after = repository.commit(state, ring, time, root=root)
        else:
            after = repository.commit(state, ring, time, targets=sign(Metadata(metadata.signed), roots, ring))
    _say_versions(state, after)


def _prepare(args: argparse.Namespace) -> None:
    repository = Repository(args.repository)
    with repository.changing():
        state = repository.load()
        offline.write_prepared(args.file, state, args.changer(args, state, now()))
    print(f"{args.file} is ready to be signed: holdfast-release sign {args.file} --key NAME --keys FOLDER")


def _say_versions(before: State, after: State) -> None:
    for old, new in zip(before.roles, after.roles, strict=True):
        if new.version != old.version:
            print(f"{new.type}.json is now version {new.version}, expires {new.expires:%Y-%m-%d %H:%M} UTC")


# -- the other commands ----------------------------------------------------------------------------------------------


def _root(args: argparse.Namespace) -> None:
    print(f"{provide_root(_ring(args).folder)} is what hosts of this key set trust")


def _init(args: argparse.Namespace) -> None:
    path, repository = provide_root(_ring(args).folder), Repository(args.repository)
    data = path.read_bytes()
    parse_root(data, path)
    state = repository.init(data, _ring(args), now())
    expires = f"{state.root.signed.expires:%Y-%m-%d}"
    print(f"{args.repository} is a repository; hosts trust it by {path}, which expires {expires}")


def _sign(args: argparse.Namespace) -> None:
    ring = _ring(args)
    _, metadata = offline.read_prepared(args.file)
    for line in offline.describe(metadata, ring):
        print(line)
    count = offline.add_signature(args.file, ring, args.key)
    print(f"signed by {args.key}; {args.file} has {count} signature{'s' if count > 1 else ''} now")


def _adopt(args: argparse.Namespace) -> None:
    repository = Repository(args.repository)
    with repository.changing():
        before = repository.load()
        _say_versions(before, offline.adopt(repository, args.file, _ring(args), now()))


def _refresh(args: argparse.Namespace) -> None:
    repository, ring, time = Repository(args.repository), _ring(args), now()
    with repository.changing():
        state = repository.load()
        roles = {"timestamp"}
        left_out: list[str] = []
        due: tuple[Targets | Snapshot, ...] = (state.targets.signed, state.snapshot.signed)
        for part in due:
            if args.all:
                roles.add(part.type)
            elif part.expires - time < LIFETIMES[part.type] / 2:
                at_hand = ring.signers(state.root.signed.roles[part.type].keyids)
                (roles.add if at_hand else left_out.append)(part.type)
        after = repository.commit(state, ring, time, refresh=roles)
    _say_versions(state, after)
    parts = {part.type: part for part in after.roles}
    for role in left_out:
        print(
            f"warning: {role}.json expires {parts[role].expires:%Y-%m-%d %H:%M} UTC; {ring.folder} lacks its key; "
            "holdfast-release prepare FILE refresh lets another machine sign it",
            file=sys.stderr,
        )
    if parts["root"].expires - time < LIFETIMES["root"] / 6:
        print(f"warning: root.json expires {parts['root'].expires:%Y-%m-%d}; renew it: renew-root", file=sys.stderr)
    for role, signed in parts.items():
        if signed.is_expired(time):
            die(f"{role}.json has expired: hosts take nothing from this repository", hint="refresh --all renews it")


def _list(args: argparse.Namespace) -> None:
    repository = Repository(args.repository)
    state = repository.load()
    rows = [("VERSION", "EPOCH", "CHANNEL", "WAVES", "FULL", "DELTAS")]
    for item in releases.offered(repository, state.targets.signed):
        waves = " ".join(f"{wave.share}%@{wave.after}" for wave in item.offer.waves) or "all"
        deltas = " ".join(f"{_mib(item.delta_size(source))} from {source}" for source in item.sources) or "-"
        release = item.release
        rows.append((release.version, str(release.epoch), item.offer.channel, waves, _mib(item.full_size), deltas))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    for part in state.roles:
        print(f"{part.type}.json version {part.version}, expires {part.expires:%Y-%m-%d %H:%M} UTC")


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f}M"


def _verify(args: argparse.Namespace) -> None:
    repository = Repository(args.repository)
    root: Path = args.root or args.keys / "root.json"
    if not root.exists():
        die(f"there is no {root}", hint="--root names the root.json that hosts have")
    data = root.read_bytes()
    repository.load()
    found = client.verify(repository, data)
    names = ", ".join(item.release.version for item in found) or "no release"
    print(f"hosts that trust {root} are offered {names}; all files are as they were signed")


def _prune(args: argparse.Namespace) -> None:
    repository = Repository(args.repository)
    with repository.changing():
        for path in repository.prune(repository.load(), now(), datetime.timedelta(days=args.days)):
            print(f"deleted {path}")


# -- the parser ------------------------------------------------------------------------------------------------------


@functools.cache
def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="holdfast-release",
        description="Publish Holdfast releases in an update repository.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    for target, defaults in (
        (parser, (Path("build/repository"), Path("build/keys"))),
        (shared, (argparse.SUPPRESS,) * 2),
    ):
        target.add_argument("--repository", metavar="DIR", type=Path, default=defaults[0], help="the update repository")
        target.add_argument("--keys", metavar="DIR", type=Path, default=defaults[1], help="the key set")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help, parents=[shared])
        made.set_defaults(run=run)
        return made

    command("root", _root, "make the key set's root.json, which images bring to hosts, if it has none")
    command("init", _init, "make an empty repository")
    _register_changes(commands, shared, _change)
    refresh = command("refresh", _refresh, "new expiry for timestamp.json, and for what is past half of its time")
    refresh.add_argument("--all", action="store_true", help="snapshot.json and targets.json too, whatever their age")
    prepare = command("prepare", _prepare, "write a change into a file, to be signed elsewhere")
    prepare.add_argument("file", metavar="FILE", type=Path)
    inner = prepare.add_subparsers(metavar="CHANGE", required=True)
    _register_changes(inner, shared, _prepare)
    renewal = inner.add_parser("refresh", help="new expiry for targets.json", parents=[shared])
    renewal.set_defaults(run=_prepare, changer=_renew_targets)
    sign = command("sign", _sign, "sign a prepared change with one key; needs no repository")
    sign.add_argument("file", metavar="FILE", type=Path)
    sign.add_argument("--key", metavar="NAME", required=True, help="the key's name in the key set")
    adopt = command("adopt", _adopt, "put a signed change in place")
    adopt.add_argument("file", metavar="FILE", type=Path)
    command("list", _list, "show releases and expiries")
    verify = command("verify", _verify, "walk the repository as a host does, and read every file")
    verify.add_argument(
        "--root", metavar="FILE", type=Path, help="the root.json that hosts have (default: the key set's)"
    )
    prune = command("prune", _prune, "delete files that nothing refers to any more")
    prune.add_argument("--days", type=int, default=14, help="leave files younger than this (default: 14)")
    return parser


def _register_changes(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    shared: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
) -> None:
    def change(name: str, changer: Changer, help: str, *arguments: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help, parents=[shared])
        signs = ("root",) if changer in _OF_ROOT else ("targets", "snapshot", "timestamp")
        made.set_defaults(run=run, changer=changer, signs=signs)
        for argument in arguments:
            made.add_argument(argument, metavar=argument.upper(), choices=_ROLES if argument == "role" else None)
        return made

    publish = change("publish", _publish, "publish what a build left in its release folder")
    publish.add_argument("folder", metavar="RELEASE_FOLDER", type=Path)
    publish.add_argument("--channel", default="stable", help="who asks for this channel gets it (default: stable)")
    waves = change("waves", _waves, "set the waves of a release; none means all hosts at once", "version")
    waves.add_argument("--channel", help="move the release to this channel")
    for made in (publish, waves):
        made.add_argument(
            "--wave",
            metavar="SHARE@TIME",
            action="append",
            default=[],
            help="SHARE percent of all hosts from TIME on (RFC 3339, UTC, or now); again for the next wave",
        )
    change("withdraw", _withdraw, "offer a release no longer", "version")
    change("rotate", _rotate, "give a role the key NEW in place of OLD", "role", "old", "new")
    change("add-key", _add_key, "give a role one more key", "role", "new")
    change("remove-key", _remove_key, "take a key from a role", "role", "old")
    change("renew-root", _renew_root, "new expiry for root.json")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Raises: UserError."""
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except (BrokenPipeError, UserError):
        raise
    except OSError as error:
        raise UserError(f"{error.filename or 'the system'}: {error.strerror or error}") from None
    return 0


def main() -> NoReturn:
    """The entry point."""
    errors.main(run)
