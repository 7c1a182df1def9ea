"""`holdfast seed`: write a host's first configuration, check it, and put it where the host finds it."""

from __future__ import annotations

import argparse
import datetime
import sys
import uuid
from pathlib import Path

from vmm import atomic
from vmm.cli.command import Commands, add, group
from vmm.cli.output import clean, print_json
from vmm.config import gpt, load, seed
from vmm.config.certificates import check_certificate
from vmm.config.types import Administrator, Audit, AuditServer, Configuration, Management, Operational, Role, Update
from vmm.errors import NotFound, UserError

_TYPE = uuid.UUID(seed.PARTITION_TYPE)
# As large as the host's own (image/rootfs/usr/lib/repart.d/30-seed.conf), which takes it over.
_PARTITION_SIZE = 64 << 20
_STICK_SIZE = 1 << 20
_ROLES: dict[str, Role] = {"admin": "admin", "auditor": "auditor", "operator": "operator", "user": "user"}


def register(commands: Commands) -> None:
    """Add the commands to the parser."""
    verbs = group(commands, "seed", "make a host's first configuration")
    parser = add(verbs, "create", "write a configuration document", _create)
    parser.add_argument("--hostname", required=True)
    parser.add_argument(
        "--management",
        required=True,
        metavar="IFACE=ADDRESS[,GATEWAY]",
        help="interface name or MAC address, and address with prefix length or dhcp, as enp1s0=192.0.2.10/24,192.0.2.1",
    )
    parser.add_argument("--dns", action="append", default=[], metavar="ADDRESS", help="may be repeated")
    parser.add_argument(
        "--operational", action="append", default=[], metavar="NAME=IFACE", help="network for machines; may be repeated"
    )
    for role in _ROLES:
        parser.add_argument(
            f"--{role}",
            action="append",
            default=[],
            metavar="NAME=CERT.pem",
            help=f"someone with the role {role}, by client certificate; may be repeated",
        )
    parser.add_argument("--time-server", action="append", default=[], metavar="HOST", help="may be repeated")
    parser.add_argument(
        "--banner", default="Authorised use only.", help="shown before every session (default: %(default)s)"
    )
    _add_audit_options(parser)
    _add_update_options(parser)
    parser.add_argument("--out", type=Path, help="file to write (default: standard output)")
    add(verbs, "check", "check a configuration document as the host will", _check).add_argument("file", type=Path)
    parser = add(verbs, "inject", "put a document into an installation image, in place", _inject)
    parser.add_argument("seed", type=Path, help="the document")
    parser.add_argument("image", type=Path, help="image file or device with a partition table (GPT)")
    parser = add(verbs, "stick", "make an image for a USB stick that seeds any host it is plugged into", _stick)
    parser.add_argument("seed", type=Path, help="the document")
    parser.add_argument("out", type=Path, help="the new image")
    add(verbs, "show", "print the document in an image or on a stick", _show).add_argument("image", type=Path)


def _add_audit_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("audit", "what is kept of the audit trail, and whom it is sent to")
    options.add_argument(
        "--audit-when-full",
        choices=("overwrite", "refuse"),
        help="let the oldest records go (default), or refuse what would have to be recorded",
    )
    options.add_argument("--audit-keep-days", type=int, metavar="N", help="delete older records (default: never)")
    options.add_argument("--audit-keep-mib", type=int, metavar="N", help="keep no more (default: the volume's size)")
    options.add_argument(
        "--audit-server",
        action="append",
        default=[],
        metavar="ADDRESS[:PORT][,NAME]=CA.pem",
        help="send the trail there by syslog over TLS (port 6514), to whom these authorities certify as NAME, or else "
        "as ADDRESS; may be repeated; [ADDRESS]:PORT for IPv6",
    )


def _audit(args: argparse.Namespace) -> Audit:
    fields = {"when_full": args.audit_when_full, "keep_days": args.audit_keep_days, "keep_mib": args.audit_keep_mib}
    given = {name: value for name, value in fields.items() if value is not None}
    return Audit(**given, export=tuple(_audit_server(text) for text in args.audit_server))


def _audit_server(text: str) -> AuditServer:
    where, path = _pair("--audit-server", text)
    where, _, name = where.partition(",")
    address, _, port = where.removeprefix("[").rpartition("]:" if where.startswith("[") else ":")
    if not (address and port.isdecimal()) or (":" in address and not where.startswith("[")):
        # Nothing but an address, of either version.
        address, port = where.strip("[]"), "6514"
    return AuditServer(address, _pem("--audit-server", Path(path)), int(port), name or None)


def _add_update_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("updates", "without --update-repository they come from files only")
    options.add_argument("--update-repository", metavar="URL", help="https URL of the releases' TUF repository")
    options.add_argument("--update-channel", metavar="NAME", help="(default: stable)")
    options.add_argument("--update-ca", type=Path, metavar="FILE", help="authorities (PEM) of the repository's server")
    options.add_argument("--update-proxy", metavar="URL", help="as http://192.0.2.5:3128")
    options.add_argument("--update-automatic", action="store_true", default=None, help="take releases by itself")
    options.add_argument("--update-interval", type=int, metavar="HOURS", help="between two looks (default: 6)")
    options.add_argument(
        "--update-window", metavar="HH:MM-HH:MM", help="UTC; when to write releases, and to restart, by itself"
    )


