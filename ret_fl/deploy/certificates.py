"""A certificate authority, certificates of SuperLink and sample service, and key pairs, as their readers want them."""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ret_fl.config import ConfigError

CA_DAYS = 3650
BOTH_SIDES = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
_CLOCK_LEEWAY = datetime.timedelta(hours=1)  # hosts whose clocks are behind this one's must accept it, too


def write_private(path: Path, content: bytes) -> None:
    """Write a secret that only its owner may read (mode 0600), whatever mode the file had."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


class Authority:
    """The federation's certificate authority. Its key signs hosts' certificates and stays with the operator."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate, self.key = certificate, key

    @classmethod
    def open(cls, folder: Path, name: str) -> Authority:
        """The authority in `folder` (ca.crt, ca.key), made there if it is not yet. Raises `ConfigError` if damaged."""
        certificate_file, key_file = folder / "ca.crt", folder / "ca.key"
        if not certificate_file.exists() and not key_file.exists():
            authority = cls._new(name)
            folder.mkdir(parents=True, exist_ok=True)
            write_private(key_file, _pem(authority.key))
            certificate_file.write_bytes(authority.certificate.public_bytes(serialization.Encoding.PEM))
            return authority
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder}: ca.crt and ca.key cannot be read ({error}). Put both back from your copy, or delete both: "
                "a new authority is made then, and every host needs its new ca.crt"
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
            raise ConfigError(f"{folder}: ca.key is not the key of ca.crt: put back the pair that belongs together")
        return cls(certificate, key)

    @classmethod
    def _new(cls, name: str) -> Authority:
        key = ec.generate_private_key(ec.SECP384R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} federation CA")])
        builder = (
            _builder(subject, subject, key.public_key(), CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        return cls(builder.sign(key, hashes.SHA384()), key)

    def issue(self, names: list[str], days: int) -> tuple[bytes, bytes]:
        """A host's certificate for DNS names and IP addresses, valid `days`, and its new key; both PEM.

        Good for both sides of TLS: a sample service may ask its clients for certificates, too.
        """
        key = ec.generate_private_key(ec.SECP384R1())
        issuer_id = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        builder = (
            _builder(
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]),
                self.certificate.subject,
                key.public_key(),
                days,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(BOTH_SIDES), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
        )
        certificate = builder.sign(self.key, hashes.SHA384())
        return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)


def make_node_key(path: Path) -> bytes:
    """A SuperNode's private key in `path` (mode 0600), made if it is not there; returns the public key's line.

    ECDSA P-384 in OpenSSH's format, which is what Flower takes. Raises `ConfigError` for a file that holds another.
    """
    if not path.exists():
        made = ec.generate_private_key(ec.SECP384R1())
        openssh = serialization.PrivateFormat.OpenSSH
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, made.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption()))
    public = load_node_key(path).public_key()
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + f" {path.stem}\n".encode()


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A SuperNode's private key. Raises `ConfigError` saying what Flower wants if it is none."""
    wanted = "Flower wants an ECDSA key in OpenSSH format without a passphrase: ssh-keygen -t ecdsa -b 384 -N ''"
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no private key that can be read ({error}). {wanted}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} holds another kind of key. {wanted}")
    return key


def make_signing_key(path: Path) -> bytes:
    """The key in `path` (mode 0600) that signs orders for the sample service, made if it is not there.

    Returns the public key that checks them; both PEM. Raises `ConfigError` for a file that holds another kind of key.
    """
    if not path.exists():
        write_private(path, _pem(ed25519.Ed25519PrivateKey.generate()))
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): put it back from your copy, or delete it") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{path} holds another kind of key: put it back from your copy, or delete it")
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, spki)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_LEEWAY)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
