"""An S3 server on this machine: moto's, reached over HTTP as any other.

In: nothing. Out: a server, fixtures that give a bucket on it to each test, and the environment in which
clients find it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from free_ports import reserved_port

KEYS = {"AWS_ACCESS_KEY_ID": "not-a-key", "AWS_SECRET_ACCESS_KEY": "not-a-secret-either"}


@dataclass
class S3Server:
    """A running server.

    Attributes:
        port: On the loopback interface; the same after a stop and a start.
        environment: For processes that are to find the server.
    """

    port: int
    environment: dict[str, str] = field(default_factory=dict)
    _server: Any = None

    def __post_init__(self) -> None:
        self.environment = {
            **KEYS,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        """Stop to answer; what was put is there again after `start`."""
        self._server.stop()

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="not-a-key",
            aws_secret_access_key="not-a-secret-either",
        )

    def make_bucket(self) -> str:
        name = f"bucket-{uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Return what a bucket holds, by key."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [each["Key"] for page in pages for each in page.get("Contents", ())]
        return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@contextmanager
def serving_s3() -> Iterator[S3Server]:
    """Serve until the block ends."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with reserved_port() as port:
        server = S3Server(port)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One server for all tests, each of which makes its own bucket."""
    for package in ("s3fs", "moto", "flask", "flask_cors"):
        pytest.importorskip(package)
    with serving_s3() as server:
        yield server


@pytest.fixture
def s3(s3_server, monkeypatch) -> S3Server:
    """The server, which clients in this process find as well."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server
