"""The types of records that are about the guard: what it found, and what was done to whom because of it."""

from __future__ import annotations

from vmm.audit.registry import Event, Field, Serves, Unit
from vmm.audit.rows import MANAGED, change, read

_GUARD: tuple[Unit, ...] = ("holdfast-guard",)

_SWITCHED = Serves("FAU_SAA.1", "An analysis mechanism was enabled or disabled")
_ACTED = (
    Serves("FAU_ARP.1", "Action taken because of a possible security violation"),
    Serves("FAU_SAA.1", "Automated response carried out"),
)

GUARD_EVENTS = (
    Event(
        type="guard.start",
        title="guard begins",
        meaning="The guard goes by the trail from here on.",
        producers=_GUARD,
        fields={
            "rules": Field("integer", "how many rules are enabled"),
            "after": Field("integer", "the record up to which it, or the run before, has done its work"),
        },
        serves=(_SWITCHED,),
    ),
    Event(
        type="guard.stop",
        title="guard ends",
        meaning="The guard ends in order; the next one goes on where it was.",
        producers=_GUARD,
        fields={"done": Field("integer", "the last record that it dealt with")},
        serves=(_SWITCHED,),
    ),
    Event(
        type="guard.violation",
        title="possible violation",
        meaning="Records that a rule of the guard's counts came so often; what it has done because of that follows.",
        producers=_GUARD,
        object="machine",
        fields={
            "rule": Field("text", "the rule"),
            "key": Field("text", "who was counted: a machine's id, an address, a certificate's SHA-256, or host"),
            "count": Field("integer", "how many records"),
            "window_s": Field("integer", "within how many seconds"),
            "action": Field("text", "what the rule has done: alert (nothing but this), hold or lock"),
            "first": Field("integer", "the number of the first of these records"),
            "last": Field("integer", "that of the last one"),
            "test": Field("boolean", "that this is a test"),
        },
    ),
    read("guard.rules", "show the guard's rules", "Somebody, or the guard itself, reads its rules."),
    change(
        "guard.set",
        "set rule of the guard",
        "A rule is to be enabled, disabled or changed.",
        "rule",
        serves=(*MANAGED, _SWITCHED),
    ),
    change("guard.test", "test rule of the guard", "The guard is to report a violation that is none.", "rule"),
    change(
        "machine.hold",
        "hold machine",
        "A machine is to stand still until an administrator releases it.",
        "machine",
        serves=(*MANAGED, *_ACTED),
    ),
    change("machine.release", "release machine", "A machine is held no more.", "machine"),
    read("access.locks", "show who is locked out", "Somebody asks who is locked out."),
    change(
        "access.lock",
        "lock out",
        "An address or a certificate is to be locked out for a while.",
        fields={
            "origin": Field("text", "who was locked out"),
            "until": Field("text", "until when (UTC)"),
        },
        serves=(*MANAGED, *_ACTED, Serves("FIA_AFL_EXT.1", "Limit of failed logins reached or exceeded")),
    ),
    change("access.unlock", "end lockout", "Somebody is not to be locked out any more."),
)
