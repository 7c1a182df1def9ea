"""What the trail's checkpoints are anchored in, a service of its own: ``python3 -m vmm.audit.anchor``.

Who may use the TPM could also empty it, so the daemon that takes records from everybody does not: it hands a hash in
here and gets a proof back.

The anchor counts checkpoints without a gap, however often the power fails. The daemon stores a checkpoint with the
counter as it is and has it advanced after that; what stood in between is made up for by the next call, as the daemon
says with each which number it has stored.
"""

from __future__ import annotations

import asyncio
import base64
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from vmm import atomic, wire
from vmm.audit.checkpoint import Count, Hash, Proof
from vmm.errors import NotFound, Unavailable, UserError, main
from vmm.notify import notify, passed_descriptors
from vmm.paths import ANCHOR_STATE, ROOT
from vmm.tpm import ABSENT, DEVICE, UNWRITTEN, Tpm

INDEX = 0x01800F11
"""The counter's, beside the epoch floor's (vmm.update.floor)."""
_NV = "nt=counter|ownerread|ownerwrite|authread|authwrite|no_da"
_KEY = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign"
COUNTER_BYTES = 8

_T = TypeVar("_T")


class Certify(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of ``certify``: the hash, and the counter of the newest checkpoint that is stored (0: none is)."""

    digest: Hash
    past: Count


class Advance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of ``advance``: the counter of a checkpoint that is stored."""

    past: Count


class Anchor(Protocol):
    """What can prove that a hash existed when the counter stood where it did."""

    def certify(self, digest: str, past: int) -> Proof:
        """Prove a hash, with a counter other than ``past``. Raises: UserError."""
        ...

    def advance(self, past: int) -> None:
        """Count on if the counter still is ``past``. Raises: UserError."""
        ...


class TpmAnchor:
    """The TPM certifies its own counter and the hash with it, by a key that signs nothing else.

    The key is not stored: a TPM makes the same one of the same template until it is cleared (TPM 2.0 part 1, 14.3).
    """

    def __init__(self, tcti: str = f"device:/{DEVICE}") -> None:
        self._tpm = Tpm(tcti)

    def certify(self, digest: str, past: int) -> Proof:
        """See Anchor. Raises: Unavailable."""
        self.advance(past)
        with tempfile.TemporaryDirectory(prefix="holdfast-anchor-") as folder:
            context, key, attest, signature = (str(Path(folder, name)) for name in ("context", "key", "attest", "sig"))
            algorithm = ("-G", "ecc:ecdsa-sha256:null", "-a", _KEY)
            self._tpm.call("tpm2_createprimary", "-C", "o", *algorithm, "-c", context, "-f", "der", "-o", key)
            out = ("-f", "plain", "-o", signature, "--attestation", attest)
            what = ("-q", digest, "--size", str(COUNTER_BYTES), "--offset", "0", hex(INDEX))
            self._tpm.call("tpm2_nvcertify", "-C", context, "-c", "o", "-g", "sha256", "-s", "ecdsa", *out, *what)
            told = Path(attest).read_bytes()
            return Proof(
                anchor="tpm",
                key=_base64(Path(key).read_bytes()),
                # It stands at the very end of what was signed; vmm.audit.proof checks that.
                counter=int.from_bytes(told[-COUNTER_BYTES:]),
                attest=_base64(told),
                signature=_base64(Path(signature).read_bytes()),
            )

    def advance(self, past: int) -> None:
        """See Anchor. Raises: Unavailable."""
        counter = self._counter()
        if counter is None or counter == past:
            self._tpm.call("tpm2_nvincrement", "-C", "o", hex(INDEX))

    def _counter(self) -> int | None:
        """Where it stands; None if it was never counted on. The index is made if there is none."""
        with tempfile.TemporaryDirectory(prefix="holdfast-anchor-") as folder:
            value = Path(folder, "value")
            if self._tpm.call("tpm2_nvreadpublic", hex(INDEX), missing=ABSENT):
                self._tpm.call("tpm2_nvdefine", "-C", "o", "-s", str(COUNTER_BYTES), "-a", _NV, hex(INDEX))
            if self._tpm.call("tpm2_nvread", "-C", "o", "-o", str(value), hex(INDEX), missing=UNWRITTEN):
                return None
            return int.from_bytes(value.read_bytes())


class SoftwareAnchor:
    """A key and a counter in files: it proves nothing against whoever can read or set them back."""

    def __init__(self, folder: Path) -> None:
        self._key = folder / "key"
        self._count = folder / "counter"

    def certify(self, digest: str, past: int) -> Proof:
        """See Anchor. Raises: Unavailable."""
        # Only hosts without a TPM need the library.
        from vmm.audit import proof  # noqa: PLC0415

        try:
            self.advance(past)
            if not self._key.exists():
                atomic.write(self._key, proof.new_key(), mode=0o600)
            return proof.sign(self._key.read_bytes(), digest, self._counter())
        except (OSError, ValueError) as error:
            raise Unavailable(f"the software anchor: {error}") from None

    def advance(self, past: int) -> None:
        """See Anchor. Raises: Unavailable."""
        try:
            if self._counter() in (0, past):
                atomic.write(self._count, b"%d\n" % (self._counter() + 1), mode=0o600)
        except (OSError, ValueError) as error:
            raise Unavailable(f"the software anchor: {error}") from None

    def _counter(self) -> int:
        return int(self._count.read_text(encoding="ascii")) if self._count.exists() else 0


def open_anchor(folder: Path, device: Path = ROOT / DEVICE) -> Anchor:
    """The host's anchor. Arguments: ``folder`` is for one without a TPM, ``device`` the TPM's, if there is one."""
    return TpmAnchor(f"device:{device}") if device.exists() else SoftwareAnchor(folder)


class Service:
    """Answers the calls of the audit daemon, one after the other: a TPM does no two things at once."""

    def __init__(self, anchor: Anchor) -> None:
        self._anchor = anchor
        self._one = asyncio.Lock()

    async def handle(self, request: wire.Request, _channel: wire.Channel) -> Any:
        """One call. Raises: UserError."""
        async with self._one:
            match request.method:
                case "certify":
                    asked = _convert(request.params, Certify)
                    return await asyncio.to_thread(self._anchor.certify, asked.digest, asked.past)
                case "advance":
                    await asyncio.to_thread(self._anchor.advance, _convert(request.params, Advance).past)
                    return {}
        raise NotFound(f"the anchor has no method {request.method!r}")


def _convert(params: dict[str, Any], type_: type[_T]) -> _T:
    try:
        return msgspec.convert(params, type_)
    except msgspec.ValidationError as error:
        raise UserError(f"anchor: {error}") from None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def serve(listening: socket.socket, anchor: Anchor) -> None:
    """Serve the audit daemon until SIGTERM. Systemd lets nobody else connect (holdfast-anchor.socket)."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    listening.setblocking(False)
    async with await wire.serve_on(listening, Service(anchor).handle):
        notify()
        await stop.wait()


def run() -> None:
    """The program. Raises: Unavailable when systemd handed in no socket."""
    match passed_descriptors():
        case [descriptor]:
            asyncio.run(serve(socket.socket(fileno=descriptor), open_anchor(ANCHOR_STATE)))
        case _:
            raise Unavailable("the anchor is started by its socket only", hint="holdfast-anchor.socket")


if __name__ == "__main__":
    main(run)
