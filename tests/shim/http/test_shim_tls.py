"""The shim over HTTPS: with a certificate made for the test, and clients that verify it."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import requests
import trustme
from trajectories import TRAINER, group, number_of, shim_process, with_token

from lachesis.broker import EmbeddedRedis, connect_blocking


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(certificate chain, its key, the authority's certificate) for 127.0.0.1."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    cert, key, ca = (tmp_path / name for name in ("chain.pem", "key.pem", "ca.pem"))
    cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    return cert, key, ca


def test_a_job_over_https(
    shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, certificate: tuple[Path, Path, Path]
) -> None:
    cert, key, ca = certificate
    with connect_blocking(shared_redis.url, run_name) as blocking:
        token, _ = blocking.call(blocking.broker.tokens.create, "admin")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.set_inheritable(True)
        fd, port = listener.fileno(), listener.getsockname()[1]
        url = f"https://127.0.0.1:{port}"
        log = tmp_path / "log"
        arguments = ("--redis-url", shared_redis.url, "--fd", str(fd), "--tls-cert", str(cert), "--tls-key", str(key))
        with shim_process(log, *arguments, inherit=(fd,)) as shim:
            run = with_token(f"{url}/runs/{run_name}", token)
            assert requests.get(f"{url}/healthz", verify=str(ca), timeout=30).json()["status"] == "ok"
            with pytest.raises(requests.exceptions.SSLError):
                requests.get(f"{url}/healthz", timeout=10)
            with httpx.Client(verify=ssl.create_default_context(cafile=ca), timeout=30) as client:
                client.post(f"{run}/register", json={**TRAINER, "max_token_len": 50_000}).raise_for_status()
                assert client.get(f"{run}/batch").json() == {"batch": None}
                for number in (1, 2):
                    client.post(f"{run}/scored_data", json=group(number, 4, length=50_000)).raise_for_status()

                with client.stream("GET", f"{run}/batch") as answer:  # given up in the middle
                    assert next(answer.iter_raw(1000))
                assert [number_of(item) for item in client.get(f"{run}/batch").json()["batch"]] == [1]
                client.post(f"{run}/scored_data", json=group(3, 4)).raise_for_status()
                assert [number_of(item) for item in client.get(f"{run}/batch").json()["batch"]] == [2]
                leave_unread(port, ca, f"/runs/{run_name}/batch", token, shared_redis, run_name)
                assert [number_of(item) for item in client.get(f"{run}/batch").json()["batch"]] == [3]
            shim.terminate()
            assert shim.wait(15) == 0
    assert url in log.read_text()


def leave_unread(port: int, ca: Path, path: str, token: str, redis: EmbeddedRedis, run: str) -> None:
    """Ask for a small batch, and close the connection when its last byte was written, without reading any."""
    with connect_blocking(redis.url, run) as blocking:
        broker = blocking.broker

        def notes() -> list[bytes]:
            state = blocking.call(broker.redis.hgetall, broker.keys.state)
            return [note for name, note in state.items() if name.startswith(b"sent:") and b'"step":3' in note]

        context = ssl.create_default_context(cafile=ca)
        with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1") as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
            wait_for(lambda: any(b'"whole":true' in note for note in notes()))
        wait_for(lambda: not notes())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_certificate_that_cannot_be_served_is_named(tmp_path: Path, certificate: tuple[Path, Path, Path]) -> None:
    cert, key, ca = certificate
    for arguments, says in (
        (("--tls-cert", str(cert)), "--tls-cert and --tls-key need each other"),
        (("--tls-key", str(key)), "--tls-cert and --tls-key need each other"),
        (("--tls-cert", str(ca), "--tls-key", str(key)), "not the PEM files of a certificate and its key"),
        (("--tls-cert", "nowhere.pem", "--tls-key", str(key)), "tls_cert = 'nowhere.pem'"),
    ):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        with shim_process(log, "--redis-url", "unix:///nowhere", "--port", "0", *arguments) as shim:
            assert shim.wait(20) == 2
        assert says in log.read_text()
        assert log.read_text().count("\n") == 1
