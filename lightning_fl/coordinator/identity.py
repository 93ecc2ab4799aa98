"""Who is who: a certificate authority of one federation, kits of files, and what TLS is to accept.

A name stands in the certificate as ``spiffe://<federation>/silo/<name>``, so that a hospital's own PKI, step-ca or
SPIRE can write the files as well. Keys are made where they are used and never travel.
"""

from __future__ import annotations

import ipaddress
import json
import re
import ssl
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lightning_fl.coordinator.disk import read_json
from lightning_fl.files import write_whole
from lightning_fl.os_differences import rights

DAYS = 90
CA_DAYS = 3650
Revoked = set[tuple[bytes, int]]
"""Certificates by issuer and serial number."""
_CRL = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_BACKDATED = timedelta(minutes=15)  # so that a silo whose clock is behind can use a new certificate at once


class IdentityError(ValueError):
    """A certificate is not one that may be used here."""


def check_name(name: str) -> str:
    """Returns a name that is fit for a file, a host name and a certificate.

    Raises:
        IdentityError: If it is not.
    """
    if not _NAME.fullmatch(name):
        raise IdentityError(f"The name {name!r} may hold up to 63 lower-case letters, digits and inner hyphens.")
    return name


class Kit:
    """What a party shows and trusts: ``key.pem``, ``cert.pem``, ``ca.pem`` and, where there is one, ``crl.pem``.

    The files are read when they are needed, so that they may be replaced while the program runs.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def key(self) -> Path:
        """The private key."""
        return self.folder / "key.pem"

    @property
    def cert(self) -> Path:
        """The certificate."""
        return self.folder / "cert.pem"

    @property
    def ca(self) -> Path:
        """The certificates of the authorities that are trusted."""
        return self.folder / "ca.pem"

    @property
    def crl(self) -> Path:
        """The list of revoked certificates."""
        return self.folder / "crl.pem"

    def check(self) -> x509.Certificate:
        """Returns the certificate, if the kit is complete.

        Raises:
            IdentityError: If a file is missing, or others can read the key.
        """
        for path in (self.key, self.cert, self.ca):
            if not path.is_file():
                raise IdentityError(
                    f"{path} is missing. A kit has key.pem, cert.pem and ca.pem: `lightning-fl network request` makes "
                    "the key, `lightning-fl network approve` the other two."
                )
        if rights(self.key.stat()) & 0o077:
            raise IdentityError(f"Others can read {self.key}. Run: chmod 600 {self.key}")
        return x509.load_pem_x509_certificate(self.cert.read_bytes())

    def version(self) -> tuple[float, ...]:
        """Changes when a file does."""
        paths = (self.key, self.cert, self.ca, self.crl)
        return tuple(path.stat().st_mtime if path.exists() else 0.0 for path in paths)

    def revoked(self) -> Revoked:
        """The certificates that must not be accepted any more, of all lists in ``crl.pem``, one an authority.

        Raises:
            ValueError: If the file holds no list.
        """
        if not self.crl.exists():
            return set()
        lists = _CRL.findall(self.crl.read_bytes())
        if not lists:
            raise ValueError(f"{self.crl} holds no list of revoked certificates.")
        found = map(x509.load_pem_x509_crl, lists)
        return {(own.issuer.public_bytes(), entry.serial_number) for own in found for entry in own}

    @property
    def name(self) -> str:
        """The name in the certificate."""
        return names_in(self.check())[1]

    @property
    def federation(self) -> str:
        """The federation in the certificate."""
        return names_in(self.check())[0]


def names_in(certificate: x509.Certificate) -> tuple[str, str]:
    """The federation and the silo of a certificate.

    Raises:
        IdentityError: If it names none.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise IdentityError("its certificate has no name") from None
    found = []
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        match = re.fullmatch(r"spiffe://([^/]+)/silo/([^/]+)", uri)
        if match and all(map(_NAME.fullmatch, match.groups())):
            found.append((match[1], match[2]))
    if len(found) != 1:
        raise IdentityError("its certificate names no silo, or several")
    return found[0]


