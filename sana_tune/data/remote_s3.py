"""Pictures in a bucket of S3, or of any store that speaks its protocol (MinIO, R2, Ceph …). No torch.

s3fs does the signing and the transport, one request at a time; how often and how long is decided here (`remote`).
Nothing is ever written to the bucket.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from sana_tune.config.secrets import masked
from sana_tune.data.remote import PATIENCE, GaveUp, Passing, Patience, Rest, persist
from sana_tune.errors import Problem, UserError
from sana_tune.store import Entry, StoreLost

Value = TypeVar("Value")

FIRST_BLOCK = 1 << 16  # bytes; the header of nearly every picture is in it
# The protocol's error codes, by what they mean. https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_NOT_KNOWN = {"InvalidAccessKeyId", "InvalidClientTokenId", "InvalidToken", "ExpiredToken"}
_BAD_SECRET = {"SignatureDoesNotMatch", "AuthFailure"}
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "401", "Forbidden", "Unauthorized"}
_NO_BUCKET = {"NoSuchBucket"}
_NO_KEY = {"NoSuchKey", "404", "NotFound"}
_PASSING = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException"}
_PASSING |= {"OperationAborted", "BadGateway", "429", "500", "502", "503", "504", "RequestTimeTooSlow", "Busy"}
_CHECK_ENDS = "check the access key and the secret key (aws_access_key_id, aws_secret_access_key), or the environment's"


class Place(NamedTuple):
    """Where a bucket is, and with whose keys it is read; keys of None: the environment's."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    key: str | None = None
    secret: str | None = None
    token: str | None = None
    connections: int = 16


