"""The configure step of every boot: find the configuration, check it whole, store it, render it.

It runs as root before the network comes up. A configuration that is wrong leaves nothing behind but
an audit record and a file that the console screen shows.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from vmm import atomic, paths
from vmm.audit.client import Entry, Object, Rule
from vmm.config import render, sources
from vmm.config.interfaces import describe, is_named, present, resolve
from vmm.config.load import MAX_DOCUMENT, ConfigurationError, decode, encode
from vmm.config.types import Configuration, Failure
from vmm.errors import UserError

STORED = "the stored configuration"
T = TypeVar("T")
_PATIENCE_S, _LOOK_S = 30.0, 0.1
_NETWORK_FILES = ("10-management.network", "20-op-*.netdev", "21-op-*.network", "22-op-*-port.network")

# Writes one audit record durably. Raises: UserError when it cannot.
Record = Callable[[Entry], object]
# Tells the audit service what is kept. Raises: UserError when it cannot.
SetRule = Callable[[Rule], object]


def run(
    record: Record,
    set_hostname: Callable[[str], None],
    set_rule: SetRule,
    settle: Callable[[], None] | None = None,
) -> Failure | None:
    """Apply the stored configuration or, where there is none, the first seed.

    ``settle`` waits until udev has worked through what it knows of; without it nothing is waited for. A disk or
    an interface may still take seconds to answer, so what is looked for and missing is looked for again.

    Returns what is wrong, which config-error.json says too; None when all is well. A stored
    configuration is applied as far as the hardware allows; a seed is refused instead, while whoever
    wrote it is still near.
    """
    source = STORED
    try:
        is_new = not paths.STORED_CONFIG.exists()
        if is_new:
            if settle is not None:
                # All disks that are there, so that which seed is taken does not depend on who answers first.
                settle()
            found = _await(sources.find, waits=settle is not None)
            if found is None:
                source = ""
                raise UserError(
                    "no configuration was found", hint="make a seed with `holdfast seed` and restart the host"
                )
            source, document = found.name, found.document
        else:
            with paths.STORED_CONFIG.open("rb") as file:
                document = file.read(MAX_DOCUMENT + 1)
        config = decode(document)
        _await(lambda: _all_named(config), waits=settle is not None)
        interfaces = present()
        problem = _misfit(config, interfaces, must_exist=is_new)
        rendered = render.files(config, interfaces)
        # A new set of administrators is adopted only once that is on record.
        unrecorded = _record(record, source, document=document)
        if is_new:
            if unrecorded is not None:
                raise unrecorded
            atomic.write(paths.STORED_CONFIG, encode(config))
        _write(config, rendered)
        set_hostname(config.hostname)
        unruled = _set_rule(set_rule, config.audit.rule)
    except sources.SourceError as error:
        return _refuse(record, error, error.source)
    except UserError as error:
        return _refuse(record, error, source)
    except OSError as error:
        return _refuse(record, UserError(f"{error.filename or 'the system'}: {error.strerror}"), source)
    if problem := problem or unrecorded or unruled:
        return _report(problem, source)
    paths.CONFIG_ERROR.unlink(missing_ok=True)
    return None


def _await(look: Callable[[], T], *, waits: bool) -> T:
    """What ``look`` returns once that is something, or after a while."""
    deadline = time.monotonic() + _PATIENCE_S
    while not (found := look()) and waits and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    return found


def _all_named(config: Configuration) -> bool:
    """Whether udev has named every interface of the configuration: true sooner than for all devices that there are."""
    wanted = [config.management.interface, *(network.interface for network in config.operational)]
    interfaces = present()
    names = [resolve(interface, interfaces) for interface in wanted]
    return all(name is not None and is_named(name) for name in names)


def _misfit(config: Configuration, interfaces: Mapping[str, str], *, must_exist: bool) -> UserError | None:
    """Compare the configuration with the hardware.

    Returns the first interface that is missing, or raises it if ``must_exist``.

    Raises: ConfigurationError when two entries mean the same interface, one by name and one by MAC.
    """
    wanted = [("management.interface", config.management.interface)]
    wanted += [(f"operational[{i}].interface", network.interface) for i, network in enumerate(config.operational)]
    missing: ConfigurationError | None = None
    fields: dict[str, str] = {}
    for field, interface in wanted:
        name = resolve(interface, interfaces)
        if name is None:
            missing = missing or ConfigurationError(
                field, f"this host has no interface {interface}", hint=f"it has: {describe(interfaces)}"
            )
        elif name in fields:
            raise ConfigurationError(field, f"{interface} is the interface already used by {fields[name]}")
        else:
            fields[name] = field
    if missing and must_exist:
        raise missing
    return missing


def _write(config: Configuration, rendered: Mapping[str, str]) -> None:
    for pattern in _NETWORK_FILES:
        for stale in (paths.ROOT / render.NETWORK_DIRECTORY).glob(pattern):
            stale.unlink()
    for optional in (render.TIME_SERVERS, render.EXPORT):
        (paths.ROOT / optional).unlink(missing_ok=True)
    for path, text in rendered.items():
        atomic.write(paths.ROOT / path, text.encode())
    atomic.write(paths.APPLIED_CONFIG, encode(config))


def _record(record: Record, source: str, *, document: bytes | None = None, reason: str = "") -> UserError | None:
    """Put on record that a configuration was applied (``document``) or refused (``reason``).

    Returns the error instead of raising it: only a new configuration depends on it.
    """
    try:
        record(
            Entry(
                type="config.refused" if reason else "config.applied",
                object=Object(kind="configuration", name=source),
                outcome="failure" if reason else "success",
                reason=reason,
                extra={"sha256": hashlib.sha256(document).hexdigest()} if document is not None else {},
            )
        )
    except UserError as error:
        return UserError(f"the audit trail does not take records: {error.message}", hint=error.hint)
    return None


def _set_rule(set_rule: SetRule, rule: Rule) -> UserError | None:
    """Returns the error: the audit service goes by the rule that it had before."""
    try:
        set_rule(rule)
    except UserError as error:
        return UserError(f"the audit service does not take its rule: {error.message}", hint=error.hint)
    return None


def _refuse(record: Record, error: UserError, source: str) -> Failure:
    unrecorded = _record(record, source, reason=error.message)
    if unrecorded is not None:
        print(unrecorded.message)
    return _report(error, source)


def _report(error: UserError, source: str) -> Failure:
    failure = Failure(error.message, source, error.hint)
    atomic.write(paths.CONFIG_ERROR, msgspec.json.encode(failure) + b"\n")
    return failure
