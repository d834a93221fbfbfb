"""Certificates for tests, made by the openssl command: good ones, and each that must not be trusted."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path


def why_no_certificates() -> str | None:
    """Return why none can be made here."""
    if shutil.which("openssl") is None:
        return "the openssl command, which makes the certificates, is not installed"
    return None


class Certificates:
    """An authority of our own, "ca", and what it signed: a "server" for 127.0.0.1, one "expired", a
    "stranger" of another name, a "client". "other" has signed itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        usage = "keyUsage=critical,keyCertSign,cRLSign"
        self.openssl(
            "req", "-x509", *self.new_key("ca"), "-days", "2", "-out", "ca.pem", "-addext", usage
        )
        self.openssl(
            *("req", "-x509", *self.new_key("other"), "-days", "2", "-out", "other.pem"),
            *("-addext", usage, "-addext", "subjectAltName=IP:127.0.0.1"),
        )
        self.sign("server", "subjectAltName=IP:127.0.0.1")
        self.sign("expired", "subjectAltName=IP:127.0.0.1", days=-1)
        self.sign("stranger", "subjectAltName=DNS:other.example")
        self.sign("client", "extendedKeyUsage=clientAuth")

    def openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)

    def new_key(self, name: str) -> list[str]:
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        return [*curve, "-keyout", f"{name}.key", "-subj", f"/CN={name}"]

    def sign(self, name: str, extension: str, days: int = 2) -> None:
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"{extension}\nauthorityKeyIdentifier=keyid\n")
        self.openssl("req", "-new", *self.new_key(name), "-out", f"{name}.csr")
        self.openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key"),
            *("-CAcreateserial", "-days", str(days)),
            *("-extfile", extensions.name, "-out", f"{name}.pem"),
        )

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def server(self, name: str = "server", *, asks_client: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self[f"{name}.pem"], self[f"{name}.key"])
        if asks_client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self["ca.pem"])
        return context
