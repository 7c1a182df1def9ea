"""The types of records that are about updates: core's of the calls, and the updater's and the gate's of the work."""

from __future__ import annotations

from vmm.audit.registry import Event, Field, Serves, Unit
from vmm.audit.rows import HOST, MANAGED, change, read

_BOTH: tuple[Unit, ...] = ("holdfast-core", "holdfast-host")
"""Core records that somebody asks for it, the updater what it did."""

_SIGNATURE = Serves("FPT_TUD_EXT.1", "Signature verification failed")
_UPDATE = Serves("FPT_TUD_EXT.1", "Update initiated")

_JOB = {
    "caller_request": Field("text", "the request of core's record of the call that this is the work of"),
    "layer": Field("text", "which protection refused"),
}
_LOOKED = {
    "override_expiry": Field("boolean", "whether expired metadata was to be taken"),
    "source": Field("text", "where releases were looked for"),
    "time": Field("text", "the time that expiry was judged by (UTC)"),
    "time_source": Field("text", "what said so: the clock, the image's build, or a time seen before"),
    "metadata": Field("map", "version and expiry of each role's metadata"),
    "expired": Field("texts", "the roles whose metadata has expired"),
    "version": Field("text", "the release"),
}
_RELEASE = {
    "version": Field("text", "the release"),
    "epoch": Field("integer", "its security epoch"),
    "root_hash": Field("text", "the root hash of its system"),
}
_KEYS = {
    "certificate": Field("text", "the subject of the certificate that comes to count"),
    "pcr7": Field("texts", "what PCR 7 will hold, in hex"),
    "db": Field("text", "the SHA-256 of the firmware's db"),
}

UPDATE_EVENTS = (
    read("update.status", "show updates", "Somebody asks what the updater does."),
    read("update.history", "show history of updates", "Somebody asks what was installed."),
    change(
        "update.check",
        "look for releases",
        "The repository, a bundle or a stick is to be looked at.",
        "release",
        producers=_BOTH,
        fields={**_JOB, **_LOOKED, "passed_over": Field("texts", "why newer releases are not for this host")},
        serves=(*MANAGED, _SIGNATURE),
    ),
    change(
        "update.download",
        "download release",
        "A release is to be brought into staging.",
        "release",
        producers=_BOTH,
        fields={
            **_JOB,
            **_LOOKED,
            **_RELEASE,
            "asked": Field("text", "the version that was asked for, empty for the newest"),
            "retry_failed": Field("boolean", "whether one that failed here may be it"),
            "parts": Field("maps", "each part with its hash, the bytes that were fetched and the base of its delta"),
        },
        serves=(*MANAGED, _SIGNATURE),
    ),
    change(
        "update.apply",
        "install release",
        "The staged release is to be written to the other slot and started next.",
        "release",
        producers=_BOTH,
        fields={
            **_JOB,
            **_RELEASE,
            "parts": Field("map", "each part's hash"),
            "slot": Field("text", "where it was written"),
            "signer": Field("text", "whose signature its UKI carries"),
            "boot_entry": Field("text", "the name of its UKI"),
            "key": Field("text", "the subject of the certificate that comes to count with it"),
        },
        serves=(*MANAGED, _UPDATE, _SIGNATURE),
    ),
    change(
        "update.rollback",
        "go back a release",
        "The older version is to be started from now on.",
        "release",
        producers=_BOTH,
        fields={**_JOB, "version": Field("text", "the release that is left"), "to": Field("text", "the older one")},
        serves=(*MANAGED, _UPDATE),
    ),
    change(
        "update.import",
        "import bundle",
        "A bundle of releases is to be taken, uploaded or from a stick.",
        "release",
        producers=_BOTH,
        fields={
            **_JOB,
            "device": Field("text", "the stick that it lies on"),
            "bytes": Field("integer", "its size as received"),
        },
    ),
    Event(
        type="update.foreign-peer",
        title="call by a foreign process",
        meaning="A process other than core and root called the updater, or another than root a method of root's.",
        producers=HOST,
        phases=("outcome",),
        fields={
            "method": Field("text", "what it called"),
            "suppressed": Field("integer", "how many records of this kind were left out before this one"),
        },
    ),
    change("update.cancel", "cancel update", "The updater is to give up what it does."),
    Event(
        type="update.trial",
        title="gate tries the audit trail",
        meaning="The health gate of a version on trial sees whether records are taken.",
        producers=HOST,
        object="host",
    ),
    Event(
        type="update.bless",
        title="keep release",
        meaning="A version passed its trial, and the epoch floor rose to its epoch.",
        producers=HOST,
        object="release",
        fields={
            "epoch": _RELEASE["epoch"],
            "root_hash": _RELEASE["root_hash"],
            "floor": Field("integer", "the epoch floor from now on"),
            "seals_removed": Field("texts", "seals of older epochs that were taken off the volumes"),
            "seals_kept": Field("text", "why none were"),
        },
    ),
    Event(
        type="update.failed",
        title="release failed",
        meaning="A version did not pass its trial, and the host went back.",
        producers=HOST,
        object="release",
        fields={
            "running": Field("text", "the version that runs instead"),
            "root_hash": Field("text", "its root hash"),
            "boots": Field("texts", "the boots in which it was tried, of those that reached the updater"),
        },
    ),
    Event(
        type="update.seals",
        title="remove seals of older epochs",
        meaning="What could not be removed when the version was kept was tried again.",
        producers=HOST,
        object="release",
        fields={
            "epoch": _RELEASE["epoch"],
            "seals_removed": Field("texts", "seals that were taken off the volumes"),
        },
    ),
    Event(
        type="update.keys",
        title="change firmware keys",
        meaning="The firmware's db is to grow by the certificate that a release announced, or that has to wait.",
        producers=HOST,
        phases=("intent", "outcome", "event"),
        object="release",
        fields={**_KEYS, "layer": _JOB["layer"]},
    ),
)