class S3Store:
    """The objects of a bucket below a prefix, read-only; keys are relative to the prefix. Hidden ones do not count.

    An entry's mtime_ns is made of the object's ETag: one that was copied or written again as it was is not read again.
    """

    all_pictures = False
    far_away = True

    def __init__(self, place: Place, patience: Patience = PATIENCE):
        self.place, self.patience = place, patience
        self.rest = Rest()
        prefix = place.prefix.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._root = f"s3://{place.bucket}/{self._prefix}"
        self._files: Any = None
        self._sizes: dict[str, int] = {}
        self._reached = False

    def check(self) -> None:
        """UserError when the bucket is not there, the keys are refused, or the network fails."""
        next(iter(self._pages(1)), None)

    def list(self) -> Iterator[Entry]:
        """Every object, sorted by key, page by page. UserError when they cannot be listed."""
        found = [entry for page in self._pages(1000) for entry in page]
        self._sizes = {entry.key: entry.size_bytes for entry in found}
        return iter(sorted(found))

    def entry(self, key: str) -> Entry:
        """Size and mark of one object."""
        told = self._ask(lambda: self._fs.call_s3("head_object", Bucket=self.place.bucket, Key=self._prefix + key), key)
        return _entry(key, told["ContentLength"], told.get("ETag"), told.get("LastModified"))

    def exists(self, key: str) -> bool:
        """Whether there is an object of this key. StoreLost when the bucket cannot be reached."""
        try:
            self.entry(key)
        except StoreLost:
            raise
        except UserError:
            return False
        return True

    def open(self, key: str) -> BinaryIO:
        """The object, fetched by ranges as it is read: a header costs one small request."""
        size = self._sizes.get(key)
        return cast(BinaryIO, _Ranged(self, key, self.entry(key).size_bytes if size is None else size))

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        return self.read_range(key, None, None)

    def read_range(self, key: str, begin: int | None, end: int | None) -> bytes:
        """The bytes from `begin` up to, not including, `end`; None, None: all of them."""
        path = f"{self.place.bucket}/{self._prefix}{key}"
        return self._ask(lambda: self._fs.cat_file(path, start=begin, end=end), key)

    def locate(self, key: str) -> str:
        """s3://bucket/prefix/key."""
        return self._root + key

    @property
    def _fs(self) -> Any:
        """s3fs, connected at the first use. Threads that come at once may connect twice, which does no harm."""
        if self._files is None:
            self._files = _connected(self.place, self.patience)
        return self._files

    def _pages(self, size: int) -> Iterator[list[Entry]]:
        """The pages of the listing, `size` objects each."""
        more: dict[str, Any] = {}
        while True:
            asked = {"Bucket": self.place.bucket, "Prefix": self._prefix, "MaxKeys": size, **more}
            page = self._ask(lambda asked=asked: self._fs.call_s3("list_objects_v2", **asked), None)
            yield [entry for told in page.get("Contents", []) if (entry := self._listed(told)) is not None]
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _listed(self, told: dict[str, Any]) -> Entry | None:
        """An object of a listing; None for a mark of a folder and for hidden ones."""
        key = told["Key"][len(self._prefix) :]
        if not key or key.endswith("/") or any(part.startswith(".") for part in key.split("/")):
            return None
        return _entry(key, told["Size"], told.get("ETag"), told.get("LastModified"))

    def _ask(self, action: Callable[[], Value], key: str | None) -> Value:
        """A request's answer, tried again while it may pass. key: None for one that is about the whole bucket."""
        try:
            answer = persist(lambda: _attempt(action), self.patience, self.rest)
        except GaveUp as error:
            if key is not None and self._answers():
                what = f"cannot be read: {error}"
                raise UserError(Problem(self.locate(key), what, "the store has the others; try again later")) from error
            raise StoreLost(self._unreachable(str(error))) from error
        except _Refused as error:
            raise self._refusal(error, key) from error
        self._reached = True
        return answer

    def _answers(self) -> bool:
        """Whether the store answers at all, asked once."""
        try:
            _attempt(lambda: self._fs.call_s3("list_objects_v2", Bucket=self.place.bucket, MaxKeys=1))
        except (Passing, _Refused):
            return False
        return True

    def _refusal(self, error: _Refused, key: str | None) -> UserError:
        """What a refusal means, in words."""
        bucket, where = self.place.bucket, self._root
        if error.code in _NO_KEY and key is not None:
            return UserError(Problem(self.locate(key), "is not there any more", "was it deleted or renamed?"))
        if error.code in _NO_BUCKET | _NO_KEY:
            gone = "was there and is gone now" if self._reached else "does not exist"
            what = f"the bucket {bucket} {gone} at {self._address}"
            return StoreLost(Problem(where, what, "check aws_bucket_name, aws_endpoint_url and aws_region_name"))
        if error.code in _NOT_KNOWN:
            return StoreLost(Problem(where, f"the store does not know the access key ({error.code})", _CHECK_ENDS))
        if error.code in _BAD_SECRET:
            return StoreLost(Problem(where, f"the secret key does not fit the access key ({error.code})", _CHECK_ENDS))
        if error.code in _DENIED and key is not None and self._reached:
            return UserError(Problem(self.locate(key), "may not be read with these keys", "grant s3:GetObject for it"))
        if error.code in _DENIED and self._fs.anon:
            what = "no keys are set, none were found in the environment, and the bucket is not open to everyone"
            fix = "set aws_access_key_id and aws_secret_access_key, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            return StoreLost(Problem(where, what, fix))
        if error.code in _DENIED:
            what = f"these keys may not read the bucket ({error.code})"
            return StoreLost(Problem(where, what, "grant them s3:ListBucket and s3:GetObject, or use others"))
        place = where if key is None else self.locate(key)
        kind = StoreLost if key is None else UserError
        return kind(Problem(place, f"the store refuses it: {error.reason}", "see what the store's documentation says"))

    def _unreachable(self, reason: str) -> Problem:
        what = f"the store at {self._address} does not answer as it should: {reason}"
        fix = "check the network and aws_endpoint_url; what is cached is kept, and the next start goes on from there"
        return Problem(self._root, what, fix)

    @property
    def _address(self) -> str:
        return str(masked("address", self.place.endpoint)) if self.place.endpoint else "Amazon S3"


class _Refused(Exception):
    """An answer that will not change: the protocol's code, and the store's words."""

    def __init__(self, code: str, reason: str):
        self.code, self.reason = code, reason
        super().__init__(reason)


