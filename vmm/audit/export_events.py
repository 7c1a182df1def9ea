"""The types of records that are about sending the trail to its servers, a TLS client's."""

from __future__ import annotations

from vmm.audit.registry import Event, Field, Serves, Unit

_EXPORT: tuple[Unit, ...] = ("holdfast-export",)
_FAILED = Serves("FAU_GEN.1", "TLS client session could not be established")
_SESSION = Serves("FAU_GEN.1", "TLS client session established or terminated")
_NOT_VALID = Serves("FIA_X509_EXT.1", "Certificate could not be validated")
_CHANNEL_FAILED = Serves("FTP_ITC_EXT.1", "Trusted path or channel function failed")
_FIELDS = {
    "remote_endpoint": Field("text", "the server's address and port"),
    "suppressed": Field("integer", "how many records of this kind were left out before this one"),
}
_CERTIFICATE = {"server_certificate": Field("text", "the SHA-256 of the server's certificate")}

EXPORT_EVENTS = (
    Event(
        type="export.connect",
        title="connect to audit server",
        meaning="A TLS session with a server of the audit trail began, or could not be had.",
        producers=_EXPORT,
        object="server",
        fields=_FIELDS | _CERTIFICATE,
        serves=(
            _FAILED,
            _SESSION,
            _NOT_VALID,
            _CHANNEL_FAILED,
            Serves("FTP_ITC_EXT.1", "Trusted channel initiated"),
        ),
    ),
    Event(
        type="export.identity",
        title="identify audit server",
        meaning="A server of the audit trail showed a certificate for somebody else; there was no session.",
        producers=_EXPORT,
        object="server",
        fields={
            **_FIELDS,
            "presented_identifier": Field("text", "whom its certificate names"),
            "reference_identifier": Field("text", "whom it has to name"),
        },
        serves=(
            _FAILED,
            Serves("FAU_GEN.1", "TLS client could not verify the presented identifier"),
            _NOT_VALID,
            _CHANNEL_FAILED,
        ),
    ),
    Event(
        type="export.disconnect",
        title="disconnect from audit server",
        meaning="Such a session is over; a failure where it broke.",
        producers=_EXPORT,
        object="server",
        fields=_FIELDS | _CERTIFICATE,
        serves=(_SESSION, Serves("FTP_ITC_EXT.1", "Trusted channel terminated")),
    ),
)