def _update(args: argparse.Namespace) -> Update | None:
    """The configuration's section. Raises: UserError when there are options and no repository."""
    fields = {
        "channel": args.update_channel,
        "ca": None if args.update_ca is None else _pem("--update-ca", args.update_ca),
        "proxy": args.update_proxy,
        "automatic": args.update_automatic,
        "interval_hours": args.update_interval,
        "window": args.update_window,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    if args.update_repository is None:
        if given:
            raise UserError("--update-repository is missing", hint="the other --update options need it")
        return None
    return Update(args.update_repository, **given)


def _create(args: argparse.Namespace) -> None:
    interface, address = _pair("--management", args.management)
    address, _, gateway = address.partition(",")
    people = tuple(
        _administrator(f"--{name}", role, text) for name, role in _ROLES.items() for text in getattr(args, name)
    )
    config = Configuration(
        version=load.VERSION,
        hostname=args.hostname,
        banner=args.banner.replace("\\n", "\n"),
        management=Management(interface, address, gateway or None, tuple(args.dns)),
        operational=tuple(Operational(*_pair("--operational", text)) for text in args.operational),
        administrators=people,
        time_servers=tuple(args.time_server),
        update=_update(args),
        audit=_audit(args),
    )
    document = load.encode(config)
    load.decode(document)
    _warn(config)
    if args.out is None:
        sys.stdout.write(document.decode())
    else:
        atomic.write(args.out, document)
        print(f"wrote {args.out}", file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    config, _ = _document(args.file)
    operational = ", ".join(network.name for network in config.operational) or "none"
    people = ", ".join(f"{person.name} ({person.role})" for person in config.administrators)
    print(
        f"{args.file}: a configuration for {config.hostname}, management {config.management.address} on "
        f"{config.management.interface}, operational networks: {operational}, administrators: {people}"
    )


def _inject(args: argparse.Namespace) -> None:
    container = seed.pack(_document(args.seed)[1])
    with args.image.open("rb") as disk:
        partition = gpt.read(disk).find(seed.PARTITION_NAME)
    where = "the seed partition"
    if partition is None:
        partition = gpt.append(args.image, _PARTITION_SIZE, _TYPE, seed.PARTITION_NAME)
        where = "a new seed partition"
    gpt.write_partition(args.image, partition, container)
    print(f"wrote the seed into {where} (number {partition.number}) of {args.image}", file=sys.stderr)


def _stick(args: argparse.Namespace) -> None:
    container = seed.pack(_document(args.seed)[1])
    partition = gpt.create(args.out, _STICK_SIZE, _TYPE, seed.PARTITION_NAME)
    gpt.write_partition(args.out, partition, container)
    print(f"wrote {args.out}; copy it to a stick as it is", file=sys.stderr)


def _show(args: argparse.Namespace) -> None:
    path: Path = args.image
    with path.open("rb") as disk:
        # A stick may hold the container without a partition table.
        bare = disk.read(len(seed.MAGIC)) == seed.MAGIC
        partition = None if bare else gpt.read(disk).find(seed.PARTITION_NAME)
        if not bare and partition is None:
            raise NotFound(f"{path} has no partition named {seed.PARTITION_NAME}")
        disk.seek(0 if partition is None else partition.offset)
        region = disk.read(seed.MAX_SEED if partition is None else min(partition.size, seed.MAX_SEED))
    document = seed.unpack(region)
    if document is None:
        raise NotFound(f"{path}: the seed partition is empty")
    load.decode(document)
    print_json(document)


def _document(path: Path) -> tuple[Configuration, bytes]:
    """A document from a file, checked, and its bytes. Raises: UserError naming file and field."""
    with path.open("rb") as file:
        document = file.read(load.MAX_DOCUMENT + 1)
    try:
        config = load.decode(document)
    except UserError as error:
        raise UserError(f"{path}: {clean(error.message)}", hint=error.hint) from None
    _warn(config)
    return config, document


def _warn(config: Configuration) -> None:
    """Say what the host, whose clock may be wrong, does not refuse."""
    now = datetime.datetime.now(datetime.UTC)
    for person in config.administrators:
        certificate = check_certificate(person.certificate)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            print(f"warning: the certificate of {person.name} is not valid today", file=sys.stderr)


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"{option}: not of the form NAME=VALUE: {text!r}")
    return name, value


def _administrator(option: str, role: Role, text: str) -> Administrator:
    name, path = _pair(option, text)
    return Administrator(name, role, _pem(option, Path(path)))


def _pem(option: str, path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise UserError(f"{option}: {path} is not a PEM file") from None