def _attempt(action: Callable[[], Value]) -> Value:
    """One request. Raises Passing or _Refused."""
    from aiohttp import ClientError as NetworkError
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError as NoAnswer
    from fsspec.exceptions import FSTimeoutError

    try:
        return action()
    except (NoAnswer, NoConnection, NetworkError, FSTimeoutError, TimeoutError, ConnectionError) as error:
        raise Passing(_words(error)) from error
    except ClientError as error:
        raise _judged(error) from error
    except BotoCoreError as error:
        raise _Refused(type(error).__name__, str(error)) from error
    except OSError as error:  # s3fs's words for a ClientError, which it names as the cause
        if isinstance(error.__cause__, ClientError):
            raise _judged(error.__cause__) from error
        raise Passing(_words(error)) from error


def _judged(error: Any) -> Exception:
    """What the store's answer means: a failure that may pass, or a refusal."""
    told = error.response.get("Error", {})
    status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    code = str(told.get("Code") or status)
    reason = f"{code}: {told['Message']}" if told.get("Message") else code
    if code in _PASSING or (status.startswith("5") and status != "501"):
        return Passing(f"it says {reason}")
    return _Refused(code, reason)


def _words(error: BaseException) -> str:
    from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError

    if isinstance(error, (ReadTimeoutError, ConnectTimeoutError, TimeoutError)):
        return "no answer in time"
    if isinstance(error, EndpointConnectionError):
        return "no connection"
    text = str(masked("reason", str(error)))
    return text or type(error).__name__


def _entry(key: str, size: int, etag: str | None, modified: datetime | None) -> Entry:
    """An entry whose time stands for the ETag; of a store without them it is the time of the last change."""
    if etag:
        digest = hashlib.blake2b(etag.strip('"').encode("utf-8"), digest_size=8).digest()
        return Entry(key, size, int.from_bytes(digest, "big") >> 1)
    return Entry(key, size, int(modified.timestamp() * 1e9) if modified else 0)


def _connected(place: Place, patience: Patience) -> Any:
    """s3fs for this place, without a signature where there are no keys at all. Its own retries and caches are off.

    Raises UserError when it is not installed, or when the environment's credentials are no good.
    """
    try:
        from botocore.exceptions import BotoCoreError
        from botocore.session import get_session
        from s3fs import S3FileSystem
    except ImportError as error:
        what = f"type aws needs s3fs, which cannot be imported ({error})"
        raise UserError(Problem(f"s3://{place.bucket}", what, "install it: pip install '.[s3]'")) from None

    try:
        anonymous = place.key is None and get_session().get_credentials() is None
    except BotoCoreError as error:
        what = f"the environment's credentials cannot be used: {error}"
        raise UserError(
            Problem(f"s3://{place.bucket}", what, "mend them (AWS_PROFILE, ~/.aws), or set the keys")
        ) from None

    class Once(S3FileSystem):
        """Each request is made once: `persist` decides about a second time."""

        retries = 1

    return Once(
        anon=anonymous,
        key=place.key,
        secret=place.secret,
        token=place.token,
        endpoint_url=place.endpoint,
        client_kwargs={"region_name": place.region} if place.region else None,
        config_kwargs={
            "connect_timeout": patience.connect_s,
            "read_timeout": patience.read_s,
            "max_pool_connections": place.connections,
            "retries": {"max_attempts": 0},
        },
        max_concurrency=1,
        use_listings_cache=False,
        skip_instance_cache=True,
    )


class _Ranged(io.RawIOBase):
    """An object read by ranges: from its start, in blocks that double, each fetched once, whatever order is read in.

    A picture's header is in the first block; who reads on, as PNGs with metadata behind the pixels need, gets all of
    it in a few requests.
    """

    def __init__(self, store: S3Store, key: str, size: int):
        self._store, self._key, self._size = store, key, size
        self._bytes = bytearray()
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence])
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._size, self._place + size)
        self._fetch(end)
        found = bytes(self._bytes[self._place : end])
        self._place = max(self._place, end)
        return found

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def _fetch(self, end: int) -> None:
        """Have at least the first `end` bytes."""
        while len(self._bytes) < end:
            have = len(self._bytes)
            upto = min(self._size, max(end, FIRST_BLOCK, 2 * have))
            more = self._store.read_range(self._key, have, upto)
            if not more:  # it was replaced by a shorter one
                self._size = have
                return
            self._bytes += more
