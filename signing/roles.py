"""Who signs for the roles of the update repository: ECDSA P-384 keys in files, or in tokens (docs/key-ceremony.md)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, SecretsHandler, Signature, Signer, SSlibKey

from signing.pkcs11 import TokenKey
from vmm.errors import UserError, die


class RoleSigner(Signer):
    """Signs with one key, and checks each signature against the public key before it is handed out.

    securesystemslib's CryptoSigner verifies P-384 but does not sign with it.
    """

    def __init__(self, name: str, public: SSlibKey, sign: Callable[[bytes], bytes]) -> None:
        self.name = name
        self._public = public
        self._sign = sign

    @property
    def public_key(self) -> Key:
        """The key that verifies what this one signs."""
        return self._public

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> RoleSigner:
        """Not for us: KeyRing makes signers. Raises: NotImplementedError, always."""
        raise NotImplementedError

    def sign(self, payload: bytes) -> Signature:
        """Sign. Raises: UserError when the private key is not the public key's, or its token refuses."""
        signature = Signature(self._public.keyid, self._sign(payload).hex())
        try:
            self._public.verify_signature(signature, payload)
        except UnverifiedSignatureError:
            die(f"the private key of {self.name} does not belong to {self.name}.pub", hint="restore the pair")
        return signature


@dataclass(frozen=True)
class KeyRing:
    """The role keys in a key set's folder: NAME.pub, and beside it NAME.key or NAME.pkcs11 where this machine signs.

    Which role a key has is not its name's matter: root.json says so, by key id.
    """

    folder: Path

    def public(self, name: str) -> SSlibKey:
        """The public key called ``name``. Raises: UserError when NAME.pub is missing or no EC key on P-384."""
        path = self.folder / f"{name}.pub"
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except FileNotFoundError:
            die(f"the key set lacks {path}", hint="--keys names the folder; NAME.pub is the public key as PEM")
        except ValueError:
            die(f"{path} is not a public key as PEM")
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            die(
                f"{path} is not an EC key on P-384",
                hint="openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384",
            )
        return SSlibKey.from_crypto(key)

    @cached_property
    def names(self) -> dict[str, str]:
        """What the role keys in the folder are called, by key id."""
        found = {}
        for path in sorted(self.folder.glob("*.pub")):
            try:
                found[self.public(path.stem).keyid] = path.stem
            except UserError:
                continue  # the RSA keys of Secure Boot
        return found

    def name(self, keyid: str) -> str:
        """What to call a key in a message: its name, or else the start of its id."""
        return self.names.get(keyid, keyid[:16])

    def has_private(self, name: str) -> bool:
        """Whether this machine can sign with a key."""
        return any((self.folder / f"{name}.{kind}").exists() for kind in ("key", "pkcs11"))

    def signer(self, name: str) -> RoleSigner:
        """The signer called ``name``.

        Raises: UserError when there is neither NAME.key nor NAME.pkcs11, or the file cannot be used or is open to
        others.
        """
        public = self.public(name)
        file, token = self.folder / f"{name}.key", self.folder / f"{name}.pkcs11"
        if token.exists():
            return RoleSigner(name, public, TokenKey.parse(token.read_text()).sign)
        if not file.exists():
            die(
                f"the key set has no private key {name}: neither {file} nor {token.name}",
                hint="--keys names the folder",
            )
        if file.stat().st_mode & 0o077:
            die(f"{file} can be read by others", hint=f"chmod 600 {file}")
        try:
            private = serialization.load_pem_private_key(file.read_bytes(), None)
        except (TypeError, ValueError):
            die(f"{file} is not an unencrypted private key as PEM")
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            die(f"{file} is not an EC key")
        return RoleSigner(name, public, lambda data: private.sign(data, ec.ECDSA(hashes.SHA384())))

    def signers(self, keyids: Collection[str]) -> list[RoleSigner]:
        """Those of some keys that this machine can sign with. Raises: UserError as ``signer`` does."""
        return [self.signer(name) for keyid, name in self.names.items() if keyid in keyids and self.has_private(name)]
