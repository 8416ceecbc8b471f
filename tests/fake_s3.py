"""An S3 store of one's own on 127.0.0.1: moto's server, which speaks the whole protocol, behind a troublemaker.

Keys are checked (a wrong one is refused as Amazon would), every request is recorded, and each of the next answers can
be made late, an error, or half of what was promised.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
SLOW_DOWN = (503, "SlowDown", "Please reduce your request rate.")
Trouble = Callable[[str, str], "Answer | None"]


@dataclass(frozen=True)
class Answer:
    """What is answered instead. status 200: the true answer. late_s: before anything is sent. cut: half is sent."""

    status: int = 200
    code: str = ""
    message: str = ""
    late_s: float = 0.0
    cut: bool = False


@dataclass
class FakeS3:
    """A store with a bucket. troubles: asked in turn by each request (method, path), until one has an answer."""

    bucket: str = "pictures"
    troubles: list[Trouble] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path with query, Range

    def __enter__(self) -> FakeS3:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        app = DomainDispatcherApplication(create_backend_app)

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_request(self, *_: Any) -> None:
                pass

        self.server = make_server("127.0.0.1", 0, self._between(app), threaded=True, request_handler=Quiet)
        self.server.daemon_threads = True  # type: ignore[attr-defined]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self._reset()
        self.client.create_bucket(Bucket=self.bucket)
        self.requests.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._reset()
        self.server.shutdown()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def client(self) -> Any:
        """A client of its own, which no trouble meets."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3", endpoint_url=self.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1",
            config=Config(user_agent_extra="untroubled"),
        )  # fmt: skip

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def put_in_parts(self, key: str, parts: Iterable[bytes]) -> None:
        """An object of several parts, whose ETag is no hash of its bytes."""
        client, place = self.client, {"Bucket": self.bucket, "Key": key}
        upload = client.create_multipart_upload(**place)["UploadId"]
        sent = [
            {"PartNumber": n, "ETag": client.upload_part(**place, UploadId=upload, PartNumber=n, Body=data)["ETag"]}
            for n, data in enumerate(parts, start=1)
        ]
        client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": sent})

    def got(self) -> list[str]:
        """Keys whose content was asked for."""
        base = f"/{self.bucket}/"
        return [path[len(base) :] for method, path, _ in self.requests
                if method == "GET" and path.startswith(base) and "?" not in path]  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What a dataset of it has."""
        return {
            "type": "aws", "aws_bucket_name": self.bucket, "aws_endpoint_url": self.url, "aws_region_name": "us-east-1",
            "aws_access_key_id": KEY, "aws_secret_access_key": SECRET,
        }  # fmt: skip

    def _reset(self) -> None:
        import httpx

        httpx.post(f"{self.url}/moto-api/reset")

    def _between(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """The application, with the troubles before it."""

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            if "untroubled" in environ.get("HTTP_USER_AGENT", "") or environ["PATH_INFO"].startswith("/moto-api"):
                return app(environ, start)
            query = f"?{environ['QUERY_STRING']}" if environ.get("QUERY_STRING") else ""
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            self.requests.append((method, path + query, environ.get("HTTP_RANGE", "")))
            found = next((told for trouble in self.troubles if (told := trouble(method, path)) is not None), Answer())
            refusal = found if found.status != 200 else _keys_refused(environ.get("HTTP_AUTHORIZATION", ""))
            time.sleep(found.late_s)
            if refusal is not None:
                return _error(refusal, start)
            return _cut(app(environ, start)) if found.cut else app(environ, start)

        return answer


def times(count: int, answer: Answer, where: str = "") -> Trouble:
    """The answer, so many times, to requests whose path holds `where`."""
    left = [count]
    lock = threading.Lock()

    def trouble(_: str, path: str) -> Answer | None:
        with lock:
            if where not in path or not left[0]:
                return None
            left[0] -= 1
            return answer

    return trouble


def _keys_refused(authorization: str) -> Answer | None:
    """What Amazon answers to keys that are not KEY. (moto checks the signature of none.)"""
    if not authorization:
        return Answer(403, "AccessDenied", "Access Denied")
    if f"Credential={KEY}/" not in authorization:
        return Answer(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")
    return None


def _error(answer: Answer, start: Callable[..., Any]) -> Iterable[bytes]:
    body = f"<Error><Code>{answer.code}</Code><Message>{answer.message}</Message></Error>".encode()
    start(f"{answer.status} x", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _cut(body: Iterable[bytes]) -> Iterable[bytes]:
    """The first half; then the connection breaks."""
    whole = b"".join(body)
    yield whole[: len(whole) // 2]
    raise ConnectionAbortedError("cut")
