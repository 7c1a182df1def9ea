"""Every type of record there is (others of its kind stand beside). What is not here, no producer can write.

A new type: a row here, ``python3 -m tests.audit_events`` for the documentation, and a producer that writes it; the
tests find what is missing of these.
"""

from __future__ import annotations

from vmm.audit.export_events import EXPORT_EVENTS
from vmm.audit.guard_events import GUARD_EVENTS
from vmm.audit.kernel_events import KERNEL_EVENTS
from vmm.audit.records import CHECKPOINT, FILLING, FULL, RECOVERED, REFUSED, REMOVED, RULE, START, STOP
from vmm.audit.registry import Event, Field, Registry, Serves, Unit
from vmm.audit.rows import ACTION, ARGS, CORE, HOST, MANAGED, change, read
from vmm.audit.update_events import UPDATE_EVENTS

_API: tuple[Unit, ...] = ("holdfast-api",)
_AUDIT: tuple[Unit, ...] = ("holdfast-audit",)

_AUTHENTICATION = Serves("FIA_UIA_EXT.1", "Administrator authentication attempt")
_MECHANISM = Serves("FIA_UIA_EXT.1", "Identification and authentication mechanism used")
_SESSION = Serves("FIA_UIA_EXT.1", "Administrator session started or ended")
_HTTPS = Serves("FCS_HTTPS_EXT.1", "HTTPS session established or terminated")
_NETWORK = Serves(
    "FDP_VNC_EXT.1", "Attempt to connect a VM to a virtual or physical network component succeeded or failed"
)

_SUPPRESSED = {"suppressed": Field("integer", "how many records of this kind were left out before this one")}
_SUBJECT = {
    "subject": Field("text", "the certificate's subject"),
    "start_time": Field("text", "when the session began (UTC)"),
}

_OF_AUDIT = (
    Event(
        type=START,
        title="audit begins",
        meaning="The audit daemon takes records from here on; what was left open before is closed.",
        producers=_AUDIT,
        fields={
            "host": Field("text", "the host's machine id, which is its firmware's"),
            "version": Field("text", "the version of the running system"),
            "root_hash": Field("text", "the hash of its root, empty where there is none"),
        },
        serves=(Serves("FAU_GEN.1", "Audit functions started"),),
    ),
    Event(
        type=STOP,
        title="audit ends",
        meaning="The audit daemon takes no more records.",
        producers=_AUDIT,
        serves=(Serves("FAU_GEN.1", "Audit functions stopped"),),
    ),
    Event(
        type=RECOVERED,
        title="audit had stopped out of order",
        meaning="The run before was killed, lost its power or failed; an unfinished last line was never acknowledged.",
        producers=_AUDIT,
        fields={"bytes": Field("integer", "how many bytes of such a line were cut off")},
        serves=(Serves("FAU_STG_EXT.1", "Logging function failed (recorded when it starts again)"),),
    ),
    Event(
        type=FULL,
        title="audit volume full",
        meaning="There is no room; records, and hence all calls, are refused.",
        producers=_AUDIT,
        fields={"refused": Field("integer", "how many records were refused at that moment")},
        serves=(Serves("FAU_STG_EXT.1", "Audit capture failed for lack of space or because a set limit was reached"),),
    ),
    Event(
        type=FILLING,
        title="audit store fills",
        meaning="Records take so much of what they may take; said again only after there was more room.",
        producers=_AUDIT,
        fields={
            "percent": Field("integer", "75 or 90"),
            "used": Field("integer", "bytes of all records"),
            "quota": Field("integer", "bytes that they may take"),
        },
    ),
    Event(
        type=REMOVED,
        title="remove audit records",
        meaning="The oldest segments of the trail go once this is stored; a failure where nobody has what goes.",
        producers=_AUDIT,
        fields={
            "cause": Field("text", "full (room was needed), age (the rule of the configuration) or purge (an auditor)"),
            "first": Field("integer", "the number of the first record that goes"),
            "last": Field("integer", "that of the last one"),
            "head": Field("text", "the last one's hash, which the oldest record that stays names"),
            "exported": Field("integer", "the last record that was exported then, 0 if none was"),
            "lost": Field("integer", "how many of those that go were not exported"),
        },
        serves=(Serves("FAU_STG_EXT.1", "Audit capture failed for lack of space or because a set limit was reached"),),
    ),
    Event(
        type=RULE,
        title="keep audit records by another rule",
        meaning="The configuration says something else than before on what is kept.",
        producers=_AUDIT,
        fields={
            "when_full": Field("text", "overwrite or refuse"),
            "keep_days": Field("integer", "the age at which records go, absent where they do not"),
            "keep_mib": Field("integer", "how much is kept, absent where that is the volume's size"),
            "until_exported": Field("boolean", "whether old records stay until all servers have them"),
        },
        serves=(ACTION,),
    ),
    Event(
        type=CHECKPOINT,
        title="anchor audit trail",
        meaning="The TPM, or what stands in for it, proves the trail as it stood shortly before; or could not.",
        producers=_AUDIT,
        fields={
            "covers": Field("integer", "the number of the last record that it covers, and all before it"),
            "head": Field("text", "that record's hash"),
            "segment": Field("integer", "the number of the first record in that record's file"),
            "proof": Field("map", "the anchor (tpm or software), its key, its counter, and what it signed"),
        },
    ),
    Event(
        type=REFUSED,
        title="use audit",
        meaning="A process handed in a record that it may not write or that is not as registered, or wanted to read.",
        producers=_AUDIT,
        fields={
            "method": Field("text", "what it called"),
            "uid": Field("integer", "its uid, as the kernel says"),
            "unit": Field("text", "the producer of that uid, empty if it is none"),
            "entry": Field("text", "what it handed in: the first 2000 characters of its JSON"),
            **_SUPPRESSED,
        },
    ),
)

