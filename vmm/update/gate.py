"""The health gate, ``python3 -m vmm.update.gate``: whether a version that is on trial may be kept.

It asks from outside what an operator would ask: do guests run, is every action recorded, does the API answer, are the
volumes the encrypted ones, is the management network there. On any other start it only has the updater find out what
became of a version that was tried.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import ssl
import time
from collections.abc import Callable, Mapping

import msgspec

from vmm import atomic, errors, paths, wire
from vmm.audit.client import AuditClient, Entry, Object
from vmm.config.addresses import management_addresses
from vmm.config.types import Configuration
from vmm.errors import Unavailable, UserError
from vmm.release import os_release
from vmm.update.settle import Verdict
from vmm.update.state import Store
from vmm.update.types import Failed, version_key

DEADLINE_S = 600.0
"""A host that has not proven itself by then is taken for broken. Generous: servers test their memory first."""
_LOOK_S = 1.0
_PROBE_S = 300
_API_PORT = 8443
_MUST_HOLD = ("kvm", "apparmor", "lockdown", "volumes-encrypted", "audit", "libvirt")
"""Health checks that a new version must pass; others (microcode, Secure Boot) are the machine's, not the version's."""

Check = Callable[[], None]


class _HealthCheck(msgspec.Struct, frozen=True):
    name: str
    ok: bool
    detail: str = ""


class _Health(msgspec.Struct, frozen=True):
    checks: tuple[_HealthCheck, ...]


def first_failure(checks: Mapping[str, Check], deadline: float, look: float = _LOOK_S) -> str:
    """Wait until every check passes, in order; what the first that does not pass in time says, "" when all do.

    Arguments: ``deadline`` in seconds for all together; ``look`` is the time between two attempts.
    """
    end = time.monotonic() + deadline
    for name, check in checks.items():
        while True:
            try:
                check()
                break
            except UserError as error:
                if time.monotonic() > end:
                    return f"{name}: {error.message}"
            time.sleep(look)
    return ""


def host_checks() -> dict[str, Check]:
    """The checks of a real host, in the order in which they can come true."""
    return {
        "audit": check_audit,
        "network": check_network,
        "api": check_api,
        "health": check_health,
        "guest": check_guest,
    }


def check_audit() -> None:
    """A record can be stored. Raises: Unavailable."""
    AuditClient().append_sync(Entry(type="update.trial", object=Object(kind="host"), outcome="success"))


def check_network() -> None:
    """The management interface has the address it should have. Raises: Unavailable."""
    try:
        configuration = msgspec.json.decode(paths.APPLIED_CONFIG.read_bytes(), type=Configuration)
    except FileNotFoundError:
        raise Unavailable("no configuration is applied") from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unavailable(f"{paths.APPLIED_CONFIG} cannot be read: {error}") from None
    wanted, found = configuration.management.address, management_addresses(configuration)
    if not found or (wanted != "dhcp" and str(ipaddress.ip_interface(wanted).ip) not in found):
        raise Unavailable(f"the management interface has {', '.join(found) or 'no address'}, not {wanted}")


def check_api() -> None:
    """The API answers under its own certificate. Raises: Unavailable."""
    try:
        context = ssl.create_default_context(cafile=str(paths.API_STATE / "server.crt"))
        context.check_hostname = False
        connection = http.client.HTTPSConnection("127.0.0.1", _API_PORT, timeout=30, context=context)
        try:
            connection.request("GET", "/v1/banner")
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"the API does not answer: {error}") from None
    if status != http.client.OK:
        raise Unavailable(f"the API answers with status {status}")


def check_health() -> None:
    """What isolation rests on is in force. Raises: Unavailable naming the first check that fails."""
    answer = asyncio.run(wire.call(paths.CORE_SOCKET, "health.read", {"args": {}}))
    checks = {check.name: check for check in msgspec.convert(answer, _Health, strict=False).checks}
    for name in _MUST_HOLD:
        check = checks.get(name)
        if check is None or not check.ok:
            raise Unavailable(f"{name}: {check.detail if check else 'not checked'}")


def check_guest() -> None:
    """A guest starts. Raises: Unavailable."""
    asyncio.run(wire.call(paths.CORE_SOCKET, "gate.probe", {"args": {"timeout": _PROBE_S}}))


def _ask(method: str, **params: str) -> Verdict:
    answer = asyncio.run(wire.call(paths.UPDATE_SOCKET, method, dict(params)))
    return msgspec.convert(answer.get("verdict", {"kind": "nothing"}), Verdict)


def _running() -> str:
    """The version that runs, "" if this is no image."""
    try:
        return os_release(paths.ROOT).get("IMAGE_VERSION", "")
    except OSError:
        return ""


def _nothing_to_judge() -> bool:
    """Whether no version waits, the running one is known to be good, no old seals are left to be taken away, and no
    change of keys is under way, so that the updater need not be started.
    """
    state = Store(paths.UPDATE_STATE).state
    settled = not state.seals_kept and (state.keys is None or state.keys.stage == "done")
    return state.installed is None and _running() in state.blessed and settled


def leave_notice() -> None:
    """Tell the console of a newer version that failed here, for as long as none that is newer still has worked, or of a
    change of keys after which the volumes will not open.

    Raises: OSError.
    """
    state = Store(paths.UPDATE_STATE).state
    try:
        running = version_key(_running())
        failed = [f for f in state.failed if version_key(f.version) > running]
    except ValueError:
        return
    if state.keys is not None and state.keys.stage == "failed":
        failed.append(Failed(state.keys.version, state.keys.reason, ""))
    if failed:
        atomic.write(paths.UPDATE_NOTICE, msgspec.json.encode(failed[-1]), mode=0o640)
    else:
        paths.UPDATE_NOTICE.unlink(missing_ok=True)


def judge(checks: Mapping[str, Check], deadline: float = DEADLINE_S) -> str:
    """Find out what this start is, and end a trial one way or the other; returns a line for the journal.

    Raises: UserError when the updater does not do its part.
    """
    verdict = _ask("settle")
    if verdict.kind != "trial":
        return " ".join(filter(None, (verdict.kind, verdict.version, verdict.reason)))
    if reason := first_failure(checks, deadline):
        print(f"gate: {verdict.version} failed: {reason}", flush=True)
        _ask("condemn", reason=reason[:1000])
        return f"{verdict.version} goes back"
    _ask("bless")
    return f"{verdict.version} is kept"


def main() -> None:
    """The program. Where it fails itself, holdfast-gate-failed.service ends a trial. Raises: UserError."""
    if not _nothing_to_judge():
        print(f"gate: {judge(host_checks())}", flush=True)
    leave_notice()


if __name__ == "__main__":
    errors.main(main)