def peer_name(der: bytes | None, kit: Kit, revoked: Revoked) -> str:
    """The silo that a connection's certificate names; TLS has verified its signature.

    Raises:
        IdentityError: If it has expired meanwhile, was revoked, or names no silo of this federation.
    """
    if der is None:
        raise IdentityError("it showed no certificate")
    certificate = x509.load_der_x509_certificate(der)
    now = datetime.now(timezone.utc)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise IdentityError(f"its certificate ended on {certificate.not_valid_after_utc:%Y-%m-%d}")
    if (certificate.issuer.public_bytes(), certificate.serial_number) in revoked:
        raise IdentityError("its certificate was revoked")
    federation, name = names_in(certificate)
    own = federation_of(kit)
    if federation != own:
        raise IdentityError(f"its certificate is for the federation {federation!r}, not {own!r}")
    return name


def federation_of(kit: Kit) -> str:
    """The federation of a coordinator's kit.

    Raises:
        IdentityError: If its certificate names none.
    """
    certificate = kit.check()
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        match = re.fullmatch(r"spiffe://([^/]+)/coordinator", uri)
        if match:
            return match[1]
    raise IdentityError(f"{kit.cert} is not the certificate of a coordinator.")


# ---- TLS


def server_context(kit: Kit, failed: Callable[[str], None] = lambda reason: None) -> ssl.SSLContext:
    """TLS 1.3 with certificates on both sides.

    Args:
        kit: The coordinator's kit.
        failed: Told why a handshake has failed, which the other side does not learn in TLS 1.3.
    """
    kit.check()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # a resumed session would skip the certificates
    load(context, kit)

    class Connection(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                failed(getattr(error, "verify_message", "") or error.reason or str(error))
                raise

    context.sslobject_class = Connection
    return context


def client_context(kit: Kit) -> ssl.SSLContext:
    """A silo's side of the same."""
    kit.check()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    load(context, kit)
    return context


def load(context: ssl.SSLContext, kit: Kit) -> None:
    """Reads a kit's files into a context, also into one that is in use."""
    context.load_cert_chain(kit.cert, kit.key)
    context.load_verify_locations(kit.ca)
    if kit.crl.exists():
        context.load_verify_locations(kit.crl)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


# ---- an authority


class Authority:
    """The certificate authority of one federation, to be kept offline.

    Args:
        folder: Its folder, with ``ca.key`` and ``ca.pem``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "ca.key").exists():
            raise IdentityError(f"{self.folder} is not a certificate authority. Make one: lightning-fl network ca init")
        self.certificate = x509.load_pem_x509_certificate((self.folder / "ca.pem").read_bytes())
        self._key: Any = serialization.load_pem_private_key((self.folder / "ca.key").read_bytes(), None)

    @classmethod
    def create(cls, folder: str | Path, federation: str, hosts: Sequence[str]) -> Authority:
        """Makes an authority and the coordinator's kit; what is there already stays.

        Only a coordinator's certificate for other hosts, or half of whose time is over, is replaced by another for the
        same key.

        Args:
            folder: Where.
            federation: The federation's name.
            hosts: Names and addresses under which silos reach the coordinator.
        """
        folder, federation = Path(folder), check_name(federation)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (folder / "ca.key").exists():
            key = ec.generate_private_key(ec.SECP256R1())
            subject = _subject(f"{federation} federation")
            now = datetime.now(timezone.utc)
            certificate = (
                x509.CertificateBuilder()
                .subject_name(subject)
                .issuer_name(subject)
                .public_key(key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - _BACKDATED)
                .not_valid_after(now + timedelta(days=CA_DAYS))
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                .sign(key, hashes.SHA256())
            )
            write_whole(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
            _write_json(folder / "federation.json", {"federation": federation, "revoked": []})
            write_whole(folder / "ca.key", _private(key))  # last: the authority exists when its key does
        authority = cls(folder)
        if authority.federation != federation:
            raise IdentityError(f"{folder} is the authority of {authority.federation!r}, not of {federation!r}.")
        kit = Kit(folder / "coordinator")
        if not kit.cert.exists():
            request = make_request(kit.folder, "coordinator")
            authority._issue(request, kit.folder, [f"spiffe://{federation}/coordinator"], hosts, is_server=True)
        elif hosts_of(current := kit.check()) != set(map(_host, hosts)) or is_half_over(current):
            authority.renew_coordinator(hosts)
        if not kit.crl.exists():
            authority.write_crl()
        return authority

    @property
    def federation(self) -> str:
        """The federation's name."""
        return str(read_json(self.folder / "federation.json")["federation"])

    def approve(self, request: Path, days: int = DAYS) -> tuple[str, str, Path]:
        """Signs a silo's request; returns its name, the fingerprint of its key and the folder for it.

        Raises:
            IdentityError: If it is no valid request.
        """
        try:
            found = x509.load_pem_x509_csr(request.read_bytes())
            name = str(found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        except (ValueError, IndexError) as error:
            raise IdentityError(f"{request} is not a request of `lightning-fl network request`.") from error
        check_name(name)
        folder = self.folder / "issued" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._issue(request, folder, [f"spiffe://{self.federation}/silo/{name}"], (), is_server=False, days=days)
        return name, fingerprint(found.public_key()), folder

    def renew_coordinator(self, hosts: Sequence[str]) -> None:
        """Gives the coordinator a new certificate for its key."""
        kit = Kit(self.folder / "coordinator")
        names = [f"spiffe://{self.federation}/coordinator"]
        self._issue(kit.folder / "request.csr", kit.folder, names, hosts, is_server=True)

    def revoke(self, name: str) -> int:
        """Revokes every certificate that a silo was given; returns how many.

        Raises:
            IdentityError: If it was given none.
        """
        path = self.folder / "federation.json"
        content = read_json(path)
        serials = content.get("issued", {}).get(name, [])
        if not serials:
            raise IdentityError(f"No certificate was approved for {name!r} here.")
        content["revoked"] = sorted({*content["revoked"], *serials})
        _write_json(path, content)
        self.write_crl()
        return len(serials)

    def write_crl(self) -> None:
        """Writes the list of revoked certificates, also into the coordinator's kit beside the authority."""
        revoked = read_json(self.folder / "federation.json")["revoked"]
        now = datetime.now(timezone.utc)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - _BACKDATED)
            .next_update(now + timedelta(days=CA_DAYS))
            .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        )
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(entry)
        data = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        for folder in (self.folder, self.folder / "coordinator"):
            write_whole(folder / "crl.pem", data)

    def _issue(
        self, request: Path, folder: Path, uris: Sequence[str], hosts: Sequence[str], is_server: bool, days: int = DAYS
    ) -> None:
        found = x509.load_pem_x509_csr(request.read_bytes())
        if not found.is_signature_valid:
            raise IdentityError(f"The signature of {request} is wrong: it was damaged or changed in transit.")
        now = datetime.now(timezone.utc)
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if is_server else ExtendedKeyUsageOID.CLIENT_AUTH
        names = [*map(_host, hosts), *map(x509.UniformResourceIdentifier, uris)]
        # Only the key and the name are taken from the request; everything else is decided here.
        certificate = (
            x509.CertificateBuilder()
            .subject_name(found.subject)
            .issuer_name(self.certificate.subject)
            .public_key(found.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        path = self.folder / "federation.json"
        content = read_json(path)
        issued = content.setdefault("issued", {}).setdefault(folder.name, [])
        issued.append(certificate.serial_number)
        _write_json(path, content)
        write_whole(folder / "cert.pem", certificate.public_bytes(serialization.Encoding.PEM))
        write_whole(folder / "ca.pem", (self.folder / "ca.pem").read_bytes())


def make_request(folder: str | Path, name: str) -> Path:
    """Makes a key, unless there is one, and a request for a certificate; returns the request's path."""
    folder = Path(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_name(name)
    kit = Kit(folder)
    if not kit.key.exists():
        write_whole(kit.key, _private(ec.generate_private_key(ec.SECP256R1())))
    key: Any = serialization.load_pem_private_key(kit.key.read_bytes(), None)
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name))
    path = folder / "request.csr"
    write_whole(path, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


def fingerprint(key: Any) -> str:
    """The SHA-256 of a public key, to be compared by telephone."""
    data = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return ":".join(f"{byte:02x}" for byte in digest.finalize()[:16])


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def hosts_of(certificate: x509.Certificate) -> set[x509.GeneralName]:
    """The names and addresses for which a certificate holds."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {name for name in names if isinstance(name, x509.DNSName | x509.IPAddress)}


def is_half_over(certificate: x509.Certificate) -> bool:
    """Whether half of the time is over for which a certificate holds."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return datetime.now(timezone.utc) > start + (end - start) / 2


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign"
    names += " crl_sign encipher_only decipher_only"
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names.split()})


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1).encode())
