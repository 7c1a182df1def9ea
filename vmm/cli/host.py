"""`holdfast health`, `version`, `config` and `recovery-key`: the host itself."""

from __future__ import annotations

import argparse
import sys

import msgspec

from vmm.cli.client import Api
from vmm.cli.command import Commands, add, group, remotely
from vmm.cli.output import print_fields, print_json, print_table
from vmm.config.types import Configuration, Update


class _Version(msgspec.Struct, frozen=True):
    product: str
    version: str
    slot: str = ""
    root_hash: str = ""


class _Check(msgspec.Struct, frozen=True):
    name: str
    ok: bool
    detail: str = ""


class _Health(msgspec.Struct, frozen=True):
    status: str
    checks: tuple[_Check, ...] = ()


class _Keys(msgspec.Struct, frozen=True):
    keys: dict[str, str]


def register(commands: Commands) -> None:
    """Add the commands to the parser."""
    add(commands, "health", "show the host's health; exits with 1 unless all is well", remotely(_health))
    add(commands, "version", "show what the host runs", remotely(_version))
    verbs = group(commands, "config", "see the host's configuration")
    add(verbs, "show", "show the configuration in force", remotely(_config))
    verbs = group(commands, "recovery-key", "take the recovery keys of the encrypted volumes")
    add(verbs, "fetch", "fetch the recovery keys; the host hands them out once and forgets them", remotely(_fetch))


async def _health(api: Api, args: argparse.Namespace) -> int:
    raw, health = await api.get("/v1/health", _Health)
    if args.json:
        print_json(raw)
    else:
        print(f"status: {health.status}")
        print_table(("CHECK", "OK", "DETAIL"), [(c.name, "yes" if c.ok else "NO", c.detail) for c in health.checks])
    return 0 if health.status == "ok" else 1


async def _version(api: Api, args: argparse.Namespace) -> None:
    raw, version = await api.get("/v1/version", _Version)
    if args.json:
        print_json(raw)
    else:
        print_fields(
            [
                ("Product", version.product),
                ("Version", version.version),
                ("Slot", version.slot or "-"),
                ("Root hash", version.root_hash or "-"),
            ]
        )


async def _config(api: Api, args: argparse.Namespace) -> None:
    raw, config = await api.get("/v1/configuration", Configuration)
    if args.json:
        print_json(raw)
        return
    management = config.management
    print_fields(
        [
            ("Hostname", config.hostname),
            ("Management", f"{management.interface}, {management.address}, gateway {management.gateway or 'none'}"),
            ("DNS", ", ".join(management.dns) or "none"),
            ("Operational", ", ".join(f"{n.name} on {n.interface}" for n in config.operational) or "none"),
            ("Administrators", ", ".join(f"{a.name} ({a.role})" for a in config.administrators)),
            ("Time servers", ", ".join(config.time_servers) or "none"),
            ("Updates", _updates(config.update)),
            ("Banner", config.banner),
        ]
    )


def _updates(update: Update | None) -> str:
    if update is None:
        return "none"
    how = f"{update.repository}, channel {update.channel}"
    if update.proxy is not None:
        how += f", through {update.proxy}"
    if update.ca is not None:
        how += ", own authorities"
    how += f", automatic every {update.interval_hours} h" if update.automatic else ", on request"
    return how + (f", window {update.window} UTC" if update.window is not None else "")


async def _fetch(api: Api, args: argparse.Namespace) -> None:
    raw = await api.request("POST", "/v1/recovery-keys/fetch")
    # Given out once: whatever fails from here on, the keys must have been printed.
    if args.json:
        print_json(raw)
        return
    try:
        keys = msgspec.json.decode(raw, type=_Keys).keys
    except (msgspec.DecodeError, UnicodeDecodeError):
        print_json(raw)
        return
    print_fields(sorted(keys.items()))
    print("Keep them in a safe place: the host has forgotten them.", file=sys.stderr)