_OF_API = (
    Event(
        type="session.start",
        title="session begins",
        meaning="TLS verified a client's certificate.",
        producers=_API,
        object="session",
        fields=_SUBJECT,
        serves=(
            _HTTPS,
            _AUTHENTICATION,
            _MECHANISM,
            _SESSION,
            Serves("FTP_ITC_EXT.1", "Trusted channel initiated"),
            Serves("FTP_TRP.1", "Trusted channel initiated"),
        ),
    ),
    Event(
        type="session.end",
        title="session ends",
        meaning="The connection of such a session is gone.",
        producers=_API,
        object="session",
        fields={**_SUBJECT, "end_time": Field("text", "when the session ended (UTC)")},
        serves=(
            _HTTPS,
            _SESSION,
            Serves("FTP_ITC_EXT.1", "Trusted channel terminated"),
            Serves("FTP_TRP.1", "Trusted channel terminated"),
        ),
    ),
    Event(
        type="tls.handshake",
        title="TLS handshake",
        meaning="A connection ended before its handshake was done: no TLS, a refused certificate, or too many at once.",
        producers=_API,
        fields=_SUPPRESSED,
        serves=(
            _AUTHENTICATION,
            Serves("FAU_GEN.1", "TLS server session could not be established"),
            Serves("FCS_HTTPS_EXT.1", "HTTPS session could not be established"),
            Serves("FIA_X509_EXT.1", "Certificate could not be validated"),
            Serves("FTP_ITC_EXT.1", "Trusted path or channel function failed"),
            Serves("FTP_TRP.1", "Trusted path function failed"),
        ),
    ),
    Event(
        type="api.unauthenticated",
        title="request without a certificate",
        meaning="Somebody without a certificate asked for more than the banner.",
        producers=_API,
        fields={"verb": Field("text", "the HTTP method"), "path": Field("text", "what was asked for"), **_SUPPRESSED},
        serves=(_AUTHENTICATION,),
    ),
)

_OF_CORE = (
    Event(
        type="core.unknown-method",
        title="call of what does not exist",
        meaning="Core was called by a name that it does not have.",
        producers=CORE,
        phases=("outcome",),
        serves=MANAGED,
    ),
    Event(
        type="core.foreign-peer",
        title="call by a foreign process",
        meaning="A process that is neither the API nor root called core.",
        producers=CORE,
        phases=("outcome",),
        fields=_SUPPRESSED,
    ),
    read("version.read", "show version", "Somebody asks what the host runs."),
    read("health.read", "show health", "Somebody asks whether the host is sound."),
    read("config.read", "show configuration", "Somebody reads the configuration."),
    read("audit.read", "read audit trail", "Somebody reads records."),
    change("audit.follow", "follow audit trail", "Somebody is to be sent records as they come, until the outcome."),
    read("audit.status", "show state of audit store", "Somebody asks how much the trail holds and may hold."),
    read("audit.export", "show state of audit export", "Somebody asks how far the trail was sent to its servers."),
    change(
        "audit.purge",
        "delete old audit records",
        "An auditor has records deleted that are older than a time or number; audit.removed says what went.",
        fields={
            "first": Field("integer", "the number of the first record that was deleted, 0 if none was"),
            "last": Field("integer", "that of the last one"),
            "lost": Field("integer", "how many of them were not exported"),
        },
    ),
    change("audit.anchor", "have audit trail anchored", "A checkpoint over all records so far is to be made."),
    change("recovery.fetch", "fetch recovery keys", "An administrator takes the volumes' recovery keys, once."),
    change("host.reboot", "restart host", "The host is to restart; its guests are stopped first."),
    change("host.shutdown", "switch host off", "The host is to be switched off; its guests are stopped first."),
    change("host.stop-guests", "stop all guests", "The host stops, and its guests with it.", serves=()),
    change("gate.probe", "run probe guest", "The health gate has a guest started and ended.", serves=()),
)

_OF_IDENTITIES = (
    read("identity.list", "list identities", "Somebody lists those who may call."),
    read("identity.show", "show identity", "Somebody looks at an identity, and at what it may do.", "identity"),
    read("identity.whoami", "show own identity", "Somebody asks who the host takes it for, and what it may do."),
    change("identity.enroll", "enroll identity", "A certificate is to be let in, with a role.", "identity"),
    change("identity.change", "change identity", "An identity is to have another role or other machines.", "identity"),
    change("identity.revoke", "revoke identity", "A certificate is to be let in no longer.", "identity"),
    read("access.query", "show permission matrix", "Somebody asks which role may call what."),
)

_OF_GUESTS = (
    read("volume.list", "list volumes", "Somebody lists the volumes."),
    read("volume.show", "show volume", "Somebody looks at a volume.", "volume"),
    change("volume.create", "create volume", "An empty volume is to be made.", "volume"),
    change("volume.upload", "upload volume", "A volume is to be made of an image that is sent.", "volume"),
    change("volume.delete", "delete volume", "A volume is to be removed.", "volume"),
    read("machine.list", "list machines", "Somebody lists the machines."),
    read("machine.show", "show machine", "Somebody looks at a machine.", "machine"),
    change(
        "machine.create",
        "create machine",
        "A machine is to be made, with its volumes and networks.",
        "machine",
        serves=(*MANAGED, _NETWORK),
    ),
    change("machine.delete", "delete machine", "A machine is to be removed.", "machine"),
    change("machine.start", "start machine", "A machine is to run.", "machine"),
    Event(
        type="machine.stop",
        title="stop machine",
        meaning="A machine is to shut down; as an event, the host itself had it shut down or switched it off.",
        producers=CORE,
        phases=("intent", "outcome", "event"),
        object="machine",
        fields=ARGS,
        serves=MANAGED,
    ),
    change("machine.force-off", "switch machine off", "A machine is to end at once.", "machine"),
    change("machine.console", "use console of machine", "Somebody uses a console until the outcome.", "machine"),
    change("machine.pause", "pause machine", "A machine's processors are to stand still.", "machine"),
    Event(
        type="machine.resume",
        title="resume machine",
        meaning="A paused machine is to go on; as an event, one goes on from its saved memory or, failed, starts cold.",
        producers=CORE,
        phases=("intent", "outcome", "event"),
        object="machine",
        fields=ARGS,
        serves=MANAGED,
    ),
    change("machine.reset", "reset machine", "A machine's system is to start anew, unprepared.", "machine"),
    change("machine.suspend", "suspend machine", "A machine's memory is to be kept until its next start.", "machine"),
    change("machine.rename", "rename machine", "A machine is to have another name.", "machine"),
    change("machine.describe", "describe machine", "A machine's description or tags are to change.", "machine"),
    change(
        "machine.change",
        "change machine",
        "What a machine has, or does by itself, is to change.",
        "machine",
        serves=(*MANAGED, _NETWORK),
    ),
    read("machine.stats", "show what machine uses", "Somebody asks what a machine has used.", "machine"),
    Event(
        type="machine.save",
        title="save machine",
        meaning="A machine's memory was kept, or could not be, over a stop of the host or until its next start.",
        producers=CORE,
        object="machine",
    ),
    Event(
        type="machine.crash",
        title="machine crashed",
        meaning="A machine's QEMU died or its system panicked; the reason says what follows; a restart is a call.",
        producers=CORE,
        object="machine",
        fields={
            "crashes": Field("integer", "how many crashes count against starting it again, this one included"),
            "restarts": Field("boolean", "whether it is started again"),
        },
    ),
    Event(
        type="machine.unknown",
        title="unknown domain runs",
        meaning="libvirt runs something that is no machine of core's, or not as core knows it.",
        producers=CORE,
        object="machine",
    ),
)

_OF_HOST = (
    Event(
        type="config.applied",
        title="apply configuration",
        meaning="The configure step takes a configuration for this start.",
        producers=HOST,
        object="configuration",
        fields={"sha256": Field("text", "the hash of the document")},
        serves=(ACTION,),
    ),
    Event(
        type="config.refused",
        title="apply configuration",
        meaning="The configure step found no configuration, or one that is wrong.",
        producers=HOST,
        object="configuration",
        serves=(ACTION,),
    ),
)

_OURS = (*_OF_AUDIT, *_OF_API, *_OF_CORE, *_OF_IDENTITIES, *_OF_GUESTS, *_OF_HOST)
EVENTS = Registry((*_OURS, *UPDATE_EVENTS, *KERNEL_EVENTS, *GUARD_EVENTS, *EXPORT_EVENTS))
