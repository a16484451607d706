# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "bottle>=0.12.25",
#   "click>=8.1",
#   "Faker>=30",
#   "multipart>=1.0",
#   "pydantic>=2.11",
#   "sqlite-utils>=3.38",
#   "tabulate>=0.9",
#   "waitress>=2.1.2",
# ]
# ///
"""taskapi: a data task server in one file.

It answers at once and does the heavy work in the background: it generates Faker records, takes files in and
writes exports. Jobs and records live in one SQLite database, so that nothing acknowledged is lost in a crash.

The file reads top-down; a room uses only the rooms above it.

 0 Head       this text, the imports, the version
 1 Errors     what can go wrong, and the HTTP status of each
 2 Settings   one model behind flags, environment, file and help
 3 Models     the shapes that go over the wire, and the moves a job may make
 4 Store      the only SQL: the job table and the record tables
 5 Generator  a checked recipe in, rows out; the only Faker
 6 Files      the data folder: drafts, uploads, exports, snapshots; the formats
 7 Job types  what each job means: a model and a function
 8 Queue      who runs which job, and when; the engine, which is all but HTTP
 9 HTTP       thin handlers, one way for bodies and errors
10 Page       the pages for people, with no outside asset
11 Server     the service as a whole, the Waitress channel, the command line

(PYTEST_DONT_REWRITE: as a pytest plugin it is imported early, and its asserts are to stay as they are.)
"""
from __future__ import annotations

import base64
import calendar
import codecs
import csv
import difflib
import errno
import functools
import gzip
import hashlib
import http.client
import inspect
import io
import itertools
import json
import locale as locales
import logging
import math
import mmap
import os
import pickle
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import string
import struct
import sys
import tarfile
import tempfile
import threading
import tomllib
import types
import zipfile
import zlib
from bisect import bisect, bisect_left
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque
from collections.abc import (
    Callable,
    Collection,
    Container,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, tzinfo
from datetime import time as time_of_day
from decimal import ROUND_HALF_UP, Context, Decimal, InvalidOperation
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.utils import format_datetime
from encodings.aliases import aliases
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache, partial
from hashlib import blake2b
from html import escape
from http import HTTPStatus
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import chain, groupby, pairwise, product
from operator import itemgetter
from pathlib import Path
from time import monotonic, sleep, time
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    BinaryIO,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    Protocol,
    Self,
    TypeVar,
    cast,
    get_args,
    get_origin,
)
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit
from uuid import UUID
from weakref import WeakValueDictionary

PACKAGES = {"bottle": "0.12.25", "click": "8.1", "Faker": "30", "multipart": "1.0", "pydantic": "2.11",
            "sqlite-utils": "3.38", "tabulate": "0.9", "waitress": "2.1.2"}  # the least versions that will do
FORMAT_PACKAGES = {"pyarrow": "20", "python-calamine": "0.9", "XlsxWriter": "3.2.5"}  # of the extra `formats`


def packages_amiss() -> str:
    """What to tell somebody whose packages are missing or too old, in one line; nothing if all are right."""
    missing, older = [], {}
    for name, least in PACKAGES.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:  # a frozen program has its packages without that
            missing += [] if find_spec(name.lower().replace("-", "_")) else [name]
            continue
        numbers, needed = ([int(number) for number in re.findall(r"\d+", text)] for text in (found, least))
        if numbers < needed:
            older[name] = f"{name} >= {least}, found {found}"
    if missing:
        wanted = " ".join(f'"{name}>={least}"' for name, least in PACKAGES.items())
        return f"taskapi needs {', '.join(missing)}: pip install {wanted}"
    return f"taskapi needs {'; '.join(older.values())}: pip install -U {' '.join(older)}" if older else ""


try:
    import bottle  # type: ignore[import-untyped, unused-ignore]
    import click
    import multipart  # type: ignore[import-untyped, unused-ignore]
    import waitress  # type: ignore[import-untyped, unused-ignore]
    import waitress.channel  # type: ignore[import-untyped, unused-ignore]
    import waitress.parser  # type: ignore[import-untyped, unused-ignore]
    import waitress.task  # type: ignore[import-untyped, unused-ignore]
    import waitress.wasyncore  # type: ignore[import-untyped, unused-ignore]
    from click.core import ParameterSource
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        SkipValidation,
        ValidationError,
        WithJsonSchema,
        WrapValidator,
        computed_field,
        model_serializer,
        model_validator,
    )
    from pydantic.alias_generators import to_camel, to_snake
    from pydantic.json_schema import models_json_schema
    from pydantic_core import from_json, to_json
    from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]
except ImportError:
    if not packages_amiss():
        raise
if _amiss := packages_amiss():
    # Somebody who runs it is to read one line; somebody who imports it can catch this.
    raise (SystemExit if __name__ == "__main__" or Path(sys.argv[0]).stem == "taskapi" else ImportError)(_amiss)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from faker.generator import Generator as FakerGenerator
    from faker.providers import BaseProvider

__version__ = "2.0.0"

Json = Any  # whatever json.loads can return


# ==== 1 Errors: what can go wrong, and the HTTP status of each ====


class FieldProblem(NamedTuple):
    """One thing wrong with one field of a request; `field` is a dotted path such as `schema.age.min`."""

    field: str
    message: str


def _clipped(text: str) -> str:
    """A message may quote what a client sent, at any length."""
    return text if len(text) < 1000 else text[:998] + "…"


class TaskError(Exception):
    """A failure that a client causes or meets: its text is the short message, its class has the status."""

    http_status = 500
    retry_after: int | None = None  # seconds, sent as Retry-After

    def __init__(self, message: str, fields: Sequence[FieldProblem] = (), headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.fields = tuple(fields)
        self.headers = dict(headers or {})
        if self.retry_after is not None:
            self.headers.setdefault("Retry-After", str(self.retry_after))

    def body(self) -> dict[str, Json]:
        """The error as every client sees it (contract, section 7)."""
        body: dict[str, Json] = {"error": _clipped(str(self)), "status": self.http_status}
        if self.fields:
            body["fields"] = [{"field": _clipped(field), "message": _clipped(text)} for field, text in self.fields]
        return body


class BadRequest(TaskError):
    """The request is wrong; `fields` says where."""

    http_status = 400

    @classmethod
    def of(cls, field: str, message: str) -> BadRequest:
        """One field is wrong."""
        return cls(f"{field}: {message}", [FieldProblem(field, message)])


class Unauthorized(TaskError):
    """The call brings no token, or another one."""

    http_status = 401


class WrongValue(BadRequest):
    """What a field is compared with is no value of its kind."""


class CrossSite(TaskError):
    """A browser sent this on behalf of another site's page."""

    http_status = 403


class NotFound(TaskError):
    """No such path, job, file or record type."""

    http_status = 404


class MethodNotAllowed(TaskError):
    """The path exists, the method does not."""

    http_status = 405


class Conflict(TaskError):
    """The state of the job, or the idempotency key, forbids it."""

    http_status = 409


class PreconditionFailed(TaskError):
    """The file is not the one that If-Match names."""

    http_status = 412


class TooLarge(TaskError):
    """A JSON body over the limit."""

    http_status = 413


class UnsupportedMedia(TaskError):
    """The body is of another type, or in a coding that is not gzip."""

    http_status = 415


class RangeNotSatisfiable(TaskError):
    """A download was asked for bytes past the end of the file."""

    http_status = 416


class WrongHost(TaskError):
    """The Host header names a host that this server is not."""

    http_status = 421


class HeadersTooLarge(TaskError):
    """The request's headers are over the limit."""

    http_status = 431


class StorageError(TaskError):
    """The database or the disk cannot be used at the moment; it may come back."""

    http_status = 500


class DiskFull(StorageError):
    """There is no room left for what has to be written."""


class Unavailable(TaskError):
    """Too busy or stopping; the same request may succeed later."""

    http_status = 503
    retry_after = 1


class JobFailed(TaskError):
    """A job cannot be done: the text becomes the job's error."""


class StartupError(TaskError):
    """The program cannot do what it was started for; `exit_code` is what it ends with."""

    exit_code = 1


class InUse(StartupError):
    """Another process has the data folder; `holder` is what that tells of itself: pid, host, url."""

    def __init__(self, message: str, holder: Mapping[str, Json]):
        super().__init__(message)
        self.holder = dict(holder)


class SettingError(StartupError):
    """A setting is unknown or has a bad value."""

    exit_code = 2


class Interrupted(Exception):
    """Raised inside a running job that must stop now (stopping server, canceled, or not its turn any more)."""


def nearest(word: str, words: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of `words` that look like `word`, or else end in it, the likest first; case does not matter."""
    by_lower = {candidate.lower(): candidate for candidate in words}
    hits = difflib.get_close_matches(word.lower(), by_lower, count, 0.6) or [
        candidate for candidate in by_lower if len(word) > 3 and candidate.endswith(word.lower())][:count]
    return [by_lower[hit] for hit in hits]


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The tail of an error message: `; did you mean 'a' or 'b'?`, or nothing when no word is near."""
    hits = nearest(word, words)
    return f"; did you mean {' or '.join(map(repr, hits))}?" if hits else ""


def problem_message(detail: Mapping[str, Any]) -> str:
    """Pydantic's message as part of a sentence."""
    message = str(detail["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def field_problems(error: ValidationError, *prefix: str) -> list[FieldProblem]:
    """What pydantic found wrong, five at most, as paths and short messages."""
    problems = []
    for detail in error.errors(include_url=False, include_input=False, include_context=False)[:5]:
        steps = [str(step) for step in (*prefix, *detail["loc"])]  # some say which member of a union was tried
        path = ".".join(step for step in steps if not re.match(r"function-|constrained-|(list|tuple|dict)\[", step))
        problems.append(FieldProblem(path or "body", problem_message(detail)))
    return problems


# ==== 2 Settings: one model behind flags, environment, file and help ====

_SIZE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def _bytes_count(value: Json) -> Json:
    """Reads `100 MiB` or `5000000` as a number of bytes; leaves anything else for pydantic to refuse."""
    match = re.fullmatch(r"\s*(\d+)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    return int(match[1]) * _SIZE_UNITS[match[2]] if match and match[2] in _SIZE_UNITS else value


def _comma_list(value: Json) -> Json:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _origin(text: str) -> str:
    if not re.fullmatch(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?|http://(localhost|127\.0\.0\.1):\*", text,
                        re.ASCII):
        raise ValueError(f"{text!r} is not an origin such as https://app.example or http://localhost:*")
    return text


def _secret(text: str) -> str:
    if not re.fullmatch("[!-~]+", text):
        raise ValueError("should be letters, digits and marks, without spaces: it has to go into a header")
    return text


def flag_of(name: str) -> str:
    """How the flag of a setting or of a key on the wire is written: --max-records, --order-by."""
    return "--" + re.sub(r"([A-Z])", r"-\1", name).lower().replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return f"TASKAPI_{name.upper()}"


class Settings(BaseModel):
    """Everything that can be set, each once: a flag, a `TASKAPI_` variable, a key of `taskapi.toml`, a README row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8080, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    data_dir: Path = Field(default=Path("data"), description="Folder for the database, uploads and exports.")
    database: Path | None = Field(
        default=None, description="The database file (default: taskapi.db in the data folder).")
    workers: int = Field(default=16, ge=1, le=64, description="Jobs that run at the same time.")
    threads: int = Field(
        default=32, ge=2, le=256,
        description="Requests that are answered at the same time; half of them may wait for a job.")
    max_upload_bytes: Annotated[int, BeforeValidator(_bytes_count)] = Field(
        default=100 * 2**20, ge=1, le=2**50, description="Largest upload; units such as `100 MiB` are understood.")
    upload_types: Annotated[tuple[str, ...], BeforeValidator(_comma_list)] = Field(
        default=("csv", "tsv", "json", "ndjson", "jsonl", "txt", "xml", "gz", "zip", "pdf", "png", "jpg", "xlsx",
                 "parquet"),
        description="File name extensions that may be uploaded, separated by commas.")
    max_records: int = Field(default=10_000_000, ge=1, le=2**48, description="Most records that one job may generate.")
    max_pending: int = Field(default=10_000, ge=1, le=10**9, description="Most jobs that may wait; then 503.")
    max_attempts: int = Field(default=3, ge=1, le=100,
                              description="Attempts in a row without progress after which a job fails.")
    retention_days: float = Field(default=0, ge=0, le=36500, description="Days to keep finished jobs; 0 keeps them.")
    seed: int | None = Field(
        default=None, ge=0, le=2**63 - 1,
        description="Seed of the requests that name none (default: another one each time).")
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_comma_list)] = Field(
        default=(), description="Host names, beside the loopback ones, that requests may be addressed to.")
    cors_origins: Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_comma_list)] = Field(
        default=(), description="Origins of web pages that may use this server, such as `https://app.example` or "
                                "`http://localhost:*`.")
    token: Annotated[str, AfterValidator(_secret)] | None = Field(
        default=None, repr=False, description="Secret that every call but `GET /` has to bring, as `Authorization: "
                                              "Bearer`.")
    no_token: bool = Field(default=False, description="Says that no token is wanted where others can reach the port.")
    test_controls: bool = Field(
        default=False, description="Lets tests make requests and jobs fail, set the clock and start anew: `/test/`.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level that is logged.")
    log_format: Literal["text", "json"] = Field(
        default="text", description="One line of text or of JSON for each event.")

    @property
    def database_path(self) -> Path:
        """The database file, absolute."""
        return (self.database or self.data_dir / "taskapi.db").absolute()

    @model_validator(mode="after")
    def _open_bind_is_guarded(self) -> Settings:
        if self.token and self.no_token:
            raise ValueError("no_token: there is a token")
        if self.host in (*_LOOPBACK_NAMES, "::1"):
            return self
        if self.test_controls:
            raise ValueError(f"test_controls: host {self.host} is not loopback, where everybody could use them")
        # Without a Host check on a public address any web page could reach this server under a name of its own.
        if not self.allowed_hosts:
            raise ValueError(f"host {self.host} is not loopback: set allowed_hosts to the names clients will use")
        if not self.token and not self.no_token:
            raise ValueError(f"host {self.host} is not loopback: set a token, or no_token to let everybody in")
        return self

    @classmethod
    def of(cls, values: Mapping[str, Json], sources: Mapping[str, str]) -> Settings:
        """Checks values as they were written. sources: what each is called there. Raises SettingError that names it."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = field_problems(error)[0]
            name = problem.field.split(".")[0]
            where = sources.get(name, name if name in cls.model_fields else "")
            raise SettingError(f"{where}: {problem.message}" if where else problem.message) from None

    @classmethod
    def shown_default(cls, name: str) -> str:
        """A setting's default as people would write it; nothing where there is none."""
        default = cls.model_fields[name].default
        if default is None or default is False:
            return ""
        return ",".join(default) if isinstance(default, tuple) else str(default)

    @classmethod
    def table(cls) -> str:
        """The README's table of settings, in Markdown."""
        rows = ["| variable | flag | default | meaning |", "|---|---|---|---|"]
        for name, field in cls.model_fields.items():
            default = f"`{shown}`" if (shown := cls.shown_default(name)) else ""
            rows.append(f"| `{variable_of(name)}` | `{flag_of(name)}` | {default} | {field.description} |")
        return "\n".join(rows)


def read_settings_file(environ: Mapping[str, str], folder: Path) -> dict[str, Json]:
    """What the file that TASKAPI_CONFIG names has, or taskapi.toml in `folder` if there is one; raises SettingError."""
    named = environ.get("TASKAPI_CONFIG")
    path = Path(named) if named else folder / "taskapi.toml"
    if not named and not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"cannot read the settings file {path}: {error}") from None


def refuse_unknown_settings(environ: Mapping[str, str], file: Mapping[str, Json]) -> None:
    """Raises SettingError for a TASKAPI_ variable or a key of the file that is no setting, with the nearest one."""
    keys = [*Settings.model_fields]
    variables = ["TASKAPI_CONFIG", *map(variable_of, keys)]
    ours = (name for name in environ if name.upper().startswith("TASKAPI_"))
    for name, known in (*((name, variables) for name in ours), *((key, keys) for key in file)):
        if name not in known:
            raise SettingError(f"unknown setting {name}{did_you_mean(name, known)}")


# ==== 3 Models: the shapes that go over the wire, and the moves a job may make ====

Kind = Literal["int", "float", "decimal", "bool", "text", "date", "datetime", "json", "any", "none"]
Clock = Callable[[], datetime]


RESERVED_COLUMNS = ("_id", "_job", "_created")  # of every record table


MAX_FIELDS = 1990  # of a record type: SQLite gives a table up to 2,000 columns
MAX_FIELD_NAME = 255  # characters


def is_field_name(name: str) -> bool:
    """True if a record's field may have this name, which becomes a column: printable, up to 255 characters."""
    return 1 <= len(name) <= MAX_FIELD_NAME and name.isprintable() and name == name.strip() and (
        name.lower() not in RESERVED_COLUMNS)


def utc_now() -> datetime:
    """This instant, aware, in UTC."""
    return datetime.now(UTC)


def instant(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds: the one form in which instants are stored, compared and shown."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


class JobIds:
    """Makes job ids: UUIDs of version 7 (RFC 9562), which sort by creation time.

    Ids of one process always increase, also when the clock is set back: `last` continues from an earlier run.
    """

    def __init__(self, clock: Clock, last: str | None = None):
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp = int(last.replace("-", "")[:12], 16) if last else 0  # milliseconds since 1970
        self._random = random.Random(secrets.randbits(256))  # to ask the system each time would take a lock

    def __call__(self) -> str:
        with self._lock:
            self._stamp = max(self._stamp + 1, int(self._clock().timestamp() * 1000))
            stamp = self._stamp
        tail = self._random.getrandbits(74)
        text = f"{stamp << 80 | 0x7 << 76 | (tail >> 62) << 64 | 0b10 << 62 | tail & (1 << 62) - 1:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


MOUNT: ContextVar[str] = ContextVar("MOUNT", default="")  # path, in another program, under which this call came in


class JobStatus(StrEnum):
    """Where a job stands."""

    PENDING = "pending"
    IN_PROGRESS = "in-progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def finished(self) -> bool:
        """True once nothing more will happen to the job by itself."""
        return self not in (JobStatus.PENDING, JobStatus.IN_PROGRESS)


MOVES: Mapping[JobStatus, frozenset[JobStatus]] = {
    JobStatus.PENDING: frozenset({JobStatus.IN_PROGRESS, JobStatus.CANCELED}),
    JobStatus.IN_PROGRESS: frozenset(JobStatus) - {JobStatus.IN_PROGRESS},
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset({JobStatus.PENDING}),
    JobStatus.CANCELED: frozenset({JobStatus.PENDING}),
}


class ApiModel(BaseModel):
    """Base of all that goes over the wire: camelCase keys, no unknown key, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, alias_generator=to_camel, defer_build=True,
                              validate_by_name=True, validate_by_alias=True, serialize_by_alias=True,
                              json_schema_serialization_defaults_required=True)


def build_models(model: type[BaseModel] = ApiModel) -> None:
    """Builds the models, which pydantic 2.11 mixes up where several threads do it at their first use."""
    model.model_rebuild(raise_errors=False)
    for heir in model.__subclasses__():
        build_models(heir)


Q = TypeVar("Q", bound=ApiModel)


def validated(model: type[Q], validate: Callable[[], Q]) -> Q:
    """What `validate` returns; its ValidationError becomes a BadRequest that names the nearest known field."""
    try:
        return validate()
    except ValidationError as error:
        schema = model.model_json_schema()
        known = {name for part in (schema, *schema.get("$defs", {}).values()) for name in part.get("properties", ())}
        problems = [FieldProblem(field, f"is not known here{did_you_mean(field.rpartition('.')[2], known)}" if
                                 message.startswith("extra inputs") else message)
                    for field, message in field_problems(error)]
        if problems[0].field == "body":
            raise BadRequest(f"the body is not as expected: {problems[0].message}") from None
        shown = "; ".join(f"{field}: {message}" for field, message in problems)
        raise BadRequest(shown, problems) from None


RECORD_TYPE = re.compile(r"[a-z][a-z0-9_]{0,62}")


def spell_record_type(name: str) -> str:
    """Refuses a name that cannot be a record type's, and says in words what can."""
    if not RECORD_TYPE.fullmatch(name):
        raise ValueError("should be 1 to 63 small letters, digits and _, a letter first")
    return name


RecordType = Annotated[str, AfterValidator(spell_record_type), Field(
    examples=["person"], json_schema_extra={"pattern": f"^{RECORD_TYPE.pattern}$"})]


def check_record_type(name: str) -> str:
    """A record type becomes a table: refuses the names that are taken."""
    if name == "jobs" or name.startswith("sqlite"):
        raise ValueError(f"{name!r} is reserved")
    return name


NewRecordType = Annotated[RecordType, AfterValidator(check_record_type), Field(
    json_schema_extra={"pattern": f"^(?!jobs$|sqlite){RECORD_TYPE.pattern}$"})]


# JSON has one kind of number: 10.0 is a whole one to JSON Schema, and to what is made from it.
# It stands after the bounds, which the schema would not tell of what only comes out of a function.
WHOLE = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)


class Progress(ApiModel):
    """How far a job is; `total` is null while unknown."""

    done: int = 0
    total: int | None = None


class StoredFile(ApiModel):
    """A file in the data folder: `path` is relative to it, `filename` is a label for people."""

    path: str
    filename: str
    content_type: str
    bytes: int
    sha256: str


class Interruption(ApiModel):
    """Why an attempt at a job did not come to an end."""

    attempt: int
    started_at: str | None
    at: str
    reason: str


class Job(ApiModel):
    """A job, as GET /status/{jobId} shows it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{
        "jobId": "01a20460-7a3c-7d52-9c1e-5f0a3b8c2d41", "type": "generate", "status": "in-progress",
        "createdAt": "2026-11-22T16:05:00.123Z", "startedAt": "2026-11-22T16:05:00.130Z", "finishedAt": None,
        "attempt": 1, "progress": {"done": 1200, "total": 5000}, "request": {"recordType": "person", "count": 5000},
        "result": None, "error": None, "eta": 0.3, "after": None, "interruptions": [],
        "links": {"self": "/status/01a20460-7a3c-7d52-9c1e-5f0a3b8c2d41"}}]})

    job_id: str
    type: str
    status: JobStatus
    created_at: str
    started_at: str | None = None
    finished_at: str | None = None
    attempt: int = Field(default=0, description="How often the job was started.")
    progress: Progress = Field(default_factory=Progress)  # a default that is an object would be copied deeply
    request: dict[str, Json] = Field(description="The request as accepted, with its defaults filled in.")
    result: dict[str, Json] | None = None
    error: str | None = None
    eta: float | None = Field(
        default=None, description="Seconds that a running job still needs, as far as can be told.")
    after: str | None = Field(default=None, description="The job that has to be completed before this one runs.")
    interruptions: list[Interruption] = Field(default=[], description="Earlier attempts that did not come to an end.")
    record_type: str | None = Field(default=None, exclude=True)
    file: StoredFile | None = Field(default=None, exclude=True)
    cancel_requested: bool = Field(default=False, exclude=True)

    @computed_field  # type: ignore[prop-decorator]  # mypy does not know decorated properties; pydantic documents this
    @property
    def links(self) -> dict[str, str]:
        """Root-relative paths: `self`, and `records` and `download` once there are any."""
        links = {"self": f"{MOUNT.get()}/status/{self.job_id}"}
        if self.record_type and self.status is JobStatus.COMPLETED and (self.result or {}).get("records", 1):
            links["records"] = f"{MOUNT.get()}/records/{self.record_type}?jobId={self.job_id}"
        if self.file:
            links["download"] = f"{MOUNT.get()}/download/{self.job_id}"
        return links


def date_bounds(text: str) -> tuple[str, str]:
    """The first and the last instant that a date or instant of a filter means, in UTC with microseconds.

    They are the same but for a date alone, which means its whole day. ValueError if it is no date.
    """
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
            date.fromisoformat(text)
            return f"{text}T00:00:00.000000", f"{text}T23:59:59.999999"
        if not re.match(r"\d{4}-\d\d-\d\d[T ]", text, re.ASCII):
            raise ValueError(text)
        moment = datetime.fromisoformat(text)
        moment = moment.astimezone(UTC) if moment.tzinfo else moment
        return (moment.replace(tzinfo=None).isoformat(timespec="microseconds"),) * 2
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a date such as 2026-01-31 or 2026-01-31T12:00:00Z") from None


def _date_text(text: str) -> str:
    date_bounds(text)
    return text


DateText = Annotated[str, AfterValidator(_date_text), WithJsonSchema(
    {"anyOf": [{"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}]})]
Scalar = str | int | float | bool | None
_MOST_TESTS, _MOST_VALUES, _DEEPEST = 100, 10_000, 5  # of a filter


class Condition(ApiModel):
    """What a field's value must be; several operators all have to hold."""

    model_config = ConfigDict(strict=False, json_schema_extra={"minProperties": 1})

    eq: Scalar = None
    ne: Scalar = None
    lt: Scalar = None
    lte: Scalar = None
    gt: Scalar = None
    gte: Scalar = None
    in_: list[Scalar] = Field(default_factory=list, alias="in", max_length=1000)  # null is a value, and no list of them
    not_in: list[Scalar] = Field(default_factory=list, max_length=1000)
    like: str = Field(default_factory=str, description="SQL pattern: % is any text, _ any character.", max_length=1000)
    not_like: str = Field(default_factory=str, max_length=1000)
    contains: str = Field(default_factory=str, description="The very text; case counts no more than with like.",
                          max_length=1000)
    starts_with: str = Field(default_factory=str, max_length=1000)
    ends_with: str = Field(default_factory=str, max_length=1000)
    null: bool = Field(default_factory=bool, strict=True)

    @classmethod
    def operators(cls) -> dict[str, str]:
        """The attributes by their names on the wire."""
        return {str(field.alias): name for name, field in cls.model_fields.items()}

    @model_validator(mode="before")
    @classmethod
    def _operators(cls, given: Json) -> Json:
        """Says how a condition is written, and which operators there are."""
        if not isinstance(given, Mapping):
            raise ValueError(f'say {{"eq": {_clipped(json.dumps(given, default=str))}}}')  # noqa: TRY004 - pydantic tells of these alone
        operators = [*cls.operators()]
        for name in given:
            if name not in operators:
                raise ValueError(f"no such operator {name!r}{did_you_mean(str(name), operators)}; "
                                 f"there are: {', '.join(operators)}")
        return given

    @model_serializer
    def _given(self) -> dict[str, Json]:
        """Only the operators that were given: one that compares with null is not the same as none."""
        return {key: getattr(self, name) for key, name in self.operators().items() if name in self.model_fields_set}


Test = tuple[str, str, Json]  # field, operator, value; for alternatives "", "or" and the tests of each


def each_test(tests: Iterable[Test]) -> Iterator[Test]:
    """The tests of fields, also those within alternatives."""
    for test in tests:
        yield from chain.from_iterable(map(each_test, test[2])) if test[1] == "or" else [test]


def _nesting(tests: Iterable[Test]) -> int:
    """How deep alternatives are within alternatives."""
    return max((1 + max(map(_nesting, value)) for _, operator, value in tests if operator == "or"), default=0)


def _alternatives(given: Json, validate: Callable[[Json], Json]) -> Json:
    """Conditions of which one has to hold; or one on a field of the name `or`."""
    return validate(given) if isinstance(given, list) else Condition.model_validate(given)


class Where(ApiModel):
    """Conditions by field, which all have to hold; of those in a list under `or` one has to."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Condition]

    or_: Annotated[list[Annotated[Where, Field(json_schema_extra={"minProperties": 1})]], Field(min_length=1),
                   WrapValidator(_alternatives)] = Field([], alias="or")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        values = [len(value) if isinstance(value, list) else 1 for *_, value in each_test(self.tests)]
        if len(values) > _MOST_TESTS or sum(values) > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_TESTS} conditions, or {_MOST_VALUES} values in them")
        if _nesting(self.tests) > _DEEPEST:
            raise ValueError(f"alternatives within alternatives, more than {_DEEPEST} deep")
        return self

    @property
    def tests(self) -> list[Test]:
        """What a record has to pass."""
        by_field: dict[str, Condition] = {**(self.model_extra or {})}
        sides = [side.tests for side in self.or_] if isinstance(self.or_, list) else []
        by_field |= {"or": self.or_} if isinstance(self.or_, Condition) else {}
        own: list[Test] = [(field, operator, getattr(condition, operator)) for field, condition in by_field.items()
                           for operator in sorted(condition.model_fields_set)]
        if not all(sides):
            raise ValueError("an alternative under `or` names no field")
        return [*own, ("", "or", sides)] if sides else own

    @model_serializer
    def _given(self) -> dict[str, Json]:
        return {**(self.model_extra or {}), **({"or": self.or_} if self.or_ else {})}


class Filters(ApiModel):
    """Which records: all conditions have to hold."""

    record_type: RecordType | Annotated[list[RecordType], Field(min_length=1, max_length=100)] | None = None
    from_: DateText | None = Field(None, alias="from", description="First date or instant, included.")
    to: DateText | None = Field(None, description="Last date or instant, included; a date means its whole day.")
    date_field: str | None = Field(None, description="Field that from and to look at; default: when it was created.")
    job_id: str | None = Field(None, description="The job that made them.")
    where: Where = Where.model_validate({})


class Health(ApiModel):
    """What GET / tells."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    service: str = "taskapi"
    version: str = __version__
    status: Literal["ok", "unavailable"] = "ok"
    database: Literal["ok", "unavailable"] = "ok"
    queue: Literal["ok", "unavailable"] = "ok"
    pending: int = 0
    in_progress: int = 0
    workers: int
    uptime: float = Field(description="Seconds since the service was opened.")
    errors: list[str] | None = None
    checks: dict[str, str] = Field({}, description="What was found at the start.")
    links: dict[str, str]


_SNAPSHOT_NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}"


def _snapshot_name(text: str) -> str:
    if not re.fullmatch(_SNAPSHOT_NAME, text):
        raise ValueError("should be 1 to 64 letters, digits, - and _, a letter or digit first")
    return text


class SnapshotRequest(ApiModel):
    """A snapshot to take."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "empty-shop"}]})

    name: Annotated[str, AfterValidator(_snapshot_name)] = Field(
        json_schema_extra={"pattern": f"^{_SNAPSHOT_NAME}$"})


class Snapshot(SnapshotRequest):
    """A copy of everything as it was at one moment."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"name": "empty-shop", "createdAt": "2026-11-22T16:05:00.123Z", "bytes": 172032, "jobs": 3, "records": 1200}]})

    created_at: str
    bytes: int
    jobs: int
    records: int


LINKS = {"generate": "/generate", "upload": "/upload", "infer": "/infer", "export": "/export",
         "status": "/status/{jobId}", "jobs": "/jobs", "records": "/records", "fields": "/fields",
         "preview": "/preview", "snapshots": "/snapshots", "health": "/health", "openapi": "/openapi.json",
         "docs": "/docs", "ui": "/ui", "metrics": "/metrics"}


# ==== 4 Store: the only SQL: the job table and the record tables ====

T = TypeVar("T")
_BUSY_SECONDS = 4.0  # how long a statement waits for another process's lock
_BATCH_SECONDS = 0.05  # how long a transaction takes in further work: others hardly wait for it
_LOOK_SECONDS = 0.2  # between looks whether the files are still ours
_LOG_PAGES = 1000  # of the log are copied into the database at a time
_BLOCK_RECORDS, _BLOCK_BYTES = 10_000, 2**20  # about so many records, and so much of their text, are made at a time
_AHEAD = 3  # blocks
_BLOCK_LIMIT = 2**22  # bytes that the text of several records never exceeds, as a block or a page
_LONGEST, _NO_LIMIT = 2**31 - 1, 2**62  # bytes of a text; records
_RUN_IDS = 20_000  # ranges of ids are put together until they have about so many
_MOST_KEYS = 16  # that records are ordered by
_MOST_SELECTS = 400  # SQLite joins up to 500 to one statement
_MOST_COLUMNS = 1_993  # of a record table; SQLite gives up to 2,000
_KEPT_TOTALS = 100  # how many records fitted the latest filters
_KEPT_READERS = 8  # connections for reading that stay open for the next time
_COPY_STEP = 20_000  # records that one statement copies into an exported database
_STEPS_BETWEEN = 1_000_000  # steps of SQLite's machine, some ten milliseconds, until it asks whether to go on
_DELETE_STEP, _DELETE_SECONDS = 5_000, 0.03  # rows that one transaction deletes at most, and about how long it takes
_RANGES_STEP = 10_000  # ranges of ids that one transaction marks as deleted


def _quote(name: str) -> str:
    """An SQL identifier; the doubled quote makes any name safe."""
    return '"' + name.replace('"', '""') + '"'


_MIGRATIONS: list[Callable[[sqlite3.Connection], None]] = []  # `PRAGMA user_version` says how many a database has had


def migration(change: Callable[[sqlite3.Connection], None]) -> Callable[[sqlite3.Connection], None]:
    """Registers the next change of the tables; it is returned unchanged, and never edited once it was released."""
    _MIGRATIONS.append(change)
    return change


@migration
def first_tables(connection: sqlite3.Connection) -> None:
    """Jobs, and the books about record tables. A leading underscore cannot clash with a record type."""
    import sqlite_utils  # here, since it takes long where pandas is installed

    # It writes the statements for a database of its own: on ours it could end the transaction that we are in.
    schema = sqlite_utils.Database(memory=True, execute_plugins=False)
    create = partial(schema.create_table_sql, strict=True)
    statements = (
        create("jobs", {
            "id": str, "type": str, "status": str, "created_at": str, "started_at": str, "finished_at": str,
            "attempt": int, "cancel_requested": int, "record_type": str, "error": str, "file": str, "result": str,
            "idempotency_key": str, "idempotency_hash": str, "after": str, "interruptions": str, "request": str,
        }, pk="id", not_null={"type", "status", "created_at", "attempt", "cancel_requested", "request"},
            defaults={"attempt": 0, "cancel_requested": 0}),
        # Partial, so that claims and counts cost the same however many jobs have finished. One for each status:
        # SQLite uses them where a query has the very same `status = '...'`, but does not see that this implies a
        # `status IN`.
        *(f"CREATE INDEX {_quote(f'jobs_{status}')} ON jobs(id) WHERE status = '{status}'"
          for status in sorted(set(JobStatus) - {JobStatus.COMPLETED})),
        "CREATE UNIQUE INDEX jobs_key ON jobs(idempotency_key) WHERE idempotency_key IS NOT NULL",
        "CREATE INDEX jobs_after ON jobs(after) WHERE after IS NOT NULL AND status = 'pending'",
        "CREATE INDEX jobs_finished ON jobs(finished_at) WHERE finished_at IS NOT NULL",
        # What changes with every chunk stands apart, so that a chunk does not rewrite the request.
        create("_progress", {"job": str, "done": int, "total": int, "done_before": int, "checkpoint": str}, pk="job"),
        create("_types", {"record_type": str, "next_id": int}, pk="record_type"),
        # `long` says that a float field holds values of more digits than SQLite prints.
        create("_fields", {"record_type": str, "field": str, "kind": str, "position": int, "long": int},
               pk=("record_type", "field")),
        # A span is a range of _id that belongs to one job: `rows` of `size` are in use, from `first` on.
        create("_spans", {"record_type": str, "first": int, "size": int, "rows": int, "job": str},
               pk=("record_type", "first")),
        "CREATE INDEX idx__spans_job ON _spans(job)",
        create("_heartbeat", {"id": int, "at": str}, pk="id"))
    schema.conn.close()
    for statement in statements:
        connection.execute(statement)


@migration
def fair_claims(connection: sqlite3.Connection) -> None:
    """Claims in an order of their own, without the jobs that have to wait; attempts that get further are told apart."""
    for statement in (
            "ALTER TABLE jobs ADD COLUMN claim_order INTEGER NOT NULL DEFAULT 0",
            ("UPDATE jobs SET claim_order = 1000 * CAST(strftime('%s', created_at) AS INTEGER) "
             "WHERE status IN ('pending', 'in-progress')"),
            # By `after`, until that job is completed. Those that are free by now are found at the start.
            "ALTER TABLE jobs ADD COLUMN blocked INTEGER NOT NULL DEFAULT 0",
            "UPDATE jobs SET blocked = 1 WHERE status = 'pending' AND after IS NOT NULL",
            "CREATE INDEX jobs_ready ON jobs(claim_order, id) WHERE status = 'pending' AND blocked = 0",
            "DROP INDEX jobs_after",
            "CREATE INDEX jobs_blocked ON jobs(after) WHERE status = 'pending' AND blocked = 1",
            # The attempt that last saved another checkpoint than it began from.
            "ALTER TABLE _progress ADD COLUMN moved_in INTEGER NOT NULL DEFAULT 0"):
        connection.execute(statement)


@migration
def layouts_of_ranges(connection: sqlite3.Connection) -> None:
    """What a job wrote is read by the kinds that it wrote it with; no index has a name that a record type can have."""
    for statement in (
            "ALTER TABLE _spans RENAME TO _id_ranges", "ALTER TABLE _id_ranges ADD COLUMN layout INTEGER",
            # A layout is the fields of a record type with their kinds, as some jobs wrote them: a JSON object.
            "CREATE TABLE _layouts(id INTEGER PRIMARY KEY, record_type TEXT, kinds TEXT) STRICT"):
        connection.execute(statement)
    used = {row[0] for row in connection.execute("SELECT DISTINCT record_type FROM _id_ranges")}
    for record_type, in connection.execute("SELECT record_type FROM _types").fetchall():
        if record_type in used:
            kinds = connection.execute("SELECT field, kind FROM _fields WHERE record_type = ? ORDER BY position",
                                       (record_type,))
            connection.execute("INSERT INTO _layouts(record_type, kinds) VALUES (?, ?)",
                               (record_type, json.dumps(dict(kinds.fetchall()), ensure_ascii=False)))
        else:
            connection.execute(f"DROP TABLE {_quote(record_type)}")
            connection.execute("DELETE FROM _types WHERE record_type = ?", (record_type,))
    for statement in (
            ("UPDATE _id_ranges SET layout = (SELECT l.id FROM _layouts AS l "
             "WHERE l.record_type = _id_ranges.record_type)"),
            "DROP TABLE _fields", "CREATE INDEX _layouts_type ON _layouts(record_type)",
            "CREATE INDEX _id_ranges_layout ON _id_ranges(layout)",
            # CROSS keeps the order of the loops: ranges by their first id, then the job of each.
            ("CREATE VIEW _readable_ranges AS SELECT g.record_type, g.first, g.size, g.rows, g.job, g.layout, "
             "jobs.created_at FROM _id_ranges AS g CROSS JOIN jobs ON jobs.id = g.job "
             "WHERE jobs.status = 'completed'")):
        connection.execute(statement)
    for name, sql in connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL "
                                        "AND name NOT LIKE '!_%' ESCAPE '!'").fetchall():
        connection.execute(f"DROP INDEX {_quote(name)}")
        renamed = _quote(f"_{name}")
        connection.execute(re.sub(r"INDEX\s+\S+", f"INDEX {renamed}", sql, count=1))


@migration
def refs_of_layouts(connection: sqlite3.Connection) -> None:
    """Which fields are references, {"customerId": "customer.id"}; kinds may also tell how decimals are written."""
    connection.execute("ALTER TABLE _layouts ADD COLUMN refs TEXT NOT NULL DEFAULT '{}'")


def _columns(connection: sqlite3.Connection) -> dict[str, set[str]]:
    """The columns of every table."""
    found: dict[str, set[str]] = defaultdict(set)
    for table, column in connection.execute("SELECT tables.name, columns.name FROM sqlite_master AS tables JOIN "
                                            "pragma_table_info(tables.name) AS columns WHERE tables.type = 'table'"):
        found[table].add(column)
    return found


def _schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """How many migrations a database has had, 0 for a new one; StorageError if it is not one of ours. Only reads."""
    version, found = int(connection.execute("PRAGMA user_version").fetchone()[0]), _columns(connection)
    if not version and "_sqlite_migrations" in found:  # sqlite-utils' notes, which version 1 of this program kept
        names = connection.execute("SELECT name FROM _sqlite_migrations WHERE migration_set = 'taskapi'").fetchall()
        version = 1 if names == [("first_tables",)] else len(_MIGRATIONS) + len(names)
    if not 0 <= version <= len(_MIGRATIONS):
        raise StorageError(f"the database {path} is of a later version of taskapi: use that one; nothing was changed")
    with closing(sqlite3.connect(":memory:")) as known:
        for migrate in _MIGRATIONS[:version]:
            migrate(known)
        wrong = [table for table, columns in _columns(known).items() if found.get(table) != columns]
    if wrong or (found and not version):
        which = f" (its table {wrong[0]!r} is missing or another)" if wrong else ""
        raise StorageError(f"the database {path} is not one of taskapi's{which}: use another one; nothing was changed")
    return version


def _exact_float(value: float) -> str:
    """A float as the shortest text that reads back equal; beyond the range of JSON it reads back as infinite."""
    return repr(value) if math.isfinite(value) else "-1e999" if value < 0 else "1e999"


def _decimal_key(value: str | float | None) -> str | None:
    """A text for a decimal; these sort as the numbers do, and are equal where they are."""
    if value is None:
        return None
    number = Decimal(str(value))
    if not number:
        return "1"
    digits = "".join(map(str, number.as_tuple().digits)).rstrip("0")
    size = number.adjusted() if number.is_finite() else 10**6
    key = f"{10**6 + max(-10**6, min(10**6, size)):07}{digits}"
    return f"2{key}" if number > 0 else "0" + "".join(str(9 - int(digit)) for digit in key) + "~"


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    """Brings a database up to date that has had so many migrations."""
    if version < len(_MIGRATIONS):
        connection.execute("BEGIN IMMEDIATE")
        for migrate in _MIGRATIONS[version:]:
            migrate(connection)
        connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
        connection.execute("COMMIT")


def empty_database() -> sqlite3.Connection:
    """One as a new data folder has it, in memory."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _migrate(connection, 0)
    return connection


def stored_paths(connection: sqlite3.Connection) -> set[str]:
    """The relative path of every file that belongs to a job."""
    rows = connection.execute("SELECT json_extract(file, '$.path') FROM jobs WHERE file IS NOT NULL")
    return {row[0] for row in rows}


def contents(connection: sqlite3.Connection) -> dict[str, int]:
    """How many jobs and records there are."""
    jobs, = connection.execute("SELECT count(*) FROM jobs").fetchone()
    records, = connection.execute("SELECT coalesce(sum(rows), 0) FROM _readable_ranges").fetchone()
    return {"jobs": jobs, "records": records}


def move_path(connection: sqlite3.Connection, old: str, new: str) -> None:
    """Notes that a job's file has another path."""
    connection.execute("UPDATE jobs SET file = json_set(file, '$.path', ?) WHERE json_extract(file, '$.path') = ?",
                       (new, old))


class _Piece:
    """Work that is to be written, and what came of it; `ready` is let go when that is known, or when it is to lead."""

    def __init__(self, work: Callable[[sqlite3.Connection], Any], durable: bool):
        self.work, self.durable, self.ready = work, durable, threading.Lock()
        self.ready.acquire()
        self.outcome: tuple[Any, BaseException | None] | None = None  # its result, or what it raised


def _files_of(path: Path) -> dict[str, Path]:
    """A database, its log, where commits are until a checkpoint copies them into it, and the log's index."""
    real = path.resolve()  # SQLite follows a link, and so does the log
    return {"database": path, "log": real.with_name(f"{real.name}-wal"), "index": real.with_name(f"{real.name}-shm")}


def _identities(path: Path) -> dict[str, Json]:
    """What tells the files of a database from others at their paths; None where there is none to be seen."""
    found: dict[str, Json] = {}
    for name, file in _files_of(path).items():
        try:
            status = os.stat(file)
            found[name] = [status.st_dev, status.st_ino]
        except OSError:
            found[name] = None
    return found


def check_database_files(path: Path, last: Mapping[str, Json]) -> None:
    """Before a database is opened: StorageError for a log of another one, which SQLite would copy into it.

    `last` are the identities that its files had when they were open the last time, as far as known.
    """
    _, log, index = files = _files_of(path).values()
    if log.exists() and log.stat().st_size:
        found = _identities(path)
        if not path.exists() or not path.stat().st_size:
            raise StorageError(f"the database {path} is {'empty' if path.exists() else 'missing'}, but its log {log} "
                               f"is there: put that database back, or a copy of it once you have removed {log} and "
                               f"{index}; nothing was changed")
        if last.get("log") == found["log"] and last.get("database") != found["database"]:
            raise StorageError(f"the database {path} was replaced, but {log} is the log of the one before: remove it "
                               f"and {index} to use the new one, or put the old one back; nothing was changed")
    for file in files:
        if file.exists() and not os.access(file, os.W_OK):
            try:
                if file == path:
                    raise PermissionError
                file.chmod(path.stat().st_mode)  # a start without rights to the database leaves files with as few
            except OSError:
                raise StorageError(f"{file} cannot be written to by this user") from None


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=_BUSY_SECONDS,
                                 isolation_level=None, check_same_thread=False, cached_statements=256)
    connection.create_function("exact_float", 1, _exact_float, deterministic=True)
    connection.create_function("decimal_key", 1, _decimal_key, deterministic=True)
    return connection


class _OpenFiles:
    """The files of an open database as seen from outside, so that others which are put in their place are noticed.

    SQLite changes the database file only to copy the log into it, whichever program asks for that, and notes in the
    index of the log how far it is (sqlite.org/walformat.html, section 2). The index is open until SQLite has closed its
    files: to close any descriptor of a file lets go of all locks that the process has on it.
    """

    def __init__(self, path: Path):
        self.path, self.identities = path, _identities(path)
        self._file = _files_of(path)["index"].open("rb", buffering=0)
        self._index = mmap.mmap(self._file.fileno(), 1024, access=mmap.ACCESS_READ)  # to read it takes no system call
        self._seen, self.overwritten = self._look(), False

    def _number(self, offset: int, form: str = "=I") -> int:
        return int(struct.unpack_from(form, self._index, offset)[0])

    def pages_to_copy(self) -> int:
        """How many pages of the log are committed, and not yet in the database file."""
        return self._number(16) - self._number(96)

    def _look(self) -> tuple[tuple[int, int], int, int, int]:
        """Size and time of the database file; the number of the log, its pages that were copied, and that are left."""
        status = os.stat(self.path)
        changed = status.st_mtime_ns if os.name == "posix" else 0  # Windows notes that when it likes
        return (status.st_size, changed), self._number(32, ">I"), self._number(96), self.pages_to_copy()

    def moved(self) -> str | None:
        """What has become of the files if those at our paths are others."""
        found, files = _identities(self.path), _files_of(self.path)
        return next((f"{files[name]} was {'replaced' if found[name] else 'taken away'}"
                     for name, identity in self.identities.items() if found[name] != identity), None)

    def changed(self) -> str | None:
        """`moved`, or that the database was overwritten where it is; for one thread, which makes our checkpoints."""
        with suppress(FileNotFoundError):
            at_work = self._number(96) != self._number(128)  # a checkpoint
            if not at_work and _identities(self.path)["database"] == self.identities["database"]:
                (file, log, copied, left), self._seen = self._seen, self._look()
                same = [(log, copied)] if left or not copied else [(log, copied), (log + 1, 0)]  # it begins anew
                self.overwritten |= file != self._seen[0] and self._seen[1:3] in same
        return f"{self.path} was overwritten" if self.overwritten else self.moved()

    def close(self) -> None:
        """After SQLite has closed its files."""
        self._index.close()
        self._file.close()


class Database:
    """One SQLite file: one connection that writes and checkpoints, and a few for reading.

    A single connection writes and checkpoints: before SQLite 3.51.3 two that do so at once can lose commits
    (sqlite.org/wal.html, "the WAL-reset bug"). The file is never opened but by SQLite: closing any other descriptor
    of it would drop SQLite's locks.
    """

    def __init__(self, path: Path, on_overwritten: Callable[[], object] = lambda: None):
        """Opens or makes it. `on_overwritten` is called when another program is found to have changed its file."""
        self.path = path
        self._readers: list[sqlite3.Connection] = []  # one at least is open as long as the writer is
        self._damage: str | None = None  # what was found damaged, until a look at the whole file finds nothing
        self._turn = threading.Condition()  # guards these three
        self._waiting: deque[_Piece] = deque()
        self._leader: _Piece | None = None  # whose thread writes, for all that wait
        self._closed = False
        self._durable = False  # whether a commit is fsynced
        self._log_is_to_go = False  # the next checkpoint gives the log's room back to the disk
        self._fault: str | None = None  # why nothing is read or written: the files are not ours any more
        self._next_look = 0.0  # when the next one to write asks whether they are
        self._on_overwritten = on_overwritten
        if sqlite3.sqlite_version_info < (3, 37):
            raise StartupError(f"SQLite {sqlite3.sqlite_version} is too old: 3.37 or later is needed")
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._storage_errors(), ExitStack() as undo:
            self._writer = undo.enter_context(closing(self._connect("rwc")))
            self._set_up()
            self._readers.append(undo.enter_context(closing(self._connect("ro"))))
            self._readers[0].execute("PRAGMA schema_version").fetchone()  # really opens the files
            self._files = _OpenFiles(path)
            undo.pop_all()

    def _connect(self, mode: str) -> sqlite3.Connection:
        return _connected(self.path, mode)

    def _set_up(self) -> None:
        version = _schema_version(self._writer, self.path)
        for setting in ("auto_vacuum = INCREMENTAL",  # only a new file takes this; see `shrink`
                        "journal_size_limit = 67108864", "wal_autocheckpoint = 0", "synchronous = NORMAL",
                        "fullfsync = ON",  # on macOS the disk would otherwise keep what it is told to write for later
                        "secure_delete = OFF"):  # some builds write zeros over all they delete
            self._writer.execute(f"PRAGMA {setting}")
        if self._writer.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise StorageError(f"the disk of {self.path} cannot hold an SQLite database in WAL mode: use another one")
        _migrate(self._writer, version)
        self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")  # from then on the index says how far the next one is

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Turns what SQLite and the disk meet into StorageError; mistakes in our own SQL stay what they are."""
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith("SQLITE_FULL"):
                raise DiskFull("the disk is full") from error
            if name.startswith("SQLITE_INTERRUPT"):
                raise Interrupted from error
            if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")) or type(error) is sqlite3.DatabaseError:
                self._damage = (f"the database {self.path} is damaged ({error}) and was left as it is: restore a copy, "
                                f"or save what it holds with: sqlite3 {self.path} .recover")
                raise StorageError(self._damage) from error
            if name in ("SQLITE_ERROR", ""):
                raise
            raise StorageError(f"the database cannot be used: {error}") from error

    @property
    def identities(self) -> dict[str, Json]:
        """Of the files, for `check_database_files`."""
        return self._files.identities

    # Writing

    def write(self, work: Callable[[sqlite3.Connection], T], durable: bool = False) -> T:
        """Runs `work` in a transaction, and returns its result once that is committed.

        What waits at the same time shares one transaction (group commit), which one of those who wait writes for all;
        each piece of work has a savepoint of its own, so that one that raises undoes only itself. `durable` means
        fsynced; what is not becomes so with the next that is. Raises StorageError when the database cannot be used, or
        if nobody has begun with it within seconds.
        """
        piece = _Piece(work, durable)
        with self._turn:
            if self._closed:
                raise StorageError("the database is closed")
            self._waiting.append(piece)
            leads = self._leader is None  # asked later, the answer could be that it was made to
            self._leader = self._leader or piece
        if not leads and not piece.ready.acquire(timeout=_BUSY_SECONDS):
            with self._turn:
                if piece in self._waiting and self._leader is not piece:
                    self._waiting.remove(piece)
                    raise StorageError("the database is busy")
            piece.ready.acquire()
        if piece.outcome is None:
            self._lead()
        result, raised = cast(tuple[T, BaseException | None], piece.outcome)
        if raised:
            raise raised
        return result

    def _lead(self) -> None:
        """Writes what waits, or as much as one transaction may take in; then the next of those who wait leads."""
        with self._turn:
            batch, self._waiting = self._waiting, deque()
        try:
            self._write_batch(batch)
        finally:
            with self._turn:
                self._waiting.extendleft(reversed(batch))
                self._leader = self._waiting[0] if self._waiting else None
                self._leader.ready.release() if self._leader else self._turn.notify_all()

    def _write_batch(self, batch: deque[_Piece]) -> None:
        """Takes pieces from the batch for one transaction, as long as it may last; tells what came of each."""
        taken: list[_Piece] = []
        outcomes: list[tuple[Any, BaseException | None]] = []
        try:
            with self._storage_errors():
                self._begin(any(piece.durable for piece in batch))
                until = monotonic() + _BATCH_SECONDS
                while batch and (not taken or monotonic() < until):
                    taken.append(batch.popleft())
                    outcomes.append(self._write_piece(taken[-1].work))
                self._writer.execute("COMMIT")
        except BaseException as error:  # noqa: BLE001  # those who wait are told, whatever it is
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                self._writer.execute("ROLLBACK")
            taken += batch
            batch.clear()
            outcomes = [(None, error)] * len(taken)
        self._log_is_to_go |= any(isinstance(error, DiskFull) for _, error in outcomes)  # then there is room to go on
        with suppress(Exception), self._storage_errors():
            self._checkpoint()  # before anybody who then looks whether there is
        for piece, outcome in zip(taken, outcomes, strict=True):
            piece.outcome = outcome
            piece.ready.release()

    def _begin(self, durable: bool) -> None:
        self._look()
        if durable != self._durable:
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        self._writer.execute("BEGIN IMMEDIATE")

    def _write_piece(self, work: Callable[[sqlite3.Connection], T]) -> tuple[T | None, BaseException | None]:
        """Does one piece of work of a transaction, of which an error leaves nothing."""
        outcome: tuple[T | None, BaseException | None]
        self._writer.execute("SAVEPOINT piece")
        try:
            with self._storage_errors():
                outcome = work(self._writer), None
        except BaseException as error:
            if not self._writer.in_transaction:
                raise
            outcome = None, error
            self._writer.execute("ROLLBACK TO piece")
        self._writer.execute("RELEASE piece")
        return outcome

    def _look(self, now: bool = False) -> None:
        """For who leads: raises StorageError while the files are not ours; looks now and then, or `now`."""
        if now or monotonic() >= self._next_look:
            known, what = self._fault, self._files.changed()
            self._next_look = monotonic() + _LOOK_SECONDS
            self._fault = what and (
                f"{what} while the server was running, which writes no more: restart it (to restore a copy: stop it, "
                f"remove {' and '.join(str(file) for file in [*_files_of(self.path).values()][1:])}, put the copy "
                "there, start it)")
            if self._fault not in (None, known):
                if self._files.overwritten:
                    with suppress(OSError):
                        self._on_overwritten()
                elif self.path.exists():  # the log, which nobody else can use, goes where it belongs
                    self._empty_log()
        self._refuse()

    def _refuse(self) -> None:
        if self._closed or self._fault:
            raise StorageError(self._fault or "the database is closed")

    def _checkpoint(self) -> None:
        """Copies the log into the database when it is long, or its room is wanted."""
        wanted, self._log_is_to_go = self._log_is_to_go, False
        if wanted or self._files.pages_to_copy() >= _LOG_PAGES:
            self._look(now=True)
            self._empty_log() if wanted else self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._look(now=True)  # so that this change of the database is told from others

    def _empty_log(self) -> None:
        """Copies the log into the database and gives its room back, or as much as those who read let it."""
        self._writer.execute("PRAGMA busy_timeout = 0")
        self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._writer.execute(f"PRAGMA busy_timeout = {_BUSY_SECONDS * 1000:.0f}")

    def load(self, source: sqlite3.Connection, look: Callable[[sqlite3.Connection], T]) -> T:
        """Makes this a copy of another database, in one transaction; returns what `look` finds here just before it."""
        def work(connection: sqlite3.Connection) -> T:
            found = look(connection)
            connection.execute("COMMIT")  # of what shares the transaction: SQLite copies outside of any
            try:
                source.backup(connection)
            finally:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("SAVEPOINT piece")
            return found

        return self.write(work, durable=True)

    # Reading

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection for reading, with a consistent snapshot for as long as the block lasts."""
        self._refuse()
        with self._storage_errors():
            try:
                connection = self._readers.pop()
            except IndexError:
                connection = self._open_reader()
            try:
                connection.execute("BEGIN")
                yield connection
            finally:
                with suppress(sqlite3.Error):
                    connection.set_progress_handler(None, 0)
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                if self._closed or len(self._readers) >= _KEPT_READERS:
                    connection.close()
                else:
                    self._readers.append(connection)

    def _open_reader(self) -> sqlite3.Connection:
        """A connection to our file, and to none that has come to its path meanwhile."""
        connection = self._connect("ro")  # SQLite itself keeps it from writing
        try:
            connection.execute("PRAGMA schema_version").fetchone()  # really opens the files
            if what := self._files.moved():
                raise StorageError(what)
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def copying(self, path: Path) -> Iterator[sqlite3.Connection]:
        """A connection for reading, as `read` gives, with the new database at `path` attached as `copy` to write to."""
        with self._storage_errors():
            connection = self._open_reader()
            try:
                connection.execute("ATTACH ? AS copy", (path.as_uri(),))
                connection.execute("PRAGMA copy.journal_mode = OFF")  # a copy that is interrupted is thrown away
                connection.execute("PRAGMA copy.synchronous = OFF")
                connection.execute("PRAGMA copy.cache_size = -65536")  # KiB, in which keys that are texts find a place
                connection.execute("BEGIN")
                yield connection
                connection.execute("COMMIT")
            finally:
                connection.close()

    def copy_to(self, path: Path, look: Callable[[sqlite3.Connection], T]) -> T:
        """Makes a copy at `path` as of one moment, whatever is written meanwhile; returns what `look` finds in it."""
        with self.read() as connection, closing(_connected(path, "rwc")) as copy:
            found = look(connection)
            connection.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, which also opens where it must not be changed
        return found

    # Care

    def probe(self, at: str) -> None:
        """Really writes and reads; raises StorageError if either fails, or if damage was met and is still there."""
        self._next_look = 0
        self.write(lambda connection: connection.execute("INSERT OR REPLACE INTO _heartbeat VALUES (1, ?)", (at,)))
        with self.read() as connection:
            connection.execute("SELECT at FROM _heartbeat").fetchone()
        if damage := self._damage:
            until = monotonic() + _BUSY_SECONDS
            try:
                self.quick_check(lambda: monotonic() > until)
            except Interrupted:
                raise StorageError(damage) from None

    def shrink(self) -> None:
        """Gives the pages of deleted records back to the disk, in short steps; the file ends with the checkpoint."""
        def step(connection: sqlite3.Connection) -> int:
            connection.execute("PRAGMA incremental_vacuum(200)").fetchall()
            left = int(connection.execute("PRAGMA freelist_count").fetchone()[0])
            self._log_is_to_go = not left
            return left

        while self.write(step):
            pass

    def quick_check(self, interrupted: Callable[[], bool]) -> None:
        """Raises StorageError that says what SQLite finds damaged; reads the whole file, so that it may take long."""
        with self.read() as connection:
            connection.set_progress_handler(interrupted, _STEPS_BETWEEN)
            found = "; ".join(row[0] for row in connection.execute("PRAGMA quick_check(3)"))
            if found != "ok":
                raise sqlite3.DatabaseError(found)
        self._damage = None

    def close(self) -> None:
        """Closes every connection; what still waits gets a StorageError."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            self._turn.wait_for(lambda: self._leader is None)
        with suppress(Exception):
            self._look(now=True)
        # The last one checkpoints and removes the log, unless it may only read.
        for connection in [self._writer, *self._readers] if self._fault else [*self._readers, self._writer]:
            connection.close()
        self._files.close()


class FolderLock:
    """Lets one process alone use a data folder: a write transaction held open on a small database beside it.

    SQLite's locks work on Linux, macOS and Windows and end with the process, however it ends. Who holds the lock
    stands in a file of its own, since to commit it here would let go of the lock for a moment.
    """

    def __init__(self, path: Path, what: str, holder: Mapping[str, Json]):
        self._path, self._holder = path.with_name(f"{path.name}.json"), dict(holder)
        self._connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            last = self._about()
            self.unclean = self._path.exists() and not last.get("clean")  # the last one did not let go
            self.files: dict[str, Json] = last.get("files") or {}
            self.describe(clean=False, files=self.files)
        except (sqlite3.Error, OSError) as error:
            refusal = self._refusal(what, error)
            self._connection.close()
            raise refusal from None

    def _refusal(self, what: str, error: Exception) -> StartupError:
        if getattr(error, "sqlite_errorname", "") != "SQLITE_BUSY":
            return StartupError(f"cannot use {what}: {error}")
        about = self._about()
        who = f"process {about['pid']} on {about['host']}" if about else "another process"
        at = f", serving {about['url']}" if about.get("url") else ""
        return InUse(f"{what} is in use by {who}{at}", about)

    def _about(self) -> dict[str, Json]:
        """What the holder tells; nothing while it is writing that."""
        with suppress(OSError, TypeError, ValueError):
            about = dict(json.loads(self._path.read_bytes()))
            return about if about.keys() >= {"pid", "host"} else {}
        return {}

    def describe(self, **more: Json) -> None:
        """Tells others more about who holds the lock."""
        self._holder |= more
        with self._path.open("w", encoding="utf-8") as file:
            json.dump(self._holder, file)
            file.flush()
            os.fsync(file.fileno())

    def release(self, clean: bool = True) -> None:
        """Lets the next process in."""
        with suppress(OSError):
            self.describe(clean=clean, url=None)
        self._connection.close()


def sqlite_check() -> str:
    """The SQLite in use, and whether it has the WAL-reset bug (sqlite.org/wal.html)."""
    version = sqlite3.sqlite_version_info
    mended = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    note = "" if mended else " with the WAL-reset bug, which cannot strike while one connection writes and checkpoints"
    return f"{sqlite3.sqlite_version}{note}"


_JOB_QUERY = "SELECT jobs.*, done, total, done_before, moved_in FROM jobs LEFT JOIN _progress ON job = id"


def _eta(row: Mapping[str, Any], now: str) -> float | None:
    """Seconds that a running job still needs, at the pace of this attempt so far."""
    made = (row["done"] or 0) - (row["done_before"] or 0)
    if row["status"] != JobStatus.IN_PROGRESS or not row["started_at"] or row["total"] is None or made <= 0:
        return None
    elapsed = datetime.fromisoformat(now) - datetime.fromisoformat(row["started_at"])
    left: int = row["total"] - row["done"]
    return round(max(0.0, elapsed.total_seconds()) / made * left, 1)


def _job(row: Mapping[str, Any], now: str) -> Job:
    """A row of _JOB_QUERY; a completed job is at its end, whatever it said of that."""
    done, total = row["done"] or 0, row["total"]
    if row["status"] == JobStatus.COMPLETED:
        done = total = done if total is None else total
    loaded = {name: row[name] and json.loads(row[name]) for name in ("request", "result", "file")}
    return Job(
        job_id=row["id"], type=row["type"], status=JobStatus(row["status"]), created_at=row["created_at"],
        started_at=row["started_at"], finished_at=row["finished_at"], attempt=row["attempt"],
        progress=Progress(done=done, total=total), request=loaded["request"], result=loaded["result"],
        error=row["error"], after=row["after"], interruptions=json.loads(row["interruptions"] or "[]"),
        record_type=row["record_type"], cancel_requested=bool(row["cancel_requested"]),
        file=StoredFile(**loaded["file"]) if loaded["file"] else None, eta=_eta(row, now))


_NEW_JOB: dict[str, Json] = {"attempt": 0, "cancel_requested": 0, **dict.fromkeys(
    ("started_at", "finished_at", "result", "error", "interruptions", "done", "total", "done_before"))}
_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _json_text(value: Json) -> str | None:
    return None if value is None else _COMPACT.encode(value)


def _file_text(file: StoredFile | None) -> str | None:
    return _json_text(file.model_dump(by_alias=False) if file else None)


class LeaseLost(Interrupted):
    """The job is no longer this worker's: another attempt or an ending came first."""


class Claim(NamedTuple):
    """A job that was taken to be run, where it is to go on from, and whether more jobs are pending."""

    job: Job
    checkpoint: Json
    more: bool


_CANCELED = "canceled by a client"
_STEP_JOBS = 500  # that one transaction changes
_PAGE_CHARACTERS = 2**22  # of jobs, after which a page ends early
_MS_PER_DOUBLING = 10_000  # see `claim`
# Blocked jobs whose predecessor will not be completed any more, and those that follow them.
_DOOMED = """
    WITH RECURSIVE doomed(id) AS (
        SELECT id FROM jobs WHERE status = 'pending' AND blocked = 1 AND NOT EXISTS (SELECT 1 FROM jobs AS before
            WHERE before.id = jobs.after AND before.status IN ('pending', 'in-progress', 'completed'))
        UNION SELECT jobs.id FROM doomed JOIN jobs ON jobs.after = doomed.id
            WHERE jobs.status = 'pending' AND jobs.blocked = 1
        LIMIT ?)"""


def copied_database(path: Path, now: str) -> sqlite3.Connection:
    """A copy of a database of ours, brought up to date, in which no job runs; StorageError if it is no such thing."""
    connection = _connected(path, "rw")
    try:
        version = _schema_version(connection, path)
        found = "; ".join(row[0] for row in connection.execute("PRAGMA quick_check(3)"))
        if found != "ok" or not version:
            raise StorageError(f"the database is {f'damaged: {found}' if version else 'empty'}")
        _migrate(connection, version)
        connection.execute("UPDATE jobs SET status = 'canceled', error = ?, finished_at = ? "
                           "WHERE status = 'in-progress' AND cancel_requested", (_CANCELED, now))
        connection.execute("UPDATE jobs SET status = 'pending', attempt = attempt - 1 WHERE status = 'in-progress'")
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise StorageError(f"the database is damaged: {error}") from None
        raise
    return connection


class JobStore:
    """The job table, which is the queue: every move of a job is one statement here, checked against MOVES."""

    def __init__(self, database: Database, clock: Clock, make_id: Callable[[], str] | None = None):
        self._database = database
        self._clock = clock
        with database.read() as connection:
            last = connection.execute("SELECT max(id) FROM jobs").fetchone()[0]
        self.new_id = make_id or JobIds(clock, last)  # for a job whose file has to be in place before its row
        self._room = 0  # so many jobs may be inserted before those that wait are counted again

    def _now(self) -> str:
        return instant(self._clock())

    def _jobs(self, connection: sqlite3.Connection, query: str, parameters: Sequence[Json] = ()) -> Iterator[Job]:
        """What a query that begins with _JOB_QUERY finds."""
        rows = connection.cursor()
        rows.row_factory = sqlite3.Row
        return map(partial(_job, now=self._now()), rows.execute(query, parameters))

    def insert(self, job_type: str, request: Mapping[str, Json], *, record_type: str | None = None,
               after: str | None = None, key: str | None = None, key_hash: str | None = None,
               max_pending: int | None = None, job_id: str | None = None, file: StoredFile | None = None,
               weight: int = 1, result: Mapping[str, Json] | None = None) -> tuple[Job, bool]:
        """Adds a job and answers (job, True), durably; or (the job made with this key before, False).

        It is pending; or completed, with this `result`, where it was done while the client waited. `after` is a job
        that has to be completed first, `weight` the number of records that are expected of this one; see `claim`.
        Raises NotFound if there is no job `after`, Conflict if the key was used for another request, Unavailable if
        `max_pending` jobs wait already.
        """
        job_id, now = job_id or self.new_id(), self._now()
        ended: dict[str, Json] = {} if result is None else {
            "status": JobStatus.COMPLETED, "started_at": now, "finished_at": now, "attempt": 1,
            "result": _json_text(result)}

        def work(connection: sqlite3.Connection) -> tuple[Job, bool]:
            earlier = self._by_key(connection, key, key_hash)
            if earlier:
                return earlier, False
            if max_pending is not None:
                self._check_room(connection, max_pending)
            row = {"id": job_id, "type": job_type, "status": JobStatus.PENDING, "created_at": now,
                   "record_type": record_type, "request": _json_text(request), "after": after, "idempotency_key": key,
                   "idempotency_hash": key_hash, "file": _file_text(file),
                   "claim_order": self._claim_order(job_id, weight),
                   "blocked": self._has_to_wait(connection, after), **ended}
            connection.execute(f"INSERT INTO jobs({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
                               [*row.values()])
            return _job(_NEW_JOB | row, now), True

        return self._database.write(work, durable=True)

    def _check_room(self, connection: sqlite3.Connection, max_pending: int) -> None:
        """Counts jobs only where there could be too many: to count thousands would cost more than the insert."""
        if self._room <= 0:
            self._room = max_pending - self._count(connection, JobStatus.PENDING)
        if self._room <= 0:
            raise Unavailable(f"the queue is full: {max_pending} jobs are waiting")
        self._room -= 1

    def _claim_order(self, job_id: str, weight: int) -> int:
        """When the job was made, in milliseconds, and ten seconds more for each doubling of its records."""
        try:
            made = UUID(job_id).int >> 80  # goes on even where the clock is set back
        except ValueError:
            made = int(self._clock().timestamp() * 1000)
        return made + _MS_PER_DOUBLING * (max(weight, 1).bit_length() - 1)

    def _has_to_wait(self, connection: sqlite3.Connection, after: str | None) -> bool:
        if after is None:
            return False
        before = connection.execute("SELECT status FROM jobs WHERE id = ?", (after,)).fetchone()
        if not before:
            raise NotFound(f"after: there is no job {after!r}", [FieldProblem("after", "is no job")])
        return bool(before[0] != JobStatus.COMPLETED)

    def _by_key(self, connection: sqlite3.Connection, key: str | None, key_hash: str | None) -> Job | None:
        if key is None:
            return None
        row = connection.execute("SELECT id, idempotency_hash FROM jobs WHERE idempotency_key = ?", (key,)).fetchone()
        if row and row[1] != key_hash:
            raise Conflict("this Idempotency-Key was used for another request")
        return self._get(connection, row[0]) if row else None

    def _get(self, connection: sqlite3.Connection, job_id: str) -> Job:
        for job in self._jobs(connection, f"{_JOB_QUERY} WHERE id = ?", (job_id,)):
            return job
        raise NotFound(f"there is no job {job_id!r}")

    def get(self, job_id: str) -> Job:
        """The job; NotFound if there is none."""
        with self._database.read() as connection:
            return self._get(connection, job_id)

    def page(self, status: str | None, job_type: str | None, limit: int, after: str | None) -> tuple[list[Job], bool]:
        """Up to `limit` jobs, newest first, older than the id `after`; fewer when these are very long.

        And whether there are more.
        """
        conditions = {"type = ?": job_type, "id < ?": after}
        used = {sql: value for sql, value in conditions.items() if value is not None}
        # A status is written out, here and below, so that SQLite can use the partial index.
        literal = [f"status = '{JobStatus(status)}'"] if status else []
        where = f"WHERE {' AND '.join([*literal, *used])}" if literal or used else ""
        jobs: list[Job] = []
        characters = 0
        with self._database.read() as connection:
            for job in self._jobs(connection, f"{_JOB_QUERY} {where} ORDER BY id DESC LIMIT ?",
                                  (*used.values(), limit + 1)):
                if len(jobs) == limit or characters > _PAGE_CHARACTERS:
                    return jobs, True
                jobs.append(job)
                characters += len(job.model_dump_json())
        return jobs, False

    def _count(self, connection: sqlite3.Connection, status: JobStatus) -> int:
        row = connection.execute(f"SELECT count(*) FROM jobs WHERE status = '{status}'").fetchone()
        return int(row[0])

    def counts(self) -> tuple[int, int]:
        """How many jobs are (pending, in progress)."""
        with self._database.read() as connection:
            return self._count(connection, JobStatus.PENDING), self._count(connection, JobStatus.IN_PROGRESS)

    def claim(self) -> Claim | None:
        """Takes a pending job that may run, and counts the attempt; None if none may.

        Jobs go in the order in which they were made, but one of many records lets those of fewer pass that were made
        up to ten seconds later for each time that its number of records is double theirs.

        Jobs that were interrupted before run one at a time, so that one that kills the process cannot use up its
        neighbours' attempts.
        """
        return self._database.write(self._claim)

    def _claim(self, connection: sqlite3.Connection) -> Claim | None:
        claimed = connection.execute(
            "UPDATE jobs SET status = 'in-progress', attempt = attempt + 1, started_at = ? WHERE id = "
            "(SELECT id FROM jobs WHERE status = 'pending' AND blocked = 0 AND (attempt = 0 OR NOT EXISTS "
            "(SELECT 1 FROM jobs AS suspect WHERE suspect.status = 'in-progress' AND suspect.attempt > 1)) "
            "ORDER BY claim_order, id LIMIT 1) RETURNING id, EXISTS (SELECT 1 FROM jobs AS other "
            "WHERE status = 'pending' AND blocked = 0 AND other.id <> jobs.id)", (self._now(),)).fetchall()
        for job_id, more in claimed:
            state = connection.execute("UPDATE _progress SET done_before = done WHERE job = ? RETURNING checkpoint",
                                       (job_id,)).fetchall()
            checkpoint = json.loads(state[0][0] or "null") if state else None
            return Claim(self._get(connection, job_id), checkpoint, bool(more))
        return None

    def fail_dependents(self) -> Iterator[Job]:
        """Fails pending jobs that were to follow a job that has failed, was canceled or is gone, in steps.

        Yields them without their requests, and with the files that they do not have any more.
        """
        while True:
            with self._database.read() as connection:
                if not connection.execute(f"{_DOOMED} SELECT EXISTS (SELECT 1 FROM doomed)", (1,)).fetchone()[0]:
                    return
            yield from self._database.write(self._fail_some_dependents, durable=True)

    def _fail_some_dependents(self, connection: sqlite3.Connection) -> list[Job]:
        brief = _JOB_QUERY.replace("jobs.*", "'{}' AS request, jobs.*")  # a request may have a megabyte
        doomed = [*self._jobs(connection, f"{_DOOMED} {brief} WHERE id IN (SELECT id FROM doomed)", (_STEP_JOBS,))]
        reason, now = "job {}, which this one was to follow, was not completed", self._now()
        connection.execute(
            "UPDATE jobs SET status = 'failed', blocked = 0, file = NULL, finished_at = ?, "
            "error = replace(?, '{}', after) WHERE id IN (SELECT value FROM json_each(?))",
            (now, reason, json.dumps([job.job_id for job in doomed])))
        return [job.model_copy(update={"status": JobStatus.FAILED, "finished_at": now,
                                       "error": reason.format(job.after)}) for job in doomed]

    def oldest_pending(self) -> str | None:
        """When the job that waits longest was made."""
        with self._database.read() as connection:
            row = connection.execute("SELECT created_at FROM jobs WHERE status = 'pending' ORDER BY id LIMIT 1")
            return next((at for at, in row), None)

    def finished_before(self, moment: str, limit: int) -> list[str]:
        """Ids of up to `limit` jobs that finished before an instant, the oldest first."""
        with self._database.read() as connection:
            return [row[0] for row in connection.execute(
                "SELECT id FROM jobs WHERE finished_at < ? ORDER BY finished_at LIMIT ?", (moment, limit))]

    def save_progress(self, connection: sqlite3.Connection, job: Job, progress: Progress, checkpoint: Json) -> None:
        """Within a chunk's transaction: notes how far the job is. Raises LeaseLost if the job is not ours any more."""
        ours = connection.execute("SELECT 1 FROM jobs WHERE id = ? AND attempt = ? AND status = 'in-progress'",
                                  (job.job_id, job.attempt)).fetchone()
        if not ours:
            raise LeaseLost
        connection.execute(
            "INSERT INTO _progress(job, done, total, checkpoint, moved_in) VALUES (:job, :done, :total, :checkpoint, "
            "iif(:checkpoint IS NULL, 0, :attempt)) ON CONFLICT(job) DO UPDATE SET done = :done, total = :total, "
            "moved_in = iif(:checkpoint IS NULL OR :checkpoint = checkpoint, moved_in, :attempt), "
            "checkpoint = :checkpoint",
            {"job": job.job_id, "attempt": job.attempt, "done": progress.done, "total": progress.total,
             "checkpoint": _json_text(checkpoint)})

    def futile_attempts(self, job: Job) -> int:
        """How many attempts in a row, this one included, have saved no other checkpoint than they began from."""
        with self._database.read() as connection:
            return self._futile(connection, job)

    def _futile(self, connection: sqlite3.Connection, job: Job) -> int:
        moved = connection.execute("SELECT moved_in FROM _progress WHERE job = ?", (job.job_id,)).fetchone()
        return max(0, job.attempt - (moved[0] if moved else 0))

    def finish(self, job: Job, status: JobStatus, *, result: Json = None, error: str | None = None,
               file: StoredFile | None = None, claim: bool = False) -> tuple[Job, Claim | None]:
        """Ends a running job, durably; those that follow it may run when it is completed.

        With `claim` it takes the next one in the same transaction. Raises LeaseLost if the job is not this attempt's
        any more.
        """
        def work(connection: sqlite3.Connection) -> tuple[Job, bool, Claim | None]:
            ended = self._transition(connection, job, status, finished_at=self._now(), result=_json_text(result),
                                     error=error, file=_file_text(file))
            connection.execute("UPDATE _progress SET checkpoint = NULL WHERE job = ?", (job.job_id,))
            more = status is JobStatus.COMPLETED and self._unblock(connection, job.job_id)
            return ended, more, self._claim(connection) if claim else None

        ended, more, claimed = self._database.write(work, durable=True)
        while more:
            more = self._database.write(partial(self._unblock, job_id=job.job_id))
        return ended, claimed

    def _unblock(self, connection: sqlite3.Connection, job_id: str | None = None) -> bool:
        """Lets some jobs run that follow this one, or any that is completed; True if there may be more of them."""
        which, head = ("jobs.after = ?", [job_id]) if job_id else ("before.status = 'completed'", [])
        return connection.execute(
            "UPDATE jobs SET blocked = 0 WHERE id IN (SELECT jobs.id FROM jobs JOIN jobs AS before ON before.id = "
            f"jobs.after WHERE jobs.status = 'pending' AND jobs.blocked = 1 AND {which} LIMIT ?)",
            (*head, _STEP_JOBS)).rowcount == _STEP_JOBS

    def release(self, job: Job, reason: str, *, charged: bool) -> Job:
        """Puts a running job back to pending, and notes why; an attempt that is not `charged` is not counted."""
        return self._database.write(lambda connection: self._transition(
            connection, job, JobStatus.PENDING, attempt=job.attempt - (not charged),
            interruptions=self._interruptions(job, reason)))

    def _interruptions(self, job: Job, reason: str) -> str | None:
        """The job's history with one more entry; the last twenty are kept."""
        entry = Interruption(attempt=job.attempt, started_at=job.started_at, at=self._now(), reason=reason)
        return _json_text([past.model_dump(by_alias=False) for past in (*job.interruptions, entry)][-20:])

    def _transition(self, connection: sqlite3.Connection, job: Job, status: JobStatus, **values: Json) -> Job:
        """The one way out of in-progress, fenced by id, attempt and status; `values` are columns that change too."""
        assert status in MOVES[JobStatus.IN_PROGRESS]
        moved = connection.execute(
            f"UPDATE jobs SET status = ?, {', '.join(f'{name} = ?' for name in values)} "
            "WHERE id = ? AND attempt = ? AND status = 'in-progress'",
            (status, *values.values(), job.job_id, job.attempt)).rowcount
        if not moved:
            raise LeaseLost
        if status is JobStatus.PENDING:
            self._room = 0
        return self._get(connection, job.job_id)

    def recover(self, max_attempts: int) -> list[Job]:
        """At start: whatever was in progress when the last process ended goes on, or has been tried often enough.

        Answers these jobs.
        """
        recovered = self._database.write(partial(self._recover, max_attempts=max_attempts), durable=True)
        while self._database.write(self._unblock):
            pass
        return recovered

    def _recover(self, connection: sqlite3.Connection, max_attempts: int) -> list[Job]:
        reason, recovered = "the server ended while the job ran", []
        running = connection.execute("SELECT id FROM jobs WHERE status = 'in-progress'").fetchall()  # not many
        for job_id, in running:
            job = self._get(connection, job_id)
            tried, ending = self._futile(connection, job), {}
            status, error = JobStatus.PENDING, None
            if job.cancel_requested:
                status, error = JobStatus.CANCELED, _CANCELED
            elif tried >= max_attempts:
                status, error = JobStatus.FAILED, f"interrupted {'once' if tried == 1 else f'{tried} times'}: {reason}"
            if status.finished:
                ending = {"error": error, "finished_at": self._now(), "file": None}
            recovered.append(self._transition(connection, job, status, interruptions=self._interruptions(job, reason),
                                              **ending))
        return recovered

    def cancel(self, job_id: str) -> Job:
        """Cancels a pending job at once, asks a running one to stop; Conflict if it is finished."""
        def work(connection: sqlite3.Connection) -> Job:
            job = self._get(connection, job_id)
            if job.status.finished:
                raise Conflict(f"the job is {job.status} already")
            if job.status is JobStatus.PENDING:
                connection.execute("UPDATE jobs SET status = 'canceled', blocked = 0, finished_at = ?, error = ?, "
                                   "file = NULL WHERE id = ?", (self._now(), _CANCELED, job_id))
            else:
                connection.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (job_id,))
            return self._get(connection, job_id)

        return self._database.write(work, durable=True)

    def retry(self, job_id: str) -> Job:
        """Makes a failed or canceled job pending again, from its beginning; Conflict otherwise."""
        def work(connection: sqlite3.Connection) -> Job:
            job = self._get(connection, job_id)
            if JobStatus.PENDING not in MOVES[job.status] or not job.status.finished:
                raise Conflict(f"only a failed or canceled job can be retried; this one is {job.status}")
            self._room = 0
            connection.execute("DELETE FROM _progress WHERE job = ?", (job_id,))
            connection.execute(
                "UPDATE jobs SET status = 'pending', attempt = 0, started_at = NULL, finished_at = NULL, error = NULL, "
                "cancel_requested = 0, blocked = after IS NOT NULL AND NOT EXISTS (SELECT 1 FROM jobs AS before WHERE "
                "before.id = jobs.after AND before.status = 'completed') WHERE id = ?", (job_id,))
            return self._get(connection, job_id)

        return self._database.write(work, durable=True)

    def remove(self, job_id: str) -> Job:
        """Deletes a finished job's row, durably; its records have no completed job then, so nobody sees them."""
        def work(connection: sqlite3.Connection) -> Job:
            job = self._get(connection, job_id)
            if not job.status.finished:
                raise Conflict(f"the job is {job.status}: cancel it first")
            connection.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            connection.execute("DELETE FROM _progress WHERE job = ?", (job_id,))
            return job

        return self._database.write(work, durable=True)

    def stored_paths(self) -> set[str]:
        """The relative path of every file that belongs to a job."""
        with self._database.read() as connection:
            return stored_paths(connection)

    def forget_counts(self) -> None:
        """After the table was replaced."""
        self._room = 0


# Records as SQL: what a kind of field is in a table, in a text, in a comparison


class KindSql(NamedTuple):
    """What a kind of field is in SQLite; `{c}` stands for the column."""

    column: str  # the type that a column is declared with
    json: str = "{c}"  # its JSON text where `raw`, otherwise an argument of json_object
    text: str = "{c}"  # what is text in it
    csv: str = "{c}"  # its cell, {safe} being its text for a spreadsheet; where that is none, that text in quotes
    key: str = "{c}"  # what comparisons look at
    order: str = ""  # what ORDER BY looks at; the key where there is none
    raw: bool = False
    stored: str = "{c}"  # the value as a column of that very type gives it


# A quotient of two whole numbers is rounded right: a float that equals one has no more digits than SQLite prints. What
# it prints of others is not exact, and to call Python for each would wait for the interpreter lock each time: once a
# mark tells of one, all leave as two whole numbers, of 2**-10 and 2**-72, which hold all their bits.
_HALVES = ("CASE WHEN {c} BETWEEN 1e-4 AND 9e15 OR {c} BETWEEN -9e15 AND -1e-4 OR {c} = 0 THEN CAST({c} * 1024 AS "
           "INTEGER) WHEN {c} - {c} = 0 THEN exact_float({c}) ELSE {form} END, "
           f"CAST(({{c}} * 1024 - CAST({{c}} * 1024 AS INTEGER)) * {2.0**62} AS INTEGER)")
_FLOAT_MARK = "CAST(x'fe' AS TEXT)"


def _float_sql(endless: str) -> str:
    """A float, or the mark that tells of one; `endless` has a {} for the sign of those that are not finite."""
    return ("CASE WHEN ({c} BETWEEN 1e-4 AND 1e9 OR {c} BETWEEN -1e9 AND -1e-4) AND {c} = round({c} * 1e6) / 1e6 OR "
            f"{{c}} = 0 THEN {{c}} + 0.0 WHEN {{c}} - {{c}} = 0 THEN {_FLOAT_MARK} "
            f"WHEN {{c}} > 0 THEN {endless.format('')} WHEN {{c}} < 0 THEN {endless.format('-')} END")


_FLOAT_JSON, _FLOAT_CELL = _float_sql("json('{}1e999')"), _float_sql("'{}1e999'")
_ANY_FLOAT = f"iif({_FLOAT_CELL} = {_FLOAT_MARK}, exact_float({{c}}), {_FLOAT_CELL})"  # of which there are few
# An instant in UTC with microseconds; texts of 24 characters are those that `instant` makes. SQLite would round
# fractions of a second, so they stay aside. Null for what is no date.
_WITHOUT_FRACTION = "iif(substr({c}, 20, 1) = '.', substr({c}, 1, 19) || ltrim(substr({c}, 21), '0123456789'), {c})"
_MOMENT = ("CASE WHEN length({c}) = 24 AND {c} GLOB '????-??-??T*Z' THEN substr({c}, 1, 23) || '000' "
           "WHEN {c} GLOB '????-??-??T??:??:??Z' THEN substr({c}, 1, 19) || '.000000' "
           "WHEN {c} GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]*' THEN "
           f"strftime('%Y-%m-%dT%H:%M:%S', {_WITHOUT_FRACTION}) || '.' || substr(iif(substr({{c}}, 20, 1) = '.', "
           "substr({c}, 21, length({c}) - 20 - length(ltrim(substr({c}, 21), '0123456789'))), '') || '000000', 1, 6) "
           "END")
_BOOL = "CASE {c} WHEN 1 THEN 'true' WHEN 0 THEN 'false' END"
_IN_QUOTES = "printf(CAST(x'fc2573fc' AS TEXT), {safe})"  # %s between marks for quotes
KIND_SQL: dict[str, KindSql] = {
    "none": KindSql("ANY", json="NULL", csv="NULL", key="NULL", stored="NULL"),  # no job has given it a value
    "int": KindSql("INTEGER"),
    "float": KindSql("REAL", json=_FLOAT_JSON, csv=_FLOAT_CELL, stored="CAST({c} AS REAL)"),
    "decimal": KindSql("TEXT", key="CAST({c} AS REAL)", raw=True),
    "bool": KindSql("INTEGER", json=f"json({_BOOL})", csv=_BOOL),
    "text": KindSql("TEXT", csv=""),
    "date": KindSql("TEXT", csv="", key="{c} || 'T00:00:00.000000'"),
    "datetime": KindSql("TEXT", csv="", key=_MOMENT),
    # Values of several types, or lists and objects: each as JSON.
    "json": KindSql("TEXT", text="iif({c} GLOB '\"*', json_extract({c}, '$'), {c})", raw=True,
                    csv=f"iif({{c}} GLOB '[\"{{{{[]*', {_IN_QUOTES}, {{c}})", order="json_extract({c}, '$')",
                    key="CASE json_type({c}) WHEN 'true' THEN x'01' WHEN 'false' THEN x'00' "
                        "ELSE json_extract({c}, '$') END"),
    # Values of several types, each as SQLite has it.
    "any": KindSql("ANY", json=f"CASE typeof({{c}}) WHEN 'real' THEN json({_ANY_FLOAT}) ELSE {{c}} END",
                   csv=f"CASE typeof({{c}}) WHEN 'real' THEN {_ANY_FLOAT} WHEN 'text' THEN {_IN_QUOTES} "
                       "ELSE {c} END"),
}
# Decimals as numbers, for whoever opens the database: real or whole, they read back as texts of one of these forms.
# What does not read back as it was, or has more than 15 digits, is a text there.
_DECIMAL_FORMS = {"decimal_": ("printf('%!.15g', {c})", "")} | {
    f"decimal{places}": (f"printf('%.{places}f', {{c}})", f".{'0' * places}".rstrip(".")) for places in range(16)}
for _form, (_real, _zeros) in _DECIMAL_FORMS.items():
    _text = f"CASE typeof({{c}}) WHEN 'real' THEN {_real} WHEN 'integer' THEN {{c}} || '{_zeros}' ELSE {{c}} END"
    KIND_SQL[_form] = KIND_SQL["decimal"]._replace(column="ANY", json=_text, text=_text, csv=_text, stored=_text)
_KEYS = ("PRIMARY KEY NOT NULL", "UNIQUE")
# Whether a decimal would not be what it was in a column of affinity NUMERIC.
_INEXACT = ("iif(typeof({c}) <> 'text' OR (length({c}) <= 16 AND {c} NOT GLOB '*[eE]*'), FALSE, "
            "decimal_key({c}) <> decimal_key(CAST({c} AS NUMERIC)))")
_JSON_TEXT: Mapping[Kind, str] = {  # what a value is among others in a JSON column; null where it is null
    "none": "NULL", "int": "{c}", "float": "CASE WHEN {c} IS NOT NULL THEN exact_float({c}) END", "decimal": "{c}",
    "bool": _BOOL, "json": "{c}", **dict.fromkeys(("text", "date", "datetime"), "nullif(json_quote({c}), 'null')"),
    "any": "CASE typeof({c}) WHEN 'real' THEN exact_float({c}) WHEN 'text' THEN json_quote({c}) ELSE {c} END"}
_NUMBERS, _TEXTS = frozenset[Kind]({"int", "float", "decimal"}), frozenset[Kind]({"text", "date", "datetime"})


def _plain(kind: Kind) -> Kind:
    """The kind alone, without the form of decimals."""
    return "decimal" if kind in _DECIMAL_FORMS else kind


def _decimal_form(texts: Iterable[str]) -> str:
    """How a column's decimals are written, by some of them: with so many places, or with as many as each needs."""
    found = {len(text.partition(".")[2]) for text in texts} or {2}
    return f"decimal{places}" if len(found) == 1 and (places := found.pop()) < 16 else "decimal_"


def _mark(kind: Kind, mark: str) -> str:
    """The value that a mark stands for, as a record table has it."""
    if kind not in _DECIMAL_FORMS:
        return mark
    number = f"CAST({mark} AS NUMERIC)"
    text = KIND_SQL[kind].text.format(c=number)
    return f"CASE WHEN length(ltrim({mark}, '-')) <= 16 AND {text} = {mark} THEN {number} ELSE {mark} END"


def joined_kind(one: Kind, other: Kind) -> Kind:
    """The kind that a field is shown with which jobs have written with two.

    The values stay what they are: each job's are read by the kind that it wrote them with.
    """
    one, other = _plain(one), _plain(other)
    if one == other or other == "none":
        return one
    if one == "none":
        return other
    return "decimal" if {one, other} <= _NUMBERS else "text" if {one, other} <= _TEXTS else "any"


def joined_kinds(layouts: Iterable[Mapping[str, Kind]]) -> dict[str, Kind]:
    """The fields of several jobs' records, in the order in which they came up, with the kinds they have in common."""
    joined: dict[str, Kind] = {}
    for field, kind in chain.from_iterable(layout.items() for layout in layouts):
        joined[field] = joined_kind(joined.get(field, "none"), kind)
    return joined


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# Comparisons: the one place that says which stored values a filter's value is equal to, or before. Both have a key of
# the field's kind: SQL makes that of the stored value, `_meaning` that of the other.

_RESERVED: Mapping[str, Kind] = {"_id": "int", "_job": "text", "_created": "datetime"}
_NEGATED = {"ne": "eq", "not_in": "in_", "not_like": "like"}  # they hold wherever the other does not, so for null too
_PATTERNS = {"contains": "%{}%", "starts_with": "{}%", "ends_with": "%{}"}
_ORDER = {"lt": ("<", 0), "lte": ("<=", 1), "gt": (">", 1), "gte": (">=", 0), "from": (">=", 0), "to": ("<=", 1)}
# Among values of several types the keys of texts and of booleans are between these, and those of numbers before.
_KEYS_OF_TYPE: Mapping[type, tuple[str, str]] = {str: ("''", "x''"), bytes: ("x''", "x'ff'")}


def _number(value: Json) -> int | float | None:
    """A filter's number, also one written as a text; None if it is none, or NaN, which SQLite takes for null."""
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(r"-?\d{1,400}", text, re.ASCII):
            return _number(int(text))
        return float(text) if re.fullmatch(
            r"[+-]?(inf|(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)", text, re.ASCII) else None
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    # Beyond what SQLite can hold is beyond every value there is.
    return value if abs(value) < 2**63 else math.inf if value > 0 else -math.inf


def _meaning(kind: Kind, value: Json) -> tuple[Any, Any] | None:
    """The first and the last key that a filter's value means, which differ for a date; None if it has none."""
    key: Any = None
    if kind in ("date", "datetime"):
        with suppress(ValueError):
            return date_bounds(value) if isinstance(value, str) else None
    elif kind in ("json", "any"):
        key = bytes([value]) if isinstance(value, bool) else value if isinstance(value, str) else _number(value)
    elif kind in _NUMBERS:
        key = _number(value)
        key = float(str(value)) if kind == "decimal" and key is not None else key
    elif kind == "bool":
        key = {"true": True, "false": False, True: True, False: False}.get(value) if isinstance(
            value, str | bool) else None
    elif not isinstance(value, bool):
        key = str(value)
    return None if key is None else (key, key)


def _meets(key: str, relation: str, keys: Collection[tuple[Any, Any]]) -> tuple[str, list[Any]]:
    """Whether a key is before or after that of a value, or among those of several."""
    if relation in _ORDER:
        sign, end = _ORDER[relation]
        return f"{key} {sign} ?", [next(iter(keys))[end]]
    points = [first for first, last in keys if first == last]
    days = [first[:10] for first, last in keys if first != last]
    sql = " OR ".join(f"{side} IN ({', '.join('?' * len(among))})"
                      for side, among in ((key, points), (f"substr({key}, 1, 10)", days)) if among)
    return f"({sql})", [*points, *days]


def _compare(kind: Kind, column: str, relation: str, keys: Sequence[tuple[Any, Any]],
             values: Sequence[Json]) -> tuple[str, list[Any]]:
    """A condition on a field of values, and what it binds: the keys of the values that it is compared with."""
    key = KIND_SQL[kind].key.format(c=column)
    sql, bound = _meets(key, relation, keys)
    if kind in ("json", "any") and relation in _ORDER:  # no text is before or after a number
        low, high = _KEYS_OF_TYPE.get(type(bound[0]), ("-9e999", "''"))
        return f"({sql} AND {key} >= {low} AND {key} < {high})", bound
    if kind == "decimal":
        decimals = [(_decimal_key(str(item)),) * 2 for item in values]
        exact, of_exact = _meets(f"decimal_key({column})", relation, decimals)
        if max(len(Decimal(str(item)).as_tuple().digits) for item in values) > 15:
            return exact, of_exact
        # A float tells those of up to 15 digits apart, inside SQLite, which need not wait for Python then.
        return f"CASE WHEN length({column}) <= 15 THEN {sql} ELSE {exact} END", [*bound, *of_exact]
    return sql, bound


def comparison(kind: Kind, column: str, relation: str, value: Json,
               mixed: bool = False) -> tuple[str, list[Any]] | None:
    """One condition of a filter as SQL, and the values it binds: how every reader of records compares.

    Numbers compare as numbers, decimals exactly, instants and dates as such, where a date means its whole day; what is
    of several types by the type of each value. `from` and `to` look for dates in texts too. In a field that is `mixed`,
    since other jobs wrote other kinds, a text is no number and a number no text. None if no value of that kind can be
    compared with this one.
    """
    if relation in _NEGATED and value is not None:
        held = comparison(kind, column, _NEGATED[relation], value, mixed)
        return held and (f"NOT coalesce({held[0]}, FALSE)", held[1])
    text, kind = f"({KIND_SQL[kind].text.format(c=column)})", _plain(kind)
    if relation in ("from", "to") and kind != "none":
        if kind in _NUMBERS or kind == "bool":
            return None
        kind, column = "datetime", text
    if relation == "null" or (relation in ("eq", "ne") and value is None):
        return f"{column} IS {'' if (value if relation == 'null' else relation == 'eq') else 'NOT '}NULL", []
    if relation == "like":
        return f"{text} LIKE ?", [value]
    if relation in _PATTERNS:
        return f"{text} LIKE ? ESCAPE '!'", [_PATTERNS[relation].format(re.sub("[%_!]", r"!\g<0>", value))]
    values = [item for item in (value if relation == "in_" else [value]) if item is not None]
    if not values or kind == "none":
        return "FALSE", []
    alike = [item for item in values if isinstance(item, str) == (kind in _TEXTS)] if (
        mixed and kind in _NUMBERS | _TEXTS | {"bool"}) else values
    found = [(meant, item) for item in alike if (meant := _meaning(kind, item))]
    if not found or (len(found) < len(alike) and not mixed):
        return None
    return _compare(kind, column, relation, *map(list, zip(*found, strict=True)))


# Conditions as texts, in a query or behind --where: `field=value` or `field.operator=value`

_SPELLED: Mapping[str, bool] = {"true": True, "false": False}
_SYNONYMS: Mapping[str, str] = {  # what json-server, Datasette and others say
    **dict.fromkeys(("sort", "sort_desc", "order"), "orderBy"), **dict.fromkeys(("size", "per_page", "take"), "limit"),
    **dict.fromkeys(("page", "start", "offset", "cursor", "next"), "after"),
    **dict.fromkeys(("col", "columns", "select"), "fields"), "isnull": "null", "exact": "eq", "not": "ne", "ge": "gte",
    "le": "lte"}


def _unknown_name(name: str, fields: Collection[str], parameters: Collection[str]) -> BadRequest:
    """What to answer to a name that is no field: the right way to say it, also for age__gte, age[gte] or _sort."""
    operators, word, known = [*Condition.operators()], name.strip("_"), [*dict.fromkeys([*parameters, *fields])]
    of = max((field for field in fields if name.startswith(field) and re.match(r"[._:[]", name[len(field):])),
             key=len, default="")
    if of:
        word, known = name[len(of):].strip("._:[]"), operators
    word = _SYNONYMS.get(word.lower(), word)
    near = [hit for hit in known if hit.lower() == word.lower()] or nearest(word, known)
    told = f"did you mean {' or '.join(repr(f'{of}.{hit}' if of else hit) for hit in near)}?" if near else (
        f"there are: {', '.join(known)}")
    return BadRequest.of(name, f"is no {f'operator of {of!r}' if of else 'field and no parameter here'}; {told}")


def _readings(kind: Kind, text: str) -> list[Json]:
    """What a text may mean: among values of several types a number or a boolean too, which is last then."""
    spelled = _SPELLED.get(text, _number(text)) if kind in ("json", "any") else None
    return [text] if spelled is None else [text, spelled]


def _items(text: str) -> list[str]:
    """The values in a text, which separates them by commas, or is a JSON list."""
    with suppress(ValueError, RecursionError):
        if isinstance(items := json.loads(text), list):
            return [item if isinstance(item, str) else json.dumps(item) for item in items]
    return text.split(",")


def pairs_in(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Name and text of each condition; BadRequest if one has no =."""
    found = [text.partition("=") for text in texts]
    for name, equals, _ in found:
        if not equals:
            raise BadRequest(f"{name!r} should be FIELD=VALUE or FIELD.OPERATOR=VALUE; the operators are: "
                             f"{', '.join(Condition.operators())}")
    return [(name, text) for name, _, text in found]


def where_of(pairs: Iterable[tuple[str, str]], sides: Iterable[str] = (), fields: Mapping[str, Kind] | None = None,
             parameters: Collection[str] = ()) -> dict[str, Json]:
    """The `where` that pairs of a name (a field, or `field.operator`) and a text say, and alternatives beside them.

    Where the `fields` are known, the texts are read by their kinds, and BadRequest names the nearest of a name that is
    none of them, and none of the `parameters` beside them.
    """
    where: dict[str, Json] = {}
    for name, text in pairs:
        field, _, operator = name.rpartition(".")
        if operator not in Condition.operators() or (fields and field not in fields and name in fields):
            field, operator = name, "eq"
        if fields is not None and field not in fields:
            raise _unknown_name(name, fields, parameters)
        readings, value = partial(_readings, fields[field] if fields else "text"), cast(Json, text)
        if operator == "null":
            if text not in _SPELLED:
                raise BadRequest.of(name, "should be true or false")
            value = _SPELLED[text]
        elif operator in ("in", "notIn"):
            value = [*chain.from_iterable(map(readings, _items(text)))]
        elif operator in ("eq", "ne") and len(readings(text)) > 1:
            operator, value = {"eq": "in", "ne": "notIn"}[operator], readings(text)
        elif operator in _ORDER:
            value = readings(text)[-1]
        if operator in where.setdefault(field, {}):
            raise BadRequest.of(name, f"is given twice; {field}.in takes several values")
        where[field][operator] = value
    alternatives = [where_of(pairs_in(side.split("&")), (), fields, parameters) for side in sides]
    if alternatives and "or" in where:
        raise BadRequest.of("or", "cannot stand beside a condition on a field of that name")
    return where | ({"or": alternatives} if alternatives else {})


# Queries: which records, and their text, made inside SQLite


class RecordTypeInfo(ApiModel):
    """A record type: how many records it has, and the kind of each field."""

    record_type: str
    count: int
    fields: dict[str, Kind]


class Selected(NamedTuple):
    """Which records are read; `interrupted` is asked while SQLite works, and ends that with Interrupted."""

    filters: Filters
    fields: Sequence[str] | None = None
    order_by: str | None = None  # fields, separated by commas, with a - before those that descend
    limit: int | None = None
    excel_safe: bool = False  # texts that a spreadsheet would run get a ' in front
    split: bool = False  # each record type by itself, with no field more than its own
    omit_null: bool = False  # JSON objects have no member that is null
    dialect: str = "sqlite"  # of SQL
    interrupted: Callable[[], bool] = lambda: False
    after: int = 0  # the `_id` of the record that those are read beyond


def column_kind(layouts: Iterable[Mapping[str, Kind]], field: str) -> Kind:
    """The kind of a typed column that holds what all these jobs wrote: json where no other does without loss."""
    kinds = {_plain({**layout, **_RESERVED}.get(field, "none")) for layout in layouts} - {"none"}
    joined = joined_kinds([{"": kind} for kind in kinds]).get("", "none")
    if joined == "decimal" and "float" in kinds:
        return "json" if "decimal" in kinds else "float"
    return "json" if joined == "any" else joined


def _value_sql(column: str, kind: Kind, as_json: bool) -> str:
    """A value as a typed column has it, or as its JSON text."""
    of = _plain(kind)
    form = KIND_SQL[kind].text if of == "decimal" else _JSON_TEXT[of] if as_json or of == "none" else "{c}"
    return form.format(c=column)


# Bytes that no text in UTF-8 has: x'ff' for a null among quoted cells, and between the pieces that a long object is
# made of, which goes with the quotes or braces around it; x'fe' for a float; x'fc' for a quote around a cell.
_MARK = "CAST(x'ff' AS TEXT)"
_PIECE_FIELDS = 60  # a function of SQLite takes up to 127 arguments


class Table(NamedTuple):
    """What a file of typed columns has of a record type, or of all of them together, if it is ""."""

    name: str
    columns: Mapping[str, Kind]  # see column_kind


class RecordText(NamedTuple):
    """How records are written as text.

    `between` stands between two, `delimiter` between the cells of one (JSON objects have none), `before` and `after`
    around all of them, and `empty` where there are none.
    """

    between: str = "\n"
    delimiter: str | None = None
    before: str = ""
    after: str = ""
    empty: str = ""
    forms: Mapping[Kind, str] | None = None  # SQL of cells by the column's kind (none: its text in quotes); else of CSV
    null: str = ""  # among cells that are not in quotes


FORMULA_STARTS = "=@+-\uff1d\uff20\uff0b\uff0d"  # for a spreadsheet; the last four are full-width
# Only what a spreadsheet would run as a formula: not a plain signed number.
_SAFE_TEXT = ("iif({c} GLOB '[=@\uff1d\uff20\uff0b\uff0d ' || char(9, 10, 13) || ']*' OR ({c} GLOB '[+-]*' "
              "AND substr({c}, 2) GLOB '*[^0-9.]*'), '''' || {c}, {c})")


def _column(field: str) -> str:
    """A field of the record table that a query calls r."""
    return f"r.{_quote(field)}"


def _object_sql(fields: Sequence[tuple[str, Kind]], label: tuple[str, str] | None, omit_null: bool,
                halves: bool) -> str:
    """The JSON text of a record: objects, of which `}x'ff'{` makes one; or one without nulls."""
    members = [(False, ", ".join(map(_literal, label)))] if label else []
    for field, kind in fields:
        value = KIND_SQL[kind].json.format(c=_column(field))
        if kind == "float" and halves:  # a constant, which is the fastest
            value = f"iif({_column(field)} IS NULL, NULL, {_FLOAT_MARK})" if omit_null else _FLOAT_MARK
        name = _literal("{" + json.dumps(field, ensure_ascii=False) + ":")
        members.append((True, f"{name} || coalesce({value}, 'null') || '}}'") if KIND_SQL[kind].raw else
                       (False, f"{_literal(field)}, {value}"))
    pieces = []
    for raw, group in groupby(members, itemgetter(0)):
        texts = [text for _, text in group]
        pieces += texts if raw else [f"json_object({', '.join(texts[start:start + _PIECE_FIELDS])})"
                                     for start in range(0, len(texts), _PIECE_FIELDS)]
    objects = f" || {_MARK} || ".join(pieces) or "json_object()"
    return f"json_patch('{{}}', replace({objects}, '}}' || {_MARK} || '{{', ','))" if omit_null else objects


def _cells_sql(fields: Sequence[tuple[Kind, str]], label: tuple[str, str] | None, text: RecordText,
               excel_safe: bool, halves: bool) -> str:
    """The line of a record, of the kinds and the SQL of its fields."""
    cells = [(b"\xfc%s\xfc", _literal(label[1]))] if label else []
    null, no_text = ("CAST(x'fcfc' AS TEXT)", "''") if text.null == '""' else (_literal(text.null), _MARK)
    for kind, value in fields:
        form, safe = (text.forms[kind], value) if text.forms else (
            KIND_SQL[kind].csv, (_SAFE_TEXT if excel_safe else "{c}").format(c=KIND_SQL[kind].text.format(c=value)))
        cells.append((b"\xfe%s", "''") if kind == "float" and halves else
                     (b"%s", f"coalesce({form.format(c=value, safe=safe)}, {null})") if form else
                     (b"\xfc%s\xfc", f"coalesce({safe}, {no_text})"))
    pieces = []
    for start in range(0, len(cells), _PIECE_FIELDS):
        places, values = zip(*cells[start:start + _PIECE_FIELDS], strict=True)
        line = str(text.delimiter).encode().join(places).hex()
        pieces.append(f"printf(CAST(x'{line}' AS TEXT), {', '.join(values)})")
    return f" || {_literal(str(text.delimiter))} || ".join(pieces) or "''"


def _halves_sql(cells: Iterable[tuple[Kind, str]], text: RecordText) -> str:
    """Arrays of what _HALVES gives for the floats among cells of these kinds and SQL."""
    form = text.forms["float"] if text.forms else _FLOAT_CELL
    floats = [_HALVES.format(c=value, form=form.format(c=value)) for kind, value in cells if kind == "float"]
    return " || ',' || ".join(f"json_array({', '.join(floats[start:start + _PIECE_FIELDS])})"
                              for start in range(0, len(floats), _PIECE_FIELDS)) or "NULL"


def _layouts(connection: sqlite3.Connection, record_type: str) -> dict[int, Mapping[str, Kind]]:
    """The layouts of a record type by their numbers, in the order in which they came up."""
    rows = connection.execute("SELECT id, kinds FROM _layouts WHERE record_type = ? ORDER BY id", (record_type,))
    return {number: json.loads(kinds) for number, kinds in rows}


def _record_types(connection: sqlite3.Connection, *needed: str) -> list[str]:
    """All record types; NotFound if one that is needed is not among them."""
    existing = [row[0] for row in connection.execute("SELECT record_type FROM _types ORDER BY record_type")]
    for name in needed:
        if name not in existing:
            raise NotFound(f"there is no record type {name!r}{did_you_mean(name, existing)}; "
                           f"there are: {', '.join(existing) or 'none yet'}")
    return existing


def names_in(text: str, known: Collection[str]) -> list[str]:
    """The names that a text separates by commas; those that are known may have commas in them."""
    parts, names = text.split(","), list[str]()
    most = 1 + max((name.count(",") for name in known), default=0)
    while parts:
        found = (",".join(parts[:count]).strip() for count in range(min(most, len(parts)), 1, -1))
        names.append(next((name for name in found if name in known), parts[0].strip()))
        del parts[:names[-1].count(",") + 1]
    return names


# SQL, and what it binds, for the records from one number to another, and at most so many of them.
_Select = Callable[[int, int, int], tuple[str, list[Any]]]


def only_type(connection: sqlite3.Connection, filters: Filters) -> str | None:
    """The record type that filters choose, if it is one: named, or the only one that the named job made."""
    names = {filters.record_type} if isinstance(filters.record_type, str) else {*(filters.record_type or ())}
    if not names and filters.job_id is not None:
        rows = connection.execute("SELECT record_type FROM _readable_ranges WHERE job = ?", (filters.job_id,))
        names = {row[0] for row in rows}
    return names.pop() if len(names) == 1 else None


def _ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The items, of which the next are made on a thread of its own meanwhile: SQLite does not need Python's lock."""
    with ThreadPoolExecutor(1, "taskapi-reader") as pool:
        coming = deque(pool.submit(next, items, None) for _ in range(_AHEAD))
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, items, None))
            yield item


class Selection:
    """Checked filters over one snapshot: which records of completed jobs, which of their fields, in which order.

    Each job's records are read by the kinds that it wrote them with (its layout), so that no later job changes them.
    Raises NotFound, which names what exists, for a type, field or job that does not, and BadRequest for a filter that
    no value can be compared with.
    """

    def __init__(self, connection: sqlite3.Connection, wanted: Selected):
        self._connection, self._wanted, filters = connection, wanted, wanted.filters
        self._several = only_type(connection, filters) is None and not wanted.split
        dates = [(end, bound) for end, bound in (("from", filters.from_), ("to", filters.to)) if bound is not None]
        by_creation = filters.date_field in (None, *RESERVED_COLUMNS[2:])
        self._created = dates if by_creation else []  # all records of a job say that they were made when the job was
        self._tests = [*filters.where.tests, *([] if by_creation else [(str(filters.date_field), *date)
                                                                       for date in dates])]
        self._layouts = self._read_layouts()
        self._of_type: dict[str, list[Mapping[str, Kind]]] = {name: [] for name in self._types}
        for name, kinds in self._layouts.values():
            self._of_type[name].append(kinds)
        self._kinds = {name: joined_kinds(of) for name, of in self._of_type.items()}
        self._check_tests()
        self._left, self.done = self._limit, 0  # how many have been brought so far
        self.fields = list(wanted.fields or dict.fromkeys(chain.from_iterable(self._kinds.values())))
        self._label = "recordType"  # where there are several types; with underscores before it if a field is named so
        while self._label.lower() in map(str.lower, self.fields):
            self._label = f"_{self._label}"
        self.tables = self._tables()
        # How many will be read; None: it is not known before.
        self.total = self._select() if self._order else None if self._tests else min(self.count(), self._limit)

    def _tables(self) -> list[Table]:
        """One for each type if they are split, else one for all."""
        if self._several:
            of_all = [*chain.from_iterable(self._of_type.values())]
            return [Table("", {self._label: "text", **{field: column_kind(of_all, field) for field in self.fields}})]
        tables = []
        for name, layouts in self._of_type.items():
            own = {**self._kinds[name], **_RESERVED}
            tables.append(Table(name, {field: column_kind(layouts, field) for field in self._wanted.fields or
                                       self._kinds[name] if field in own or not self._wanted.split}))
        return [table for table in tables if {*table.columns} - {*_RESERVED} or not self._wanted.split]

    # Checks

    def _read_layouts(self) -> dict[int, tuple[str, Mapping[str, Kind]]]:
        """Type and kinds of what may be selected, by the layouts' numbers, after a look at what the request names."""
        wanted, job_id, asked = self._wanted, self._wanted.filters.job_id, self._wanted.filters.record_type
        names = [asked] if isinstance(asked, str) else asked or ()
        existing = _record_types(self._connection, *names)
        own = None if job_id is None else self._layouts_of_job(job_id)
        self._types = list(dict.fromkeys(names or (existing if own is None else sorted(own))))
        layouts = {number: (name, kinds) for name in self._types
                   for number, kinds in _layouts(self._connection, name).items()}
        known = list(joined_kinds(kinds for _, kinds in layouts.values()))
        names = [*known, *RESERVED_COLUMNS]
        signed = names_in(wanted.order_by, [*names, *(f"-{name}" for name in names)]) if wanted.order_by else []
        self._order = [(name, False) if name in names else (name.removeprefix("-"), name[:1] == "-") for name in signed]
        if len(self._order) > _MOST_KEYS:
            raise BadRequest.of("orderBy", f"should be up to {_MOST_KEYS} fields")
        asked_for = {"fields": wanted.fields or (), "orderBy": [field for field, _ in self._order], "dateField": [
            wanted.filters.date_field or names[0]], "where": [field for field, *_ in each_test(self._tests)]}
        for part, field in ((part, field) for part, fields in asked_for.items() for field in fields):
            if field not in names:
                where = f"record type {self._types[0]!r}" if len(self._types) == 1 else "any of the record types"
                raise BadRequest.of(part, f"there is no field {field!r} in {where}{did_you_mean(field, known)}; "
                                          f"there are: {', '.join(known)}")
        return {number: layout for number, layout in layouts.items() if own is None or own.get(layout[0]) == number}

    def _layouts_of_job(self, job_id: str) -> dict[str, int]:
        """What the job wrote with, by type: its records have no other fields, whatever other jobs brought."""
        job = self._connection.execute("SELECT status FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if not job:
            raise NotFound(f"there is no job {job_id!r}")
        if job[0] != JobStatus.COMPLETED:
            raise NotFound(f"job {job_id} is {job[0]}: its records can be read once it is completed")
        rows = self._connection.execute("SELECT record_type, layout FROM _readable_ranges WHERE job = ?", (job_id,))
        return dict(rows.fetchall())

    def _check_tests(self) -> None:
        for (name, layouts), (field, relation, value) in product(self._of_type.items(), each_test(self._tests)):
            by_kind = {_RESERVED.get(field) or kinds.get(field, "none"): kinds for kinds in layouts}
            if by_kind and not any(self._comparison(name, kinds, field, relation, value) for kinds in by_kind.values()):
                kind = _plain(next(iter(by_kind)))
                what = f"is not a date: {kind}" if relation in ("from", "to") else (
                    f"cannot be compared with {json.dumps(value, ensure_ascii=False)}: its kind is {kind}")
                raise WrongValue(f"filter on {field!r}: {what}", [FieldProblem(field, what)])

    @property
    def progress(self) -> Progress:
        """How far the reading is."""
        return Progress(done=self.done, total=self.total)

    # Which records

    def _comparison(self, record_type: str, kinds: Mapping[str, Kind], field: str, relation: str,
                    value: Json) -> tuple[str, list[Any]] | None:
        kind = _RESERVED.get(field) or kinds.get(field, "none")
        column = "NULL" if kind == "none" else _column(field)
        return comparison(kind, column, relation, value, self._kinds[record_type].get(field) == "any")

    def _passes(self, layout: int, tests: Iterable[Test]) -> tuple[list[str], list[Any]]:
        """Conditions that all hold for a record of a layout if it passes the tests, and what they bind."""
        conditions, bound = list[str](), list[Any]()
        for field, relation, value in tests:
            if relation == "or":
                sides = [self._passes(layout, side) for side in value]
                sql, values = " OR ".join(f"({' AND '.join(side)})" for side, _ in sides), [*chain.from_iterable(
                    bound for _, bound in sides)]
            else:
                sql, values = self._comparison(*self._layouts[layout], field, relation, value) or (
                    str(relation in _NEGATED).upper(), [])
            conditions.append(f"({sql})")
            bound += values
        return conditions, bound

    def _ranges(self, record_type: str) -> tuple[str, list[Any]]:
        """FROM and WHERE of the ranges of ids that may hold selected records."""
        conditions, bound = ["record_type = ?"], [record_type]
        if self._wanted.filters.job_id is not None:
            conditions.append("job = ?")
            bound.append(self._wanted.filters.job_id)
        for relation, date_ in self._created:
            if sql := comparison("datetime", "created_at", relation, date_):
                conditions.append(sql[0])
                bound += sql[1]
        return f"_readable_ranges WHERE {' AND '.join(conditions)}", bound

    def count(self) -> int:
        """How many records the filters choose, from wherever on and up to where they are read."""
        if self._tests:
            return sum(self._connection.execute(f"SELECT count(*) FROM {source}", bound).fetchone()[0]
                       for _, source, bound in self._sources(0))
        return sum(self._connection.execute(f"SELECT coalesce(sum(rows), 0) FROM {ranges}", bound).fetchone()[0]
                   for ranges, bound in map(self._ranges, self._types))

    def _runs(self, after: int) -> Iterator[tuple[int, int, int]]:
        """(layout, first, last) of the records that may be selected, from the `_id` beyond `after` on, type by type.

        Neighbouring ranges of one layout are read as one. Tests on `_id` narrow them, since of several bounds SQLite
        looks for one and reads on from there.
        """
        until = _NO_LIMIT
        for field, relation, value in self._tests:
            if field == "_id" and (number := _number(value)) is not None:
                number = min(max(number, 0), _NO_LIMIT)
                after = max(after, math.ceil(number) - 1) if relation in ("eq", "gt", "gte") else after
                until = min(until, math.floor(number)) if relation in ("eq", "lt", "lte") else until
        for name in self._types:
            ranges, bound = self._ranges(name)
            layout, first, last, end = 0, 0, 0, 0
            for start, size, rows, of in self._connection.execute(
                    f"SELECT first, size, rows, layout FROM {ranges} AND rows > 0 AND first + rows - 1 > ? "
                    "AND first <= ? ORDER BY first", [*bound, after, until]):
                if of != layout or start != end or start - first >= _RUN_IDS:
                    if layout:
                        yield layout, first, last
                    layout, first = of, max(start, after + 1)
                last, end = min(start + rows - 1, until), start + size  # what is reserved beyond `rows` holds nothing
            if layout:
                yield layout, first, last

    def _sources(self, after: int) -> Iterator[tuple[int, str, list[Any]]]:
        """Layout, FROM and WHERE of the selected records of each run, as r, and what is bound: two ids first."""
        for layout, first, last in self._runs(after):
            conditions, bound = self._passes(layout, self._tests)
            where = " AND ".join(["r._id BETWEEN ? AND ?", *conditions])
            yield layout, f"main.{_quote(self._layouts[layout][0])} AS r WHERE {where}", [first, last, *bound]

    def _keys(self, layout: int) -> list[str]:
        """What ORDER BY looks at; a + keeps SQLite from reading what it is compared with as the column's type."""
        kinds = [(field, KIND_SQL[_RESERVED.get(field) or self._layouts[layout][1].get(field, "none")])
                 for field, _ in self._order]
        return [f"+({(kind.order or kind.key).format(c=_column(field))})" for field, kind in kinds]

    def _anchor(self) -> list[Any]:
        """The keys of the record that the first one comes after; BadRequest if it is gone."""
        after, name = self._wanted.after, self._types[0]
        found = self._connection.execute(
            "SELECT layout FROM _readable_ranges WHERE record_type = ? AND first <= ? AND ? < first + rows",
            [name, after, after]).fetchone()
        if not found or found[0] not in self._layouts:
            raise BadRequest.of("after", "is not the `next` of a page, or the record there has been deleted")
        keys = ", ".join(self._keys(found[0]))
        return list(self._connection.execute(f"SELECT {keys} FROM main.{_quote(name)} AS r WHERE _id = ?",
                                             [after]).fetchone())

    def _beyond(self, layout: int, anchor: Sequence[Any]) -> tuple[str, list[Any]]:
        """Whether a record comes after one with these keys: of equal keys the ids decide, and null is the least."""
        same, values, terms, bound = list[str](), list[Any](), list[str](), list[Any]()
        for key, value, (_, descending) in zip(self._keys(layout), anchor, self._order, strict=True):
            if value is None:
                farther = "FALSE" if descending else f"{key} IS NOT NULL"
            else:
                farther = f"coalesce({key} < ?, TRUE)" if descending else f"{key} > ?"
            terms.append(" AND ".join([*same, farther]))
            bound += [*values, *([] if value is None else [value])]
            same.append(f"{key} IS ?")
            values.append(value)
        terms.append(" AND ".join([*same, "r._id > ?"]))
        return f"({' OR '.join(terms)})", [*bound, *values, self._wanted.after]

    def _select(self) -> int:
        """Notes the selected records in a temporary table that counts them in order from 1; returns how many.

        It is SQLite that sorts, outside of memory if need be, and without asking Python for its lock. For a few of many
        it keeps no more than these. No record type can have the tables' names.
        """
        names = [f"k{number}" for number in range(len(self._order))]
        order = ", ".join(f"{name}{' DESC' * descending}" for name, (_, descending) in zip(
            names, self._order, strict=True))
        self._connection.execute(f'CREATE TEMP TABLE "-found"({", ".join(names)}, layout, id)')
        anchor = self._anchor() if self._wanted.after else None
        most = self._limit + 1  # one more tells whether there are more
        for layout, source, bound in self._sources(0):
            keys = ", ".join(f"{key} AS {name}" for key, name in zip(self._keys(layout), names, strict=True))
            if anchor is not None:
                beyond, values = self._beyond(layout, anchor)
                source, bound = f"{source} AND {beyond}", [*bound, *values]
            few = f"{order}, r._id LIMIT {most}" if most <= _BLOCK_RECORDS else "r._id"
            self._connection.execute(f'INSERT INTO temp."-found" SELECT {keys}, {layout}, r._id FROM {source} '
                                     f"ORDER BY {few}", bound)
        self._connection.execute('CREATE TEMP TABLE "-selected"(n INTEGER PRIMARY KEY, layout INTEGER, id INTEGER)')
        found = self._connection.execute(
            f'INSERT INTO temp."-selected"(layout, id) SELECT layout, id FROM temp."-found" '
            f"ORDER BY {order}, rowid LIMIT ?", (most,)).rowcount
        return min(found, self._limit)

    @property
    def _limit(self) -> int:
        return _NO_LIMIT if self._wanted.limit is None else self._wanted.limit

    def _in_order(self, columns: Callable[[int], str], record_type: str, first: int, last: int,
                  _: int) -> tuple[str, list[Any]]:
        """The noted records of a type, or of all, by their numbers."""
        numbers = "n BETWEEN ? AND ?"
        layouts = [layout for layout, in self._connection.execute(
            f'SELECT DISTINCT layout FROM temp."-selected" WHERE {numbers}', (first, last))
            if record_type in ("", self._layouts[layout][0])]
        selects = [f'SELECT {columns(layout)}, s.n AS n FROM temp."-selected" AS s CROSS JOIN '
                   f"main.{_quote(self._layouts[layout][0])} AS r ON r._id = s.id WHERE s.{numbers} "
                   f"AND s.layout = {layout}" for layout in layouts]
        return f"{' UNION ALL '.join(selects)} ORDER BY n", [first, last] * len(layouts)

    def _spans(self, columns: Callable[[int], str], record_type: str) -> Iterator[tuple[int, int, _Select]]:
        """What is to be read of a type, or of all if it is "": the first and the last number, and the SQL for those of
        any part of them. In order these are places, of all types; else `_id`s of one layout."""
        if self._order:
            yield 1, self.total or 0, partial(self._in_order, columns, record_type)
            return
        for layout, source, (start, end, *bound) in self._sources(self._wanted.after):
            if record_type not in ("", self._layouts[layout][0]):
                continue

            def select(first: int, last: int, most: int, layout: int = layout, source: str = source,
                       bound: Sequence[Any] = bound) -> tuple[str, list[Any]]:
                rows = f"SELECT {columns(layout)}, r._id AS n FROM {source} ORDER BY r._id LIMIT ?"
                return rows, [first, last, *bound, most]

            yield start, end, select

    def _most(self, wanted: int) -> int:
        """So many at a time, or fewer where each may need a SELECT of its own."""
        return _MOST_SELECTS if self._order and len(self._layouts) >= _MOST_SELECTS else wanted

    def _pieces(self, columns: Callable[[int], str], record_type: str, step: int) -> Iterator[tuple[str, list[Any]]]:
        """SQL for the selected records of a type, and what it binds, so many records at a time."""
        for start, last, select in self._spans(columns, record_type):
            for first in range(start, last + 1, self._most(step)):
                rows, bound = select(first, min(last, first + self._most(step) - 1), self._limit - self.done)
                if bound:
                    yield rows, bound

    def count_of(self, table: Table) -> int:
        """How many records a table has."""
        found = sum(self._connection.execute(f"SELECT count(*) FROM ({rows})", bound).fetchone()[0]
                    for rows, bound in self._pieces(lambda layout: "NULL", table.name, _NO_LIMIT))
        return int(min(found, self._limit))

    def digits(self, table: Table, field: str) -> tuple[int, int] | None:
        """How many digits the decimals of a field have before and behind the point at most; None if one has an e."""
        def sizes(layout: int) -> str:
            c = _value_sql(_column(field), self._layouts[layout][1].get(field, "none"), False)
            point = f"iif(instr({c}, '.'), instr({c}, '.'), length({c}) + 1)"
            return f"{point} - 1 - ({c} LIKE '-%') + 1000 * ({c} GLOB '*[eE]*') AS a, length({c}) - {point} AS b"

        whole, places = 0, 0
        for rows, bound in self._pieces(sizes, table.name, _NO_LIMIT):
            found = self._connection.execute(f"SELECT max(a), max(b) FROM ({rows})", bound).fetchone()
            whole, places = max(whole, found[0] or 0), max(places, found[1] or 0)
        return (whole, places) if whole < 1000 else None

    def jobs(self) -> bytes:
        """Tells whether the same jobs' records can be read as before: what is completed does not change."""
        jobs = self._connection.execute("SELECT group_concat(job) FROM _readable_ranges WHERE record_type = ?",
                                        self._types).fetchone()[0]
        return hashlib.sha256(str(jobs).encode()).digest()


class Query(Selection):
    """The text of the records, made inside SQLite."""

    _halves = False  # whether floats are asked for that SQLite would not print exactly, since there are some

    @contextmanager
    def blocks(self, text: RecordText, table: str = "") -> Iterator[Iterator[bytes]]:
        """The texts that `text_blocks` gives, of which SQLite makes the next meanwhile."""
        def counted(block: bytes, count: int, _: int) -> bytes:
            self.done += count
            return block

        with closing(_ahead(self._joined(text, table))) as blocks:
            yield itertools.starmap(counted, itertools.starmap(partial(self._mended, text), blocks))

    def text_blocks(self, text: RecordText, table: str = "") -> Iterator[tuple[bytes, int, int]]:
        """Texts of many records, how many each is of, and the number of the last one."""
        return itertools.starmap(partial(self._mended, text), self._joined(text, table))

    def _joined(self, text: RecordText, table: str) -> Iterator[tuple[bytes, bytes, int, int]]:
        """What `_mended` makes texts of, how many records each is of, and the number of the last one.

        Each is of about _BLOCK_BYTES, and _BLOCK_LIMIT at most if it is of several records. SQLite joins them, so that
        Python, and its lock, are asked for once a block.
        """
        line = lru_cache(maxsize=None)(partial(self._line, text))
        step, longest = 100, self._most(_BLOCK_RECORDS)
        for first, last, select in self._spans(lambda layout: line(layout, self._halves), table):
            while first <= last and self._left:
                end = min(last, first + step - 1)
                looked_at = end - first + 1  # however many of them fit the filters
                rows, bound = select(first, end, self._left)
                if not bound:  # in order, none of this type is among these
                    first = end + 1
                    continue
                try:
                    block, halves, count, reached = self._fetch(text, rows, bound,
                                                                _BLOCK_LIMIT if looked_at > 1 else _LONGEST)
                except sqlite3.DataError:  # their text would be too long
                    if looked_at == 1:
                        raise
                    step = looked_at // 2
                    continue
                if b"\xfe" in block and not self._halves:
                    self._halves = True
                    continue
                step = max(1, min(longest, 8 * looked_at, looked_at * _BLOCK_BYTES // (len(block) + 1)))
                first, self._left = end + 1, self._left - count
                if count:
                    yield block, halves, count, reached

    def _line(self, text: RecordText, layout: int, halves: bool) -> str:
        (name, kinds), delimiter = self._layouts[layout], text.delimiter
        label = (self._label, name) if self._several else None
        kinds, known = {**_RESERVED, **kinds}, {**_RESERVED, **self._kinds[name]}
        columns = next(table.columns for table in self.tables if table.name in ("", name))
        shown = [(field, kinds.get(field, "none")) for field in (columns if self._wanted.split else self.fields)
                 if delimiter or field in known]
        cells = [(columns[field], _value_sql(_column(field), kind, columns[field] == "json")) if text.forms else
                 (kind, _column(field)) for field, kind in shown]
        line = (_cells_sql(cells, label, text, self._wanted.excel_safe, halves) if delimiter else
                _object_sql(shown, label, self._wanted.omit_null, halves))
        return f"{line} AS line, {_halves_sql(cells, text) if halves else 'NULL'} AS halves"

    def _fetch(self, text: RecordText, rows: str, bound: Sequence[Any], most: int) -> tuple[bytes, bytes, int, int]:
        """Of all rows of a query for (line, halves, n) what is in these, how many there are, and the last n.

        sqlite3.DataError if it exceeds `most` bytes.
        """
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, most)
        try:
            joined, halves, count, last = self._connection.execute(
                f"SELECT CAST(group_concat(line, {_literal(text.between)}) AS BLOB), CAST(group_concat(halves) AS "
                f"BLOB), count(*), max(n) FROM ({rows})", bound).fetchone()
        finally:
            self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
        return joined or b"", halves or b"", count, last or 0

    def _mended(self, text: RecordText, block: bytes, halves: bytes, count: int, last: int) -> tuple[bytes, int, int]:
        """What SQLite made, with what its marks stand for."""
        if b"\xfe" in block:
            numbers, omitted = from_json(b"[%b]" % halves.replace(b"],[", b",")[1:-1]), self._wanted.omit_null
            floats = [whole * 2.0**-10 + rest * 2.0**-72 if type(whole) is int else whole
                      for whole, rest in zip(numbers[0::2], numbers[1::2], strict=True)
                      if whole is not None or not omitted]
            null = text.null.encode().replace(b'"', b"\xfc") if text.delimiter else b"null"
            cells = to_json(floats)[1:-1].replace(b'"', b"").replace(b"null", null).split(b",")
            parts = [b""] * (2 * len(floats) + 1)
            parts[0::2], parts[1::2] = block.split(b"\xfe" if text.delimiter else b'"\xfe"'), cells
            block = b"".join(parts)
        if b"\xff" in block:
            parts = (b".%b." % block).split(b"\xff")
            block = (b"" if text.delimiter else b",").join([part[1:-1] for part in parts])
        quoted = block.replace(b'"', b'""').replace(b"\xfc", b'"') if b"\xfc" in block else block
        return quoted, count, last

    def page(self) -> tuple[bytes, int, int | None]:
        """Records of one type as JSON objects with commas between, how many, and the last's `_id` if there are more.

        It ends early before it exceeds _BLOCK_LIMIT. The next page begins after that record, wherever it is by then, so
        that of equal records each is on one page, whatever has been added; to find its place SQLite reads the keys of
        all, but sorts those of a page alone.
        """
        texts, room, reached, found, full = list[bytes](), _BLOCK_LIMIT, self._wanted.after, 0, False
        for block, count, last in self.text_blocks(RecordText(", ")):
            if full := bool(texts) and len(block) > room:
                break
            texts.append(block)
            room, reached, found = room - len(block), last, found + count
        more = (full or found == self._limit) and self._is_more(reached)
        if more and self._order:
            reached, = self._connection.execute('SELECT id FROM temp."-selected" WHERE n = ?', (reached,)).fetchone()
        return b", ".join(texts), found, reached if more else None

    def _is_more(self, reached: int) -> bool:
        """Whether there is a selected record beyond that of a number."""
        if self._order:
            return bool(self._connection.execute('SELECT 1 FROM temp."-selected" WHERE n > ?', (reached,)).fetchone())
        return any(self._connection.execute(f"SELECT 1 FROM {source} LIMIT 1", bound).fetchone()
                   for _, source, bound in self._sources(reached))


class DatabaseCopy(Selection):
    """The records in a database of their own."""

    def run(self) -> Iterator[Progress]:
        """Fills the attached database `copy`, one table a type; rows come in order, so that pages are full."""
        tables = {name: fields for name, kinds in self._kinds.items()  # a table has one column at least
                  if (fields := [field for field in self.fields if field in kinds])}
        refs, keys, left = self._refs(tables), set[tuple[str, str]](), [*tables]
        while left:  # parents first; but a limit means the first records in the order of the types
            name = left[0] if self._wanted.limit is not None else next(
                (name for name in left if {parent for parent, _ in refs[name].values()}.isdisjoint(left)), left[0])
            left.remove(name)
            clauses = yield from self._filled(name, self._clauses(name, tables[name], refs, keys))
            keys |= {(name, field) for field, own in clauses.items() if not {*own}.isdisjoint(_KEYS)}
            for field in (field for field, own in clauses.items() if own and own[-1].startswith("REFERENCES")):
                self._connection.execute(f"CREATE INDEX copy.{_quote(f'_{name}.{field}')} ON "  # no record type's name
                                         f"{_quote(name)}({_quote(field)})")

    def _filled(self, name: str, clauses: dict[str, list[str]]) -> Generator[Progress, None, dict[str, list[str]]]:
        """Fills a copy's table; returns the clauses that it has, of keys those alone of which no values are equal."""
        before, table = self.done, f"copy.{_quote(name)}"
        self._connection.execute(f"CREATE TABLE {table}{self._declared(name, clauses)}")
        values = partial(self._values, clauses, {field for field, own in clauses.items() if "NUMERIC" in own})
        # What FAIL ends leaves nothing to be undone, which a file without a journal could not do.
        into = f"INSERT OR FAIL INTO {table} SELECT {', '.join(f'c{n}' for n in range(len(clauses)))} FROM "
        try:
            for rows, bound in self._pieces(values, name, _COPY_STEP):
                self.done += self._connection.execute(f"{into}({rows})", bound).rowcount
                yield self.progress
        except sqlite3.IntegrityError as error:
            fewer = {field: [clause for clause in own if clause not in _KEYS or not str(error).endswith(f".{field}")]
                     for field, own in clauses.items()}
            if fewer == clauses:
                raise
            self.done = before
            self._connection.execute(f"DROP TABLE {table}")
            return (yield from self._filled(name, fewer))
        return clauses

    def _refs(self, tables: Mapping[str, Collection[str]]) -> dict[str, dict[str, tuple[str, str]]]:
        """By record type, which field refers to which of another type."""
        refs: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in tables}
        for layout, text in self._connection.execute("SELECT id, refs FROM _layouts WHERE refs <> '{}'"):
            name = self._layouts[layout][0] if layout in self._layouts else ""
            for field, (parent, _, key) in ((field, to.partition(".")) for field, to in json.loads(text).items()):
                if field in tables.get(name, ()) and key in tables.get(parent, ()):
                    refs[name][field] = (parent, key)
        return refs

    def _values(self, fields: Iterable[str], raw: Collection[str], layout: int) -> str:
        """The fields, but those named "", as c0, c1...: as they were written, or those in `raw` as they are stored."""
        kinds = self._layouts[layout][1]
        return ", ".join(("{c}" if field in raw and field in kinds else KIND_SQL[kinds.get(field, "none")].stored)
                         .format(c=_column(field)) + f" AS c{number}" for number, field in enumerate(fields) if field)

    def _type(self, record_type: str, field: str) -> str:
        kinds = {_plain(kinds.get(field, "none")) for kinds in self._of_type[record_type]} - {"none"}
        types = {KIND_SQL[kind].column for kind in kinds}
        return types.pop() if len(types) == 1 else "ANY"

    def _clauses(self, record_type: str, fields: Sequence[str], refs: Mapping[str, Mapping[str, tuple[str, str]]],
                 keys: Collection[tuple[str, str]]) -> dict[str, list[str]]:
        """How a copy's columns may be declared: the clauses that all of the selected values stand, by field."""
        tests, targets = dict[tuple[str, str], str](), {key for of in refs.values() for key in of.values()}
        for number, field in enumerate(fields):
            if self._kinds[record_type][field] == "decimal":
                tests[field, "NUMERIC"] = f"NOT max({_INEXACT.format(c=f'c{number}')})"
            elif field == "id" or (record_type, field) in targets:
                tests[field, _KEYS[field != "id"]] = f"count(*) = count(c{number})"  # if they differ, filling tells
            if (parent := refs[record_type].get(field, ("", ""))) in keys:
                table, key = map(_quote, parent)
                tests[field, f"REFERENCES {table}({key})"] = f"min(c{number} IN (SELECT {key} FROM copy.{table}))"
        tested = [field if any(field == other for other, _ in tests) else "" for field in fields]
        for rows, bound in self._pieces(partial(self._values, tested, tested), record_type, _NO_LIMIT):
            if not tests:
                break
            found = self._connection.execute(f"SELECT {', '.join(tests.values())} FROM ({rows})", bound).fetchone()
            tests = {clause: test for (clause, test), holds in zip(tests.items(), found, strict=True) if holds != 0}
        return {field: [clause for other, clause in tests if other == field] for field in fields}

    def _declared(self, record_type: str, clauses: Mapping[str, Sequence[str]]) -> str:
        """The columns of a copy. A strict table cannot have NUMERIC ones; in others ANY would mean NUMERIC."""
        strict, columns = not any("NUMERIC" in own for own in clauses.values()), []
        for field, own in clauses.items():
            declared = own if "NUMERIC" in own else [self._type(record_type, field), *own]
            columns.append(" ".join([_quote(field), *(each for each in declared if strict or each != "ANY")]))
        return f"({', '.join(columns)}){' STRICT' if strict else ''}"


class Dialect(NamedTuple):
    """How SQL is written for a program.

    Names have a quote around them, and at most so many of a unit; of a column's kind follow its type and how its
    values are written; a decimal has at most so many digits, and of these behind the point, where the type names them.
    """

    quote: str
    name_limit: tuple[int, str]
    types: Mapping[Kind, str]
    forms: Mapping[Kind, str]
    begin: str
    loading: str  # behind the tables
    end: str
    digits: tuple[int, int] = (0, 0)

    def name(self, name: str) -> str:
        """A name in quotes; JobFailed if it is too long."""
        most, unit = self.name_limit
        if len(name.encode() if unit == "bytes" else name) > most:
            raise JobFailed(f"the name {name!r} is longer than the {most} {unit} that this dialect allows; fields can "
                            "leave it out")
        return self.quote + name.replace(self.quote, self.quote * 2) + self.quote

    def create(self, query: Query, table: Table) -> str:
        """The statement that makes the table."""
        columns = []
        for field, kind in table.columns.items():
            declared = self.types[kind]
            if "{" in declared:
                whole, places = query.digits(table, field) or (self.digits[0], 1)
                fits = whole + places <= self.digits[0] and places <= self.digits[1]
                declared = declared.format(max(1, whole + places), places) if fits else self.types["text"]
            columns.append(f"  {self.name(field)} {declared}")
        lines = ",\n".join(columns)
        return f"CREATE TABLE {self.name(table.name)} (\n{lines}\n);\n"

    def insert(self, table: Table) -> str:
        """What stands before the records of a statement."""
        return f"INSERT INTO {self.name(table.name)} ({', '.join(map(self.name, table.columns))}) VALUES\n("


def _types(sql: str, text: str) -> dict[Kind, str]:
    kinds: tuple[Kind, ...] = ("int", "float", "decimal", "bool", "date", "datetime", "json", "text", "none")
    return dict(zip(kinds, [*sql.split("|"), text, text], strict=True))


_QUOTED, _UTC = "printf('%Q', {c})", f"coalesce({_MOMENT}, {{c}})"
_LITERALS: dict[Kind, str] = {"none": "NULL", "int": "{c}", "float": _FLOAT_CELL, "decimal": "{c}", "date": _QUOTED,
                              "bool": "CASE {c} WHEN 1 THEN 'TRUE' WHEN 0 THEN 'FALSE' END"}
# Shells drop a carriage return before a line feed: SQLite's reads those texts from hexadecimal digits.
_TEXT_HEX = f"iif(instr({{c}}, char(13)), 'CAST(x''' || hex({{c}}) || ''' AS TEXT)', {_QUOTED})"
_TEXT_E = (r"iif(instr({c}, char(13)), 'E' || printf('%Q', replace(replace({c}, '\', '\\'), char(13), '\r')), "
           f"{_QUOTED})")
_TEXT_ESCAPED = r"printf('%Q', replace(replace(replace({c}, '\', '\\'), char(13), '\r'), char(10), '\n'))"
DIALECTS: Mapping[str, Dialect] = {
    "sqlite": Dialect(
        '"', (10**6, "bytes"), _types("INTEGER|REAL|NUMERIC|BOOLEAN|TEXT|TEXT|TEXT", "TEXT"),
        {**_LITERALS, "bool": "{c}", "datetime": _QUOTED, "json": _TEXT_HEX, "text": _TEXT_HEX},
        "BEGIN TRANSACTION;\n", "", "COMMIT;\n"),
    "postgres": Dialect(
        '"', (63, "bytes"), _types("BIGINT|DOUBLE PRECISION|NUMERIC|BOOLEAN|DATE|TIMESTAMPTZ|JSONB", "TEXT"),
        {**_LITERALS, "json": _TEXT_E, "text": _TEXT_E,
         "float": _float_sql("'''{}Infinity'''"),
         "datetime": f"printf('%Q', {_UTC} || '+00')"},
        "BEGIN;\nSET LOCAL client_encoding = 'UTF8';\nSET LOCAL standard_conforming_strings = on;\n", "", "COMMIT;\n"),
    "mysql": Dialect(
        "`", (64, "characters"),
        _types("BIGINT|DOUBLE|DECIMAL({}, {})|BOOLEAN|DATE|DATETIME(6)|JSON", "LONGTEXT"),
        {**_LITERALS, "datetime": f"printf('%Q', {_UTC})",
         "float": _float_sql("NULL"),  # it has no infinity
         "decimal": _QUOTED, "json": _TEXT_ESCAPED, "text": _TEXT_ESCAPED},
        "SET NAMES utf8mb4;\nSET @sql_mode_before = @@sql_mode, sql_mode = 'STRICT_ALL_TABLES';\n",
        "START TRANSACTION;\n", "COMMIT;\nSET sql_mode = @sql_mode_before;\n", (65, 30)),
}


class RecordStore:
    """The record tables: one typed table a record type, with `_id`, `_job`, `_created` and the fields.

    Each job's records of a type are in a range of `_id` of their own (`_id_ranges`), which names the layout: the
    fields and kinds that the job wrote. A range may belong to a job that still runs, or to none that there is; readers
    of records see what `_readable_ranges` shows, which is completed jobs' only.
    """

    def __init__(self, database: Database):
        self._database = database
        self._totals: dict[tuple[str, bytes], int] = {}

    # Writing

    def open_job(self, job: Job, columns: Mapping[str, Mapping[str, Kind]], sizes: Mapping[str, int],
                 refs: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """Before a job's first chunk: makes or widens its tables, and reserves `sizes[type]` ids of each type.

        `refs` are fields that refer to others, {"order": {"customerId": "customer.id"}}. Anything that an earlier
        attempt without a checkpoint left is deleted first. Raises JobFailed for a field that the table cannot have.
        """
        def work(connection: sqlite3.Connection) -> bool:
            if connection.execute("SELECT 1 FROM _id_ranges WHERE job = ?", (job.job_id,)).fetchone():
                return False
            for record_type, kinds in columns.items():
                layout = self._layout(connection, record_type, kinds, json.dumps((refs or {}).get(record_type, {})))
                size = sizes[record_type]
                first = connection.execute("UPDATE _types SET next_id = next_id + ? WHERE record_type = ? "
                                           "RETURNING next_id - ?", (size, record_type, size)).fetchall()[0][0]
                connection.execute("INSERT INTO _id_ranges(record_type, first, size, rows, job, layout) "
                                   "VALUES (?, ?, ?, 0, ?, ?)", (record_type, first, size, job.job_id, layout))
            return True

        while not self._database.write(work):
            self.discard(job.job_id)

    def _layout(self, connection: sqlite3.Connection, record_type: str, kinds: Mapping[str, Kind], refs: str) -> int:
        """The number of a layout; a new one may change the table."""
        layout = (record_type, json.dumps(kinds, ensure_ascii=False), refs)
        known = connection.execute("SELECT id FROM _layouts WHERE (record_type, kinds, refs) = (?, ?, ?)", layout)
        if row := known.fetchone():
            return int(row[0])
        if not _layouts(connection, record_type):  # whatever an earlier job left is empty
            connection.execute(f"DROP TABLE IF EXISTS main.{_quote(record_type)}")
        self._declare(connection, record_type, kinds)
        return int(connection.execute("INSERT INTO _layouts(record_type, kinds, refs) VALUES (?, ?, ?) RETURNING id",
                                      layout).fetchall()[0][0])

    def _forget_layout(self, connection: sqlite3.Connection, layout: int) -> None:
        """Deletes a layout that no range has any more."""
        connection.execute("DELETE FROM _layouts WHERE id = ? AND NOT EXISTS "
                           "(SELECT 1 FROM _id_ranges WHERE layout = ?)", (layout, layout))

    def _declare(self, connection: sqlite3.Connection, record_type: str, kinds: Mapping[str, Kind]) -> None:
        """Makes the table, or has it take the fields too: a column of several types is declared ANY."""
        found = connection.execute("SELECT name, type FROM pragma_table_info(?, 'main')", (record_type,)).fetchall()
        columns = dict(found) or {"_id": "INTEGER", "_job": "TEXT", "_created": "TEXT"}
        spelled = {name.lower(): name for name in columns}
        for field, kind in kinds.items():
            if (same := spelled.setdefault(field.lower(), field)) != field:
                raise JobFailed(f"field {field!r} differs only by case from {same!r} of record type {record_type!r}")
            wanted = KIND_SQL[kind].column
            if columns.setdefault(field, wanted) != wanted and kind != "none":
                columns[field] = "ANY"
        if len(columns) > _MOST_COLUMNS:
            raise JobFailed(f"record type {record_type!r} would have more than {_MOST_COLUMNS - 3} fields")
        declared = ", ".join(f"{_quote(name)} {declared}" for name, declared in columns.items())
        table = f"CREATE TABLE {_quote(record_type)}({declared.replace(' INTEGER', ' INTEGER PRIMARY KEY', 1)}) STRICT"
        if not found:
            connection.execute(table)
            connection.execute("INSERT OR IGNORE INTO _types(record_type, next_id) VALUES (?, 1)", (record_type,))
        elif dict(found) != columns:
            self._redeclare(connection, record_type, table)

    def _redeclare(self, connection: sqlite3.Connection, record_type: str, table: str) -> None:
        """Changes what a table is declared as, in an instant, however many rows and columns there are.

        Rows that lack columns at the end have nulls there, and a column that becomes ANY keeps its values, so that no
        row needs to change (sqlite.org/lang_altertable.html, section 7, which allows just that). But whole numbers
        that a REAL column held are integers then, which is why floats are read by `stored`.
        """
        version = connection.execute("PRAGMA main.schema_version").fetchone()[0]
        connection.execute("PRAGMA writable_schema = ON")
        try:
            connection.execute("UPDATE main.sqlite_master SET sql = ? WHERE type = 'table' AND name = ?",
                               (table, record_type))
            connection.execute(f"PRAGMA main.schema_version = {version + 1}")
        except sqlite3.OperationalError:  # some builds, Apple's for one, guard their schema: then the rows are copied
            name, rows = _quote(record_type), connection.execute(f"SELECT * FROM main.{_quote(record_type)} LIMIT 0")
            columns = ", ".join(_quote(column[0]) for column in rows.description)
            connection.execute(f'ALTER TABLE main.{name} RENAME TO "-old"')
            connection.execute(table)
            connection.execute(f'INSERT INTO main.{name}({columns}) SELECT {columns} FROM main."-old"')
            connection.execute('DROP TABLE main."-old"')
        finally:
            connection.execute("PRAGMA writable_schema = OFF")

    def append(self, connection: sqlite3.Connection, job: Job, record_type: str, fields: Sequence[str],
               rows: Sequence[tuple[Json, ...]]) -> None:
        """Within a chunk's transaction: adds rows (values in the order of `fields`) to the job's range."""
        first, used, size, layout, text, refs = connection.execute(
            "SELECT first, rows, size, layout, kinds, refs FROM _id_ranges JOIN _layouts ON _layouts.id = layout "
            "WHERE job = ? AND _id_ranges.record_type = ?", (job.job_id, record_type)).fetchone()
        assert used + len(rows) <= size, "a job made more rows than it reserved ids for"
        kinds = json.loads(text)
        if not used and (decimals := [place for place, field in enumerate(fields) if kinds[field] == "decimal"]):
            # How they are written shows in the first rows; the layout then says so.
            kinds |= {fields[place]: _decimal_form(row[place] for row in rows if row[place]) for place in decimals}
            connection.execute("UPDATE _id_ranges SET layout = ? WHERE record_type = ? AND first = ?",
                               (self._layout(connection, record_type, kinds, refs), record_type, first))
            self._forget_layout(connection, layout)
        names = ", ".join(map(_quote, (*RESERVED_COLUMNS, *fields)))
        given = ", ".join(f"? AS c{number}" for number in range(3 + len(fields)))
        values = ", ".join(["c0", "c1", "c2", *(_mark(kinds[field], f"c{number}")
                                                for number, field in enumerate(fields, 3))])
        owner = (job.job_id, job.created_at)
        connection.executemany(f"INSERT INTO main.{_quote(record_type)}({names}) SELECT {values} FROM (SELECT {given})",
                               [(number, *owner, *row) for number, row in enumerate(rows, first + used)])
        connection.execute("UPDATE _id_ranges SET rows = rows + ? WHERE record_type = ? AND first = ?",
                           (len(rows), record_type, first))

    # Deleting

    def discard(self, job_id: str, *, orphaned: bool = False) -> None:
        """Deletes a job's records in short steps, from the end, so that it can stop anywhere and go on later.

        With `orphaned` it stops at once when the job, retried meanwhile, wants its records again.
        """
        rows, begun = _DELETE_STEP, monotonic()
        while self._database.write(partial(self._discard_step, job_id=job_id, orphaned=orphaned, most=rows)):
            took, begun = monotonic() - begun, monotonic()
            rows = max(10, min(_DELETE_STEP, int(rows * _DELETE_SECONDS / took)))

    def _discard_step(self, connection: sqlite3.Connection, job_id: str, orphaned: bool, most: int) -> bool:
        if orphaned and connection.execute(
                "SELECT 1 FROM jobs WHERE id = ? AND status NOT IN ('failed', 'canceled')", (job_id,)).fetchone():
            return False
        # Without a checkpoint a later run begins anew; it must not go on from rows that are going.
        connection.execute("UPDATE _progress SET checkpoint = NULL, done = 0, done_before = 0 WHERE job = ?", (job_id,))
        found = connection.execute("SELECT record_type, first, rows, layout FROM _id_ranges WHERE job = ? LIMIT 1",
                                   (job_id,)).fetchone()
        if not found:
            return False
        record_type, first, rows, layout = found
        kept = max(0, rows - most)
        connection.execute(f"DELETE FROM main.{_quote(record_type)} WHERE _id >= ? AND _id < ?",
                           (first + kept, first + rows))
        if kept:
            connection.execute("UPDATE _id_ranges SET rows = ? WHERE record_type = ? AND first = ?",
                               (kept, record_type, first))
        else:
            connection.execute("DELETE FROM _id_ranges WHERE record_type = ? AND first = ?", (record_type, first))
            # What no range needs any more goes too: fields and kinds, and after the last job the type and its table.
            self._forget_layout(connection, layout)
            if not connection.execute("SELECT 1 FROM _id_ranges WHERE record_type = ? UNION ALL "
                                      "SELECT 1 FROM jobs WHERE id = ?", (record_type, job_id)).fetchone():
                connection.execute(f"DROP TABLE main.{_quote(record_type)}")
                connection.execute("DELETE FROM _types WHERE record_type = ?", (record_type,))
        return True

    def delete_type(self, record_type: str) -> None:
        """Deletes all records of a type, in short steps; the jobs that made them stay.

        Raises NotFound if there is no such type, Conflict while a job is to write records of it.
        """
        def work(connection: sqlite3.Connection) -> int:
            _record_types(connection, record_type)
            writing = connection.execute(
                "SELECT jobs.id FROM _id_ranges CROSS JOIN jobs ON jobs.id = job WHERE _id_ranges.record_type = ? "
                "AND status IN ('pending', 'in-progress') LIMIT 1", (record_type,)).fetchone()
            if writing:
                raise Conflict(f"job {writing[0]} is writing records of type {record_type!r}: cancel it first")
            return connection.execute(
                "UPDATE _id_ranges SET job = '' WHERE record_type = :name AND first IN (SELECT first FROM _id_ranges "
                "WHERE record_type = :name AND job <> '' LIMIT :most)",
                {"name": record_type, "most": _RANGES_STEP}).rowcount

        while self._database.write(work, durable=True) == _RANGES_STEP:
            pass
        self.discard("")  # no job has this id, so nobody sees these records

    def orphans(self) -> list[str]:
        """Ids of jobs whose records nobody will want: deleted, failed or canceled jobs that still have some."""
        with self._database.read() as connection:
            return [row[0] for row in connection.execute(
                "SELECT DISTINCT job FROM _id_ranges LEFT JOIN jobs ON jobs.id = job "
                "WHERE status IS NULL OR status IN ('failed', 'canceled')")]

    # Reading a running job's own rows

    def own_counts(self, job: Job) -> Counter[str]:
        """How many rows of each type the job has committed."""
        with self._database.read() as connection:
            rows = connection.execute("SELECT record_type, rows FROM _id_ranges WHERE job = ?", (job.job_id,))
            return Counter(dict(rows.fetchall()))

    def _own(self, connection: sqlite3.Connection, job: Job, record_type: str,
             fields: Iterable[str]) -> tuple[str, int, int]:
        """A SELECT of the fields as they were written, the first id of the job's rows, and how many there are."""
        first, rows, layout = connection.execute(
            "SELECT first, rows, kinds FROM _id_ranges JOIN _layouts ON _layouts.id = layout "
            "WHERE job = ? AND _id_ranges.record_type = ?", (job.job_id, record_type)).fetchone()
        kinds = json.loads(layout)
        values = ", ".join(KIND_SQL[kinds[field]].stored.format(c=_column(field)) for field in fields)
        return f"SELECT {values} FROM main.{_quote(record_type)} AS r", first, rows

    def own_rows(self, job: Job, record_type: str, fields: Sequence[str],
                 ordinals: Sequence[int]) -> list[tuple[Json, ...]]:
        """The job's committed rows of a type by their 0-based ordinal, in the order asked for."""
        with self._database.read() as connection:
            select, first, _ = self._own(connection, job, record_type, fields)
            return [connection.execute(f"{select} WHERE _id = ?", (first + ordinal,)).fetchone()
                    for ordinal in ordinals]

    def own_column(self, job: Job, record_type: str, field: str) -> Iterator[Json]:
        """All committed values of one field of the job's rows, in order."""
        with self._database.read() as connection:
            select, first, rows = self._own(connection, job, record_type, [field])
            for (value,) in connection.execute(f"{select} WHERE _id >= ? AND _id < ? ORDER BY _id",
                                               (first, first + rows)):
                yield value

    # Reading what is completed

    def only_type(self, filters: Filters) -> str | None:
        """The record type that filters choose, if it is one."""
        with self._database.read() as connection:
            return only_type(connection, filters)

    def types(self) -> list[RecordTypeInfo]:
        """Every record type with its fields and the number of its records."""
        with self._database.read() as connection:
            counts = dict(connection.execute("SELECT record_type, sum(rows) FROM _readable_ranges "
                                             "GROUP BY record_type").fetchall())
            return [RecordTypeInfo(record_type=name, count=counts.get(name, 0),
                                   fields=joined_kinds(_layouts(connection, name).values()))
                    for name in _record_types(connection)]

    @contextmanager
    def query(self, wanted: Selected) -> Iterator[Query]:
        """The selected records of one snapshot; raises what `Selection` does."""
        with self._database.read() as connection:
            connection.set_progress_handler(wanted.interrupted, _STEPS_BETWEEN)
            yield Query(connection, wanted)

    def copy_to(self, path: Path, wanted: Selected) -> Iterator[Progress]:
        """Fills a new database at `path` with the selected records, one STRICT table a type, from one snapshot.

        Yields how far it is; raises what `Selection` does.
        """
        with self._database.copying(path) as connection:
            connection.set_progress_handler(wanted.interrupted, _STEPS_BETWEEN)
            yield from DatabaseCopy(connection, wanted).run()

    def page(self, wanted: Selected) -> tuple[bytes, int | None, int]:
        """`Query.page`, and how many records the filters choose in all."""
        with self.query(wanted) as query:
            items, found, last = query.page()
            if last is None and not wanted.after:
                return items, None, found
            asked = wanted.filters.model_dump_json(), query.jobs()
            if (total := self._totals.get(asked)) is None:  # counting reads them all: once for all pages
                total = query.count()
                self._totals = {**dict([*self._totals.items()][-_KEPT_TOTALS:]), asked: total}
            return items, last, total

    def fields(self, record_type: str) -> dict[str, Kind]:
        """The fields of a record type, and those that every record has; NotFound if there is no such type."""
        with self._database.read() as connection:
            _record_types(connection, record_type)
            return {**joined_kinds(_layouts(connection, record_type).values()), **_RESERVED}

    def at(self, record_type: str, place: int) -> int | None:
        """The `_id` of the record at a place, from 1, in the order in which they lie."""
        with self._database.read() as connection:
            found = connection.execute(
                "SELECT first + :place - 1 - before FROM (SELECT first, rows, sum(rows) OVER (ORDER BY first) - rows "
                "AS before FROM _readable_ranges WHERE record_type = :name) WHERE :place BETWEEN before + 1 AND "
                "before + rows", {"name": record_type, "place": min(place, _NO_LIMIT)}).fetchone()
            return found and int(found[0])


# ---- Databases of others: what their tables are, and writing into them ----

_SQL_TOKEN = re.compile(r"""(--[^\n]*|/\*(?s:.*?)(?:\*/|\Z))|'(?:[^']++|'')*+(?:'|\Z)|"(?:[^"]++|"")*+(?:"|\Z)"""
                        r"""|`[^`]*+`?|\[[^\]]*+\]?|[^\W\d]\w*|-?\d+(?:\.\d+)?|[<>=!]+|\S""")
MAX_TABLES = 50
_MAX_DDL = 2**20  # characters
_CREATES = frozenset({sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_REINDEX,
                      sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_TRANSACTION})


class ForeignKey(NamedTuple):
    """Columns that hold a key of another table, or of their own; its name is in small letters."""

    columns: tuple[str, ...]
    table: str
    to: tuple[str, ...]


class TableColumn(NamedTuple):
    """A column that an INSERT fills; its type is as declared, in capitals, its values those of the first rows."""

    type: str
    required: bool
    default: str | None
    values: list[Any]


class OtherTable(NamedTuple):
    """A table of somebody else's database; each of `checks` is the tokens of a CHECK."""

    name: str
    rows: int
    columns: dict[str, TableColumn]
    key: tuple[str, ...]
    unique: list[tuple[str, ...]]
    foreign: list[ForeignKey]
    checks: list[list[str]]


def _unquoted_name(token: str) -> str:
    return token[1:-1] if token[:1] in '"`[' else token


def _tokens(sql: str) -> list[re.Match[str]]:
    return [found for found in _SQL_TOKEN.finditer(sql) if not found[1]]


def _checks(sql: str) -> Iterator[list[str]]:
    """What stands in each CHECK (...) of a CREATE TABLE."""
    tokens = [found[0] for found in _tokens(sql)]
    for at, token in enumerate(tokens):
        if token.upper() == "CHECK" and tokens[at + 1:at + 2] == ["("]:
            depths = itertools.accumulate({"(": 1, ")": -1}.get(token, 0) for token in tokens[at + 1:])
            end = next((n for n, depth in enumerate(depths, at + 1) if not depth), len(tokens))
            yield tokens[at + 2:end]


def _read_table(connection: sqlite3.Connection, name: str, sql: str, notes: list[str]) -> OtherTable:
    table = _quote(name)
    columns = connection.execute(f"PRAGMA table_xinfo({table})").fetchall()
    notes += [f"{name}.{column[1]} is generated, and left out" for column in columns if column[6]]
    columns = [column for column in columns if not column[6]]
    names = [column[1] for column in columns]
    (rows,), listed = connection.execute(f"SELECT count(*) FROM {table}").fetchone(), ", ".join(map(_quote, names))
    first = connection.execute(f"SELECT {listed} FROM {table} LIMIT 1000").fetchall()
    unique = []
    for _, index, is_unique, _, partial_ in connection.execute(f"PRAGMA index_list({table})").fetchall():
        within = tuple(row[2] for row in connection.execute(f"PRAGMA index_info({_quote(index)})"))
        if is_unique and (partial_ or not {*within} <= {*names}):
            notes.append(f"{name}: the unique index {index} is not understood")
        elif is_unique:
            unique.append(within)
    foreign = []
    for _, group in groupby(connection.execute(f"PRAGMA foreign_key_list({table})").fetchall(), itemgetter(0)):
        keys = sorted(group, key=itemgetter(1))
        foreign.append(ForeignKey(tuple(key[3] for key in keys), keys[0][2].lower(), tuple(key[4] for key in keys)))
    key = tuple(column[1] for column in sorted(columns, key=itemgetter(5)) if column[5])
    kept = {column[1]: TableColumn(
        column[2].upper(), bool(column[3] or column[5]), column[4], [row[at] for row in first])
        for at, column in enumerate(columns)}
    # SQLite lists the last foreign key first
    return OtherTable(name, rows, kept, key, [*([key] if key else []), *unique], foreign[::-1], [*_checks(sql)])


def _create(connection: sqlite3.Connection, script: str) -> list[str]:
    """Creates the tables and indexes that a script creates, and says what of it is left out.

    Nothing else of it is run. ValueError tells what SQLite does not take.
    """
    if len(script) > _MAX_DDL:
        raise ValueError(f"has more than {_MAX_DDL} characters")
    notes, words = list[str](), list[str]()
    others = created = first = 0
    connection.set_authorizer(lambda action, what, *_: sqlite3.SQLITE_OK if action in _CREATES or (
        action in (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE) and what == "sqlite_master") else sqlite3.SQLITE_DENY)
    for token in [*_tokens(script), None]:
        if token and token[0] != ";":
            words.append(token[0])
            continue
        statement, end = " ".join(words[:4]), token.end() if token else len(script)
        if re.match(r"create (unique )?(table|index)\b", statement, re.IGNORECASE):
            created += 1
            if created > 1000:
                raise ValueError("creates more than 1000 tables and indexes")
            try:
                connection.execute(script[first:end])
            except sqlite3.Error as error:
                raise ValueError(f"{statement}...: {error}") from None
        elif found := re.match(r"create .*?(view|trigger|virtual table) (?:if not exists )?(\S+)", " ".join(words[:8]),
                               re.IGNORECASE):
            notes.append(f"the {found[1].lower()} {_unquoted_name(found[2])} is left out")
        elif words:
            others += 1
        first = end
        words.clear()
    connection.set_authorizer(None)
    return [*notes, *([f"{others} statements are no CREATE, and were not run"] if others else [])]


def read_tables(source: Path | str) -> tuple[list[OtherTable], list[str]]:
    """The tables of somebody else's database, or of a script that creates one, and what is left out of that.

    It may have been made to do harm: nothing of it is run, and what takes too many steps is given up. ValueError.
    """
    place = ":memory:" if isinstance(source, str) else f"{source.absolute().as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(place, uri=True, isolation_level=None)
    steps, tables = itertools.count(), list[OtherTable]()
    connection.text_factory = lambda text: text.decode(errors="replace")
    try:
        notes = _create(connection, source) if isinstance(source, str) else []
        connection.set_progress_handler(lambda: next(steps) > 2_000, 10_000)
        connection.execute("PRAGMA trusted_schema = OFF")
        other = {row[1] for row in connection.execute("PRAGMA table_list") if row[2] in ("virtual", "shadow")}
        for kind, name, sql in connection.execute(
                "SELECT type, name, sql FROM sqlite_master WHERE type <> 'index' AND name NOT LIKE 'sqlite!_%' "
                "ESCAPE '!' ORDER BY rowid").fetchall():
            if kind != "table" or name in other or len(tables) == MAX_TABLES:
                notes.append(f"the {kind} {name} is left out")
            else:
                tables.append(_read_table(connection, name, sql, notes))
    except sqlite3.Error as error:
        raise ValueError(f"is no database that can be read: {error}") from None
    finally:
        connection.close()
    return tables, notes


def write_into(path: Path, source: Path, named: Callable[[Sequence[str]], Mapping[str, str]]) -> dict[str, int]:
    """Copy the tables of one database into those of another for which `named` gives the same name, all or nothing.

    Foreign keys are checked once all is there. ValueError tells what does not fit. Returns how many rows went where.
    """
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)) as connection:
        try:
            connection.execute("ATTACH ? AS made", [str(source)])
            connection.execute("BEGIN IMMEDIATE")
            broken = {*connection.execute("PRAGMA main.foreign_key_check")}
            names = [name for name, in connection.execute(
                "SELECT name FROM main.sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite!_%' ESCAPE '!' "
                "ORDER BY rowid")]
            tables, counts = {given: name for name, given in named(names).items()}, {}
            for made, in connection.execute("SELECT name FROM made.sqlite_master WHERE type = 'table' ORDER BY rowid"
                                            ).fetchall():
                if not (into := tables.get(made)):
                    raise ValueError(f"there is no table {made!r}{did_you_mean(made, names)}")
                listed = connection.execute(f"PRAGMA made.table_info({_quote(made)})")
                columns = ", ".join(_quote(row[1]) for row in listed)
                counts[into] = connection.execute(f"INSERT INTO main.{_quote(into)} ({columns}) SELECT {columns} "
                                                  f"FROM made.{_quote(made)} ORDER BY rowid").rowcount
            if wrong := {*connection.execute("PRAGMA main.foreign_key_check")} - broken:
                raise ValueError(f"{len(wrong)} rows refer to rows that are not there: {min(wrong, key=str)[0]}")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise ValueError(str(error)) from None
    return counts


# ==== 5 Generator: a checked recipe in, rows out; the only Faker ====

MAX_INT = 2**63 - 1
MAX_TEXT = 65_536  # characters in one value
MAX_RECORD = 2**20  # characters in one record
MAX_FAMILY = 100_000  # records that one record may bring along
MAX_SHARED = 1000  # records of types that others refer to, that each part of a request makes anew to know them
MAX_FAMILY_BYTES = 2**25  # of memory, for a record and what it brings along
MAX_SIZE_ARG = 4_096  # what an argument may ask for: letters of a text, digits of a number, words of a sentence
MAX_DEPTH = 12  # lists and objects inside each other
MAX_WORK = 3_000  # values that trying a recipe once may take, over all its types, fields and locales
TRIALS = 20  # values drawn from a field before there is a job: they show its kind and size
UNIQUE_TRIES = 1000  # how often a unique field that is no text draws until the job fails, as stock Faker does
REDRAWS = 8  # how often a unique field draws a taken value again before it takes a number instead
EXACT_SET = 50_000  # up to here the values of a unique field are remembered as they are, beyond in a Bloom filter
BLOOM_BYTES = 2**24  # for all the unique fields of a job
EXACT = Context(prec=10_000, rounding=ROUND_HALF_UP)  # money is added and multiplied without loss
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_T = TypeVar("_T")
Draw = Callable[[], Any]
Row = tuple[Any, ...]
Domain = tuple[int, Callable[[int], Any]]  # how many values there are, and the n-th of them


def library_versions() -> dict[str, str]:
    """What the values depend on besides the request: with the same versions it makes the same records."""
    from faker import VERSION

    return {"faker": str(VERSION)}


# ---- Draws: what random.Random draws, without its layers ----


def _pick(rng: random.Random, table: Any) -> Draw:
    """A draw from a table, bit for bit Faker's: by weight from an OrderedDict, evenly from a sequence or range."""
    if isinstance(table, OrderedDict):
        keys, sums = tuple(table), list(itertools.accumulate(table.values()))
        uniform, total, last = rng.random, sums[-1] + 0.0, len(sums) - 1
        return lambda: keys[bisect(sums, uniform() * total, 0, last)]
    getrandbits = rng.getrandbits
    n = -((table.start - table.stop) // table.step) if isinstance(table, range) else len(table)  # len stops at 2**63
    bits = n.bit_length()

    def draw() -> Any:
        r = getrandbits(bits)
        while r >= n:
            r = getrandbits(bits)
        return table[r]

    return draw


def _nullable(draw: Draw, chance: float, rng: random.Random) -> Draw:
    """Now and then null: settled first, by one draw of its own."""
    uniform = rng.random
    return (lambda: None if uniform() < chance else draw()) if chance else draw


def _mapped(draw: Draw, function: Callable[[Any], Any] | None) -> Draw:
    """The draw's values, but for null, put through a function."""
    return (lambda: None if (value := draw()) is None else function(value)) if function else draw


def _hash64(*names: object) -> int:
    """64 bits that stand for these names on every machine, unlike `hash`."""
    return int.from_bytes(blake2b(json.dumps(names).encode(), digest_size=8).digest(), "big")


def _mix(key: int, n: int) -> int:
    """The n-th of a row of 64-bit numbers that look random (splitmix64): any at once, where a Random goes in order."""
    z = (key + (n + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ z >> 31


@lru_cache(16)
def _equally_often(size: int, total: int, key: int) -> list[int]:
    """Numbers of range(size), `total` in all and each as often as any other, in an order that looks random."""
    return [n % size for n in sorted(range(total), key=partial(_mix, key))]


def _shuffled(size: int, key: int, i: int) -> int:
    """Where a shuffle of range(size) puts i; no memory: a Feistel network, walked until it lands inside the range."""
    half = (max(size - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(key ^ turn, right) & mask)
        i = left << half | right
        if i < size:
            return i


# ---- Faker, fast and the same: shadows on one generator's own instances, never on a class or a module ----


class _StandIn:
    """What a method sees in place of a class: it makes and recognises the real thing, but for what is given here."""

    def __init__(self, real: type, **own: Any) -> None:
        vars(self).update(own, real=real)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.real(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, self.real)


def _stand_ins(rng: random.Random, clock: Clock) -> dict[int, Any]:
    """What a provider's methods are to see in place of the clock and of the global Random, by identity."""
    import faker.generator
    from faker.providers import date_time

    def now(tz: tzinfo | None = None) -> datetime:
        return clock().astimezone(tz or UTC).replace(tzinfo=tz)

    instants, dates = _StandIn(datetime, now=now), _StandIn(date, today=lambda: now().date())
    module = sys.modules["datetime"]
    local_zones = [vars(date_time)[name] for name in ("_get_local_timezone", "tzlocal") if name in vars(date_time)]
    names = ("choice", "choices", "randint", "random", "randrange", "sample", "shuffle", "uniform")
    pairs: list[tuple[Any, Any]] = [
        (datetime, instants), (date, dates), (random, rng), (faker.generator.random, rng),
        (module, types.SimpleNamespace(**{**vars(module), "datetime": instants, "date": dates})),
        *((zone, lambda: UTC) for zone in local_zones),
        *((getattr(random, name), getattr(rng, name)) for name in names)]
    return {id(original): stand_in for original, stand_in in pairs}


def _quick_texts() -> dict[int, Any]:
    """Two slow helpers of Faker's, quick for the usual texts, by identity of the originals."""
    import faker.decode
    import faker.utils.text

    slug, plain = faker.utils.text.slugify, faker.decode.unidecode

    def slugify(value: str, allow_dots: bool = False, allow_unicode: bool = False) -> Any:
        text = value if allow_dots else value.replace(".", "")
        return text.lower() if text.isascii() and text.isalnum() else slug(value, allow_dots, allow_unicode)

    def unidecode(txt: str) -> Any:
        return txt if txt.isascii() else plain(txt)

    return {id(faker.utils.text): types.SimpleNamespace(slugify=slugify), id(plain): unidecode}


def _shadow(generator: FakerGenerator, provider: BaseProvider, name: str, method: Callable[..., Any]) -> None:
    """Let this provider, and the generator where it asks this provider, have another method of that name."""
    setattr(provider, name, method)
    if getattr(vars(generator).get(name), "__self__", None) is provider:
        setattr(generator, name, method)


def freeze_clock(generator: FakerGenerator, stand_ins: Mapping[int, Any]) -> None:
    """Let a generator's methods see `stand_ins` for what is imported where they are written, the clock above all.

    Its instances get copies of the functions whose module holds an original, and of what those call in that module;
    a copy has other globals. The module itself is not touched.
    """
    modules: dict[int, dict[str, Any]] = {}

    def seen_from(module: dict[str, Any]) -> dict[str, Any]:
        """The module's globals as copies see them: the same dict, if nothing in it has a stand-in."""
        if id(module) not in modules:
            found = {name: stand_ins[id(value)] for name, value in module.items() if id(value) in stand_ins}
            modules[id(module)] = seen = {**module, **found} if found else module
            for name, value in module.items() if found else ():
                if inspect.isfunction(value) and value.__globals__ is module and name not in found:
                    seen[name] = copied(value)
        return modules[id(module)]

    def copied(function: Any) -> Any:
        """The function, and the one that it decorates, with such globals; itself, if nothing would differ."""
        seen, cells = seen_from(function.__globals__), function.__closure__ or ()
        inner = [copied(c.cell_contents) if inspect.isfunction(c.cell_contents) else c.cell_contents for c in cells]
        same = all(twin is cell.cell_contents for twin, cell in zip(inner, cells, strict=True))
        if same and seen is function.__globals__:
            return function
        twin = types.FunctionType(function.__code__, seen, function.__name__, function.__defaults__,
                                  cells if same else tuple(map(types.CellType, inner)))
        twin.__kwdefaults__ = function.__kwdefaults__
        return twin

    for provider in generator.providers:
        for name in [name for name in dir(provider) if not name.startswith("__")]:
            method = getattr(provider, name)
            function = getattr(method, "__func__", method)
            if inspect.isfunction(function) and (twin := copied(function)) is not function:
                # a class method too is bound to the instance: it then finds the other shadows through its `cls`
                bound = types.MethodType(twin, provider) if inspect.ismethod(method) else twin
                _shadow(generator, provider, name, bound)


def _primitives(rng: random.Random, stock: BaseProvider, tables: Container[int]) -> dict[str, Callable[..., Any]]:
    """The two methods under most others. `tables` has the identities of the weighted tables that classes own."""
    getrandbits = rng.getrandbits
    digits = {"#": string.digits, "%": string.digits[1:], "$": string.digits[2:]}  # in the order Faker fills them in
    draws: dict[int, Draw] = {}

    def random_element(elements: Any = ("a", "b", "c")) -> Any:
        if type(elements) in (tuple, list, str) and elements:
            n = len(elements)
            bits = n.bit_length()
            r = getrandbits(bits)
            while r >= n:
                r = getrandbits(bits)
            return elements[r]
        if id(elements) not in tables:  # made for this one call: nothing to keep
            return stock.random_element(elements)
        draw = draws.get(id(elements))
        if draw is None:
            draw = draws[id(elements)] = _pick(rng, elements)
        return draw()

    @functools.lru_cache(4096)  # texts made up for one call pass through here too
    def slots(text: str) -> list[tuple[int, int, str]]:
        return [(i, len(some), some) for mark, some in digits.items() for i, c in enumerate(text) if c == mark]

    def numerify(text: str = "###") -> str:
        letters = list(text)
        for i, n, some in slots(text):
            r = getrandbits(4)
            while r >= n:
                r = getrandbits(4)
            letters[i] = some[r]
        filled = "".join(letters)
        return stock.numerify(filled) if "!" in text or "@" in text else filled

    return {"random_element": random_element, "numerify": numerify}


def _outcome(rng: random.Random, call: Draw, times: int = TRIALS) -> tuple[list[Any], Any]:
    """Some values from one seed, or the error they end with, and the state that is left."""
    rng.seed(7)
    values: list[Any] = []
    try:
        for _ in range(times):
            values.append(call())
    except Exception as error:  # noqa: BLE001  # what it raises is compared too
        values.append(repr(error))
    return values, rng.getstate()


@functools.cache
def _drawn_table(cls: Any, name: str) -> tuple[Any, bool] | None:
    """The table that a method draws its value from, and whether it parses what it draws; None if it does otherwise.

    Found by trying: it must give back each element of the table, or what `parse` makes of it, when that is drawn.
    """
    def random_element(elements: Any) -> Any:
        tables.append(elements)
        return drawn

    tables: list[Any] = []
    provider, drawn = cls.__new__(cls), ""
    parse = types.SimpleNamespace(parse=lambda text: ("parsed", text))
    vars(provider).update(random_element=random_element, generator=parse)
    try:
        method = getattr(provider, name)
        patterns = method() is not drawn
        (table,) = tables
        if type(table) not in (OrderedDict, tuple, list) or inspect.signature(method).parameters:
            return None
        for drawn in table:
            if method() != (("parsed", drawn) if patterns else drawn):
                return None
    except Exception:  # noqa: BLE001  # whatever it does with what it is given here
        return None
    return (table, patterns) if all(other is table for other in tables) else None


def _quick_date(rng: random.Random, clock: Clock, stock: Callable[..., str]) -> Callable[..., str]:
    """Faker's `date`: a moment since 1970, of which only the day is told."""
    uniform, epoch = rng.random, EPOCH.toordinal()
    end = lru_cache(1)(lambda now: int(now.timestamp()))

    def draw(*args: Any, **kwargs: Any) -> str:
        if args or kwargs:
            return stock(*args, **kwargs)
        days, seconds = divmod(end(clock()) * uniform(), 86_400)
        # what rounds up to the next whole microsecond may be the next day
        return date.fromordinal(epoch + int(days) + (seconds >= 86_399.9999995)).isoformat()

    return draw


# Whole files as text: what they cost has no bound.
_WITHHELD = frozenset({"csv", "dsv", "fixed_width", "json", "psv", "tsv", "xml"})


class FastFaker:
    """A Faker of one locale that draws from `rng`, many times faster than stock and with the same values.

    Relative dates count from the `clock`; methods that in stock Faker ignore the seed, for they use the global
    Random, draw from `rng` too. Raises AttributeError for a locale that Faker does not have.
    """

    _same: ClassVar[dict[tuple[str, str], bool]] = {}  # by locale and name: whether the fast way gives what stock does

    def __init__(self, locale: str, rng: random.Random, clock: Clock) -> None:
        self.locale, self.rng, self.clock = locale, rng, clock
        self.generator = generator = self._frozen(_quick_texts())
        # bounded, since some methods make up a text for each value
        self._template = functools.lru_cache(1024)(partial(self._split, generator.parse))
        self._shadow_primitives()
        generator.parse = lambda text: self._template(text)()  # type: ignore[method-assign]

    def _frozen(self, more: dict[int, Any]) -> FakerGenerator:
        from faker.factory import Factory

        generator = Factory.create(self.locale)
        generator.random = self.rng
        freeze_clock(generator, _stand_ins(self.rng, self.clock) | more)
        return generator

    @functools.cached_property
    def stock(self) -> FakerGenerator:
        """The same with nothing made fast."""
        return self._frozen({})

    def _shadow_primitives(self) -> None:
        from faker.providers import BaseProvider, date_time

        stock = BaseProvider(self.generator)
        stock.__use_weighting__ = True
        classes = {base for provider in self.generator.providers for base in type(provider).__mro__}
        tables = {id(value) for base in classes for value in vars(base).values() if type(value) is OrderedDict}
        primitives = _primitives(self.rng, stock, tables)
        for provider in self.generator.providers:
            for name, primitive in primitives.items():
                if getattr(type(provider), name) is getattr(BaseProvider, name):
                    _shadow(self.generator, provider, name, primitive)
            if getattr(type(provider), "date", None) is date_time.Provider.date and sys.platform != "win32":
                quick = _quick_date(self.rng, self.clock, provider.date)  # type: ignore[attr-defined]
                _shadow(self.generator, provider, "date", quick)

    def _split(self, stock: Callable[[str], str], text: str) -> Draw:
        """A `{{token}}` text of Faker's, split once; its own `stock` function where a token has arguments."""
        pieces = re.split(r"\{\{\s*(\w+)(:\s*\w+?)?\s*\}\}", text)  # literal, token, argument group, literal, ...
        if any(pieces[2::3]) or not all(hasattr(self.generator, token) for token in pieces[1::3]):
            return partial(stock, text)
        draws = [self.quick(token) for token in pieces[1::3]]
        form = "%s".join(piece.replace("%", "%%") for piece in pieces[::3])
        if len(draws) == 1:  # the usual numbers need no list
            (a,) = draws
            return lambda: form % (a(),)
        if len(draws) == 2:
            a, b = draws
            return lambda: form % (a(), b())
        return lambda: form % tuple([draw() for draw in draws])

    def provider(self, name: str) -> Any:
        """The provider that answers for a method; None for what is no public method, or withheld."""
        offered = [] if name.startswith("_") or name in _WITHHELD else self.generator.providers
        return next((p for p in offered if inspect.isroutine(getattr(type(p), name, None))), None)

    def names(self) -> list[str]:
        """Every public method, by name."""
        names = {name for provider in self.generator.providers for name in dir(type(provider))}
        return [name for name in sorted(names) if self.provider(name)]

    def signature(self, name: str) -> inspect.Signature:
        """What a method takes and gives."""
        cls: Any = self.provider(name).__class__
        return inspect.signature(getattr(cls.__new__(cls), name))

    def table(self, name: str) -> Any:
        """The table that a method draws its values from; None if it does anything else."""
        provider = self.provider(name)
        table, patterns = (provider and _drawn_table(provider.__class__, name)) or (None, False)
        return None if patterns else table

    def quick(self, name: str) -> Callable[..., Any]:
        """The method of this name, made fast."""
        method: Callable[..., Any] = getattr(self.generator, name)
        provider: Any = getattr(method, "__self__", None)
        if provider in self.generator.providers and (found := _drawn_table(provider.__class__, name)):
            draw = _pick(self.rng, found[0])
            method = (lambda: self._template(draw())()) if found[1] else draw
            _shadow(self.generator, provider, name, method)
        return method

    def method(self, name: str) -> Callable[..., Any]:
        """The method of this name: made fast where that gives the same, which is tried once, else as it is."""
        key = self.locale, name
        if key not in self._same:
            state = self.rng.getstate()
            quick, stock = _outcome(self.rng, self.quick(name)), _outcome(self.rng, getattr(self.stock, name))
            self._same[key] = quick == stock
            self.rng.setstate(state)
        found: Callable[..., Any] = self.quick(name) if self._same[key] else getattr(self.stock, name)
        return found


@lru_cache(1024)
def _plain_locale(name: str) -> str:
    """A locale as Faker calls it, whatever way it is spelled."""
    from faker.config import DEFAULT_LOCALE

    return locales.normalize((name or DEFAULT_LOCALE).replace("-", "_")).split(".")[0]


def known_locales() -> list[str]:
    """Those that Faker has, told without building it."""
    from faker.config import AVAILABLE_LOCALES

    return sorted(AVAILABLE_LOCALES)


def _unknown_locale(names: Iterable[str]) -> list[FieldProblem]:
    known = known_locales()
    return [FieldProblem("locale", f"no such locale {name!r}{did_you_mean(name, known)}")
            for name in names if _plain_locale(name) not in known][:1]


# ---- Rows: those made so far, and what refers to them ----


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _stored_json(value: Any) -> str:
    text = _dumps(value)
    if len(text) > MAX_TEXT:
        raise ValueError(f"a value is longer than {MAX_TEXT} characters")
    return text


# What JSON and SQLite hold in different ways, there and back.
_STORE: dict[Kind, Callable[[Any], Any]] = {"bool": int, "json": _stored_json}
_LOAD: dict[Kind, Callable[[Any], Any]] = {"bool": bool, "json": json.loads}
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_INT), WHOLE]
_Steps = list[tuple[int, Draw]]  # the place in the row, and what fills it


def _json_schema_of(schema: Any) -> Any:
    """Of a pydantic model, which a program may give in its place, the JSON Schema."""
    return schema.model_json_schema() if isinstance(schema, type) and issubclass(schema, BaseModel) else schema


Spec = Annotated[Any, WithJsonSchema({"x-ref": "Field"})]  # of a field; its OpenAPI comes from all types there are
Schema = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "x-ref": "Schema"}),
                   Field(min_length=1, max_length=MAX_FIELDS), BeforeValidator(_json_schema_of)]


class RecordSpec(BaseModel):
    """So many records of a type, in all or `per` record of another type, and the fields of each."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, serialize_by_alias=True, defer_build=True)
    count: Count | tuple[Count, Count]
    per: str | None = None
    schema_: Schema = Field(alias="schema")

    @property
    def range(self) -> tuple[int, int]:
        """The fewest and the most of them."""
        return (self.count, self.count) if isinstance(self.count, int) else self.count


class RowSource:
    """The rows of a plan so far: the newest are here, `fresh`, those before them wherever they are stored.

    `columns` are the fields by record type and `counts` says how many rows of each are stored; `rows` and `column`
    read those: some fields of the rows with these 0-based ordinals (ascending), and one field of all rows, in order.
    Where nothing is stored, the fields in `keep`, by record type, stay at hand in rows whose other fields are null.
    """

    def __init__(self, columns: Mapping[str, Iterable[str]], counts: Mapping[str, int] | None = None,
                 rows: Callable[[str, Sequence[str], Sequence[int]], list[Row]] = lambda *_: [],
                 column: Callable[[str, str], Iterator[Any]] = lambda *_: iter(()),
                 keep: Mapping[str, Collection[str]] | None = None) -> None:
        self.slots = {name: {field: at for at, field in enumerate(fields)} for name, fields in columns.items()}
        self.fresh: dict[str, list[Row]] = {name: [] for name in columns}
        self.column, self.keep = column, dict(keep or {})
        self.first = Counter[str]()  # ordinals of the first rows there are
        self.hidden: Container[str] = ()  # types whose rows are made to be referred to, and are in another part
        self._stored, self._stored_rows = Counter(counts or {}), rows
        self._kept = Counter[str]()  # how many of `fresh` are old ones
        self._measured, self._bytes = Counter[str](), 0

    def made(self) -> dict[str, list[Row]]:
        """The newest rows."""
        return {name: rows[self._kept[name]:] for name, rows in self.fresh.items() if name not in self.hidden}

    def rows(self, record_type: str, fields: Sequence[str], ordinals: Sequence[int]) -> list[Row]:
        """These fields of the rows with these ordinals (ascending, no two equal), in that order."""
        first, fresh = self._stored[record_type], self.fresh[record_type]
        ordinals = [ordinal - self.first[record_type] for ordinal in ordinals]
        old = [ordinal for ordinal in ordinals if ordinal < first]
        slots = [self.slots[record_type][field] for field in fields]
        return [*(self._stored_rows(record_type, fields, old) if old else ()),
                *(tuple([fresh[o - first][slot] for slot in slots]) for o in ordinals[len(old):])]

    def size(self) -> int:
        """Bytes of memory that the values of the newest rows take."""
        for name, rows in self.fresh.items():
            if more := rows[self._measured[name]:]:
                self._bytes += sum(map(sys.getsizeof, chain.from_iterable(more)))
                self._measured[name] = len(rows)
        return self._bytes

    def committed(self) -> None:
        """The newest rows are stored now, and need not be kept."""
        for name, rows in self.fresh.items():
            if name in self.keep:
                slots = {self.slots[name][field] for field in self.keep[name]}
                rows[self._kept[name]:] = [tuple([value if slot in slots else None for slot, value in enumerate(row)])
                                           for row in rows[self._kept[name]:]]
                self._kept[name] = self._measured[name] = len(rows)
            else:
                self._stored[name] += len(rows)
                self._measured[name] = 0
                rows.clear()
        self._bytes = 0


class UniqueSet:
    """The values that a unique field has given: a set or, for many, a Bloom filter.

    A filter never takes a known value for a new one; it may take a new one for known, which then gets a number.
    """

    def __init__(self, expected: int, room: int) -> None:
        self.exact: set[Any] | None = set() if expected <= EXACT_SET else None
        bits = 1 << min(expected * 10, room * 8).bit_length() - 1  # a power of two
        self.bits, self.mask = bytearray(0 if self.exact is not None else bits // 8), bits - 1

    def add(self, value: Any) -> bool:
        """Whether the value is new; from now on it is not."""
        if self.exact is not None:
            before = len(self.exact)
            self.exact.add(value)
            return len(self.exact) > before
        new, bits = False, self.bits
        for n in struct.unpack("<4I", blake2b(str(value).encode(), digest_size=16).digest()):
            at, bit = (n & self.mask) >> 3, 1 << (n & 7)
            new |= not bits[at] & bit
            bits[at] |= bit
        return new


class ForeignRow:
    """A record's random earlier row of a type that it is not made per; null while there is none.

    The record's ordinal settles which row, not the stream of draws, so that a block of rows can be fetched at once;
    but of a type that grows `together` with the record's, only those rows count that there are by then.
    """

    def __init__(self, target: str, index: Mapping[str, int], together: bool, distinct: bool) -> None:
        self.key, self.target, self.index, self.together, self.distinct = 0, target, index, together, distinct
        self.fields: list[str] = []
        self.row: Row | None = None
        self.block: dict[int, Row] = {}  # by the ordinal of the record that looks

    def reader(self, column: str, example: Sequence[Any]) -> Draw:
        """The field in the present record's row; until there is one, in the example."""
        if column not in self.fields:
            self.fields.append(column)
        at, self.row = self.fields.index(column), tuple([example[self.index[name]] for name in self.fields])
        return lambda: self.row[at] if self.row else None

    def pick(self, ordinal: int, there: range, rows: RowSource, family: tuple[int, int]) -> None:
        """Settle the row for the record of this ordinal: one of those whose ordinals are `there`.

        A `distinct` one is no other's of its `family`: the parent's ordinal, and how many children that has so far.
        """
        if ordinal not in self.block:
            if self.distinct and family[1] >= len(there):
                raise TaskError(f"there are only {len(there)} different {self.target} to refer to")
            ahead = range(ordinal, ordinal + (1 if self.together or self.distinct else 500))
            chosen = {o: there[_mix(self.key, o) % len(there)] for o in ahead} if there else {}
            if self.distinct:
                chosen = {ordinal: there[_shuffled(len(there), _mix(self.key, family[0]), family[1])]}
            ordinals = sorted(set(chosen.values()))
            found = dict(zip(ordinals, rows.rows(self.target, self.fields, ordinals), strict=True))
            self.block = {o: found[at] for o, at in chosen.items()}
        self.row = self.block.get(ordinal)


def escaped(step: str) -> str:
    """A step of a JSON Pointer."""
    return step.replace("~", "~0").replace("/", "~1")


def _steps_of(fragment: str) -> list[str]:
    """The steps of the JSON Pointer in a `$ref`."""
    return [step.replace("~1", "/").replace("~0", "~") for step in unquote(fragment).split("/")[1:]]


class RecipeType:
    """One record type of a recipe, checked."""

    def __init__(self, name: str, spec: RecordSpec, path: str, schema: Mapping[str, Any] | None = None) -> None:
        self.name, self.spec, self.path = name, spec, path
        self.schema = spec.schema_ if schema is None else schema  # field by field
        self.index = {column: slot for slot, column in enumerate(self.schema)}
        self.fields: dict[str, Any] = {}  # the checked description of each, in the order in which they are made
        self.deferred: set[str] = set()  # fields that wait for the children: sums, and what reads them
        self.parent: RecipeType | None = None
        self.children: list[RecipeType] = []
        self.bound = spec.range[1]  # the most records there can be

    def at(self, *steps: str) -> str:
        """The path of a part of this description."""
        return ".".join([*filter(None, [self.path]), *steps])

    def field_path(self, column: str) -> str:
        """The path of a field; in a JSON Schema its JSON Pointer."""
        own = self.schema is self.spec.schema_
        return self.at("schema", column) if own else f"{self.at('schema')}#/properties/{escaped(column)}"

    def ancestors(self) -> list[RecipeType]:
        """The types that this one is made per, nearest first."""
        return [self.parent, *self.parent.ancestors()] if self.parent else []

    @property
    def root(self) -> RecipeType:
        """The type at the upper end of `per`."""
        return [self, *self.ancestors()][-1]


class RecordGenerator:
    """Makes the records of one type, one after the other.

    Its functions are compiled once; then each use of it has a seed and an instant of its own.
    """

    def __init__(self, record_type: RecipeType, others: dict[str, RecordGenerator], several: bool,
                 now: datetime) -> None:
        self.type, self.name, self.others, self.several = record_type, record_type.name, others, several
        others[self.name] = self
        self.parent = others[record_type.parent.name] if record_type.parent else None
        self.children: list[RecordGenerator] = []
        if self.parent:
            self.parent.children.append(self)
        self.rng, self.fakers = random.Random(0), dict[str, FastFaker]()
        self.seed, self.key = 0, 0
        self._now: datetime | None = now
        self.dated = False  # whether it is compiled for this instant alone
        self.settled: list[Callable[[], None]] = []  # what finds anew all that depends on seed or instant
        self.kinds: dict[str, Kind] = {}
        self.size = 0  # characters of a large record
        self.lookups: dict[tuple[RecordGenerator, str], ForeignRow] = {}
        self.steps: list[tuple[_Steps, _Steps]] = []  # by locale: those at first, those that are deferred
        self.values: list[Any] = [None] * len(record_type.index)  # the record that is being made
        self.siblings: list[Row] = []  # those made so far for the present parent
        self.seen: dict[str, UniqueSet] = {}
        self.done = self.locale = 0
        self.part, self.parts = 0, 1  # which part it makes, of how many
        self.first = self.end = 0  # from the part's first record, to the one after its last (not known of children)
        self.mark = ""  # what a text ends with that had to be made this part's own
        width = record_type.spec.range[1] - record_type.spec.range[0] + 1
        self.group = width * max(1, 1000 // width)  # parents that, if there are parts, have as many children as others

    @property
    def now(self) -> datetime:
        """The instant that relative dates count from; BadRequest if the request has to name one, and does not."""
        if self._now is None:
            raise BadRequest.of("now", "must be given, since values depend on it and parts made apart have to agree")
        return self._now

    def faker(self, locale: str) -> FastFaker:
        """The Faker of a locale; built when a field first asks for it."""
        name = _plain_locale(locale)
        if name not in self.fakers:
            self.fakers[name] = FastFaker(name, self.rng, lambda: self.now)
        return self.fakers[name]

    def lookup(self, target: RecordGenerator, row: str = "", distinct: bool = False) -> ForeignRow:
        """The one random row of this type, among those of its rows with this name, that all fields of a record read."""
        if (target, row) not in self.lookups:
            together = target.type.root is self.type.root
            self.lookups[target, row] = ForeignRow(target.name, target.type.index, together, distinct)
        return self.lookups[target, row]

    def child_count(self, parent_ordinal: int) -> int:
        """How many records are made for this parent (0 for a type that has none)."""
        low, high = self.type.spec.range
        if self.parts > 1 and self.parent:
            group, at = divmod(parent_ordinal, self.group)
            return low + _equally_often(high - low + 1, self.group, _mix(self.key, group))[at]
        return low + _mix(self.key, parent_ordinal) % (high - low + 1)

    def _made_before(self, parent_ordinal: int) -> int:
        """How many records are made for all parents before this one, if there are parts; told without counting them."""
        start = parent_ordinal - parent_ordinal % self.group
        return start * sum(self.type.spec.range) // 2 + sum(map(self.child_count, range(start, parent_ordinal)))

    def cut(self, part: int, parts: int, shared: bool) -> None:
        """Let it make this part of a request.

        Each part has its range of every type that is not made per another; children stay with their parents, and
        ordinals run on, so that all that an ordinal settles is the same however the request is cut: `sequence`, and
        `unique` values that can be counted. A `shared` type is small and referred to: the first part has all of it.
        """
        self.part, self.parts = (0, 1) if shared else (part, parts)
        self.mark = f"{part:0{len(str(parts - 1))}}" if self.parts > 1 else ""
        if self.parent:
            self.first = 0 if self.parts == 1 else self._made_before(self.parent.first)
        else:
            self.first, self.end = (self.child_count(0) * n // self.parts for n in (self.part, self.part + 1))

    def owns(self, stem: str) -> bool:
        """Whether unique texts with this stem are this part's: to each belong the stems that end in its number, and a
        share of those that end otherwise."""
        end = stem[-len(self.mark):]
        number = int(end) if end.isascii() and end.isdigit() and len(end) == len(self.mark) else zlib.crc32(
            stem.encode())
        return not self.mark or number % self.parts == self.part

    @property
    def plain(self) -> bool:
        """Whether a record of this type needs nothing but its draws, one after the other."""
        related = self.parent or self.children or self.lookups or self.type.deferred
        return not related and len(self.steps) == 1

    def make_plain(self, rows: RowSource, count: int) -> None:
        """Make several records of a `plain` type, in less time than one by one."""
        values, ((steps, _),), append = self.values, self.steps, rows.fresh[self.name].append
        for _ in range(count):
            for slot, draw in steps:
                values[slot] = draw()
            append(tuple(values))
            self.done += 1

    def make_one(self, rows: RowSource) -> None:
        """Make a record of a type that has no children."""
        self._begin(rows)
        self._end(rows)

    def make_family(self, rows: RowSource) -> Iterator[None]:
        """Make a record and all that is made per it; where that is much, with pauses."""
        self._begin(rows)
        for child in self.children:
            child.siblings.clear()
            for number in range(1, child.child_count(self.done) + 1):
                if child.children:
                    yield from child.make_family(rows)
                else:
                    child.make_one(rows)
                if not number % 50:
                    yield
        self._end(rows)

    def _begin(self, rows: RowSource) -> None:
        family = (self.parent.done, len(self.siblings)) if self.parent else (0, self.done - self.first)
        for (target, _), lookup in self.lookups.items():
            lookup.pick(self.done, range(target.first, target.done), rows, family)
        if self.parent:
            self.locale = self.parent.locale
        elif len(self.steps) > 1:
            self.locale = self.rng.randrange(len(self.steps))
        values = self.values
        for slot, draw in self.steps[self.locale][0]:
            values[slot] = draw()

    def _end(self, rows: RowSource) -> None:
        values = self.values
        for slot, draw in self.steps[self.locale][1]:
            values[slot] = draw()
        row = tuple(values)
        rows.fresh[self.name].append(row)
        if self.parent:
            self.siblings.append(row)
        self.done += 1

    def state(self) -> Json:
        """How far it has come, in a few kilobytes."""
        _, words, left_over = self.rng.getstate()  # 625 words, and a normal draw kept for the next time
        packed = base64.b64encode(struct.pack("<625I", *words)).decode()
        return [self.done, packed, left_over and left_over.hex()]

    def settle(self, seed: int, now: datetime | None) -> None:
        """Let all that is made be settled by this seed and instant. BadRequest if dates do not fit that."""
        self.seed, self.key, self._now = seed, _hash64(seed, self.name), now
        if self.dated:
            self._now = self.now
        for (target, row), lookup in self.lookups.items():
            lookup.key = _hash64(seed, self.name, target.name, *filter(None, [row]))
        for find in self.settled:
            find()

    def start(self, seed: int, state: Json | None) -> None:
        """Go to where a `state` says, or to the beginning of the part."""
        self.rng.seed(seed)
        self.done = self.first
        self.forget()
        if state:
            self.done, packed, left_over = state
            words = struct.unpack("<625I", base64.b64decode(packed))
            self.rng.setstate((3, words, left_over and float.fromhex(left_over)))

    def forget(self) -> None:
        """Keep no value of a record."""
        self.values[:] = [None] * len(self.values)
        self.siblings.clear()
        self.seen = {column: UniqueSet(1, 1) for column in self.seen}
        for lookup in self.lookups.values():
            lookup.block, lookup.row = {}, None


@dataclass(slots=True)
class Scope:
    """What a field type may use to become a function: chance, the instant, one locale's Faker, the other fields."""

    generator: RecordGenerator
    locale: str
    path: str

    @property
    def now(self) -> datetime:
        """The instant that relative dates count from; who asks for it is compiled anew for another."""
        self.generator.dated = True
        return self.generator.now

    @property
    def rng(self) -> random.Random:
        """The one source of chance of this record type."""
        return self.generator.rng

    @property
    def fast(self) -> FastFaker:
        """Faker of this locale."""
        return self.generator.faker(self.locale)

    @property
    def faker(self) -> FakerGenerator:
        """Faker's own generator of this locale; it draws from `rng`."""
        return self.fast.generator

    def at(self, *steps: str | int) -> Scope:
        """The same for an option of this field, or a field inside it."""
        return Scope(self.generator, self.locale, ".".join([self.path, *map(str, steps)]))

    def refuse(self, message: str, *steps: str | int) -> BadRequest:
        """The error that names this field, or an option of it."""
        return BadRequest.of(self.at(*steps).path, message)

    def settled(self, find: Callable[[], _T]) -> list[_T]:
        """What `find` finds, the only item; it is found again for each seed and instant."""
        found = [find()]
        self.generator.settled.append(lambda: found.__setitem__(0, find()))
        return found

    def longest(self, draw: Draw, *steps: str | int) -> int:
        """The length, as JSON, of the longest of a few values."""
        try:
            return max(len(_dumps(draw())) for _ in range(TRIALS))
        except Exception as error:  # noqa: BLE001  # a field type's or Faker's; either way this request can not be made
            raise self.refuse(str(error) or type(error).__name__, *steps) from None

    def find(self, name: str, among: Collection[RecordGenerator]) -> tuple[RecordGenerator, str]:
        """The other record type and the field of it that a name such as "customer.id" stands for."""
        record_type, _, column = name.partition(".")
        others = [generator for generator in among if generator is not self.generator]
        for generator in others:
            if generator.name == record_type and column in generator.type.index:
                return generator, column
        names = [f"{generator.name}.{column}" for generator in others for column in generator.type.index]
        raise self.refuse(f"no such field {name!r}{did_you_mean(name, names)}")

    def owner(self, name: str) -> tuple[RecordGenerator, str]:
        """Whose field a name stands for: "age" for one of this record, "customer.id" for one of a related record."""
        me = self.generator
        return (me, name) if name in me.type.index else self.find(name, me.others.values())

    def kind(self, owner: RecordGenerator, column: str) -> Kind:
        """The kind of a field; an error that names nothing if it has none, being at fault itself."""
        if column not in owner.kinds:
            raise BadRequest("a field that this one needs is at fault")
        return owner.kinds[column]

    def reader(self, name: str) -> tuple[Draw, Kind]:
        """The present value of a field of this record, "age", or of the one it is related to, "customer.id"."""
        me, (owner, column) = self.generator, self.owner(name)
        above = owner.type in me.type.ancestors()
        if column in owner.type.deferred and above:
            raise self.refuse(f"{name} is only known once these records are made")
        kind, slot, values = self.kind(owner, column), owner.type.index[column], owner.values
        if owner is me or above:
            return _mapped(lambda: values[slot], _LOAD.get(kind)), kind
        return _mapped(me.lookup(owner).reader(column, values), _LOAD.get(kind)), kind


# ---- Regular expressions: texts drawn from them, in a time that no expression blows up ----

MAX_STATES = 20_000  # of one expression
_READABLE, _PRINTABLE = string.ascii_letters + string.digits, "".join(map(chr, range(32, 127)))
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": lambda letter: letter.isalnum() or letter == "_"}


class Letters:
    """The characters that one place of an expression may have: a test, and those to draw."""

    def __init__(self, op: str, arg: Any) -> None:
        self.named: list[str] = []
        self.fits = self._test(op, arg)
        usual = [a for a in chain(_READABLE, self.named) if self.fits(a) and not "\ud800" <= a <= "\udfff"]
        self.choices = [*dict.fromkeys(usual)] or [*filter(self.fits, _PRINTABLE)]

    def _test(self, op: str, arg: Any) -> Callable[[str], bool]:
        if op == "IN":
            negated = arg[0][0].name == "NEGATE"
            tests = [self._test(op.name, arg) for op, arg in arg[negated:]]
            return lambda letter: any(test(letter) for test in tests) is not negated
        if op == "CATEGORY":
            name = arg.name.removeprefix("CATEGORY_")
            test = _CATEGORIES[name.removeprefix("NOT_")]
            return (lambda letter: not test(letter)) if name.startswith("NOT_") else test
        if op == "ANY":
            return "\n".__ne__
        low, high = arg if op == "RANGE" else (arg, arg)
        self.named += map(chr, range(max(low, 1), min(high, low + 99) + 1))
        return lambda letter: (low <= ord(letter) <= high) is (op != "NOT_LITERAL")


class Regex:
    """A regular expression that is to be found in a text, as an automaton: what it takes grows with both, no more.

    ValueError tells what can not be done, such as to look around or back.
    """

    def __init__(self, source: str) -> None:
        import re._parser as parser  # type: ignore[import-not-found, unused-ignore]  # what `re` reads them with

        try:
            self._tree = parser.parse(re.sub(r"\(\?<(?=\w)", "(?P<", source))
            self.size = self._count(self._tree)
        except (re.error, OverflowError, RecursionError, FutureWarning) as error:
            raise ValueError(f"is no regular expression that texts can be drawn from: {error}") from None
        if self.size > MAX_STATES or self._tree.state.flags & ~re.UNICODE:
            raise ValueError(f"takes {self.size} steps, of at most {MAX_STATES}" if self.size > MAX_STATES else
                             "has flags, which are not supported")
        self._reached: dict[tuple[int, bool, bool, bool], tuple[list[tuple[Letters, int]], bool]] = {}
        self._steps: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}

    def _count(self, tree: Any) -> int:
        """How many states there will be, about."""
        total = 1
        for op, arg in tree:
            if op.name in ("MAX_REPEAT", "MIN_REPEAT"):
                low, high, inner = arg
                total += (low + 1 if str(high) == "MAXREPEAT" else high) * (1 + self._count(inner))
            elif op.name == "SUBPATTERN" and not arg[1] | arg[2]:
                total += self._count(arg[3])
            elif op.name == "BRANCH":
                total += sum(map(self._count, arg[1]))
            elif op.name in ("AT", "IN", "ANY", "LITERAL", "NOT_LITERAL") and "BOUNDARY" not in str(arg):
                total += 1
            else:
                raise ValueError("looks around or back, from which no text can be drawn")
        return total

    @functools.cached_property
    def _edges(self) -> list[list[tuple[Letters | str, int]]]:
        """From each state: what it takes, a character or ^ or $ or nothing, and where that leads; 0 is the first."""
        self._built: list[list[tuple[Letters | str, int]]] = [[]]
        self.end = self._link(self._add(self._tree, self._link(0)))
        self.padding = Letters("ANY", None)
        return self._built

    def _link(self, start: int, by: Letters | str = "", end: int = -1) -> int:
        """Let a state lead to another, by default a new one, which is returned."""
        if end < 0:
            self._built.append([])
            end = len(self._built) - 1
        self._built[start].append((by, end))
        return end

    def _add(self, tree: Any, at: int) -> int:
        """Let a state lead on as a part of the expression says; where that ends."""
        for op, arg in tree:
            if op.name == "SUBPATTERN":
                at = self._add(arg[3], at)
            elif op.name == "AT":
                at = self._link(at, "^" if "BEGINNING" in arg.name else "$")
            elif op.name == "BRANCH":
                ends = [self._add(branch, self._link(at)) for branch in arg[1]]
                at = self._link(ends[0])
                for end in ends[1:]:
                    self._link(end, "", at)
            elif op.name in ("MAX_REPEAT", "MIN_REPEAT"):
                at = self._repeat(at, *arg)
            else:
                at = self._link(at, Letters(op.name, arg))
        return at

    def _repeat(self, at: int, low: int, high: Any, inner: Any) -> int:
        for _ in range(low):
            at = self._add(inner, at)
        if str(high) == "MAXREPEAT":
            at = self._link(at)
            self._link(self._add(inner, at), "", at)
            return self._link(at)
        starts = [at]
        for _ in range(high - low):
            starts.append(at := self._add(inner, self._link(at)))
        end = self._link(at)
        for start in starts[:-1]:
            self._link(start, "", end)
        return end

    def _from(self, state: int, begin: bool, end: bool, padded: bool) -> tuple[list[tuple[Letters, int]], bool]:
        """What a state may take, and where to; and whether it is the last: at the text's begin or end, or inside."""
        key = state, begin, end, padded
        if key not in self._reached:
            seen, todo, moves = {state}, [state], list[tuple[Letters, int]]()
            while todo:
                for by, target in self._edges[todo.pop()]:
                    if isinstance(by, Letters):
                        moves.append((by, target))
                    elif target not in seen and (not by or (begin if by == "^" else end)):
                        seen.add(target)
                        todo.append(target)
            moves += [(self.padding, at) for at in seen & {0, self.end} if padded]
            self._reached[key] = moves, self.end in seen
        return self._reached[key]

    def found_in(self, text: str) -> bool:
        """As `re.search` has it; ValueError if to tell takes too long."""
        states, work = frozenset([0]), 0
        for at, letter in enumerate(text):
            if (step := (states, letter, not at)) not in self._steps:
                work += len(states)
                if work > 2**14 or len(self._steps) > 2**14:
                    raise ValueError(f"takes too many steps to look for in {len(text)} characters")
                self._steps[step] = frozenset(
                    target for state in states for letters, target in self._from(state, not at, False, True)[0]
                    if letters is self.padding or letters.fits(letter))
            states = self._steps[step]
        return any(self._from(state, not text, True, True)[1] for state in states)

    def draw(self, rng: random.Random, low: int, high: int) -> Draw:
        """Draws texts of `low` to `high` characters that it is found in; where it can, nothing stands around it."""
        if low > MAX_SIZE_ARG:
            raise ValueError(f"makes texts of at most {MAX_SIZE_ARG} characters")
        for padded in (False, True):
            alive, lengths = self._lengths(low, high, padded)
            if lengths:
                break
        else:
            raise ValueError(f"no text of {low} to {high} characters is like that")
        length, below, known = _pick(rng, lengths), rng.random, dict[tuple[int, int, bool], Any]()

        def draw() -> str:
            state, text, left = 0, list[str](), length()
            while left:
                left -= 1
                if (key := (state, left, not text)) not in known:
                    moves = self._from(state, not text, False, padded)[0]
                    known[key] = [(by.choices, to) for by, to in moves if to in alive[left] and by.choices]
                choices, state = known[key][int(below() * len(known[key]))]
                text.append(choices[int(below() * len(choices))])
            return "".join(text)

        return draw

    def _lengths(self, low: int, high: int, padded: bool) -> tuple[list[set[int]], list[int]]:
        """By number of characters, the states that are so many from the last; and the first lengths that do."""
        first = self._from(0, True, False, padded)[0]
        work, todo = 0, [*{0, *(target for _, target in first)}]
        before: dict[int, set[int]] = {state: set() for state in todo}  # inside of a text, each from where
        while todo:
            state = todo.pop()
            for by, target in self._from(state, False, False, padded)[0]:
                work += 1
                if by.choices and target not in before:
                    todo.append(target)
                if by.choices:
                    before.setdefault(target, set()).add(state)
        alive = [{state for state in before if self._from(state, False, True, padded)[1]}]
        lengths = [0] if not low and self._from(0, True, True, padded)[1] else []
        while alive[-1] and len(alive) <= min(high, lengths[0] + 16 if lengths else high):
            if len(alive) >= low and any(target in alive[-1] and by.choices for by, target in first):
                lengths.append(len(alive))
            alive.append({state for target in alive[-1] for state in before[target]})
            work += len(alive[-1])
            if work > 2**18:
                raise ValueError("takes too many steps for texts of that length")
        return alive, lengths


# ---- JSON Schema: what a value has to be like ----

NOT_HONOURED = frozenset({
    "not", "if", "dependentSchemas", "patternProperties", "contains", "unevaluatedProperties", "unevaluatedItems",
    "$dynamicRef", "$recursiveRef"})
_DAY_FORMAT, _TIME_FORMAT = r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])", r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d"
_HOST_FORMAT = r"[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+(-[a-z0-9]+)*)*\.[a-z]{2,6}"
_EMAIL_FORMAT = ({"type": "email"}, rf"^[a-z0-9]+([._-][a-z0-9]+)*@{_HOST_FORMAT}$")
_URI_FORMAT = ({"type": "url"}, rf"^https?://{_HOST_FORMAT}/([a-z0-9]+(/[a-z0-9]+)*)?$")
# A format's field, where there is one that is nicer than texts drawn from the expression: some texts of the format.
_FORMATS: dict[str, tuple[dict[str, Json] | None, str]] = {
    "date": ({"type": "date"}, f"^{_DAY_FORMAT}$"), "time": (None, f"^{_TIME_FORMAT}Z$"),
    "date-time": ({"type": "datetime"}, rf"^{_DAY_FORMAT}T{_TIME_FORMAT}(\.\d{{3}})?Z$"),
    "duration": (None, "^P([1-9][0-9]?D|[1-9]DT[1-9]H|T[1-9][0-9]?[HMS])$"),
    **dict.fromkeys(("email", "idn-email"), _EMAIL_FORMAT),
    **dict.fromkeys(("hostname", "idn-hostname"), ({"type": "domain_name"}, f"^{_HOST_FORMAT}$")),
    **dict.fromkeys(("uri", "uri-reference", "iri", "iri-reference", "url"), _URI_FORMAT),
    "uri-template": (None, rf"^https://{_HOST_FORMAT}/\{{[a-z]{{2,8}}\}}$"),
    "uuid": ({"type": "uuid"}, "^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"),
    **dict.fromkeys(("ipv4", "ipvanyaddress"), (
        {"type": "ipv4"}, r"^((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)$")),
    "ipv6": ({"type": "ipv6"}, "^([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}$"), "regex": (None, r"^\^\[a-z\]\{[1-9]\}\$$"),
    "json-pointer": (None, "^(/[a-z]{2,8}){1,3}$"), "relative-json-pointer": (None, "^[0-3](/[a-z]{2,8}){0,2}$"),
    "byte": (None, "^([A-Za-z0-9+/]{4}){2,8}$"), "json-string": (None, "^[1-9][0-9]{0,5}$")}


def _is_number(value: Json) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Json) -> bool:
    return _is_number(value) and value == value // 1


def _sameness(value: Json) -> str:
    """A text that is the same for values that JSON Schema takes for equal: 1 and 1.0, objects in any order."""
    def same(part: Json) -> Json:
        if isinstance(part, dict):
            return {key: same(inner) for key, inner in part.items()}
        return [*map(same, part)] if isinstance(part, list) else int(part) if _is_whole(part) else part

    return json.dumps(same(value), sort_keys=True)


_TYPE_TESTS: dict[str, Callable[[Json], bool]] = {
    "null": lambda value: value is None, "boolean": lambda value: isinstance(value, bool), "integer": _is_whole,
    "number": _is_number, "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list), "object": lambda value: isinstance(value, dict)}


def is_json_schema(schema: Mapping[str, Json]) -> bool:
    """Whether it is no schema of ours, field by field, but a JSON Schema."""
    named = isinstance(schema.get("$schema"), str) or schema.get("type") == "object"
    return (named and isinstance(schema.get("properties"), dict)) or str(schema.get("$ref", "")).startswith("#")


class JsonSchema:
    """A JSON Schema document: finds what its `$ref` mean, and tells whether a value is valid.

    A value that is too hard to check, or that a keyword unknown here has a say in, counts as invalid.
    """

    def __init__(self, root: dict[str, Json]) -> None:
        self.root, self.steps, self.formats = root, 0, True
        self.regex, self.has_text = functools.cache(Regex), functools.cache(self._has_text)
        self.ref_alone = bool(re.search(r"draft-0[3-7]", str(root.get("$schema"))))

    def parts(self, node: dict[str, Json]) -> dict[str, Json]:
        """What counts of an object: up to draft 7, of one with a `$ref` nothing else."""
        return {"$ref": node["$ref"]} if self.ref_alone and "$ref" in node else node

    def _has_text(self, source: str, low: int, high: int) -> bool:
        """Whether a pattern is found in texts of such a length."""
        with suppress(ValueError):
            return bool(self.regex(source).draw(random.Random(0), low, high))
        return False

    @functools.cached_property
    def named(self) -> dict[str, tuple[Json, str]]:
        """The parts with a name of their own, `$id` or `$anchor`, and where they are."""
        found, todo = dict[str, tuple[Json, str]](), [(self.root, "")]
        while todo:
            node, pointer = todo.pop()
            if isinstance(node, dict):
                for name in (node.get("$id"), node.get("id"), f"#{node.get('$anchor')}"):
                    if isinstance(name, str):
                        found.setdefault(name.rstrip("#"), (node, pointer))
            pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            todo += [(inner, f"{pointer}/{escaped(str(key))}") for key, inner in pairs]
        return found

    def resolve(self, ref: str) -> tuple[Json, str]:
        """What a `$ref` means, and its JSON Pointer; LookupError if that is not in this document."""
        base, _, fragment = ref.partition("#")
        node: Json = None
        node, pointer = self.named[base] if base else (self.root, "")
        if fragment and not fragment.startswith("/"):
            return self.named[f"#{fragment}"]
        for step in _steps_of(fragment):
            node = node[int(step) if isinstance(node, list) and step.isdecimal() else step]
            pointer += f"/{escaped(step)}"
        return node, pointer

    def allows(self, value: Json, nodes: Iterable[Json], formats: bool = True) -> bool:
        """Whether a value is valid against each of these parts of the document."""
        try:
            for node, self.formats in product(nodes, {formats, False}):  # some validators check formats, others do not
                self.steps = 0
                if not self._meets(value, node):
                    return False
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
            return False
        return True

    def _meets(self, value: Json, node: Json) -> bool:
        if isinstance(node, bool):
            return node
        node, self.steps = self.parts(node), self.steps + 1
        if self.steps > 10_000 or node.keys() & NOT_HONOURED:
            raise ValueError("can not be told")
        if "$ref" in node and not self._meets(value, self.resolve(node["$ref"])[0]):
            return False
        kinds = node.get("type", [])
        if kinds and not any(_TYPE_TESTS[kind](value) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
            return False
        for listed in (node.get("enum"), [node["const"]] if "const" in node else None):
            if listed is not None and _sameness(value) not in map(_sameness, listed):
                return False
        one_of = sum(self._meets(value, part) for part in node["oneOf"]) if "oneOf" in node else 1
        fits = (self._number(value, node) if _is_number(value) else self._text(value, node) if isinstance(value, str)
                else self._list(value, node) if isinstance(value, list)
                else self._object(value, node) if isinstance(value, dict) else True)
        return fits and one_of == 1 and all(self._meets(value, part) for part in node.get("allOf", ())) and (
            "anyOf" not in node or any(self._meets(value, part) for part in node["anyOf"]))

    def _number(self, value: float, node: Json) -> bool:
        low, high, step = node.get("exclusiveMinimum"), node.get("exclusiveMaximum"), node.get("multipleOf")
        return (node.get("minimum", value) <= value <= node.get("maximum", value)
                and (low is None or low is False or value > (node["minimum"] if low is True else low))
                and (high is None or high is False or value < (node["maximum"] if high is True else high))
                and (step is None or (not value % step if isinstance(value, int) and isinstance(step, int)
                                      else _is_whole(value / step))))  # as validators reckon it

    def _text(self, value: str, node: Json) -> bool:
        form = _FORMATS.get(node.get("format", "")) if self.formats else None
        return (node.get("minLength", 0) <= len(value) <= node.get("maxLength", math.inf)
                and ("pattern" not in node or self.regex(node["pattern"]).found_in(value))
                and (form is None or self.regex(form[1]).found_in(value)))

    def _list(self, value: list[Json], node: Json) -> bool:
        first, rest = node.get("prefixItems", []), node.get("items", True)
        if isinstance(rest, list):
            first, rest = rest, node.get("additionalItems", True)
        return (node.get("minItems", 0) <= len(value) <= node.get("maxItems", math.inf)
                and not (node.get("uniqueItems") and len({*map(_sameness, value)}) < len(value))
                and all(self._meets(item, first[at] if at < len(first) else rest) for at, item in enumerate(value)))

    def _object(self, value: dict[str, Json], node: Json) -> bool:
        known, others = node.get("properties", {}), node.get("additionalProperties", True)
        needs = {**node.get("dependencies", {}), **node.get("dependentRequired", {})}
        return (node.get("minProperties", 0) <= len(value) <= node.get("maxProperties", math.inf)
                and value.keys() >= {*node.get("required", ())}
                and all(value.keys() >= {*needs[name]} for name in needs if name in value)
                and all(self._meets(name, node.get("propertyNames", True)) for name in value)
                and all(self._meets(item, known.get(name, others)) for name, item in value.items()))


# ---- Field types: one class each; first what they have in common, then Faker's methods ----


class FieldType(BaseModel):
    """A field of a schema. A subclass is a type: its attributes are the options, its docstring is shown at /fields."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel, populate_by_name=True,
                              allow_inf_nan=False, defer_build=True)
    example: ClassVar[dict[str, Any]] = {}
    kind: ClassVar[Kind] = "text"
    redraws: ClassVar[int | None] = None  # for `unique`: how often to draw a taken value again; None: only if countable
    distinct: ClassVar[bool] = False  # no two values are ever equal

    type: str
    null: float = Field(0, ge=0, le=1)
    unique: bool = False

    def reads(self) -> Iterable[str]:
        """The fields, "age" or "customer.id", that values of this one are made from."""
        return ()

    def work(self) -> int:
        """How much it takes to make one value, where that of an ordinary field is 1."""
        return 1

    def ending(self) -> str:
        """What each value, a text, is known to end with."""
        return ""

    def domain(self, scope: Scope) -> Domain | None:
        """How many values there are and the n-th of them, where that can be told: `unique` is then a shuffle."""
        return None

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        """The function that makes a value as JSON would have it, and the kind of the values.

        Called for each locale when a recipe is checked, and the function then serves one use of it after another: it
        keeps nothing between two values. `scope.rng` is the only source of chance, so that a seed settles everything.
        Raises `scope.refuse(...)` if the options make no sense.
        """
        def evenly() -> tuple[Draw, Callable[[int], Any]]:
            size, nth = self.domain(scope) or (0, str)
            if size < 1:
                raise scope.refuse("no value lies between these bounds")
            return _pick(scope.rng, range(size)), nth

        found = scope.settled(evenly)

        def draw() -> Any:
            index, nth = found[0]
            return nth(index())

        return draw, self.kind


_F = TypeVar("_F", bound=type[FieldType])
FIELD_TYPES: dict[str, type[FieldType]] = {}


def field_type(name: str, **example: Any) -> Callable[[_F], _F]:
    """Register a subclass of FieldType under this name, with options to show; ValueError if the name is taken."""

    def register(cls: _F) -> _F:
        if FIELD_TYPES.setdefault(name, cls) is not cls:
            raise ValueError(f"there is a field type {name!r} already")
        if "example" not in vars(cls):
            cls.example = {"type": name, **example}
        return cls

    return register


_SCALARS: dict[type, Kind] = {
    str: "text", bool: "bool", int: "int", float: "float", Decimal: "decimal", date: "date", datetime: "datetime",
    time_of_day: "text", timedelta: "text"}
# What Faker gives as an object, as JSON would have it.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    Decimal: lambda value: format(value, "f"), date: date.isoformat, time_of_day: time_of_day.isoformat,
    datetime: lambda value: value.replace(tzinfo=None).isoformat(timespec="seconds") + "Z", timedelta: str}
# Arguments that are values; any other number says how much to make.
_VALUE_ARG = re.compile(r"(min|max)(_value)?|step|number|center|radius|bank_code|.*(date|start|end).*")
_DATE_ARG = re.compile(r".*(date|start|end|birth).*")
# The most that may be asked for where MAX_SIZE_ARG would be too much: each step of these makes several values.
_MOST = {"depth": 64, "levels": 16, "nb_sentences": 500, "nb_words": 1000, "deep": 256, "digits": 1000,
         "left_digits": 1000, "right_digits": 1000}


_ISO_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def _dated(name: str, value: str) -> Any:
    """Faker takes a date as an object: an ISO text becomes one where a date is due."""
    if _ISO_DATE.match(value) and _DATE_ARG.fullmatch(name):
        return date.fromisoformat(value) if len(value) == 10 else datetime.fromisoformat(value)
    return value


def _argument(name: str, value: Any, longest: int = MAX_SIZE_ARG) -> Any:
    """An argument that is safe to hand to Faker, literal or read from a field; ValueError says what it may be.

    None makes Faker work without end, none is a template of its own.
    """
    if isinstance(value, (dict, list)):
        if len(str(value)) > 4 * MAX_SIZE_ARG:
            raise ValueError(f"takes values of at most {4 * MAX_SIZE_ARG} characters together")
        inner = partial(_argument, name, longest=MAX_SIZE_ARG // 16)
        # Faker wants weights in an OrderedDict
        return OrderedDict((inner(k), inner(v)) for k, v in value.items()) if isinstance(value, dict) else [
            *map(inner, value)]
    if isinstance(value, str):
        if "{" in value or len(value) > longest:
            raise ValueError(f"a text here has no braces and at most {longest} characters")
        return _dated(name, value)
    limit = MAX_INT if _VALUE_ARG.fullmatch(name) else _MOST.get(name, MAX_SIZE_ARG)
    if isinstance(value, (int, float)) and abs(value) > limit:
        raise ValueError(f"should be at most {limit}")
    return value


def _read_argument(name: str, value: Any) -> Any:
    """The same for one that is read from a field, where only the message can name it."""
    try:
        return _argument(name, value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_words(words: Any, room: int) -> None:
    """Text is made of words until it is full, and begun again where not even the first sentence fits."""
    longest = room - 1 if room < 25 else room // 4
    fit = isinstance(words, list) and all(type(word) is str and 1 <= len(word) <= longest for word in words)
    if words and not fit:
        raise ValueError(f"ext_word_list: in {room} characters (max_nb_chars) should be words of 1 to {longest}")


class FakerField(FieldType):
    """A method of Faker with its keyword `args`; an argument "{field}" is that field's value."""

    redraws: ClassVar = REDRAWS
    args: dict[str, Any] = {}

    @functools.cached_property
    def holes(self) -> dict[str, str]:
        """The arguments that are another field's value, and the field."""
        found = {name: re.fullmatch(r"\{([^{}]+)\}", value) for name, value in self.args.items() if type(value) is str}
        return {name: hole[1] for name, hole in found.items() if hole}

    def reads(self) -> Iterable[str]:
        return self.holes.values()

    def work(self) -> int:
        sizes = {name: value if type(value) in (int, float) else len(value) if isinstance(value, (str, list)) else 0
                 for name, value in self.args.items() if not _VALUE_ARG.fullmatch(name)}
        return 1 + sum(int(size) // (2 if name == "nb_sentences" else 50) for name, size in sizes.items()
                       if 0 < size <= MAX_SIZE_ARG)

    def domain(self, scope: Scope) -> Domain | None:
        table = None if self.args or scope.generator.several else scope.fast.table(self.type)
        values = list(dict.fromkeys(table or ()))
        return (len(values), values.__getitem__) if values else None

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        if problem := self._problem(scope.fast):
            raise scope.refuse(*problem)
        call = self._call(scope)
        kind = self._tried(scope, call)
        plain = kind == "text" and not self.holes and scope.fast.signature(self.type).return_annotation is str
        return (call if plain else _mapped(call, partial(self._held, kind))), kind

    def _problem(self, fast: FastFaker) -> tuple[str, ...] | None:
        """Why there is no such call, and at which step of the path."""
        if fast.provider(self.type) is None:
            return (f"no such type {self.type!r}{did_you_mean(self.type, [*FIELD_TYPES, *fast.names()])}",)
        signature = fast.signature(self.type)
        made = get_origin(signature.return_annotation) or signature.return_annotation
        if isinstance(made, type) and issubclass(made, Iterable) and not issubclass(made, str):
            # not even tried: a container's elements may be as large and as many as its arguments say
            return (f"{self.type!r} gives no single value",)
        known = {n: p for n, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        known.pop("seed", None)  # there is one seed
        for name in [name for name in self.args if name not in known]:
            takes = ", ".join(nearest(name, known) or known) or "no arguments"
            return f"{self.type} has no argument {name!r}; it takes {takes}", "args", name
        missing = [name for name, p in known.items() if p.default is p.empty and name not in self.args]
        return (f"{self.type} needs {', '.join(missing)}", "args") if missing else None

    def _call(self, scope: Scope) -> Draw:
        """The method with its arguments, each of which is bounded whatever way it comes."""
        method, fixed = scope.fast.method(self.type), {}
        reads = {name: _mapped(scope.at("args", name).reader(field)[0], partial(_read_argument, name))
                 for name, field in self.holes.items()}
        for name, value in self.args.items():
            try:
                if name not in reads:
                    fixed[name] = _argument(name, value)
            except ValueError as error:
                raise scope.refuse(str(error), "args", name) from None
        room = "ext_word_list" in self.args and scope.fast.signature(self.type).parameters.get("max_nb_chars")

        def arguments() -> dict[str, Any]:
            given = fixed | {name: read() for name, read in reads.items()}
            if room:
                _check_words(given["ext_word_list"], given.get("max_nb_chars", room.default))
            return given

        if reads:
            return lambda: method(**arguments())
        try:
            return partial(method, **arguments()) if fixed else method
        except ValueError as error:
            raise scope.refuse(str(error), "args") from None

    def _tried(self, scope: Scope, call: Draw) -> Kind:
        """The kind that a few values have: the same ones again from the same state."""
        state = scope.rng.getstate()
        try:
            if len(str(call())) > MAX_TEXT:
                raise ValueError(f"values are longer than {MAX_TEXT} characters")
            trials = TRIALS if self.work() < 5 else 4
            scope.rng.setstate(state)
            values = [call() for _ in range(trials)]
            scope.rng.setstate(state)
            again = [call() for _ in range(trials)]
        except Exception as error:  # noqa: BLE001  # whatever Faker makes of the arguments
            raise scope.refuse(str(error) or type(error).__name__, *["args"][: len(self.args)]) from None
        kinds = {_SCALARS.get(type(value)) for value in values if value is not None}
        if None in kinds or not kinds:
            raise scope.refuse(f"{self.type!r} gives no single value")
        if values != again:
            raise scope.refuse(f"{self.type!r} ignores the seed")
        whole = all(type(value) is not int or abs(value) <= MAX_INT for value in values)
        return (kinds.pop() if len(kinds) == 1 and whole else None) or "text"

    def _held(self, kind: Kind, value: Any) -> Any:
        """A value as JSON would have it, held to the kind that the trial showed."""
        if kind != "text" and _SCALARS.get(type(value)) != kind:
            raise TaskError(f"{self.type} gave {value!r} where it had given {kind}")
        plain = _PLAIN[type(value)](value) if type(value) in _PLAIN else value
        if kind != "text":
            return plain
        if len(text := str(plain)) > MAX_TEXT:
            raise TaskError(f"{self.type} gave more than {MAX_TEXT} characters")
        return text


def _refusal(problems: Sequence[FieldProblem]) -> BadRequest:
    """One error for several problems, which it counts."""
    more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
    return BadRequest(f"{problems[0].field}: {problems[0].message}{more}", problems)


# What people call types elsewhere, and the types they mean.
_MEANT = {"string": "word, text or pattern", "str": "word, text or pattern", "number": "int, float or decimal",
          "integer": "int", "timestamp": "datetime", "regex": "pattern", "enum": "choice", "array": "list"}
_MEANT_TOO = {"boolean": "bool", "text": "word, pattern or template"}  # these are methods of Faker as well


def _option_problem(cls: type[FieldType], name: str, problem: Mapping[str, Any]) -> str:
    """What is wrong with an option; for one that a type does not have, those that it has."""
    if problem["type"] != "extra_forbidden" or len(problem["loc"]) != 1:
        return problem_message(problem)
    option = str(problem["loc"][0])
    options = [f.alias or key for key, f in cls.model_fields.items() if key != "type"]
    options = sorted(options, key=("null", "unique").__contains__)
    arguments = "; what Faker's method takes goes into args" if cls is FakerField else ""
    arguments += f"; or say {_MEANT_TOO[name]}" if name in _MEANT_TOO else ""
    return f"{name} has no option {option!r}{did_you_mean(option, options)}; it takes {', '.join(options)}{arguments}"


def parse_field(raw: Any, path: str, depth: int = 0) -> FieldType:
    """A field's description, checked: a type's name or an object with `type`. BadRequest names each option at fault."""
    if depth > MAX_DEPTH:
        raise BadRequest.of(path, f"fields go at most {MAX_DEPTH} deep")
    spec = {"type": raw} if isinstance(raw, str) else raw
    if not isinstance(spec, dict) or not isinstance(name := spec.get("type"), str):
        raise BadRequest.of(path, "should be the name of a type, or an object with a type")
    if name in _MEANT and name not in FIELD_TYPES:
        raise BadRequest.of(path, f"no such type {name!r}; say {_MEANT[name]}")
    cls = FIELD_TYPES.get(name, FakerField)
    try:
        # A program's own types may be called by the names in Python, ours only by those on the wire.
        return cls.model_validate(spec, context=(path, depth), by_alias=True, by_name=cls.__module__ != __name__)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        details.sort(key=lambda detail: detail["type"] == "missing")  # a wrong name tells more than the one it is for
        raise _refusal([FieldProblem(".".join([path, *map(str, detail["loc"])]), _option_problem(cls, name, detail))
                        for detail in details]) from None


class _Container(FieldType):
    """A type with fields inside, which are checked with it."""

    _inner: list[tuple[tuple[str | int, ...], FieldType]]

    def inner(self) -> Iterable[tuple[tuple[str | int, ...], Any]]:
        """The way to each of them, and its description."""
        raise NotImplementedError

    def model_post_init(self, context: tuple[str, int]) -> None:
        """Check the fields inside."""
        path, depth = context
        self._inner = []
        for steps, raw in self.inner():
            at = ".".join([path, *map(str, steps)])
            self._inner.append((steps, model := parse_field(raw, at, depth + 1)))
            if model.unique:
                raise BadRequest.of(f"{at}.unique", "only the fields of the record itself can be unique")

    def reads(self) -> Iterable[str]:
        return [name for _, model in self._inner for name in model.reads()]

    def work(self) -> int:
        return 1 + sum(model.work() for _, model in self._inner)

    def nested(self, scope: Scope) -> Iterator[tuple[Draw, Kind]]:
        """Each of them as a function."""
        for steps, model in self._inner:
            draw, kind = model.draw(scope.at(*steps))
            yield _nullable(draw, model.null, scope.rng), kind


# ---- Field types: the built-in ones ----


@field_type("sequence", start=1000)
class SequenceField(FieldType):
    """1, 2, 3...: `start`, and `step` more for each record before this one."""

    distinct: ClassVar = True
    start: int = Field(1, ge=-MAX_INT, le=MAX_INT)
    step: int = Field(1, ge=1, le=2**32)

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        generator, start, step = scope.generator, self.start, self.step
        if start + step * generator.type.bound > MAX_INT:
            raise scope.refuse(f"goes past {MAX_INT}", "start")
        return lambda: start + step * generator.done, "int"


class _Number(FieldType):
    model_config = ConfigDict(json_schema_extra={"dependentRequired": {"mean": ["sd"], "sd": ["mean"]}})

    mean: float | None = None
    sd: float | None = Field(None, gt=0)

    def bell(self, scope: Scope, low: float, high: float) -> Draw | None:
        """A normal draw, drawn again if out of bounds, at last put at the nearer one; None without mean and sd."""
        if low > high:
            raise scope.refuse(f"min {low} is more than max {high}", "min")
        if (self.mean is None) != (self.sd is None):
            raise scope.refuse("mean and sd go together", "mean" if self.mean is None else "sd")
        if self.mean is None or self.sd is None:
            return None
        gauss, mean, sd = scope.rng.gauss, self.mean, self.sd

        def draw() -> float:
            for _ in range(16):
                if low <= (value := gauss(mean, sd)) <= high:
                    break
            return min(max(value, low), high)

        return draw


@field_type("int", min=18, max=65)
class IntField(_Number):
    """A whole number from `min` to `max`, both included, a `multipleOf`; with `mean` and `sd` bell-shaped."""

    min: int = Field(0, ge=-MAX_INT, le=MAX_INT)
    max: int = Field(9999, ge=-MAX_INT, le=MAX_INT)
    multiple_of: int = Field(1, ge=1, le=MAX_INT)

    def domain(self, scope: Scope) -> Domain:
        step, first = self.multiple_of, -(-self.min // self.multiple_of)
        return self.max // step - first + 1, lambda i: (first + i) * step

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        step, bell = self.multiple_of, self.bell(scope, self.min, self.max)
        low, high = -(-self.min // step) * step, self.max // step * step
        if low > high:
            raise scope.refuse(f"no multiple of {step} lies between {self.min} and {self.max}", "multipleOf")
        even = _pick(scope.rng, range(low, high + 1, step))
        return (lambda: min(max(round(bell() / step) * step, low), high)) if bell else even, "int"


@field_type("float", min=0, max=500, mean=80, sd=30, round=2)
class FloatField(_Number):
    """A number from `min` to `max`, with `round` digits after the point; with `mean` and `sd` bell-shaped.

    Or, from `min` to `max`, a `multipleOf` a number.
    """

    redraws: ClassVar = REDRAWS
    min: float = Field(0, ge=-1e300, le=1e300)
    max: float = Field(1, ge=-1e300, le=1e300)
    round: int | None = Field(None, ge=0, le=15)
    multiple_of: float | None = Field(None, gt=0)

    def scaled(self, digits: int) -> tuple[int, int]:
        """The bounds, counted in units of the last digit."""
        low, high = (EXACT.scaleb(Decimal(repr(bound)), digits) for bound in (self.min, self.max))
        return math.ceil(low), math.floor(high)

    def domain(self, scope: Scope) -> Domain | None:
        if self.round is None or max(abs(self.min), abs(self.max)) > 1e15:
            return None
        (first, last), scale = self.scaled(self.round), 10**self.round
        return last - first + 1, lambda i: (first + i) / scale

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        low, high, digits, uniform = self.min, self.max, self.round, scope.rng.random
        draw = self.bell(scope, low, high) or (lambda: min(low + (high - low) * uniform(), high))
        if self.multiple_of:
            step = Fraction(repr(self.multiple_of))
            multiples = range(math.ceil(Fraction(low) / step), math.floor(Fraction(high) / step) + 1)
            if multiples.stop <= multiples.start:
                raise scope.refuse(f"no multiple of it lies between {low} and {high}", "multipleOf")
            return _mapped(_pick(scope.rng, multiples), lambda times: float(times * step)), "float"
        if digits is None:
            return draw, "float"
        first, last = self.scaled(digits)
        if first > last:
            raise scope.refuse(f"no number with {digits} digits after the point lies between {low} and {high}", "round")
        least, most = first / 10**digits, last / 10**digits
        return lambda: min(max(round(draw(), digits), least), most), "float"


@field_type("decimal", min="0.01", max="99.99", places=2)
class DecimalField(_Number):
    """An exact number from `min` to `max` with `places` digits after the point, kept as text: money."""

    kind: ClassVar[Kind] = "decimal"
    min: str | int | float = "0"
    max: str | int | float = "999.99"
    places: int = Field(2, ge=0, le=18)

    def scaled(self, scope: Scope) -> tuple[int, int]:
        """The bounds, counted in units of the last place."""
        bounds = []
        for option, inwards in (("min", math.ceil), ("max", math.floor)):
            try:
                value = Decimal(str(getattr(self, option)))
            except InvalidOperation:
                value = Decimal("NaN")
            if not value.is_finite() or value.adjusted() > 30 or value.adjusted() < -1000:
                raise scope.refuse("should be a decimal number up to 1e30", option)
            bounds.append(inwards(EXACT.scaleb(value, self.places)))
        return bounds[0], bounds[1]

    def text(self, scaled: int) -> str:
        """The number as text, "-0.05" for -5 units."""
        return format(EXACT.scaleb(Decimal(scaled), -self.places), "f")

    def domain(self, scope: Scope) -> Domain:
        low, high = self.scaled(scope)
        return high - low + 1, lambda i: self.text(low + i)

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        (low, high), text, scale = self.scaled(scope), self.text, 10**self.places
        bell = self.bell(scope, low / scale, high / scale)
        return (lambda: text(min(max(round(bell() * scale), low), high)), "decimal") if bell else super().draw(scope)


@field_type("bool", true=0.8)
class BoolField(FieldType):
    """True or false; `true` is how likely true is."""

    true: float = Field(0.5, ge=0, le=1)

    def domain(self, scope: Scope) -> Domain:
        return 2, bool

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        uniform, true = scope.rng.random, self.true
        return lambda: uniform() < true, "bool"


def _literal_kind(values: list[Any]) -> Kind:
    """The kind of values that a request lists; "json" keeps a mixture as it is."""
    kinds = {_SCALARS.get(type(value), "json") for value in values if value is not None}
    if any(type(value) is int and abs(value) > MAX_INT for value in values):
        return "json"
    return "float" if kinds == {"int", "float"} else kinds.pop() if len(kinds) == 1 else "json" if kinds else "text"


@field_type("choice", values={"free": 80, "pro": 18, "team": 2})
class ChoiceField(FieldType):
    """One of `values`: a list, or an object that gives each text its weight."""

    values: Annotated[list[Any] | dict[str, float], Field(min_length=1), WithJsonSchema({"anyOf": [
        {"type": "array", "items": {}, "minItems": 1},
        {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}, "minProperties": 1}]})]

    def domain(self, scope: Scope) -> Domain:
        values = list({_dumps(value): value for value in self.values}.values())
        return len(values), values.__getitem__

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        if max(len(_dumps(value)) for value in self.values) > MAX_TEXT:
            raise scope.refuse(f"a value has at most {MAX_TEXT} characters", "values")
        if isinstance(self.values, list):
            return _pick(scope.rng, self.values), _literal_kind(self.values)
        if min(self.values.values()) < 0 or not 0 < sum(self.values.values()) < math.inf:
            raise scope.refuse("a weight is 0 or more, and not all of them 0", "values")
        return _pick(scope.rng, OrderedDict(self.values)), "text"


@field_type("const", value="EUR")
class ConstField(FieldType):
    """Always `value`."""

    value: Any

    def domain(self, scope: Scope) -> Domain:
        return 1, lambda i: self.value

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        return lambda: self.value, _literal_kind([self.value])


_BOUND = re.compile(
    r"(?:(?P<name>now|today)|\{(?P<field>[^{}]+)\}|(?P<iso>\d{4}-\d\d-\d\d(?:[T ][\d:.]+(?:Z|[+-]\d\d:\d\d)?)?))?"
    r"(?P<shift>(?:[+-]\d{1,6}[yMwdhms])*)")
_UNITS = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
DAY = 86_400_000  # milliseconds


def _shifted(moment: datetime, shift: str) -> int:
    """A moment moved by "+1y-2d", in milliseconds since 1970; a month after 31 January is the end of February."""
    for amount, unit in re.findall(r"([+-]\d+)(\w)", shift):
        if unit in _UNITS:
            moment += timedelta(**{_UNITS[unit]: int(amount)})
        else:
            year, month = divmod(moment.year * 12 + moment.month - 1 + int(amount) * (12 if unit == "y" else 1), 12)
            day = min(moment.day, calendar.monthrange(year, month + 1)[1])
            moment = moment.replace(year=year, month=month + 1, day=day)
    return (moment - EPOCH) // timedelta(milliseconds=1)


def _moment(text: str, last: bool) -> datetime:
    """An ISO date or instant in UTC; a date stands for its first or its last millisecond."""
    moment = datetime.fromisoformat(text)
    moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment + timedelta(milliseconds=DAY - 1) if last and len(text) == 10 else moment


@field_type("datetime", **{"from": "2024-01-01", "to": "2024-12-31"})
class DatetimeField(FieldType):
    """An instant in UTC between `from` and `to`, both included, as YYYY-MM-DDTHH:MM:SSZ, with milliseconds if `ms`.

    A bound is ISO ("2024-12-31"), relative to now ("-90d", "-1y", "+2h", "now", "today"; units y M w d h m s), or
    another field, moved or not ("{joined}", "{order.placedAt}+2h").
    """

    kind: ClassVar[Kind] = "datetime"
    from_: str = Field("-1y", alias="from", max_length=200)
    to: str = Field("now", max_length=200)
    ms: bool = False

    def unit(self) -> int:
        """The milliseconds between two neighbours."""
        return 1 if self.ms else 1000

    def text(self, units: int) -> str:
        """A value, counted in units since 1970, as text."""
        if self.ms:
            return (EPOCH + timedelta(milliseconds=units)).isoformat(timespec="milliseconds")[:-6] + "Z"
        return (EPOCH + timedelta(seconds=units)).isoformat()[:-6] + "Z"

    def first(self, millis: int) -> int:
        """The first unit that does not come before this moment; of days, the one it lies in."""
        return -(-millis // self.unit()) if self.kind == "datetime" else millis // DAY

    def reads(self) -> Iterable[str]:
        return [found["field"] for found in map(_BOUND.fullmatch, (self.from_, self.to)) if found and found["field"]]

    def parts(self, scope: Scope, option: str) -> re.Match[str]:
        """What a bound is made of."""
        if (text := getattr(self, option)) and (found := _BOUND.fullmatch(text)):
            return found
        raise scope.refuse(f"{text!r} is no date such as 2024-12-31, -90d, now or {{joined}}", option.rstrip("_"))

    def fixed(self, scope: Scope, option: str) -> int:
        """A bound that is no other field's value, in milliseconds since 1970."""
        found, me = self.parts(scope, option), scope.generator
        iso = found["iso"] or (me.now.date() if found["name"] == "today" else me.now).isoformat()
        try:
            return _shifted(_moment(iso, option == "to"), found["shift"])
        except (ValueError, OverflowError) as error:
            raise scope.refuse(f"{found[0]!r}: {error}", option.rstrip("_")) from None

    def bound(self, scope: Scope, option: str) -> Draw:
        """A function that gives a record's bound in milliseconds since 1970, null where the field it reads is null."""
        found = self.parts(scope, option)
        if not found["field"]:
            fixed = scope.settled(partial(self.fixed, scope, option))
            return lambda: fixed[0]
        read, kind = scope.reader(found["field"])
        if kind not in ("date", "datetime"):
            raise scope.refuse(f"{found['field']} is no date", option.rstrip("_"))
        return _mapped(read, lambda value: _shifted(_moment(value, option == "to"), found["shift"]))

    def ends(self, scope: Scope) -> tuple[str, str] | None:
        """The earliest and the latest value there can be; None if that is not known."""
        first, last = self.extreme(scope, "from_", 0), self.extreme(scope, "to", 1)
        return None if first is None or last is None else (self.text(self.first(first)), self.text(last // self.unit()))

    def extreme(self, scope: Scope, option: str, end: int) -> int | None:
        """How early (end 0) or late (end 1) a bound can be, in milliseconds since 1970; None if that is not known."""
        found = self.parts(scope, option)
        if not found["field"]:
            return self.fixed(scope, option)
        owner, column = scope.owner(found["field"])
        model = owner.type.fields[column]
        ends = model.ends(replace(scope, generator=owner)) if isinstance(model, DatetimeField) else None
        return _shifted(_moment(ends[end], option == "to"), found["shift"]) if ends else None

    def check_order(self, scope: Scope) -> None:
        """Refuse bounds of which one is another field's value, where that may be on the wrong side of the other."""
        if len(set(self.reads())) == len(list(self.reads())) == 1:
            latest, earliest = self.extreme(scope, "from_", 1), self.extreme(scope, "to", 0)
            if latest is not None and earliest is not None and self.first(latest) > earliest // self.unit():
                raise scope.refuse(f"may have to come after {self.text(self.first(latest))} (from {self.from_}) and "
                                   f"before {self.text(earliest // self.unit())} (to {self.to})", "from")

    def domain(self, scope: Scope) -> Domain | None:
        if self.reads():
            return None
        first, last = self.first(self.fixed(scope, "from_")), self.fixed(scope, "to") // self.unit()
        if first > last:
            raise scope.refuse(f"from {self.from_!r} comes after to {self.to!r}", "from")
        return last - first + 1, lambda i: self.text(first + i)

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        if not self.reads():
            return super().draw(scope)
        low, high, uniform, unit = self.bound(scope, "from_"), self.bound(scope, "to"), scope.rng.random, self.unit()
        scope.settled(partial(self.check_order, scope))

        def draw() -> str | None:
            u, start, end = uniform(), low(), high()
            if start is None or end is None:
                return None
            first, last = self.first(start), end // unit
            if first > last:
                raise BadRequest.of(scope.path, f"from {self.from_} comes after to {self.to}")
            return self.text(first + int(u * (last - first + 1)))

        return draw, self.kind


@field_type("date", **{"from": "-1y", "to": "now"})
class DateField(DatetimeField):
    """A date between `from` and `to`, both included, as YYYY-MM-DD; bounds as for datetime.

    Without bounds, what Faker's method of that name gives: a date since 1970.
    """

    kind: ClassVar[Kind] = "date"
    from_: str = Field("1970-01-01", alias="from", max_length=200)
    ms: ClassVar[bool] = False  # type: ignore[misc]

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        if self.model_fields_set & {"from_", "to"}:
            return super().draw(scope)
        return FakerField.model_validate({"type": "date"}).draw(scope)[0], "date"

    def unit(self) -> int:
        return DAY

    def text(self, units: int) -> str:
        return date.fromordinal(EPOCH.toordinal() + units).isoformat()


@field_type("pattern", pattern="SKU-####-??")
class PatternField(FieldType):
    r"""Text in which each # is a digit, % a digit but 0, ? a capital letter; a backslash keeps the mark after it.

    Or a text of `minLength` to `maxLength` characters in which the regular expression `regex` is found.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["pattern"]}, {"required": ["regex"]}]})

    redraws: ClassVar = REDRAWS
    pattern: str = Field("", max_length=256)
    regex: str | None = Field(None, max_length=MAX_SIZE_ARG)
    min_length: int = Field(0, ge=0, le=MAX_TEXT)
    max_length: int = Field(MAX_TEXT, ge=0, le=MAX_TEXT)

    @functools.cached_property
    def automaton(self) -> Regex:
        """The regular expression, as far as it was read; ValueError if it can not be used."""
        return Regex(self.regex or "")

    def work(self) -> int:
        with suppress(ValueError):  # which is told when it is drawn from
            return 1 + self.automaton.size // 200 + self.min_length // 20
        return 1

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        if bool(self.pattern) is (self.regex is not None):
            raise scope.refuse("needs a pattern or a regex")
        if self.regex is None:
            return super().draw(scope)
        if self.unique:
            raise scope.refuse("a regex can not be unique, a pattern can", "unique")
        try:
            return self.automaton.draw(scope.rng, self.min_length, self.max_length), "text"
        except ValueError as error:
            raise scope.refuse(str(error), "regex") from None

    def domain(self, scope: Scope) -> Domain:
        marks = {"#": string.digits, "%": string.digits[1:], "?": string.ascii_uppercase}
        wheels = [marks.get(token, token[-1]) for token in re.findall(r"\\?.", self.pattern, re.DOTALL)]

        def nth(i: int) -> str:
            letters = []
            for wheel in reversed(wheels):
                i, turn = divmod(i, len(wheel))
                letters.append(wheel[turn])
            return "".join(reversed(letters))

        return math.prod(map(len, wheels)), nth


@field_type("phrase", minLength=20, maxLength=60)
class PhraseField(FieldType):
    """Words, cut to a text of `minLength` to `maxLength` characters."""

    min_length: int = Field(1, ge=0, le=MAX_TEXT)
    max_length: int = Field(MAX_TEXT, ge=0, le=MAX_TEXT)

    def work(self) -> int:
        return 1 + self.min_length // 50

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        low, word = self.min_length, scope.fast.method("word")
        if low > self.max_length:
            raise scope.refuse(f"minLength {low} is more than maxLength {self.max_length}", "minLength")
        length = _pick(scope.rng, range(low, min(self.max_length, low + 40) + 1))

        def draw() -> str:
            size, text = length(), ""
            while len(text) < size:
                text += f"{word()} " if len(text) < 400 else text
            return text[:size - 1] + text[size - 1:size].replace(" ", "s")

        return draw, "text"


@field_type("uuid")
class UuidField(FieldType):
    """A random UUID (version 4)."""

    distinct: ClassVar = True

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        getrandbits = scope.rng.getrandbits
        return lambda: str(UUID(int=getrandbits(128), version=4)), "text"


def _slug(text: str) -> str:
    """The text as an address has it: Jean-Luc Müller is jean-luc-muller."""
    if not text.isascii():
        from faker.decode import unidecode

        text = unidecode(text)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


_HOLE = re.compile(r"\{\{|\}\}|\{([^{}|]+)((?:\|[^{}|]+)*)\}|[{}]")
_FILTERS: dict[str, Callable[[str], str]] = {"slug": _slug, "lower": str.lower, "upper": str.upper}


@field_type("template", template="{plan}-{id}")
class TemplateField(FieldType):
    """Text made of other fields, "{firstName|slug}.{id}@example.com"; {{ and }} are braces.

    A field is one of this record or of a related one ("{customer.name}"); the filters are slug, lower and upper.
    """

    redraws: ClassVar = 0
    template: str = Field(max_length=MAX_SIZE_ARG)

    def reads(self) -> Iterable[str]:
        return [hole[1] for hole in _HOLE.finditer(self.template) if hole[1]]

    def ending(self) -> str:
        return self.template.rpartition("}")[2]

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        holes = list(_HOLE.finditer(self.template))
        if any(hole[0] in ("{", "}") for hole in holes):
            raise scope.refuse("a lone brace; double it to keep it", "template")
        parts = [self._part(scope, hole[1], hole[2].split("|")[1:]) for hole in holes if hole[1]]
        if len(parts) > 64:
            raise scope.refuse("a template holds at most 64 fields", "template")
        form = _HOLE.sub(lambda hole: "%s" if hole[1] else hole[0][0], self.template.replace("%", "%%"))
        return lambda: (form % tuple([part() for part in parts]))[:MAX_TEXT], "text"

    def _part(self, scope: Scope, name: str, filters: list[str]) -> Draw:
        read, _ = scope.reader(name)
        for unknown in [name for name in filters if name not in _FILTERS]:
            raise scope.refuse(f"no such filter {unknown!r}{did_you_mean(unknown, _FILTERS)}", "template")
        steps = [_FILTERS[name] for name in filters]

        def part() -> str:
            value = read()
            if type(value) is not str:
                value = "" if value is None else str(value) if type(value) in (int, float) else _dumps(value)
            for step in steps:
                value = step(value)
            return value

        return part


@field_type("list", of="word", min=0, max=3)
class ListField(_Container):
    """A list of `min` to `max` values of the type `of`, stored as JSON; with `uniqueItems` no two of them are equal.

    Before them come values of the types in `prefix`, one of each.
    """

    of: Spec
    min: int = Field(1, ge=0, le=1000)
    max: int = Field(3, ge=0, le=1000)
    prefix: list[Spec] = Field([], max_length=100)
    unique_items: bool = False

    def inner(self) -> Iterable[tuple[tuple[str | int, ...], Any]]:
        return [(("of",), self.of), *((("prefix", number), raw) for number, raw in enumerate(self.prefix))]

    def work(self) -> int:
        return 1 + self.max * (1 + self._inner[0][1].work()) + sum(model.work() for _, model in self._inner[1:])

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        if self.min > self.max:
            raise scope.refuse(f"min {self.min} is more than max {self.max}", "min")
        (draw, _), *first = self.nested(scope)
        if self.max * scope.longest(draw, "of") > MAX_TEXT:
            raise scope.refuse(f"could be longer than {MAX_TEXT} characters", "max")
        length = _pick(scope.rng, range(self.min, self.max + 1))
        before = [each for each, _ in first]
        if self.unique_items:
            return partial(self._different, before, draw, length), "json"
        return lambda: [*[each() for each in before], *[draw() for _ in range(length())]], "json"

    def _different(self, first: list[Draw], draw: Draw, length: Draw) -> list[Any]:
        """Values of which no two are equal; fewer, where there are no more."""
        found, size = dict[str, Any](), len(first) + length()
        for tries in range(UNIQUE_TRIES):
            if len(found) >= size or (tries > 20 * size and len(found) >= len(first) + self.min):
                return [*found.values()]
            value = (first[len(found)] if len(found) < len(first) else draw)()
            found.setdefault(_sameness(value), value)
        raise TaskError(f"no {size} different items in {UNIQUE_TRIES} draws")


@field_type("object", fields={"city": "city", "zip": "postcode"})
class ObjectField(_Container):
    """An object with `fields` of its own, stored as JSON."""

    fields: dict[str, Spec] = Field(min_length=1, max_length=100)

    def inner(self) -> Iterable[tuple[tuple[str | int, ...], Any]]:
        return [(("fields", name), raw) for name, raw in self.fields.items()]

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        draws = [(name, draw) for name, (draw, _) in zip(self.fields, self.nested(scope), strict=True)]
        return lambda: {name: draw() for name, draw in draws}, "json"


@field_type("ref", field="customer.id")
class RefField(FieldType):
    """A field of a related record, "customer.id".

    In a record made `per` customer it is that customer's, else a random earlier customer's: the same row for all refs
    of a record. Refs with a name for `row`, and those to the record's own type, read another one, which is random
    too. A row is read `once` only, or once per parent. Null where there is none yet.
    """

    field: str
    row: str = ""
    once: bool = False

    def reads(self) -> Iterable[str]:
        return [self.field]

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        me = scope.generator
        name, _, column = self.field.partition(".")
        own = name == me.name and column in me.type.index
        if not (self.row or self.once or own):
            return scope.reader(self.field)
        owner, column = (me, column) if own else scope.find(self.field, me.others.values())
        most = me.type.spec.range[1] if me.parent else me.type.bound
        fewest = math.prod(t.spec.range[0] for t in [owner.type, *owner.type.ancestors()])
        if self.once and (fewest < most or owner.type.root is me.type.root):
            raise scope.refuse(f"there may be fewer than {most} different {owner.name} to refer to", "once")
        kind, lookup = scope.kind(owner, column), me.lookup(owner, self.row, self.once)
        return _mapped(lookup.reader(column, owner.values), _LOAD.get(kind)), kind


class _Arithmetic(FieldType):
    places: int | None = Field(None, ge=0, le=18)

    def fold(self, scope: Scope, kinds: Iterable[Kind], exact: Any, plain: Any) -> tuple[Callable[[Any], Any], Kind]:
        """The function from a list of stored numbers to one: `exact` joins two decimals, `plain` all the others."""
        found, places = set(kinds), self.places
        if odd := sorted(found - {"int", "float", "decimal"}):
            raise scope.refuse(f"takes numbers, not {' or '.join(odd)}")
        if "decimal" in found:
            quantum = None if places is None else Decimal(1).scaleb(-places)

            def join(values: list[Any]) -> str:
                total = functools.reduce(exact, [Decimal(str(value)) for value in values] or [Decimal(0)])
                return format(total if quantum is None else EXACT.quantize(total, quantum), "f")

            return join, "decimal"
        if "float" in found:
            return lambda values: float(plain(values) if places is None else round(plain(values), places)), "float"
        return plain, "int"


@field_type("sum", field="item.amount", places=2)
class SumField(_Arithmetic):
    """The sum of a field over the records made `per` this one: of its items' amounts an order's total."""

    field: str

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        child, column = scope.find(self.field, scope.generator.children)
        total, kind = self.fold(scope, [scope.kind(child, column)], EXACT.add, sum)
        slot, rows = child.type.index[column], child.siblings
        return lambda: total([row[slot] for row in rows if row[slot] is not None]), kind


@field_type("product", of=["price", "quantity"])
class ProductField(_Arithmetic):
    """The product of the fields in `of`, price times quantity, rounded to `places`; null if one of them is."""

    of: list[str] = Field(min_length=1, max_length=8)

    def reads(self) -> Iterable[str]:
        return self.of

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        reads, kinds = zip(*map(scope.reader, self.of), strict=True)
        total, kind = self.fold(scope, kinds, EXACT.multiply, math.prod)
        return lambda: None if None in (values := [read() for read in reads]) else total(values), kind


class _Alternatives(_Container):
    redraws: ClassVar = REDRAWS
    of: list[Spec] = Field(min_length=1, max_length=200)
    valid: Annotated[Any, WithJsonSchema({"type": ["object", "null"]})] = None  # a JSON Schema, or a test of values

    def inner(self) -> Iterable[tuple[tuple[str | int, ...], Any]]:
        return [(("of", number), raw) for number, raw in enumerate(self.of)]

    def possible(self, scope: Scope) -> Iterator[tuple[Draw, Kind]]:
        """Those that can be made in this locale, and are valid."""
        for steps, model in self._inner:
            steps = () if callable(self.valid) else steps  # which no client has written
            try:
                draw, kind = model.draw(scope.at(*steps))
                draw = self._valid(scope, _nullable(draw, model.null, scope.rng), kind)
                scope.longest(draw, *steps)
                yield draw, "float" if kind == "decimal" and self.valid is not None else kind
            except BadRequest as refusal:
                self._last = refusal

    def _valid(self, scope: Scope, draw: Draw, kind: Kind) -> Draw:
        if self.valid is None:
            return draw
        if not callable(self.valid) and not isinstance(self.valid, dict):
            raise scope.refuse("should be a JSON Schema, an object", "valid")
        wanted = self.valid if callable(self.valid) else partial(JsonSchema(self.valid).allows, nodes=[self.valid])
        plain = _mapped(draw, float if kind == "decimal" else None)

        def valid() -> Any:
            for _ in range(UNIQUE_TRIES):
                if wanted(value := plain()):
                    return value
            raise BadRequest.of(scope.path, f"no valid value in {UNIQUE_TRIES} draws")

        try:
            if len([*itertools.islice(filter(wanted, (plain() for _ in range(2 * TRIALS))), 2)]) > 1:
                return valid
        except TaskError as error:
            raise scope.refuse(str(error)) from None
        raise scope.refuse("makes hardly any valid value")


@field_type("first_of", of=["state_abbr", "province_abbr", "city"])
class FirstOfField(_Alternatives):
    """The first type of `of` that this locale can make: ["state_abbr", "province_abbr", "city"].

    With `valid`, a JSON Schema, the first that makes valid values, and those of its values.
    """

    def work(self) -> int:
        return 1 + max(model.work() for _, model in self._inner)

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        for found in self.possible(scope):
            return found
        raise self._last


@field_type("one_of", of=["word", "int"])
class OneOfField(_Alternatives):
    """A value of one of the types in `of`, each as likely; with `valid`, a JSON Schema, a valid one."""

    def draw(self, scope: Scope) -> tuple[Draw, Kind]:
        if not (found := [*self.possible(scope)]):
            raise self._last
        which, kinds = _pick(scope.rng, [draw for draw, _ in found]), {kind for _, kind in found}
        if len(kinds) == 1:
            return lambda: which()(), kinds.pop()
        return lambda: which()(), "text" if kinds <= {"text", "date", "datetime"} else "json"


# ---- JSON Schema: translated into the field types above ----

# Faker methods by the name of a field: letters only, in lower case.
_METHODS_BY_NAME = {
    name: method for method, names in {
        "first_name": "firstname forename givenname", "last_name": "lastname surname familyname",
        "name": "name fullname customer person contact", "user_name": "username login handle nickname",
        "phone_number": "phone phonenumber mobile telephone tel fax",
        "street_address": "street streetaddress addressline",
        "address": "address", "city": "city town", "country": "country", "country_code": "countrycode",
        "state": "state province region", "postcode": "postcode zip zipcode postalcode", "company": "company employer",
        "job": "job jobtitle occupation profession", "color_name": "color colour", "iban": "iban", "locale": "locale",
        "email": "email mail emailaddress", "url": "url website homepage",
        "datetime": "createdat updatedat deletedat modifiedat publishedat timestamp", "date": "birthdate birthday dob",
        "sentence": "title subject summary", "paragraph": "description comment comments notes text body",
    }.items() for name in names.split()}


class Impossible(Exception):
    """No value can be made for a place; `optional` where that is no fault if the place may as well be missing."""

    def __init__(self, pointer: str, message: str, *others: str, optional: bool = False) -> None:
        super().__init__(message)
        self.pointers, self.optional = dict.fromkeys(filter(None, [pointer, *others])) or {"": None}, optional


class NotHonoured(Impossible):
    """What a keyword means is not known here."""


class TooRich(Exception):
    """There would be too many fields, or too deep ones."""


class Place(dict[str, list[tuple[Any, str, dict[str, Json]]]]):
    """All that a schema says of one place in a record: by keyword its values, each with its JSON Pointer and the object
    that it stands in. A branch is `within` the place that it is a branch of.

    `nodes` are what a value has to meet; `refs` lead here, and those `above` would lead around. A `lean` one has no
    optional properties.
    """

    def __init__(self, above: frozenset[str] = frozenset(), within: Place | None = None, lean: bool = False) -> None:
        super().__init__({keyword: [*facts] for keyword, facts in (within or {}).items()})
        self.nodes: list[Json] = [] if within is None else [*within.nodes]
        self.refs: frozenset[str] = above if within is None else within.refs
        self.where: str = "" if within is None else within.where
        self.above, self.lean = self.refs, lean

    def said(self, *keywords: str) -> list[Any]:
        """What is said under these keywords."""
        return [value for keyword in keywords for value, _, _ in self.get(keyword, ())]

    def pointer(self, *keywords: str) -> str:
        """Where the first of these keywords is, or else the last part of the schema that says something of it."""
        return next((at for keyword in keywords for _, at, _ in self.get(keyword, ())), self.where)

    def bound(self, side: str, whole: bool) -> float | None:
        """The last number that all bounds admit; `side` is Minimum or Maximum."""
        sign = 1 if side == "Minimum" else -1
        found = [(sign * value, node.get(f"exclusive{side}") is True) for value, _, node in self.get(side.lower(), ())]
        found += [(sign * value, True) for value in self.said(f"exclusive{side}") if not isinstance(value, bool)]
        if not found:
            return None
        value: float
        value, excluded = max(found)
        if whole:
            return sign * (math.floor(value) + 1 if excluded else math.ceil(value))
        number = float(value)
        beyond = number < value or (excluded and number == value)
        return sign * (math.nextafter(number, math.inf) if beyond else number)

    def bounds(self, room: float, whole: bool = False) -> tuple[float, float | None]:
        """The least number, by default 0 or so much below the most, and the most."""
        least, most = self.bound("Minimum", whole), self.bound("Maximum", whole)
        if least is None:
            least = most - room if most is not None and most <= 0 else 0.0
        return least, most

    def range(self, what: str) -> tuple[int, float]:
        """The bounds of a number of things, such as Length; Impossible if they exclude each other."""
        low, high = max([0, *self.said(f"min{what}")]), min([math.inf, *self.said(f"max{what}")])
        if low > high:
            raise Impossible(self.pointer(f"min{what}"), f"min{what} {low} is more than max{what} {high}",
                             self.pointer(f"max{what}"))
        return math.ceil(low), high if high == math.inf else math.floor(high)


_NOTHING: dict[str, Any] = {"type": "const", "value": None}
_SOMETIMES = {"null": 0.1}
_NUMBER: Any = (int, float)
_SHAPES: dict[str, Any] = {
    **dict.fromkeys(("minimum", "maximum", "multipleOf", "minLength", "maxLength", "minItems", "maxItems",
                     "minProperties", "maxProperties"), _NUMBER),
    **dict.fromkeys(("$ref", "pattern", "format"), (str,)),
    **dict.fromkeys(("properties", "dependentRequired", "dependencies"), (dict,)),
    **dict.fromkeys(("enum", "required", "allOf", "anyOf", "oneOf", "prefixItems", "examples"), (list,)),
    "type": (str, list), "exclusiveMinimum": (int, float), "exclusiveMaximum": (int, float)}
_SHAPE_NAMES = {int: "a number", str: "a text", dict: "an object", list: "a list"}
_SIGNS = {  # what a keyword says of the type, where none is given
    "object": ("properties", "required", "additionalProperties", "minProperties", "propertyNames", "dependentRequired"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("format", "pattern", "minLength", "maxLength")}
# What faker-js calls otherwise than Faker does, by the last word of the name or by all of it.
_FAKER_JS: dict[str, Any] = {
    "fullName": "name", "company.name": "company", "companyName": "company", "jobTitle": "job", "zipCode": "postcode",
    "phone.number": "phone_number", "username": "user_name", "userName": "user_name", "ip": "ipv4",
    "mac": "mac_address", "human": "color_name", "rgb": "hex_color", "productName": "catch_phrase", "street":
    "street_name", "accountNumber": "bban", "birthdate": "date_of_birth", "words": "sentence", "lines": "sentence",
    "sentences": "paragraph", "paragraphs": "text", "timeZone": "timezone", "avatar": "image_url", "bio": "sentence",
    "port": "port_number", "boolean": "bool", "alpha": {"type": "pattern", "pattern": "?????"},
    "numeric": {"type": "pattern", "pattern": "#####"}, "alphanumeric": {"type": "pattern", "pattern": "?##?#"},
    "price": {"type": "float", "min": 1, "max": 1000, "round": 2}, "amount": {"type": "float", "max": 1000, "round": 2},
    "sex": {"type": "choice", "values": ["female", "male"]},
    **{name: {"type": "datetime", "from": first, "to": last} for name, first, last in (
        ("past", "-1y", "now"), ("recent", "-1d", "now"), ("future", "now", "+1y"), ("soon", "now", "+1d"))}}


def _faker_fields(hint: Json, pointer: str) -> list[dict[str, Any]]:
    """The fields that a Faker method means, named as Faker or as faker-js does; of instants also their dates."""
    pairs = [(hint, {})] if isinstance(hint, str) else [*hint.items()] if isinstance(hint, dict) else []
    if len(pairs) != 1 or not isinstance(pairs[0][1], dict):
        raise Impossible(pointer, "should be the name of a Faker method, or an object of a name and its arguments")
    (name, args), = pairs
    last = name.rpartition(".")[2]
    found = _FAKER_JS.get(name) or _FAKER_JS.get(last) or to_snake(last)
    field = {"type": found} if isinstance(found, str) else found
    options = args if field["type"] in FIELD_TYPES else {"args": args} if args else {}
    dated = [{**field, **options, "type": "date"}] if field["type"] == "datetime" else []
    return [{**field, **options}, *dated]


class Translation:
    """A JSON Schema as the fields of a record type, with optional properties down to a depth of `rich`.

    Raises Impossible; TooRich if that makes more than can be tried.
    """

    def __init__(self, schema: JsonSchema, rich: int) -> None:
        self.schema, self.rich, self.left = schema, rich, 2_400.0

    def fields(self) -> dict[str, Any]:
        """A description of each property of a record."""
        place = Place(frozenset([""]))
        self._include(place, self.schema.root, "")
        return self._record(place)

    def _record(self, place: Place) -> dict[str, Any]:
        """The properties of all records: of the first branch that can be, since all have the same columns."""
        if "object" not in (self._types(place) or ["object"]) or "enum" in place or "const" in place:
            raise NotHonoured(place.pointer("enum", "const", "type"), "should describe an object with properties")
        if not (keyword := next((key for key in ("oneOf", "anyOf") if key in place), "")):
            return self._properties(place, 0, 1)
        refused = Impossible(place.pointer(keyword), "no branch fits records that all have the same fields")
        for number, lean in product(range(len(place.said(keyword)[0])), (False, True)):
            try:
                branch = self._branch(place, keyword, number, lean)
                fields = self._record(branch)
                if self._fits({"type": "object", "fields": fields}, branch):
                    return fields
            except Impossible as error:
                refused = error if type(error) is NotHonoured else refused
        raise refused

    def _fits(self, field: dict[str, Any], place: Place) -> bool:
        """Whether what this field makes is valid."""
        generator = RecordGenerator(RecipeType("sample", RecordSpec(count=1, schema={"": field}), ""), {}, False, EPOCH)
        try:
            draw, _ = parse_field(field, "").draw(Scope(generator, "en_US", ""))
            return all(self.schema.allows(draw(), place.nodes) for _ in range(TRIALS))
        except TaskError:
            return False

    def _spend(self, work: float) -> None:
        self.left -= work
        if self.left < 0:
            raise TooRich

    def _include(self, place: Place, node: Json, pointer: str) -> None:
        """Let a place be what a part of the schema says, besides what it is already."""
        place.nodes.append(node)
        place.where = pointer
        self._add(place, node, pointer, ())

    def _add(self, place: Place, node: Json, pointer: str, path: tuple[str, ...]) -> None:
        self._spend(0.1)
        if not isinstance(node, (dict, bool)) or node is False:
            what = "admits no value" if node is False else "should be an object, true or false"
            raise Impossible(pointer, what, optional=node is False)
        parts = self.schema.parts(node) if isinstance(node, dict) else {}
        for keyword, value in parts.items():
            at = f"{pointer}/{escaped(keyword)}"
            shape = _SHAPES.get(keyword, (object,))
            if not isinstance(value, shape) or (shape is _NUMBER and isinstance(value, bool)):
                raise Impossible(at, f"should be {_SHAPE_NAMES[shape[0]]}")
            if keyword in NOT_HONOURED or (keyword == "dependencies" and dict in map(type, value.values())):
                raise NotHonoured(at, f"{keyword} cannot be honoured")
            if keyword == "$ref":
                self._follow(place, value, at, path)
            elif keyword == "allOf":
                for number, part in enumerate(value):
                    self._add(place, part, f"{at}/{number}", path)
            else:
                place.setdefault(keyword, []).append((value, at, parts))

    def _follow(self, place: Place, ref: str, at: str, path: tuple[str, ...]) -> None:
        try:
            target, where = self.schema.resolve(ref)
        except (LookupError, ValueError, TypeError):
            raise NotHonoured(at, f"{ref!r} is nothing in this document") from None
        if where in place.above or where in path:
            raise Impossible(at, f"{ref!r} leads to itself again, without end", optional=True)
        if where not in place.refs:
            self._add(place, target, where, (*path, where))
            place.refs |= {where}

    def _types(self, place: Place) -> list[str] | None:
        """The types that are admitted; None if nothing is said of them."""
        found: list[str] | None = None
        for value, at, _ in place.get("type", ()):
            names = [value] if isinstance(value, str) else value
            for name in names:
                if not isinstance(name, str) or name not in _TYPE_TESTS:
                    raise Impossible(at, f"no such type {name!r}{did_you_mean(str(name), _TYPE_TESTS)}")
            names = [*names, "integer"] if "number" in names else names
            found = [name for name in found if name in names] if found is not None else names
            if not found:
                raise Impossible(at, f"{value!r} excludes what another type says")
        return found and [name for name in dict.fromkeys(found) if name != "integer" or "number" not in found]

    def _field(self, place: Place, name: str, depth: int, times: float) -> dict[str, Any]:
        """The description of a field; `times` is how many values it takes to make a record."""
        self._spend(times)
        if depth > MAX_DEPTH:
            raise TooRich
        types = self._types(place)
        if "const" in place or "enum" in place:
            return self._listed(place, [*([value] for value in place.said("const")), *place.said("enum")][0])
        if hints := place.said("x-faker", "faker"):
            fields = _faker_fields(hints[0], place.pointer("x-faker", "faker"))
            return self._checked(place, fields) | (_SOMETIMES if "null" in (types or ()) else {})
        for keyword in ("oneOf", "anyOf"):
            if keyword in place:
                return self._union(place, keyword, name, depth, times)
        return self._typed(place, types, name, depth, times)

    def _checked(self, place: Place, fields: list[dict[str, Any]], what: str = "first_of") -> dict[str, Any]:
        """Those values of these fields that are valid."""
        self._spend(2)
        return {"type": what, "of": fields, "valid": partial(self.schema.allows, nodes=tuple(place.nodes))}

    def _either(self, place: Place, found: Sequence[dict[str, Any]], check: bool = False) -> dict[str, Any]:
        """One of several fields; null once in ten where one of them may be."""
        null = any(field == _NOTHING or "null" in field for field in found) and self.schema.allows(None, place.nodes)
        fields = [{key: value for key, value in field.items() if key != "null"} for field in found if field != _NOTHING]
        if not fields:
            if not null:
                raise Impossible(place.pointer("oneOf", "anyOf", "type"), "no branch is valid")
            return _NOTHING
        one = self._checked(place, fields, "one_of") if check else (
            fields[0] if len(fields) == 1 else {"type": "one_of", "of": fields})
        return one | (_SOMETIMES if null else {})

    def _listed(self, place: Place, values: list[Json]) -> dict[str, Any]:
        """Those of some values that are valid."""
        self._spend(len(values) / 20)
        found = [value for value in values if self.schema.allows(value, place.nodes, formats=False)]
        if not found:
            raise Impossible(place.pointer("const", "enum", "examples"), "none of these is valid here")
        some = [value for value in found if value is not None]
        if not some:
            return _NOTHING
        field = {"type": "const", "value": some[0]} if len(some) == 1 else {"type": "choice", "values": some}
        return field | (_SOMETIMES if len(some) < len(found) else {})

    def _branch(self, place: Place, keyword: str, number: int, lean: bool = False) -> Place:
        """What a branch of the first of these says of a place, besides the rest."""
        (branches, at, _), *others = place[keyword]
        branch = Place(within=place, lean=lean)
        del branch[keyword]
        if others:
            branch[keyword] = others
        self._include(branch, branches[number], f"{at}/{number}")
        return branch

    def _union(self, place: Place, keyword: str, name: str, depth: int, times: float) -> dict[str, Any]:
        branches = place.said(keyword)[0]
        if branches and all(isinstance(branch, dict) and "const" in branch for branch in branches):
            return self._listed(place, [branch["const"] for branch in branches])
        if keyword == "oneOf":
            self._spend(len(branches) ** 2 / 5)  # each value is checked against each
        found, refused = list[dict[str, Any]](), Impossible(place.pointer(keyword), "has no branch")
        for number in range(len(branches)):
            try:
                branch = self._branch(place, keyword, number)
                if keyword == "anyOf" and depth > self.rich and any(field != _NOTHING for field in found):
                    continue
                found.append(self._field(branch, name, depth + 1, times))
                if keyword == "oneOf" and found[-1]["type"] == "object":
                    found.append(self._field(self._branch(place, keyword, number, True), name, depth + 1, times))
            except Impossible as refusal:
                if keyword == "oneOf" and isinstance(refusal, NotHonoured):
                    raise
                refused = refusal
        if not found:
            raise refused
        return self._either(place, found, check=keyword == "oneOf")

    def _typed(self, place: Place, types: list[str] | None, name: str, depth: int, times: float) -> dict[str, Any]:
        signs = [kind for kind, keywords in _SIGNS.items() if place.keys() & set(keywords)]
        if types is None and not signs and "examples" in place:
            return self._listed(place, place.said("examples")[0])
        found, refused = list[dict[str, Any]](), None
        for kind in (signs[:1] or ["string"]) if types is None else types:
            try:
                found.append(self._of_type(kind, place, name, depth, times))
            except Impossible as refusal:
                refused = refusal
        if refused and all(field == _NOTHING for field in found) and not (refused.optional and found):
            raise refused
        return self._either(place, found)

    def _of_type(self, kind: str, place: Place, name: str, depth: int, times: float) -> dict[str, Any]:
        if kind in ("null", "boolean"):
            return {"type": "bool"} if kind == "boolean" else _NOTHING
        if kind == "object":
            fields = self._properties(place, depth, times)
            return {"type": "object", "fields": fields} if fields else {"type": "const", "value": {}}
        if kind == "array":
            return self._array(place, depth, times)
        if kind == "integer":
            return self._integer(place, name if depth == 1 else "")
        return self._string(place, name) if kind == "string" else self._number(place)

    def _step(self, place: Place) -> Fraction | None:
        """What a number is a multiple of."""
        steps = [Fraction(repr(step)) for step in place.said("multipleOf")]
        if any(step <= 0 for step in steps):
            raise Impossible(place.pointer("multipleOf"), "should be more than 0")
        common = math.lcm(*(step.denominator for step in steps))
        return Fraction(math.lcm(*(int(step * common) for step in steps)), common) if steps else None

    def _integer(self, place: Place, name: str) -> dict[str, Any]:
        exact, most = self._step(place), 2**31 - 1 if "int32" in place.said("format") else MAX_INT
        step = exact.numerator if exact else 1
        room = 10 * max(step, 1000)
        low, high = place.bounds(room, whole=True)
        least = max(-most, int(low))
        if name.lower() == "id" and step == 1 and high is None and least <= 2**31:
            return {"type": "sequence", "start": max(1, least)}
        most = min(most, max(9999, least + room) if high is None else int(high))
        if -(-least // step) > most // step:
            self._exclude(place, f"no whole number{f' that is a multiple of {step}' if step > 1 else ''} lies "
                                 f"between {least} and {most}")
        field = {"type": "int", "min": least, "max": most, **({"multipleOf": step} if step > 1 else {})}
        return field if exact is None or exact.denominator == 1 else self._checked(place, [field])

    @staticmethod
    def _exclude(place: Place, message: str) -> NoReturn:
        bounds = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")
        first, *others = [at for keyword in bounds for _, at, _ in place.get(keyword, ())] or [place.where]
        raise Impossible(first, f"these bounds exclude each other: {message}", *others)

    def _number(self, place: Place) -> dict[str, Any]:
        step = self._step(place)
        if step and step.denominator == 1:
            return self._integer(place, "")
        room = max(1000.0, 10 * float(step or 0))
        least, high = place.bounds(room)
        most = least + max(room, abs(least)) if high is None else high
        least, most = max(least, -1e300), min(most, 1e300)
        if least > most:
            self._exclude(place, f"no number lies between {least} and {most}")
        if step:
            return self._checked(place, [{"type": "float", "min": least, "max": most, "multipleOf": float(step)}])
        field = {"type": "float", "min": least, "max": most}
        digits = [n for n in (2, 4, 6, 9) if max(abs(least), abs(most)) < 1e6 and (most - least) * 10**n >= 100]
        return field | ({"round": digits[0]} if digits else {})

    def _string(self, place: Place, name: str) -> dict[str, Any]:
        low, high = place.range("Length")
        if low > MAX_TEXT:
            raise Impossible(place.pointer("minLength"), f"should be at most {MAX_TEXT}")
        most, bounds = int(min(high, MAX_TEXT)), {"minLength": low} if low else {}
        if high < math.inf:
            bounds |= {"minLength": min(low or 1, most), "maxLength": most}
        formats = [_FORMATS[name] for name in place.said("format") if name in _FORMATS]
        for source, at, _ in place.get("pattern", ()):
            try:
                self._spend(self.schema.regex(source).size / 200 + low / 20)
            except ValueError as error:
                raise NotHonoured(at, str(error)) from None
        regexes = [*(regex for _, regex in formats), *place.said("pattern")]
        fields = [field for field, _ in formats if field]
        for regex in dict.fromkeys(regexes):
            if not bounds or self.schema.has_text(regex, low, most):
                fields.append({"type": "pattern", "regex": regex, **bounds})
        if regexes and not any(field["type"] == "pattern" for field in fields):
            raise Impossible(place.pointer("pattern", "format"), f"no text of {low} to {most} characters is like that",
                             place.pointer("maxLength", "minLength"))
        if len(regexes) == 1 and not (formats and bounds):
            return fields[0]
        if regexes:
            return self._checked(place, fields)
        words = {"type": "phrase", **bounds} if bounds else {"type": "word"}
        method = _METHODS_BY_NAME.get(re.sub(r"[^a-z]", "", name.lower()))
        if method and bounds:
            return self._checked(place, [{"type": method}, words])
        return {"type": "first_of", "of": [{"type": method}, words]} if method else words

    def _array(self, place: Place, depth: int, times: float) -> dict[str, Any]:
        low, most = place.range("Items")
        first = max([0, *map(len, place.said("prefixItems")), *(
            len(items) for items in place.said("items") if isinstance(items, list))])
        fields, rest = list[dict[str, Any]](), None
        more = max(low - first, min(most - first, max(low - first, 0) + (3 if depth <= self.rich else 1)))
        try:
            while len(fields) < min(first, most):
                fields.append(self._field(self._item(place, len(fields)), "", depth + 1, times))
            if more > 0 and (not first or low > first or place.keys() & {"items", "additionalItems"}):
                rest = self._field(self._item(place, first), "", depth + 1, times * more)
        except Impossible as refusal:
            if len(fields) < low or not refusal.optional:
                raise
        if not fields and not rest:
            return {"type": "const", "value": []}
        return {"type": "list", "of": rest or _NOTHING, "min": max(low - first, 0) if rest else 0,
                "max": int(more) if rest else 0, **({"prefix": fields} if fields else {}),
                **({"uniqueItems": True} if True in place.said("uniqueItems") else {})}

    def _item(self, place: Place, at: int) -> Place:
        """What is said of an item of a list."""
        item = Place(place.refs)
        for items, pointer, node in [*place.get("prefixItems", ()), *place.get("items", ())]:
            if isinstance(items, list):
                if at < len(items):
                    self._include(item, items[at], f"{pointer}/{at}")
                elif pointer.endswith("/items") and "additionalItems" in node:
                    self._include(item, node["additionalItems"], f"{pointer.removesuffix('items')}additionalItems")
            elif at >= len(node.get("prefixItems", ())):
                self._include(item, items, pointer)
        return item

    def _properties(self, place: Place, depth: int, times: float) -> dict[str, Any]:
        """The fields of an object: in the order of its properties, then those that are only required."""
        known = dict.fromkeys(chain.from_iterable(place.said("properties")))
        self._spend(len(known) / 20)
        rich, fields = depth <= self.rich and not place.lean, dict[str, Any]()
        low, high = place.range("Properties")
        required = self._required(place, known if rich else ())
        for name in dict.fromkeys([*known, *required]):
            room = high - len(fields) - len(required.keys() - fields.keys())
            if name in required or (rich and room > 0):
                self._property(place, name, fields, name in required, depth, times)
        if len(fields) > high:
            raise Impossible(place.pointer("maxProperties"), f"{len(fields)} are required")
        named = any(isinstance(others, dict) for others in place.said("additionalProperties")) and not known
        wanted = max(low, int(min(2, high)) if named and rich else 0)
        more = (name for name in self._names(place) if name not in fields and name not in known)
        for name in itertools.islice(more, wanted - len(fields)) if wanted > len(fields) else ():
            self._property(place, name, fields, len(fields) < low, depth, times)
        if len(fields) < low:
            raise Impossible(place.pointer("minProperties"), f"there are no {low} names for properties")
        return fields

    def _required(self, place: Place, names: Iterable[str]) -> dict[str, None]:
        """The names that an object needs, if it has these."""
        required = dict.fromkeys(chain.from_iterable(place.said("required")))
        needs = [pair for named in place.said("dependentRequired", "dependencies") for pair in named.items()]
        there = {*names}
        while more := [other for name, others in needs if name in there or name in required for other in others
                       if other not in required]:
            required.update(dict.fromkeys(more))
        if not all(isinstance(name, str) for name in required):
            raise Impossible(place.pointer("required", "dependentRequired", "dependencies"), "should list names")
        return required

    def _property(self, place: Place, name: str, fields: dict[str, Any], must: bool, depth: int, times: float) -> None:
        member = Place(place.refs)
        try:
            if not self.schema.allows(name, place.said("propertyNames")):
                raise Impossible(place.pointer("propertyNames"), f"does not admit {name!r}", optional=True)
            for known, at, _ in place.get("properties", ()):
                if name in known:
                    self._include(member, known[name], f"{at}/{escaped(name)}")
            for others, at, node in place.get("additionalProperties", ()):
                if name not in node.get("properties", ()):
                    self._include(member, others, at)
            fields[name] = self._field(member, name, depth + 1, times)
        except Impossible as refusal:
            if must or not refusal.optional:
                raise

    def _names(self, place: Place) -> Iterator[str]:
        """Names for further properties."""
        said = Place()
        for node, at, _ in place.get("propertyNames", ()):
            self._include(said, node, at)
        low, high = said.range("Length")
        drawn = [self.schema.regex(source).draw(random.Random(0), low, int(min(high, 99)))
                 for source in said.said("pattern")]
        likely = chain(*said.said("enum"), (draw() for draw in drawn for _ in range(50)),
                       (f"key{number}" for number in range(1, 1000)))
        return (name for name in likely if self.schema.allows(name, said.nodes))


def translated(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """A schema field by field, as it is or made of a JSON Schema; BadRequest has the JSON Pointer of what is amiss."""
    if not is_json_schema(schema):
        return schema
    document = JsonSchema(schema)
    with suppress(RecursionError):
        for rich in (6, 4, 3, 2, 1, 0):
            try:
                if fields := Translation(document, rich).fields():
                    return fields
                raise Impossible("/properties", "there is none")
            except Impossible as refusal:
                raise _refusal([FieldProblem(f"{path}#{at}", str(refusal)) for at in refusal.pointers]) from None
            except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
                raise BadRequest.of(path, f"is no JSON Schema: {error}") from None
            except TooRich:
                continue
    raise BadRequest.of(path, f"needs too many fields, or more than {MAX_DEPTH} inside each other")


# ---- Recipe and plan: record types checked and put in order; then made into functions for each use ----


def _storable(raw: Any) -> bool:
    """Whether no text in it holds a NUL or half a surrogate pair; then no value made from it does."""
    if isinstance(raw, str):
        return not re.search("[\0\ud800-\udfff]", raw)
    items = [*raw.keys(), *raw.values()] if isinstance(raw, dict) else raw if isinstance(raw, list) else ()
    return all(map(_storable, items))


def _ordered(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The names, each after those it depends on and else in their own order. ValueError tells a cycle."""
    done: dict[str, None] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ValueError(" -> ".join([*path[path.index(name):], name]))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done[name] = None

    for name in graph:
        visit(name, ())
    return list(done)


def _parsed(record_type: RecipeType) -> Iterator[FieldProblem]:
    """Check all that can be checked of a description by itself, and keep its fields."""
    low, high = record_type.spec.range
    if low > high or high < 1:
        yield FieldProblem(record_type.at("count"), "should be 1 or more, or a range from less to more")
    folded: dict[str, str] = {}
    for name, raw in record_type.schema.items():
        path = record_type.field_path(name)
        if not is_field_name(name):
            yield FieldProblem(path, "a name has 1 to 255 printable characters, and is not _id, _job or _created")
        elif (other := folded.setdefault(name.lower(), name)) != name:
            yield FieldProblem(path, f"differs from {other!r} only in case")
        if not _storable(raw):
            yield FieldProblem(path, "holds a character that a database can not")
            continue
        try:
            record_type.fields[name] = parse_field(raw, path)
        except BadRequest as refusal:
            yield from refusal.fields


def _order_fields(record_type: RecipeType) -> None:
    """Put the fields in order: as in the schema, but what a field reads comes first. ValueError tells a cycle."""
    fields = record_type.fields
    own = f"{record_type.name}."
    graph = {name: [n for n in (n if n in fields else n.removeprefix(own) for n in model.reads()) if n in fields]
             for name, model in fields.items()}
    record_type.fields = {name: fields[name] for name in _ordered(graph)}
    for name, model in record_type.fields.items():
        if isinstance(model, SumField) or not record_type.deferred.isdisjoint(graph[name]):
            record_type.deferred.add(name)


def _stem(value: str, ending: str) -> tuple[str, str]:
    """A text that may need a number, split where that would stand: before this ending, or else the @."""
    if ending and value.endswith(ending):
        return value.removesuffix(ending), ending
    start, at, end = value.rpartition("@")
    return (start, at + end) if at else (value, "")


def _new(generator: RecordGenerator, name: str, draw: Draw, redraws: int) -> Any:
    """Draw until a value is new; text, after a few times, gets a number, before the @ or at its end.

    No two records try the same number, so this does not get slower as values run out. In a part of a request a value
    has to be the part's own too, and a template's number comes before what each of its texts ends with.
    """
    add, mark = generator.seen[name].add, generator.mark  # others in each use
    ending = generator.type.fields[name].ending() if mark else ""
    for tries in itertools.count(1):
        value = draw()
        if value is None:
            return None
        stem, end = _stem(str(value), ending)
        if generator.owns(stem) and add(value):
            return value
        if tries > redraws and isinstance(value, str):
            break
        if tries >= UNIQUE_TRIES:
            raise BadRequest.of(generator.type.at("schema", name), f"no new value in {tries} draws")
    numbers = itertools.count(generator.done + 1, generator.type.bound)
    return next(filter(add, (f"{stem}{n}{mark}{end}" for n in chain([""] if mark else (), numbers))))


def _unique(scope: Scope, name: str, draw: Draw) -> Draw:
    """What draws unique values of a field: a shuffle, where they can be counted."""
    generator, model, bound = scope.generator, scope.generator.type.fields[name], scope.generator.type.bound
    if model.distinct:
        return draw
    if (model.domain(scope) or (math.inf,))[0] > 2**64:
        if model.redraws is None or generator.kinds[name] == "json":
            raise scope.refuse("unique needs a type whose values are text or can be counted", "unique")
        generator.seen[name] = UniqueSet(1, 1)
        return partial(_new, generator, name, draw, model.redraws)

    def counted() -> tuple[int, int, Callable[[int], Any]]:
        size, nth = model.domain(scope) or (0, str)
        if size < bound:
            raise scope.refuse(f"has only {size} different values for {bound} records", "unique")
        return size, _hash64(generator.seed, generator.name, name), nth

    found = scope.settled(counted)

    def shuffled() -> Any:
        size, key, nth = found[0]
        return nth(_shuffled(size, key, generator.done))

    return shuffled


def _compiled_field(scope: Scope, name: str) -> tuple[Draw, Kind]:
    """What draws a field's values in this locale, tried on some, and their kind."""
    generator, model = scope.generator, scope.generator.type.fields[name]
    draw, kind = model.draw(scope)
    if (longest := scope.longest(draw)) > MAX_TEXT:
        raise scope.refuse(f"makes values longer than {MAX_TEXT} characters")
    generator.size += longest
    generator.values[generator.type.index[name]] = _mapped(draw, _STORE.get(kind))()
    # another locale's values may be of another kind: text holds both
    generator.kinds[name] = kind if generator.kinds.get(name, kind) == kind else "text"
    return _unique(scope, name, draw) if model.unique else draw, kind


class Chunk(NamedTuple):
    """How many rows are made of how many, at a pause; `whole` if no record waits for those made per it."""

    done: int
    total: int
    whole: bool


class Plan:
    """A recipe's record types as functions; once it has `begun`, seed and instant settle all that is drawn.

    It is one job's at a time, and to be closed after that: then the next one need not compile it. `problems` tells
    what is wrong, found by making some values of every field for every locale.
    """

    def __init__(self, types: Mapping[str, RecipeType], locales_: Sequence[str], now: datetime,
                 idle: deque[Plan]) -> None:
        self.generators: dict[str, RecordGenerator] = {}
        self.problems: list[FieldProblem] = []
        self._idle = idle
        for record_type in types.values():
            RecordGenerator(record_type, self.generators, len(locales_) > 1, now)
        draws: list[dict[RecordGenerator, dict[str, tuple[Draw, Kind]]]] = []  # by locale
        for locale in locales_:
            if not self.problems:  # another locale would repeat them
                draws.append({generator: {} for generator in self.generators.values()})
                for _, tree in itertools.groupby(draws[-1].items(), key=lambda pair: pair[0].type.root):
                    self._compile(locale, dict(tree))
        for by_generator in draws if not self.problems else ():
            for generator, drawn in by_generator.items():
                generator.steps.append(self._steps(generator, drawn))
        self.columns = {name: {column: generator.kinds.get(column, "text") for column in generator.type.index}
                        for name, generator in self.generators.items()}

    def _compile(self, locale: str, tree: dict[RecordGenerator, dict[str, tuple[Draw, Kind]]]) -> None:
        """Make the functions of a tree of types; fields that wait for the children come last, from the leaves up."""
        for deferred, generators in ((False, tree), (True, reversed(tree))):
            for generator in generators:
                for name in [n for n in generator.type.fields if (n in generator.type.deferred) is deferred]:
                    scope = Scope(generator, locale, generator.type.field_path(name))
                    try:
                        tree[generator][name] = _compiled_field(scope, name)
                    except BadRequest as refusal:
                        self.problems += refusal.fields
                generator.siblings[:] = [tuple(generator.values)]

    @staticmethod
    def _steps(generator: RecordGenerator, draws: dict[str, tuple[Draw, Kind]]) -> tuple[_Steps, _Steps]:
        """The steps of a record, now that the kinds of all fields are known."""
        steps: tuple[_Steps, _Steps] = ([], [])
        for name, (draw, kind) in draws.items():
            stored = _mapped(draw, _STORE.get(kind, None if generator.kinds[name] == kind else str))
            step = _nullable(stored, generator.type.fields[name].null, generator.rng)
            steps[name in generator.type.deferred].append((generator.type.index[name], step))
        return steps

    def begin(self, seed: int, now: datetime | None, parts: int = 1, part: int | None = None) -> None:
        """Begin a use of it: all `parts` of a request, or one. BadRequest if dates do not fit, or it can not be cut."""
        generators = self.generators.values()
        for generator in generators:
            generator.settle(seed, now)
        self._seed, self._parts = seed, parts
        self._todo = range(parts) if part is None else range(part, part + 1)
        self._shared = set[RecipeType]()  # the roots of types that each part knows whole, if there are parts
        self.hidden = set[str]()
        if parts > 1:
            self._share()
            self.hidden = {g.name for g in generators if self._todo[0] and g.type.root in self._shared}
            if problems := [*self._uncut()]:
                raise _refusal(problems)
        self._cut(self._todo[0])
        self._first = {generator.name: generator.first for generator in self._own}

    @property
    def _own(self) -> list[RecordGenerator]:
        return [generator for name, generator in self.generators.items() if name not in self.hidden]

    def _share(self) -> None:
        """Find the small trees of types that others refer to: each part is to know them, so the first one has them."""
        trees = {root: [*tree] for root, tree in itertools.groupby(
            self.generators.values(), lambda generator: generator.type.root)}
        needs = {root: {target.type.root for generator in tree for target, _ in generator.lookups} - {root}
                 for root, tree in trees.items()}
        for root, tree in trees.items():  # what one refers to comes before it
            referred = any(root in others for others in needs.values())
            if referred and sum(g.type.bound for g in tree) <= MAX_SHARED and needs[root] <= self._shared:
                self._shared.add(root)
        self._referred = set[RecipeType]().union(*needs.values()) - self._shared

    def _uncut(self) -> Iterator[FieldProblem]:
        """Why the request can not be cut into so many parts."""
        roots = {g.type: g.child_count(0) for g in self.generators.values() if not g.parent}
        if (most := max(roots.values())) < self._parts:
            yield FieldProblem("parts", f"should be at most {most}, the number of records to be cut")
        for root, count in roots.items():
            if root in self._referred and most >= self._parts > count:
                yield FieldProblem("parts", f"should be at most {count}, the number of {root.name} records, since "
                                            "others refer to those of their own part")
        for generator in self.generators.values():
            for column in generator.seen if generator.type.root not in self._shared else ():
                if generator.kinds[column] != "text":
                    yield FieldProblem(generator.type.at("schema", column, "unique"), (
                        "across parts needs values that are text or can be counted, such as int, decimal, or float "
                        "with round; or ask for one part"))

    def _cut(self, part: int) -> None:
        self._part = part
        for generator in self.generators.values():
            generator.cut(part, self._parts, generator.type.root in self._shared)

    def seek(self, state: Json) -> None:
        """Count as if it had come where a `state` says, made by another plan."""
        for name, generator in self.generators.items():
            generator.done = state[name][0]

    @property
    def done(self) -> int:
        """How many rows are made."""
        return sum(generator.done for generator in self._own) - sum(self._first.values())

    def close(self) -> None:
        """End its use; it is kept for the next one, unless it is made for this instant alone."""
        for generator in self.generators.values():
            generator.forget()
        if not any(generator.dated for generator in self.generators.values()):
            self._idle.append(self)

    def expected(self) -> int:
        """How many rows there will be: those made, and the mean of what is to come."""
        expected: dict[str, float] = {}
        for generator in self._own:
            if generator.parent:
                to_come = expected[generator.parent.name] - generator.parent.done
                expected[generator.name] = generator.done + to_come * sum(generator.type.spec.range) / 2
            else:
                expected[generator.name] = generator.end if len(self._todo) == 1 else generator.child_count(0)
        return round(sum(expected.values())) - sum(self._first.values())

    def chunks(self, rows: RowSource, checkpoint: Json | None = None, size: int = 40) -> Iterator[Chunk]:
        """Add to `rows` those that come after `checkpoint`, with a pause after about `size`, sooner if they are large.

        A chunk that is not whole is a pause only. Use one iterator of a plan at a time. TaskError tells a value that
        fails.
        """
        generators = self.generators.values()
        size = max(1, min(size, 2**17 // max(1, *(generator.size for generator in generators))))
        rows.hidden = self.hidden
        rows.first.update(self._first)
        rows.keep |= {name: self.looked_up.get(name, []) for name in self.hidden}
        for part in range(checkpoint[""] if checkpoint and "" in checkpoint else self._todo[0], self._todo.stop):
            self._start(part, checkpoint, rows)
            checkpoint = None
            for root in [generator for generator in generators if not generator.parent]:
                try:
                    for whole in self._pauses(root, rows, size):
                        yield Chunk(self.done, self.expected(), whole)
                except TaskError:
                    raise
                except Exception as error:
                    raise TaskError(f"{root.name} {root.done + 1}: {type(error).__name__}: {error}") from error

    @property
    def looked_up(self) -> dict[str, list[str]]:
        """The fields of each type that random rows are read of."""
        fields = defaultdict[str, list[str]](list)
        for generator in self.generators.values():
            for (target, _), lookup in generator.lookups.items():
                fields[target.name] += lookup.fields
        return fields

    def state(self) -> Json:
        """From where to go on after a whole chunk, JSON-able."""
        part = {"": self._part} if self._parts > 1 else {}
        return part | {name: generator.state() for name, generator in self.generators.items()}

    def _start(self, part: int, checkpoint: Json | None, rows: RowSource) -> None:
        """Put every type where the checkpoint says, or at the beginning of the part."""
        self._cut(part)
        room = BLOOM_BYTES // max(1, sum(len(generator.seen) for generator in self.generators.values()))
        for i, (name, generator) in enumerate(self.generators.items()):
            if generator.parts == 1 and part > self._todo[0] and not checkpoint:
                continue  # a shared type, which the first part has made
            # the first type's values are stock Faker's under seed_instance(seed)
            seed = self._seed if generator.parts == 1 else _hash64(self._seed, "part", part)
            state = checkpoint[name] if checkpoint and name not in self.hidden else None
            generator.start(_hash64(seed, name) if i else seed, state)
            for column in generator.seen:
                generator.seen[column] = seen = UniqueSet(-(-generator.type.bound // generator.parts), room)
                known = rows.column(name, column) if generator.done > generator.first else iter(())
                for value in itertools.islice(known, generator.first - rows.first[name], None):
                    seen.add(value)

    def _pauses(self, root: RecordGenerator, rows: RowSource, size: int) -> Iterator[bool]:
        """Make all of a type and what is made per it; each pause says whether it is between two records of the type."""
        tree = [generator for generator in self.generators.values() if generator.type.root is root.type]
        made, at, total = 0, sum(generator.done for generator in tree), root.end
        while root.plain and root.done < total:
            root.make_plain(rows, min(size, total - root.done))
            yield True
        while root.done < total:
            if root.children:
                for _ in root.make_family(rows):
                    yield False
                made = sum(generator.done for generator in tree) - at
            else:
                root.make_one(rows)
                made += 1
            if made >= size:
                made, at = 0, at + made
                yield True
        if made:
            yield True


class Recipe:
    """What a request asks for, checked: how to make records, whatever the seed and the instant.

    `records` are the record types by name; `now` is the instant it is tried at; `locale` is one of Faker's or a list,
    of which each record draws one (what is made per it follows). Paths in errors begin with `where`: "" for the
    short form of one type ("schema.age.min"), "records" for the long one ("records.order.schema.age.min").
    Raises BadRequest with every problem that is found.
    """

    def __init__(self, records: Mapping[str, RecordSpec], *, now: datetime, locale: str | Sequence[str],
                 where: str = "") -> None:
        self.locales = [locale] if isinstance(locale, str) else list(dict.fromkeys(locale))
        where = where or ("records" if len(records) > 1 else "")
        paths = {name: f"{where}.{name}" if where else "" for name in records}
        self.types = {name: RecipeType(name, spec, paths[name], translated(
            spec.schema_, ".".join(filter(None, [paths[name], "schema"])))) for name, spec in records.items()}
        self._idle: deque[Plan] = deque(maxlen=16)  # compiled already, for as many jobs at once
        problems = [problem for record_type in self.types.values() for problem in _parsed(record_type)]
        related = list(self._relate(where or "schema"))
        if more := related or _unknown_locale(self.locales) or self._too_much(where or "schema"):
            raise _refusal(list(dict.fromkeys(problems + more)))
        plan = Plan(self.types, self.locales, now.astimezone(UTC), self._idle)
        problems += plan.problems + [
            FieldProblem(generator.type.at("schema"), f"makes records longer than {MAX_RECORD} characters")
            for generator in plan.generators.values() if generator.size > MAX_RECORD * len(self.locales)]
        if problems:
            raise _refusal(list(dict.fromkeys(problems)))
        self.columns = plan.columns  # kinds by field by record type; parents before children
        # the most rows each type can have; their number, where no range is asked for
        self.bounds = {name: record_type.bound for name, record_type in self.types.items()}
        self.refs = {name: {field: model.field for field, model in record_type.fields.items()
                            if isinstance(model, RefField)} for name, record_type in self.types.items()}
        plan.close()

    def plan(self, seed: int, now: datetime | None, parts: int = 1, part: int | None = None) -> Plan:
        """One use of it, or of a part of it, to be closed: `seed` and `now` settle all that is drawn.

        BadRequest if dates do not fit, or need a `now` and there is none, or if it cannot be cut into so many `parts`.
        """
        now = now and now.astimezone(UTC)
        try:
            plan = self._idle.pop()
        except IndexError:
            plan = Plan(self.types, self.locales, now or utc_now(), self._idle)
        if plan.problems:
            raise _refusal(list(dict.fromkeys(plan.problems)))
        plan.begin(seed, now, parts, part)
        return plan

    def _relate(self, where: str) -> Iterator[FieldProblem]:
        """Find each type's parent, put types and their fields in order, and tell what can not be."""
        for record_type in self.types.values():
            per = record_type.spec.per
            if per in self.types:
                record_type.parent = self.types[per]
            elif per is not None:
                yield FieldProblem(record_type.at("per"), f"no such record type {per!r}{did_you_mean(per, self.types)}")
        try:
            self._order()
        except ValueError as cycle:
            yield FieldProblem(where, f"these record types need each other: {cycle}")
            return
        for record_type in self.types.values():
            record_type.children = [t for t in self.types.values() if t.parent is record_type]
            record_type.bound *= record_type.parent.bound if record_type.parent else 1
            if math.prod(t.spec.range[1] for t in [record_type, *record_type.ancestors()] if t.parent) > MAX_FAMILY:
                yield FieldProblem(record_type.at("count"), f"one record can bring along at most {MAX_FAMILY}")
            try:
                _order_fields(record_type)
            except ValueError as cycle:
                yield FieldProblem(record_type.at("schema"), f"these fields need each other: {cycle}")

    def _order(self) -> None:
        """Parents before children, what is referred to before its reader. ValueError tells a cycle."""
        needs = {}
        for name, record_type in self.types.items():
            read = {n.partition(".")[0] for f in record_type.fields.values() for n in f.reads()
                    if n not in record_type.index}
            needs[name] = [o for o in self.types if (o in read and o != name) or o == record_type.spec.per]
        order = _ordered(needs)
        tree = {name: self.types[name].root.name for name in order}
        # a tree of types is made as a whole, so trees have an order too
        between = {top: [tree[o] for n in order if tree[n] == top for o in needs[n]] for top in tree.values()}
        tops = _ordered({top: [other for other in others if other != top] for top, others in between.items()})
        self.types = {name: self.types[name] for top in tops for name in order if tree[name] == top}

    def _too_much(self, where: str) -> list[FieldProblem]:
        """Trying a recipe takes time, which is reckoned before it is spent."""
        works = {t.field_path(name): model.work() for t in self.types.values() for name, model in t.fields.items()}
        values, most = sum(works.values()) + 10 * len(self.types), max(works, key=works.__getitem__, default="")
        if (work := values * len(self.locales)) <= MAX_WORK:
            return []
        return [FieldProblem(where if works[most] * 2 < values else most, (
            f"is too much to try: with {len(works)} fields (those inside them, elements of lists and what large "
            f"arguments ask for count too, {most} is {works[most]}) in {len(self.types)} record types (10 each) and "
            f"{len(self.locales)} locales it takes {work} values, of at most {MAX_WORK}"))]

    @property
    def memory(self) -> int:
        """Bytes that it takes while it is kept, about: each type of each plan has a Faker of each locale."""
        fields = sum(len(record_type.fields) for record_type in self.types.values())
        return max(1, len(self._idle)) * (2**17 * len(self.types) * len(self.locales) + 2**12 * fields)

    @property
    def total(self) -> int:
        """Rows of all types, an estimate where ranges are asked for."""
        means = {t: sum(t.spec.range) / 2 for t in self.types.values()}
        return round(sum(math.prod(means[t] for t in [one, *one.ancestors()]) for one in means))


# ---- Presets: plain schemas, to be read, copied and changed ----

_ADDRESS: dict[str, Any] = {
    "phone": {"type": "first_of", "of": ["phone_number", "mobile_number"]}, "street": "street_address",
    "city": "city",
    "state": {"type": "first_of", "of": ["state_abbr", "province_abbr", "administrative_unit", "city"]},
    "postcode": {"type": "first_of", "of": [
        {"type": "postcode_in_state", "args": {"state_abbr": "{state}"}},
        {"type": "postcode_in_province", "args": {"province_abbr": "{state}"}},
        "postcode"]},
}
_NAME = {"firstName": "first_name", "lastName": "last_name"}
_FULL_NAME = {"type": "template", "template": "{firstName} {lastName}"}
_EMAIL = {"type": "template", "template": "{firstName|slug}.{lastName|slug}@example.com"}
_EURO = {"type": "const", "value": "EUR"}
_PRICE = {"type": "decimal", "min": "1.00", "max": "250.00", "mean": 40, "sd": 45}
_AMOUNT = {"type": "product", "of": ["price", "quantity"], "places": 2}
_STATUS = {"type": "choice", "values": {"paid": 20, "shipped": 20, "delivered": 55, "returned": 5}}
_PRODUCT = {"type": "choice", "values": ["Lamp", "Chair", "Desk", "Shelf", "Mug", "Kettle", "Blanket", "Clock"]}
_PART = {"type": "choice", "values": ["Oak", "Steel", "Linen", "Walnut", "Glass", "Cotton", "Brass", "Bamboo"]}
_PERSON: dict[str, Any] = {
    "id": "sequence", **_NAME, "name": _FULL_NAME,
    "username": {"type": "template", "template": "{firstName|slug}.{lastName|slug}", "unique": True},
    "email": {"type": "template", "template": "{username}@example.com"}, "phone": _ADDRESS["phone"],
    "birthDate": {"type": "date", "from": "-90y", "to": "-18y"},
    **{field: _ADDRESS[field] for field in ("street", "city", "state", "postcode")}, "job": "job",
    "joined": {"type": "date", "from": "-5y", "to": "today"},
}
PRESETS: dict[str, dict[str, Any]] = {
    "person": {"schema": _PERSON},
    "company": {"schema": {
        "id": "sequence", "name": "company",
        "domain": {"type": "template", "template": "{name|slug}.example", "unique": True},
        "email": {"type": "template", "template": "info@{domain}"}, **_ADDRESS,
        "industry": {"type": "choice", "values": ["retail", "software", "health", "energy", "finance"]},
        "employees": {"type": "int", "min": 1, "max": 20000, "mean": 200, "sd": 900},
        "revenue": {"type": "decimal", "min": "10000.00", "max": "90000000.00"},
        "founded": {"type": "date", "from": "-80y", "to": "-1y"}}},
    "product": {"schema": {
        "id": "sequence", "sku": {"type": "pattern", "pattern": "???-######", "unique": True}, "material": _PART,
        "kind": _PRODUCT, "name": {"type": "template", "template": "{material} {kind}"}, "price": _PRICE,
        "costRate": {"type": "decimal", "min": "0.35", "max": "0.85"},
        "cost": {"type": "product", "of": ["price", "costRate"], "places": 2},
        "stock": {"type": "int", "min": 0, "max": 500},
        "rating": {"type": "float", "min": 1, "max": 5, "mean": 4.1, "sd": 0.6, "round": 1, "null": 0.1},
        "addedAt": {"type": "datetime", "from": "-3y", "to": "now"}}},
    "order": {"schema": {
        "id": "sequence", "number": {"type": "pattern", "pattern": "%#######", "unique": True}, **_NAME,
        "customer": _FULL_NAME, "email": _EMAIL, "status": _STATUS, "price": _PRICE,
        "quantity": {"type": "int", "min": 1, "max": 6}, "total": _AMOUNT, "currency": _EURO,
        "placedAt": {"type": "datetime", "from": "-1y", "to": "-10d"},
        "paidAt": {"type": "datetime", "from": "{placedAt}", "to": "{placedAt}+1h"},
        "shippedAt": {"type": "datetime", "from": "{paidAt}+1h", "to": "{paidAt}+3d"}}},
    "transaction": {"schema": {
        "id": "uuid", "account": "iban", "at": {"type": "datetime", "from": "-90d", "to": "-2d"},
        "bookedAt": {"type": "datetime", "from": "{at}", "to": "{at}+2d"},
        "direction": {"type": "choice", "values": {"debit": 80, "credit": 20}},
        "amount": {"type": "decimal", "min": "0.50", "max": "5000.00", "mean": 60, "sd": 250}, "currency": _EURO,
        "counterparty": "company", "reference": {"type": "pattern", "pattern": "??##-####-####", "unique": True}}},
    "event": {"schema": {
        "id": "uuid", "at": {"type": "datetime", "from": "-7d", "to": "now", "ms": True},
        "name": {"type": "choice", "values": {"page_view": 70, "search": 15, "add_to_cart": 10, "purchase": 5}},
        "userId": {"type": "int", "min": 1, "max": 10000, "null": 0.3}, "sessionId": "uuid", "path": "uri_path",
        "ip": "ipv4", "userAgent": "user_agent",
        "properties": {"type": "object", "fields": {"ms": {"type": "int", "min": 5, "max": 900}, "term": "word"}}}},
    "ticket": {"schema": {
        "id": "sequence", "subject": "sentence", **_NAME, "requester": _FULL_NAME, "email": _EMAIL,
        "priority": {"type": "choice", "values": {"low": 30, "normal": 50, "high": 15, "urgent": 5}},
        "tags": {"type": "list", "of": "word", "min": 0, "max": 3},
        "openedAt": {"type": "datetime", "from": "-180d", "to": "-10d"},
        "answeredAt": {"type": "datetime", "from": "{openedAt}", "to": "{openedAt}+2d"},
        "closedAt": {"type": "datetime", "from": "{answeredAt}", "to": "{answeredAt}+7d", "null": 0.2}}},
    "shop": {"records": {
        "customer": {"schema": _PERSON},
        "order": {"per": "customer", "count": [0, 6], "schema": {
            "id": "sequence", "customerId": {"type": "ref", "field": "customer.id"},
            "placedAt": {"type": "datetime", "from": "{customer.joined}", "to": "now"}, "status": _STATUS,
            "currency": _EURO, "total": {"type": "sum", "field": "item.amount", "places": 2}}},
        "item": {"per": "order", "count": [1, 5], "schema": {
            "id": "sequence", "orderId": {"type": "ref", "field": "order.id"}, "product": _PRODUCT, "price": _PRICE,
            "quantity": {"type": "int", "min": 1, "max": 4}, "amount": _AMOUNT}}}},
}


def _specs(records: Mapping[str, Any]) -> dict[str, RecordSpec]:
    return {name: RecordSpec.model_validate(spec) for name, spec in records.items()}


def preset_records(name: str, count: int) -> dict[str, RecordSpec]:
    """The record types of a preset, `count` records of the first. BadRequest names the nearest presets."""
    if name not in PRESETS:
        raise BadRequest.of("recordType", f"there is no preset {name!r}{did_you_mean(name, PRESETS)}; "
                                          f"give a schema, or one of: {', '.join(PRESETS)}")
    records = PRESETS[name].get("records") or {name: PRESETS[name]}
    return _specs({key: {"count": count, **spec} for key, spec in records.items()})


# ---- What there is to choose from ----


def _samples(locale: str, fields: Mapping[str, Any]) -> dict[str, tuple[Kind, Any]]:
    """The kind of each of these fields and a value; those that make none, for want of arguments, are left out."""
    common = {"id": "sequence", "plan": {"type": "const", "value": "pro"}, "price": _PRICE, "quantity": "int"}
    chosen = {f"sample {name}": spec for name, spec in fields.items()}
    records = {"customer": {"count": 1, "schema": {"id": "sequence"}},
               "sample": {"per": "customer", "count": 1, "schema": {**common, **chosen}},
               "item": {"per": "sample", "count": 2, "schema": {"amount": _PRICE}}}
    now = datetime(2026, 1, 1, tzinfo=UTC)
    try:
        recipe = Recipe(_specs(records), now=now, locale=locale)
    except BadRequest as refusal:
        at = "records.sample.schema.sample"
        faulty = {n for n in fields for p in refusal.fields if f"{p.field}.".startswith(f"{at} {n}.")}
        if not faulty:
            raise
        return _samples(locale, {name: spec for name, spec in fields.items() if name not in faulty})
    rows = RowSource(recipe.columns)
    with closing(recipe.plan(1, now)) as plan:
        next(plan.chunks(rows))
    kinds, row = recipe.columns["sample"], rows.fresh["sample"][0]
    values = dict(zip(kinds, row, strict=True))
    return {n: (kinds[c], _LOAD.get(kinds[c], lambda v: v)(values[c])) for n, c in zip(fields, chosen, strict=True)}


def _args(model: type[FieldType] | None, method: Any) -> list[dict[str, Any]]:
    """A type's options or a method's arguments, each with its default."""
    if model:
        options = {f.alias or name: f for name, f in model.model_fields.items() if name not in FieldType.model_fields}
        defaults = {name: None if f.is_required() else f.default for name, f in options.items()}
    else:
        defaults = {name: p.default for name, p in inspect.signature(method).parameters.items() if name != "self"}
    return [{"name": n, "default": d if type(d) in (str, int, float, bool) else None} for n, d in defaults.items()]


@functools.lru_cache(256)  # there are about a hundred
def _entries(locale: str) -> list[dict[str, Any]]:
    samples = _samples(locale, {name: cls.example for name, cls in FIELD_TYPES.items()})  # refuses an unknown locale
    fast = FastFaker(_plain_locale(locale), random.Random(0), lambda: EPOCH)
    methods = {name: getattr(type(fast.provider(name)), name) for name in fast.names()}
    samples |= _samples(locale, {name: {"type": name} for name in methods if name not in FIELD_TYPES})
    entries = []
    for name, (kind, sample) in samples.items():
        model = FIELD_TYPES.get(name)
        doc = inspect.getdoc(model or methods[name]) or ""
        doc = doc if model else re.split(r"^:|\n\n", doc, maxsplit=1, flags=re.MULTILINE)[0].strip()
        entry = {"type": name, "kind": kind, "sample": sample, "args": _args(model, methods.get(name)), "doc": doc}
        entries.append({**entry, "example": model.example} if model else entry)
    return entries


def catalogue(locale: str, query: str | None = None) -> list[dict[str, Any]]:
    """The types that a schema may use in this locale, built-in ones first: type, kind, sample, args, doc, example.

    `args` are objects with name and default (null if there is none). `query` keeps the types whose name or description
    holds it. Raises BadRequest for an unknown locale.
    """
    wanted = (query or "").lower()
    return [entry for entry in _entries(locale) if wanted in f"{entry['type']} {entry['doc']}".lower()]


# ==== 6 Files: the data folder: drafts, uploads, exports, snapshots; the formats ====

_BLOCK = 256 * 1024
_LEAST_FREE = 16 * 2**20  # bytes to leave free, or a sixth of a small disk: to end jobs takes room too
_JOB_FILE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.[a-z0-9.]+")  # names of kept files; see JobIds
_DRAFT = re.compile(r"tmp[a-z0-9_]{8}.*")  # as `tempfile` names them
_NETWORK_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "fuse.sshfs", "glusterfs"}
MULTIPART_OVERHEAD = 64 * 1024  # what the parts' headers and boundaries may add to the file


class FileType(NamedTuple):
    """A kind of file: its media type, and the first bytes that prove it; no such bytes means text."""

    content_type: str
    magic: tuple[bytes, ...] = ()


FILE_TYPES: dict[str, FileType] = {  # by suffix; see `file_format` for those that hold records
    "txt": FileType("text/plain; charset=utf-8"),
    "xml": FileType("application/xml"),
    "gz": FileType("application/gzip", (b"\x1f\x8b",)),
    "zip": FileType("application/zip", (b"PK\x03\x04", b"PK\x05\x06")),
    "pdf": FileType("application/pdf", (b"%PDF-",)),
    "png": FileType("image/png", (b"\x89PNG\r\n\x1a\n",)),
    "jpg": FileType("image/jpeg", (b"\xff\xd8\xff",)),
    "jpeg": FileType("image/jpeg", (b"\xff\xd8\xff",)),
}


def file_label(name: str) -> str:
    """A client's file name as a label: its last part, without control characters, at most 200 characters."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(character for character in last if character.isprintable()).strip()[-200:]


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("the disk is full") from error
        raise StorageError(f"the data folder cannot be used: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive power loss; Windows has no such call, and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _LastReader(io.FileIO):
    """A file that is read once."""

    def __init__(self, path: Path, remove: Callable[[], None]):
        super().__init__(path)
        self._remove = remove

    def close(self) -> None:
        """Closes and removes it."""
        super().close()
        self._remove()


class AtomicFile:
    """A file being written in data/tmp. It gets its final name whole and fsynced, or it never existed."""

    def __init__(self, root: Path):
        self._root = root
        with _disk_errors():
            descriptor, name = tempfile.mkstemp(dir=root / "tmp")
        self.path = Path(name)
        self._file = os.fdopen(descriptor, "wb")
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, block: bytes) -> None:
        """Appends; DiskFull or StorageError if that fails."""
        with _disk_errors():
            self._file.write(block)
        self._hash.update(block)
        self.bytes += len(block)

    @property
    def sha256(self) -> str:
        """Of what was written so far, in hexadecimal."""
        return self._hash.hexdigest()

    def flush(self) -> None:
        """Hands what was written to the operating system; DiskFull or StorageError if that fails."""
        with _disk_errors():
            self._file.flush()

    @property
    def closed(self) -> bool:
        """True once it was kept or removed."""
        return self._file.closed

    def beside(self) -> AtomicFile:
        """Another one, for something that this one is made from."""
        return AtomicFile(self._root)

    def open(self) -> BinaryIO:
        """Opens what was written so far for reading."""
        self.flush()
        return self.path.open("rb")

    def open_last(self) -> BinaryIO:
        """Opens the whole for reading; the file goes when that is closed."""
        self.flush()
        return cast(BinaryIO, _LastReader(self.path, self.close))

    def keep(self, path: str, filename: str, content_type: str) -> StoredFile:
        """Moves the file to `path` (relative to the data folder), durably."""
        target = self._root / path
        with _disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.path, target)
            _sync_folder(target.parent)
        return StoredFile(path=path, filename=filename, content_type=content_type, bytes=self.bytes,
                          sha256=self.sha256)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the file unless it was kept."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


class _OpenFile(io.FileIO):
    """A file opened for a download; the folder keeps count of them."""

    def __init__(self, path: Path, in_use: Counter[Path]):
        super().__init__(path)
        self._path, self._in_use = path, in_use
        in_use[path] += 1

    def close(self) -> None:
        """Closes, once."""
        if not self.closed:
            self._in_use[self._path] -= 1
        super().close()


class DataFolder:
    """The data folder: drafts in tmp, finished files in uploads and exports."""

    def __init__(self, root: Path):
        self.root = root.absolute()
        self.tmp = self.root / "tmp"
        self._in_use: Counter[Path] = Counter()
        for folder in (self.tmp, self.root / "uploads", self.root / "exports"):
            folder.mkdir(parents=True, exist_ok=True)

    def _own(self, folder: str, name: re.Pattern[str]) -> list[Path]:
        """The files with such names; nothing of what a link leads to."""
        place = self.root / folder
        return [] if place.is_symlink() else [Path(entry.path) for entry in os.scandir(place) if name.fullmatch(
            entry.name) and entry.is_file(follow_symlinks=False)]

    def kept(self) -> list[Path]:
        """The finished files of jobs; what else somebody has put beside them is not ours."""
        return [*self._own("uploads", _JOB_FILE), *self._own("exports", _JOB_FILE)]

    def sweep(self, known: Container[str]) -> int:
        """Removes drafts of an earlier process, and files of jobs that are not known; returns how many."""
        stray = [*self._own("tmp", _DRAFT),
                 *(path for path in self.kept() if f"{path.parent.name}/{path.name}" not in known)]
        for path in stray:
            with suppress(OSError):
                path.unlink()
        for entry in [] if self.tmp.is_symlink() else [*os.scandir(self.tmp)]:
            if _DRAFT.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
        return len(stray)

    def remove(self, path: str) -> None:
        """Removes a job's file; where a download still holds it (Windows), the next start does."""
        with suppress(OSError):
            (self.root / path).unlink(missing_ok=True)

    def open(self, file: StoredFile) -> BinaryIO:
        """Opens a job's file for reading; NotFound if it is gone."""
        try:
            return cast(BinaryIO, _OpenFile(self.root / file.path, self._in_use))
        except OSError:
            raise NotFound("the file is gone from the data folder") from None

    def in_use(self, file: StoredFile) -> bool:
        """True while somebody downloads the file."""
        return self._in_use[self.root / file.path] > 0

    def free_space(self) -> int:
        """Bytes that are free on the disk; raises DiskFull when they are few, StorageError if that cannot be told."""
        with _disk_errors():
            usage = shutil.disk_usage(self.root)
        if usage.free < min(_LEAST_FREE, usage.total // 6):
            raise DiskFull(f"the disk is nearly full: {usage.free // 2**20} MiB are free")
        return usage.free

    def probe(self) -> None:
        """Really writes to the disk; raises DiskFull or StorageError if that fails."""
        self.free_space()
        for folder in (self.root / "uploads", self.root / "exports"):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise StorageError(f"the folder {folder} cannot be written to")
        with AtomicFile(self.root) as draft:
            draft.write(b"\0" * _BLOCK)
            draft.flush()


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk knows no such thing; files here never change."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
        _sync_file(target)


_SNAPSHOT_FORMAT, _ABOUT, SNAPSHOT_DATABASE = 1, "snapshot.json", "taskapi.db"
_SNAPSHOT_FILE = re.compile(r"(uploads|exports)/([0-9A-Za-z_-]+)(?:\.r[0-9a-f]{8})?((?:\.[a-z0-9]+)+)")


class Snapshots:
    """Folders in data/snapshots, each with a database, its files and a note; made in data/tmp, there whole or not."""

    def __init__(self, folder: DataFolder):
        self._folder, self.root = folder, folder.root / "snapshots"

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """An empty folder, removed after the block, unless it was kept."""
        with _disk_errors():
            path = Path(tempfile.mkdtemp(dir=self._folder.tmp))
            try:
                for name in ("uploads", "exports"):
                    (path / name).mkdir()
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)

    def refuse_taken(self, name: str) -> None:
        """Raises Conflict if there is a snapshot of this name."""
        if (self.root / name).exists():
            raise Conflict(f"there is a snapshot {name!r} already")

    def keep(self, draft: Path, about: Mapping[str, Json]) -> Snapshot:
        """Gives a draft its name, durably; Conflict if that is taken."""
        size = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
        made = Snapshot.model_validate({**about, "bytes": size})
        (draft / _ABOUT).write_text(json.dumps({"format": _SNAPSHOT_FORMAT, "taskapi": __version__,
                                                **made.model_dump()}), encoding="utf-8")
        _sync_file(draft / _ABOUT)
        for folder in (draft / "uploads", draft / "exports", draft):
            _sync_folder(folder)
        self.root.mkdir(exist_ok=True)
        self.refuse_taken(made.name)
        os.replace(draft, self.root / made.name)
        _sync_folder(self.root)
        return made

    def take_files(self, draft: Path, paths: Iterable[str]) -> None:
        """Puts the files of jobs into a draft; FileNotFoundError for one that was removed meanwhile."""
        for path in paths:
            _link(self._folder.root / path, draft / path)

    def put_files(self, draft: Path, paths: Iterable[str], moved: Callable[[str, str], None],
                  undo: ExitStack) -> None:
        """Puts a snapshot's files into the data folder, under names that nobody has, which `moved` is told."""
        for path in paths:
            match = _SNAPSHOT_FILE.fullmatch(path)
            if not match:
                raise StorageError(f"it has a file at {path[:100]!r}")
            target = f"{match[1]}/{match[2]}.r{secrets.token_hex(4)}{match[3]}"
            with suppress(FileNotFoundError):  # it was gone before the snapshot was taken
                _link(draft / path, self._folder.root / target)
                undo.callback(self._folder.remove, target)
            moved(path, target)
        for name in ("uploads", "exports"):
            _sync_folder(self._folder.root / name)

    def all(self) -> list[Snapshot]:
        """Those there are, by name."""
        found = []
        for path in sorted(self.root.glob(f"*/{_ABOUT}")):
            with suppress(ValueError, KeyError, TypeError, FileNotFoundError):  # somebody else's, or gone meanwhile
                told = json.loads(path.read_bytes())
                made = Snapshot.model_validate({key: told[key] for key in map(to_camel, Snapshot.model_fields)})
                found += [made] if made.name == path.parent.name else []
        return found

    def get(self, name: str) -> Snapshot:
        """One of them; NotFound."""
        known = {snapshot.name: snapshot for snapshot in self.all()}
        if name not in known:
            raise NotFound(f"there is no snapshot {name!r}{did_you_mean(name, known)}; there are: "
                           f"{', '.join(known) or 'none yet'}")
        return known[name]

    def place(self, name: str) -> Path:
        """The folder of a snapshot; NotFound."""
        return self.root / self.get(name).name

    def remove(self, name: str) -> None:
        """Deletes a snapshot, at once for all who look; NotFound."""
        place = self.place(name)
        with self.draft() as draft:
            try:
                os.replace(place, draft / name)
            except FileNotFoundError:
                raise NotFound(f"there is no snapshot {name!r} any more") from None
            _sync_folder(self.root)

    def pack(self, name: str, out: BinaryIO) -> None:
        """Writes a snapshot as one .tar.gz, whose first member says what else is in it."""
        place = self.place(name)
        files = [path.relative_to(place).as_posix() for path in sorted(place.rglob("*"))
                 if path.is_file() and path.name != _ABOUT]
        sums: dict[str, tuple[int, str]] = {}
        for path in files:
            with (place / path).open("rb") as file:
                sums[path] = (place / path).stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
        about = json.dumps({**json.loads((place / _ABOUT).read_bytes()), "files": sums}).encode()
        with tarfile.open(fileobj=out, mode="w:gz", compresslevel=6) as archive:
            entry = tarfile.TarInfo(_ABOUT)
            entry.size = len(about)
            archive.addfile(entry, io.BytesIO(about))
            for path in files:
                entry = tarfile.TarInfo(path)
                entry.size = sums[path][0]
                with (place / path).open("rb") as content:
                    archive.addfile(entry, content)

    def unpack(self, archive: Path, name: str) -> None:
        """Makes a snapshot of a packed one; StartupError says what is wrong with it, and nothing is left."""
        with archive.open("rb") as stream, self.draft() as draft:
            try:
                with tarfile.open(fileobj=stream, mode="r:gz") as packed:
                    about = self._unpacked(packed, draft)
                    made = {"name": name, **{key: about[key] for key in ("createdAt", "jobs", "records")}}
                    self.keep(draft, made)
            except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, KeyError, TypeError) as error:
                what = f"it lacks {error}" if isinstance(error, KeyError) else _clipped(str(error))
                if isinstance(error, ValidationError):
                    what = ": ".join(field_problems(error)[0])
                raise StartupError(f"{archive} is no backup of taskapi, or a damaged one: {what}") from None

    def _unpacked(self, packed: tarfile.TarFile, draft: Path) -> dict[str, Json]:
        """Writes an archive's members into a draft: just those that its note lists; returns the note."""
        first = packed.next()
        if first is None or first.name != _ABOUT or not first.isreg() or first.size > 2**28:
            raise ValueError(f"it does not begin with {_ABOUT}")
        about: dict[str, Json] = json.loads(cast(BinaryIO, packed.extractfile(first)).read())
        if about["format"] != _SNAPSHOT_FORMAT:
            raise ValueError(f"it has format {about['format']!r}, and this version of taskapi reads {_SNAPSHOT_FORMAT}")
        files = dict(about["files"])
        for member in itertools.islice(packed, 1, None):
            size, digest = files.pop(member.name, (None, None))
            known = member.name == SNAPSHOT_DATABASE or _SNAPSHOT_FILE.fullmatch(member.name)
            if size != member.size or not member.isreg() or not known:
                raise ValueError(f"its member {member.name!r} is none of its files")
            with (draft / member.name).open("xb") as target:
                shutil.copyfileobj(cast(BinaryIO, packed.extractfile(member)), target)
            _sync_file(draft / member.name)
            with (draft / member.name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise ValueError(f"its member {member.name!r} is damaged")
        if files or not (draft / SNAPSHOT_DATABASE).exists():
            raise ValueError(f"it lacks {min(files, default=SNAPSHOT_DATABASE)!r}")
        return about


def file_system_check(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """`local`, or a warning: SQLite's locks cannot be trusted across a network."""
    if str(folder).startswith("\\\\"):
        return "network share: keep the data folder on a local disk"
    try:
        entries = [line.split()[1:3] for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return "local, as far as can be told"
    holding = [(point, system) for point, system in entries if folder.is_relative_to(point)]
    system = max(holding, default=("", ""), key=lambda entry: len(entry[0]))[1]
    return f"{system} is a network file system: keep the data folder on a local disk" if (
        system in _NETWORK_SYSTEMS) else "local"


def text_decoder(encoding: str) -> codecs.IncrementalDecoder:
    """What decodes text block by block; BadRequest where there is no such encoding, or it is not one of text."""
    try:
        "".encode(encoding)  # refuses Python's codecs that are not of text
        return codecs.getincrementaldecoder(encoding)()
    except (LookupError, UnicodeError, TypeError, ValueError):
        raise BadRequest.of("encoding", f"no such text encoding {encoding!r}") from None


def _delimiter(text: str) -> str:
    text = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(text) != 1 or text in '"\r\n':
        raise ValueError("a delimiter is one character, or the word tab")
    return text


def _encoding(name: str) -> str:
    try:
        text_decoder(name)
    except BadRequest as error:
        raise ValueError(error.fields[0].message) from None
    return name


def known_encodings() -> list[str]:
    """Those of text, by their usual names; they have others too."""
    found = list[str]()
    for name in sorted({*aliases.values()}):
        with suppress(ValueError):
            found.append(_encoding(name.replace("_", "-")))
    return found


def _pointer(text: str) -> str:
    if text and not text.startswith("/"):
        raise ValueError("a JSON Pointer begins with /, as in /data/users")
    return text


class IngestOptions(ApiModel):
    """How a file becomes records: the text parts of an upload, the query of a raw body, the flags of a command."""

    model_config = ConfigDict(strict=False)  # they come as texts

    record_type: NewRecordType | None = Field(None, description="Makes records of this type of what is in the file.")
    header: str = Field("auto", description="auto: the first line names the fields, if it is no record beyond doubt; "
                                            "none: they are column_1, column_2...; or the names, separated by commas.")
    delimiter: Annotated[str, AfterValidator(_delimiter), Field(
        json_schema_extra={"pattern": r'^([^"\r\n]|tab|\\t)$'})] | None = Field(
        None, description="Of a CSV file: one character (a blank is any run of them), or tab; found if missing.")
    encoding: Annotated[str, AfterValidator(_encoding)] | None = Field(
        None, description="Of a text; stands before the file. Default: UTF-8, UTF-16 with its mark, or windows-1252.")
    ragged: Literal["refuse", "pad"] = Field("refuse", description="Whether CSV rows may be short: pad ends them in "
                                                                   "nulls.")
    skip: int = Field(0, ge=0, le=1_000_000, description="Lines to leave out before the header of a CSV file.")
    comment: str | None = Field(None, min_length=1, max_length=20, description="Leaves out the lines of a CSV file "
                                                                               "that begin so.")
    sheet: str | None = Field(None, min_length=1, max_length=255, description="Of an xlsx file; default: the first.")
    split: bool = Field(False, description="Each list in a JSON object becomes a record type of its name.")
    path: Annotated[str, AfterValidator(_pointer), Field(json_schema_extra={"pattern": "^(/|$)"})] | None = Field(
        None, max_length=1000, description="JSON Pointer to the records in a JSON file, such as /data/users.")


INGEST_OPTIONS = [to_camel(name) for name in IngestOptions.model_fields]


_UNSOUND = re.compile("[\0\ud800-\udfff]")  # what SQLite, or UTF-8, cannot hold
_UNLIKELY = re.compile("[\0-\x08\x0e-\x1f\x7f]")  # no text in an encoding of single bytes has these


class TextEncoding:
    """Tells block by block which encoding a text is in: `told`, or UTF-8, UTF-16 by its mark, or else windows-1252."""

    def __init__(self, told: str | None):
        self.name, self._told = told or "utf-8", told
        self._decoder = text_decoder(told) if told else None
        self._head, self._unlikely = b"", False

    def feed(self, block: bytes, last: bool = False) -> None:
        """Takes a block in; UnicodeError says why it is no text in any of them."""
        first = self._decoder is None
        if self._decoder is None:
            self._head += block
            if len(self._head) < 2 and not last:
                return
            block = self._head
            self.name = "utf-16" if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
            self._decoder = text_decoder(self.name)
        held = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(block, last)
        except UnicodeError as error:
            if self._told or self.name != "utf-8":
                raise UnicodeError(f"it is not text in {self.name}; the part encoding names another") from error
            self.name, self._decoder = "windows-1252", codecs.getincrementaldecoder("windows-1252")("replace")
            text = self._decoder.decode(held + block, last)
        if first or self.name == "windows-1252":  # to look through all of a long text costs more than to decode it
            self._unlikely = self._unlikely or bool(_UNLIKELY.search(text))
        if "\0" in text:
            raise UnicodeError("it has a NUL character, so it is not text")
        if self._unlikely and self.name == "windows-1252" != self._told:
            raise UnicodeError("it is not text in UTF-8, in UTF-16 with a byte order mark, or in windows-1252")


class _Beginning:
    """Tells block by block whether content begins as its type does; ValueError says that it does not."""

    def __init__(self, magic: tuple[bytes, ...]):
        self._magic, self._head = magic, b""

    def feed(self, block: bytes, last: bool = False) -> None:
        self._head = (self._head + block)[:16]
        if self._head.startswith(b"\xd0\xcf\x11\xe0"):
            raise ValueError("it has a password, or is an old Office file; save it as .xlsx without one")
        if (last or len(self._head) == 16) and not self._head.startswith(self._magic):
            raise ValueError("it does not begin as such a file does")


def upload_too_large(settings: Settings) -> BadRequest:
    """The refusal of an upload over the limit; the same words before and while it is read."""
    return BadRequest.of("file", f"is larger than {settings.max_upload_bytes} bytes (TASKAPI_MAX_UPLOAD_BYTES)")


# Suffixes by the media types of bodies that are a file; `file_format` enters more.
RAW_TYPES: dict[str, str] = {"application/vnd.sqlite3": "sqlite", "application/sql": "sql"}
SCHEMA_TYPES = ("sqlite", "sqlite3", "db", "sql")  # of files that tell of records, and are no records


def check_upload_head(content_type: str, length: int, settings: Settings) -> tuple[str, str]:
    """What an upload's headers alone can tell: the boundary of its form, or else the suffix of the file that its body
    is; the other is empty. Raises BadRequest, UnsupportedMedia. `length` is -1 where unknown."""
    kind, options = multipart.parse_options_header(content_type)
    if kind not in ("multipart/form-data", *RAW_TYPES):
        raise UnsupportedMedia("send the file as multipart/form-data, in a part named file; or as the body, which may "
                               f"be {', '.join(RAW_TYPES)}")
    suffix = RAW_TYPES.get(kind, "")
    boundary = "" if suffix else str(options.get("boundary", ""))
    if not suffix and not boundary:
        raise BadRequest("the Content-Type multipart/form-data has no boundary")
    if length > settings.max_upload_bytes + MULTIPART_OVERHEAD:
        raise upload_too_large(settings)
    return boundary, suffix


def _readable(text: str) -> str:
    """A header of a part, whose bytes are here as Latin-1: nearly all clients send UTF-8, some Windows' characters."""
    raw = text.encode("latin-1")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace")


def _part_filename(part: multipart.MultipartSegment) -> str | None:
    """A part's file name in the forms in use: as it is, as `filename*` (RFC 5987), as an encoded word (RFC 2047)."""
    given = re.search(r";\s*filename\*\s*=\s*\"?([\w-]+)'[\w-]*'([^\";\s]+)", part.header("Content-Disposition", ""),
                      re.ASCII | re.IGNORECASE)
    with suppress(LookupError, ValueError, HeaderParseError):
        if given:
            return unquote(given[2], encoding=given[1], errors="replace")
        if part.filename and part.filename.startswith("=?"):
            return str(make_header(decode_header(part.filename)))
    return None if part.filename is None else _readable(part.filename)


class Upload:
    """A file that a client sends, and the options beside it, which are texts by name.

    The file's name, its type and its content are checked while it goes to an AtomicFile, which whoever receives the
    upload keeps or not. Raises BadRequest at the first thing that is wrong.
    """

    def __init__(self, file: AtomicFile, settings: Settings, options: Mapping[str, str], also: Sequence[str]):
        self.file, self.options = file, ChainMap({}, dict(options))  # those of the form win
        self.filename = self.content_type = ""
        self._settings, self._also = settings, also
        self._check: _Beginning | TextEncoding | None = None  # of a type that only the settings know, nothing
        self._name, self._text = "", b""  # of the part that is being read

    def begin(self, filename: str, declared: str) -> None:
        """The file's name, and the media type that the client declares, if any."""
        self.filename = file_label(filename)
        suffix = self.filename.rpartition(".")[2].lower() if "." in self.filename else ""
        allowed = (*self._settings.upload_types, *self._also)
        if ("jpg" if suffix == "jpeg" else suffix) not in allowed:
            raise BadRequest.of("file", f"files {f'of type {suffix!r}' if suffix else 'without an extension'} are not "
                                        f"accepted; accepted are: {', '.join(allowed)}")
        # Clients declare texts in many ways; a binary type that is another one than the name's is a contradiction.
        others = {other.content_type for other in FILE_TYPES.values() if other.magic}
        kind = FILE_TYPES.get(suffix)
        if kind and declared in others and declared != kind.content_type:
            raise BadRequest.of("file", f"is declared as {declared} but named .{suffix}")
        self.content_type = kind.content_type if kind else "application/octet-stream"
        if kind:  # the option encoding so has to stand before the file
            self._check = _Beginning(kind.magic) if kind.magic else TextEncoding(self.options.get("encoding"))

    def write(self, block: bytes) -> None:
        """More of the file; an empty block ends it."""
        room = self._settings.max_upload_bytes - self.file.bytes
        try:
            if self._check:
                self._check.feed(block[:room], last=not block)  # what is wrong first is said, wherever blocks end
        except ValueError as error:
            raise BadRequest.of("file", f"is not {self.filename.rpartition('.')[2].lower()}: {error}") from None
        if len(block) > room:
            raise upload_too_large(self._settings)
        self.file.write(block)

    def take(self, event: multipart.MultipartSegment | bytes | None) -> None:
        """An event of the multipart parser: the head of a part, some of its content, or its end."""
        if isinstance(event, multipart.MultipartSegment):
            self._begin_part(event)
        elif self._name == "file":
            self.write(bytes(event or b""))
        elif event is None:
            try:
                self.options[self._name] = self._text.decode()
            except UnicodeDecodeError:
                raise BadRequest.of(self._name, "is not UTF-8") from None
        else:
            self._text += event
            if len(self._text) > 2**14:
                raise BadRequest.of(self._name, "is over 16 KiB")

    def _begin_part(self, part: multipart.MultipartSegment) -> None:
        name, filename = _readable(part.name or ""), _part_filename(part)
        self._name, self._text = name, b""
        if not name:
            raise BadRequest("the multipart body is broken: a part has no name")
        if name == "file":
            if filename is None:
                raise BadRequest.of("file", "has no file name")
            if self.filename:
                raise BadRequest.of("file", "is one file too many: send one")
            self.begin(filename, (part.content_type or "").partition(";")[0].strip().lower())
        elif filename is not None:
            raise BadRequest.of(name, "is not where a file goes: the part is `file`")
        elif name not in INGEST_OPTIONS:
            hint = did_you_mean(name, INGEST_OPTIONS) or f"; known are: file, {', '.join(INGEST_OPTIONS)}"
            raise BadRequest.of(name, f"is not known here{hint}")
        elif name in self.options.maps[0]:
            raise BadRequest.of(name, "is given twice")

    def end(self) -> None:
        """All of the body is here; raises BadRequest if no file was in it."""
        if not self.filename:
            raise BadRequest.of("file", "is missing")


@contextmanager
def receive_upload(blocks: Iterator[bytes], content_type: str, settings: Settings, folder: DataFolder,
                   options: Mapping[str, str], also: Sequence[str] = ()) -> Iterator[Upload]:
    """The upload that a body is, a form or the file itself; what is not kept inside the block is gone after it.

    Types in `also` are taken besides those in the settings.

    `options`, by name, come from elsewhere; the form may have further ones. One of them, `filename`, names a file that
    is the body. Raises BadRequest, UnsupportedMedia, DiskFull, StorageError.
    """
    boundary, suffix = check_upload_head(content_type, -1, settings)
    with AtomicFile(folder.root) as file:
        told = {name: options[name] for name in INGEST_OPTIONS if name in options}
        upload = Upload(file, settings, told, also)
        if suffix:
            filename = options.get("filename", "body")
            upload.begin(filename if "." in filename else f"{filename}.{suffix}", "")
            for block in chain(blocks, [b""]):
                upload.write(block)
        else:
            try:
                with multipart.PushMultipartParser(boundary, max_segment_count=32, header_charset="latin-1") as parser:
                    for block in blocks:
                        for event in parser.parse(block):
                            upload.take(event)
                    parser.close()  # which sees that the end has come; in multipart 1.0 the `with` does not
            except multipart.MultipartError as error:
                raise BadRequest(f"the multipart body is broken: {error.args[0]}") from None
        upload.end()
        yield upload


Writing = Generator[Progress, None, None]  # says now and then how far it is


class ExportSink:
    """Takes the bytes of an export into a file, gzipped or not; or into a zip, a file with `suffix` for each part."""

    closed = False  # what Arrow asks for

    def __init__(self, file: AtomicFile, *, gzip: bool, suffix: str = ""):
        self.file, self._suffix = file, suffix
        # Window bits over 16 ask zlib for the gzip container, which holds no time and no name: equal in, equal out.
        self._packer = zlib.compressobj(6, zlib.DEFLATED, 31) if gzip else None
        self._zip = zipfile.ZipFile(cast(Any, self), "w") if suffix else None
        self.interrupted: Callable[[], bool] = bool  # where a library writes without a pause

    def write(self, block: bytes) -> int:
        """Appends; raises Interrupted. An archive that was left open writes its end when it is collected: nowhere."""
        if not self.file.closed:
            if self.interrupted():
                raise Interrupted
            self.file.write(self._packer.compress(block) if self._packer else block)
        return len(block)

    def flush(self) -> None:
        """What the zip asks for."""

    @contextmanager
    def part(self, name: str) -> Iterator[Any]:
        """Takes what is written of a record type: a file of its own in the zip, or all of it as it comes."""
        if not self._zip:
            yield self
            return
        device = re.fullmatch("con|prn|aux|nul|(com|lpt)[0-9]", name)  # as Windows has it
        entry = zipfile.ZipInfo(f"{'_' if device else ''}{name}.{self._suffix}")
        entry.compress_type = zipfile.ZIP_DEFLATED
        with self._zip.open(entry, "w", force_zip64=True) as member:
            yield member

    def close(self) -> None:
        """Ends the file; nothing may be written after it."""
        if self._zip:
            self._zip.close()
        if self._packer:
            self.file.write(self._packer.flush())
            self._packer = None


Writer = Callable[[ExportSink, RecordStore, Selected], Writing]


def _cell(field: str, excel_safe: bool) -> str:
    """A field's name in the header; those of an uploaded file can be formulas too."""
    shown = f"'{field}" if excel_safe and field[0] in FORMULA_STARTS else field
    return '"' + shown.replace('"', '""') + '"'


def _write_text(text: RecordText, sink: ExportSink, records: RecordStore, wanted: Selected) -> Writing:
    with records.query(wanted) as query:
        for table in query.tables:
            before, after = text.before, text.empty
            if text.delimiter is not None:
                text = text._replace(null='""' if len(table.columns) == 1 else "")  # many skip an empty line
                header = str(text.delimiter).join(_cell(field, wanted.excel_safe) for field in table.columns)
                before = after = f"{chr(0xfeff) if wanted.excel_safe else ''}{header}{text.between}"
            with sink.part(table.name) as part, query.blocks(text, table.name) as blocks:
                for block in blocks:
                    part.write(before.encode() + block)
                    before, after = text.between, text.after
                    yield query.progress
                part.write(after.encode())


def _write_sql(sink: ExportSink, records: RecordStore, wanted: Selected) -> Writing:
    dialect = DIALECTS[wanted.dialect]
    text = RecordText("),\n(", ", ", forms=dialect.forms, null="NULL")
    with records.query(wanted._replace(split=True)) as query:
        creating = "".join(dialect.create(query, table) for table in query.tables)
        sink.write(f"{dialect.begin}{creating}{dialect.loading}".encode())
        for table in query.tables:
            with query.blocks(text, table.name) as blocks:
                for block in blocks:
                    sink.write(dialect.insert(table).encode() + block + b");\n")
                    yield query.progress
        sink.write(dialect.end.encode())


def _write_database(sink: ExportSink, records: RecordStore, wanted: Selected) -> Writing:
    progress = Progress()
    with sink.file.beside() as copy:
        for progress in records.copy_to(copy.path, wanted):
            yield progress
        with copy.open() as stream:
            while block := stream.read(_BLOCK):
                sink.write(block)
                yield progress


# What the packages of the extra `formats` write


def lacking(packages: Iterable[str]) -> str:
    """What to install where some of these are missing; nothing if all are there."""
    missing = []
    for name in packages:
        try:
            missing += [] if find_spec(name.lower().replace("-", "_")) else [name]
        except (ImportError, ValueError):
            missing.append(name)
    wanted = " ".join(f'"{name}>={FORMAT_PACKAGES[name]}"' for name in missing)
    return f'needs {" and ".join(missing)}: pip install "taskapi[formats]", or {wanted}' if missing else ""


def _package(name: str) -> Any:
    """A module that is imported only when it is used."""
    try:
        return import_module(name)
    except ImportError as error:
        raise JobFailed(f"{name} cannot be imported ({error}); pip install \"taskapi[formats]\"") from None


_GROUP_ROWS, _GROUP_BYTES = 50_000, 2**25  # of the parts of a Parquet file that are written one by one
_ARROW_CELLS: Mapping[Kind, str] = {
    "none": "NULL", "int": "{c}", "float": _FLOAT_CELL, "decimal": "{c}", "bool": _BOOL, "date": "{c}",
    "datetime": f"coalesce({_MOMENT}, {{c}})", "text": "", "json": ""}


def _arrow_type(arrow: Any, query: Query, table: Table, field: str, kind: Kind) -> Any:
    if kind == "decimal":
        whole, places = query.digits(table, field) or (99, 0)  # beyond 38 digits only texts hold them
        return arrow.decimal128(max(1, whole + places), places) if whole + places <= 38 else arrow.string()
    return {"int": arrow.int64(), "float": arrow.float64(), "bool": arrow.bool_(), "date": arrow.date32(),
            "datetime": arrow.timestamp("us")}.get(kind, arrow.string())


def _arrow_reader(schema: Any, types: Mapping[str, Any]) -> Callable[[bytes], Any]:
    """What makes a table of the lines of many records."""
    arrow, csv_reader = map(_package, ("pyarrow", "pyarrow.csv"))
    parsed = csv_reader.ParseOptions(newlines_in_values=True, ignore_empty_lines=False)
    converted = csv_reader.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True, true_values=[
        "true"], false_values=["false"], quoted_strings_can_be_null=False)

    def read(block: bytes) -> Any:
        options = csv_reader.ReadOptions(column_names=[*types], block_size=len(block) + 2)
        try:
            return csv_reader.read_csv(arrow.BufferReader(block + b"\r\n"), options, parsed, converted).cast(schema)
        except arrow.ArrowInvalid as error:
            raise JobFailed(f"a value does not fit its column: {error}") from None

    return read


def _write_parquet(sink: ExportSink, records: RecordStore, wanted: Selected) -> Writing:
    """SQLite makes lines, and Arrow columns of them: neither makes Python objects of records, or needs its lock."""
    arrow, parquet = map(_package, ("pyarrow", "pyarrow.parquet"))
    stored = {"datetime": arrow.timestamp("us", "UTC"), "json": arrow.json_()}
    text = RecordText("\r\n", ",", forms=_ARROW_CELLS)
    with records.query(wanted) as query:
        for table in query.tables:
            types = {field: _arrow_type(arrow, query, table, field, kind) for field, kind in table.columns.items()}
            schema = arrow.schema([(field, stored.get(kind, types[field])) for field, kind in table.columns.items()])
            read, group = _arrow_reader(schema, types), []
            with (sink.part(table.name) as part, query.blocks(text, table.name) as blocks,
                  parquet.ParquetWriter(part, schema) as file):
                for block in chain(blocks, [None]):
                    group += [] if block is None else [read(block)]
                    rows, size = sum(made.num_rows for made in group), sum(made.nbytes for made in group)
                    if rows and (rows >= _GROUP_ROWS or size >= _GROUP_BYTES or block is None):
                        file.write_table(arrow.concat_tables(group), row_group_size=rows)
                        group = []
                    yield query.progress


_SHEET_ROWS, _CELL_TEXT = 2**20 - 1, 32_767  # beside the header; UTF-16 units
_SHEET_STEP = 50  # records that are written between two yields
_FIRST_DAY = "'1900-03-01'"  # before it Excel counts a day that there never was
_EXACT = ("iif({c} IS NULL OR (length(replace(replace({c}, '-', ''), '.', '')) <= 15 AND NOT {c} GLOB '*[eE]*') OR "
          "decimal_key(exact_float(CAST({c} AS REAL))) = decimal_key({c}), {c}, '\"' || {c} || '\"')")
_SECONDS = "(strftime('%s', substr(m, 1, 19)) + 2209161600 + substr(m, 21, 3) / 1000.0) / 86400.0"
_SHEET_CELLS: Mapping[Kind, str] = {
    "none": "NULL", "bool": _BOOL, "text": "json_quote({c})",
    "int": f"iif({{c}} BETWEEN {-2**53} AND {2**53}, {{c}}, '\"' || {{c}} || '\"')",
    "float": _FLOAT_CELL, "decimal": _EXACT,
    "date": f"iif({{c}} >= {_FIRST_DAY}, CAST(julianday({{c}}) - 2415018.5 AS INTEGER), '\"' || {{c}} || '\"')",
    "datetime": f"(SELECT iif(m >= {_FIRST_DAY} AND substr(m, 24) = '000', {_SECONDS}, '\"' || {{c}} || '\"') "
                f"FROM (SELECT {_MOMENT} AS m))",
    "json": "CASE WHEN {c} GLOB '[[{{]*' THEN json_quote({c}) WHEN {c} GLOB '[-0-9]*' THEN "
            f"{_EXACT} ELSE {{c}} END"}


class _Digits(float):
    """A number that XlsxWriter, which has 16 digits, writes with all that it needs."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return repr(float(self))


def _sheet_name(name: str, taken: set[str]) -> str:
    """A name for a sheet: up to 31 characters, once, and not the one that Excel keeps."""
    names = (f"{name[:31 - len(end)]}{end}" for end in chain([""], map("_{}".format, itertools.count(2))))
    taken.add(free := next(each for each in names if each not in taken))
    return free


def _write_row(sheet: Any, number: int, row: Sequence[Json], formats: Sequence[Any], table: Table) -> None:
    for column, value in enumerate(row):
        if value in (math.inf, -math.inf):
            value = "Infinity" if value > 0 else "-Infinity"
        if isinstance(value, str):
            if value.startswith("<r>") and value.endswith("</r>"):  # which XlsxWriter would take for its own
                wrong = sheet.write_rich_string(number, column, value[0], sheet.plain, value[1:])
            else:
                wrong = sheet.write_string(number, column, value, formats[column])
            if wrong:
                raise JobFailed(f"field {[*table.columns][column]!r} of record {number} of {table.name!r} has over "
                                f"{_CELL_TEXT:,} characters, and no cell of xlsx holds more; fields can leave it out")
        elif isinstance(value, bool):
            sheet.write_boolean(number, column, value)
        elif value is not None:
            sheet.write_number(number, column, _Digits(value) if type(value) is float else value, formats[column])


def _write_sheet(book: Any, sheet: Any, query: Query, table: Table) -> Writing:
    head, sheet.plain = book.add_format({"bold": True}), book.add_format()
    looks = {"date": (11, book.add_format({"num_format": "yyyy-mm-dd"})),
             "datetime": (23, book.add_format({"num_format": "yyyy-mm-dd hh:mm:ss.000"}))}
    number, formats = 0, [looks.get(kind, (0, None))[1] for kind in table.columns.values()]
    for column, (field, kind) in enumerate(table.columns.items()):
        if look := looks.get(kind):
            sheet.set_column(column, column, *look)
        sheet.write_string(0, column, field, head)
    sheet.freeze_panes(1, 0)
    with query.blocks(RecordText("],[", ",", forms=_SHEET_CELLS, null="null"), table.name) as blocks:
        for block in blocks:
            for row in from_json(b"[[%b]]" % block):
                number += 1
                _write_row(sheet, number, row, formats, table)
                if number % _SHEET_STEP == 0:
                    yield query.progress


def _write_xlsx(sink: ExportSink, records: RecordStore, wanted: Selected) -> Writing:
    xlsxwriter, taken = _package("xlsxwriter"), {"history"}
    with ExitStack() as stack:
        query = stack.enter_context(records.query(wanted._replace(split=True)))
        for table in query.tables:
            if query.count_of(table) > _SHEET_ROWS:
                raise JobFailed(f"there are more than {_SHEET_ROWS:,} records of type {table.name!r}, and no sheet of "
                                "xlsx holds more; limit, or filters, take some of them")
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=sink.file.path.parent))
        sink.interrupted = wanted.interrupted
        book = xlsxwriter.Workbook(sink, {"constant_memory": True, "tmpdir": folder})
        book.set_properties({"created": datetime(2000, 1, 1)})  # equal in, equal out
        for table in query.tables:
            sheet = book.add_worksheet(_sheet_name(table.name, taken))
            stack.callback(sheet.row_data_fh.close)  # where it comes to no end
            yield from _write_sheet(book, sheet, query, table)
        book.close()
        yield query.progress


# Readers: an uploaded file in, batches of its records out, in bounded memory

_PIECE = 128 * 1024  # bytes of unpacked text that are looked at together
_RECORD_LIMIT = 8 * 2**20  # characters of one record: what no end is found for by then has none
_UNPACKED_RATIO, _UNPACKED_FREE, _UNPACKED_LIMIT = 100, 64 * 2**20, 2**36  # bytes out for each in, beyond free ones


def _bad_line(line: int, reason: str) -> JobFailed:
    return JobFailed(f"line {line}: {reason}")


def _lines_in(text: str) -> int:
    """How many line ends; a text with no line feed may come from where a carriage return alone ends a line."""
    return text.count("\n") or text.count("\r")


class BadGzip(Exception):
    """Compressed data that cannot be read on."""


def unpacked(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """What is in a gzip file of one or more members, in pieces that are not empty."""
    member, taken, given = zlib.decompressobj(31), 0, 0
    for block in blocks:
        taken += len(block)
        while block and not (member.eof and not block.strip(b"\0")):  # zeros may fill up the end
            member = zlib.decompressobj(31) if member.eof else member
            try:
                piece = member.decompress(block, _PIECE)
            except zlib.error:
                raise BadGzip(f"the gzip data is broken, within the {taken} bytes up to here") from None
            block = member.unconsumed_tail or member.unused_data
            given += len(piece)
            if given > min(_UNPACKED_LIMIT, _UNPACKED_FREE + _UNPACKED_RATIO * taken):
                raise BadGzip(f"the gzip data unpacks to too much: over {given} bytes out of {taken}")
            if piece:
                yield piece
    if piece := member.flush():
        yield piece
    if not member.eof:
        raise BadGzip(f"the gzip data is cut off after {taken} bytes")


def _decoded(blocks: Iterable[bytes], encoding: str) -> Iterator[str]:
    """The text of a file, without the mark at its beginning."""
    decoder = text_decoder(encoding)
    taken, line, mark = 0, 1, "\ufeff"
    try:
        for block in chain(blocks, [b""]):
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, not block)
            except UnicodeDecodeError as error:
                line += error.object[:error.start].count(b"\n")
                place, byte = taken - held + error.start, error.object[error.start]
                raise _bad_line(line, f"byte {place} of the text, 0x{byte:02x}, is not {encoding}; the part encoding "
                                      "names another") from None
            except UnicodeError as error:  # no byte order mark, for one
                raise _bad_line(line, f"the text is not {encoding}: {error}") from None
            if unsound := _UNSOUND.search(text):
                line += _lines_in(text[:unsound.start()])
                raise _bad_line(line, "there is a NUL character: this is no text, or in an encoding that the part "
                                      "encoding names")
            taken, line = taken + len(block), line + _lines_in(text)
            if text:
                yield text.removeprefix(mark)
                mark = ""
    except BadGzip as error:
        raise _bad_line(line, str(error)) from None


def _whole_lines(texts: Iterable[str]) -> Iterator[str]:
    """The texts, of which none ends inside a line end, with a line feed behind the last line if it has none."""
    held, last = "", "\n"
    for text in texts:
        text = held + text
        held = "\r" if text.endswith("\r") else ""
        if text := text.removesuffix("\r"):
            yield (last := text)
    if held or last[-1] != "\n":
        yield held or "\n"


_LINE_END = re.compile(r"\r\n|\n|\r")


def _without_lines(texts: Iterator[str], count: int) -> Iterator[str]:
    """The texts without their first lines."""
    while count and (text := next(texts, "")):
        *left, rest = _LINE_END.split(text, count)
        count -= len(left)
        if rest and not count:
            yield rest
    yield from texts


class ColumnBatch(NamedTuple):
    """Some records by columns: of each field the cells as CSV has them. Fields may be missing, meaning null.

    `part` names the list in the file that they stand in, where a file is split.
    """

    columns: Mapping[str, Sequence[str]]
    length: int
    part: str = ""


def _field_name(text: str, position: int) -> str:
    """What a column is called by the text in its header."""
    name = "".join(character if character.isprintable() else " " if character.isspace() else ""
                   for character in re.sub(r"\s*[\r\n]\s*", " ", text)).strip()
    return f"{name}_" if name.lower() in RESERVED_COLUMNS else name or f"column_{position}"


class FieldNames:
    """The names that the fields of a file get, each once, and what was changed for that.

    `renamed` has the new name of each that was changed: by the old one, or by its position where two were equal.
    `spare` are columns at the end of a header that it does not name; without a value they are left out. `quoted` says
    that quotes tell texts from numbers; in CSV the header, if that is in quotes throughout. `null` is a cell that is no
    value, beside the empty one. `headless` says that they are numbered because the file seems to name none.
    """

    def __init__(self) -> None:
        self.by_key: dict[str, str] = {}  # of JSON
        self.renamed: dict[str, str] = {}
        self.spare: list[str] = []
        self.quoted, self.null, self.headless = True, "", False
        self._taken: set[str] = set()  # in lower case, since SQLite sees no difference

    def of_header(self, header: Sequence[str], line: int) -> list[str]:
        """The names of all columns; JobFailed where there cannot be any."""
        names = self._add(header, line)
        self.spare = names[max((place for place, name in enumerate(header, 1) if name.strip()), default=0):]
        return names

    def of_keys(self, keys: Iterable[str], line: int) -> Mapping[str, str]:
        """The names of all keys so far, these too."""
        if new := [key for key in dict.fromkeys(keys) if key not in self.by_key]:
            self.by_key |= zip(new, self._add(new, line), strict=True)
        return self.by_key

    def _add(self, texts: Sequence[str], line: int) -> list[str]:
        first = len(self._taken) + 1
        if len(self._taken) + len(texts) > MAX_FIELDS:
            raise _bad_line(line, f"there are more than {MAX_FIELDS} fields")
        wanted = [_field_name(text, position) for position, text in enumerate(texts, first)]
        if long := next((name for name in wanted if len(name) > MAX_FIELD_NAME), None):
            raise _bad_line(line, f"the name of a field is longer than {MAX_FIELD_NAME} characters, {long[:60]}...; "
                                  "header gives names, skip leaves lines out")
        counts, theirs, names = Counter(texts), {name.lower() for name in wanted}, []
        for position, (text, name) in enumerate(zip(texts, wanted, strict=True), first):
            made, number = name, 1
            while made.lower() in self._taken or (number > 1 and made.lower() in theirs):
                number += 1
                made = f"{name[:MAX_FIELD_NAME - 6]}_{number}"
            self._taken.add(made.lower())
            names.append(made)
            if made != text:
                self.renamed[text if counts[text] == 1 else str(position)] = made
        return names


# CSV. A cell stays as it is written while rows are told apart: the quotes around it tell "" from null, and text from
# numbers.

_DELIMITERS, _RARE_DELIMITERS = ",;\t|", "^~ "  # of which a blank stands for a run of blanks
_BLANKS = re.compile(r'("[^"]*")|^[ \t]+|[ \t]+(?=\r?$)|([ \t]+)', re.MULTILINE)
_NUMERIC = re.compile(r"(?:[-+\d.,: ]|(?<=\d)[eE](?=[-+\d]))*")
_DECIMAL_COMMA = re.compile(r" *[-+]?[\d.]*\d,\d+ *")


def _cell_pattern(delimiter: str) -> str:
    """Three kinds of cell: plain (a quote inside is nothing special), quoted (two quotes mean one), empty."""
    end = re.escape(delimiter) + r"\r\n"
    return rf'[^"{end}][^{end}]*+|"[^"]*+"(?:"[^"]*+")*+|'


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if cell[:1] == '"' else cell


def _end_of(pattern: re.Pattern[str], text: str, start: int = 0) -> int:
    match = pattern.match(text, start)
    return match.end() if match else start


def _first_record(text: str, delimiter: str, start: int = 0) -> tuple[list[str], int]:
    """The cells of the record at `start`, and where they end: before a line end, unless the record is broken or cut."""
    cell, cells = re.compile(_cell_pattern(delimiter)), []
    while match := cell.match(text, start):
        cells.append(match[0])
        start = match.end() + 1
        if text[start - 1:start] != delimiter:
            break
    return cells, start - 1


def _names_rows(rows: Sequence[Sequence[str]], delimiter: str) -> bool:
    """Whether each row begins with a name, or number, that the header has no cell for, as R's write.table has it."""
    names = [row[0] for row in rows[1:]]
    if {len(row) - 1 for row in rows[1:]} != {len(rows[0])} or not all(rows[0]) or len({*names}) < len(names):
        return False
    counted = names == [*map(str, range(1, len(rows)))] and len(names) > 1
    named = delimiter in "\t " and not any(map(_NUMERIC.fullmatch, names))
    return any(row[-1] for row in rows[1:]) and (counted or named or all(name[:1] == '"' for name in names))


def _sample_rows(sample: str, delimiter: str, gap: re.Pattern[str]) -> list[list[str]]:
    """The cells of up to a hundred records, until one that is broken or cut; at least one record."""
    rows: list[list[str]] = []
    end = 0
    while len(rows) < 100 and (start := _end_of(gap, sample, end)) < len(sample):
        cells, end = _first_record(sample, delimiter, start)
        if rows and sample[end:end + 1] not in ("\r", "\n"):
            break
        rows.append(cells)
    if len(rows) > 1 and _names_rows(rows, delimiter):
        rows[0].insert(0, '""' if rows[0][0][:1] == '"' else "")
    return rows or [[""]]


def _squeezed(texts: Iterable[str]) -> Iterator[str]:
    """The texts with one blank for each run of blanks and tabs, and none around a line; what is in quotes stays."""
    held = ""
    for text in chain(texts, ["\n"]):
        held += text
        end = max(held.rfind("\n"), held.rfind("\r")) + 1 or (len(held) if len(held) > _RECORD_LIMIT else 0)
        if end:
            yield _BLANKS.sub(lambda run: run[1] or (run[2] and " ") or "", held[:end])
            held = held[end:]


def _rare_delimiter(text: str, gap: re.Pattern[str], line: int) -> str | None:
    """What cuts the first records, in which none of the usual delimiters stands, into the same number of cells.

    Blanks, which stand in texts too, have to show columns of numbers. JobFailed where they set columns apart that are
    not to be told.
    """
    lines = [each for each in text[:_PIECE].splitlines()[:100] if each.strip()]
    report = 2 * sum(bool(re.search(r"\S {2,}\S", each)) for each in lines) > len(lines) > 1
    for delimiter in _RARE_DELIMITERS:
        header, *rows = _sample_rows("".join(_squeezed([text])) if delimiter == " " else text, delimiter, gap)
        if not rows or len(header) == 1 or {*map(len, rows)} != {len(header)}:
            continue
        numbers = [all(cell and _NUMERIC.fullmatch(cell) for cell in column) for column in zip(*rows, strict=True)]
        sure = report or numbers[0] or header[0][:1] == '"' or 2 * sum(numbers) > len(numbers)
        if delimiter != " " or (any(numbers) and sure):
            return delimiter
    if report:
        raise _bad_line(line, "there are columns with blanks between them: delimiter=' ' takes runs of them for one, "
                              "delimiter=tab the lines as they are")
    return None


def _usual_width(rows: Sequence[Sequence[str]]) -> int:
    """How many cells more than half of the rows after the first have; 0 if there is no such number."""
    counts = Counter(map(len, rows[1:])).most_common(1)
    return counts[0][0] if counts and 2 * counts[0][1] > len(rows) - 1 else 0


def _fits(row: Sequence[str], width: int) -> bool:
    """Whether a row has a cell for each field, and beyond them nothing but empty ones."""
    return len(row) == width or (len(row) > width and not any(row[width:]))


def _fields(count: int) -> str:
    return f"{count} {'field' if count == 1 else 'fields'}"


def _find_delimiter(samples: Mapping[str, list[list[str]]], line: int) -> str:
    """The delimiter that cuts the first records of a text into the same number of cells, the more the better.

    JobFailed where the first line is no header for what follows, or two delimiters are as good as each other.
    """
    widths = {delimiter: len(rows[0]) for delimiter, rows in samples.items()}
    steady = [delimiter for delimiter, rows in samples.items()
              if widths[delimiter] > 1 and all(_fits(row, widths[delimiter]) for row in rows)]
    if {",", ";"} <= {*steady} and any(map(_DECIMAL_COMMA.fullmatch, chain.from_iterable(samples[";"]))):
        return ";"
    widest = max(widths[delimiter] for delimiter in steady or samples)
    best = [delimiter for delimiter in steady or samples if widths[delimiter] == widest]
    if len(steady) > 1 and len(best) > 1:
        raise _bad_line(line, f"{' and '.join(map(repr, best))} cut the lines equally well; the part delimiter decides")
    if widest == 1:  # one column, of texts in which some delimiter may stand
        best.sort(key=lambda delimiter: max(map(len, samples[delimiter])))
    usual = {delimiter: _usual_width(rows) for delimiter, rows in samples.items()}
    other = max(usual.values())
    if not steady and (other > widest or usual[best[0]] == 1 < other):
        other = other if other > widest else 1
        raise _bad_line(line, f"the first line has {_fields(widest)}, the lines below it have {other}: skip leaves out "
                              "lines above the header, comment those that begin with it, header names the fields, and "
                              "delimiter tells what is between them")
    return best[0]


def _check_rest(rest: str, delimiter: str, gap: re.Pattern[str], line: int, last: bool) -> None:
    """Tells a record that goes on in the next piece, which is well, from one that is wrong."""
    start = _end_of(gap, rest)
    cells, end = _first_record(rest, delimiter, start)
    line += _lines_in(rest[:start])
    if last and rest[end:end + 1] == '"':
        raise _bad_line(line, f"the quote that opens field {len(cells)} is never closed")
    if rest[end:end + 1] not in ("", "\r", "\n", '"'):
        line += _lines_in(rest[start:end])
        raise _bad_line(line, f"there is text behind the closing quote of field {len(cells)}: a quote in "
                              "a field is written twice, or delimiter names another delimiter")
    if len(rest) > _RECORD_LIMIT:
        raise _bad_line(line, f"a record is longer than {_RECORD_LIMIT} characters; is a quote not closed?")


def _row_pattern(delimiter: str, width: int, gap: str) -> re.Pattern[str]:
    """Groups of a row: its cells, or all of a row that has another number of them, or a text that is cut or wrong."""
    cell, comma = _cell_pattern(delimiter), re.escape(delimiter)
    end = r"[\r\n]++" if width > 1 else r"(?:\r\n|\n|\r)"  # with one field an empty line is a null
    row = comma.join([f"({cell})"] * width)
    return re.compile(rf"{gap}{row}(?:{comma})*+{end}|{gap}((?:{cell})(?:{comma}(?:{cell}))*+){end}|([\s\S]+)")


def _padded(pattern: re.Pattern[str], text: str, delimiter: str, width: int, pad: bool,
            line: int) -> Iterator[Sequence[str]]:
    """The rows of a text, those with too few cells filled up; JobFailed if that is not wanted or one has too many."""
    for match in pattern.finditer(text):
        *row, odd, rest = match.groups("")
        if odd:
            row, _ = _first_record(odd, delimiter)
            if len(row) > width or not pad:
                hint = ("ragged=pad ends short rows in nulls, comment leaves out lines by how they begin"
                        if len(row) < width else "skip or comment leaves out what stands above the header")
                raise _bad_line(line + _lines_in(text[:match.start(width + 1)]),
                                f"{_fields(len(row))} instead of {width}; {hint}")
        if not rest:
            yield row + [""] * (width - len(row))


def _csv_rows(texts: Iterator[str], delimiter: str, gap: str, fields: Sequence[str], pad: bool,
              line: int) -> Iterator[ColumnBatch]:
    """The records after the header, in which rows with too few cells end in nulls if `pad`."""
    width, rest, enough = len(fields), "", 0
    pattern, between = _row_pattern(delimiter, width, gap), re.compile(gap)
    for piece in chain(texts, [""]):
        rest += piece
        if piece and len(rest) < enough:
            continue  # a record that was cut is looked at again once there is as much again, not piece by piece
        text = rest
        rows = pattern.findall(text)
        rest = rows.pop()[-1] if rows and rows[-1][-1] else ""
        columns = [*zip(*rows, strict=True)]
        if rows and any(columns[width]):
            columns = [*zip(*_padded(pattern, text, delimiter, width, pad, line), strict=True)]
        if rows:
            yield ColumnBatch(dict(zip(fields, columns, strict=False)), len(rows))
        line += _lines_in(text[:len(text) - len(rest)])
        _check_rest(rest, delimiter, between, line, last=not piece)
        enough = 2 * len(rest)


_FORM = re.compile(r'"?\s*(?:(?P<moment>\d{1,4}([-/.])\d{1,2}\2\d{1,4}([T ].*)?|\d{4}-\d\d)|(?P<time>\d\d?:\d\d(:.*)?)|'
                   r"(?P<number>[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?)|(?i:[-.?]?|n/?a|nan|null|none|\\n))\s*\"?")
_LOOK = re.compile(r".*[.,](\d{8,}|\d{5,}[eE].*)(?P<exact>)|0?[.,]\d{1,3}(?P<share>)|(-\d*|[1-9]\d*)[.,]\d+(?P<rare>)|"
                   r"\d{5,}(?P<large>)")


def _form_of(cell: str) -> str:
    """moment, time (of a day), number, text, or nothing of what is no value."""
    match = _FORM.fullmatch(cell)
    return match.lastgroup or "" if match else "text"


def _number_in(cell: str) -> float:
    return float(_unquoted(cell).strip().replace(",", "."))


def _seems(cell: str, below: Sequence[str]) -> str:
    """What the first cell of a column is, seen from the others: their name, or a moment, time, number or text as they
    are; a number that they count on from, or that lies between them; a text that comes again. Nothing if neither shows.
    """
    form, forms = _form_of(cell), {*map(_form_of, below)} - {""}
    if not form or len(forms) != 1:
        return form if form == "text" else ""
    if form not in forms or (form != "text" and cell[:1] == '"' and not any(each[:1] == '"' for each in below)):
        return "name"
    if form != "number":
        return "again" if form == "text" and cell in below else form
    value, others = _number_in(cell), [_number_in(each) for each in below if _form_of(each)]
    counted = value and others[1:] and all(each == value + n for n, each in enumerate(others, 1))
    return "counted" if counted else "between" if min(others) <= value <= max(others) else form


def _is_record(first: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Whether the first line is a record beyond doubt, and no header: over each column of numbers or moments it has one
    too, and a moment, a count, a text that comes again, or numbers that do not look like names of columns."""
    below = zip(first, *(row for row in rows if len(row) >= len(first)), strict=False)
    seem = [*itertools.takewhile("name".__ne__, (_seems(cell, others) for cell, *others in below))]
    if len(seem) < len(first) or not _unquoted(first[0]).strip():
        return False
    cells = [_unquoted(cell).strip() for cell, each in zip(first, seem, strict=True) if each in (
        "counted", "between", "number")]
    numbers, texts = [*map(_number_in, cells)], "text" in seem or "again" in seem
    looks = {match and match.lastgroup for match in map(_LOOK.fullmatch, cells)}
    steps = {round(after - before, 9) for before, after in itertools.pairwise(sorted(numbers))}
    ordered = numbers == sorted({*numbers}) or (len(steps) == 1 and 0 not in steps) or looks == {"share"}
    if "moment" in seem or r"\N" in first or (cells and "again" in seem) or ("exact" in looks and not texts) or (
            seem[0] == "counted" and not (ordered and numbers[0] == 1 and not texts)):
        return True
    return (2 * seem.count("between") >= len(cells) > 0 and not (ordered and (texts or cells[2:]))
            and bool((not texts and (cells[2:] or "large" in looks)) or looks & {"exact", "rare"}))


def _header(names: FieldNames, rows: Sequence[Sequence[str]], told: str, line: int, *,
            texts_only: bool = False) -> tuple[list[str], bool]:
    """The fields by the header that `told` means of the first records, and whether it is the first one; of which all
    cells are names if `texts_only`."""
    first, *below = rows
    names.headless = told == "auto" and _is_record(first, below)
    header: list[str] = [f"column_{number}" for number in range(1, len(first) + 1)]
    if is_first := told == "auto" and not names.headless:
        texts = map(_unquoted, first) if texts_only else first
        indexed = below and not first[0] and all(first[1:]) and all(row[0] for row in below)  # by an unnamed column
        if (not indexed and all(map(_NUMERIC.fullmatch, texts))) or (
                texts_only and not all(cell[:1] == '"' for cell in first)):
            raise _bad_line(line, "there is no header: the first line must name the fields; header=none, or names "
                                  "there, do without, and skip or comment leaves out lines above it")
        # Spaces before a quote are a habit of some; in other cells they stay what they are.
        header = [_unquoted(cell.strip() if re.match(' +".*" *$', cell) else cell) for cell in first]
    elif told not in ("auto", "none"):
        header = next(csv.reader([told], skipinitialspace=True))
        if not _fits(first, len(header)) or (texts_only and len(first) > len(header)):
            raise _bad_line(line, f"{_fields(len(first))} instead of the {len(header)} that header names")
    return names.of_header(header, line), is_first


def _read_csv(texts: Iterator[str], options: IngestOptions, names: Mapping[str, FieldNames],
              likely: str = "") -> Iterator[ColumnBatch]:
    """Records of delimited text (RFC 4180, and what is usual beside it); `likely` delimits if the first line has it."""
    texts, text = _without_lines(_whole_lines(texts), options.skip), ""
    while len(text) < _PIECE and (piece := next(texts, "")):
        text += piece
    comment = rf"{re.escape(options.comment)}[^\r\n]*+" if options.comment else "(?!)"
    gap = re.compile(rf"(?:(?: *+|{comment})[\r\n])*+")
    start = _end_of(gap, text)
    line = 1 + options.skip + _lines_in(text[:start])
    delimiter, text = options.delimiter, text[start:]
    if told := re.match(r'sep=([^\r\n"])(?:\r\n|\r|\n)', text):  # as Excel understands it
        text, line, delimiter = text[told.end():], line + 1, delimiter or told[1]
    if not delimiter:
        samples = {each: _sample_rows(text, each, gap) for each in _DELIMITERS}
        delimiter = likely if likely and len(samples[likely][0]) > 1 else _find_delimiter(samples, line)
        if max(len(rows[0]) for rows in samples.values()) == 1:
            delimiter = _rare_delimiter(text, gap, line) or delimiter
    if delimiter == " ":
        texts = _squeezed(chain([text], texts))
        text = next(texts)
    first, end = _first_record(text, delimiter)
    if text[end:end + 1] not in ("\r", "\n"):
        _check_rest(text, delimiter, gap, line, last=True)
        raise _bad_line(line, "there is no header: the file is empty" if not text else
                        f"the first line is longer than {_PIECE} characters")
    rows = _sample_rows(text, delimiter, gap) if options.header == "auto" else [first]
    fields, is_first = _header(names[""], rows, options.header, line)
    names[""].quoted = is_first and all(cell[:1] == '"' for cell in rows[0])
    names[""].null = '""' if len(fields) == 1 else ""  # instead of a line that is empty, in our own exports
    yield ColumnBatch(dict.fromkeys(fields, ()), 0)  # a file without records has fields too
    if is_first:
        end = _end_of(_LINE_END, text, end)
        text, line = text[end:], line + _lines_in(text[:end])
    between = gap.pattern if len(fields) > 1 else rf"(?:{comment}(?:\r\n|\n|\r))*+"
    texts = chain([text] if text else [], texts)
    yield from _csv_rows(texts, delimiter, between, fields, options.ragged == "pad", line)


# JSON. Its values become cells as CSV has them, so that all that follows is the same: texts in quotes, null as nothing,
# anything else as compact JSON, in which numbers keep the digits that they came with.


class _JsonNumber(str):
    """The text of a JSON number that is no integer."""

    __slots__ = ()


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("an object has a key twice")
    return made


def _refuse_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON: null is")


_JSON_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_JsonNumber, parse_constant=_refuse_constant)
_JSON_ENCODER = json.JSONEncoder(ensure_ascii=False)
_JSON_SPACES = " \t\r\n"
_JSON_SPACE = re.compile(f"[{_JSON_SPACES}]*")
_UNSOUND_JSON = re.compile(r"[\ud800-\udfff]|(?<!\\)(?:\\\\)*\\u0000")  # as `_UNSOUND`, in compact JSON


def _compact(value: Json) -> str:
    """JSON text without spaces, every number with the digits it came with."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_compact(key)}:{_compact(member)}" for key, member in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_compact, value)) + "]"
    return value if isinstance(value, _JsonNumber) else _JSON_ENCODER.encode(value)


def _json_cells(values: Iterable[Json]) -> list[str]:
    return ['"' + value.replace('"', '""') + '"' if (kind := type(value)) is str else
            "" if value is None else
            str(value) if kind is int or kind is _JsonNumber else _compact(value) for value in values]


class _TooLong(JobFailed):
    """No end of a value was found within the limit of a record."""


class _JsonText:
    """A JSON text that is taken value by value; of all the text one value and one piece are held at a time.

    `line` is that in which what is held begins, `start` the place in it of the value taken last.
    """

    def __init__(self, texts: Iterator[str]):
        self._texts, self._text, self._place = texts, "", 0
        self.start, self.line, self.refills = 0, 1, 0

    def error(self, reason: str, place: int | None = None) -> JobFailed:
        """What is wrong here, or at another place of what is held."""
        place = self._place if place is None else place
        if place >= len(self._text):
            reason = f"the file ends too early: {reason}"
        return _bad_line(self.line + _lines_in(self._text[:place]), reason)

    def _more(self, limit: int = _RECORD_LIMIT) -> bool:
        """Takes in as much again as is held of a value, so that looking again costs no more than reading it once."""
        held = self._text[self._place:]
        if len(held) > limit:
            raise _TooLong(str(self.error(f"a record is longer than {limit} characters, or broken")))
        self.line += _lines_in(self._text[:self._place])
        pieces, size = [held], 0
        while size <= len(held) and (piece := next(self._texts, "")):
            pieces.append(piece)
            size += len(piece)
        self._text, self._place, self.refills = "".join(pieces), 0, self.refills + 1
        return size > 0

    def peek(self) -> str:
        """The next character that is no space; none at the end."""
        while True:
            if self._text[self._place:self._place + 1] in _JSON_SPACES:  # which the empty text is too
                self._place = _end_of(_JSON_SPACE, self._text, self._place)
            if self._place < len(self._text) or not self._more():
                return self._text[self._place:self._place + 1]

    def _expect(self, characters: str) -> str:
        found = self.peek()
        if not found or found not in characters:
            raise self.error(f"expected {' or '.join(characters)}")
        self._place += 1
        return found

    def value(self, limit: int = _RECORD_LIMIT) -> Json:
        """The value that comes next, if an end of it is found within the limit."""
        self.peek()
        while True:
            try:
                value, end = _JSON_DECODER.raw_decode(self._text, self._place)
                if self._text.find("\\u", self._place, end) >= 0 and _UNSOUND_JSON.search(_compact(value)):
                    raise ValueError("a text has a NUL or half a surrogate pair")
                if end == len(self._text) and not isinstance(value, (str, list, dict)) and self._more(limit):
                    continue  # a number may go on
                self.start, self._place = self._place, self._place + len(self._text[self._place:end])
                return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - 20 or error.msg.startswith("Unterminated")
                offset = error.pos - self._place
                if not cut or not self._more(limit):
                    raise self.error(error.msg, self._place + offset) from None
            except RecursionError:
                raise self.error("the record is nested too deeply") from None
            except ValueError as error:
                raise self.error(str(error)) from None

    def steps(self) -> Iterator[str]:
        """The keys of the object that comes next, or the indices of the array; each value is to be taken in between."""
        end = {"{": "}", "[": "]"}[self._expect("{[")]
        if self.peek() == end:
            self._place += 1
            return
        for number in itertools.count():
            key = str(number)
            if end == "}":
                key = self.value() if self.peek() == '"' else self._expect('"')
                self._expect(":")
            yield key
            if self._expect(f",{end}") == end:
                return

    def skip(self) -> None:
        """Takes the value that comes next, however long it is."""
        try:
            self.value()
        except _TooLong:
            if self.peek() not in ("[", "{"):
                raise
            for _ in self.steps():
                self.skip()

    def back(self, *, if_last: bool) -> bool:
        """Goes back before the value just taken, `if_last` only where nothing comes behind it."""
        line, text = self.line + _lines_in(self._text[:self.start]), self._text[self.start:]
        if if_last and self.peek():
            return False
        self._text, self._place, self.line = text, 0, line
        return True


_LIST_LENGTH = 2**20  # characters of an object that has to be one with records in it, not the first of several records
_NAMING = {"columns", "fields", "header", "headers", "names"}  # lists that name what is in lists beside them
_HELD_MEMBERS = 1000  # objects in an object that are held until it shows whether they are the records
_JsonRecords = Iterator[tuple[str, Json]]  # with the name of the list that each is in, where the file is split


def _keyed(pairs: Iterable[tuple[str, dict[str, Json]]]) -> _JsonRecords:
    for key, record in pairs:
        if record.get("key", key) != key:
            raise JobFailed(f"line 1: the object {key[:80]!r} has a member 'key', where its own name is to stand; the "
                            "part path names other records")
        yield "", {"key": key, **record}


def _in_list(text: _JsonText, key: str, found: str, names: list[Json], options: IngestOptions) -> Generator[
        tuple[str, Json], None, tuple[type | None, bool]]:
    """The records in the list that comes next; returns what its first element is, and whether they are records: that
    are objects, or lists of as many values as there are `names`, to which those in the list itself are added."""
    kind, taken = None, False
    for _ in text.steps():
        element = text.value()
        if kind is None:
            kind, named = type(element), isinstance(element, list) and len(element) == len(names)
            taken = kind is dict or (named and not (options.split or found))
            if kind is dict and not options.split and found not in ("", key):
                raise JobFailed(f"line 1: several lists hold objects, {found[:80]!r} and {key[:80]!r}: path "
                                f"names one (path=/{found[:80]}), split=true makes a record type of each")
            if taken and named and options.header == "auto":
                yield "", names
        if taken:
            yield key if options.split else "", element
        elif key.lower() in _NAMING and isinstance(element, str) and len(names) < MAX_FIELDS:
            names.append(element)
    return kind, taken


def _listed(text: _JsonText, whole: Json, options: IngestOptions) -> _JsonRecords:
    """The records in the object that comes next: in its one list of objects, or in each such list if `split`, or in a
    list of lists for which another has names; or else its members, if all are objects; or else `whole`, which is that
    object, unless it is too long."""
    found = nested = ""
    objects, names, keyed, others = list[tuple[str, dict[str, Json]]](), list[Json](), False, False
    for key in text.steps():
        if text.peek() == "[":
            kind, taken = yield from _in_list(text, key, found, names, options)
            others = others or kind is not None
            nested, found = key if kind is list else nested, key if taken else found
        elif not isinstance(member := text.value(), dict):
            others = True
        elif not others:
            objects.append((key, member))
        if keyed and others:
            raise text.error(f"{key[:80]!r} is no object, as the members before it are")
        if keyed or len(objects) > _HELD_MEMBERS:
            keyed = True
            yield from _keyed(objects)
            objects.clear()
    if objects and not others:
        numbers = [] if keyed else [*map(str, range(len(objects[0][1])))]
        if numbers and all([*column] == numbers for _, column in objects):  # columns, as pandas writes them
            yield from (("", {name: column[number] for name, column in objects}) for number in numbers)
        else:
            yield from _keyed(objects)
    elif nested and not found:
        raise JobFailed(f"line 1: the list {nested[:80]!r} holds lists; path=/{nested[:80]} takes these as records")
    elif others and not found:
        if whole is None:
            raise _bad_line(1, f"a record is longer than {_LIST_LENGTH} characters; path names records inside it, in a "
                               "file named .ndjson it may be one")
        several = len(whole) > MAX_FIELDS  # then it is no record, but a list of what its keys stand for
        yield from (("", {"key": key, "value": value}) for key, value in whole.items()) if several else [("", whole)]


def _json_records(text: _JsonText, options: IngestOptions, lines: bool) -> _JsonRecords:
    """The records of the value that comes next. Objects one after another are records too, but at a path; of `lines`
    also the only one."""
    first, lines = None, lines and not options.path
    if text.peek() == "[":
        for _ in text.steps():
            yield "", text.value()
        return
    if text.peek() != "{":
        raise text.error("expected objects one after another, a JSON array of them, or an object that holds such an "
                         "array")
    try:
        first = text.value(limit=_RECORD_LIMIT if lines else _LIST_LENGTH)
    except _TooLong:
        if lines:
            raise  # otherwise it is rather a list of records than one of them
    if first is None or (not lines and text.back(if_last=not options.path)):
        yield from _listed(text, first, options)
        return
    yield "", first
    while text.peek():
        yield "", text.value()


def _pointed(text: _JsonText, pointer: Sequence[str], options: IngestOptions, lines: bool) -> _JsonRecords:
    """The records at a JSON Pointer."""
    if not pointer:
        yield from _json_records(text, options, lines)
        return
    found = False
    if text.peek() in ("{", "["):
        for step in text.steps():
            if step == pointer[0] and not found:
                found = True
                yield from _pointed(text, pointer[1:], options, lines)
            else:
                text.skip()
    if not found:
        raise JobFailed(f"line 1: there is nothing at path {options.path!r}: no {pointer[0][:80]!r}")


_BATCH = 4096  # records of JSON at most in a batch


def _misfit(record: Json, first: Json, options: IngestOptions) -> str:
    """What is wrong with a record that does not go with the first one."""
    kinds: dict[type, str] = {dict: "a JSON object", list: "a JSON array"}
    if (wanted := kinds.get(type(first), "a plain value")) != kinds.get(type(record), "a plain value"):
        return f"a record must be {wanted}, as the first one"
    if isinstance(first, list) and len(record) != len(first) and (len(record) > len(first) or options.ragged != "pad"):
        return f"{_fields(len(record))} instead of {len(first)}; ragged=pad ends short rows in nulls"
    return ""


def _json_batches(text: _JsonText, records: _JsonRecords, options: IngestOptions) -> Iterator[tuple[str, list[Json]]]:
    """Records of one kind, some at a time, so that of the text no more than a piece stands behind them."""
    batch, last, first, refills = list[Json](), "", ..., 0
    for part, record in records:
        first = record if first is ... else first
        if wrong := _misfit(record, first, options):
            raise text.error(wrong, text.start)
        if batch and part != last:
            yield last, batch
            batch = []
        refills = refills if batch else text.refills
        batch.append(record)
        last = part
        if text.refills != refills or len(batch) == _BATCH:
            yield part, batch
            batch = []
    if batch:
        yield last, batch
    if text.peek():
        raise text.error("there is text behind the records")


def _read_json(texts: Iterator[str], options: IngestOptions, names: Mapping[str, FieldNames],
               lines: bool = False) -> Iterator[ColumnBatch]:
    """Records of any JSON text that holds some; of `lines` each is one, also if there is only one."""
    text, header = _JsonText(texts), list[str]()
    pointer = [step.replace("~1", "/").replace("~0", "~") for step in (options.path or "").split("/")[1:]]
    for part, values in _json_batches(text, _pointed(text, pointer, options, lines), options):
        if not isinstance(values[0], (dict, list)):  # each is a record too, of one field
            values = [{"value": value} for value in values]
        if isinstance(values[0], dict):
            fields = names[part].of_keys(chain.from_iterable(values), text.line)
            yield ColumnBatch({name: _json_cells(record.get(key) for record in values)
                               for key, name in fields.items()}, len(values), part)
            continue
        rows = [_json_cells(row) for row in values]
        if not header:
            header, is_first = _header(names[part], rows[:100], options.header, text.line, texts_only=True)
            rows = rows[is_first:]
        padded = (row + [""] * (len(header) - len(row)) for row in rows)
        yield ColumnBatch(dict(zip(header, zip(*padded, strict=True), strict=True)) if rows else
                          dict.fromkeys(header, ()), len(rows))


# Parquet and xlsx. Their values become cells too; the packages read them, once it is known how much that can be.

_SHEET_CELLS_READ = 10_000_000  # cells in the rectangle that holds all of a sheet: some 40 bytes each
_SHEET_BYTES = 2**30  # of all parts of a workbook, unpacked
_CELL_PLACE = re.compile(rb"""\br\s*=\s*["']([A-Za-z]{1,3})([0-9]{1,7})["']""")
_SHEET_BATCH = 1000


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_unpacked(size: int, packed: int, most: int = _UNPACKED_LIMIT) -> None:
    """JobFailed for a file that unpacks to more than its bytes can be worth."""
    most = min(most, _UNPACKED_FREE + _UNPACKED_RATIO * packed)
    if size > most:
        raise JobFailed(f"the file unpacks to too much: {size} bytes, where up to {most} are read")


def _json_value(value: Any) -> Json:
    """A value of Python's as JSON has it."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("a text has a NUL character")
        return value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else _JsonNumber(_exact_float(value))
    if isinstance(value, Decimal):
        return _JsonNumber(format(value, "f"))
    if isinstance(value, dict):
        return {str(_json_value(key)): _json_value(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_json_value, value)]
    if isinstance(value, datetime) and value.tzinfo:
        return f"{value.astimezone(UTC).replace(tzinfo=None).isoformat()}Z"
    if isinstance(value, date | time_of_day):
        return value.isoformat()
    return _json_value(value.decode()) if isinstance(value, bytes) else str(value)


def _arrow_cells(arrow: Any, column: Any) -> list[str]:
    kind = column.type
    if isinstance(kind, arrow.DictionaryType):  # a text that comes again and again is made once
        cells = [*_arrow_cells(arrow, column.dictionary), ""]
        return [cells[-1 if index is None else index] for index in column.indices.to_pylist()]
    if isinstance(kind, arrow.BaseExtensionType):
        texts, is_json = column.storage, kind.extension_name == "arrow.json"
        return _json_cells(None if text is None else _JSON_DECODER.decode(text) for text in texts.to_pylist()
                           ) if is_json else _arrow_cells(arrow, texts)
    if arrow.types.is_timestamp(kind):
        column = column.cast(arrow.timestamp("us", kind.tz and "UTC"), safe=False)
    if kind in (arrow.float32(), arrow.float16()):  # by the digits that they have
        return _json_cells(_json_value(None if text is None else float(text)) for text in
                           column.cast(arrow.string()).to_pylist())
    return _json_cells(map(_json_value, column.to_pylist()))


def _read_parquet(stream: BinaryIO, options: IngestOptions, names: Mapping[str, FieldNames]) -> Iterator[ColumnBatch]:
    """Records of a Parquet file, by its types."""
    arrow, parquet = map(_package, ("pyarrow", "pyarrow.parquet"))
    field, packed = "", stream.seek(0, io.SEEK_END)
    try:
        with parquet.ParquetFile(stream, pre_buffer=False, buffer_size=_PIECE) as file:
            about, schema = file.metadata, file.schema_arrow
            size = max(about.num_rows * about.num_columns,
                       sum(about.row_group(index).total_byte_size for index in range(about.num_row_groups)))
            _check_unpacked(size, packed)
            fields = names[""].of_header(schema.names, 1)
            yield ColumnBatch(dict.fromkeys(fields, ()), 0)
            most = max(1, min(_BATCH, _RECORD_LIMIT // (1 + size // max(1, about.num_rows))))
            size = 0
            for batch in file.iter_batches(most, use_threads=False):
                columns = {}
                for field, column in zip(fields, batch.columns, strict=True):
                    columns[field] = _arrow_cells(arrow, column)
                bulk = sum(len(cell) for cells in columns.values() for cell in cells)
                size += bulk  # one text in the file may be that of many records
                _check_unpacked(size, packed)
                step = max(1, batch.num_rows * _RECORD_LIMIT // (bulk + 1))
                for start in range(0, batch.num_rows, step):
                    some = {field: cells[start:start + step] for field, cells in columns.items()}
                    yield ColumnBatch(some, min(step, batch.num_rows - start))
    except (arrow.ArrowException, OSError, ValueError, ArithmeticError, RecursionError) as error:
        where = f"field {field!r}: " if field else ""
        raise JobFailed(f"{where}the Parquet file is damaged, cut off, or holds what no record can: "
                        f"{_first_line(error)}") from None


def _check_workbook(stream: BinaryIO) -> Iterator[ColumnBatch]:
    """Unpacks all of an xlsx file, piece by piece, before a package does at once; JobFailed for what cannot be one."""
    letters, row, held, packed = set[bytes](), 0, b"", stream.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(stream) as archive:
            parts = archive.infolist()
            if any(part.flag_bits & 1 for part in parts):
                raise JobFailed("the xlsx file has a password; save it without")
            if any(part.filename.lower().endswith("vbaproject.bin") for part in parts):
                raise JobFailed("the file has macros; save it as .xlsx without")
            _check_unpacked(sum(part.file_size for part in parts), packed, _SHEET_BYTES)
            for part in parts:
                with archive.open(part) as member:  # which also compares size and checksum
                    while block := member.read(_PIECE):
                        places = _CELL_PLACE.findall(held + block)
                        letters.update(column for column, _ in places)
                        row = max(row, max((int(number) for _, number in places), default=0))
                        held = block[-32:]
                        yield ColumnBatch({}, 0)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise JobFailed(f"the xlsx file is damaged or cut off: {_first_line(error)}") from None
    width = max((functools.reduce(lambda sum_, letter: 26 * sum_ + (letter & 31), column, 0) for column in letters),
                default=0)
    if row * width > _SHEET_CELLS_READ:
        raise JobFailed(f"its cells reach to row {row} and column {width}: sheets of up to {_SHEET_CELLS_READ:,} cells "
                        "are read")


def _open_sheet(source: Any, wanted: str | None) -> Any:
    """A sheet of a workbook, with all of its cells; JobFailed with what there is, or what is wrong."""
    calamine = _package("python_calamine")
    try:
        book = calamine.CalamineWorkbook.from_object(source)
        sheets = [sheet.name for sheet in book.sheets_metadata if sheet.typ == calamine.SheetTypeEnum.WorkSheet]
        if wanted not in (None, *sheets):
            raise JobFailed(f"there is no sheet {wanted!r}{did_you_mean(str(wanted), sheets)}; there are: "
                            f"{', '.join(map(repr, sheets))}")
        if not sheets:
            raise JobFailed("the workbook has no sheet of cells")
        return book.get_sheet_by_name(wanted or sheets[0])
    except JobFailed:
        raise
    except BaseException as error:  # noqa: BLE001  # a panic of its is no Exception
        raise JobFailed(f"the xlsx file is damaged, or no xlsx file: {_first_line(error)}") from None


def _sheet_rows(sheet: Any, options: IngestOptions) -> Iterator[tuple[int, list[Any]]]:
    """The rows that are not left out, by their numbers; of several columns one that is empty is none, as in CSV."""
    begun = False
    for number, row in enumerate(sheet.iter_rows(), 1):
        if number > options.skip and not (options.comment and str(row[0]).startswith(options.comment)) and (
                any(cell != "" for cell in row) or (begun and len(row) == 1)):
            begun = True
            yield number, row


def _sheet_cells(values: Iterable[Any], kinds: Container[type]) -> list[str]:
    """Cells of a column in which there are values of these types: of numbers all or none are whole, of days all or none
    have a time."""
    if float not in kinds:
        values = (int(value) if isinstance(value, float) else value for value in values)
    if datetime in kinds:
        values = (datetime.combine(value, time_of_day()) if type(value) is date else value for value in values)
    return _json_cells(None if value == "" else _json_value(value.replace("_xFFFE_", "\ufffe").replace(
        "_xFFFF_", "\uffff") if isinstance(value, str) else value) for value in values)


def _read_xlsx(stream: BinaryIO, options: IngestOptions, names: Mapping[str, FieldNames]) -> Iterator[ColumnBatch]:
    """Records of a sheet, by the types of its cells; an error in a cell is no value."""
    yield from _check_workbook(stream)
    stream.seek(0)
    pool = ThreadPoolExecutor(1, "taskapi-reader")
    try:  # it needs no lock of Python's, and the job can be left meanwhile
        loading = pool.submit(_open_sheet, getattr(stream, "name", stream), options.sheet)
        while not wait([loading], 0.05).done:
            yield ColumnBatch({}, 0)
        sheet = loading.result()
    finally:
        pool.shutdown(wait=False)
    begin = [(number, [cell.removesuffix(".0") for cell in _sheet_cells(row, {float})])
             for number, row in itertools.islice(_sheet_rows(sheet, options), 101)]
    if not begin:
        raise _bad_line(1, "there is no header: the sheet is empty")
    fields, is_first = _header(names[""], [row for _, row in begin], options.header, begin[0][0])
    kinds = defaultdict[int, set[type]](set)
    for number, row in itertools.islice(_sheet_rows(sheet, options), int(is_first), None):
        for place, value in enumerate(row):
            if not isinstance(value, float) or value != (whole := round(value, 0)) or abs(whole) > 2**53:
                kinds[place].add(type(value))
        if number % _SHEET_BATCH == 0:
            yield ColumnBatch({}, 0)
    yield ColumnBatch(dict.fromkeys(fields, ()), 0)
    rows = (row for _, row in itertools.islice(_sheet_rows(sheet, options), int(is_first), None))
    while some := [*itertools.islice(rows, _SHEET_BATCH)]:
        yield ColumnBatch({field: _sheet_cells(column, kinds[place]) for place, (field, column) in enumerate(
            zip(fields, zip(*some, strict=True), strict=False))}, len(some))


# Kinds: what a column holds, told without loss from all of its cells


def _is_int(cell: str) -> bool:
    return str(int(cell)) == cell and -2**63 <= int(cell) < 2**63


def _is_float(cell: str) -> bool:
    return _exact_float(float(cell)) == cell and cell != "-0.0"  # SQLite keeps no sign of zero


_DECIMAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?([eE][-+]?[0-9]{1,3})?")


def _is_decimal(cell: str) -> bool:
    """Whether a number can be kept as it is written: as JSON writes numbers, and of bearable length."""
    match = _DECIMAL.fullmatch(cell)
    if not match or len(cell) > 400 or cell == "-0":
        return False
    return not match[1] or abs(Decimal(cell).adjusted()) <= 400


def _is_date(cell: str) -> bool:
    text = _unquoted(cell)
    return bool(re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text) and date.fromisoformat(text))


def _is_datetime(cell: str) -> bool:
    text = _unquoted(cell)
    return bool(re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?"
                             r"(Z|[+-][0-9]{2}:[0-9]{2})?", text) and datetime.fromisoformat(text))


_NULL = r"\N"  # without quotes, as databases write it: Postgres by COPY, MySQL
_JSON_SCALAR = re.compile(r"true|false|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_KIND_TESTS: Mapping[Kind, Callable[[str], bool]] = {
    # A quoted cell is no number, whatever it reads: the quotes are what makes a text.
    "int": _is_int, "float": _is_float, "decimal": _is_decimal, "bool": ("true", "false").__contains__,
    "date": _is_date, "datetime": _is_datetime, "text": lambda cell: cell[:1] == '"',
    "any": lambda cell: cell[:1] == '"' or _is_float(cell) or _is_int(cell),
    "json": lambda cell: cell[:1] == '"' or bool(_JSON_SCALAR.fullmatch(cell)),
}
_FITTING_TOO: Mapping[Kind, set[Kind]] = {  # what fits one of these
    "decimal": {"int"}, "any": {"int", "float", "text"}, "json": {"int", "float", "decimal", "bool", "text"}}


def _all_fit(kind: Kind, cells: Iterable[str]) -> bool:
    try:
        return all(map(_KIND_TESTS[kind], cells))
    except ValueError:  # one that cannot be read
        return False


def _kinds(cells: Sequence[str], candidates: Sequence[Kind], names: FieldNames) -> list[Kind]:
    """Those of the kinds that fit all cells."""
    distinct = {*cells} - {"", names.null, _NULL}
    if not distinct:
        return [*candidates]
    found: list[Kind] = []
    for kind in candidates:
        if kind in ("text", "any", "json") and not names.quoted:
            fits = kind == "text"
        else:
            fits = not _FITTING_TOO.get(kind, set()).isdisjoint(found) or _all_fit(kind, distinct)
        if fits:
            found.append(kind)
    return found


def _any_value(cell: str) -> Json:
    return _unquoted(cell) if cell[:1] == '"' else int(cell) if cell.lstrip("-").isdigit() else float(cell)


_TO_VALUE: Mapping[Kind, Callable[[str], Json]] = {  # any other is a text
    "int": int, "float": float, "bool": lambda cell: int(cell == "true"), "any": _any_value,
    "json": lambda cell: _compact(_unquoted(cell)) if cell[:1] == '"' else cell,
}


def _values(cells: Sequence[str], kind: Kind) -> list[Json]:
    """Cells as the record tables store them."""
    convert = _TO_VALUE.get(kind, _unquoted)
    null = ("", _NULL) if kind in ("text", "any", "json") else ("", _NULL, '""')
    return [None if cell in null else convert(cell) for cell in cells]


class IngestFormat(NamedTuple):
    """How files become records: how they are cut into cells, and of which kinds their columns may be."""

    read: Callable[[Any, IngestOptions, Mapping[str, FieldNames]], Iterator[ColumnBatch]]  # texts, or an open file
    kinds: Sequence[Kind]  # the first that fits is taken
    other: Kind  # where none fits
    head: re.Pattern[str] | None = None  # by which a text is known whatever its name says
    needs: tuple[str, ...] = ()  # packages beyond ours that read it, of what is no text


_CSV_FORMAT = IngestFormat(_read_csv, [*_KIND_TESTS], "text")
_TSV_FORMAT = _CSV_FORMAT._replace(read=partial(_read_csv, likely="\t"))
_JSON_FORMAT = IngestFormat(_read_json, ("int", "float", "decimal", "bool", "date", "datetime", "text"), "json",
                             re.compile(r'\s*(\[\s*[\[{\]]|\{\s*["}])'))
_NDJSON_FORMAT = _JSON_FORMAT._replace(read=partial(_read_json, lines=True))


# The one table of formats


class Format(NamedTuple):
    """A format of files that hold records; all that the program says of it follows from its entry.

    `options` are what a request may ask of it; `needs` the packages beyond ours that write it, some of it in Python if
    it `computes`.
    """

    suffixes: tuple[str, ...]
    content_type: str
    write: Writer
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    computes: bool = False


FORMATS: dict[str, Format] = {}
INGEST_FORMATS: dict[str, IngestFormat] = {}  # how those that can be read are, by suffix


def file_format(name: str, *suffixes: str, content_type: str, write: Writer, magic: tuple[bytes, ...] = (),
                read: IngestFormat | None = None, options: tuple[str, ...] = (), needs: tuple[str, ...] = (),
                computes: bool = False) -> None:
    """Enters a format: how records are written in it, and read, where they can be.

    The first of the suffixes is that of exports; `magic` are the first bytes that prove the type, of what is no text.
    """
    if name in FORMATS:
        raise ValueError(f"there is a format {name!r} already")
    FORMATS[name] = Format(suffixes, content_type, write, options, needs, computes)
    FILE_TYPES.update(dict.fromkeys(suffixes, FileType(content_type, magic)))
    if read:
        INGEST_FORMATS.update(dict.fromkeys(suffixes, read))
        RAW_TYPES[content_type.partition(";")[0]] = suffixes[0]


def _csv_writer(delimiter: str) -> Writer:
    """RFC 4180, but for the delimiter: a header, CRLF, every text in quotes, so that null and "" are told apart."""
    return partial(_write_text, RecordText("\r\n", delimiter, after="\r\n"))


file_format("csv", "csv", content_type="text/csv; charset=utf-8", write=_csv_writer(","),
            read=_CSV_FORMAT, options=("split",))
file_format("tsv", "tsv", content_type="text/tab-separated-values; charset=utf-8", write=_csv_writer("\t"),
            read=_TSV_FORMAT, options=("split",))
file_format("json", "json", content_type="application/json", read=_JSON_FORMAT, options=("omitNull",),
            write=partial(_write_text, RecordText(",\n", before="[\n", after="\n]\n", empty="[]\n")))
file_format("ndjson", "ndjson", "jsonl", content_type="application/x-ndjson", read=_NDJSON_FORMAT,
            write=partial(_write_text, RecordText(after="\n")), options=("split", "omitNull"))
file_format("sqlite", "sqlite", "db", "sqlite3", content_type="application/vnd.sqlite3", magic=(b"SQLite format 3\0",),
            write=_write_database)
file_format("sql", "sql", content_type="application/sql", write=_write_sql, options=("dialect",))
file_format("xlsx", "xlsx", content_type="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
            magic=(b"PK\x03\x04",), write=_write_xlsx, needs=("XlsxWriter",), computes=True,
            read=_CSV_FORMAT._replace(read=_read_xlsx, other="json", needs=("python-calamine",)))
file_format("parquet", "parquet", content_type="application/vnd.apache.parquet", magic=(b"PAR1",),
            write=_write_parquet, needs=("pyarrow",), options=("split",),
            read=_CSV_FORMAT._replace(read=_read_parquet, other="json", needs=("pyarrow",)))
INGEST_FORMATS["txt"] = INGEST_FORMATS["csv"]


def formats_at_hand() -> dict[str, str]:
    """Of each format, whether it can be written and read, or what that needs."""
    return {name: lacking(dict.fromkeys((*known.needs, *(
        INGEST_FORMATS[known.suffixes[0]].needs if known.suffixes[0] in INGEST_FORMATS else ())))) or "at hand"
        for name, known in FORMATS.items()}


class RecordReader:
    """Reads one stored file as records: `filename` tells the format, by its extension (and a .gz behind that), unless
    the content does.

    What the options leave open is found; `encoding` may be known from before, and no more than `limit` bytes are looked
    at for it. `taken` characters were read. BadRequest if it is no format that holds records.
    """

    def __init__(self, filename: str, options: IngestOptions | None = None, encoding: str | None = None,
                 limit: int = 2**62):
        *_, inner, suffix = ("", "", *filename.lower().split("."))
        self._packed = suffix == "gz"
        if (name := inner if self._packed else suffix) not in INGEST_FORMATS:
            raise BadRequest(f"no records can be read from {filename!r}; they can from {', '.join(INGEST_FORMATS)}, "
                             "and .gz of these", [FieldProblem("file", "has a type that holds no records")])
        self._format, self._limit = INGEST_FORMATS[name], limit
        self._options = options or IngestOptions.model_validate({})
        if self._format.needs and self._packed:
            raise BadRequest.of("file", f"is .{name}.gz: unpack it, .{name} is packed already")
        if lack := lacking(self._format.needs):
            raise BadRequest.of("file", f"to read {name} {lack}")
        if self._options.sheet and name != "xlsx":
            raise BadRequest.of("sheet", f"is for xlsx files, not for {name}")
        self.encoding = "utf-8" if self._format.needs else self._options.encoding or encoding
        self.names, self.counts = defaultdict[str, FieldNames](FieldNames), Counter[str]()
        self._fitting = defaultdict[str, dict[str, list[Kind]]](dict)
        self.taken = 0

    def read(self, stream: BinaryIO) -> Iterator[ColumnBatch]:
        """The records in bounded memory, with batches of none while there is nothing to see yet; JobFailed with line
        and reason where the file is wrong."""
        if not self.encoding:
            yield from self._find_encoding(stream)
        stream.seek(0)
        self.names.clear()
        if self._format.needs:
            yield from self._format.read(stream, self._options, self.names)
            return
        texts = self._texts(stream)
        head = next(texts, "")
        known = (each for each in INGEST_FORMATS.values() if each.head and each.head.match(head))
        if not self._format.head and not self._options.delimiter:
            self._format = next(known, self._format)
        try:
            yield from self._format.read(chain([head] if head else [], texts), self._options, self.names)
        except RecursionError:
            raise JobFailed("a record is nested too deeply") from None

    def _blocks(self, stream: BinaryIO) -> Iterator[bytes]:
        blocks = iter(lambda: stream.read(_PIECE), b"")
        return unpacked(blocks) if self._packed else blocks

    def _find_encoding(self, stream: BinaryIO) -> Iterator[ColumnBatch]:
        check, seen = TextEncoding(None), 0
        with suppress(UnicodeError, BadGzip):  # reading says where
            for block in self._blocks(stream):
                check.feed(block)
                seen += len(block)
                if seen >= self._limit:
                    break
                yield ColumnBatch({}, 0)
            else:
                check.feed(b"", last=True)
        self.encoding = check.name

    def _texts(self, stream: BinaryIO) -> Iterator[str]:
        self.taken = 0
        for text in _decoded(self._blocks(stream), self.encoding or "utf-8"):
            self.taken += len(text)
            yield text

    def learn(self, batch: ColumnBatch) -> None:
        """Counts the records, and narrows the kinds of the fields to those that fit these cells too."""
        if batch.columns or batch.length:
            self.counts[batch.part] += batch.length
        fitting = self._fitting[batch.part]
        for field, column in batch.columns.items():
            fitting[field] = _kinds(column, fitting.get(field, self._format.kinds), self.names[batch.part])

    def kinds(self, part: str = "") -> dict[str, Kind]:
        """The kind of each field, by all that was learned: the narrowest that fits; none if all is null."""
        found = {field: "none" if len(fitting) == len(self._format.kinds) else [*fitting, self._format.other][0]
                 for field, fitting in self._fitting[part].items()}
        return {field: kind for field, kind in found.items() if kind != "none" or field not in self.names[part].spare}

    def renamed(self) -> dict[str, str]:
        """The new names of fields by the old ones; those of a list in the file with its name in front."""
        return {f"{part}.{old}" if part else old: new for part, names in self.names.items()
                for old, new in names.renamed.items() if new in self.kinds(part)}

    def rows(self, batch: ColumnBatch, kinds: Mapping[str, Kind]) -> list[tuple[Json, ...]]:
        """The records as the tables store them, values in the order of `kinds`."""
        columns = [_values(batch.columns[field], kind) if field in batch.columns else [None] * batch.length
                   for field, kind in kinds.items()]
        return [*zip(*columns, strict=True)] if columns else [()] * batch.length


# ==== 7 Job types: what each job means: a model and a function ====


class JobRequest(ApiModel):
    """Base of the requests that make a job; `needs_file` says that a file of the job's own is what it works on."""

    needs_file: ClassVar[bool] = False

    after: str | None = Field(default=None, description="A job that has to be completed before this one runs.")

    def with_defaults(self, settings: Settings, clock: Clock) -> Self:
        """The request with its defaults filled in, after checks that need settings; raises BadRequest."""
        return self

    @property
    def heavy(self) -> bool:
        """Whether to check it may take so long that it waits for its turn to compute, as a job does."""
        return False

    @property
    def makes(self) -> str | None:
        """The record type that the job makes, if it makes one."""
        return None

    @property
    def weight(self) -> int:
        """How many records the job is about, as far as can be told: those of few go first."""
        return 1


class JobResult(NamedTuple):
    """What a job ends with: the result that clients see, a JSON object of up to 1 MiB, and its file."""

    result: dict[str, Json]
    file: StoredFile | None = None


Outcome = JobResult  # its name in 1.x
_RESULT_BYTES = 2**20


def checked_result(returned: object) -> JobResult:
    """What a job's function returned, as it will be read back; raises TypeError or ValueError for nonsense."""
    if not isinstance(returned, JobResult):
        raise TypeError(f"the job's function returned {type(returned).__name__}, and no JobResult")
    if not isinstance(returned.result, dict) or not isinstance(returned.file, StoredFile | None):
        raise TypeError("the JobResult needs a dict, and a StoredFile or None")
    data = json.dumps(returned.result, ensure_ascii=False, allow_nan=False).encode()
    if len(data) > _RESULT_BYTES:
        raise ValueError(f"the result is {len(data)} bytes of JSON, of at most {_RESULT_BYTES}")
    return JobResult(json.loads(data), returned.file)


def error_message(error: BaseException) -> str:
    """What people are told of an exception, whatever its class makes of its text."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001  # a class of somebody's own
        text = "(its text cannot be told)"
    if not isinstance(error, TaskError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return _clipped(text.encode(errors="backslashreplace").decode())


class JobContext:
    """What a job's function may use: its `job`, `checkpoint` and `progress`, the records, the folder, the settings."""

    def __init__(self, job: Job, checkpoint: Json, jobs: JobStore, records: RecordStore, folder: DataFolder,
                 settings: Settings, database: Database, stopping: Callable[[], bool],
                 on_check: Callable[[JobContext], None] = lambda context: None):
        self.job, self.checkpoint, self.progress = job, checkpoint, job.progress
        self.records, self.folder, self.settings = records, folder, settings
        self._jobs, self._database, self._stopping = jobs, database, stopping
        self.processes = 1  # that may make the parts of a request
        self.done, self.save_at = job.progress.done, math.inf  # what is saved; when to save next, if not later
        # The queue's:
        self._on_check = on_check  # the place of a test's faults
        self.computes = False  # in Python, now, though jobs of its type need not
        self.interruption: str | None = None  # why the job is canceled
        self.ended = False  # somebody else has written down how it ended: nothing more counts
        self.fresh = 0.0  # until when it may be a short one
        self.checked = math.inf  # when it last came to a check; infinite while its function does not run

    def __str__(self) -> str:
        return f"job {self.job.job_id} ({self.job.type})"

    def interrupted(self) -> bool:
        """True when the job should come to its next yield soon; one that never asks nor yields counts as stuck."""
        self.checked = monotonic()
        return self.interruption is not None or self._stopping()

    def check(self) -> None:
        """Raises Interrupted when the job is to end here; as each `yield` and `save` does."""
        if self.interrupted():
            raise Interrupted
        self._on_check(self)

    def save(self, progress: Progress, checkpoint: Json = None,
             work: Callable[[sqlite3.Connection], object] = lambda connection: None) -> None:
        """Commits `work`, the progress and the checkpoint together; raises Interrupted when the job is to end.

        A job that is canceled, or another's by now (LeaseLost), saves nothing more; one that is stopped ends after it.
        """
        def transaction(connection: sqlite3.Connection) -> None:
            if self.ended:
                raise LeaseLost
            if self.interruption:
                raise Interrupted
            self._jobs.save_progress(connection, self.job, progress, checkpoint)
            work(connection)

        self.folder.free_space()
        self._database.write(transaction)
        self.done = progress.done
        self.check()


JobSteps = Generator[None, None, JobResult]
R = TypeVar("R", bound=JobRequest)


class JobType(NamedTuple):
    """A registered job type; the function pauses at each `yield`, where it may be stopped or made to wait."""

    name: str
    model: type[JobRequest]
    run: Callable[[JobContext, Any], JobSteps]
    posted: bool
    computes: bool


JOB_TYPES: dict[str, JobType] = {}


def job_type(name: str, model: type[R], *, posted: bool = True, computes: bool = True) -> Callable[
        [Callable[[JobContext, R], JobSteps]], Callable[[JobContext, R], JobSteps]]:
    """Registers a generator function as what jobs of type `name` do; it is returned unchanged.

    Where `posted`, POST /{name} makes such a job from a JSON body. Jobs that `computes` in Python take turns; those
    that leave the work to SQLite or the disk need not.

    It is called with a JobContext and a request of type `model`, yields wherever it may be interrupted, and returns
    a JobResult. An exception it raises fails the job: JobFailed with its message, any other is logged as a bug.
    """
    def register(run: Callable[[JobContext, R], JobSteps]) -> Callable[[JobContext, R], JobSteps]:
        if name in JOB_TYPES:
            raise ValueError(f"there is a job type {name!r} already")
        JOB_TYPES[name] = JobType(name, model, run, posted, computes)
        return run

    return register


_RECIPES_LOCK = threading.Lock()
_RECIPES: OrderedDict[str, Recipe] = OrderedDict()  # checked ones by their text, the one used last at the end


_COUNT_OR_RECORDS: Json = [  # for who reads the schema
    {"required": ["count"], "properties": {"count": {"type": "integer"}, "records": {"type": "null"}}, "anyOf": [
        {"required": ["schema"], "properties": {"schema": {"type": "object"}}},
        {"properties": {"recordType": {"enum": [*PRESETS, None]}}}]},
    {"required": ["records"], "properties": {"records": {"type": "object", "additionalProperties": True},
                                             **{key: {"type": "null"} for key in ("recordType", "count", "schema")}}}]


class GenerateRequest(JobRequest):
    """Records to make: `recordType` and `count`, with a schema unless the type is a preset; or `records`."""

    model_config = ConfigDict(json_schema_extra={
        "examples": [{"recordType": "person", "count": 1000, "seed": 42}], "oneOf": _COUNT_OR_RECORDS})

    record_type: NewRecordType | None = Field(None, description="Table the records go to (default: person).")
    count: Annotated[int, Field(ge=1, le=MAX_INT), WHOLE] | None = Field(
        None, description="How many, up to TASKAPI_MAX_RECORDS.")
    seed: Count | None = Field(None, description="Same seed, same records; chosen if missing.")
    locale: str | list[str] | None = Field(None, description="Faker locale, or several: one is drawn for each record.")
    now: str | None = Field(None, description="The instant that relative dates start from; default: this one.")
    schema_: Schema | None = Field(None, alias="schema", description=(
        "Field name: type, or object with type. Or a JSON Schema: an object with properties and $schema or type."))
    records: dict[NewRecordType, RecordSpec] | None = Field(
        None, min_length=1, max_length=50, description="Several related types in one job.")
    parts: Annotated[int, Field(ge=1, le=100_000), WHOLE] | None = Field(
        None, description="Cut into so many parts, which can be made apart.")
    part: Count | None = Field(None, description="Make this part alone, counted from 0; default: all of them.")

    notes: list[str] | None = Field(None, description="What /infer said of it; not kept.")

    def with_defaults(self, settings: Settings, clock: Clock) -> Self:
        """Chooses seed and now where they are missing, and checks the whole recipe before a job exists."""
        seeds = (self.seed, settings.seed, secrets.randbelow(2**31))
        filled = self.model_copy(update={
            "seed": next(seed for seed in seeds if seed is not None),
            "now": instant(clock()) if self.now is None else self.now, "notes": None, **self._defaults})
        if filled.weight > settings.max_records:
            raise BadRequest.of("count", f"must be at most {settings.max_records} (TASKAPI_MAX_RECORDS)")
        if self.schema_ or self.records or self.parts or self.part is not None:
            filled.plan().close()  # its dates may not fit this request's instant; those of a preset fit any
        return filled

    def recipe(self) -> Recipe:
        """What to make, checked; raises BadRequest with every problem it has.

        Checking takes many times as long as answering, and clients post the same recipe again and again, so the last
        ones are kept, of large ones fewer.
        """
        moment, text = self._moment() if self.now else utc_now(), self._text
        with _RECIPES_LOCK:
            if text in _RECIPES:
                _RECIPES.move_to_end(text)
                return _RECIPES[text]
        recipe = Recipe(self._specs(), now=moment, locale=self.locale or "en_US",
                        where="records" if self.records else "")
        with _RECIPES_LOCK:
            _RECIPES[text] = recipe
            while len(_RECIPES) > 1 and sum(len(text) + kept.memory for text, kept in _RECIPES.items()) > 2**24:
                _RECIPES.popitem(last=False)
        return recipe

    @functools.cached_property
    def _text(self) -> str:
        """What a recipe depends on, with the defaults; what a copy changes is none of it."""
        return self.model_copy(update=self._defaults).model_dump_json(
            exclude={"seed", "after", "now", "parts", "part", "notes"}, exclude_none=True)

    @property
    def _defaults(self) -> dict[str, Json]:
        return {"locale": self.locale or "en_US",
                "record_type": None if self.records else self.record_type or "person"}

    @property
    def heavy(self) -> bool:
        """Not if the same recipe was checked lately."""
        return self._text not in _RECIPES

    def plan(self) -> Plan:
        """The recipe made ready for this request's seed and instant; to be closed."""
        parts = self.parts or 1
        if self.part is not None and self.part >= parts:
            raise BadRequest.of("part", f"must be less than parts, which is {parts}")
        now = None if self.now is None else self._moment()
        return self.recipe().plan(self.seed or 0, now, parts, self.part)

    @property
    def weight(self) -> int:
        """How many records are to be expected."""
        return self.recipe().total // (1 if self.part is None else self.parts or 1)

    @property
    def makes(self) -> str | None:
        """The first record type of the recipe."""
        name = None if self.schema_ else self.record_type  # of a preset, which may be several related types
        return next(iter(self.records or PRESETS.get(name or "", {}).get("records", ())), self.record_type)

    def _moment(self) -> datetime:
        try:
            return _moment(str(self.now), last=False)
        except (ValueError, OverflowError):
            raise BadRequest.of("now", "must be an instant such as 2026-01-31T12:00:00Z") from None

    def _specs(self) -> dict[str, RecordSpec]:
        """The record types asked for, from one of the three forms: related types, a schema, or a preset."""
        if self.records:
            for name, value in {"recordType": self.record_type, "count": self.count, "schema": self.schema_}.items():
                if value is not None:
                    raise BadRequest.of(name, "cannot be given together with records")
            return self.records
        record_type = self.record_type or "person"
        preset = None if self.schema_ else preset_records(record_type, self.count or 1)
        if self.count is None:
            raise BadRequest.of("count", "is required")
        return preset or _specs({record_type: {"count": self.count, "schema": self.schema_}})


_CHUNK_ROWS = 40  # made between two pauses: a millisecond or two, which is how long a request may have to wait
_SAVE_ROWS = 1000  # committed together
_SAVE_BYTES = 2**22  # of memory, that rows may take until they are
_PARTS_AHEAD = 4  # parts that a child process may have made, or be making, that are not all loaded
_MAKER_FAILURES = 3  # how often a child process may be ended while it makes one part


class Batch(NamedTuple):
    """Rows to be committed together, by record type, and the plan's state after them."""

    rows: dict[str, list[Row]]
    state: Json


def _batches(plan: Plan, rows: RowSource, state: Json = None,
             due: Callable[[int], bool] = lambda done: False) -> Generator[Batch | None, None, None]:
    """What a plan makes after that state; None is a pause. `due` tells when to commit early."""
    saved = 0
    for chunk in plan.chunks(rows, state, _CHUNK_ROWS):
        size = rows.size()
        if size > MAX_FAMILY_BYTES:
            raise JobFailed(f"a record and those made per it take more than {MAX_FAMILY_BYTES // 2**20} MiB")
        if chunk.whole and (chunk.done - saved >= _SAVE_ROWS or size >= _SAVE_BYTES or chunk.done == chunk.total
                            or due(chunk.done)):
            yield Batch(rows.made(), plan.state())
            rows.committed()
            saved = chunk.done
        else:
            yield None


def _batches_apart(plan: Plan) -> Iterator[Batch]:
    """All that a plan makes, where nothing is stored that it could look up."""
    return filter(None, _batches(plan, RowSource(plan.columns, keep=plan.looked_up)))


def _agreed(request: GenerateRequest | Mapping[str, Json], **more: int | None) -> GenerateRequest:
    """A request to be made in parts anywhere, checked."""
    given = request.model_dump(by_alias=True) if isinstance(request, GenerateRequest) else request
    asked = validated(GenerateRequest, lambda: GenerateRequest.model_validate({**given, **more}))
    if asked.seed is None:
        raise BadRequest.of("seed", "must be given, since parts that are made apart have to agree")
    return asked


def parts(request: GenerateRequest | Mapping[str, Json]) -> list[dict[str, Json]]:
    """The parts of a /generate request, each as a request of its own, for `part` or any server to make.

    Raises BadRequest if the request is wrong, or has no `seed`, or no `now` and values depend on it.
    """
    asked = _agreed(request, part=None)
    asked.plan().close()
    whole = asked.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"after"})
    return [{**whole, "parts": asked.parts or 1, "part": number} for number in range(asked.parts or 1)]


def part(request: GenerateRequest | Mapping[str, Json], number: int | None = None,
         decimals: Callable[[str], Any] = json.loads) -> Iterator[tuple[str, dict[str, Json]]]:
    """The records of part `number` of a /generate request that has `parts`, as pairs of record type and record.

    The parts of a request are together what the server makes of it, in that order within each type. The values are
    those of the JSON that it answers with; `decimals` makes a number of a decimal's text, so that Decimal keeps its
    digits. Nothing is opened, stored or started. Raises BadRequest as `parts` does, TaskError for a value that fails.
    """
    plan = (_agreed(request) if number is None else _agreed(request, part=number)).plan()
    loads = {name: [(field, decimals if kind == "decimal" else _LOAD.get(kind)) for field, kind in kinds.items()]
             for name, kinds in plan.columns.items()}

    def records() -> Iterator[tuple[str, dict[str, Json]]]:
        with closing(plan):
            for batch in _batches_apart(plan):
                for name, row in ((name, row) for name, rows in batch.rows.items() for row in rows):
                    yield name, {field: load(value) if load and value is not None else value
                                 for (field, load), value in zip(loads[name], row, strict=True)}

    return records()


def _make_parts(boss: Connection, text: str) -> None:
    """What a child process does: makes each part it is told into a file, and tells where each batch begins there.

    It ends when nobody listens any more: it outlives its parent by no more than a batch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # when it ends is for its parent to say
    request = GenerateRequest.model_validate_json(text)
    with suppress(EOFError, OSError):
        while True:
            number, path, known = boss.recv()
            try:
                with closing(request.model_copy(update={"part": number}).plan()) as plan, open(path, "wb") as file:
                    for batch in _batches_apart(plan):
                        # what was loaded before another process was ended is left out
                        rows = {name: made[max(0, known.get(name, [0])[0] - batch.state[name][0] + len(made)):]
                                for name, made in batch.rows.items()}
                        if any(rows.values()):
                            begin = file.tell()
                            pickle.dump((rows, batch.state), file)
                            file.flush()
                            boss.send(begin)
                boss.send(None)
            except (TaskError, OSError) as error:
                boss.send((isinstance(error, OSError), str(error)))


class _Makers:
    """Child processes that make the parts of a request at the same time, into files.

    Iterating gives the batches after `state` in order, and None while there is nothing to do but wait.
    """

    def __init__(self, request: GenerateRequest, folder: Path, processes: int, state: Json):
        self._text, self._parts, self._state = request.model_dump_json(by_alias=True), request.parts or 1, state or {}
        self._first = self._state.get("", 0)
        self._files = folder / f"tmp{secrets.token_hex(4)}"  # named as drafts are: the next start would remove them
        self._count = min(processes, self._parts - self._first)
        self._makers: dict[int, tuple[BaseProcess, Connection]] = {}

    def __iter__(self) -> Generator[Batch | None, None, None]:
        try:
            for number in range(self._first, self._first + self._count):
                self._start(number)
            for number in range(self._first, self._parts):
                for failures in itertools.count(1):
                    try:
                        yield from self._batches(number)
                        break
                    except (EOFError, OSError):
                        if failures == _MAKER_FAILURES:
                            message = f"the process that makes part {number} was ended {failures} times"
                            raise JobFailed(message) from None
                        self._end(number)
                        self._start(number)
                self._path(number).unlink(missing_ok=True)
                self._tell(number + _PARTS_AHEAD * self._count)
        finally:
            for number in [*self._makers]:
                self._end(number)
            for path in self._files.parent.glob(f"{self._files.name}.*"):
                path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._files.with_suffix(f".{number}")

    def _start(self, number: int) -> None:
        """Start a process for this part and others after it; it is told some ahead, so that it need not wait."""
        from multiprocessing import get_context

        spawn = get_context("spawn")
        pipe, theirs = spawn.Pipe()
        process = spawn.Process(target=_make_parts, args=(theirs, self._text), daemon=True)
        mask = getattr(signal, "pthread_sigmask", lambda *_: ())
        before = mask(getattr(signal, "SIG_BLOCK", 0), [signal.SIGINT])  # inherited: Ctrl-C is not for it
        process.start()
        mask(getattr(signal, "SIG_SETMASK", 0), before)
        theirs.close()
        self._makers[number % self._count] = process, pipe
        for ahead in range(_PARTS_AHEAD):
            self._tell(number + ahead * self._count)

    def _end(self, number: int) -> None:
        process, pipe = self._makers.pop(number % self._count)
        pipe.close()
        process.kill()
        process.join()
        process.close()

    def _tell(self, number: int) -> None:
        if number < self._parts:
            with suppress(OSError):  # the process was ended, which is met when its part is due
                self._makers[number % self._count][1].send((number, str(self._path(number)), self._state))

    def _batches(self, number: int) -> Iterator[Batch | None]:
        """What comes of a part; EOFError if its process was ended."""
        _, pipe = self._makers[number % self._count]
        while True:
            while not pipe.poll(0.1):
                yield None
            told = pipe.recv()
            if told is None:
                return
            if isinstance(told, tuple):
                raise (StorageError if told[0] else JobFailed)(told[1])
            with self._path(number).open("rb") as file:
                file.seek(told)
                batch = Batch(*pickle.load(file))  # what a child of ours has written
            self._state = batch.state
            yield batch


@job_type("generate", GenerateRequest)
def run_generate(context: JobContext, request: GenerateRequest) -> JobSteps:
    """Makes records by a schema, in the background."""
    versions = {"taskapi": __version__, **library_versions()}
    job, records = context.job, context.records
    with closing(request.plan()) as plan:
        columns, state = plan.columns, context.checkpoint
        if not state or state["versions"] != versions:  # other versions would not go on with the same values
            records.open_job(job, columns, request.recipe().bounds, request.recipe().refs)
            state = {"versions": versions, "plan": None}
        rows = RowSource(columns, records.own_counts(job), partial(records.own_rows, job),
                         partial(records.own_column, job))

        def append(batch: Batch, connection: sqlite3.Connection) -> None:
            for record_type, fresh in batch.rows.items():
                if fresh:
                    records.append(connection, job, record_type, list(columns[record_type]), fresh)

        batches = _batches(plan, rows, state["plan"], lambda done: done >= context.save_at)
        if context.processes > 1 and (request.parts or 1) > 1 and request.part is None:
            batches = iter(_Makers(request, context.folder.tmp, context.processes, state["plan"]))
        with closing(batches):
            for batch in batches:
                if batch:
                    plan.seek(batch.state)
                    state = {"versions": versions, "plan": batch.state}
                    context.save(Progress(done=plan.done, total=plan.expected()), state, partial(append, batch))
                yield
        if state["plan"]:
            plan.seek(state["plan"])
        return JobResult({"records": plan.done, "versions": versions})


def _record_text(kinds: Mapping[str, Kind], row: tuple[Json, ...]) -> str:
    """A row as the JSON object that an export makes of it."""
    def text(kind: Kind, value: Json) -> str:
        if value is not None and kind in ("decimal", "json"):
            return str(value)
        return json.dumps(bool(value) if kind == "bool" and value is not None else value, ensure_ascii=False)

    return "{" + ",".join(f"{json.dumps(field, ensure_ascii=False)}:{text(kind, value)}"
                          for (field, kind), value in zip(kinds.items(), row, strict=True)) + "}"


_PREVIEW_MOST = 10_000  # a request waits for them: a hundred of the parents and what they bring along
_PREVIEW_BYTES = 2**24


def _check_preview(size: int) -> None:
    if size > _PREVIEW_BYTES:
        raise BadRequest(f"these records take more than {_PREVIEW_BYTES // 2**20} MiB, the most that a preview may: "
                         "ask for fewer, or for shorter texts")


def preview(request: GenerateRequest) -> str:
    """JSON text of what a request would make: {"records": [...]}, or for several types an object of such lists."""
    recipe = request.recipe()
    if recipe.total > _PREVIEW_MOST:
        raise BadRequest.of("records", f"make {recipe.total} records together, of at most {_PREVIEW_MOST} in a preview")
    rows, columns, size = RowSource(recipe.columns), recipe.columns, 0
    with closing(request.plan()) as plan:
        try:
            for _ in plan.chunks(rows):
                _check_preview(rows.size())
        except TaskError as error:  # what was checked beforehand and yet cannot be drawn
            raise error if type(error) is not TaskError else BadRequest.of(
                "records" if request.records else "schema", str(error)) from None
    lists: dict[str, list[str]] = {record_type: [] for record_type in columns}
    for record_type, made in rows.made().items():
        texts = lists[record_type]
        for row in made:
            texts.append(_record_text(columns[record_type], row))
            size += len(texts[-1])
            _check_preview(size)
    joined = {record_type: f"[{', '.join(texts)}]" for record_type, texts in lists.items()}
    if len(joined) == 1 and not request.records:
        return f'{{"records": {next(iter(joined.values()))}}}'
    return f'{{"records": {{{", ".join(f"{json.dumps(name)}: {texts}" for name, texts in joined.items())}}}}}'


def _one_of(what: str, names: Collection[str], name: str) -> str:
    if name not in names:
        raise ValueError(f"no such {what} {name!r}{did_you_mean(name, names)}; there are: {', '.join(names)}")
    return name


def _takers(option: str) -> str:
    return f"; for {', '.join(name for name, known in FORMATS.items() if option in known.options)}"


def _tell_formats(schema: dict[str, Json]) -> None:
    wanting = [f"{name} {lack}" for name, known in FORMATS.items() if (lack := lacking(known.needs))]
    schema.update(enum=[*FORMATS], description=" ".join(["What kind of file.", *wanting]))


def _tell_export(schema: dict[str, Json]) -> None:
    """Says which options do not go with each other, or with some of the formats."""
    given: Json = {"not": {"enum": [False, None]}}
    clashes: list[dict[str, Json]] = [{"split": given, "gzip": given}, *({option: given, "format": {"enum": [
        name for name, known in FORMATS.items() if option not in known.options]}}
        for option in ("split", "omitNull", "dialect"))]
    schema.update(allOf=[{"not": {"required": [*clash], "properties": clash}} for clash in clashes], examples=[
        {"format": "csv", "filters": {"recordType": "person"}, "orderBy": "name", "limit": 1000}])


class ExportRequest(JobRequest):
    """Which records to write to a file, and how."""

    model_config = ConfigDict(json_schema_extra=_tell_export)

    format: Annotated[str, AfterValidator(lambda name: _one_of("format", FORMATS, name))] = Field(
        json_schema_extra=_tell_formats, description="What kind of file.")
    filters: Filters = Filters.model_validate({})
    fields: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="Which fields, in which order; default: all.")
    order_by: str | None = Field(None, min_length=1, description="Fields, separated by commas; with - "
                                                                 "before it, descending.")
    limit: Count | None = Field(None, description="How many records at most.")
    gzip: bool = Field(False, description="Compress the file.")
    excel_safe: bool = Field(False, description="CSV only: guards texts that a spreadsheet would run; adds a BOM.")
    split: bool = Field(False, description=f"A zip with one file a record type{_takers('split')}.")
    omit_null: bool = Field(False, description=f"Leaves nulls out of JSON objects{_takers('omitNull')}.")
    dialect: Annotated[str, AfterValidator(partial(_one_of, "dialect", DIALECTS))] | None = Field(
        None, json_schema_extra={"enum": [*DIALECTS]}, description=f"Of SQL; default: sqlite{_takers('dialect')}.")

    def with_defaults(self, settings: Settings, clock: Clock) -> Self:
        """Checks that the format takes the options, and that what it needs is there."""
        known = FORMATS[self.format]
        for option in self.model_fields_set & {"split", "omit_null", "dialect"}:
            if getattr(self, option) and to_camel(option) not in known.options:
                raise BadRequest.of(to_camel(option), f"does not go with {self.format}{_takers(to_camel(option))}")
        if self.split and self.gzip:
            raise BadRequest.of("gzip", "does not go with split: a zip is packed already")
        if lack := lacking(known.needs):
            raise BadRequest.of("format", f"{self.format} {lack}")
        return self.model_copy(update={"dialect": self.dialect or "sqlite"}) if "dialect" in known.options else self


@job_type("export", ExportRequest, computes=False)
def run_export(context: JobContext, request: ExportRequest) -> JobSteps:
    """Writes one consistent snapshot to data/exports."""
    export_format = FORMATS[request.format]
    context.computes = export_format.computes
    own = export_format.suffixes[0]
    suffix = "zip" if request.split else f"{own}.gz" if request.gzip else own
    label = f"{context.records.only_type(request.filters) or 'records'}.{suffix}"
    wanted = Selected(request.filters, request.fields, request.order_by, request.limit, request.excel_safe,
                      request.split, request.omit_null, request.dialect or "sqlite", context.interrupted)
    with AtomicFile(context.folder.root) as draft, closing(
            ExportSink(draft, gzip=request.gzip, suffix=own if request.split else "")) as sink:
        progress = Progress()
        with closing(export_format.write(sink, context.records, wanted)) as steps:
            for number, progress in enumerate(steps):
                if number % 50 == 49:
                    context.save(progress)
                yield
        sink.close()
        context.save(progress.model_copy(update={"total": progress.done}))
        packed = suffix.rpartition(".")[2] if request.split or request.gzip else ""
        content_type = FILE_TYPES[packed].content_type if packed else export_format.content_type
        file = draft.keep(f"exports/{context.job.job_id}.{suffix}", label, content_type)
    return JobResult({"filename": file.filename, "bytes": file.bytes, "sha256": file.sha256, "records": progress.done},
                   file)


class UploadRequest(JobRequest):
    """What an upload brought; the draft itself is not part of what the job remembers."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    filename: str
    content_type: str
    draft: SkipValidation[AtomicFile] = Field(exclude=True)

    def keep(self, job_id: str) -> StoredFile:
        """Gives the file its place in data/uploads, durably."""
        suffix = self.filename.rpartition(".")[2].lower()
        return self.draft.keep(f"uploads/{job_id}.{suffix}", self.filename, self.content_type)


@job_type("upload", UploadRequest, posted=False, computes=False)
def run_upload(context: JobContext, request: UploadRequest) -> JobSteps:
    """Gives an uploaded file its place in data/uploads; done while the client waits."""
    file = request.keep(context.job.job_id)
    yield
    return JobResult({"filename": file.filename, "bytes": file.bytes, "sha256": file.sha256,
                    "contentType": file.content_type}, file)


def _type_named_like(filename: str) -> str:
    """A record type out of a file's name; `record` if none can be made of it."""
    name = re.sub(r"[^a-z0-9]+", "_", filename.partition(".")[0].lower()).strip("_")[:63]
    return name if re.match("[a-z]", name) and name != "jobs" and not name.startswith("sqlite") else "record"


def _types_of_parts(parts: Iterable[str], filename: str = "", spell: Callable[[str], str] = str) -> dict[str, str]:
    """A record type for each list in a file, by its name; that of the file where the file is the list."""
    types: dict[str, str] = {}
    for part in parts:
        base = _type_named_like(spell(part) or filename)
        names = chain([base], (f"{base[:58]}_{number}" for number in itertools.count(2)))
        types[part] = next(name for name in names if name not in types.values())
    return types


class IngestRequest(JobRequest, IngestOptions):
    """What an uploaded file is to become; the file itself stands in the job's row."""

    needs_file: ClassVar[bool] = True

    filename: str

    def with_defaults(self, settings: Settings, clock: Clock) -> Self:
        """Checks that files of that name can hold records, and that these have a type."""
        self.reader()
        if self.split and self.record_type:
            raise BadRequest.of("split", "names the record types itself; leave recordType out")
        if not self.split and not self.record_type:
            raise BadRequest.of("recordType", "is required to make records of the file")
        return self

    @property
    def makes(self) -> str | None:
        """The record type that the file's records get."""
        return self.record_type

    def reader(self, encoding: str | None = None) -> RecordReader:
        """What reads the file, whose encoding may be known; BadRequest if it is of a type that holds no records."""
        return RecordReader(self.filename, self, encoding)


def _surveyed(context: JobContext, request: IngestRequest, file: StoredFile) -> Generator[None, None, dict[str, Json]]:
    """What there is in a file: the first checkpoint of its job, which has all that a later attempt needs to go on."""
    reader = request.reader()
    with context.folder.open(file) as stream:
        for batch in reader.read(stream):
            reader.learn(batch)
            yield
    types = _types_of_parts(reader.counts, request.filename) if request.split else {"": request.record_type}
    tables = {part: {"recordType": record_type, "kinds": reader.kinds(part), "records": reader.counts[part]}
              for part, record_type in types.items()}
    if not any(table["kinds"] for table in tables.values()):
        raise JobFailed("line 1: there are no records, so there are no fields")
    return {"tables": tables, "total": reader.counts.total(), "done": 0, "encoding": reader.encoding,
            "renamed": reader.renamed(), "headless": reader.names[""].headless}


def _load(context: JobContext, request: IngestRequest, file: StoredFile, state: dict[str, Json]) -> Generator[
        None, None, None]:
    """Commits the records of a file, from the first one on that no earlier attempt has committed."""
    reader, done, seen = request.reader(state["encoding"]), state["done"], 0
    with context.folder.open(file) as stream:
        for batch in reader.read(stream):
            seen += batch.length
            if seen > done:
                table = state["tables"][batch.part]
                rows = reader.rows(batch, table["kinds"])[done - seen:]
                add = partial(context.records.append, job=context.job, record_type=table["recordType"],
                              fields=[*table["kinds"]], rows=rows)
                done = seen
                context.save(Progress(done=done, total=state["total"]), {**state, "done": done}, add)
            yield


@job_type("ingest", IngestRequest, posted=False)
def run_ingest(context: JobContext, request: IngestRequest) -> JobSteps:
    """Makes records of an uploaded file: once over it for the kinds of the fields, once more for the records."""
    file, state = context.job.file, context.checkpoint or {}
    if file is None:
        raise JobFailed("the uploaded file is gone; upload it again")
    if "tables" not in state:  # one of an older version begins anew
        state = yield from _surveyed(context, request, file)
        tables = state["tables"].values()
        context.records.open_job(context.job, {table["recordType"]: table["kinds"] for table in tables},
                                 {table["recordType"]: max(table["records"], 1) for table in tables})
        context.save(Progress(total=state["total"]), state)
    yield from _load(context, request, file, state)
    result = {"filename": file.filename, "bytes": file.bytes, "sha256": file.sha256, "contentType": file.content_type,
              "recordType": request.record_type, "records": state["total"]}
    if request.split:
        result["recordTypes"] = {table["recordType"]: table["records"] for table in state["tables"].values()}
    if state["renamed"]:
        result["renamed"] = state["renamed"]
    if state.get("headless"):  # older versions noted none
        result["header"] = "none"
    if state["encoding"] not in ("utf-8", request.encoding):
        result["encoding"] = state["encoding"]
    return JobResult(result, file)


SAMPLE, _SAMPLE_TEXT = 10_000, 2**22  # records, and characters, that a schema is inferred from
_FEW = 20  # so many different values that come again are a choice; of fewer records no step shows a sequence
_SAYS_ID = re.compile(r"(?i:(?:^|[\W_])id)$|[a-z]I[dD]$")
_SAYS_DIGITS = re.compile(r"post|zip|phone|mobile|fax|code", re.IGNORECASE)  # names of what has one length, but no size
# Faker methods by the shape that all of the values have.
_METHODS_BY_SHAPE = {
    "uuid": re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE),
    "email": re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+"), "url": re.compile(r"https?://[^\s]+"),
    "ipv4": re.compile(r"(?:[0-9]{1,3}\.){3}[0-9]{1,3}"), "mac_address": re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}"),
}


def _pattern(texts: Collection[str]) -> str | None:
    """The pattern of texts that differ only in digits and capital letters, place by place; None if they have none."""
    if len(set(map(len, texts))) > 1 or not 0 < len(next(iter(texts))) <= 100:
        return None
    marks = []
    for place in map(set, zip(*texts, strict=True)):
        if len(place) == 1:
            marks.append(re.sub(r"([#%?\\])", r"\\\1", place.pop()))
        elif place <= set("0123456789"):
            marks.append("#")
        elif place <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
            marks.append("?")
        else:
            return None
    return "".join(marks)


def _digits(name: str, texts: Collection[str]) -> str | None:
    """The pattern of digits that are no number, by the name of their field; of few texts any digit may be another."""
    if not _SAYS_DIGITS.search(name) or not all(re.fullmatch("[0-9]+", text) for text in texts):
        return None
    pattern = _pattern(texts)
    return "#" * len(pattern) if pattern and len(texts) < _FEW else pattern


def _text_field(name: str, texts: Sequence[str]) -> dict[str, Json]:
    """A small set as it is; else a Faker method that fits shape or name; else a pattern; else words."""
    counts = Counter(texts)
    if len(counts) == 1 < len(texts):
        return {"type": "const", "value": texts[0]}
    if len(counts) <= min(_FEW, len(texts) // 2):
        return {"type": "choice", "values": dict(counts.most_common())}
    unique = {"unique": True} if len(counts) == len(texts) else {}
    if pattern := _digits(name, counts):
        return {"type": "pattern", "pattern": pattern, **unique}
    for method, shape in _METHODS_BY_SHAPE.items():
        if all(map(shape.fullmatch, counts)):
            return {"type": method, **(unique if method == "email" else {})}
    if method := _METHODS_BY_NAME.get(re.sub(r"[^a-z]", "", name.lower()), ""):
        return {"type": method, **(unique if method == "user_name" else {})}
    if len(counts) > 1 and (pattern := _pattern(counts)):
        return {"type": "pattern", "pattern": pattern, **unique}
    words = round(sum(len(text.split()) for text in texts) / len(texts))
    return {"type": "sentence", "args": {"nb_words": min(words, 50)}} if words > 1 else {"type": "word"}


def _int_field(name: str, values: Sequence[int]) -> dict[str, Json]:
    steps, distinct = {after - before for before, after in pairwise(values)}, sorted({*values})
    told = len(values) >= _FEW or (_SAYS_ID.search(name) and distinct[0] == 1 and steps == {1})
    if name and told and len(steps) == 1 and 1 <= (step := steps.pop()) <= 2**32 and abs(values[0]) < 2**62:
        return {"type": "sequence", "start": values[0], "step": step}
    if pattern := _digits(name, {*map(str, values)}):
        return {"type": "pattern", "pattern": pattern, **({"unique": True} if len(distinct) == len(values) else {})}
    if distinct[-1] - distinct[0] >= len(distinct) <= min(_FEW, len(values) // 4) and distinct[0] > -2**63:
        return {"type": "choice", "values": distinct}  # with gaps between them
    return {"type": "int", "min": max(min(values), 1 - 2**63), "max": max(values)}


def _float_field(name: str, values: Sequence[float]) -> dict[str, Json]:
    finite = [min(max(value, -1e300), 1e300) for value in values]
    if len(distinct := sorted({*finite})) <= min(_FEW, len(values) // 4):
        return {"type": "choice", "values": distinct}
    digits = max(len(f"{value!r}".partition(".")[2]) if "e" not in repr(value) else 99 for value in finite)
    return {"type": "float", "min": min(finite), "max": max(finite)} | ({"round": digits} if digits <= 12 else {})


def _any_field(name: str, values: Sequence[Json]) -> dict[str, Json]:
    """Numbers in different forms; or texts, with numbers among them."""
    if any(isinstance(value, str) for value in values):
        return _text_field(name, [*map(str, values)])
    return _float_field(name, [*map(float, values)])


def _decimal_field(name: str, texts: Sequence[str]) -> dict[str, Json]:
    values = [*map(Decimal, texts)]
    places = max(-int(value.as_tuple().exponent) for value in values)
    if not 0 <= places <= 18 or max(map(abs, values)) >= 10**18:
        return _float_field(name, [*map(float, texts)])
    return {"type": "decimal", "min": f"{min(values):f}", "max": f"{max(values):f}", "places": places}


def _datetime_field(name: str, texts: Sequence[str]) -> dict[str, Json]:
    moments = [datetime.fromisoformat(text) for text in texts]
    bounds = [instant(moment if moment.tzinfo else moment.replace(tzinfo=UTC)) for moment in moments]
    return {"type": "datetime", "from": min(bounds), "to": max(bounds),
            **({"ms": True} if any("." in text for text in texts) else {})}


def _json_field(texts: Sequence[str], nested: Callable[[str, Sequence[Json]], Json] | None) -> dict[str, Json]:
    """Lists and objects of fields inferred from what is in them; anything else, by a few of the values."""
    values = [_JSON_DECODER.decode(text) for text in texts[:1000]]
    if nested and all(isinstance(value, list) for value in values) and any(values):
        lengths = [*map(len, values)]
        return {"type": "list", "of": nested("", [*chain.from_iterable(values)]),
                "min": min(min(lengths), 20), "max": min(max(lengths), 20)}
    if nested and all(isinstance(value, dict) for value in values) and any(values):
        keys = dict.fromkeys(chain.from_iterable(values))
        return {"type": "object", "fields": {key: nested(key, [value.get(key) for value in values]) for key in keys}}
    return {"type": "choice", "values": [json.loads(text) for text in dict.fromkeys(texts[:_FEW])]}


_FIELDS_BY_KIND: Mapping[Kind, Callable[[str, Sequence[Any]], dict[str, Json]]] = {
    "int": _int_field, "float": _float_field, "decimal": _decimal_field, "text": _text_field, "any": _any_field,
    "bool": lambda name, values: {"type": "bool", "true": round(sum(values) / len(values), 4)},
    "date": lambda name, texts: {"type": "date", "from": min(texts), "to": max(texts)}, "datetime": _datetime_field,
}


def inferred_field(name: str, values: Sequence[Json], kind: Kind | None, depth: int = 1) -> Json:
    """The field of a schema that makes values like these; nulls too.

    They are as the tables store those of this kind; without one, as they are in JSON. `depth` tells in how many lists
    and objects they are, of which a schema takes MAX_DEPTH.
    """
    if kind is None:
        reader, column = RecordReader("sample.json"), ColumnBatch({"": _json_cells(values)}, len(values))
        reader.learn(column)
        kind = reader.kinds()[""]
        values = [row[0] for row in reader.rows(column, {"": kind})]
    present = [value for value in values if value is not None]
    if not present:
        return {"type": "const", "value": None}
    try:
        if kind == "json":
            nested = partial(inferred_field, kind=None, depth=depth + 1)
            field = _json_field(present, nested if depth < MAX_DEPTH else None)
        else:
            field = _FIELDS_BY_KIND[kind](name, present)
    except (OverflowError, ValueError, ArithmeticError):  # years and numbers beyond what can be calculated with
        field = _text_field(name, [*map(str, present)])
    if nulls := 1 - len(present) / len(values):
        field["null"] = round(nulls, 4)
    return field["type"] if len(field) == 1 else field


def _demands(check: Sequence[str]) -> Iterator[tuple[str, str, Json]]:
    """What a CHECK demands of columns, as keywords of JSON Schema with values; ValueError if not understood."""
    tokens = iter([*check, "AND"])
    keywords = {">=": "minimum", "<=": "maximum", ">": "exclusiveMinimum", "<": "exclusiveMaximum", "=": "const"}

    def literal(token: str) -> Json:
        return token[1:-1].replace("''", "'") if token.startswith("'") else json.loads(token)

    for token in tokens:
        long = token.upper() == "LENGTH"
        column = [*itertools.islice(tokens, 3)][1] if long else token
        operator = next(tokens).upper()
        if operator == "IN" and not long and next(tokens) == "(":
            values = [*itertools.takewhile(")".__ne__, tokens)]
            yield column, "enum", [literal(value) for value in values if value != ","]
        elif operator == "BETWEEN":
            low, _, high = itertools.islice(tokens, 3)
            yield column, "minLength" if long else "minimum", literal(low)
            yield column, "maxLength" if long else "maximum", literal(high)
        elif long:
            size = literal(next(tokens)) + {"<": -1, ">": 1}.get(operator, 0)
            for side in {"<": "max", "<=": "max", ">": "min", ">=": "min", "=": "min max"}[operator].split():
                yield column, f"{side}Length", size
        else:
            yield column, keywords[operator], literal(next(tokens))
        if next(tokens).upper() != "AND":
            raise ValueError


def _declared_field(name: str, column: TableColumn, demands: dict[str, Json]) -> dict[str, Json]:
    """The field of a column without values: by what CHECKs demand, its name, and its type, as SQLite reads that."""
    said, kind = column.type, "string"
    if said == "UUID":
        return {"type": "uuid"}
    if "INT" in said or "BOOL" in said or "SERIAL" in said:
        kind, demands = "integer", {"minimum": 0, "maximum": 1} if "BOOL" in said else demands
    elif re.search("REAL|FLOA|DOUB|DEC|NUM", said):
        kind = "number"
    elif re.search("DATE|TIME", said) or re.search("current_|now", column.default or "", re.IGNORECASE):
        return {"type": "date" if said == "DATE" else "datetime"}
    elif (column.default or "").startswith("'") and not demands:
        return {"type": "const", "value": (column.default or "")[1:-1].replace("''", "'")}
    if (length := re.search(r"\((\d+)\)", said)) and kind == "string":
        demands = {"maxLength": int(length[1]), **demands}
    valid = {"type": kind, **demands}
    field: dict[str, Json] = translated({"type": "object", "properties": {name: valid}}, "schema")[name]
    return {**field, "valid": valid} if "valid" in field else field


def _table_fields(table: OtherTable, notes: list[str]) -> dict[str, dict[str, Json]]:
    """The fields of a table by themselves: like the values that are there, as its CHECKs demand."""
    demands = defaultdict[str, dict[str, Json]](dict)
    for check in table.checks:
        try:
            for name, keyword, value in [*_demands([_unquoted_name(token) for token in check])]:
                demands[{column.lower(): column for column in table.columns}[name.lower()]][keyword] = value
        except (ValueError, LookupError, TypeError, RuntimeError):
            notes.append(f"{table.name}: CHECK ({' '.join(check)}) is not understood")
    fields = {}
    for name, column in table.columns.items():
        valid, values = demands[name], [None if isinstance(value, bytes) else value for value in column.values]
        try:
            field = inferred_field(name, values, None) if values else _declared_field(name, column, valid)
        except BadRequest as refusal:
            notes.append(f"{table.name}.{name}: its CHECK is not understood: {refusal}")
            valid, field = {}, _declared_field(name, column, {})
        fields[name] = {"type": field} if isinstance(field, str) else field
        if "enum" in valid and fields[name]["type"] not in ("choice", "const"):
            fields[name] = {"type": "choice", "values": valid["enum"]}
        elif values and valid.keys() & {"minLength", "maxLength"} and fields[name]["type"] not in ("pattern", "choice"):
            unique = {"unique": True} if fields[name].pop("unique", False) else {}
            field = {"type": "phrase", **valid}
            fields[name] = {"type": "first_of", "of": [fields[name], field], "valid": valid, **unique}
        if column.required and "null" in fields[name]:
            notes.append(f"{table.name}.{name} is NOT NULL, and of a kind that is not made")
    return fields


def _unique_field(field: dict[str, Json], column: TableColumn) -> dict[str, Json]:
    """A field of which no two values are equal."""
    if field["type"] in ("sequence", "uuid"):
        return field
    if "INT" in column.type or (column.values and isinstance(column.values[0], (int, float))):
        least, most = (Decimal(field.get(side, 1)) for side in ("min", "max"))
        return {"type": "sequence", "start": 1 if least <= 1 <= most else math.ceil(least)}
    if FIELD_TYPES.get(field["type"], FakerField).redraws is not None:
        return {**field, "unique": True}
    return {"type": "pattern", "pattern": "?" * min(max(8, field.get("minLength", 0)), field.get("maxLength", 36)),
            "unique": True}


class _Tables:
    """The tables of a database as related record types."""

    def __init__(self, tables: Sequence[OtherTable], notes: list[str]) -> None:
        self.notes, self.specs = notes, dict[str, dict[str, Json]]()
        self.tables = {table.name.lower(): table for table in tables}
        self.types = _types_of_parts(table.name for table in tables)
        left = dict(self.tables)
        while left:
            # of those that need each other first one that can do without
            name = min(left, key=lambda name: max([0, *(
                1 + any(left[name].columns[column].required for column in key.columns if column in left[name].columns)
                for key in self._waits(left[name], left))]))
            self._add(left[name], left)
            del left[name]

    def _waits(self, table: OtherTable, left: Container[str]) -> list[ForeignKey]:
        """Its foreign keys to others that come later."""
        return [key for key in table.foreign if key.table in left and key.table != table.name.lower()]

    def _add(self, table: OtherTable, left: Container[str]) -> None:
        fields, linked, late = _table_fields(table, self.notes), dict[str, ForeignKey](), self._waits(table, left)
        for key in table.foreign:
            if key.table not in self.tables or not {*key.columns} <= fields.keys() - linked.keys():
                self.notes.append(f"{table.name}: the foreign key {', '.join(key.columns)} is not understood")
            elif key in late:
                self.notes.append(f"{table.name}.{', '.join(key.columns)} is null: {key.table} refers to it in turn")
                fields |= {column: {"type": "const", "value": None} for column in key.columns}
            else:
                self._link(table, key, fields, key.table in [other.table for other in linked.values()])
                linked |= dict.fromkeys(key.columns, key)
        spec: dict[str, Json] = {"count": table.rows or 10}
        if (parent := self._parent(table, linked)) and (per := self._per(table, parent, linked)):
            spec = per
            for column in parent.columns:
                fields[column].pop("row", None)
        for columns in table.unique:
            self._unique(table, columns, fields, linked, spec)
        self.specs[self.types[table.name]] = {**spec, "schema": {
            name: field["type"] if len(field) == 1 else field for name, field in fields.items()}}

    def _link(self, table: OtherTable, key: ForeignKey, fields: dict[str, dict[str, Json]], other: bool) -> None:
        """Let columns hold the key of a row; `other` than the one that earlier columns do."""
        target = self.tables[key.table]
        names = {name.lower(): name for name in target.columns}
        for column, to in zip(key.columns, key.to if key.to[0] else target.key, strict=False):
            null = 0 if table.columns[column].required else fields[column].get("null", 0.1)
            fields[column] = {"type": "ref", "field": f"{self.types[target.name]}.{names.get(to.lower(), to)}"}
            fields[column] |= ({"row": key.columns[0]} if other else {}) | ({"null": null} if null else {})
            if target is table and table.columns[column].required:
                self.notes.append(f"{table.name}.{column} is NOT NULL, but the first row has none to refer to")

    def _parent(self, table: OtherTable, linked: Mapping[str, ForeignKey]) -> ForeignKey | None:
        """The foreign key that says per which rows these are made."""
        pairs = [columns for columns in table.unique if len(columns) > 1 and {*columns} <= linked.keys()]
        firm = [key for key in linked.values() if key.table != table.name.lower()
                and all(table.columns[column].required for column in key.columns)
                and not any({*columns} <= {*key.columns} for columns in table.unique)]
        return next((key for key in firm if not pairs or key.columns[0] in pairs[0]), None)

    def _per(self, table: OtherTable, key: ForeignKey, linked: Mapping[str, ForeignKey]) -> dict[str, Json]:
        """So many rows for each of the parent's, where that keeps their number, or no two may be equal."""
        parents = self.tables[key.table].rows
        keys = zip(*(table.columns[column].values for column in key.columns), strict=True)
        each = [*Counter(keys).values()] or [1, 3]
        low, high = min(each) if len(each) == parents or not table.rows else 0, max(each)
        pair = any({*key.columns} < {*columns} <= linked.keys() for columns in table.unique)
        if table.rows and not pair and (low != high or table.rows != parents * low):
            return {}
        return {"per": self.types[self.tables[key.table].name], "count": low if low == high else [low, high]}

    def _unique(self, table: OtherTable, columns: tuple[str, ...], fields: dict[str, dict[str, Json]],
                linked: Mapping[str, ForeignKey], spec: dict[str, Json]) -> None:
        """Let no two rows have equal values in these columns."""
        if any(fields[name].get("unique") or fields[name].get("once") or fields[name]["type"] in (
                "sequence", "uuid") for name in columns):
            return
        own = [name for name in columns if name not in linked]
        own = sorted(own, key=lambda name: "INT" not in table.columns[name].type)
        if own and (fields[own[0]]["type"] != "choice" or len(columns) == 1):
            fields[own[0]] = _unique_field(fields[own[0]], table.columns[own[0]])
        elif own and isinstance(spec.get("per"), str):
            spec["count"] = 1
        elif not own and (other := self._other(columns, linked, spec)):
            fields[other] = {**fields[other], "once": True}
        else:
            self.notes.append(f"{table.name}: that {', '.join(columns)} are unique is not understood")

    def _other(self, columns: tuple[str, ...], linked: Mapping[str, ForeignKey], spec: Mapping[str, Json]) -> str:
        """The column of these whose row may be another one each time, of as many as there are at least."""
        for column in reversed(columns):
            target = self.types[self.tables[linked[column].table].name]
            fewest, most, above = 1, max(spec["count"]) if isinstance(spec["count"], list) else spec["count"], target
            while above in self.specs:  # the own one is not yet
                count, above = self.specs[above]["count"], self.specs[above].get("per", "")
                fewest *= count[0] if isinstance(count, list) else count
            if target != spec.get("per") and fewest >= most:
                return column
        return ""


def _noted(notes: list[str]) -> dict[str, Json]:
    more = [f"and {len(notes) - 100} more"] if notes[100:] else []
    return {"notes": notes[:100] + more} if notes else {}


def infer_tables(source: Path | str) -> dict[str, Json]:
    """A /generate request whose records fit into the tables of a database, or of a script that creates one."""
    try:
        tables, notes = read_tables(source)
    except ValueError as error:
        raise BadRequest.of("file", str(error)) from None
    if not tables:
        raise BadRequest("there are no tables to infer a schema from", [FieldProblem("file", "has no tables")])
    specs = _Tables(tables, notes).specs
    try:
        Recipe(_specs(specs), now=EPOCH, locale="en_US", where="records")
    except BadRequest as refusal:
        notes.append(f"as it stands it is refused: {refusal}")
    return {"records": specs, **_noted(notes)}


def _part_of(document: dict[str, Json], node: dict[str, Json]) -> dict[str, Json]:
    """A schema of a document, with those that it refers to where it looks for them."""
    found: dict[str, Json] = {"type": "object", "properties": {}, **node}
    todo, schema = [found], JsonSchema(document)
    while todo:
        for ref in re.findall(r'"\$ref": "#(/[^"]+)"', json.dumps(todo.pop(), ensure_ascii=False)):
            with suppress(LookupError, TypeError, ValueError, AttributeError):  # which is told where it is used
                inner, (*steps, last) = found, _steps_of(ref)
                for step in steps:
                    inner = inner.setdefault(step, {})
                if last not in inner:
                    inner[last] = schema.resolve(f"#{ref}")[0]
                    todo.append(inner[last])
    return found


def infer_document(document: dict[str, Json], filename: str) -> dict[str, Json] | None:
    """A /generate request for the objects that an OpenAPI or JSON Schema document describes; None for other ones."""
    parts = None
    if document.keys() & {"openapi", "swagger", "$schema"}:
        components = document.get("components")
        inner = components.get("schemas") if isinstance(components, dict) else None
        parts = inner or document.get("$defs") or document.get("definitions")
    if is_json_schema(document):
        parts = {str(document.get("title") or filename.rpartition(".")[0]): document}
    if not isinstance(parts, dict):
        return None
    specs, notes = dict[str, Json](), list[str]()
    objects = {name: node for name, node in parts.items() if isinstance(node, dict) and (
        node.keys() & {"properties", "allOf", "$ref"})}
    for name, record_type in _types_of_parts(objects, filename, to_snake).items():
        if len(specs) + len(notes) >= MAX_TABLES:
            notes.append(f"{name} is left out")
            continue
        node = objects[name]
        spec = {"count": 10, "schema": node if node is document else _part_of(document, node)}
        try:
            Recipe(_specs({record_type: spec}), now=EPOCH, locale="en_US", where="records")
            specs[record_type] = spec
        except (BadRequest, ValidationError) as refusal:
            notes.append(f"{name} is left out: {refusal}")
    if not specs:
        raise BadRequest(f"no schema in it can be used{': ' if notes else ''}{'; '.join(notes[:3])}",
                         [FieldProblem("file", "has no schema of an object")])
    return {"records": specs, **_noted(notes)}


def _infer_schema(stream: BinaryIO, filename: str, options: IngestOptions) -> dict[str, Json] | None:
    """The same for what tells of records without being some: a database, a script that creates one, a JSON Schema."""
    head, document = stream.read(2**22), None
    stream.seek(0)
    if filename.lower().endswith(".sql"):
        try:
            return infer_tables(head.decode(options.encoding or "utf-8-sig"))
        except ValueError as error:
            raise BadRequest.of("file", str(error)) from None
    if head.startswith(b"SQLite format 3\0"):
        return infer_tables(Path(stream.name))
    if head.lstrip()[:1] == b"{" and len(head) < 2**22 and not options.path and not options.split:
        with suppress(ValueError, RecursionError):
            document = json.loads(head)
    return infer_document(document, filename) if isinstance(document, dict) else None


def infer(stream: BinaryIO, filename: str, options: IngestOptions) -> dict[str, Json]:
    """A body for POST /generate that makes records like the first ones of a file, or for tables or objects that it
    describes; BadRequest if it has none."""
    if found := _infer_schema(stream, filename, options):
        return found
    reader, batches = RecordReader(filename, options, limit=_SAMPLE_TEXT), list[ColumnBatch]()
    try:
        for batch in reader.read(stream):
            reader.learn(batch)
            batches.append(batch)
            if reader.counts.total() >= SAMPLE or reader.taken >= _SAMPLE_TEXT:
                break
    except JobFailed as error:
        raise BadRequest(str(error), [FieldProblem("file", str(error))]) from None
    specs: dict[str, Json] = {}
    for part, kinds in ((part, reader.kinds(part)) for part, count in reader.counts.items() if count):
        rows = [*chain.from_iterable(reader.rows(batch, kinds) for batch in batches if batch.part == part)][:SAMPLE]
        if kinds:
            columns = zip(kinds.items(), zip(*rows, strict=True), strict=True)
            specs[part] = {"count": len(rows), "schema": {
                field: inferred_field(field, column, kind) for (field, kind), column in columns}}
    if not specs:
        raise BadRequest("there are no records to infer a schema from", [FieldProblem("file", "has no records")])
    if options.split:
        return {"records": {record_type: specs[part] for part, record_type in _types_of_parts(specs, filename).items()}}
    notes = ["the first line is taken for a record, as by header=none"] if reader.names[""].headless else []
    return {"recordType": options.record_type or _type_named_like(filename), **specs[""], **_noted(notes)}


# ==== 8 Queue: who runs which job, and when; the engine, which is all but HTTP ====

_LOG = logging.getLogger("taskapi")
_STOPPED = "the program was stopped"
_STUCK_SECONDS = 10.0  # a job that does not come to a check for longer counts as stuck
_GONE_SECONDS = 0.25  # between looks whether a client that waits is still there
_CANCEL_SECONDS = 1.0  # a canceled job has them to stop before the answer
_CHECK_SECONDS = 0.1  # between looks of a job that waits for its turn whether it is to stop
_TURN_SECONDS = 1.0  # a job that computes for longer without a check does not keep the others waiting any more
_FRESH_SECONDS = 0.02  # a job that computes for longer is not left to the run that has it
_CALL_SECONDS = 1.0  # a run that was called and has not begun for longer is taken for lost
_RETRY_SECONDS = 1.0  # between tries to write down how a job ended
_HELD_SECONDS = 5.0  # running jobs have them to come to a pause, before everything is replaced
_MOST_THREADS = 1000  # of the workers, stuck ones included; how many runs there are is the queue's to say


class Runner(Protocol):
    """What runs callables: threads, or something that a test steps by hand."""

    def submit(self, call: Callable[[], None], /) -> object: ...
    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None: ...


class InlineRunner:
    """Runs each callable inside `submit`; one that is submitted meanwhile runs after it, not within it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._calls: deque[Callable[[], None]] = deque()
        self._running = False

    def submit(self, call: Callable[[], None], /) -> None:
        with self._lock:
            self._calls.append(call)
            if self._running:
                return
            self._running = True
            try:
                while self._calls:
                    self._calls.popleft()()
            finally:
                self._running = False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing runs between calls, so there is nothing to end."""


_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10, 60, 600)  # seconds
_METRICS = {  # name: (Prometheus type, help)
    "jobs_total": ("counter", "Jobs that ended, by type and status."),
    "job_seconds": ("histogram", "Time from the last start of a job to its end, by type."),
    "records_total": ("counter", "Records that completed jobs wrote."),
    "file_bytes_total": ("counter", "Bytes of the files that completed jobs stored."),
    "requests_total": ("counter", "HTTP requests, by method, route and status."),
    "request_seconds": ("histogram", "Time to answer an HTTP request, by route."),
    "jobs_pending": ("gauge", "Jobs that wait."),
    "jobs_in_progress": ("gauge", "Jobs that run."),
    "oldest_pending_seconds": ("gauge", "Age of the job that waits longest."),
    "uptime_seconds": ("gauge", "Time since the service was opened."),
}


class Metrics:
    """Counts since the service was opened, in the text format of Prometheus; only what _METRICS declares."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, str], float] = defaultdict(float)  # by metric and labels
        self._times: dict[tuple[str, str], list[float]] = {}  # likewise: how many fell into each bucket, and their sum

    @staticmethod
    @lru_cache(maxsize=1024)
    def _key(name: str, kind: str, labels: tuple[tuple[str, object], ...]) -> tuple[str, str]:
        if _METRICS.get(name, ("", ""))[0] != kind:
            raise ValueError(f"no {kind} {name!r} is declared{did_you_mean(name, _METRICS)}")
        return name, ",".join(f"{label}={json.dumps(str(value), ensure_ascii=False)}" for label, value in labels)

    def add(self, name: str, amount: float = 1, **labels: object) -> None:
        """Adds to a counter; raises ValueError if none of that name is declared."""
        key = self._key(name, "counter", tuple(labels.items()))
        with self._lock:
            self._values[key] += amount

    def observe(self, name: str, seconds: float, **labels: object) -> None:
        """Adds one time to a histogram; raises ValueError if none of that name is declared."""
        key = self._key(name, "histogram", tuple(labels.items()))
        with self._lock:
            times = self._times.setdefault(key, [0] * (len(_BUCKETS) + 2))
            times[bisect_left(_BUCKETS, seconds)] += 1
            times[-1] += seconds

    def text(self, gauges: Mapping[str, float]) -> str:
        """All of them; `gauges` are the values of this moment."""
        with self._lock:
            values = dict(self._values) | {self._key(name, "gauge", ()): value for name, value in gauges.items()}
            times = {key: [*counted] for key, counted in self._times.items()}
        lines: dict[str, list[str]] = {name: [f"# HELP taskapi_{name} {about}", f"# TYPE taskapi_{name} {kind}"]
                                       for name, (kind, about) in _METRICS.items()}
        for (name, labels), value in values.items():
            lines[name].append(f"taskapi_{name}{f'{{{labels}}}' if labels else ''} {value:.15g}")
        for (name, labels), (*counts, total) in times.items():
            lines[name] += [f'taskapi_{name}_bucket{{{labels},le="{bound}"}} {count:.15g}' for bound, count in
                            zip((*_BUCKETS, "+Inf"), itertools.accumulate(counts), strict=True)]
            lines[name] += [f"taskapi_{name}_sum{{{labels}}} {total:.15g}",
                            f"taskapi_{name}_count{{{labels}}} {sum(counts):.15g}"]
        return "\n".join(chain.from_iterable(lines.values())) + "\n"


class CpuGate:
    """Lets one at a time compute, in order of arrival, and makes room while requests are answered.

    Python threads that compute at the same time make less together than one alone, and each makes every request wait
    for the interpreter lock over and over.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards both
        self._line: dict[object, threading.Event] = {}  # by owner; the first one has the turn
        self._requests = 0

    @contextmanager
    def turn(self, owner: object = None, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """While something computes; waits for those that came before, and may raise what `check` raises meanwhile.

        `owner` names it for `pass_on`; it stands in the line once.
        """
        key, mine = object() if owner is None else owner, threading.Event()
        with self._lock:
            self._line[key] = mine
            next(iter(self._line.values())).set()
        try:
            while not mine.wait(_CHECK_SECONDS):
                check()
            yield
        finally:
            self.pass_on(key)

    def pass_on(self, owner: object) -> bool:
        """Gives the turn to the next one, even if its owner still computes; False if it had left the line before."""
        with self._lock:
            stood = self._line.pop(owner, None) is not None
            for first in itertools.islice(self._line.values(), 1):
                first.set()
        return stood

    @contextmanager
    def request(self) -> Iterator[None]:
        """While a request is in flight."""
        with self._lock:
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1

    def step_aside(self) -> None:
        """Called after each chunk of computing: sleeps for a millisecond while a request is being answered."""
        if self._requests > 0:
            sleep(0.001)


# ---- Test controls: what a test of a client may do to the service; each acts at one place ----


class MovableClock:
    """A clock that goes on from where it was put forward, and stands still where it was set."""

    def __init__(self, clock: Clock, on_move: Callable[[], object] = lambda: None):
        self._clock, self._on_move = clock, on_move  # after each
        self.reset()

    def __call__(self) -> datetime:
        stands, shift = self._moved
        return (stands or self._clock()) + shift

    def _move(self, stands: datetime | None, shift: timedelta, now: datetime) -> None:
        """Takes both in one step; OverflowError where ids could not tell the time, or no year is left to go on."""
        if not EPOCH.year <= now.year < datetime.max.year:
            raise OverflowError(now)
        self._moved = stands, shift

    def set(self, now: str | datetime) -> None:
        """Stands still at this instant, from now on."""
        try:
            at = _moment(str(now), last=False)
            self._move(at, timedelta(), at)
        except (ValueError, OverflowError):
            raise BadRequest.of("now", "must be an instant such as 2026-01-31T12:00:00Z, from 1970 to 9998") from None
        self._on_move()

    def advance(self, span: str) -> None:
        """Is so much later, as in "3d" or "1h30m" (units y M w d h m s)."""
        (stands, shift), now = self._moved, self()
        try:
            if not re.fullmatch(r"(-?\d{1,6}[yMwdhms])+", span, re.ASCII):
                raise ValueError(span)
            moved = EPOCH + timedelta(milliseconds=_shifted(now, re.sub(r"(?<![-\d])(?=\d)", "+", span)))
            self._move(stands, shift + (moved - now), moved)
        except (ValueError, OverflowError):
            raise BadRequest.of("advance", 'must be a span such as "3d" or "1h30m" (units y M w d h m s)') from None
        self._on_move()

    def reset(self) -> None:
        """Is the real one again."""
        self._moved = None, timedelta()


class FaultOn(ApiModel):
    """What a fault strikes: requests by method and path, or jobs by type."""

    method: str | None = None
    path: str | None = Field(None, description="`*` is any text; of `/` only the path `/` itself is meant.")
    job: str | None = Field(None, description="A job type; `*` is any.")
    done: int = Field(0, ge=0, description="How far such a job has to be, in records.")


class FaultThen(ApiModel):
    """What happens to a request (status to after), or to a job (error, interrupt or pause)."""

    status: int | None = Field(None, ge=200, le=599)
    delay: float = Field(0, ge=0, le=3600, allow_inf_nan=False, description="Seconds before the answer.")
    headers: dict[str, str | int] = Field({}, max_length=50)
    body: Json = Field(None, description="As JSON; a text is sent as it is.")
    close: bool = Field(False, description="Cuts the connection: at once, or after so many bytes of the body.")
    after: int | None = Field(None, ge=0)
    error: str | None = Field(None, description="The job fails with this message.")
    interrupt: bool = Field(False, description="As if the process had been killed and started again.")
    pause: bool = Field(False, description="The job stands still until the fault is removed.")


class FaultRequest(ApiModel):
    """Something that is to go wrong."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"on": {"method": "POST", "path": "/generate"}, "then": {"status": 503, "headers": {"Retry-After": "1"}},
         "times": 2}]})

    on: FaultOn
    then: FaultThen
    times: int | None = Field(None, ge=1, description="How often; a job once by default, a request always.")
    skip: int = Field(0, ge=0, description="How many are let pass before.")
    probability: float = Field(1, ge=0, le=1)
    seed: int | None = Field(None, ge=0, description="Of the chances; by default that of the service.")


_JOB_FAULTS = ("error", "interrupt", "pause")
_NOT_TO_SET = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length",
               "proxy-authenticate", "proxy-authorization"}  # they are the server's
_MOST_FAULTS, _MOST_REQUESTS, _MOST_LOGGED = 1000, 1000, 2**16  # bytes of a body


def _check_fault(on: FaultOn, then: FaultThen) -> None:
    """Raises BadRequest for what does not fit together."""
    given = then.model_fields_set
    if not (on.model_fields_set - {"done"}):
        raise BadRequest.of("on", "name a path, a method or a job")
    if on.job is not None:
        if on.path is not None or on.method is not None:
            raise BadRequest.of("on.job", "stands beside no path or method")
        if "*" not in on.job and on.job not in JOB_TYPES:
            raise BadRequest.of("on.job", f"there is no job type {on.job!r}{did_you_mean(on.job, JOB_TYPES)}")
        if wrong := given - {*_JOB_FAULTS}:
            raise BadRequest.of(f"then.{min(wrong)}", f"is for requests; for a job: {', '.join(_JOB_FAULTS)}")
        if sum((then.error is not None, then.interrupt, then.pause)) != 1:
            raise BadRequest.of("then", f"name one of {', '.join(_JOB_FAULTS)}")
        return
    if on.done:
        raise BadRequest.of("on.done", "is for jobs")
    methods = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
    if on.method is not None and on.method.upper() not in methods:
        raise BadRequest.of("on.method", f"is none{did_you_mean(on.method, methods)}; there are: {', '.join(methods)}")
    if on.path is not None and (not re.match("[/*]", on.path) or "?" in on.path or on.path.startswith("/test/")):
        raise BadRequest.of("on.path", "begins with / or *, has no query, and is none of /test/")
    if wrong := given & {*_JOB_FAULTS}:
        raise BadRequest.of(f"then.{min(wrong)}", "is for jobs: name one in on.job")
    if not given:
        raise BadRequest.of("then", "name status, delay, headers, body, close or after")
    for name, value in then.headers.items():
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) or name.lower() in _NOT_TO_SET or (
                re.search(r"[^\t -~\xa0-\xff]", str(value))):
            raise BadRequest.of(f"then.headers.{name}", "is no header that an answer may be given")


def fits(text: str, pattern: str) -> bool:
    """Whether a text is like a pattern, in which * is any text."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.DOTALL) is not None


class Fault:
    """A fault, and what is left of it."""

    def __init__(self, number: int, request: FaultRequest, seed: int):
        self.id, self.on, self.then, self._request = str(number), request.on, request.then, request
        self.removed = threading.Event()
        self._times = request.times if request.times or request.on.job is None else 1
        self._skip, self._struck = request.skip, 0
        self._seen: set[tuple[str, int]] = set()  # attempts at jobs: each is one chance
        self._random = random.Random(request.seed if request.seed is not None else f"{seed} {number}")

    @property
    def left(self) -> int | None:
        """How often it may still strike, if there is an end to it."""
        return None if self._times is None else self._times - self._struck

    def is_on(self, method: str, path: str) -> bool:
        """Whether it is about such a request."""
        wanted = "*" if self.on.path is None else self.on.path
        return self.on.job is None and (self.on.method or method).upper() == method and (
            path == wanted or (path != "/" and fits(path, wanted)))

    def awaits(self, context: JobContext) -> bool:
        """Whether it is about this attempt at a job, which has not met it."""
        attempt = (context.job.job_id, context.job.attempt)
        return self.on.job is not None and fits(context.job.type, self.on.job) and self.left != 0 and (
            attempt not in self._seen)

    def strikes(self, attempt: tuple[str, int] | None = None) -> bool:
        """Whether it strikes this time, and counts that."""
        if attempt:
            self._seen.add(attempt)
        if self._skip or self.left == 0:
            self._skip = max(0, self._skip - 1)
            return False
        if self._random.random() >= self._request.probability:
            return False
        self._struck += 1
        return True

    def shown(self) -> dict[str, Json]:
        """As clients see it."""
        asked = self._request.model_dump(exclude_unset=True)
        return {"id": self.id, "skip": 0, "probability": 1, **asked, "times": self._times, "left": self.left,
                "struck": self._struck}


class Faults:
    """What is to go wrong with requests and jobs; the first fault that strikes is the one that counts."""

    def __init__(self, settings: Settings, inline: bool):
        self._settings, self._inline = settings, inline
        self._lock = threading.Lock()  # guards what follows
        self._faults: dict[str, Fault] = {}
        self._count = 0

    def add(self, fault: Mapping[str, Json] | FaultRequest | None = None, /, **more: Json) -> dict[str, Json]:
        """Takes what POST /test/faults does, as an object or by name (`on=`, `then=`, `times=`...); BadRequest."""
        if not self._settings.test_controls:
            raise Conflict("the service was opened without test_controls")
        request = fault if isinstance(fault, FaultRequest) else validated(
            FaultRequest, lambda: FaultRequest.model_validate({**(fault or {}), **more}))
        _check_fault(request.on, request.then)
        if self._inline and request.then.pause:
            raise BadRequest.of("then.pause", "would hold the call that makes the job, within which it runs here")
        with self._lock:
            if len(self._faults) >= _MOST_FAULTS:
                raise Conflict(f"there are {_MOST_FAULTS} faults already")
            self._count += 1
            made = self._faults[str(self._count)] = Fault(self._count, request, self._settings.seed or 0)
        return made.shown()

    def list(self) -> Sequence[dict[str, Json]]:
        """All of them, with what is `left` and how often each has `struck`."""
        with self._lock:
            return [fault.shown() for fault in self._faults.values()]

    def clear(self, fault_id: str | None = None) -> None:
        """Removes one, or all, and ends what they hold; NotFound."""
        with self._lock:
            if fault_id is not None and fault_id not in self._faults:
                raise NotFound(f"there is no fault {fault_id!r}")
            for key in [fault_id] if fault_id is not None else [*self._faults]:
                self._faults.pop(key).removed.set()
            self._count = self._count if self._faults else 0

    def of_request(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets."""
        if not self._faults or path.startswith("/test/"):
            return None
        with self._lock:
            hits = (fault for fault in self._faults.values() if fault.is_on(method, path) and fault.strikes())
            return next(hits, None)

    def of_job(self, context: JobContext) -> Fault | None:
        """The fault that this job meets where it is; it is told where to save next, to meet others."""
        if not self._faults:
            return None
        with self._lock:
            waiting = [fault for fault in self._faults.values() if fault.awaits(context)]
            context.save_at = min((fault.on.done for fault in waiting if fault.on.done > context.done),
                                  default=math.inf)
            attempt = (context.job.job_id, context.job.attempt)
            return next((fault for fault in waiting if fault.on.done <= context.done and fault.strikes(attempt)), None)


def _steps(kind: JobType | None, context: JobContext, request: JobRequest | None) -> JobSteps:
    """A job's function, with its request read back; itself a generator, so that nothing fails before it runs."""
    job = context.job
    if kind is None:
        raise JobFailed(f"this program knows no job type {job.type!r}; retry the job with the one that does")
    try:
        request = request or kind.model.model_validate_json(json.dumps(job.request))
    except ValidationError as error:
        told = "; ".join(f"{field}: {text}" for field, text in field_problems(error))
        raise JobFailed(f"the request is not understood any more: {told}") from None
    run = kind.run(context, request)
    returned = (yield from run) if isinstance(run, Generator) else run
    try:
        return checked_result(returned)
    except BaseException:
        if isinstance(file := getattr(returned, "file", None), StoredFile):
            context.folder.remove(file.path)
        raise


_WriteDown = Callable[[], tuple[Job, Claim | None]]  # of how a job ended; it may take the next one with that


class Workers:
    """Take jobs from the table and work on them. The table is the queue: a wake-up carries nothing.

    A *run* is one call on the runner. It claims a job, works on it to its end, and goes on until no job is due.
    `_state` guards what is said here of runs and jobs; it is never held while the database or a job's function works.

    - No wake-up is lost. Whoever may have made a job ready commits that first and then calls `wake`, which sets `_due`
      and calls a run, unless one was called that has not begun, or as many are active as there are workers, or one
      looks at `_due` soon. A run clears `_due` just before it claims (be it in the transaction that completes the job
      before), and leaves where it finds it cleared, in one step: so after each `wake` something claims. A call that is
      lost with its thread is made up for by the first `wake` a second later, and housekeeping wakes once a second.
    - Threads that share the interpreter are slower than one, so short jobs are left to one run: where a job that
      computes is `fresh`, its run looks soon, when the job has ended or when it comes to a yield and is fresh no more.
    - A job in progress here is a JobContext in `_active`, put there by its run, which writes down how it ended,
      whatever its function returns or raises. Only for a job that is stuck and canceled `give_up` does: it marks it as
      `ended`, so that nothing which its function does after that has an effect, and takes its run out of `_active`, so
      that another one takes its place.

        pending --claim--> in-progress --> completed | failed | canceled
           ^-------------------'  stopped, or the storage failed: not charged, but for a fault that is the job's own
    """

    def __init__(self, database: Database, folder: DataFolder, settings: Settings, clock: Clock,
                 make_id: Callable[[], str] | None = None, runner: Runner | None = None):
        self.jobs, self.records = JobStore(database, clock, make_id), RecordStore(database)
        self.metrics, self.gate = Metrics(), CpuGate()
        self.faults = Faults(settings, isinstance(runner, InlineRunner))
        self.stopping = threading.Event()  # no work is begun, jobs that run go back to pending; a signal may set it
        self.processes = 1  # that may make the parts of a request, where a command asks for more
        self._closed = False  # no more jobs are taken in; requests in flight may still bring some after `stopping`
        self.fault: str | None = None  # what is wrong with the storage: until it is well nothing is claimed
        self._database, self._folder, self._settings, self._clock = database, folder, settings, clock
        self._executor = cast(Runner, ThreadPoolExecutor(_MOST_THREADS, "taskapi-worker")) if runner is None else runner
        self._state = threading.Condition()  # guards all below
        self._held = False  # nothing is claimed, and what runs goes back to pending
        self._due = False  # a job may be ready that no claim has looked for
        self._called = -math.inf  # when a run was called that has not begun
        self._looked = threading.Event()  # a run has looked for a job since somebody asked
        self._active: dict[object, JobContext | None] = {}  # by run: what it is at
        self._abandoned: set[object] = set()  # runs whose job was given up, and that have not come back
        self._canceled: set[str] = set()  # jobs that are to stop, for a run that has claimed and not yet said so
        # By job: set when it ends. Gone with the last one who waits for it.
        self._waiters: WeakValueDictionary[str, threading.Event] = WeakValueDictionary()

    def wake(self, anyway: bool = False) -> None:
        """There may be work: calls a run, unless one is on its way, or enough are there, or, but for `anyway`, soon."""
        now = monotonic()
        with self._state:
            self._due = True
            soon = not anyway and any(context is None or context.fresh for context in self._active.values())
            if soon or self.stopping.is_set() or len(self._active) >= self._settings.workers or (
                    now < self._called + _CALL_SECONDS):
                return
            self._called = now
        try:
            self._executor.submit(self._run)
        except RuntimeError as error:  # no thread to be had, or it is being shut down
            if not self.stopping.is_set():
                _LOG.error("no worker can begin: %s", error)

    def check(self, seconds: float = 1.0) -> None:
        """Has a run look for a job, if a worker is free; raises Unavailable if none does so in time."""
        if self.stopping.is_set():
            raise Unavailable("the server is stopping")
        stuck = self.stuck()
        if len(stuck) >= self._settings.workers:
            raise Unavailable(f"every worker is stuck; to cancel gives up: {', '.join(map(str, stuck))}")
        self._looked.clear()
        self.wake(anyway=True)
        if len(self._active) < self._settings.workers and not self._looked.wait(seconds) and (
                len(self._active) < self._settings.workers):
            raise Unavailable("no worker looks for jobs, though one is free")

    def stuck(self, seconds: float | None = None) -> list[JobContext]:
        """The jobs whose functions have not come to a check for so long (default: when that is too long)."""
        since = monotonic() - (_STUCK_SECONDS if seconds is None else seconds)
        with self._state:
            return [context for context in self._active.values() if context and context.checked < since]

    def give_up(self, context: JobContext) -> None:
        """Cancels a stuck job: what its function still does has no effect, and another run takes its place."""
        job, context.interruption = context.job, _CANCELED
        with suppress(LeaseLost):  # it has just come to an end
            job, _ = self.jobs.finish(job, JobStatus.CANCELED, error=f"{_CANCELED}; it was stuck, and is given up")
            self.records.discard(job.job_id)
            if context.job.file:
                self._folder.remove(context.job.file.path)
            self._ended(job)
        with self._state:
            context.ended = True
            for run in [run for run, other in self._active.items() if other is context]:
                del self._active[run]
                self._abandoned.add(run)
        self.gate.pass_on(context)
        self.wake()

    def wait_until_idle(self, seconds: float) -> bool:
        """Waits until no run is active; False if that takes longer."""
        with self._state:
            return self._state.wait_for(lambda: not self._active, min(seconds, threading.TIMEOUT_MAX))

    @contextmanager
    def held(self) -> Iterator[None]:
        """While no job runs: those that do go back to pending, and go on after the block.

        Raises Unavailable if one comes to no check in time.
        """
        self._held = True
        try:
            if not self.wait_until_idle(_HELD_SECONDS):
                raise Unavailable("a job does not come to a pause; cancel it first")
            yield
        finally:
            self._held = False
            self.wake(anyway=True)

    def table_was_replaced(self) -> None:
        """Forgets what was known of jobs, and answers everybody who waits for one."""
        self.jobs.forget_counts()
        with self._state:
            self._canceled.clear()
        self.release_waiters()

    def release_waiters(self) -> None:
        """Answers everybody who waits for a job, as it is now."""
        with self._state:
            for finished in [*self._waiters.values()]:
                finished.set()

    def halt(self) -> None:
        """Ends the work, and answers everybody who waits for a job."""
        self.stopping.set()
        self.release_waiters()

    def stop(self, seconds: float) -> bool:
        """Ends the work; False if a job's function does not come to a check in time, and so keeps its thread."""
        self._closed = True
        self.halt()
        ended = self.wait_until_idle(seconds) and not self._abandoned
        self._executor.shutdown(wait=ended, cancel_futures=True)
        return ended

    def probe(self) -> None:
        """Really writes to the disk and the database; raises StorageError if they cannot be used."""
        try:
            self._folder.probe()
            self._database.probe(instant(self._clock()))
            self.fault = None
        except StorageError as error:
            self.fault = str(error)
            raise

    # On the workers

    def _run(self) -> None:
        """Works on one job after the other; ends when none is due."""
        run = object()
        with self._state:
            self._called = -math.inf
            if len(self._active) >= self._settings.workers:
                return
            self._active[run] = None
        try:
            context = self._next(run)
            while context:
                claim = self._work(context)
                context = self._begin(run, claim) if claim else self._next(run)
        except StorageError as error:  # housekeeping wakes another run
            if str(error) != self.fault:
                _LOG.error("cannot take a job: %s", error)
            self.fault = str(error)
        except BaseException:  # noqa: BLE001  # the others go on
            _LOG.exception("a worker met a bug outside of any job")
        finally:
            with self._state:
                self._active.pop(run, None)
                self._abandoned.discard(run)
                self._state.notify_all()

    def _next(self, run: object) -> JobContext | None:
        """A claimed job; None if none is due, and then the run is not active any more."""
        while True:
            with self._state:
                if not self._due or self._held or self.stopping.is_set() or run not in self._active:
                    self._active.pop(run, None)
                    return None
                self._due, self._active[run] = False, None
            try:
                if self.fault is not None:
                    self.probe()
                if claim := self.jobs.claim():
                    return self._begin(run, claim)
                self.fail_dependents()
            finally:
                self._looked.set()

    def fail_dependents(self) -> None:
        """Fails the pending jobs that were to follow one that was not completed."""
        for job in self.jobs.fail_dependents():
            if job.file:
                self._folder.remove(job.file.path)
            self._ended(job.model_copy(update={"file": None}))

    def _begin(self, run: object, claim: Claim) -> JobContext:
        job, context = claim.job, self.context(claim.job, claim.checkpoint)
        with self._state:
            self._active[run] = context
            if job.type in JOB_TYPES and JOB_TYPES[job.type].computes:
                context.fresh = monotonic() + _FRESH_SECONDS
            if job.job_id in self._canceled:
                context.interruption = _CANCELED
            due = self._due
        _LOG.info("job %s %s in-progress, attempt %d", job.job_id, job.type, job.attempt)
        if claim.more or due:
            self.wake()  # others may be free for it
        return context

    def context(self, job: Job, checkpoint: Json, stopping: Callable[[], bool] | None = None) -> JobContext:
        """What a job's function gets."""
        context = JobContext(job, checkpoint, self.jobs, self.records, self._folder, self._settings, self._database,
                             stopping or (lambda: self._held or self.stopping.is_set()), self._meet_fault)
        context.processes = self.processes
        return context

    def _meet_fault(self, context: JobContext) -> None:
        """What a test wants to happen to a job at this point."""
        fault = self.faults.of_job(context)
        if fault is None:
            return
        if fault.then.error is not None:
            raise JobFailed(fault.then.error)
        if fault.then.interrupt:  # from here on as a fault of the storage: charged, and again from the checkpoint
            raise StorageError("the server ended while the job ran")
        self.gate.pass_on(context)
        self.tire(context)
        while not fault.removed.wait(_CHECK_SECONDS):
            if context.interrupted():
                raise Interrupted

    def _work(self, context: JobContext) -> Claim | None:
        """Runs a job to its end and writes down how it ended, whatever that is; the next one, if one was claimed."""
        try:
            done = self._run_function(context)
            write_down: _WriteDown = partial(self._complete, context.job, done)
        except BaseException as error:  # noqa: BLE001  # it ends the job, and nothing else
            write_down = self._meaning(context, error)
        return self._record_outcome(context, write_down)

    def _complete(self, job: Job, done: JobResult) -> tuple[Job, Claim | None]:
        with self._state:
            claim, self._due = not (self._held or self.stopping.is_set()), False
        ended = self.jobs.finish(job, JobStatus.COMPLETED, result=done.result, file=done.file, claim=claim)
        self._looked.set()
        return ended

    def _run_function(self, context: JobContext, request: JobRequest | None = None) -> JobResult:
        """Runs a job's function from yield to yield; raises what it raises, and Interrupted where it is to stop."""
        kind = JOB_TYPES.get(context.job.type)
        try:
            with closing(_steps(kind, context, request)) as steps:
                while True:
                    computes = context.computes or (kind and kind.computes)
                    with self.gate.turn(context, context.check) if computes else nullcontext():
                        context.check()
                        try:
                            next(steps)
                        except StopIteration as end:
                            return cast(JobResult, end.value)
                        self.gate.step_aside()
                    if context.fresh and monotonic() > context.fresh:
                        self.tire(context)
        finally:
            context.checked = math.inf

    def tire(self, context: JobContext) -> None:
        """A job takes longer than a moment: what is due is for others."""
        with self._state:
            context.fresh, due = 0, self._due
        if due:
            self.wake()

    def _meaning(self, context: JobContext, error: BaseException) -> _WriteDown:
        """How to write down what an exception out of a job's function comes to."""
        job, message = context.job, error_message(error)
        if isinstance(error, LeaseLost):  # if that is true, this raises it again, and what is there is another's
            return partial(self.jobs.finish, job, JobStatus.FAILED, error=message)
        if context.interrupted():
            if not isinstance(error, Interrupted | StorageError):
                _LOG.error("job %s %s did not end as it was asked to", job.job_id, job.type, exc_info=error)
            if context.interruption:
                return partial(self._end_without_trace, job, JobStatus.CANCELED, context.interruption)
            return lambda: (self.jobs.release(job, _STOPPED, charged=False), None)
        if isinstance(error, StorageError):
            with suppress(StorageError):
                self.probe()
            charged, futile = self.fault is None, 0  # charged: the storage is well, so that the fault is the job's own
            with suppress(StorageError):
                futile = self.jobs.futile_attempts(job)
            if not charged or futile < self._settings.max_attempts:
                _LOG.warning("job %s %s interrupted: %s", job.job_id, job.type, message)
                return lambda: (self.jobs.release(job, message, charged=charged), None)
        elif not isinstance(error, TaskError):
            _LOG.error("job %s %s met a bug", job.job_id, job.type, exc_info=error)
        return partial(self._end_without_trace, job, JobStatus.FAILED, message)

    def _end_without_trace(self, job: Job, status: JobStatus, error: str) -> tuple[Job, Claim | None]:
        with suppress(DiskFull):  # to delete takes room too: what is left goes when there is some
            self.records.discard(job.job_id)
        ended = self.jobs.finish(job, status, error=error)
        if job.file:  # after the row let go of it: a crash in between leaves a stray, which the next start sweeps
            self._folder.remove(job.file.path)
        return ended

    def _record_outcome(self, context: JobContext, write_down: _WriteDown) -> Claim | None:
        """Writes down how a job ended; tries until the storage takes it, or the process ends."""
        job = context.job
        with suppress(LeaseLost):
            while not context.ended:
                try:
                    ended, claim = write_down()
                    self._ended(ended)
                    if claim:
                        return claim
                    break
                except StorageError as error:
                    _LOG.error("job %s %s: cannot write down how it ended: %s", job.job_id, job.type, error)
                if self.stopping.wait(_RETRY_SECONDS):
                    break  # it is still in progress in the table, so the next start takes it up
        with self._state:
            self._due = True  # others may have had to wait for this one, or for one that failed before
        return None

    def _ended(self, job: Job) -> None:
        """Tells all who want to know that a job has ended, or was put back."""
        _LOG.info("job %s %s %s%s", job.job_id, job.type, job.status, f": {job.error}" if job.error else "")
        with self._state:
            if job.status.finished or self.stopping.is_set():
                self._canceled.discard(job.job_id)
                if finished := self._waiters.pop(job.job_id, None):
                    finished.set()
        if not job.status.finished:
            return
        self.metrics.add("jobs_total", type=job.type, status=job.status)
        if job.started_at and job.finished_at:
            took = datetime.fromisoformat(job.finished_at) - datetime.fromisoformat(job.started_at)
            self.metrics.observe("job_seconds", max(0.0, took.total_seconds()), type=job.type)
        records = (job.result or {}).get("records")
        if job.record_type and type(records) is int:
            self.metrics.add("records_total", max(0, records))
        if job.file:
            self.metrics.add("file_bytes_total", job.file.bytes)


def await_event(event: threading.Event, seconds: float, gone: Callable[[], bool]) -> None:
    """Waits until an event is set, at most so long, and only until `gone` says that nobody asks any more."""
    until = monotonic() + seconds
    while not event.wait(max(0.0, min(_GONE_SECONDS, until - monotonic()))) and monotonic() < until and not gone():
        pass


class JobQueue(Workers):
    """What others may do with jobs: add, await, cancel, try again and delete them."""

    def recover(self) -> None:
        """Takes up what an earlier process left in progress."""
        jobs = self.jobs.recover(self._settings.max_attempts)
        if jobs:
            _LOG.warning("jobs that the end of the last process interrupted: %d", len(jobs))
        for job in filter(lambda job: job.status.finished, jobs):
            self._ended(job)

    def enqueue(self, job_type_name: str, request: JobRequest, key: str | None = None, key_hash: str | None = None,
                keep: Callable[[str], StoredFile] | None = None) -> tuple[Job, bool]:
        """Adds a job, durably; answers (job, True), or (the job made with this key before, False).

        `keep` puts the job's file in place under the job's id; it is removed again if no job comes of it.
        """
        self._refuse_when_closed()
        request = request.with_defaults(self._settings, self._clock)
        body, makes, weight = request.model_dump(mode="json", exclude_none=True), request.makes, request.weight
        if not isinstance(makes, str | None) or type(weight) is not int or not 0 <= weight < 2**63:
            raise TypeError(f"a request of job type {job_type_name!r} makes {makes!r} and weighs {weight!r}")
        job_id = self.jobs.new_id()
        with ExitStack() as undo:
            file = keep(job_id) if keep else None
            if file:
                undo.callback(self._folder.remove, file.path)
            job, new = self.jobs.insert(job_type_name, body, record_type=makes, after=request.after, key=key,
                                        key_hash=key_hash, max_pending=self._settings.max_pending, job_id=job_id,
                                        file=file, weight=weight)
            if new:
                undo.pop_all()
        if new:
            _LOG.info("job %s %s pending", job.job_id, job.type)
            self.wake()
            if isinstance(self._executor, InlineRunner):
                job = self.jobs.get(job.job_id)  # it has run within wake()
        return job, new

    def run_now(self, job_type_name: str, request: JobRequest, key: str | None = None,
                key_hash: str | None = None) -> tuple[Job, bool]:
        """Does a quick job at once, in this thread, and adds it as completed; otherwise like `enqueue`."""
        self._refuse_when_closed()
        body = request.model_dump(mode="json", exclude_none=True)
        job = Job(job_id=self.jobs.new_id(), type=job_type_name, status=JobStatus.IN_PROGRESS,
                  created_at=instant(self._clock()), request=body)
        done = self._run_function(self.context(job, None, lambda: False), request)
        assert done.file is not None
        with ExitStack() as undo:
            undo.callback(self._folder.remove, done.file.path)
            job, new = self.jobs.insert(job.type, body, job_id=job.job_id, result=done.result, file=done.file, key=key,
                                        key_hash=key_hash)
            if new:
                undo.pop_all()
        if new:
            self._ended(job)
        return job, new

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise Unavailable("the server is stopping")

    def wait(self, job_id: str, seconds: float | None = None, gone: Callable[[], bool] = lambda: False) -> Job:
        """The job once it has finished; or as it is after `seconds`, when the work is stopped, when the asker is gone.

        It is looked up at most twice.
        """
        with self._state:
            finished = self._waiters.setdefault(job_id, threading.Event())
        job = self.jobs.get(job_id)
        if job.status.finished or seconds == 0 or self.stopping.is_set():
            return job
        await_event(finished, math.inf if seconds is None else seconds, gone)
        return self.jobs.get(job_id)

    def cancel(self, job_id: str) -> Job:
        """Cancels a pending job at once; a running one is asked to stop, and given a second to do so, if not up."""
        file = self.jobs.get(job_id).file
        job = self.jobs.cancel(job_id)
        if job.status.finished:
            if file:
                self._folder.remove(file.path)
            self._ended(job)
            return job
        with self._state:
            self._canceled.add(job_id)
            context = next((context for context in self._active.values() if context and context.job.job_id == job_id),
                           None)
            if context:
                context.interruption = _CANCELED
        job = self.wait(job_id, _CANCEL_SECONDS)
        if not job.status.finished and context in self.stuck():
            self.give_up(context)
            job = self.jobs.get(job_id)
        return job

    def retry(self, job_id: str) -> Job:
        """Makes a failed or canceled job pending again; Conflict if it cannot be, or its file is gone."""
        job = self.jobs.get(job_id)
        if not job.file and job.type in JOB_TYPES and JOB_TYPES[job.type].model.needs_file:
            raise Conflict("the job's file is gone; upload it again")
        job = self.jobs.retry(job_id)
        with self._state:
            self._canceled.discard(job_id)
        self.wake()
        return job

    def remove(self, job_id: str) -> None:
        """Deletes a finished job with its file and its records."""
        job = self.jobs.remove(job_id)
        if job.file:
            self._folder.remove(job.file.path)
        self.records.discard(job_id)
        _LOG.info("job %s %s deleted", job.job_id, job.type)

    def drain(self, seconds: float | None = None) -> bool:
        """Waits until no job is pending or running; False if that takes longer than `seconds`, or work is stopped."""
        until = math.inf if seconds is None else monotonic() + seconds
        while not self.wait_until_idle(until - monotonic()) or self.jobs.counts() != (0, 0):
            if monotonic() >= until or self.stopping.wait(0.05):
                return False
        return True


class Engine:
    """A data folder at work: settings, files, jobs and the workers; all of the service but its HTTP side."""

    def __init__(self, settings: Settings, clock: Clock = utc_now, make_id: Callable[[], str] | None = None,
                 runner: Runner | None = None, processes: int = 1):
        build_models()
        self.settings, self.clock = settings, MovableClock(clock, self._retire_all)
        self.seen: deque[dict[str, Json]] = deque(maxlen=_MOST_REQUESTS)  # requests, where a test may ask for them
        self._replacing = threading.Lock()
        self.allowed_hosts = {"localhost", "127.0.0.1", "::1", *(name.lower() for name in settings.allowed_hosts)}
        self._started = monotonic()
        self._closed = False
        self._holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": instant(clock()), "url": None}
        self._polls = threading.Semaphore(settings.threads // 2)
        self.readings = threading.Semaphore(max(1, settings.threads // 4))  # of a whole record type at a time
        self._stuck: list[JobContext] = []
        self._said: dict[str, str] = {}  # by task of housekeeping, so that what lasts is logged once
        with ExitStack() as undo:
            try:
                self.folder = DataFolder(settings.data_dir)
                settings.database_path.parent.mkdir(parents=True, exist_ok=True)
                # A database outside of the folder gets a lock of its own: two folders must not share it.
                locks = {settings.database_path.with_suffix(".lock"): f"the database {settings.database_path}",
                         self.folder.root / "taskapi.lock": f"the data folder {self.folder.root}"}
                self._locks: list[FolderLock] = []
                for path, what in sorted(locks.items()):
                    self._locks.append(FolderLock(path, what, self._holder))
                    undo.callback(self._locks[-1].release, clean=not self._locks[-1].unclean)
                    check_database_files(settings.database_path, self._locks[-1].files)
                self._refuse_to_begin_anew()
                self._database = Database(settings.database_path, lambda: self._note_database(database=None))
                undo.callback(self._database.close)
                self._note_database()
                self.queue = JobQueue(self._database, self.folder, settings, self.clock, make_id, runner)
                self.faults, self.snapshots = self.queue.faults, Snapshots(self.folder)
                self.queue.processes = processes
                self._start(threads=runner is None)
            except (OSError, StorageError) as error:
                raise StartupError(f"cannot use the data folder {settings.data_dir.absolute()}: {error}") from error
            undo.pop_all()

    def _note_database(self, **other: Json) -> None:
        """Leaves word for the next start, however this process ends, which database the log belongs to."""
        for lock in self._locks:
            lock.describe(clean=False, files=self._database.identities | other)

    def _refuse_to_begin_anew(self) -> None:
        """Files without a database belong to one that was lost: a new one would have them removed as strays."""
        path = self.settings.database_path
        if not (path.exists() and path.stat().st_size) and (kept := self.folder.kept()):
            raise StartupError(f"the database {path} is {'empty' if path.exists() else 'missing'}, but uploads and "
                               f"exports hold {len(kept)} files of its jobs: restore it, or move those files away to "
                               "begin anew")

    def _start(self, threads: bool) -> None:
        """Looks the folder over, takes up what an earlier process left, and begins to work."""
        unclean = any(lock.unclean for lock in self._locks)
        self.folder.probe()
        self.checks = {"sqlite": sqlite_check(), "fileSystem": file_system_check(self.folder.root),
                       "freeSpace": f"{self.folder.free_space() // 2**20} MiB", "folders": "writable",
                       "lastStop": "unclean" if unclean else "clean", "integrity": "being checked" if unclean else "ok"}
        self.queue.recover()
        self.checks["formats"] = "; ".join(f"{name} {told}" for name, told in formats_at_hand().items())
        self.checks["strayFiles"] = f"{self.folder.sweep(self.queue.jobs.stored_paths())} removed"
        for name, found in self.checks.items():
            wrong = "network" in found or found == "unclean"
            _LOG.log(logging.WARNING if wrong else logging.DEBUG, "check %s: %s", name, found)
        self._housekeeper = threading.Thread(target=self._keep_house, name="taskapi-housekeeping")
        if threads:
            self._housekeeper.start()
        else:
            self._check_integrity()
            self.keep_house()

    def _check_integrity(self) -> None:
        """After an unclean stop: reads the whole database, in the background, since that may take long."""
        if self.checks["integrity"] == "ok":
            return
        try:
            self._database.quick_check(self.queue.stopping.is_set)
            self.checks["integrity"] = "ok"
            _LOG.debug("check integrity: ok")
        except Interrupted:
            return
        except StorageError as error:
            self.checks["integrity"] = str(error)
            _LOG.error("check integrity: %s", error)

    def _keep_house(self) -> None:
        """Its own thread: what may take long at the start; then a round a second, until the queue is stopped."""
        self.queue.wake()
        self._check_integrity()
        while True:
            self.keep_house()
            if self.queue.stopping.wait(1.0):
                return

    def keep_house(self) -> None:
        """What has to be done now and then, each task whatever the others meet; then a run looks for what they left."""
        for task in (self._watch_jobs, self.discard_orphans, self.retire, self.queue.fail_dependents, self._keep_room):
            said = ""
            try:
                task()
            except StorageError as error:
                said = f"housekeeping has to wait: {error}"
                if said != self._said.get(task.__name__):
                    _LOG.warning("%s", said)
            except Exception:  # noqa: BLE001  # it is tried again
                _LOG.exception("housekeeping met a bug")
            self._said[task.__name__] = said
        self.queue.wake()

    def _watch_jobs(self) -> None:
        """Has jobs that come to no check let the others compute; says when they seem stuck, gives up canceled ones."""
        for context in self.queue.stuck(_TURN_SECONDS):
            self.queue.gate.pass_on(context)
            self.queue.tire(context)
        known, self._stuck = self._stuck, self.queue.stuck()
        for context in self._stuck:
            if context.interruption:
                self.queue.give_up(context)
            elif context not in known:
                _LOG.warning("%s has not come to a check for %d s: to cancel it gives it up", context, _STUCK_SECONDS)

    def discard_orphans(self) -> None:
        """Deletes records whose job is gone or has made none."""
        for job_id in self.queue.records.orphans():
            self.queue.records.discard(job_id, orphaned=True)

    def retire(self) -> int:
        """Deletes jobs past their retention, a few at a time; one whose file is being downloaded stays for now.

        Returns how many.
        """
        removed = 0
        if self.settings.retention_days:
            limit = self.clock() - timedelta(days=self.settings.retention_days)
            for job_id in self.queue.jobs.finished_before(instant(limit), 50):
                with suppress(NotFound):  # somebody else was quicker
                    file = self.queue.jobs.get(job_id).file
                    if not file or not self.folder.in_use(file):
                        self.queue.remove(job_id)
                        removed += 1
        return removed

    def _retire_all(self) -> None:
        while self.retire():
            pass

    def requests(self, method: str | None = None, path: str | None = None,
                 status: int | None = None) -> list[dict[str, Json]]:
        """What the service was asked lately, as GET /test/requests tells it; `path` may have *."""
        return [entry for entry in [*self.seen] if (method or entry["method"]).upper() == entry["method"] and (
            path is None or fits(entry["path"], path)) and status in (None, entry["status"])]

    def reset(self) -> None:
        """For tests: all as new. Jobs that run are interrupted, and never write again."""
        self.faults.clear()
        with closing(empty_database()) as empty, self._replacing:
            self._replace(empty)
        self.clock.reset()
        self.seen.clear()

    def _replace(self, source: sqlite3.Connection) -> None:
        """Puts a copy of another database in the place of ours, at once, and removes the files it does not know."""
        with self.queue.held():
            gone = self._database.load(source, stored_paths) - stored_paths(source)
            with suppress(StorageError):  # then the next start does
                self.queue.recover()
            self.queue.table_was_replaced()
        for path in gone:
            self.folder.remove(path)

    def snapshot(self, name: str) -> Snapshot:
        """Copies the database and the files as of one moment, while jobs go on; Conflict if `name` is taken."""
        validated(SnapshotRequest, lambda: SnapshotRequest(name=name))
        for tries in range(10):
            with self._replacing, self.snapshots.draft() as draft, suppress(FileNotFoundError):
                self.snapshots.refuse_taken(name)
                self.folder.free_space()
                found = self._database.copy_to(draft / SNAPSHOT_DATABASE, partial(self._look, draft, tries == 9))
                self.folder.free_space()  # rather none than one that leaves no room to work
                return self.snapshots.keep(draft, {**found, "name": name, "createdAt": instant(self.clock())})
        raise StorageError("files are removed all the time")

    def _look(self, draft: Path, lenient: bool, connection: sqlite3.Connection) -> dict[str, int]:
        """What a snapshot holds; takes its files, which may be deleted soon. `lenient`: some may be lost for good."""
        paths = stored_paths(connection)
        self.snapshots.take_files(draft, [path for path in paths if not lenient or (self.folder.root / path).exists()])
        return contents(connection)

    def restore(self, name: str) -> Snapshot:
        """Makes all as it is in a snapshot, in one step; running jobs are interrupted, and go on as they are there.

        Raises NotFound, Conflict if it is damaged or of another program; then all stays as it was.
        """
        with self._replacing, self.snapshots.draft() as draft, ExitStack() as undo:
            place, copy = self.snapshots.place(name), draft / SNAPSHOT_DATABASE
            self.folder.free_space()
            try:
                shutil.copyfile(place / SNAPSHOT_DATABASE, copy)
                source = copied_database(copy, instant(self.clock()))
                undo.callback(source.close)
                self.snapshots.put_files(place, stored_paths(source), partial(move_path, source), undo)
            except DiskFull:
                raise
            except (StorageError, FileNotFoundError) as error:
                reason = str(error).replace(str(copy), f"in {place}")
                raise Conflict(f"snapshot {name!r} cannot be restored: {reason}") from None
            try:
                self._replace(source)
            except (Unavailable, DiskFull):  # before anything was replaced: the files that were put there go again
                raise
            except BaseException:
                undo.pop_all()
                raise
            undo.pop_all()
            source.close()
        return self.snapshots.get(name)

    def records(self, record_type: str) -> list[dict[str, Json]]:
        """All records of a type, oldest first; NotFound."""
        found: list[dict[str, Json]] = []
        after: int | None = 0
        filters = Filters.model_validate({"recordType": record_type})
        while after is not None:
            items, after, _ = self.queue.records.page(Selected(filters, limit=1000, after=after))
            found += json.loads(b"[%b]" % items)
        return found

    def _keep_room(self) -> None:
        """Where the disk is nearly full, gives back what deleted records took."""
        try:
            self.folder.free_space()
        except DiskFull:
            self._database.shrink()
            raise

    def announce(self, url: str | None) -> None:
        """Tells other processes where this one serves, or that it does no more."""
        with suppress(OSError):  # then they are told less
            for lock in self._locks:
                lock.describe(url=url)

    def gauges(self) -> dict[str, float]:
        """The metrics of this moment."""
        pending, in_progress = self.queue.jobs.counts()
        oldest = self.queue.jobs.oldest_pending()
        age = (self.clock() - datetime.fromisoformat(oldest)).total_seconds() if oldest else 0
        return {"jobs_pending": pending, "jobs_in_progress": in_progress, "oldest_pending_seconds": max(0.0, age),
                "uptime_seconds": monotonic() - self._started}

    def enqueue(self, job_type_name: str, request: Mapping[str, Json]) -> Job:
        """Makes a job as POST would; raises BadRequest."""
        if job_type_name not in JOB_TYPES:
            raise BadRequest(f"there is no job type {job_type_name!r}{did_you_mean(job_type_name, JOB_TYPES)}")
        model = JOB_TYPES[job_type_name].model
        return self.queue.enqueue(job_type_name, validated(model, lambda: model.model_validate(request)))[0]

    def wait(self, job_id: str, seconds: float | None = None) -> Job:
        """The job once it has finished, or as it is after `seconds`."""
        return self.queue.wait(job_id, seconds)

    @contextmanager
    def poll(self) -> Iterator[bool]:
        """Whether a request may wait here: not when half of the threads do already, the others are for others."""
        free = self._polls.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._polls.release()

    def drain(self, seconds: float | None = None) -> bool:
        """Waits until no job is pending or running; False if that takes longer than `seconds`."""
        return self.queue.drain(seconds)

    def health(self) -> Health:
        """Really writes to the database and the disk, and asks the workers."""
        states, errors, pending, in_progress = {"database": "ok", "queue": "ok"}, [], 0, 0
        for part, look in (("database", self.queue.probe), ("queue", self.queue.check)):
            try:
                look()
                if part == "database":
                    pending, in_progress = self.queue.jobs.counts()
            except (StorageError, Unavailable) as error:
                states[part] = "unavailable"
                errors.append(str(error))
        checks = dict(self.checks)
        if stuck := self.queue.stuck():
            checks["stuck"] = f"to cancel gives up: {', '.join(map(str, stuck))}"
        if self.queue.fault:
            checks["storage"] = f"jobs wait for it: {self.queue.fault}"
        return Health.model_validate({
            **states, "status": "unavailable" if errors else "ok", "pending": pending, "in_progress": in_progress,
            "workers": self.settings.workers, "uptime": round(monotonic() - self._started, 3), "checks": checks,
            "errors": errors or None, "links": {name: MOUNT.get() + path for name, path in LINKS.items()}})

    def close(self, seconds: float = 2.0) -> bool:
        """Puts running jobs back to pending and lets go of everything; False if a job did not pause in time.

        Closing again does nothing.
        """
        if self._closed:
            return True
        self._closed = True
        ended = self.queue.stop(seconds)
        if self._housekeeper.is_alive():
            self._housekeeper.join(seconds)
        self._database.close()
        for lock in self._locks:
            lock.release()
        return ended


# ==== 9 HTTP: thin handlers, one way for bodies and errors ====

_JSON_LIMIT = 2**20
_JSON_TYPE = "application/json"
_LONG_POLL_SECONDS = 30
_PACKED_FROM = 1024  # bytes of an answer from which on it is gzipped


def takes_upload(method: str, path: str) -> bool:
    """True for a request that brings a file."""
    return method == "POST" and path in ("/upload", "/infer")


def body_too_large(path: str, settings: Settings) -> TaskError:
    """The refusal of a body that is over the limit of its path."""
    return upload_too_large(settings) if takes_upload("POST", path) else TooLarge(
        f"the body is larger than {_JSON_LIMIT} bytes")


def _members(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    members = dict(pairs)
    if len(members) < len(pairs):
        (name, _), = Counter(name for name, _ in pairs).most_common(1)
        raise BadRequest(f"the body is not as expected: invalid JSON: {name[:100]!r} is given twice in one object")
    return members


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadRequest(f"the body is not as expected: invalid JSON: a number in it is not finite: {text[:30]}")
    return number


# The C scanner does the work: about a tenth of what the model takes.
_EXACT_JSON = json.JSONDecoder(object_pairs_hook=_members, parse_float=_finite, parse_constant=_finite)


def check_json(raw: bytes) -> None:
    """Refuses what pydantic lets pass, though two readers of it would not see the same: names given twice in one
    object, and numbers beyond those of JSON."""
    try:
        _EXACT_JSON.decode(raw.decode())
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not as expected: invalid JSON: {error}") from None


def is_packed(encoding: str | None) -> bool:
    """Whether a Content-Encoding is gzip; UnsupportedMedia if it is neither that nor none."""
    found = (encoding or "identity").strip().lower()
    if found not in ("identity", "gzip", "x-gzip"):
        raise UnsupportedMedia("send the body as it is, or with Content-Encoding: gzip")
    return found != "identity"


def _header_key(name: str) -> str:
    return name.upper().replace("-", "_")


def _given(text: str, lists: Collection[str] = ()) -> dict[str, Json]:
    """Names and values of a query; those of `lists` may be given more than once."""
    given: dict[str, Json] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        if name in lists:
            given.setdefault(name, []).append(value)
        elif name in given:
            raise BadRequest.of(name, "is given twice")
        else:
            given[name] = value
    return given


@lru_cache(maxsize=128)  # most are empty
def _asked(model: type[ApiModel], text: str) -> ApiModel:
    lists = [str(field.alias) for field in model.model_fields.values() if get_origin(field.annotation) is list]
    return validated(model, lambda: model.model_validate(_given(text, lists), by_alias=True, by_name=False))


_COOKIE = "taskapi_"


def page_cookie(token: str) -> tuple[str, str]:
    """Name and value of the page's cookie: no token, but a proof of it. Servers on other ports have other names."""
    proof = hashlib.sha256(f"taskapi page {token}".encode()).hexdigest()
    return f"{_COOKIE}{proof[:8]}", proof[8:]


def has_token(header: Callable[[str], str | None], settings: Settings) -> bool:
    """Whether a request brings the token, as itself or as the page's cookie, or none is wanted."""
    if settings.token is None:
        return True
    scheme, _, given = (header("Authorization") or "").partition(" ")
    name, proof = page_cookie(settings.token)
    cookie = re.search(rf"(?:^|;)\s*{name}=([^;\s]*)", header("Cookie") or "")
    bearer = given.strip() if scheme.lower() == "bearer" else ""
    # Not ==, which takes the longer the more of it is right.
    return secrets.compare_digest(bearer.encode(), settings.token.encode()) or (
        secrets.compare_digest((cookie[1] if cookie else "").encode(), proof.encode()))


class Request:
    """One request on its way through a handler: the engine behind it, the query, the body."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.flight = ExitStack()  # what holds while the request is in flight; closed before it waits for a job
        self.fault: Fault | None = None  # the one that it met
        self.environ: dict[str, Any] = bottle.request.environ
        self.method: str = bottle.request.method
        self.path: str = bottle.request.path
        self.query_string: str = self.environ.get("QUERY_STRING", "")
        self.gone: Callable[[], bool] = self.environ.get("taskapi.gone", lambda: False)  # of servers that can tell

    def header(self, name: str) -> str | None:
        """A request header by its HTTP name."""
        key = _header_key(name)
        return self.environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}")

    @property
    def length(self) -> int:
        """The declared length of the body; -1 if there is none."""
        text = self.header("Content-Length") or ""
        return int(text) if text.isdecimal() else -1

    def query(self, model: type[Q]) -> Q:
        """The query string as a model; BadRequest names an unknown or bad parameter."""
        return cast(Q, _asked(model, self.query_string))

    def _declared(self) -> Iterator[bytes]:
        stream, left = self.environ["wsgi.input"], self.length if self.length >= 0 else sys.maxsize
        while block := stream.read(min(_BLOCK, left)):
            left -= len(block)
            yield block

    def blocks(self, most: int) -> Iterator[bytes]:
        """The body, block by block, without its Content-Encoding; refused where it is more than `most` bytes."""
        total, blocks = 0, self._declared()
        try:
            for block in unpacked(blocks) if is_packed(self.header("Content-Encoding")) else blocks:
                total += len(block)
                if total > most:
                    raise body_too_large(self.path, self.engine.settings)
                yield block
        except BadGzip as error:
            raise BadRequest(f"the body is not as its Content-Encoding says: {error}") from None

    @functools.cached_property
    def json_body(self) -> bytes:
        """The JSON body, as it is without its Content-Encoding."""
        if (self.header("Content-Type") or "").partition(";")[0].strip().lower() != _JSON_TYPE:
            raise UnsupportedMedia(f"send the body as Content-Type: {_JSON_TYPE}")
        return b"".join(self.blocks(_JSON_LIMIT)).removeprefix(codecs.BOM_UTF8)

    def body(self, model: type[Q]) -> Q:
        """The JSON body as a model."""
        request = validated(model, lambda: model.model_validate_json(self.json_body, by_alias=True, by_name=False))
        check_json(self.json_body)
        return request

    def note(self, status: int, seconds: float) -> None:
        """Keeps for a test what this request was; the token is not shown."""
        body, cut = None, self.fault is not None and self.fault.then.close and self.fault.then.after is None
        with suppress(Exception):  # what cannot be read, or written again, was refused for that
            if len(self.json_body) <= _MOST_LOGGED:
                read = _EXACT_JSON.decode(self.json_body.decode())
                to_json(read)
                body = read
        token, headers = self.engine.settings.token, {}
        for key, value in self.environ.items():
            if key.startswith("HTTP_") or key in ("CONTENT_TYPE", "CONTENT_LENGTH"):
                for secret in (token, page_cookie(token)[1]) if token else ():
                    value = value.replace(secret, "***")
                headers[key.removeprefix("HTTP_").replace("_", "-").title()] = value
        self.engine.seen.append({
            "at": instant(self.engine.clock()), "method": self.method, "path": self.path,
            "query": dict(parse_qsl(self.query_string, keep_blank_values=True)), "headers": headers,
            "body": body, "status": None if cut else status, "ms": round(seconds * 1000, 3),
            "fault": self.fault.id if self.fault else None})

    def upload(self, also: Sequence[str] = ()) -> AbstractContextManager[Upload]:
        """The file that the body brings, of a type in `also` or the settings; with the options in query and form."""
        settings = self.engine.settings
        return receive_upload(self.blocks(settings.max_upload_bytes + MULTIPART_OVERHEAD),
                              self.header("Content-Type") or "", settings, self.engine.folder,
                              _given(self.query_string), also)

    def computing(self) -> AbstractContextManager[None]:
        """While the request computes for long, in turn with the jobs; Unavailable if its turn does not come."""
        until = monotonic() + _LONG_POLL_SECONDS

        def check() -> None:
            if monotonic() > until:
                raise Unavailable("the processor is busy with other work")

        return self.engine.queue.gate.turn(check=check)

    def wait_for(self, job: Job, seconds: float) -> Job:
        """The job as soon as it has finished, or as it is after so many seconds."""
        if job.status.finished or not seconds:
            return job
        self.flight.close()
        with self.engine.poll() as free:
            return self.engine.queue.wait(job.job_id, seconds if free else 0, self.gone)


def _weight(header: str | None, *names: str) -> float:
    """The weight that an Accept header (RFC 9110, 12.4.2) gives to the first of `names` that is in it; else 0."""
    weights: dict[str, float] = {}
    for entry in (header or "").lower().split(","):
        name, *parameters = (text.strip() for text in entry.split(";"))
        quality = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        weights[name] = float(quality) if re.fullmatch(r"[01](\.\d{0,3})?", quality, re.ASCII) else 0
    return next((weights[name] for name in names if name in weights), 0)


def prefers_html(accept: str | None) -> bool:
    """True if an Accept header likes text/html better than JSON, as a browser's does."""
    return _weight(accept, "text/html", "text/*", "*/*") > _weight(accept, _JSON_TYPE, "application/*", "*/*")


class Route(NamedTuple):
    """One method of one path: its handler, the shapes it takes, and the statuses it may answer.

    The handler gets the Request, then what is asked for as `query`, then a JSON `body`, then the parts of the path.
    An answer is an ApiModel, `dict` for other JSON, `bytes` for a file, a media type for text, None for nothing; a
    tuple where the client may choose.
    """

    method: str
    path: str
    handler: Callable[..., Any]
    query: type[ApiModel] | None
    body: type[ApiModel] | None
    answers: Mapping[int, Any]


ROUTES: list[Route] = []


def route(method: str, path: str, answers: Mapping[int, Any], query: type[ApiModel] | None = None,
          body: type[ApiModel] | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a handler, and returns it unchanged; the parts of the path in braces become its arguments."""
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append(Route(method, path, handler, query, body, answers))
        return handler

    return register


class ErrorBody(ApiModel):
    """Every error."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False,
                              json_schema_extra={"examples": [BadRequest.of("count", "is required").body()]})

    error: str = Field(description="A short message.")
    status: int
    fields: list[dict[str, str]] | None = Field(None, description="Which fields are at fault, and why.")


def reply(body: Any, status: int = 200, content_type: str = _JSON_TYPE, **headers: str) -> bottle.HTTPResponse:
    """An answer: an ApiModel, or anything else that is JSON, or a text; keyword `Retry_After` is its header."""
    text = body.model_dump_json() if isinstance(body, ApiModel) else body
    if not isinstance(text, (str, bytes)):
        text = json.dumps(text, ensure_ascii=False)
    data = text.encode() if isinstance(text, str) else text
    headers |= {"Content-Type": content_type, "Content-Length": str(len(data))}
    return bottle.HTTPResponse(data, status, headers)


BROWSER_PAGES: dict[str, Callable[[Request], bottle.HTTPResponse]] = {}  # by path: what a browser gets there, not JSON


def plain_route(method: str, path: str, answers: Mapping[int, Any], about: str, act: Callable[..., object],
                body: type[ApiModel] | None = None) -> None:
    """Registers a call that only hands on: `act` gets the engine, a JSON `body`, and the parts of the path."""
    def handler(call: Request, *models: ApiModel, **parts: str) -> bottle.HTTPResponse:
        made, status = act(call.engine, *models, **parts), next(iter(answers))
        return bottle.HTTPResponse(status=status) if made is None else reply(made, status)

    handler.__doc__ = about
    route(method, path, answers, body=body)(handler)


@route("GET", "/health", {200: Health, 503: Health})
def get_health(call: Request) -> bottle.HTTPResponse:
    """The health check: really writes to the database and the disk, and asks the workers."""
    health = call.engine.health()
    trusted = has_token(call.header, call.engine.settings)
    body = health.model_dump(exclude_none=True, include=None if trusted else {"status"})
    return reply(body) if health.status == "ok" else reply(
        body, Unavailable.http_status, Retry_After=str(Unavailable.retry_after))


@route("GET", "/", {200: (Health, "text/html"), 503: Health})
def get_root(call: Request) -> bottle.HTTPResponse:
    """The health check, as GET /health; a browser gets the page. Without the token it tells the status alone."""
    page = BROWSER_PAGES["/" if has_token(call.header, call.engine.settings) else "token"]
    response = (page if prefers_html(call.header("Accept")) else get_health)(call)
    response.set_header("Vary", "Accept")
    return response


@route("POST", "/ui", {204: None})
def post_ui(call: Request) -> bottle.HTTPResponse:
    """Gives a browser the cookie that stands for the token, where one is set; asked by the page."""
    response = bottle.HTTPResponse(status=204)
    if token := call.engine.settings.token:
        secure = "; Secure" if call.environ.get("wsgi.url_scheme") == "https" else ""
        response.set_header("Set-Cookie", "{}={}; Path={}/; HttpOnly; SameSite=Strict{}".format(
            *page_cookie(token), MOUNT.get(), secure))
    return response


class NoQuery(ApiModel):
    """The query of a call that takes none, and base of the others: there all values come as texts."""

    model_config = ConfigDict(strict=False)


class WaitQuery(NoQuery):
    """Query of what answers with a job."""

    wait: float = Field(0, ge=0, le=_LONG_POLL_SECONDS, description="Seconds to wait for the job to finish.",
                        allow_inf_nan=False)


def _made(call: Request, answer: tuple[Job, bool], status: int, wait: float = 0) -> bottle.HTTPResponse:
    job = call.wait_for(answer[0], wait)
    return reply(job, status, Location=job.links["self"])


def _idempotency_key(call: Request) -> str | None:
    key = call.header("Idempotency-Key")
    if key is not None and not 1 <= len(key) <= 200:
        raise BadRequest.of("Idempotency-Key", "must have 1 to 200 characters")
    return key


class UploadForm(IngestOptions):
    """The parts of an upload."""

    file: bytes = Field(description="The file; its name tells its type.", json_schema_extra={"format": "binary"})


class InferQuery(IngestOptions):
    """Query of POST /infer: what else a form's text parts tell."""

    filename: str | None = Field(None, description="Of a file that is the body; it tells the file's type.")


class UploadQuery(InferQuery, WaitQuery):
    """Query of POST /upload: what else a form's text parts tell."""


@route("POST", "/upload", {201: Job, 409: ErrorBody}, query=UploadQuery, body=UploadForm)
def post_upload(call: Request, query: UploadQuery) -> bottle.HTTPResponse:
    """Takes one file: a form with a part named `file`, or the body itself. With a `recordType` it becomes records."""
    queue, key = call.engine.queue, _idempotency_key(call)
    with call.upload() as upload:
        request = UploadRequest(filename=upload.filename, content_type=upload.content_type, draft=upload.file)
        if not upload.options:
            digest = f"upload {upload.filename} {upload.file.sha256}"
            return _made(call, queue.run_now("upload", request, key, digest), 201)
        ingest = validated(IngestRequest, lambda: IngestRequest.model_validate(
            {"filename": upload.filename, **upload.options}))
        digest = f"ingest {ingest.model_dump_json()} {upload.file.sha256}"
        made = queue.enqueue("ingest", ingest, key, digest, request.keep)
    return _made(call, made, 201, query.wait)


@route("POST", "/infer", {200: GenerateRequest}, query=InferQuery, body=UploadForm)
def post_infer(call: Request, _: InferQuery) -> bottle.HTTPResponse:
    """A /generate request whose records are like those of a file, which is sent as to /upload; or of which tells a
    SQLite database, a script that creates one (.sql), an OpenAPI or a JSON Schema document."""
    with call.upload(SCHEMA_TYPES) as upload:
        options = validated(IngestOptions, lambda: IngestOptions.model_validate(upload.options))
        with upload.file.open() as stream, call.computing():
            return reply(infer(stream, upload.filename, options))


@route("GET", "/jobs/{jobId}", {200: Job, 404: ErrorBody}, query=WaitQuery)
@route("GET", "/status/{jobId}", {200: Job, 404: ErrorBody}, query=WaitQuery)
def get_status(call: Request, query: WaitQuery, job_id: str) -> bottle.HTTPResponse:
    """A job; with `wait`, as soon as it has finished."""
    job = call.wait_for(call.engine.queue.jobs.get(job_id), query.wait)
    return reply(job) if job.status.finished else reply(job, Retry_After="1")


class JobsQuery(NoQuery):
    """Query of GET /jobs."""

    status: JobStatus | None = Field(None, description=f"One of {', '.join(JobStatus)}.")
    type: str | None = Field(None, description="What kind of job.")
    limit: int = Field(50, ge=1, le=1000, description="How many at most.")
    after: str | None = Field(None, description="The `next` of the page before.", json_schema_extra={"format": "uuid"})


class JobPage(ApiModel):
    """Jobs, newest first."""

    items: list[Job]
    next: str | None


@route("GET", "/jobs", {200: JobPage}, query=JobsQuery)
def get_jobs(call: Request, query: JobsQuery) -> bottle.HTTPResponse:
    """Jobs, newest first, a page at a time."""
    if query.after is not None and not re.fullmatch(r"[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}", query.after, re.ASCII):
        raise BadRequest.of("after", "is not the `next` of a page")
    jobs, more = call.engine.queue.jobs.page(query.status, query.type, query.limit, query.after)
    return reply(JobPage(items=jobs, next=jobs[-1].job_id if more else None))


plain_route("POST", "/jobs/{jobId}/cancel", {200: Job, 404: ErrorBody, 409: ErrorBody},
            "Cancels a job: at once if it is pending, within a second if it runs.",
            lambda engine, job_id: engine.queue.cancel(job_id))


@route("POST", "/jobs/{jobId}/retry", {202: Job, 404: ErrorBody, 409: ErrorBody})
def post_retry(call: Request, job_id: str) -> bottle.HTTPResponse:
    """Makes a failed or canceled job pending again."""
    return _made(call, (call.engine.queue.retry(job_id), True), 202)


class RecordTypes(ApiModel):
    """All record types."""

    items: list[RecordTypeInfo]
    next: str | None = None


plain_route("DELETE", "/jobs/{jobId}", {204: None, 404: ErrorBody, 409: ErrorBody},
            "Deletes a finished job, its file and its records.", lambda engine, job_id: engine.queue.remove(job_id))
plain_route("GET", "/records", {200: RecordTypes}, "The record types, with counts and fields.",
            lambda engine: RecordTypes(items=engine.queue.records.types()))


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    with file:
        while size > 0 and (block := file.read(min(_BLOCK, size))):
            size -= len(block)
            yield block


def _sent(call: Request, file: BinaryIO, size: int, status: int, headers: Mapping[str, str]) -> bottle.HTTPResponse:
    """An answer of so many bytes of a file, from where it stands."""
    headers = {**headers, "Content-Length": str(size)}
    if call.method == "HEAD" or not size:
        file.close()
        return bottle.HTTPResponse(b"", status, headers)
    # Bottle hands a file over to Waitress, which sends it as far as Content-Length says, and holds neither a thread nor
    # the file's content meanwhile; of what is no file to Bottle it would hold all.
    knows_length = hasattr(call.environ.get("wsgi.file_wrapper"), "prepare")
    return bottle.HTTPResponse(file if knows_length else _blocks(file, size), status, headers)


class RecordQuery(NoQuery):
    """Query of GET /records/{recordType}/{key}."""

    job_id: str | None = Field(None, description="The job that made them.")
    fields: str | None = Field(None, description="Which fields, in which order, separated by commas; default: all.")


RecordFormat = Literal["json", "ndjson", "csv"]
_PAGE, _LARGEST_PAGE = 100, 1000  # records


class RecordsQuery(RecordQuery):
    """Query of GET /records/{recordType}: these, and conditions, each a field's name or `field.operator`."""

    model_config = ConfigDict(extra="allow")

    limit: int | None = Field(None, ge=1, le=2**63 - 1, description=(
        f"How many at most. A page of JSON has {_PAGE}, or up to {_LARGEST_PAGE}; else default: all."))
    after: int | None = Field(None, ge=0, le=2**63 - 1, description="The `next` of the page before.")
    order_by: str | None = Field(None, description="Fields, separated by commas; with - before it, descending.")
    format: RecordFormat | None = Field(None, description="Default: as Accept says, or json.")
    or_: list[Annotated[str, Field(json_schema_extra={"pattern": "="})]] = Field([], alias="or", description=(
        "Of these, such as age.gte=65, one has to hold; within one, & joins several that all have to."))


def _selected(call: Request, query: RecordQuery, record_type: str, kinds: Mapping[str, Kind]) -> Selected:
    """What a query asks for, its texts read by the kinds of the fields."""
    conditions = Where.model_validate({})
    if isinstance(query, RecordsQuery):
        parameters = [str(field.alias) for field in RecordsQuery.model_fields.values()]
        where = where_of((query.model_extra or {}).items(), query.or_, kinds, parameters)
        conditions = validated(Where, lambda: Where.model_validate(where, by_alias=True, by_name=False))
    return Selected(Filters.model_construct(record_type=record_type, job_id=query.job_id, where=conditions),
                    names_in(query.fields, kinds) if query.fields else None,  # a form's empty field names none
                    interrupted=call.gone)


class RecordPage(ApiModel):
    """Records of one type, as objects of their fields."""

    items: list[dict[str, Json]]
    next: str | None
    total: int = Field(description="How many records the conditions choose.")
    links: dict[str, str] = Field(description="`next`, the path of the next page, where there is one.")


def _page(call: Request, wanted: Selected) -> bottle.HTTPResponse:
    if (wanted.limit or 0) > _LARGEST_PAGE:
        raise BadRequest.of("limit", f"should be at most {_LARGEST_PAGE} for a page; format=ndjson has no such limit")
    items, last, total = call.engine.queue.records.page(wanted._replace(limit=wanted.limit or _PAGE))
    links: dict[str, str] = {}
    if last is not None:
        kept = [pair for pair in parse_qsl(call.query_string, True) if pair[0] != "after"]
        links["next"] = f"{MOUNT.get()}{call.path}?{urlencode([*kept, ('after', last)], safe=',:')}"
    return reply(b'{"items": [%b], "next": %b, "total": %d, "links": %b}' % (
        items, to_json(None if last is None else str(last)), total, to_json(links)))


def _whole(call: Request, wanted: Selected, name: str) -> bottle.HTTPResponse:
    """The records in a format, as an export has them. They go by way of a file: to send that takes no thread."""
    if not call.engine.readings.acquire(blocking=False):
        raise Unavailable("a quarter of the threads write records already: the others are for other requests")
    try:
        with ExitStack() as undone:
            draft = undone.enter_context(AtomicFile(call.engine.folder.root))
            for _ in FORMATS[name].write(ExportSink(draft, gzip=False), call.engine.queue.records, wanted):
                pass
            file = draft.open_last()
            undone.pop_all()
    finally:
        call.engine.readings.release()
    if draft.bytes > _BLOCK:
        return _sent(call, file, draft.bytes, 200, {"Content-Type": FORMATS[name].content_type})
    with file:
        return reply(file.read(), content_type=FORMATS[name].content_type)


@route("GET", "/records/{recordType}", {200: (RecordPage, "application/x-ndjson", "text/csv"), 404: ErrorBody},
       query=RecordsQuery)
def get_records(call: Request, query: RecordsQuery, record_type: str) -> bottle.HTTPResponse:
    """Records of one type, oldest first, which fit the conditions: a page of JSON, or all of them as CSV or NDJSON.

    `?age.gte=18&plan.in=pro,team&city=Paris`: a condition is a field, with eq where it names no other operator.
    """
    wanted = _selected(call, query, record_type, call.engine.queue.records.fields(record_type))._replace(
        limit=query.limit, order_by=query.order_by, after=query.after or 0)
    media = {FORMATS[name].content_type.partition(";")[0]: name for name in get_args(RecordFormat)}
    liked = max(media, key=lambda name: _weight(call.header("Accept"), name, f"{name.partition('/')[0]}/*", "*/*"))
    name = query.format or media[liked]  # the first of those that are liked best
    try:
        response = _page(call, wanted) if name == "json" else _whole(call, wanted, name)
    except Interrupted:
        raise Unavailable("the client has gone") from None
    response.set_header("Vary", "Accept")
    return response


@route("GET", "/records/{recordType}/{key}", {200: dict, 404: ErrorBody}, query=RecordQuery)
def get_record(call: Request, query: RecordQuery, record_type: str, key: str) -> bottle.HTTPResponse:
    """One record: by its `id` where the type has that field (the oldest of several), else by its place, from 1."""
    records, found = call.engine.queue.records, b""
    kinds = records.fields(record_type)
    place = records.at(record_type, int(key)) if re.fullmatch(r"[1-9]\d{0,17}", key, re.ASCII) else None
    pair = ("id.eq", key) if "id" in kinds else ("_id.eq", str(place or 0))
    wanted = _selected(call, query, record_type, kinds)
    wanted = wanted._replace(limit=1, filters=wanted.filters.model_copy(update={
        "where": Where.model_validate(where_of([pair], fields=kinds))}))
    with suppress(WrongValue), records.query(wanted) as chosen, chosen.blocks(RecordText()) as blocks:
        found = next(blocks, b"")
    if not found:
        raise NotFound(f"there is no record {key!r} of type {record_type!r}")
    return reply(found)


plain_route("DELETE", "/records/{recordType}", {204: None, 404: ErrorBody, 409: ErrorBody},
            "Deletes all records of one type; the jobs that made them stay. 409 while a job is writing some.",
            lambda engine, record_type: engine.queue.records.delete_type(record_type))


def _matches(header: str, etag: str, *, weak: bool) -> bool:
    """If-Match and If-None-Match (RFC 9110, 13.1): a list of tags, or * for any; W/ counts only where `weak`."""
    tags = [tag.strip().removeprefix("W/" if weak else "") for tag in header.split(",")]
    return etag in tags or "*" in tags


def _byte_range(header: str, size: int) -> tuple[int, int, str]:
    """(first byte, byte after the last, Content-Range) of a Range header (RFC 9110, 14.2).

    A header that is no single byte range is ignored, as the RFC allows: the whole file, and no Content-Range.
    """
    match = re.fullmatch(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", header, re.ASCII)
    first, last = match.groups() if match else ("", "")
    if not (first or last) or (first and last and int(last) < int(first)):
        return 0, size, ""
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        raise RangeNotSatisfiable(f"the file has {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return start, end, f"bytes {start}-{end - 1}/{size}"


def content_disposition(filename: str) -> str:
    """Attachment with a name for old clients and one for all others (RFC 6266)."""
    plain = re.sub(r'[^\x20-\x7e]|["\\%]', "_", filename)
    header = f'attachment; filename="{plain}"'
    return header if plain == filename else f"{header}; filename*=UTF-8''{quote(filename, safe='')}"


@route("GET", "/download/{jobId}", {200: bytes, 206: bytes, 304: None, 404: ErrorBody, 412: ErrorBody,
                                      416: ErrorBody})
def get_download(call: Request, job_id: str) -> bottle.HTTPResponse:
    """A job's file: whole, or the range that was asked for."""
    job = call.engine.queue.jobs.get(job_id)
    if not job.file:
        raise NotFound(f"job {job_id} has no file: it is a {job.status} {job.type} job")
    headers = {"ETag": f'"{job.file.sha256[:32]}"', "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache",
               "Last-Modified": format_datetime(
                   datetime.fromisoformat(job.finished_at or job.created_at), usegmt=True)}
    if not _matches(call.header("If-Match") or "*", headers["ETag"], weak=False):
        raise PreconditionFailed(f"the file's ETag is {headers['ETag']}")
    if _matches(call.header("If-None-Match") or "", headers["ETag"], weak=True):
        return bottle.HTTPResponse(b"", 304, headers)
    start, end = 0, job.file.bytes
    wanted = call.header("Range")
    if wanted and call.header("If-Range") in (None, headers["ETag"], headers["Last-Modified"]):
        start, end, headers["Content-Range"] = _byte_range(wanted, job.file.bytes)
    status = 206 if headers.get("Content-Range") else 200
    headers |= {"Content-Type": job.file.content_type,
                "Content-Disposition": content_disposition(job.file.filename)}
    headers = {name: value for name, value in headers.items() if value}
    file = call.engine.folder.open(job.file)
    file.seek(start)
    return _sent(call, file, end - start, status, headers)


@route("GET", "/metrics", {200: "text/plain"})
def get_metrics(call: Request) -> bottle.HTTPResponse:
    """Figures for Prometheus."""
    text = call.engine.queue.metrics.text(call.engine.gauges())
    return reply(text, content_type="text/plain; version=0.0.4; charset=utf-8")


class FieldsQuery(NoQuery):
    """Query of GET /fields."""

    locale: str = Field("en_US", max_length=20, description="Faker locale of the methods and samples.")
    q: str | None = Field(None, description="Words to look for in names and descriptions.", max_length=100)


_LISTED: set[str] = set()  # locales whose catalogue is kept: the first look at one takes up to a second


class FieldList(ApiModel):
    """What a schema may use."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    items: list[dict[str, Json]]
    presets: dict[str, Json] | None = Field(None, description="Only where nothing was searched for.")
    formats: dict[str, str] | None = Field(None, description="Of files: which are at hand, and what the others need.")


@route("GET", "/fields", {200: FieldList}, query=FieldsQuery)
def get_fields(call: Request, query: FieldsQuery) -> bottle.HTTPResponse:
    """The types and Faker methods that a schema may use; without a search, the presets too."""
    with nullcontext() if query.locale in _LISTED else call.computing():
        types = catalogue(query.locale, query.q)
        _LISTED.add(query.locale)
    return reply({"items": types} | ({} if query.q else {"presets": PRESETS, "formats": formats_at_hand()}))


class Preview(ApiModel):
    """The records; for several types an object of such lists, by type."""

    records: list[dict[str, Json]] | dict[str, list[dict[str, Json]]]


class PreviewRequest(GenerateRequest):
    """As for /generate, up to 100 records."""

    model_config = ConfigDict(json_schema_extra={
        "examples": [{"recordType": "person", "count": 3, "seed": 42}], "oneOf": _COUNT_OR_RECORDS})

    count: Annotated[int, Field(ge=1, le=100), WHOLE] | None = Field(None, description="How many, up to 100.")

    def with_defaults(self, settings: Settings, clock: Clock) -> Self:
        """Of a request of many parts fewer records may be shown than it has parts."""
        fewer = self.model_copy(update={"parts": min(self.parts, self.count)} if self.parts and self.count else None)
        return super(PreviewRequest, fewer).with_defaults(settings, clock)


@route("POST", "/preview", {200: Preview}, body=PreviewRequest)
def post_preview(call: Request, request: PreviewRequest) -> bottle.HTTPResponse:
    """What /generate would make, up to 100 records, at once; nothing is stored."""
    with call.computing():
        return reply(preview(request.with_defaults(call.engine.settings, call.engine.clock)))


@lru_cache(maxsize=256)
def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


_HOST = re.compile(r"([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?", re.ASCII)


def is_friend(origin: str | None, friends: Sequence[str]) -> bool:
    """True for the Origin of a page that may use this server: one of `friends`, which may end in `:*`, any port."""
    return origin is not None and any(origin == friend or (
        friend.endswith(":*") and re.fullmatch(re.escape(friend[:-2]) + r"(:\d{1,5})?", origin, re.ASCII))
        for friend in friends)


_FOR_PEOPLE = ("/", "/ui", "/docs", "/download/")  # where a link on a page of another site may lead


def check_origin(method: str, path: str, header: Callable[[str], str | None], allowed_hosts: Container[str],
                 friends: Sequence[str]) -> None:
    """The guard against web pages: raises WrongHost or CrossSite, or returns.

    A page of another site can send requests to loopback, and can give its own name the address 127.0.0.1; its
    requests then carry that name as Host, or its Origin, or Sec-Fetch-Site. Other clients send none of these.
    What a page only asks for is refused too, since to answer may cost much; but not to follow a link.
    """
    host, origin = header("Host"), header("Origin")
    if host is not None and (not _HOST.fullmatch(host) or _host_name(f"//{host}") not in allowed_hosts):
        raise WrongHost("this server does not answer for that host (TASKAPI_ALLOWED_HOSTS adds names)")
    if method == "OPTIONS" or is_friend(origin, friends):
        return
    if header("Sec-Fetch-Site") in (None, "same-origin", "none") and (
            origin is None or (_host_name(origin) and urlsplit(origin).netloc.lower() == str(host).lower())):
        return
    if method in ("GET", "HEAD") and header("Sec-Fetch-Mode") == "navigate" and (
            f"/{path.split('/')[1]}/" if path.count("/") > 1 else path) in _FOR_PEOPLE:
        return
    raise CrossSite("cross-site requests from web pages are refused (TASKAPI_CORS_ORIGINS names those that may)")


def check_token(method: str, path: str, header: Callable[[str], str | None], settings: Settings) -> None:
    """Raises Unauthorized where the token is wanted: everywhere but at GET /, and for a preflight of a friend, which
    browsers send without."""
    preflight = method == "OPTIONS" and header("Access-Control-Request-Method") and (
        is_friend(header("Origin"), settings.cors_origins))
    if (method, path) != ("GET", "/") and not preflight and not has_token(header, settings):
        raise Unauthorized("this needs the token, as Authorization: Bearer TOKEN (commands: --token or TASKAPI_TOKEN)",
                           headers={"WWW-Authenticate": "Bearer"})


def cors_headers(origin: str | None, friends: Sequence[str]) -> dict[str, str]:
    """What tells a browser that a page of a friend may see this answer."""
    if not is_friend(origin, friends):
        return {"Vary": "Origin"} if friends else {}
    return {"Access-Control-Allow-Origin": str(origin), "Vary": "Origin",
            "Access-Control-Expose-Headers": "Location, Retry-After, ETag, Content-Disposition, Content-Range"}


def check_head(method: str, path: str, header: Callable[[str], str | None], length: int, settings: Settings,
               allowed_hosts: Container[str]) -> int:
    """What the head of a request tells before its body is read; `length` is -1 where unknown.

    Returns how many bytes the body may have. The channel asks before it reads, and the app again, for other servers.
    """
    check_origin(method, path, header, allowed_hosts, settings.cors_origins)
    check_token(method, path, header, settings)
    if method == "POST":
        is_packed(header("Content-Encoding"))
    if takes_upload(method, path):
        check_upload_head(header("Content-Type") or "", length, settings)
        return settings.max_upload_bytes + MULTIPART_OVERHEAD
    if length > _JSON_LIMIT:
        raise body_too_large(path, settings)
    return _JSON_LIMIT


SAFE_HEADERS = {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
                 "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}
_STANDARD_HEADERS = {"Cache-Control": "no-store", **SAFE_HEADERS}


def told(error: BaseException, what: str) -> TaskError:
    """The error to answer. A bug, or what is wrong with the database or the disk, is logged, and names that entry.

    Of a bug it shows nothing else.
    """
    if isinstance(error, TaskError) and not isinstance(error, StorageError):
        return error
    number = secrets.token_hex(4)
    if isinstance(error, StorageError):
        _LOG.error("error %s: %s: %s", number, what, error)
        return type(error)(f"{error} (error {number} in the server's log)")
    _LOG.error("error %s: %s", number, what, exc_info=error)
    return TaskError(f"internal error {number}: the server's log has the details")


def _pack(call: Request, response: bottle.HTTPResponse) -> None:
    """Gzips a larger answer for a client that takes that; a download goes as it is, in ranges of the file's bytes."""
    if not isinstance(response.body, bytes) or len(response.body) <= _PACKED_FROM:
        return
    response.set_header("Vary", ", ".join(filter(None, (response.headers.get("Vary"), "Accept-Encoding"))))
    if _weight(call.header("Accept-Encoding"), "gzip", "*") > 0:
        response.body = gzip.compress(response.body, 1, mtime=0)
        response.set_header("Content-Encoding", "gzip")
        response.set_header("Content-Length", str(len(response.body)))


UNROUTED = "none"  # the path under which requests count that no route takes


def _handled(call: Request, entry: Route, arguments: dict[str, Any]) -> bottle.HTTPResponse:
    """The answer of a handler, given the models that it takes."""
    if entry.path == UNROUTED:
        return entry.handler(call, **arguments)
    query = call.query(entry.query or NoQuery)
    if MOUNT.get() and not call.environ.get("bottle.raw_path"):  # relative links would miss the mount
        return bottle.HTTPResponse(b"", 308, {"Location": f"{MOUNT.get()}/"})
    models = [query] if entry.query else []
    if entry.body and entry.body is not UploadForm:
        models.append(call.body(entry.body))
    return entry.handler(call, *models, **arguments)


def _cut(call: Request, response: bottle.HTTPResponse, after: int | None) -> None:
    """Has the connection end in the middle of this answer, or before it; where no server does that, raises for it."""
    if hasattr(response.body, "read"):
        response.body = _blocks(response.body, int(response.headers["Content-Length"]))
    if cut := call.environ.get("taskapi.cut"):
        cut(-1 if after is None else after)
        return
    whole = response.body if isinstance(response.body, bytes) else b"".join(response.body)

    def blocks() -> Iterator[bytes]:
        yield whole[:max(after or 0, 1)] or b"\0"
        raise ConnectionResetError("a fault has cut the connection")

    response.body = blocks()


def _with_faults(call: Request, answer: Callable[[], bottle.HTTPResponse]) -> bottle.HTTPResponse:
    """What `answer` returns, unless a test wants something to go wrong: the one place of that for requests."""
    call.fault = call.engine.faults.of_request(call.method, call.path)
    if call.fault is None:
        return answer()
    then = call.fault.then
    if then.delay:
        call.flight.close()
        with call.engine.poll() as free:
            await_event(call.fault.removed, then.delay if free else 0,
                        lambda: call.gone() or call.engine.queue.stopping.is_set())
    given, status = "body" in then.model_fields_set, then.status or 200
    if given or then.status is not None:
        error = {"error": f"fault {call.fault.id} was asked for", "status": status} if status >= 400 else {}
        response = reply(then.body if given else error, status)
    else:
        response = reply({}) if then.close and then.after is None else answer()
    for name, value in then.headers.items():
        response.set_header(name, str(value))
    if then.close or then.after is not None:
        _cut(call, response, then.after)
    return response


def _checked(call: Request, entry: Route, arguments: dict[str, Any]) -> bottle.HTTPResponse:
    raw_path = call.environ.get("bottle.raw_path", "")
    try:
        raw_path.encode("latin-1").decode()
    except UnicodeError:  # Bottle leaves its bad bytes out
        raise BadRequest("the path is not UTF-8") from None
    try:
        check_head(call.method, call.path, call.header, call.length, call.engine.settings, call.engine.allowed_hosts)
    except Unauthorized as error:
        if call.method != "GET" or not prefers_html(call.header("Accept")):
            raise
        page = BROWSER_PAGES["token"](call)
        return bottle.HTTPResponse(page.body, error.http_status, {**page.headers, **error.headers})
    return _with_faults(call, partial(_handled, call, entry, arguments))


def middleware(engine: Engine, entry: Route, **arguments: Any) -> bottle.HTTPResponse:
    """What stands around every handler: checks before it, failures into answers, headers on all of them, counts."""
    began, call, metrics = monotonic(), Request(engine), engine.queue.metrics
    mount = MOUNT.set(quote(call.environ.get("SCRIPT_NAME", "").rstrip("/"), encoding="latin-1"))
    try:
        call.flight.enter_context(engine.queue.gate.request())
        response = _checked(call, entry, arguments)
    except (Exception, SystemExit, GeneratorExit) as error:  # noqa: BLE001  # no traceback reaches a client
        answered = told(error, f"{call.method} {call.path}")
        response = reply(answered.body(), answered.http_status, **answered.headers)
    finally:
        call.flight.close()
        MOUNT.reset(mount)
    cors = cors_headers(call.header("Origin"), engine.settings.cors_origins)
    if call.method == "OPTIONS" and "Access-Control-Allow-Origin" in cors:
        asked = re.sub(r"[^\w, -]", "", call.header("Access-Control-Request-Headers") or "", flags=re.ASCII)
        cors |= {"Access-Control-Allow-Methods": response.headers.get("Allow", ""), "Access-Control-Max-Age": "600",
                 "Access-Control-Allow-Headers": asked, "Access-Control-Allow-Private-Network": "true"}
    for name, value in {**_STANDARD_HEADERS, **cors}.items():
        if name not in response.headers:
            response.set_header(name, value)
        elif name == "Vary":
            response.set_header(name, f"{value}, {response.headers[name]}")
    _pack(call, response)
    metrics.observe("request_seconds", monotonic() - began, route=entry.path)
    metrics.add("requests_total", method=call.method, route=entry.path, status=response.status_code)
    if engine.settings.test_controls and not call.path.startswith("/test/"):
        call.note(response.status_code, monotonic() - began)
    return response


class SnapshotList(ApiModel):
    """All snapshots, by name."""

    items: list[Snapshot]


plain_route("POST", "/snapshots", {201: Snapshot, 409: ErrorBody},
            "Copies everything, as it is at one moment, while jobs go on.",
            lambda engine, request: engine.snapshot(request.name), SnapshotRequest)
plain_route("GET", "/snapshots", {200: SnapshotList}, "The snapshots.",
            lambda engine: SnapshotList(items=engine.snapshots.all()))
plain_route("POST", "/snapshots/{name}/restore", {200: Snapshot, 404: ErrorBody, 409: ErrorBody},
            "Makes all as it is in a snapshot: its jobs go on, whatever is not in it is gone.",
            lambda engine, name: engine.restore(name))
plain_route("DELETE", "/snapshots/{name}", {204: None, 404: ErrorBody}, "Deletes a snapshot.",
            lambda engine, name: engine.snapshots.remove(name))


class SeenQuery(NoQuery):
    """Query of GET /test/requests."""

    method: str | None = None
    path: str | None = Field(None, description="`*` is any text.")
    status: int | None = None


class ClockRequest(ApiModel):
    """Where to set the clock: one of them."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"advance": "3d"}]})

    now: str | None = Field(None, description="An instant; the clock stands there.")
    advance: str | None = Field(None, description="A span such as 3d or 1h30m.")


def _clock(engine: Engine, request: ClockRequest | None = None) -> dict[str, Json]:
    """What it shows, after it was moved."""
    if request and (request.now is None) == (request.advance is None):
        raise BadRequest.of("now", "name either now or advance")
    if request and request.now is not None:
        engine.clock.set(request.now)
    elif request:
        engine.clock.advance(str(request.advance))
    return {"now": instant(engine.clock())}


plain_route("POST", "/test/faults", {201: dict, 409: ErrorBody},
            "Makes the next requests, or jobs, of a kind go wrong.",
            lambda engine, request: engine.faults.add(request), FaultRequest)
plain_route("GET", "/test/faults", {200: dict}, "The faults, what is left of each, and how often it has struck.",
            lambda engine: {"items": engine.faults.list()})
plain_route("DELETE", "/test/faults", {204: None}, "Removes all faults; jobs that they hold go on.",
            lambda engine: engine.faults.clear())
plain_route("DELETE", "/test/faults/{id}", {204: None, 404: ErrorBody}, "Removes a fault; a job that it holds goes on.",
            lambda engine, id: engine.faults.clear(id))


@route("GET", "/test/requests", {200: dict}, query=SeenQuery)
def get_requests(call: Request, query: SeenQuery) -> bottle.HTTPResponse:
    """The last 1,000 requests, in the order in which they were answered."""
    return reply({"items": call.engine.requests(query.method, query.path, query.status)})


plain_route("DELETE", "/test/requests", {204: None}, "Forgets them.", lambda engine: engine.seen.clear())
plain_route("GET", "/test/clock", {200: dict}, "What the service takes for now.", _clock)
plain_route("PUT", "/test/clock", {200: dict},
            "Sets the clock, which then stands still, or puts it forward; what is past its retention goes at once.",
            _clock, ClockRequest)
plain_route("DELETE", "/test/clock", {204: None}, "Makes the clock the real one again.",
            lambda engine: engine.clock.reset())
plain_route("POST", "/test/reset", {204: None},
            "Makes all as new: no jobs, records, files, faults or requests, and the real clock.",
            lambda engine: engine.reset())


def all_routes(test_controls: bool = False) -> list[Route]:
    """All routes: the ones above, and POST /{name} for each job type whose request is JSON."""
    def poster(kind: JobType) -> Callable[..., bottle.HTTPResponse]:
        def post_job(call: Request, query: WaitQuery, request: JobRequest) -> bottle.HTTPResponse:
            key = _idempotency_key(call)
            digest = hashlib.sha256(request.model_dump_json(exclude_unset=True).encode()).hexdigest() if key else ""
            if request.heavy:
                with call.computing():
                    request.with_defaults(call.engine.settings, call.engine.clock)  # and is light from now on
            return _made(call, call.engine.queue.enqueue(kind.name, request, key, f"{kind.name} {digest}"), 202,
                         query.wait)

        post_job.__doc__ = kind.run.__doc__
        return post_job

    posted = [Route("POST", f"/{kind.name}", poster(kind), WaitQuery, kind.model,
                    {202: Job, 404: ErrorBody, 409: ErrorBody})
              for kind in JOB_TYPES.values() if kind.posted]
    others = [entry for entry in ROUTES[2:] if test_controls or not entry.path.startswith("/test/")]
    return [*ROUTES[:2], *posted, *others]  # in the order in which people meet them


_COMMON_ANSWERS = {error.http_status: str(error.__doc__) for error in (
    BadRequest, CrossSite, WrongHost, HeadersTooLarge, StorageError, Unavailable, TooLarge, UnsupportedMedia)}
_MADE = {"Location": "Where its status is."}
_ANSWER_HEADERS: Mapping[int | type, Mapping[str, str]] = {  # by status; `bytes`: wherever a file is answered
    201: _MADE, 202: _MADE, 416: {"Content-Range": "How long the file is."}, 503: {"Retry-After": "Seconds to wait."},
    304: {"ETag": "The file's."},
    bytes: {"ETag": "For If-None-Match and If-Range.", "Last-Modified": "When the file was made.",
            "Accept-Ranges": "bytes", "Content-Disposition": "The file's name."}}
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _content(shape: Any) -> dict[str, Json]:
    """The media types and the schemas of an answer, or of a request's body."""
    if shape is bytes:
        return {"*/*": _BINARY, _JSON_TYPE: {"schema": {}}}  # the file's own type; what is JSON can be anything that is
    if isinstance(shape, str):
        return {shape: {"schema": {"type": "string"}}}
    schema = {"$ref": f"#/components/schemas/{shape.__name__}"} if issubclass(shape, ApiModel) else {"type": "object"}
    if shape is UploadForm:
        return {"multipart/form-data": {"schema": schema}, **dict.fromkeys(RAW_TYPES, _BINARY),
                _JSON_TYPE: {"schema": {}}}
    return {_JSON_TYPE: {"schema": schema}}


def _operation(entry: Route, schemas: Mapping[str, Json]) -> dict[str, Json]:
    """One operation of the OpenAPI document."""
    makes_job = Job in entry.answers.values()
    parameters: list[Json] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                              for name in re.findall(r"{(\w+)}", entry.path)]
    for name, schema in (schemas[entry.query.__name__]["properties"] if entry.query else {}).items():
        parameters.append({"name": name, "in": "query", "schema": schema,
                           "description": schema.get("description", "")})
    if entry.query and entry.query.model_config.get("extra") == "allow":
        parameters.append({"name": "where", "in": "query", "style": "form", "explode": True, "schema": {
            "type": "object", "additionalProperties": {"type": "string"}}, "description": str(entry.query.__doc__)})
    if makes_job and entry.body:
        parameters.append({"name": "Idempotency-Key", "in": "header",
                           "schema": {"type": "string", "minLength": 1, "maxLength": 200},
                           "description": "The same key with the same request answers the first job again."})
    answers: dict[str, Json] = {}
    refusals = [status for status in _COMMON_ANSWERS if entry.body or status not in (413, 415)]
    for status, shapes in {**dict.fromkeys(refusals, ErrorBody), **entry.answers}.items():
        answer: dict[str, Json] = {"description": _COMMON_ANSWERS.get(status, HTTPStatus(status).phrase)}
        for shape in filter(None, shapes if isinstance(shapes, tuple) else (shapes,)):
            answer.setdefault("content", {}).update(_content(shape))
        if (headers := _ANSWER_HEADERS.get(bytes if shapes is bytes else status)) and (makes_job or status != 201):
            answer["headers"] = {name: {"schema": {"type": "string"}, "description": about}
                                 for name, about in headers.items()}
        answers[str(status)] = answer
    summary = (entry.handler.__doc__ or "").strip()
    operation: dict[str, Json] = {"operationId": "-".join([entry.method.lower(), *re.findall(r"\w+", entry.path)]),
                                  "summary": summary, "parameters": parameters,
                                  "responses": dict(sorted(answers.items()))}
    if entry.body:
        operation["requestBody"] = {"required": True, "content": _content(entry.body)}
    return operation


def _told_to_clients(schema: dict[str, Json], texts: bool) -> None:
    """Says of what a client may send what generators of clients need: one takes a property with a default to be
    required. `texts`: a query or a form, which has no null."""
    for field in schema.get("properties", {}).values():
        default, kinds = field.pop("default", None), [*field.pop("anyOf", ())]
        if texts:
            kinds = [kind for kind in kinds if kind != {"type": "null"}]
        if {"type": "null"} in kinds and "enum" in field:
            field["enum"].append(None)
        field.update(kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})
        for kind in kinds:
            if "patternProperties" in kind:
                kind["additionalProperties"] = False
        if isinstance(default, str | int | float):
            field["description"] = f"{field.get('description', '')} Default: {json.dumps(default)}.".strip()


def _with_refs(schema: Mapping[str, Json]) -> dict[str, Json]:
    """The same, in which what an `x-ref` names is a reference into the document."""
    told = json.dumps(schema).replace('"x-ref": "', '"$ref": "#/components/schemas/')
    return cast("dict[str, Json]", json.loads(told))


def _shape_of_own(name: str, cls: type[FieldType]) -> dict[str, Json]:
    """What a field type of the program's own takes, whose class may be named like one of ours; if that can be told."""
    title, shape = f"{re.sub(r'[^a-zA-Z0-9]', '_', name)}_Field", {"properties": {}, "required": ["type"]}
    with suppress(Exception):  # whatever its author has written
        told = _with_refs(cls.model_json_schema())
        shape = shape if "$defs" in told else told
    return {**shape, "title": title}


def _field_shapes(shapes: Mapping[str, dict[str, Json]]) -> dict[str, Json]:
    """What a schema is, and a field of it: the name of a type, or one of `shapes`, by type: an object with options."""
    name: Json = {"type": "string", "pattern": r"^[a-z]\w*$", "description": "GET /fields lists all types."}
    for own, shape in shapes.items():
        shape["properties"]["type"] = {"const": own} if own else {**name, "not": {"enum": [*FIELD_TYPES]}}
    bare = [own for own, shape in shapes.items() if shape["required"] != ["type"] or "oneOf" in shape]
    known: Json = {"properties": {"type": "object", "additionalProperties": True}, "type": {"const": "object"},
                   "$schema": {"type": "string"}, "$ref": {"type": "string", "pattern": "^#"}}
    documents = [{"additionalProperties": True, "required": needs, "properties": {need: known[need] for need in needs}}
                 for needs in (["properties", "type"], ["properties", "$schema"], ["$ref"])]
    fields = {"minProperties": 1, "maxProperties": MAX_FIELDS, "additionalProperties": {
        "$ref": "#/components/schemas/Field"}, "propertyNames": {
        "pattern": r"^(?!_(id|job|created)$)\S(.*\S)?$", "maxLength": MAX_FIELD_NAME}}
    return {"Schema": {"type": "object", "anyOf": [fields, *documents]}, "Field": {"anyOf": [
        {**name, "not": {"enum": bare}}, *({"$ref": f"#/components/schemas/{of['title']}"} for of in shapes.values())]}}


def _secured(document: dict[str, Json]) -> dict[str, Json]:
    """The document of a server that wants the token."""
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"token": []}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if (method, path) == ("get", "/"):
                operation["security"] = [{}, {"token": []}]
            else:
                operation["responses"]["401"] = {
                    "description": Unauthorized.__doc__, "content": _content(ErrorBody),
                    "headers": {"WWW-Authenticate": {"schema": {"const": "Bearer"}}}}
    return document


def openapi(routes: Iterable[Route], *, secured: bool = False) -> dict[str, Json]:
    """The OpenAPI 3.1 document, made from the routes and their models; `secured`: the token is wanted."""
    routes = list(routes)
    answers = [shape for entry in routes for shapes in entry.answers.values()
               for shape in (shapes if isinstance(shapes, tuple) else [shapes])]
    types = FIELD_TYPES | {"": FakerField}
    shapes: set[type[BaseModel]] = {ErrorBody, *(cls for cls in types.values() if cls.__module__ == __name__)}
    inputs = shapes - {ErrorBody}
    inputs |= {shape for entry in routes for shape in (entry.body, entry.query) if shape}
    shapes |= {*inputs, *(shape for shape in answers if isinstance(shape, type) and issubclass(shape, ApiModel))}
    _, definitions = models_json_schema(
        [(shape, "validation" if shape in inputs else "serialization")
         for shape in sorted(shapes, key=str)], ref_template="#/components/schemas/{model}")
    schemas = _with_refs(definitions["$defs"])
    own = {name: _shape_of_own(name, cls) for name, cls in types.items() if cls not in shapes}
    schemas |= {shape["title"]: shape for shape in own.values()}
    schemas |= _field_shapes({name: own.get(name) or schemas[cls.__name__] for name, cls in types.items()})
    texts = {shape.__name__ for entry in routes for shape in (entry.query, UploadForm) if shape}
    sent = {shape.__name__ for shape in inputs}
    while more := {*re.findall(r"#/components/schemas/(\w+)", json.dumps([schemas[name] for name in sent]))} - sent:
        sent |= more
    for name in sent:
        _told_to_clients(schemas[name], name in texts)
    schemas["FieldsQuery"]["properties"]["locale"]["enum"] = ["", *known_locales()]
    for name in schemas.keys() & {"UploadForm", "InferQuery", "UploadQuery"}:
        schemas[name]["properties"]["encoding"]["enum"] = known_encodings()
    paths: dict[str, dict[str, Json]] = {}
    for entry in routes:
        paths.setdefault(entry.path, {})[entry.method.lower()] = _operation(entry, schemas)
    document = {"openapi": "3.1.0", "servers": [{"url": MOUNT.get() or "/"}], "paths": paths,
                "components": {"schemas": schemas},
                "info": {"title": "taskapi", "version": __version__, "license": {"name": "MIT", "identifier": "MIT"},
                         "description": "A data task server: generates records, takes uploads, writes exports."}}
    return _secured(document) if secured else document


def described(settings: Settings) -> dict[str, Json]:
    """The document of a server with these settings."""
    return openapi(all_routes(settings.test_controls), secured=settings.token is not None)


plain_route("GET", "/openapi.json", {200: dict}, "This description, for programs.",
            lambda engine: described(engine.settings))


def build_app(engine: Engine) -> bottle.Bottle:
    """The WSGI application of an engine."""
    app = bottle.Bottle()
    routes = all_routes(engine.settings.test_controls)
    for entry in routes:
        app.route(re.sub(r"{(\w+)}", lambda match: f"<{to_snake(match[1])}{':path' * (match[1] == 'key')}>",
                         entry.path), entry.method,
                  partial(middleware, engine, entry))

    def refuse(_: Request, error: bottle.HTTPError) -> bottle.HTTPResponse:
        """Bottle's own refusals (no such path, wrong method, a path that is not UTF-8), in our shape."""
        method, path = bottle.request.method, bottle.request.path
        if error.status_code == 405:
            allowed = set(error.headers.get("Allow", "").split(","))
            allow = ", ".join(sorted(allowed | {"OPTIONS"} | ({"HEAD"} if "GET" in allowed else set())))
            if method == "OPTIONS":
                return bottle.HTTPResponse(b"", 204, Allow=allow)
            raise MethodNotAllowed(f"{method} is not allowed here, but {allow}", headers={"Allow": allow})
        if error.status_code == 404:
            if method == "OPTIONS" and path == "/*":
                allow = ", ".join(sorted({"HEAD", "OPTIONS", *(entry.method for entry in routes)}))
                return bottle.HTTPResponse(b"", 204, Allow=allow)
            raise NotFound(f"there is nothing at {path}{did_you_mean(path, {entry.path for entry in routes})}")
        if error.status_code < 500:
            raise BadRequest("the request is malformed")
        raise error.exception if isinstance(error.exception, Exception) else error

    def unrouted(error: bottle.HTTPError) -> bytes:
        response = middleware(engine, Route("*", UNROUTED, refuse, None, None, {}), error=error)
        response.apply(bottle.response)
        return cast(bytes, response.body)

    app.default_error_handler = unrouted
    return app


# ==== 10 Page: the pages for people, with no outside asset ====

_STYLE = r"""
:root {
  color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif;
  --bg: light-dark(#f5f6f8, #0f1317); --card: light-dark(#fff, #171c22); --ink: light-dark(#1a2029, #e3e8ee);
  --dim: light-dark(#586375, #96a2b2); --line: light-dark(#dde1e8, #2c343e); --soft: light-dark(#eceff4, #222a33);
  --accent: light-dark(#2453d4, #86a8ff); --on-accent: light-dark(#fff, #0c1425);
  --good: light-dark(#146c43, #56c592); --bad: light-dark(#b42318, #ff8d85); --busy: light-dark(#8a5a00, #e8b95a);
}
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; background: var(--bg); color: var(--ink); }
a { color: var(--accent); }
.skip { position: absolute; left: -99rem; z-index: 3; padding: .5rem 1rem; background: var(--card); }
.skip:focus { left: .5rem; }
main:focus { outline: none; }
code, pre, textarea, output { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; padding: .5rem; border-left: 3px solid var(--line); margin: .4rem 0; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0; padding: .3rem .7rem; }
summary { cursor: pointer; min-height: 24px; }
[data-method] { display: grid; grid-template-columns: max-content 1fr; gap: .3rem .6rem; align-items: center;
  margin: .6rem 0; }
[data-method] :is(button, textarea, output) { grid-column: 1 / -1; justify-self: start; }
[data-method] :is(textarea, output) { width: 100%; box-sizing: border-box; white-space: pre-wrap;
  overflow-wrap: anywhere; }
input, textarea, button { font: inherit; color: inherit; background: var(--card); padding: .2rem .5rem;
  border: 1px solid var(--dim); border-radius: .3rem; min-width: 0; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
"""


def _shown_type(schema: Mapping[str, Json]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_shown_type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_shown_type(schema.get('items', {}))}"
    limits = [f"{sign} {schema[key]}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in schema]
    return escape(" ".join([str(schema.get("type", "any")), *limits]))


def _field_table(schema: Mapping[str, Json]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' *' if name in schema.get('required', ()) else ''}</td>"
        f"<td>{_shown_type(field)}</td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items())
    return f"<table><tr><th>field</th><th>type</th><th>about</th></tr>{rows}</table>" if rows else ""


def _sample_body(shape: Mapping[str, Json]) -> dict[str, Json]:
    """A body to show: the schema's example, else what it requires."""
    plain = {"string": "text", "integer": 1, "number": 1.5, "boolean": True, "array": []}
    fields = {name: shape["properties"][name] for name in shape.get("required", ())}
    made = {name: field.get("enum", [plain.get(field.get("type", ""), {})])[0] for name, field in fields.items()}
    return cast("dict[str, Json]", next(iter(shape.get("examples", ())), made))


def _examples(base: str, method: str, path: str, media: str, body: Mapping[str, Json]) -> dict[str, str]:
    """One call, by the program or language that makes it."""
    url = base + re.sub(r"{(\w+)}", lambda match: to_snake(match[1]).upper(), path)
    how = "" if method == "get" else f"-X {method.upper()} " if not media else ""
    send, data, options = "", "", "" if method == "get" else f', {{method: "{method.upper()}"}}'
    if media == _JSON_TYPE:
        text = json.dumps(body, ensure_ascii=False)
        how, send = f"-H 'Content-Type: {media}' -d {shlex.quote(text)} ", f", json={dict(body)!r}"
        options = f', {{\n  method: "POST", headers: {{"Content-Type": "{media}"}},\n  body: JSON.stringify({text})}}'
    elif media:
        how, send = "-F file=@customers.csv -F recordType=customer ", (
            ', files={"file": open("customers.csv", "rb")}, data={"recordType": "customer"}')
        data = 'const body = new FormData();\nbody.append("file", file);  // from an <input type="file">\n'
        options = ', {method: "POST", body}'
    return {"curl": f"curl -s {how}{shlex.quote(url)}",
            "Python": f'import requests\n\nanswer = requests.{method}("{url}"{send})\n'
            "answer.raise_for_status()\nprint(answer.text)",
            "JavaScript": f'{data}const answer = await fetch("{url}"{options});\nconsole.log(await answer.text());'}


_TRY_SCRIPT = r"""
"use strict";
// Each form makes its call as it is filled in, and shows the answer.
for (const form of document.forms) form.onsubmit = async (event) => {
  event.preventDefault();
  const {method} = form.dataset, headers = {}, query = new URLSearchParams(), shown = form.querySelector("output");
  let path = form.dataset.path.slice(1), body;
  for (const field of form.querySelectorAll("[name]")) {
    const {name, value, dataset: {place}} = field;
    if (place === "path") path = path.replace(`{${name}}`, encodeURIComponent(value));
    else if (place === "body") [body, headers["Content-Type"]] = [value, "application/json"];
    else if (place === "file") (body = new FormData()).append(name, field.files[0]);
    else if (value && place === "header") headers[name] = value;
    else if (place === "conditions") new URLSearchParams(value).forEach((text, test) => query.append(test, text));
    else if (value) query.append(name, value);
  }
  shown.textContent = "...";
  try {
    const answer = await fetch(`${path}?${query}`, {method, headers, body}), text = await answer.text();
    shown.textContent = `${answer.status} ${answer.statusText}\n${text.slice(0, 20000)}${text[20000] ? "..." : ""}`;
  } catch (error) { shown.textContent = `No answer: ${error.message}`; }
};
"""


def _try_form(method: str, path: str, operation: Mapping[str, Json], media: str, body: str) -> str:
    """A form that makes this call."""
    name = operation["operationId"]
    fields = [(entry["name"], "conditions" if entry.get("explode") else entry["in"], "required" if entry.get(
        "required") else "") for entry in operation["parameters"]]
    if media and media != _JSON_TYPE:
        fields.append(("file", "file", "type=file required"))
    rows = "".join(f"<label for='{name}.{field}'>{field}</label>"
                   f"<input id='{name}.{field}' name='{field}' data-place={place} autocomplete=off {more}>"
                   for field, place, more in fields)
    if media == _JSON_TYPE:
        rows += (f"<textarea name=body data-place=body rows=4 aria-label='Body of {name}' spellcheck=false>"
                 f"{escape(body, quote=False)}</textarea>")
    return (f"<form data-method={method.upper()} data-path='{path}'>{rows}<button>Try it</button>"
            "<output></output></form>")


def _shown_operation(base: str, method: str, path: str, operation: Mapping[str, Json],
                     schemas: Mapping[str, Json]) -> str:
    parameters = {"properties": {entry["name"]: {**entry["schema"], "description": entry.get("description", "")}
                                 for entry in operation["parameters"]}}
    bodies = {media: schemas.get(content["schema"].get("$ref", "").rpartition("/")[2], {})
              for media, content in operation.get("requestBody", {}).get("content", {}).items()}
    text = "".join(f"<p>Body: <code>{media}</code></p>{_field_table(shape)}" for media, shape in bodies.items())
    media = next((media for media in ("multipart/form-data", _JSON_TYPE) if media in bodies), "")
    sample = _sample_body(bodies.get(media, {})) | ({"count": 10} if path == "/preview" else {})
    asked = "?age.gte=18&orderBy=-age" if any(entry.get("explode") for entry in operation["parameters"]) else ""
    examples = "".join(f"<p>{name}</p><pre>{escape(example, quote=False)}</pre>"
                       for name, example in _examples(base, method, path + asked, media, sample).items())
    answers = "".join(f"<tr><td>{status}</td><td>{escape(answer['description'])}</td><td>"
                      f"{' or '.join(_shown_type(c['schema']) for c in answer.get('content', {}).values())}</td></tr>"
                      for status, answer in operation["responses"].items())
    return (f"<details id='{operation['operationId']}'><summary><b>{method.upper()}</b> <code>{escape(path)}</code> "
            f"{escape(operation['summary'])}</summary>{_field_table(parameters)}{text}"
            f"<table><tr><th>status</th><th>when</th><th>body</th></tr>{answers}</table>{examples}"
            f"{_try_form(method, path, operation, media, json.dumps(sample, ensure_ascii=False))}</details>")


def docs_page(document: Mapping[str, Json], base: str) -> str:
    """An OpenAPI document as a page to read; its examples call the server at `base`."""
    schemas, info = document["components"]["schemas"], document["info"]
    operations = "".join(_shown_operation(base, method, path, operation, schemas)
                         for path, methods in document["paths"].items() for method, operation in methods.items())
    shapes = "".join(f"<h3 id='{name}'>{name}</h3><p>{escape(schema.get('description', ''))}</p>{_field_table(schema)}"
                     for name, schema in schemas.items())
    return (f"<main id=main tabindex=-1><h1>{info['title']} {info['version']}</h1><p>{escape(info['description'])} "
            f"For programs: <a href=openapi.json>openapi.json</a>.</p><h2>Calls</h2>{operations}"
            f"<h2>Shapes</h2>{shapes}</main>")


_ICON = "data:image/svg+xml," + quote(
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><rect width='16' height='16' rx='4' "
    "fill='#2453d4'/><path d='M3 5h10M3 8h7M3 11h4' stroke='#fff' stroke-width='1.6'/></svg>")


def _page_reply(title: str, style: str, body: str, script: str = "") -> Any:
    """A page that may run and fetch nothing but its own style and script, the calls of this server, and its icon."""
    def hashed(part: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"

    policy = (f"default-src 'none'; style-src {hashed(style)}; img-src data:; base-uri 'none'; form-action 'none'; "
              "frame-ancestors 'none'")
    if script:
        policy += (f"; script-src {hashed(script)}; connect-src 'self'; "
                   "require-trusted-types-for 'script'; trusted-types 'none'")
        body += f"<script>{script}</script>"
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="{_ICON}">'
            f'<style>{style}</style></head><body><a class="skip" href="#main">Skip to the content</a>{body}'
            "</body></html>")
    return reply(page, content_type="text/html; charset=utf-8", Content_Security_Policy=policy)


@route("GET", "/docs", {200: "text/html"})
def get_docs(call: Request) -> Any:
    """This description, for people."""
    base = f"{call.environ.get('wsgi.url_scheme', 'http')}://{call.header('Host') or 'localhost'}{MOUNT.get()}"
    document = described(call.engine.settings)
    return _page_reply(f"taskapi {__version__}", _STYLE, docs_page(document, base), _TRY_SCRIPT)


_UI_STYLE = r"""
body { max-width: 96rem; margin: 0 auto; font-size: .94rem; }
[hidden] { display: none !important; }
h1, h2, h3 { line-height: 1.2; margin: 0; }
h1 { font-size: 1.25rem; } h2 { font-size: 1.1rem; } h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem 1.2rem; padding: .8rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem; }
nav a { padding: .3rem .7rem; border-radius: .5rem; color: var(--dim); text-decoration: none; font-weight: 600; }
nav a:hover, .chips > :hover { background: var(--soft); }
nav a[aria-current] { background: var(--accent); color: var(--on-accent); }
#health { color: var(--dim); margin-left: auto; font-size: .85rem; }
#health::before { content: "●"; color: var(--good); margin-right: .4em; }
#health.down::before { color: var(--bad); }
#offline { position: sticky; top: 0; z-index: 2; margin: 0 0 .8rem; padding: .6rem 1rem; border-radius: .6rem;
  background: var(--bad); color: var(--card); font-weight: 600; }
html:has(#offline:not([hidden])) { scroll-padding-top: 6rem; }
main, #side { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; align-items: start; }
main { padding-bottom: 2rem; }
section { display: none; min-width: 0; padding: 1.1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .8rem; }
section.shown { display: block; }
@media (min-width: 64rem) {
  main { grid-template-columns: minmax(0, 1fr) 25rem; }
  main.generate { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
  main.jobs { grid-template-columns: minmax(0, 1fr); } .jobs > #views { display: none; }
  #view-jobs { display: block; }
  main:not(.jobs) > #side { position: sticky; top: .8rem; display: flex; flex-direction: column; align-items: stretch;
    max-height: calc(100vh - 5rem); }
  main:not(.jobs) > #side > section { flex: 0 1 auto; min-height: 8rem; overflow: auto; }
  main > #side > #view-jobs { flex-shrink: 1000; }
}
button, input, select, textarea { font: inherit; color: inherit; border: 1px solid var(--line); border-radius: .45rem;
  background: var(--card); padding: .3rem .55rem; min-width: 0; max-width: 100%; min-height: 24px;
  box-sizing: border-box; }
input, select, textarea { background: var(--bg); }
input[type=checkbox], input[type=radio] { accent-color: var(--accent); flex: none; vertical-align: middle; }
button { cursor: pointer; } button:hover { background: var(--soft); } button:disabled { opacity: .5; cursor: default; }
button.primary { background: var(--accent); color: var(--on-accent); border-color: transparent; font-weight: 600;
  padding: .45rem 1rem; }
button.primary:hover { filter: brightness(1.1); }
button.danger { color: var(--bad); } button[aria-pressed=true] { background: var(--soft); font-weight: 600; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
[aria-invalid=true] { border-color: var(--bad); }
textarea { width: 100%; white-space: pre; font: .85rem/1.5 ui-monospace, monospace; } #json { min-height: 22rem; }
fieldset { border: 0; padding: 0; margin: .8rem 0; min-width: 0; } legend { padding: 0; font-weight: 600; }
fieldset > label { display: flex; gap: .5rem; align-items: center; } .options p { margin: 0; }
label, b { overflow-wrap: anywhere; min-width: 0; }
label > span, .dim, small { color: var(--dim); font-size: .85rem; }
.row, .chips { display: flex; flex-wrap: wrap; gap: .5rem .7rem; align-items: end; margin: .7rem 0; }
section > .row:first-child { margin-top: 0; }
.row > label, .form > label { display: grid; min-width: 0; } .tick, .row > label.tick { display: flex; gap: .35rem;
  align-items: center; min-height: 24px; }
.form { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); gap: .7rem;
  align-items: start; margin: .7rem 0; } .form > .tick { display: block; padding-top: 1.5rem; }
.form small { display: block; }
.chips { gap: .35rem; } .chips > * { border: 1px solid var(--line); border-radius: 2rem; padding: .15rem .7rem;
  color: inherit; text-decoration: none; overflow-wrap: anywhere; }
.chips [aria-current], .chips [aria-pressed=true] { border-color: var(--accent); font-weight: 600; }
.problem { color: var(--bad); white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; }
.problem:empty, .said:empty { display: none; }
.said { padding: .5rem .8rem; border-radius: .5rem; background: var(--soft); overflow-wrap: anywhere; }
.field { display: flex; flex-wrap: wrap; gap: .15rem .3rem; margin: .15rem 0; }
.field > input, .field > button { padding-block: .15rem; min-width: 28px; }
.field > input, .field > [aria-expanded] { flex: 1 1 8rem; }
.field > .options, .field > .problem { flex-basis: 100%; margin: 0 0 .4rem; }
.field > .options { padding: .5rem .7rem; background: var(--soft); border-radius: .5rem; }
.field > [aria-expanded] { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: left;
  color: var(--dim); }
.options input:not([type=checkbox]) { width: 10rem; }
#palette { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: .25rem; max-height: 14rem;
  overflow: auto; margin-top: .4rem; }
#palette button { text-align: left; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; border: 0;
  padding: .15rem .4rem; }
.scroll { position: relative; overflow: auto; max-height: 26rem; border: 1px solid var(--line); border-radius: .5rem; }
.scroll th, .scroll td { padding: .25rem .6rem; white-space: nowrap; max-width: 18rem; overflow: hidden;
  text-overflow: ellipsis; font-size: .85rem; } .scroll th.now { box-shadow: inset 0 -3px var(--accent); }
.scroll thead > tr > * { position: sticky; top: 0; background: var(--soft); } #records tbody th { padding: 0 .2rem; }
#records th button { border: 0; padding: .15rem .35rem; background: none; font-weight: inherit; min-width: 1.6rem; }
#records thead input { display: block; width: 7rem; font-size: .8rem; margin-top: .2rem; }
[aria-sort=ascending] button::after { content: " ▲"; } [aria-sort=descending] button::after { content: " ▼"; }
dialog { width: min(40rem, 100% - 2rem); max-height: 90vh; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: .8rem; } dialog td { white-space: pre-wrap; }
.scroll .number { text-align: right;
  font-variant-numeric: tabular-nums; } td.dim { font-style: italic; }
#view-preview > details { padding: 0; border: 0; } #preview .scroll { margin: .2rem 0 .6rem; max-height: none; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .8rem; }
figure { margin: 0; padding: .7rem; border: 1px solid var(--line); border-radius: .5rem; min-width: 0; }
figcaption { overflow-wrap: anywhere; } figure svg { display: block; width: 100%; margin-top: .4rem; }
rect { fill: var(--accent); } rect:hover { opacity: .75; }
.bar { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 2fr) 3.4rem; gap: .5rem; align-items: center;
  font-size: .8rem; } .bar > :last-child { text-align: right; }
.example, .bar > :first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#drop { display: grid; place-items: center; gap: .5rem; padding: 2.5rem 1rem; border: 2px dashed var(--line);
  border-radius: .8rem; text-align: center; cursor: pointer; }
.dragging #drop, #drop:hover { border-color: var(--accent); background: var(--soft); }
::file-selector-button { font: inherit; } #count { width: 6.5rem; }
progress { display: block; width: 100%; height: .6rem; margin-top: .3rem; accent-color: var(--accent); }
.bar progress { margin: 0; }
ul { list-style: none; padding: 0; margin: 0; }
#jobs > li, #uploads > li { padding: .7rem 0; border-top: 1px solid var(--line); overflow-wrap: anywhere;
  content-visibility: auto; contain-intrinsic-size: auto 6rem; }
.head { display: flex; flex-wrap: wrap; gap: 0 .5rem; justify-content: space-between; align-items: baseline;
  overflow-wrap: anywhere; }
.status { font-size: .8rem; font-weight: 600; white-space: nowrap; color: var(--dim); }
.completed .status { color: var(--good); } .failed .status { color: var(--bad); }
.in-progress .status { color: var(--busy); }
#jobs .row { margin: .4rem 0 0; gap: .3rem .5rem; align-items: center; font-size: .85rem; }
#jobs button { padding: .05rem .5rem; } #jobs details { font-size: .85rem; padding: 0; border: 0; margin: .2rem 0 0; }
#jobs a { padding-block: .15rem; }
@media (max-width: 40rem) {
  section { padding: .8rem; } h1 { flex: 1; } .form > .tick { padding: 0; } .row > label { flex: 1 1 8rem; }
  .row label input, .row label select { width: 100%; } .row .tick input { width: auto; }
  #health { margin: 0; flex: 0 1 auto; }
  nav { width: 100%; order: 1; gap: 0; justify-content: space-between; } nav a { padding: .3rem .2rem;
    font-size: .78rem; } fieldset .row { align-items: start; } .row > select, .row > input { flex: 1 1 6rem; }
}
.away { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
"""

_UI_BODY = r"""
<header>
<h1>taskapi</h1>
<nav aria-label="Sections"><a href="#generate">Generate</a><a href="#upload">Upload</a><a href="#export">Export</a>
<a href="#records">Records</a><a id="nav-run" href="#run" hidden>Run</a><a href="#jobs">Jobs</a><a href="docs">API</a>
</nav>
<span id="health" role="status">connecting</span>
</header>
<p id="offline" role="alert" hidden>The server does not answer. This page goes on by itself when it is back.</p>
<p id="news" class="away" aria-live="polite"></p>
<noscript>This page needs JavaScript; the <a href="docs">description of the calls</a> does not.</noscript>
<main id="main" tabindex="-1">
<div id="views">
<section id="view-generate" aria-labelledby="generate-title">
<h2 id="generate-title">Generate records</h2>
<div id="presets" class="chips" role="group" aria-label="Start from a preset">
<span class="dim">Reading the field types…</span></div>
<form id="generate-form">
<div class="row">
<label><span>Record type</span><input id="recordType" required pattern="[a-z][a-z0-9_]{0,62}"
 title="small letters, digits and _" size="8" autocomplete="off"></label>
<label><span>How many</span><input id="count" type="number" min="1" step="1" required></label>
<label><span>Seed</span><input id="seed" inputmode="numeric" pattern="[0-9]*" size="9" autocomplete="off"
 title="The same seed makes the same records"></label>
<button id="reseed" type="button" title="Another seed">Shuffle</button>
<label><span>Locale</span><input id="locale" list="locales" size="5" placeholder="en_US" autocomplete="off"></label>
</div>
<div class="row" role="toolbar" aria-label="Edit the schema">
<button id="as-fields" type="button" aria-pressed="true">Fields</button>
<button id="as-json" type="button" aria-pressed="false">JSON</button>
<button id="undo" type="button" title="Ctrl+Z outside of a text">Undo</button>
<button id="redo" type="button" title="Ctrl+Shift+Z outside of a text">Redo</button></div>
<div id="fields"></div>
<details id="adding"><summary id="add-to">Add a field</summary>
<label><span>Search names and descriptions</span> <input id="search" type="search" autocomplete="off"></label>
<div id="palette" role="group" aria-label="Field types"></div></details>
<textarea id="json" aria-label="The request as JSON" spellcheck="false" hidden></textarea>
</form>
<details id="keeping"><summary>Keep, open or paste a schema</summary>
<form id="keep-form" class="row"><label><span>Keep in this browser as</span><input id="keep-name" required
 autocomplete="off"></label><button>Keep</button><button id="keep-file" type="button">Save as a file</button></form>
<div id="kept" class="row" role="group" aria-label="Kept schemas"></div>
<form id="paste-form"><label><span>A request, a schema, a JSON Schema, or the header of a CSV file (with some rows, the
types are learned from them)</span><textarea id="paste" rows="3" spellcheck="false" required></textarea></label>
<div class="row"><button>Use it</button><label><span>or open a file</span><input id="keep-open" type="file"></label>
</div></form>
<p id="keep-problem" class="problem" role="alert"></p></details>
<datalist id="types"></datalist>
<datalist id="locales"><option>de_DE<option>en_GB<option>es_ES<option>fr_FR<option>it_IT<option>ja_JP<option>pt_BR
<option>zh_CN</datalist>
</section>
<section id="view-upload" aria-labelledby="upload-title">
<h2 id="upload-title">Upload a file</h2>
<form id="upload-form">
<fieldset><legend>What is it for?</legend>
<label class="tick"><input type="radio" name="mode" value="ingest" checked>
Make records of it (CSV, TSV, JSON, NDJSON, also .gz)</label>
<label class="tick"><input type="radio" name="mode" value="infer">
Learn a schema from it, to generate more like it</label>
<label class="tick"><input type="radio" name="mode" value="keep">Only keep it</label></fieldset>
<div id="upload-more"><div class="row"><label><span>Record type (default: by the file's name)</span>
<input id="upload-type" pattern="[a-z][a-z0-9_]{0,62}" title="small letters, digits and _" autocomplete="off"></label>
</div><details id="upload-how"><summary>How to read it</summary><div id="upload-options" class="form"></div></details>
</div>
<label id="drop"><b>Drop files here</b><span>anywhere on this page, or choose some</span>
<input id="files" type="file" multiple></label>
<p id="upload-said" class="said" role="status"></p>
</form>
<ul id="uploads" aria-label="Uploads of this visit"></ul>
</section>
<section id="view-export" aria-labelledby="export-title">
<h2 id="export-title">Export records</h2>
<p id="export-hint" hidden>There are no records to export yet: <a href="#generate">generate some</a>, or
<a href="#upload">upload a file</a>.</p>
<form id="export-form">
<fieldset><legend>Record types <span class="dim">none ticked: all</span></legend>
<div id="export-types" class="row"></div></fieldset>
<div id="export-options" class="form"></div>
<div class="row"><label><span>From</span><input id="from" type="date"></label>
<label><span>To</span><input id="to" type="date"></label>
<label><span>by the date</span><select id="date-field"></select></label>
<label><span>Of one job</span><input id="of-job" placeholder="of any" autocomplete="off"></label></div>
<fieldset><legend>Conditions</legend><div id="where"></div><button id="add-where" type="button">Add a condition</button>
</fieldset>
<fieldset><legend>Fields <span class="dim">none ticked: all</span></legend><div id="export-fields" class="row"></div>
</fieldset>
<div class="row"><label><span>Order by</span><select id="order"></select></label>
<label class="tick"><input id="descending" type="checkbox">descending</label></div>
<p id="export-problem" class="problem" role="alert"></p>
<div class="row"><button class="primary">Export</button>
<button id="export-curl" type="button">Copy as curl</button></div>
<p id="export-said" class="said" role="status"></p>
</form>
</section>
<section id="view-records" aria-labelledby="records-title">
<h2 id="records-title">Records</h2>
<div id="record-types" class="chips" role="group" aria-label="Record types"></div>
<div id="records"></div>
</section>
<section id="view-run" aria-labelledby="run-title">
<h2 id="run-title">Run a job</h2>
<div id="run-types" class="chips" role="group" aria-label="Job types"></div>
<form id="run-form">
<div id="run-options" class="form"></div>
<p id="run-problem" class="problem" role="alert"></p>
<div class="row"><button class="primary">Run</button><button id="run-curl" type="button">Copy as curl</button></div>
<p id="run-said" class="said" role="status"></p>
</form>
</section>
</div>
<div id="side">
<section id="view-preview" aria-label="Preview and start">
<div class="row"><button id="go" class="primary" form="generate-form">Generate</button>
<button id="generate-curl" type="button">Copy as curl</button></div>
<p id="generate-problem" class="problem" role="alert"></p>
<p id="generate-said" class="said" role="status"></p>
<details open><summary>Preview</summary><div id="preview" role="group" aria-label="Preview"></div></details>
</section>
<section id="view-jobs" aria-labelledby="jobs-title">
<div class="head"><h2 id="jobs-title">Jobs</h2><span id="jobs-count" class="dim"></span></div>
<div class="row"><label><span>Type</span><select id="by-type"></select></label>
<label><span>Status</span><select id="by-status"></select></label></div>
<ul id="jobs"></ul>
<p id="no-jobs" class="dim"></p>
<button id="more" type="button" hidden>Show more</button>
</section>
</div>
</main>
"""

_UI_SCRIPT = r"""
"use strict";

// ---- Elements: made of properties and texts; no string ever becomes markup, so that data stays data ----

const $ = id => document.getElementById(id);
const DRAWN = new Set(["svg", "rect", "title"]);

function el(tag, properties = {}, ...children) {
  const drawn = DRAWN.has(tag) && "http://www.w3.org/2000/svg";
  const node = document.createElementNS(drawn || "http://www.w3.org/1999/xhtml", tag);
  for (const [name, value] of Object.entries(properties))
    if (drawn || /-|^(role|list)$/.test(name)) node.setAttribute(name, value); else node[name] = value;
  node.append(...children.flat().filter(child => child ?? false));
  return node;
}
const button = (text, onclick, more) => el("button", {type: "button", onclick, ...more}, text);
const labelled = (text, control) => el("label", {}, el("span", {}, text), control);
const tick = (text, more) => el("label", {className: "tick"}, el("input", {type: "checkbox", ...more}), text);
const ticked = id => [...$(id).querySelectorAll(":checked")].map(box => box.value);
const amount = (number, thing = "") => number.toLocaleString("en") + (thing && ` ${thing}${number === 1 ? "" : "s"}`);
const size = bytes => bytes < 1e3 ? amount(bytes, "byte") : `${(bytes / (bytes < 1e6 ? 1e3 : 1e6)).toFixed(1)} ${
  bytes < 1e6 ? "kB" : "MB"}`;
const lasting = seconds => seconds < 1 ? "under 1 s" : seconds < 100 ? `${Math.round(seconds)} s`
  : seconds < 6e3 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
const joined = (parts, between = ", ") => parts.filter(Boolean).join(between);
const asleep = milliseconds => new Promise(resolve => setTimeout(resolve, milliseconds));
const shown = value => typeof value === "string" ? value : (value ?? null) === null ? "" : JSON.stringify(value);

// A number that JavaScript would write otherwise (1.50, 2 ** 60 + 1) stays the text that was sent.
const exact = (_, value, context) => typeof value === "number" && JSON.rawJSON && context?.source &&
  ![value, `${value}.0`].includes(context.source) && String(value) !== context.source
  ? JSON.rawJSON(context.source) : value;
const clone = value => JSON.parse(JSON.stringify(value), exact);
const sort = value => JSON.isRawJSON?.(value) ? "number" : typeof value;

function choices(select, values, first) {  // keeps what was chosen, where it is still there
  const kept = select.value;
  select.replaceChildren(...[...first ? [""] : [], ...values].map(value => el("option", {value}, value || first)));
  select.value = values.includes(kept) || first && !kept ? kept : first ? "" : values[0] ?? "";
}
function pretty(value, indent = "") {  // JSON on as many lines as it needs
  const line = JSON.stringify(value, null, 1).replace(/\n */g, " "), inner = `${indent}  `, list = Array.isArray(value);
  if (value === null || sort(value) !== "object" || line.length + indent.length < 90 && indent) return line;
  const parts = Object.entries(value).filter(([, item]) => item !== undefined)
    .map(([key, item]) => (list ? "" : `${JSON.stringify(key)}: `) + pretty(item, inner));
  return `${list ? "[" : "{"}\n${inner}${parts.join(`,\n${inner}`)}\n${indent}${list ? "]" : "}"}`;
}
function parsed(text, keep) {  // what a person types as JSON, where it is that; `keep` keeps numbers and such as text
  if (text === "") return undefined;
  try { if (!keep || /^[[{]/.test(text)) return JSON.parse(text, exact); } catch { /* then it is a text */ }
  return text;
}

// ---- Forms made from the JSON Schemas of what may be posted, which stand in the page ----

const SHAPES = JSON.parse($("shapes").textContent);
const OWN = Object.keys(SHAPES.jobs).filter(name => name !== "export");

function plainly(schema, root) {  // references followed, and null left out of what it may be
  const {$ref, anyOf, allOf, ...own} = schema;
  const options = $ref ? [root.$defs[$ref.split("/").at(-1)]]
    : (anyOf ?? allOf ?? []).filter(({type}) => type !== "null");
  return options.length === 1 ? plainly({...options[0], ...own}, root) : schema;
}
function control(schema, required) {  // of one property: the element, and what reads and writes it
  const {type, minimum, maximum, minLength, maxLength, pattern, description: about, default: usual} = schema;
  const values = schema.enum ?? ("const" in schema ? [schema.const] : undefined), whole = type === "integer";
  if (type === "boolean") {
    const node = el("input", {type: "checkbox", checked: usual ?? false});
    return {node, about, get: () => required || node.checked !== (usual ?? false) ? node.checked : undefined,
      set: value => { node.checked = value ?? usual ?? false; }};
  }
  const node = values ? el("select", {required}) : el("input", {required, placeholder: shown(usual),
    autocomplete: "off", ...whole || type === "number" ? {type: "number", step: whole ? 1 : "any",
      min: minimum ?? "", max: maximum ?? ""} : {}, ...pattern && {pattern}, ...minLength && {minLength},
    ...maxLength && {maxLength}});
  if (values) choices(node, values.map(shown), required ? undefined : shown(usual) || "as it is");
  if (type === "array" || type === "object") node.oninput = () => node.setCustomValidity(
    ["", "object"].includes(node.value && typeof parsed(node.value)) ? "" : `Has to be JSON: an ${type}.`);
  return {node, about, get: () => values?.find(value => shown(value) === node.value) ??
    parsed(node.value, type === "string"), set: value => { node.value = shown(value); }};
}
function form(schema, place, skip = []) {
  const controls = Object.entries(schema.properties).filter(([name]) => !["after", ...skip].includes(name))
    .map(([name, shape]) => ({name, ...control(plainly(shape, schema), schema.required?.includes(name))}));
  place.replaceChildren(...controls.map(({name, node, about}) => {
    const words = name.replace(/[A-Z]/g, " $&").toLowerCase(), text = words[0].toUpperCase() + words.slice(1);
    const told = about && el("small", {}, about);
    return node.type === "checkbox" ? el("label", {className: "tick"}, node, ` ${text}`, told)
      : el("label", {}, el("span", {}, text), node, told);
  }));
  return {read: () => Object.fromEntries(controls.map(({name, get}) => [name, get()])
    .filter(([, value]) => value !== undefined)),
  write: request => { for (const {name, set} of controls) set(request[name]); }};
}

// ---- The server: one way to ask it, and what is known of its health ----

let down = false;

function reached(answers) {
  if (answers === !down) return;
  down = $("health").className = answers ? "" : "down";
  $("offline").hidden = answers;
  $("health").textContent = answers ? "back" : "stopped";
  if (answers) for (const renew of [presets ? previewSoon : loadFields, loadTypes, refresh]) renew();
}
async function api(method, path, body, signal) {
  let response, text;
  try {
    response = await fetch(path, {method, signal, body: body && JSON.stringify(body),
      headers: {"Accept": "application/json", ...body && {"Content-Type": "application/json"}}});
    text = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    reached(false);
    throw new Error("The server does not answer.");
  }
  reached(true);
  const data = text ? JSON.parse(text, exact) : null;
  if (response.ok) return data;
  throw Object.assign(new Error(data.error ?? data.errors.join("; ")), {fields: data.fields ?? [], gone:
    response.status === 404});
}
function showHealth(said, busy) {  // the list may have seen a job that began after the server counted
  if (down) return;
  $("health").className = said.message ? "down" : "";
  $("health").textContent = said.message ?? joined([`v${said.version}`, amount(said.workers, "worker"),
    `${amount(Math.max(said.inProgress, busy))} running`, `${amount(said.pending)} waiting`], " · ");
}
async function copyCurl(path, request, said) {
  const body = JSON.stringify(request).replaceAll("'", "'\\''");
  const command = `curl -s ${new URL(path, location.href)} -H 'Content-Type: application/json' -d '${body}'`;
  said.textContent = await navigator.clipboard?.writeText(command).then(() => "Copied.", () => "") || command;
}

// ---- Jobs: a list that renews itself, as gently as the server needs it; forms tell of theirs from it ----

const cards = new Map(), told = new Map(), stopped = new Set();  // by job: its card, the form's line; canceled here
const ended = job => !["pending", "in-progress"].includes(job.status);
let listed = 50, turn = 0, busy = false;

function title({type, request}) {
  const {filters, format, filename, count} = request, all = joined([filters?.recordType ?? "all records"].flat());
  const made = joined([request.recordType ?? Object.keys(request.records ?? {})].flat());
  if (type === "export") return `${all} as ${format}`;
  return joined([filename, count ? `${amount(count)} ${made}` : made], " → ");
}
function standing(job) {
  const {done, total} = job.progress, {records, bytes} = job.result ?? {};
  if (job.status === "pending") return job.after ? `waits for job ${job.after}` : "waits for a worker";
  if (!ended(job)) return joined([total ? `${amount(done)} of ${amount(total)}` : amount(done),
    total && `${Math.floor(100 * done / total)} %`, job.eta !== null && `${job.eta < 1 ? "" : "about "}${
      lasting(job.eta)} left`]);
  return joined([Number.isFinite(records) && amount(records, "record"), Number.isFinite(bytes) && size(bytes),
    job.startedAt && `in ${lasting((new Date(job.finishedAt) - new Date(job.startedAt)) / 1000)}`]);
}
const failing = job => stopped.has(job.jobId) && job.status === "canceled" ? "" : job.error ?? "";
function jobLinks(job) {
  const made = /records\/(\w+)/.exec(job.links.records)?.[1], id = job.jobId, file = job.result?.filename ?? "the file";
  return job.status !== "completed" ? [] : [
    job.links.download && el("a", {href: `download/${id}`, download: ""}, `Download ${file}`),
    made && el("a", {href: `#records/${made}/${id}`}, "Look at the records")].filter(Boolean);
}
function useAgain({type, request}) {  // fills the form that makes such jobs
  const [hash, fill] = {generate: ["generate", edit], export: ["export", editExport], upload: ["upload", editUpload],
    ingest: ["upload", editUpload]}[type] ?? [`run/${type}`, drawRun];
  fill(request, type);
  location.hash = hash;
}
function jobActions(job, problem) {
  const act = (method, path) => async () => {
    if (path.endsWith("cancel")) stopped.add(job.jobId);
    await api(method, path).catch(error => { problem.textContent = error.message; });
    refresh();
    loadTypes();
  };
  const remove = button("Delete", () => {  // twice, as the job's records and file go with it
    if (remove.textContent !== "Delete") act("DELETE", `jobs/${job.jobId}`)();
    remove.textContent = "Delete for good?";
  }, {className: "danger", onblur: () => { remove.textContent = "Delete"; }});
  return [!ended(job) && button("Cancel", act("POST", `jobs/${job.jobId}/cancel`)),
    ["failed", "canceled"].includes(job.status) && button("Retry", act("POST", `jobs/${job.jobId}/retry`)),
    [...Object.keys(SHAPES.jobs), "generate", "upload", "ingest"].includes(job.type) &&
      button("Use again", () => useAgain(job)),
    ended(job) && remove].filter(Boolean);
}
function newCard() {
  const name = el("b"), status = el("span", {className: "status"}), said = el("div", {className: "dim"});
  const row = el("div", {className: "row"}), problem = el("p", {className: "problem"}), bar = el("progress");
  const raw = el("pre");
  const details = el("details", {ontoggle: () => { raw.textContent = details.open ? pretty(card.job) : ""; }},
    el("summary", {}, "Details"), raw);
  const node = el("li", {}, el("div", {className: "head"}, name, status), said, bar, problem, row, details);
  const card = {node, name, status, said, bar, problem, row, details, raw};
  return card;
}
function fillCard(card, job, text) {  // true if the job has ended since the card was filled last
  const {job: was, problem, row, bar} = card, at = new Date(job.createdAt), {done, total} = job.progress;
  const time = Date.now() - at < 72e6 ? at.toLocaleTimeString() : at.toLocaleString();
  Object.assign(card, {job, text});
  card.node.className = job.status;
  card.name.textContent = `${job.type} ${title(job)}`;
  card.status.textContent = job.status;
  const before = job.interruptions.map(({attempt, reason}) => `attempt ${attempt}: ${reason}`);
  card.said.textContent = joined([time, standing(job), ...before], " · ");
  bar.hidden = job.status !== "in-progress";
  bar.setAttribute("aria-label", `Progress of ${title(job)}`);
  if (total) Object.assign(bar, {max: total, value: Math.min(done, total)}); else bar.removeAttribute("value");
  problem.textContent = failing(job);
  if (card.details.open) card.raw.textContent = pretty(job);
  if (was?.status !== job.status) {
    const focused = row.contains(document.activeElement);
    row.replaceChildren(...jobLinks(job), ...jobActions(job, problem));
    if (focused) card.node.querySelector("button, a, summary").focus();
  }
  if (was && ended(job)) $("news").textContent = `${job.type} ${title(job)}: ${job.status}`;
  return ended(job) && !(was && ended(was));
}
function showJobs({items, next}) {
  const found = new Set(items.map(job => job.jobId));
  for (const [id, card] of cards) if (!found.has(id) && cards.delete(id)) card.node.remove();
  let place = $("jobs").firstElementChild, fresh = false;
  for (const job of items) {
    const text = JSON.stringify(job), card = cards.get(job.jobId) ?? newCard();
    cards.set(job.jobId, card);
    if (card.text !== text) fresh = fillCard(card, job, text) || fresh;
    if (card.node === place) place = place.nextElementSibling; else $("jobs").insertBefore(card.node, place);
    tell(job);
  }
  $("jobs-count").textContent = items.length ? `${amount(items.length)}${next ? " newest" : ""}` : "";
  $("no-jobs").textContent = items.length ? "" : $("by-type").value || $("by-status").value ? "No job is like that."
    : "No jobs yet. Choose a preset, and press Generate.";
  $("more").hidden = !next || listed >= 1000;
  if (fresh) loadTypes();
}
function tell(job) {  // what the list says of a job, where the form that made it is
  const said = told.get(job.jobId);
  if (!said) return;
  said.replaceChildren(`${title(job) || job.type}: ${ended(job) ? joined([`${job.status}.`, failing(job) ||
    standing(job)], " ") : standing(job)} `, ...jobLinks(job).flatMap(link => [link, " "]));
  if (ended(job)) told.delete(job.jobId);
}
async function refresh() {
  const mine = ++turn, query = new URLSearchParams({limit: listed});
  for (const name of ["type", "status"]) if ($(`by-${name}`).value) query.set(name, $(`by-${name}`).value);
  const [page, said] = await Promise.all([api("GET", `jobs?${query}`).catch(() => null),
    api("GET", "health").catch(error => error)]);
  if (mine !== turn) return;
  if (page) showJobs(page);
  const running = [...cards.values()].filter(({job}) => job.status === "in-progress").length;
  showHealth(said, running);
  busy = said.inProgress + said.pending > 0 || running > 0;
  for (const [id, said] of told) if (mine === turn && !cards.has(id)) await api("GET", `status/${id}`).then(tell,
    error => { if (error.gone && told.delete(id)) said.textContent = error.message; });
}
async function watch() {
  for (;;) {
    if (document.hidden) await new Promise(seen => document.addEventListener("visibilitychange", seen, {once: true}));
    const began = performance.now();
    await refresh();
    await asleep(Math.max(busy ? 700 : 3000, 10 * (performance.now() - began)));
  }
}
function follow(said, job) {
  for (const [id, other] of told) if (other === said) told.delete(id);
  told.set(job.jobId, said);
  tell(job);
  refresh();
}
function jobForm(name, path, read) {  // a form that makes a job: its button, its curl, what is wrong, how it goes
  const problem = $(`${name}-problem`), said = $(`${name}-said`);
  $(`${name}-form`).onsubmit = async event => {
    event.preventDefault();
    const pressed = event.submitter ?? {};
    problem.textContent = said.textContent = "";
    pressed.disabled = true;
    await api("POST", path(), read()).then(job => follow(said, job), error => { problem.textContent = error.message; });
    pressed.disabled = false;
  };
  $(`${name}-curl`).onclick = () => copyCurl(path(), read(), said);
}

// ---- Generate: one request, edited as fields or as JSON, with a preview beside it ----

let request = {recordType: "person", count: 1000}, catalogue = new Map(), rows = new Map();
let presets, target, asked, timer, now = [];  // `now`: record type and field that are worked on
let steps = [], step = -1, lastEdit;  // texts of the request, for undo; all the keys typed into one control are a step
const shuffled = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
const isJsonSchema = schema => "$schema" in (schema ?? {}) || schema?.type === "object" && "properties" in schema;

async function loadFields() {
  const locale = [request.locale ?? "en_US"].flat()[0];
  const answer = await api("GET", `fields?locale=${encodeURIComponent(locale)}`).catch(showProblem);
  if (!answer) return;
  catalogue = new Map(answer.items.map(item => [item.type, item]));
  $("types").replaceChildren(...answer.items.map(({type, sample}) => el("option", {value: type}, shown(sample))));
  search();
  if (presets) return draw();
  presets = answer.presets;
  $("presets").replaceChildren(...Object.keys(presets).map(name => button(name, () =>
    edit({recordType: name, count: request.count ?? 1000, seed: shuffled(), locale: request.locale}))));
  edit({...request, seed: shuffled()});
}
function edit(fresh) {  // a preset becomes the schema that it stands for
  const preset = !fresh.schema && !fresh.records && presets?.[fresh.recordType];
  request = {...clone(fresh), ...clone(preset || {})};
  if (preset?.records) {
    for (const spec of Object.values(request.records)) if (!spec.per) spec.count = request.count;
    delete request.recordType;
    delete request.count;
  }
  now = [];
  for (const choice of $("presets").children)
    choice.setAttribute("aria-pressed", Boolean(preset) && choice.textContent === fresh.recordType);
  if (isJsonSchema(request.schema)) editAs(true); else draw();
  changed();
}
function changed(control) {  // after every edit: it can be undone, and is seen in the preview
  const text = JSON.stringify(request);
  if (text !== steps[step]) {
    if (!control || control !== lastEdit) step++;
    steps.splice(step, Infinity, text);
    lastEdit = control;
  }
  $("undo").disabled = step < 1;
  $("redo").disabled = step > steps.length - 2;
  previewSoon();
}
function travel(by) {
  if (!(step + by in steps)) return;
  request = JSON.parse(steps[step += by], exact);
  lastEdit = undefined;
  draw();
  changed();
}
function draw() {
  for (const name of ["recordType", "count", "seed", "locale"])
    if (document.activeElement !== $(name)) $(name).value = [request[name] ?? ""].flat().map(shown).join(",");
  for (const name of ["recordType", "count"]) $(name).parentNode.hidden = $(name).disabled = Boolean(request.records);
  if ($("json").hidden) drawFields(); else if (document.activeElement !== $("json")) $("json").value = pretty(request);
  previewSoon();
}
function drawFields(name, control = 0) {  // then that field's control has the focus
  const groups = request.records ? Object.entries(request.records).filter(([, holder]) => holder) : [["", request]];
  const open = new Set([...rows].filter(([, {panel}]) => !panel.hidden).map(([path]) => path)), within = target?.name;
  rows = new Map();
  target = null;
  $("fields").replaceChildren(...groups.map(([type, holder]) => {
    const group = {name: type, holder, path: type ? `records.${type}.schema` : "schema"};
    const list = Object.keys(holder.schema ?? {}).map(field => fieldRow(group, field, open));
    if (!target || type === within) target = group;
    const count = labelled(holder.per ? `for each ${holder.per}: a number, or [from, to]` : "how many", el("input", {
      value: shown(holder.count), oninput: ({target: input}) => {
        holder.count = parsed(input.value);
        changed(input);
      }}));
    const fieldset = el("fieldset", {}, type && [el("legend", {}, type), count], el("div", {}, list));
    fieldset.addEventListener("focusin", () => aim(group));
    return fieldset;
  }));
  if (target) aim(target);
  const row = name !== undefined && rows.get(`${target.path}.${name}`)?.row;
  if (!row) return;
  row.children[control].focus();
  if (control === 0) row.firstChild.select();
}
function aim(group) {  // where the next field goes
  target = group;
  $("add-to").textContent = joined(["Add a field", group.name], " to ");
}
function reshape(group, change, name, control) {  // fields are added, moved, copied, removed: [name, spec] pairs
  const entries = Object.entries(group.holder.schema ?? {});
  target = group;
  change(entries);
  group.holder.schema = Object.fromEntries(entries);
  drawFields(name, control);
  if (name === undefined) $("add-to").focus();
  changed();
}
function another(schema, name) {  // a name that is free
  for (let number = 1; ; number++) {
    const fresh = number > 1 ? `${name}_${number}` : name;
    if (!Object.hasOwn(schema ?? {}, fresh)) return fresh;
  }
}
function fieldRow(group, name, open) {
  const {holder, path} = group, at = entries => entries.findIndex(([key]) => key === name);
  const read = () => typeof holder.schema[name] === "string" ? {type: holder.schema[name]} : holder.schema[name] ?? {};
  const write = (control, spec, fresh = name) => {
    const entries = Object.entries(holder.schema), value = Object.keys(spec).length === 1 ? spec.type ?? spec : spec;
    entries[at(entries)] = [fresh, value];
    holder.schema = Object.fromEntries(entries);
    rows.delete(`${path}.${name}`);
    rows.set(`${path}.${name = fresh}`, parts);
    now = [group.name, name];
    tell();
    changed(control);
  };
  const tell = () => {
    const {type, args, ...rest} = read();
    const told = Object.entries({...rest, ...args}).map(([key, value]) => `${key} ${shown(value)}`);
    more.textContent = joined(told) || "options";
  };
  const problem = el("p", {className: "problem", id: `problem-${rows.size}`});
  const naming = el("input", {value: name, "aria-label": "Name of the field", "aria-describedby": problem.id,
    oninput: () => {
      const fresh = naming.value, taken = fresh !== name && Object.hasOwn(holder.schema, fresh);
      naming.setCustomValidity(taken ? `There is a field ${fresh} already.` : fresh ? "" : "A field needs a name.");
      naming.setAttribute("aria-invalid", taken || !fresh);
      problem.textContent = naming.validationMessage;
      if (!taken && fresh) write(naming, read(), fresh);
    }});
  const typing = el("input", {value: read().type ?? "", list: "types", "aria-label": "Type of the field",
    "aria-describedby": problem.id, oninput: () => {
      write(typing, {type: typing.value, ...catalogue.get(typing.value)?.example});
      arrange();
    }});
  const panel = el("div", {className: "options", hidden: !open.has(`${path}.${name}`)});
  const more = button("", () => more.setAttribute("aria-expanded", !(panel.hidden = !panel.hidden)),
    {"aria-expanded": String(!panel.hidden), title: "Options of the field"});
  const move = by => reshape(group, entries => {
    const from = at(entries);
    entries.splice(Math.max(0, from + by), 0, ...entries.splice(from, 1));
  }, name, [...row.children].indexOf(document.activeElement));
  const tool = (sign, text, act) => button(sign, act, {"aria-label": `${text} the field`, title: text});
  const row = el("div", {className: "field", role: "group", "aria-label": `Field ${name}`, onkeydown: event => {
    const by = event.altKey && {ArrowUp: -1, ArrowDown: 1}[event.key];
    if (!by) return;
    event.preventDefault();
    move(by);
  }}, naming, typing, more, tool("↑", "Move up", () => move(-1)),
  tool("↓", "Move down", () => move(1)), tool("+", "Copy", () => {
    const copy = another(holder.schema, name);
    reshape(group, entries => entries.splice(at(entries) + 1, 0, [copy, clone(holder.schema[name])]), copy);
  }), tool("✕", "Remove", () => {
    const names = Object.keys(holder.schema), next = names[names.indexOf(name) + 1] ?? names[names.indexOf(name) - 1];
    reshape(group, entries => entries.splice(at(entries), 1), next, 6);
  }), panel, problem);
  row.addEventListener("focusin", () => { now = [group.name, name]; reveal(); });
  const parts = {row, panel, problem, naming};
  rows.set(`${path}.${name}`, parts);
  function arrange() {  // what the type may be told; the arguments of Faker's methods stand under args
    const spec = read(), item = catalogue.get(spec.type);
    const option = ({name: key, default: usual, about = key}, inArgs) => {
      const value = (inArgs ? spec.args ?? {} : spec)[key];
      const keep = typeof (value ?? item?.example?.[key] ?? usual) === "string";
      return labelled(about, el("input", {value: shown(value), placeholder: shown(usual),
        oninput: ({target: input}) => set(input, key, parsed(input.value, keep), inArgs)}));
    };
    const set = (control, key, value, inArgs) => {
      const {args, ...own} = clone(read()), fresh = inArgs ? {...args, [key]: value} : {...own, [key]: value};
      if (value === undefined) delete fresh[key];
      const told = inArgs ? fresh : args ?? {};
      write(control, {...inArgs ? own : fresh, ...Object.keys(told).length && {args: told}});
    };
    const unique = tick("unique", {checked: spec.unique === true,
      onchange: ({target: box}) => set(box, "unique", box.checked || undefined)});
    const nulls = option({name: "null", default: 0, about: "null: how likely, 0 to 1"});
    panel.replaceChildren(el("p", {className: "dim"}, item?.doc.split("\n")[0] ?? ""), el("div", {className: "row"},
      (item?.args ?? []).map(arg => option(arg, !item.example)), nulls, unique));
  }
  arrange();
  tell();
  return row;
}
function search() {
  const words = $("search").value.toLowerCase().split(/\s+/);
  const fits = ({type, doc}) => words.every(word => `${type} ${doc}`.toLowerCase().includes(word));
  $("palette").replaceChildren(...[...catalogue.values()].filter(fits).map(({type, doc, sample, example}) => button(
    [type, " ", el("span", {className: "dim"}, shown(sample))], () => {
      const name = another(target.holder.schema, type);
      reshape(target, entries => entries.push([name, example ?? type]), name);
    }, {title: doc})));
}
function showProblem(error) {
  for (const {problem, naming} of rows.values()) problem.textContent = naming.validationMessage;
  const others = (error?.fields ?? []).filter(({field, message}) => {
    const path = [...rows.keys()].filter(path => `${field}.`.startsWith(`${path}.`)).sort().at(-1);
    if (path) rows.get(path).problem.textContent ||= joined([field.slice(path.length + 1), message], ": ");
    return !path;
  });
  $("generate-problem").textContent = error?.fields?.length
    ? others.map(({field, message}) => `${field}: ${message}`).join("\n") : error?.message ?? "";
}
function previewSoon() {
  $("go").textContent = request.count ? `Generate ${amount(request.count, "record")}` : "Generate";
  clearTimeout(timer);
  timer = setTimeout(preview, 250);
}
async function preview() {
  asked?.abort();
  const {signal} = asked = new AbortController(), few = spec => ({...spec, count: Math.min(spec.count || 8, 8)});
  try {
    const small = !request.records ? few(request) : {...request, records: Object.fromEntries(
      Object.entries(request.records).map(([name, spec]) => [name, spec?.per ? spec : few(spec ?? {})]))};
    const {records} = await api("POST", "preview", small, signal);
    $("preview").replaceChildren(...Object.entries(Array.isArray(records) ? {"": records} : records).map(
      ([name, items]) => el("div", {}, name && el("b", {}, name), table(items.slice(0, 8), `Preview ${name}`))));
    showProblem();
    reveal();
  } catch (error) { if (error.name !== "AbortError") showProblem(error); }
}
function reveal() {  // the column of the field that is worked on; the page itself stays where it is
  const [type, field] = now, heads = [...$("preview").querySelectorAll("th")];
  for (const head of heads) head.classList.remove("now");
  const head = heads.find(head => [head.textContent, head.closest(".scroll").ariaLabel].join() ===
    [field, `Preview ${type}`].join());
  if (!head) return;
  head.classList.add("now");
  for (const box of [head.closest(".scroll"), $("view-preview")]) {
    const inner = head.getBoundingClientRect(), outer = box.getBoundingClientRect();
    if (inner.left < outer.left || inner.right > outer.right)
      box.scrollLeft += inner.left - outer.left - (outer.width - inner.width) / 2;
    if (inner.top < outer.top || inner.bottom > outer.bottom) box.scrollTop += inner.top - outer.top - 30;
  }
}
const heading = ({name, className}) => el("th", {scope: "col", className}, name);
// The numbers of a column have as many digits behind the point as one of them; `lead` makes what a row begins with.
function table(items, label, names = [...new Set(items.flatMap(Object.keys))], head = heading, lead = () => "") {
  const columns = names.map(name => {
    const values = items.map(item => item[name] ?? null), given = values.filter(value => value !== null).map(shown);
    const number = given.length > 0 && values.every(value => value === null || sort(value) === "number");
    const digits = text => text.split(".")[1]?.length ?? 0, most = number ? Math.max(...given.map(digits)) : 0;
    const even = most > 0 && given.every(text => /^-?\d+(\.\d{1,6})?$/.test(text));
    const told = text => even ? (digits(text) ? text : `${text}.`) + "0".repeat(most - digits(text)) : text;
    return {name, className: number ? "number" : "", told};
  });
  const cell = (value, {className, told}) => value === null ? el("td", {className: "dim"}, "null")
    : el("td", {className, title: shown(value)}, told(shown(value)));
  return el("div", {className: "scroll", tabIndex: 0, role: "region", "aria-label": label}, el("table", {},
    el("thead", {}, el("tr", {}, lead(), columns.map(head))), el("tbody", {}, items.map((item, at) =>
      el("tr", {}, lead(item, at), columns.map(column => cell(item[column.name] ?? null, column)))))));
}
function editAs(json) {
  $("json").hidden = !json;
  $("fields").hidden = $("adding").hidden = json;
  for (const [id, pressed] of [["as-json", json], ["as-fields", !json]]) $(id).setAttribute("aria-pressed", pressed);
  $("fields").replaceChildren();
  rows = new Map();
  $("json").setCustomValidity("");
  draw();
}

// ---- Schemas that are kept, opened and pasted ----

const KEPT = "taskapi.schemas";
const recordTypeOf = text => text.split(".")[0].toLowerCase().replace(/[^a-z0-9]+/g, "_").replace(/^[^a-z]+|_$/g, "")
  .slice(0, 63) || "record";

function kept(change) {  // the browser's store may be closed to this page
  try {
    const all = JSON.parse(localStorage.getItem(KEPT) ?? "{}", exact);
    if (change) localStorage.setItem(KEPT, JSON.stringify(change(all) ?? all));
    if (change) drawKept();
    return all;
  } catch (error) { $("keep-problem").textContent = `This browser keeps nothing here: ${error.message}`; }
  return {};
}
function drawKept() {
  $("kept").replaceChildren(...Object.entries(kept()).map(([name, value]) => el("span", {}, button(name, () =>
    edit(value), {title: "Open"}), button("✕", () => kept(all => { delete all[name]; }),
    {"aria-label": `Forget ${name}`, title: "Forget"}))));
}
function typeNamed(name) {  // of a column of which only the name is known: the Faker method or type called like it
  const words = name.replace(/([a-z\d])([A-Z])/g, "$1_$2").toLowerCase().split(/\W+|_/).filter(Boolean);
  for (let from = 0; from < words.length; from++) {
    const type = words.slice(from).join("_");
    if (catalogue.has(type)) return catalogue.get(type).example ?? type;
  }
  return words.at(-1) === "id" ? "sequence" : "word";
}
function fromHeader(line) {
  const [sign] = [...",;\t|"].sort((a, b) => line.split(b).length - line.split(a).length), schema = {};
  for (const [, part] of line.matchAll(new RegExp(`("(?:[^"]|"")*"|[^${sign}]*)(?:[${sign}]|$)`, "g"))) {
    const name = part.trim().replace(/^"|"$/g, "").replaceAll('""', '"');
    if (name) schema[another(schema, name)] = typeNamed(name);
  }
  return schema;
}
async function take(text, filename = "record") {  // whatever describes records
  const more = {recordType: recordTypeOf(filename), count: request.count ?? 1000, seed: shuffled()};
  const plain = text.trim(), body = new FormData();
  $("keep-problem").textContent = "";
  try {
    if (plain[0] === "{") {
      const data = JSON.parse(text, exact), request = typeof data.count === "number" ||
        !isJsonSchema(data) && (typeof data.schema === "object" || typeof data.records === "object");
      edit(request ? {seed: more.seed, ...data}
        : {...more, ...data.title && {recordType: recordTypeOf(data.title)}, schema: data});
    } else if (plain[0] === "[" || plain.includes("\n")) {
      body.append("file", new File([text], `${more.recordType}.${plain[0] === "[" ? "json" : "csv"}`));
      edit({seed: more.seed, ...await send("infer", body, new XMLHttpRequest()), count: more.count});
    } else edit({...more, schema: fromHeader(plain)});
  } catch (error) { $("keep-problem").textContent = error.message; }
}

// ---- Upload: one file after the other, with progress ----

const reading = form(SHAPES.upload, $("upload-options"), ["recordType"]);

function send(path, body, sender) {
  return new Promise((resolve, reject) => {
    const fail = text => () => reject(new Error(text));
    sender.onload = () => sender.status < 300 ? resolve(sender.response) : fail(sender.response?.error ?? "Refused.")();
    sender.onerror = fail("The connection was lost.");
    sender.onabort = fail("Stopped.");
    sender.open("POST", path);
    sender.responseType = "json";
    sender.send(body);
  });
}
async function upload(file) {
  const mode = $("upload-form").elements.mode.value, body = new FormData(), sender = new XMLHttpRequest();
  const bar = el("progress", {max: 1, value: 0, "aria-label": `Upload of ${file.name}`});
  const said = el("div", {className: "dim", role: "status"}, size(file.size));
  const stop = button("Stop", () => sender.abort()), options = reading.read();
  $("uploads").prepend(el("li", {}, el("div", {className: "head"}, el("b", {}, file.name), stop), bar, said));
  if (!options.split) options.recordType = $("upload-type").value || recordTypeOf(file.name);
  if (mode !== "keep") for (const [name, value] of Object.entries(options)) body.append(name, shown(value));
  body.append("file", file);
  sender.upload.onprogress = ({loaded, total}) => {
    Object.assign(bar, {max: total, value: loaded});
    said.textContent = loaded < total ? `${size(loaded)} of ${size(total)}` : "The server reads it.";
  };
  try {
    const answer = await send(mode === "infer" ? "infer" : "upload", body, sender);
    if (mode !== "infer") follow(said, answer);
    else { said.textContent = "Learned."; edit({seed: shuffled(), ...answer}); location.hash = "#generate"; }
  } catch (error) { Object.assign(said, {textContent: error.message, className: "problem"}); }
  bar.hidden = stop.hidden = true;
}
async function uploadAll(files) {
  location.hash = "#upload";
  $("upload-said").textContent = "";
  for (const file of [...files]) await upload(file);
}
function editUpload(request, type) {
  $("upload-form").elements.mode.value = type === "ingest" ? "ingest" : "keep";
  $("upload-form").onchange();
  reading.write(request);
  $("upload-how").open = Object.keys(reading.read()).length > 0;
  $("upload-type").value = request.recordType ?? "";
  $("upload-said").textContent = `Set as for ${request.filename}. Choose the file, which a page cannot do for you.`;
}

// ---- Export ----

let types = [];
const SIGNS = {eq: "=", ne: "≠", lt: "<", lte: "≤", gt: ">", gte: "≥", in: "is one of (a, b)", like: "is like (% _)",
  notIn: "is none of (a, b)", notLike: "is not like (% _)", startsWith: "starts with", endsWith: "ends with",
  null: "is null", "!null": "is not null"};
const OPERATORS = SHAPES.jobs.export.$defs.Condition.properties;
const writing = form(SHAPES.jobs.export, $("export-options"), ["filters", "fields", "orderBy"]);
const operand = sign => plainly(OPERATORS[sign.replace("!", "")], SHAPES.jobs.export).type;

async function loadTypes() {
  types = (await api("GET", "records").catch(() => ({items: types}))).items;
  tickTypes(ticked("export-types"));
  $("export-hint").hidden = types.length > 0;
  $("export-form").hidden = !types.length;
  navigate();
}
function tickTypes(kept) {
  $("export-types").replaceChildren(...types.map(({recordType, count}) => tick(`${recordType} (${amount(count)})`,
    {value: recordType, checked: kept.includes(recordType), onchange: () => exportChoices()})));
  exportChoices();
}
function exportFields() {  // of the chosen types: names and kinds
  const names = ticked("export-types");
  return Object.assign({}, ...types.map(type => !names.length || names.includes(type.recordType) ? type.fields : {}));
}
function exportChoices(kept = ticked("export-fields")) {
  const fields = exportFields(), names = Object.keys(fields);
  choices($("date-field"), names.filter(name => fields[name].startsWith("date")), "of creation");
  choices($("order"), names, "creation");
  for (const row of $("where").children) { choices(row.firstChild, names); row.adapt(); }
  $("export-fields").replaceChildren(...names.map(name => tick(name, {value: name, checked: kept.includes(name)})));
}
function addCondition(field, operator = "eq", given = "") {
  const value = el("input", {"aria-label": "Value", required: true}), adapt = () => {
    const kind = exportFields()[name.value] ?? "", takes = operand(sign.value), one = !/array|string/.test(takes);
    value.hidden = value.disabled = takes === "boolean";
    value.type = one && /^(int|float|decimal)$/.test(kind) ? "number" : one && kind === "date" ? "date" : "text";
    value.step = "any";
    value.pattern = one && kind === "bool" ? "true|false" : ".*";
    value.title = one && kind === "bool" ? "true or false" : "";
  };
  const name = el("select", {"aria-label": "Field", onchange: adapt});
  const sign = el("select", {"aria-label": "Operator", onchange: adapt}, Object.keys(OPERATORS).flatMap(operator =>
    operand(operator) === "boolean" ? [operator, `!${operator}`] : [operator]).map(value =>
    el("option", {value}, SIGNS[value] ?? value)));
  const drop = button("✕", () => row.remove(), {"aria-label": "Remove the condition"});
  const row = el("div", {className: "row"}, name, sign, value, drop);
  $("where").append(row);
  choices(name, Object.keys(exportFields()));
  if (field) name.value = field;
  sign.value = given === false ? `!${operator}` : operator;
  row.adapt = adapt;
  adapt();
  value.value = [given].flat().map(shown).join(", ");
  return name;
}
function exportRequest() {
  const given = {recordType: ticked("export-types"), from: $("from").value, to: $("to").value,
    dateField: $("date-field").value, jobId: $("of-job").value}, fields = ticked("export-fields");
  const filters = Object.fromEntries(Object.entries(given).filter(([, value]) => value.length)), kinds = exportFields();
  for (const {children: [name, sign, {value}]} of $("where").children) {
    const typed = text => kinds[name.value] === "bool" ? text === "true" : text, takes = operand(sign.value);
    const tests = (filters.where ??= Object.create(null))[name.value] ??= {};
    tests[sign.value.replace("!", "")] = takes === "boolean" ? !sign.value.startsWith("!")
      : takes === "array" ? value.split(",").map(text => typed(text.trim())) : typed(value);
  }
  if (filters.recordType?.length === 1) [filters.recordType] = filters.recordType;
  return {...writing.read(), filters, ...fields.length && {fields},
    ...$("order").value && {orderBy: ($("descending").checked ? "-" : "") + $("order").value}};
}
function editExport({filters = {}, fields = [], orderBy = "", ...options}) {
  const wanted = [filters.recordType ?? []].flat(), known = types.map(({recordType}) => recordType);
  writing.write(options);
  $("where").replaceChildren();
  tickTypes(wanted);
  exportChoices(fields);
  for (const [id, text = ""] of [["from", filters.from], ["to", filters.to]])
    Object.assign($(id), {type: text.includes("T") ? "text" : "date", value: text});
  $("of-job").value = filters.jobId ?? "";
  $("date-field").value = filters.dateField ?? "";
  $("order").value = orderBy.replace(/^-/, "");
  $("descending").checked = orderBy.startsWith("-");
  for (const [field, tests] of Object.entries(filters.where ?? {}))
    if (!Array.isArray(tests))
      for (const [operator, given] of Object.entries(tests)) addCondition(field, operator, given);
  const gone = wanted.filter(name => !known.includes(name));
  $("export-problem").textContent = joined([gone.length && `There are no records of ${joined(gone)} any more.`,
    Array.isArray(filters.where?.or) && "Its alternatives (or) have no place in this form: they are left out."], " ");
}

// ---- Records: all of a type, as its header row filters and sorts them, and how the values of some are spread ----

const SAMPLE = 1000, PIECES = 25, ROWS = 20;
const TESTS = {">=": "gte", "<=": "lte", "!=": "ne", ">": "gt", "<": "lt", "=": "eq"};
let drawn = "", absorbed = () => false;

function condition(name, kind, typed) {  // a text alone is looked for in texts, and is the value of all others
  const [, sign, value] = /^\s*(>=|<=|!=|[<>=])?\s*(.*?)\s*$/s.exec(typed);
  if (!sign && /^(not )?null$/.test(value)) return [`${name}.null`, value === "null"];
  return [`${name}.${TESTS[sign] ?? (/text|json|any/.test(kind) ? "contains" : "eq")}`, value];
}
async function sampled(count, path, some) {  // pieces from all over a large type, not its oldest records
  const pieces = some || count <= SAMPLE ? 1 : PIECES, items = [];
  let first, next = 0;
  for (let piece = 0; piece < pieces && next !== null; piece++) {
    const after = piece ? Math.max(next, first + Math.floor(count * piece / pieces)) : 0;
    const page = await api("GET", path({limit: SAMPLE / pieces, after}));
    items.push(...page.items);
    next = page.next && Number(page.next);
    first ??= next - SAMPLE / pieces;
  }
  return items;
}
function openRecord(name, item, number) {
  const dialog = el("dialog", {"aria-label": `Record ${number} of ${name}`, onclose: () => dialog.remove()},
    el("div", {className: "head"}, el("h3", {}, `${name} ${number}`), el("div", {className: "row"},
      shown(item.id) && el("a", {href: `records/${name}/${encodeURIComponent(shown(item.id))}`}, "By its id"),
      button("Close", () => dialog.close()))),
    el("table", {}, el("tbody", {}, Object.entries(item).map(([field, value]) => el("tr", {},
      el("th", {scope: "row"}, field), value === null ? el("td", {className: "dim"}, "null") : el("td", {},
        shown(value)))))));
  document.body.append(dialog);
  dialog.showModal();
}
function drawRecords(name, jobId) {
  const type = types.find(({recordType}) => recordType === name), place = $("records");
  const which = `${name} ${jobId} `, key = which + type?.count;
  $("record-types").replaceChildren(...types.map(({recordType, count}) => el("a", {href: `#records/${recordType}`,
    ...recordType === name && {"aria-current": "page"}}, `${recordType} `, el("b", {}, amount(count)))));
  if (key === drawn || absorbed() && drawn.startsWith(which)) return;  // nobody loses the page that they read
  drawn = key;
  absorbed = () => false;
  place.replaceChildren(el("p", {className: "dim"}, !types.length ? "No records yet. Generate some, or upload a file."
    : "Choose a record type to see its records and how their values are spread."));
  if (type) drawType(type, jobId);
}
function drawType({recordType: name, count, fields: kinds}, jobId) {
  let order = "", trail = [[0, 0]], next, timer, turns = 0;
  const rows = el("div"), values = el("div"), position = el("span", {className: "dim", role: "status"});
  const tests = () => [...rows.querySelectorAll("thead input")].filter(({value}) => value.trim()).map(input =>
    condition(input.name, kinds[input.name], input.value));
  const path = more => `records/${name}?${new URLSearchParams([...tests(), ...Object.entries({...jobId && {jobId},
    ...more})])}`, ordered = more => path({...order && {orderBy: order}, ...more});
  const show = async () => {
    const turn = ++turns, [after, start] = trail.at(-1);
    try {
      const page = await api("GET", ordered({limit: ROWS, after}));
      if (turn !== turns) return;
      next = [page.next, start + page.items.length];
      const fresh = table(page.items, "", Object.keys(kinds), head, (item, at) => item && el("th", {scope: "row"},
        button(amount(start + at + 1), () => openRecord(name, item, amount(start + at + 1)))));
      rows.querySelector("tbody").replaceWith(fresh.querySelector("tbody"));
      position.textContent = `${amount(page.items.length && start + 1)} to ${amount(next[1])} of ${amount(page.total)}`;
      [back.disabled, on.disabled] = [trail.length < 2, page.next === null];
    } catch (error) {
      if (turn === turns) position.textContent = error.message;
    }
    file.href = ordered({format: "csv"});
  };
  const spread = async () => {
    const some = jobId || tests().length > 0, items = await sampled(count, path, some).catch(() => []);
    values.replaceChildren(el("h3", {}, items.length < SAMPLE || items.length === count ? "Values" : `Values of ${
      some ? "the first" : "a sample of"} ${amount(items.length)}`), el("div", {className: "plots"},
      Object.entries(kinds).map(([field, kind]) => plot(field, kind, items.map(item => item[field] ?? null)))));
  };
  const anew = filtered => { trail = [[0, 0]]; show(); if (filtered) spread(); };
  const head = ({name: field}) => {
    const cell = el("th", {scope: "col"}, button(field, () => {
      order = order === field ? `-${field}` : order === `-${field}` ? "" : field;
      for (const other of rows.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
      if (order) cell.setAttribute("aria-sort", order === field ? "ascending" : "descending");
      anew();
    }, {title: "Sort"}), el("input", {name: field, "aria-label": `Filter ${field}`, placeholder: kinds[field],
      autocomplete: "off", title: "A value, or = != < <= > >= and a value, or null, or not null",
      oninput: () => { clearTimeout(timer); timer = setTimeout(anew, 300, true); }}));
    return cell;
  };
  const step = change => () => { change(); show(); };
  const back = button("Previous", step(() => trail.pop())), on = button("Next", step(() => trail.push(next)));
  const file = el("a", {download: `${name}.csv`}, "Download as CSV");
  const away = button(`Export ${name}`, () => {
    const where = Object.create(null);
    for (const [test, value] of tests()) {
      const at = test.lastIndexOf(".");
      (where[test.slice(0, at)] ??= {})[test.slice(at + 1)] = value;
    }
    editExport({...writing.read(), filters: {recordType: name, ...jobId && {jobId}, where}, orderBy: order});
    location.hash = "#export";
  });
  rows.append(table([], `Records of ${name}`, Object.keys(kinds), head, () => el("th", {scope: "col"},
    el("span", {className: "away"}, "Record"))));
  $("records").replaceChildren(el("div", {className: "row"}, back, on, position, file, away,
    jobId && el("a", {href: `#records/${name}`}, "of one job; show all")), rows, values);
  absorbed = () => trail.length > 1 || order || tests().length > 0;
  anew(true);
}
function plot(name, kind, values) {  // numbers and dates as a histogram, choices as bars, of other texts examples
  const present = values.filter(value => value !== null), nulls = values.length - present.length, counts = new Map();
  const numbers = /^(int|float|decimal|date|datetime)$/.test(kind) ? present.map(value => kind.startsWith("date")
    ? Date.parse(value) : Number(shown(value))).filter(Number.isFinite) : [];
  for (const value of present) counts.set(shown(value), (counts.get(shown(value)) ?? 0) + 1);
  const few = counts.size && (counts.size <= 12 || counts.size < present.length / 20);
  return el("figure", {}, el("figcaption", {}, el("b", {}, name), " ", el("span", {className: "dim"}, joined([kind,
    nulls && `${(100 * nulls / values.length).toFixed(nulls * 10 < values.length ? 1 : 0)} % null`,
    !numbers.length && !few && `${amount(counts.size)} different`]))),
  ...numbers.length ? histogram(name, kind, numbers) : few ? bars(counts, present.length)
    : [...counts.keys()].slice(0, 4).map(text => el("div", {className: "example"}, text.slice(0, 200))));
}
function histogram(name, kind, numbers) {
  const low = numbers.reduce((a, b) => Math.min(a, b)), high = numbers.reduce((a, b) => Math.max(a, b));
  const mean = numbers.reduce((sum, number) => sum + number / numbers.length, 0);
  const each = kind === "int" && high - low < 30, length = each ? high - low + 1 : 24;
  const bins = Array.from({length}, () => 0), step = each ? 1 : (high - low) / length || 1, wide = 240 / length;
  for (const number of numbers) bins[Math.min(length - 1, Math.floor((number - low) / step))]++;
  const digits = {date: 10, datetime: 16}[kind], tall = 68 / bins.reduce((a, b) => Math.max(a, b));
  const text = value => digits ? new Date(value).toISOString().slice(0, digits).replace("T", " ") : amount(value);
  const bin = at => text(low + at * step) + (each ? "" : ` to ${text(low + (at + 1) * step)}`);
  const ends = [text(low), digits ? "" : `mean ${text(mean)}`, text(high)];
  return [el("svg", {viewBox: "0 0 240 70", role: "img", "aria-label": `${name}: ${text(low)} to ${text(high)}, mean ${
    text(mean)}`}, bins.map((count, at) => el("rect", {x: at * wide, width: wide - 1, y: 70 - tall * count,
    height: tall * count}, el("title", {}, `${bin(at)}: ${amount(count)}`)))),
  el("div", {className: "head dim"}, ends.map(end => el("span", {}, end)))];
}
function bars(counts, total) {
  const top = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 8), others = counts.size - top.length;
  const percent = count => `${(100 * count / total).toFixed(count * 10 < total ? 1 : 0)} %`;
  return [...top.map(([text, count]) => el("div", {className: "bar"}, el("span", {title: text}, text || "(empty)"),
    el("progress", {max: top[0][1], value: count, "aria-hidden": "true"}), el("span", {}, percent(count)))),
  others ? el("div", {className: "dim"}, `and ${amount(others)} more`) : ""];
}

// ---- Job types of the program's own ----

let running;

function drawRun(request, type) {
  const known = OWN.includes(type) ? type : OWN[0];
  $("run-types").replaceChildren(...OWN.map(name => el("a", {href: `#run/${name}`,
    ...name === known && {"aria-current": "page"}}, name)));
  if (running?.type !== known) {
    running = {type: known, ...form(SHAPES.jobs[known], $("run-options"))};
    $("run-problem").textContent = $("run-said").textContent = "";
  }
  if (request) running.write(request);
}

// ---- The page ----

function navigate() {  // what is no view, such as the target of the skip link, leaves the view as it is
  const [view, ...rest] = location.hash.slice(1).split("/"), main = $("main");
  const known = $(`view-${view}`) && view !== "preview" ? view : main.className || "generate";
  main.className = known;
  for (const section of main.querySelectorAll("section"))
    section.classList.toggle("shown", section.id === `view-${known}` || known === "generate" &&
      section.id === "view-preview");
  for (const link of document.querySelectorAll("nav a"))
    if (link.hash === `#${known}`) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  if (view === "records") drawRecords(...rest);
  if (view === "run" && OWN.length) drawRun(undefined, ...rest);
}
function drags(event, on) {
  if (!event.dataTransfer?.types.includes("Files")) return false;
  event.preventDefault();
  document.body.classList.toggle("dragging", on);
  return true;
}
addEventListener("hashchange", () => { navigate(); scrollTo(0, 0); });
addEventListener("dragover", event => drags(event, true));
addEventListener("dragleave", event => { if (!event.relatedTarget) drags(event, false); });
addEventListener("drop", event => { if (drags(event, false)) uploadAll(event.dataTransfer.files); });
addEventListener("keydown", event => {  // within a text the browser itself undoes what was typed
  const text = event.target.matches("textarea, select, input:not([type=checkbox], [type=radio])");
  if (text || event.key.toLowerCase() !== "z" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  if ($("main").className === "generate") travel(event.shiftKey ? 1 : -1);
});
$("files").onchange = async event => { await uploadAll(event.target.files); event.target.value = ""; };
$("upload-form").onsubmit = event => event.preventDefault();
$("upload-form").onchange = () => { $("upload-more").hidden = $("upload-form").elements.mode.value === "keep"; };
for (const name of ["recordType", "count", "seed"]) $(name).oninput = ({target: input}) => {
  request[name] = parsed(input.value, name === "recordType");
  changed(input);
};
$("reseed").onclick = () => { request.seed = shuffled(); draw(); changed(); };
$("locale").onchange = event => {
  const names = event.target.value.split(",").map(name => name.trim()).filter(Boolean);
  request.locale = names.length > 1 ? names : names[0];
  changed();
  loadFields();
};
$("json").oninput = ({target: json}) => {
  json.setCustomValidity("");
  try {
    const fresh = JSON.parse(json.value, exact);
    if (fresh?.constructor !== Object) throw new Error("The request has to be an object.");
    request = fresh;
    draw();
    changed(json);
  } catch (error) {  // what was right before is neither shown nor sent meanwhile
    json.setCustomValidity(error.message);
    clearTimeout(timer);
    asked?.abort();
    showProblem(error);
  }
};
$("fields").onkeydown = event => {  // does not generate
  if (event.key === "Enter" && event.target.matches("input")) event.preventDefault();
};
$("search").oninput = search;
$("search").onkeydown = event => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  $("palette").firstElementChild?.click();
};
$("as-fields").onclick = () => editAs(isJsonSchema(request.schema));  // which has no fields of ours
$("as-json").onclick = () => editAs(true);
$("undo").onclick = () => travel(-1);
$("redo").onclick = () => travel(1);
$("keep-form").onsubmit = event => {
  event.preventDefault();
  kept(all => ({...all, [$("keep-name").value]: request}));
};
$("keep-file").onclick = () => {
  const name = request.recordType ?? joined(Object.keys(request.records ?? {}), "-");
  const link = el("a", {href: URL.createObjectURL(new Blob([`${pretty(request)}\n`])), download: `${name}.json`});
  link.click();
  URL.revokeObjectURL(link.href);
};
$("keep-open").onchange = async ({target: input}) => {
  const [file] = input.files;
  if (file) await take(await file.text(), file.name);
  input.value = "";
};
$("paste-form").onsubmit = event => { event.preventDefault(); take($("paste").value); };
$("add-where").onclick = () => addCondition().focus();
jobForm("generate", () => "generate", () => request);
jobForm("export", () => "export", exportRequest);
jobForm("run", () => running.type, () => running.read());
$("nav-run").hidden = !OWN.length;
choices($("by-type"), SHAPES.types, "all");
choices($("by-status"), SHAPES.statuses, "all");
$("by-type").onchange = $("by-status").onchange = refresh;
$("more").onclick = () => { listed = Math.min(listed + 250, 1000); refresh(); };
drawKept();
loadFields();
loadTypes();
watch();
"""


@lru_cache(maxsize=8)
def _shapes(job_types: tuple[str, ...]) -> str:
    """What the page makes its forms from, as JSON that may stand in HTML."""
    jobs = {name: JOB_TYPES[name].model.model_json_schema() for name in job_types
            if JOB_TYPES[name].posted and name != "generate"}
    shapes = {"jobs": jobs, "upload": IngestOptions.model_json_schema(), "types": job_types, "statuses": [*JobStatus]}
    return json.dumps(shapes).replace("<", "\\u003c")


@route("GET", "/ui", {200: "text/html"})
def get_ui(call: Request) -> Any:
    """The page: jobs, records, and forms to generate, upload and export."""
    body = f'{_UI_BODY}<script id="shapes" type="application/json">{_shapes(tuple(JOB_TYPES))}</script>'
    return _page_reply("taskapi", _STYLE + _UI_STYLE, body, _UI_SCRIPT)


_SIGN_IN_SCRIPT = """
const form = document.querySelector("form"), said = form.querySelector("[role=alert]");
form.addEventListener("submit", async event => {
  event.preventDefault();
  const answer = await fetch(form.dataset.to, {method: "POST", headers: {
    Authorization: `Bearer ${form.elements.token.value.trim()}`}}).catch(error => error);
  if (answer.ok) location.reload();
  else said.textContent = answer.status === 401 ? "That is not the token." : "The server does not answer.";
});
"""


def token_page(_: Request) -> Any:
    """Asks for the token, once: the cookie that comes back stands for it."""
    return _page_reply("taskapi", _STYLE, (
        f'<main id="main" tabindex="-1"><h1>taskapi</h1><form data-to="{escape(MOUNT.get())}/ui"><p>'
        '<input name="user" value="taskapi" autocomplete="username" hidden><label>Token <input name="token" '
        'type="password" autocomplete="current-password" required autofocus></label> <button>Open</button></p>'
        '<p role="alert"></p></form></main>'), _SIGN_IN_SCRIPT)


BROWSER_PAGES.update({"/": get_ui, "token": token_page})


# ==== 11 Server: the service as a whole, the Waitress channel, the command line ====

_DRAIN_SECONDS = 2.0  # for requests in flight when the server stops; jobs get as long: within five in all
_CONNECTIONS = 1000  # at most; those that ask nothing make room for new ones
_LINGER_SECONDS = 5.0  # how long a refused client may go on sending before its connection is cut
_PATIENCE_SECONDS = 20.0  # how long the head of a request may take, and a body or an answer besides what follows
_SLOWEST = 16 * 1024  # bytes a second: the least at which a body has to come, and an answer to be taken


class _Refusal:
    """A TaskError in the form in which Waitress's parser reports errors."""

    def __init__(self, error: TaskError):
        self._error = error

    def to_response(self, _ident: str | None = None) -> tuple[str, list[tuple[str, str]], bytes]:
        """Status line, headers and body."""
        status = self._error.http_status
        headers = {"Content-Type": _JSON_TYPE, "Cache-Control": "no-store", **SAFE_HEADERS, **self._error.headers}
        return f"{status} {HTTPStatus(status).phrase}", [*headers.items()], json.dumps(self._error.body()).encode()


class _Parser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]  # Waitress has no types
    """Promise: what the head of a request tells is refused before its body is read, a body of unknown length at its
    limit, and nothing is taken whose end could be read in two ways, or that is not HTTP/1.0 or 1.1."""

    headers_finished: bool
    completed: bool
    error: Any

    def __init__(self, engine: Engine, adj: Any):
        super().__init__(adj)
        self._engine = engine
        self._most = 0  # bytes of the body
        self.deadline = monotonic() + _PATIENCE_SECONDS

    def parse_header(self, header_plus: bytes) -> None:
        """Also refuses what Waitress would take, or end the connection at without an answer."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # a bad address in the request line, or a length of thousands of digits
            raise waitress.parser.ParsingError(str(error)) from None
        if self.version not in ("1.0", "1.1"):
            raise waitress.parser.ParsingError("this server speaks HTTP/1.1")
        if "TRANSFER_ENCODING" in self.headers or (self.chunked and "CONTENT_LENGTH" in self.headers):
            raise waitress.parser.ParsingError("Transfer-Encoding beside Content-Length, or in HTTP/1.0")
        if self.version == "1.1" and "HOST" not in self.headers:
            raise waitress.parser.ParsingError("there is no Host header")
        if self.proxy_netloc:  # it is what counts, if the request line has one (RFC 9112, 3.2.2)
            self.headers["HOST"] = self.proxy_netloc

    def received(self, data: bytes) -> int:
        """Takes bytes in; whatever is refused is complete at once."""
        in_head = not self.headers_finished
        if in_head and not self.header_plus and data[:1] in b"\r\n":  # empty lines, all at once: each pair costs a copy
            self.empty = self.completed = True
            return len(data) - len(data.lstrip(b"\r\n"))
        try:
            consumed: int = super().received(data)
        except OSError:
            self.refuse(DiskFull("the disk is full"))
            return len(data)
        if self.error is None and not self.empty:
            if in_head and self.headers_finished:
                self._check_head()
            elif self.body_bytes_received > self._most:
                self.refuse(body_too_large(self.path, self._engine.settings))
        if self.completed:
            self.expect_continue = False  # nothing more is wanted; Waitress would ask for it, and wait
        return consumed

    def _check_head(self) -> None:
        settings, hosts = self._engine.settings, self._engine.allowed_hosts
        length = -1 if self.chunked else self.content_length
        try:
            self._most = check_head(self.command, self.path, lambda name: self.headers.get(_header_key(name)), length,
                                    settings, hosts)
        except TaskError as error:
            error.headers |= cors_headers(self.headers.get("ORIGIN"), settings.cors_origins)
            if not self.completed:  # otherwise the application refuses it, and the connection can stay
                self.refuse(error)
        self.deadline = monotonic() + _PATIENCE_SECONDS + (
            self._most if self.chunked else length) / _SLOWEST

    def refuse(self, error: TaskError) -> None:
        """Ends the request with an error, wherever it is."""
        if not self.headers_finished:
            self.parse_header(b"GET / HTTP/1.0\r\n")  # what an answer needs to know
        self.error = _Refusal(error)
        self.completed = True


class _Answer(waitress.task.Task):  # type: ignore[misc]  # Waitress has no types
    """Promise: an answer leaves in one piece, from its own thread, and ends no connection without need."""

    def set_close_on_finish(self) -> None:
        """Not because a 204 or a 304 tells no length: it has none."""
        if self.has_body or self.version == "1.0" or self.request.headers.get("CONNECTION", "").lower() == "close":
            super().set_close_on_finish()

    def service(self) -> None:
        """Makes the answer; the loop, which would wake up again and again for it, leaves it alone meanwhile."""
        self.channel.answering = True
        try:
            super().service()
        finally:
            self.channel.answering = False

    def finish(self) -> None:
        """Sends what the client takes at once; the loop sends the rest."""
        super().finish()
        self.channel.send_some()


class _WSGITask(_Answer, waitress.task.WSGITask):  # type: ignore[misc]  # Waitress has no types
    """An answer of the application."""

    cut_at = sys.maxsize  # bytes of the body after which a test wants the connection to end; -1 is before the head

    def get_environment(self) -> dict[str, Any]:
        """With ways to ask whether the client is still there, and to cut its connection."""
        environ: dict[str, Any] = super().get_environment()
        environ["taskapi.gone"] = self.channel.check_client_disconnected
        environ["taskapi.cut"] = partial(setattr, self, "cut_at")
        return environ

    def write(self, data: bytes) -> None:
        """Writes, as far as it is not to be cut."""
        if self.cut_at >= 0:
            super().write(data[:self.cut_at - self.content_bytes_written])
        if self.content_bytes_written >= self.cut_at:
            raise waitress.channel.ClientDisconnected


class _ErrorTask(_Answer, waitress.task.ErrorTask):  # type: ignore[misc]  # Waitress has no types
    """Promise: what the server itself refuses is answered in the same shape as all other errors."""

    def execute(self) -> None:
        """Writes the answer; the connection closes after it."""
        error = self.request.error
        if not isinstance(error, _Refusal):
            reason = f"malformed HTTP request: {str(error.body)[:100]}"
            self.request.error = _Refusal({
                400: BadRequest(reason), 501: BadRequest(reason), 413: TooLarge("the body is too large"),
                431: HeadersTooLarge(f"the headers are larger than {self.channel.adj.max_request_header_size} bytes"),
            }.get(error.code, TaskError("internal error")))
        self.channel.refused = True
        super().execute()


class _Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]  # Waitress has no types
    """Promise: a client is answered at its own pace, within bounds, and no thread waits for one.

    After a refusal the connection is read for a while: closing at once would reset it, and the client, still sending,
    would never see the answer (RFC 9112, 9.6). Who takes too long over a request or an answer is cut off.
    """

    task_class, error_task_class = _WSGITask, _ErrorTask
    requests: list[Any]
    request: Any
    will_close: bool
    refused = False
    _lingers_until: float | None = None  # after a refusal
    _deadline = math.inf  # for the client to take its answer
    _ended = False  # the client sends no more; it may still read, though
    answering = False  # a thread makes an answer
    _held_back = False  # the next request on this connection: what was answered before has not been taken

    def __init__(self, engine: Engine, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.parser_class = partial(_Parser, engine)

    # On the loop

    def readable(self) -> bool:
        """While lingering, always; while a request is answered too, to see the client go away."""
        return self._lingers_until is not None or (not self._ended and bool(super().readable()))

    def writable(self) -> bool:
        """While there is something to send, to begin, or to close; a thread that makes an answer sends it itself."""
        if self._lingers_until is not None or self.answering:
            return bool(self.will_close)
        return bool(super().writable() or self._held_back or (self._ended and not self.requests))

    def handle_read(self) -> None:
        """Takes in requests; after a refusal, throws away what comes."""
        try:
            data = self.socket.recv(self.adj.recv_bytes)
        except BlockingIOError:
            return
        except OSError:
            self.handle_close()
            return
        if data and self._lingers_until is None:
            self.last_activity = time()
            self.received(data)
        elif not data and (self.requests or self.total_outbufs_len):
            self._ended = True
        elif not data:
            self.handle_close()

    def handle_write(self) -> None:
        """Sends; then begins what was held back, or closes, after a refusal by lingering."""
        self._flush_exception(self._flush_some_if_lockable)
        if self.total_outbufs_len or self.will_close:
            pass
        elif self._held_back:
            self._held_back = False
            self.server.add_task(self)
        elif self.close_when_flushed and self.refused:
            self._lingers_until = monotonic() + _LINGER_SECONDS
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
        elif self.close_when_flushed or (self._ended and not self.requests):
            self.will_close = True
        if self.will_close:
            self.handle_close()

    def handle_close(self) -> None:
        """Also lets go of the body that was coming in."""
        super().handle_close()
        if self.request is not None:
            self.request.close()

    def idle(self) -> bool:
        """True if nothing is asked, answered or refused here."""
        return not (self.requests or self.request or self.total_outbufs_len)

    def hurry(self, now: float) -> None:
        """Called every second: ends what takes the client too long."""
        if self.requests and not self._held_back:
            return
        if now > (self._lingers_until or math.inf) or (self.total_outbufs_len and now > self._deadline):
            self.handle_close()  # at once: to wait until it can be written to could take for ever
        elif self.request is not None and now > self.request.deadline:
            self.request.refuse(BadRequest("malformed HTTP request: it took too long to come"))
            self.requests.append(self.request)
            self.request = None
            self.server.add_task(self)

    # On a thread

    def service(self) -> None:
        """Answers a request, once the client has taken the answers before."""
        if self.total_outbufs_len:
            self._held_back = True
            self.server.pull_trigger()
            return
        self._deadline = math.inf
        super().service()
        self._deadline = monotonic() + _PATIENCE_SECONDS + self.total_outbufs_len / _SLOWEST

    def send_some(self) -> None:
        """Sends what the client takes without waiting."""
        with self.outbuf_lock:
            self._flush_exception(self._flush_some, do_close=False)

    def check_client_disconnected(self) -> bool:
        """What a long poll asks."""
        return self._ended or not self.connected


def _descriptors(wanted: int | None = None) -> int | None:
    """How many files and connections the process may have open, None if the system does not say.

    `wanted` raises that for the process, as far as it may.
    """
    if sys.platform == "win32":
        return None
    import resource  # only there where it is needed

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


class HttpServer:
    """Waitress around an application: a loop that can be told to stop, and lets requests in flight finish."""

    def __init__(self, engine: Engine, app: Callable[..., Iterable[bytes]], host: str, port: int):
        # Windows' select takes 512 sockets; elsewhere files and the database need some of the descriptors.
        self._limit = min(_CONNECTIONS, (_descriptors() or 500) * 3 // 4)
        try:
            self._server = waitress.create_server(
                app, host=host, port=port, threads=engine.settings.threads, ident="taskapi",
                max_request_body_size=2**62, max_request_header_size=64 * 1024, recv_bytes=65536,
                outbuf_high_watermark=2**62, channel_timeout=60, cleanup_interval=1, connection_limit=self._limit,
                channel_request_lookahead=1, asyncore_use_poll=True, clear_untrusted_proxy_headers=True)
        except OSError as error:
            reason = f"{error.strerror}; --port 0 takes any free port"
            raise StartupError(f"cannot listen on {host}:{port}: {reason}") from None
        self._server.adj.send_bytes = _BLOCK  # what is less waits until the answer is whole
        self._server.channel_class = partial(_Channel, engine)
        self._maintain, self._server.maintenance = self._server.maintenance, self._hurry
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.effective_port}"
        self._stop = threading.Event()

    def stop(self) -> None:
        """Makes `run` return soon; may be called from any thread, and from a signal handler."""
        self._stop.set()
        with suppress(OSError):
            self._server.pull_trigger()

    def run(self, leave: Callable[[], None]) -> None:
        """Serves until `stop`; then calls `leave`, and answers the requests in flight, for two seconds at most."""
        while not self._stop.is_set():
            self._turn(1.0)
        leave()
        waitress.wasyncore.dispatcher.close(self._server)  # no new connections; the trigger is still needed
        until = monotonic() + _DRAIN_SECONDS
        while self._close_idle() and monotonic() < until:
            self._turn(0.05)
        self._server.task_dispatcher.shutdown(timeout=0.5)
        waitress.wasyncore.close_all(self._server._map)

    def _turn(self, seconds: float) -> None:
        self._server.asyncore.loop(timeout=seconds, map=self._server._map, use_poll=True, count=1)

    def _hurry(self, at: float) -> None:
        """Every second: ends what takes a client too long; makes room for new ones among those that ask nothing."""
        self._maintain(at)
        channels: list[_Channel] = list(self._server.active_channels.values())
        now = monotonic()
        for channel in channels:
            channel.hurry(now)
        if len(channels) > self._limit * 9 // 10:
            for channel in sorted(filter(_Channel.idle, channels), key=lambda idle: idle.last_activity)[
                    :len(channels) - self._limit // 2]:
                channel.handle_close()

    def _close_idle(self) -> int:
        """Closes connections that wait for nothing; returns how many are left."""
        for channel in list(self._server.active_channels.values()):
            if channel.idle():
                channel.handle_close()
        return len(self._server.active_channels)


class Service(Engine):
    """A data folder at work with its WSGI application; a context manager that leaves nothing behind."""

    def __init__(self, settings: Settings, clock: Clock = utc_now, make_id: Callable[[], str] | None = None,
                 runner: Runner | None = None, processes: int = 1):
        super().__init__(settings, clock, make_id, runner, processes)
        self.url: str | None = None  # while it is served
        self.app = build_app(self).wsgi  # not the Bottle itself: another Bottle's `mount` would take it apart

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def serving(self, port: int | None = None) -> Iterator[str]:
        """Serves from a thread of its own for as long as the block lasts; gives the URL, without a slash at the end."""
        server = HttpServer(self, self.app, self.settings.host, self.settings.port if port is None else port)
        self.announce(server.url)
        self.url = server.url
        thread = threading.Thread(target=server.run, args=[self.queue.release_waiters], name="taskapi-http")
        thread.start()
        try:
            yield server.url
        finally:
            self.announce(None)
            self.url = None
            server.stop()
            thread.join()


def open_service(data_dir: Path | str | None = None, *, inline: bool = False, settings: Settings | None = None,
                 clock: Clock = utc_now, make_id: Callable[[], str] | None = None, runner: Runner | None = None,
                 processes: int = 1, **overrides: Any) -> Service:
    """Opens a data folder, for use in a `with`.

    inline: a job runs inside the call that makes it, without threads. settings: all of them at once; or single ones
    by name (`workers=1`). clock, make_id, runner: what a test wants to hold. processes: how many make the parts of a
    request that has some. Raises StartupError, for one when another process uses the folder, and SettingError.
    """
    chosen = settings or Settings()
    if data_dir is not None:
        overrides["data_dir"] = Path(data_dir)
    try:
        chosen = Settings.model_validate({**chosen.model_dump(), **overrides})
    except ValidationError as error:
        problem = field_problems(error)[0]
        raise SettingError(f"{problem.field}: {problem.message}") from None
    return Service(chosen, clock, make_id, InlineRunner() if inline else runner, processes)


def _printable(text: str) -> str:
    """Text from elsewhere as one harmless line: control characters are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _LogFormat(logging.Formatter):
    """One line an event, as text or as JSON; control characters are escaped, so that nobody can forge a line.

    As text, the lines of a traceback follow, each indented.
    """

    def __init__(self, style: str):
        super().__init__()
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        at = instant(datetime.fromtimestamp(record.created, UTC))
        message = record.getMessage()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._json:
            event = {"at": at, "level": record.levelname.lower(), "logger": record.name,
                     "message": f"{message}\n{trace}" if trace else message}
            if isinstance(record.args, tuple) and record.msg.startswith("job %s"):
                event["job"] = str(record.args[0])
            return json.dumps(event)
        return "\n".join([f"{at} {record.levelname:<7} {_printable(message)}",
                          *(f"    {_printable(line)}" for line in trace.splitlines())])


def _set_up_logging(settings: Settings) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormat(settings.log_format))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    # Where a line was logged and by which thread costs more to find out than to write it, and is not shown.
    logging._srcfile = None  # as "Optimization" in Python's logging HOWTO advises
    logging.logThreads = logging.logMultiprocessing = logging.logProcesses = False


def _set_up_process(settings: Settings) -> None:
    """What only a process of our own may change: logging, and where temporary files go."""
    _set_up_logging(settings)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # warns at every short wait
    _descriptors(wanted=4096)
    sys.setswitchinterval(0.0002)  # a request waits for the interpreter lock a few times: let that be short
    tempfile.tempdir = str((settings.data_dir / "tmp").absolute())  # what is too large to wait in memory waits there


# ---- The command line: every command is a client, of the application in this process or of a running server ----

# Where requests go: method, path, headers, body and its length in; status and the body's blocks out.
Transport = Callable[[str, str, Mapping[str, str], BinaryIO, int], tuple[int, Iterator[bytes]]]


def _app_transport(app: Callable[..., Iterable[bytes]]) -> Transport:
    """Calls an application of this process."""
    def request(method: str, path: str, headers: Mapping[str, str], body: BinaryIO,
                length: int) -> tuple[int, Iterator[bytes]]:
        parts, status = urlsplit(path), [""]
        environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": unquote(parts.path, "latin-1"),
                   "QUERY_STRING": parts.query, "SERVER_NAME": "localhost", "SERVER_PORT": "0",
                   "SERVER_PROTOCOL": "HTTP/1.1", "CONTENT_LENGTH": str(length),
                   "CONTENT_TYPE": headers.get("Content-Type", ""), "wsgi.input": body, "wsgi.url_scheme": "http"}
        blocks = app(environ, lambda line, _headers, _error=None: status.append(line))
        return int(status[-1][:3]), iter(blocks)

    return request


def _http_transport(url: str, token: str | None) -> Transport:
    """Sends requests to a server, each on a connection of its own; StartupError if it does not answer."""
    known = {"Host": "localhost"} | ({"Authorization": f"Bearer {token}"} if token else {})
    host = urlsplit(url).hostname or ""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    gone = StartupError(f"the server at {url} does not answer; has it just been stopped? Try again")

    def blocks(connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> Iterator[bytes]:
        with closing(connection), closing(response):
            try:
                yield from iter(lambda: response.read(_BLOCK), b"")
            except (OSError, http.client.HTTPException):
                raise gone from None

    def request(method: str, path: str, headers: Mapping[str, str], body: BinaryIO,
                length: int) -> tuple[int, Iterator[bytes]]:
        connection = http.client.HTTPConnection(address, urlsplit(url).port, timeout=60)
        try:
            connection.connect()
            with suppress(ConnectionError):  # it may refuse, and say why, before it has read all
                connection.request(method, path, body if length else None,
                                   {**known, **headers, "Content-Length": str(length)})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException):
            connection.close()
            raise gone from None
        return response.status, blocks(connection, response)

    return request


class _Joined(io.RawIOBase):
    """Several streams as one, which tells how much of it was read."""

    def __init__(self, streams: Iterable[BinaryIO], on_read: Callable[[int], None]):
        self._streams, self._on_read, self._done = [*streams], on_read, 0

    def read(self, size: int = -1) -> bytes:
        """Some bytes; none at the end."""
        block = b""
        while self._streams and not (block := self._streams[0].read(size)):
            self._streams.pop(0)
        self._done += len(block)
        self._on_read(self._done)
        return block


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int | None, float | None], None]]:
    """Gives what draws progress on a terminal (done, total, seconds left); elsewhere nothing is shown."""
    if not sys.stderr.isatty():
        yield lambda done, total, left: None
        return
    with click.progressbar(map(str, ()), label=label, file=sys.stderr, show_pos=True, show_eta=False,
                           item_show_func=lambda text: text or "") as bar:  # the length is not known yet
        def show(done: int, total: int | None, left: float | None) -> None:
            rate = f"{(total - done) / left:,.0f}/s  {left:,.0f} s left" if total and left else ""
            bar.length, bar.finished = total, False
            bar.update(done - bar.pos, rate)

        yield show


def is_folder(out: str) -> bool:
    """Whether --out names a folder, which one file a record type goes to."""
    return out.endswith(("/", os.sep))


def _replace(target: Path, mark: str, write: Callable[[BinaryIO], object]) -> None:
    """Has a file written whole or not at all."""
    draft = target.with_name(f".{target.name}.{mark}.part")
    try:
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


class Client:
    """What the commands work with: requests to one end, and the flags that were given."""

    def __init__(self, transport: Transport, flags: Mapping[str, Json],
                 interrupted: Callable[[], bool] = lambda: False, url: str | None = None, folder: Path = Path()):
        self.folder = folder  # where the data is
        self._transport, self.flags, self._interrupted, self.url = transport, flags, interrupted, url
        self.job_id: str | None = None  # what is waited for or written out, to be told if that is interrupted

    def body(self, *keys: str) -> dict[str, Json]:
        """Those of the flags that were given."""
        return {key: self.flags[key] for key in keys if key in self.flags}

    def _pause(self) -> bool:
        """False, unless somebody wants to stop."""
        if self._interrupted():
            raise KeyboardInterrupt
        return False

    def send(self, method: str, path: str, headers: Mapping[str, str], body: BinaryIO, length: int) -> Iterator[bytes]:
        """The body of the answer, in blocks; StartupError with the message of a refusal, exit code 2 for a 400."""
        self._pause()
        status, blocks = self._transport(method, path, headers, body, length)
        if status < 400 or (status == Unavailable.http_status and path == "/health"):
            return (block for block in blocks if not self._pause())
        text = b"".join(blocks)
        try:
            message = json.loads(text)["error"]
        except (ValueError, KeyError, TypeError):
            message = f"{method} {path} was answered with {status}, and not by taskapi"
        raise (SettingError if status == BadRequest.http_status else StartupError)(message)

    def ask(self, method: str, path: str, body: Json = None) -> Json:
        """The answer to a request, from and as JSON."""
        data = b"" if body is None else json.dumps(body).encode()
        blocks = self.send(method, path, {"Content-Type": _JSON_TYPE} if data else {}, io.BytesIO(data), len(data))
        return json.loads(b"".join(blocks) or b"null")

    def post_file(self, path: str, file: Path, texts: Mapping[str, str]) -> Json:
        """Sends a file as multipart/form-data, with text parts before it."""
        mark, begun = secrets.token_hex(16), monotonic()
        name = file_label(file.name).replace('"', "%22")
        head = "".join(f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{text}\r\n'
                       for key, text in texts.items())
        head += f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        tail = f"\r\n--{mark}--\r\n".encode()
        with file.open("rb") as stream, _bar(f"send {name}") as show:
            length = len(head.encode()) + os.fstat(stream.fileno()).st_size + len(tail)

            def on_read(done: int) -> None:
                self._pause()
                show(done, length, (monotonic() - begun) / max(done, 1) * (length - done))

            body = cast(BinaryIO, _Joined([io.BytesIO(head.encode()), stream, io.BytesIO(tail)], on_read))
            headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
            return json.loads(b"".join(self.send("POST", path, headers, body, length)))

    def follow(self, job_id: str) -> Json:
        """The completed job, after showing how it, and the one it comes after, went; StartupError if it failed."""
        self.job_id = job_id
        job = self._watch(job_id)
        if sys.stderr.isatty():
            took = datetime.fromisoformat(job["finishedAt"]) - datetime.fromisoformat(job["startedAt"])
            about = f"{job['progress']['done']:,} in {took.total_seconds():.1f} s"
            click.echo(f"{job['type']} {job['jobId']}: {about}", err=True)
        return job

    def _watch(self, job_id: str) -> Json:
        job = self.ask("GET", f"/status/{job_id}")
        if job["status"] == JobStatus.PENDING and job["after"]:
            self._watch(job["after"])
        with _bar(job["type"]) as show:
            while not JobStatus(job["status"]).finished:
                show(job["progress"]["done"], job["progress"]["total"], job["eta"])
                job = self.ask("GET", f"/status/{job_id}?wait={0.2 if sys.stderr.isatty() else 1}")
        if job["status"] != JobStatus.COMPLETED:
            raise StartupError(f"{job['type']} job {job_id} {job['status']}: {_printable(job['error'])}")
        return job

    def save(self, job: Mapping[str, Json], out: str) -> None:
        """Writes a job's file to `out`: to stdout for -, into a folder what is in it, each file whole or not at all."""
        blocks = self.send("GET", f"/download/{job['jobId']}", {}, io.BytesIO(), 0)
        target = Path(os.path.realpath(out))
        if out == "-" or (target.exists() and not target.is_file() and not is_folder(out)):  # no rename onto a pipe
            with click.open_file(out, "wb") as stream:
                stream.writelines(blocks)
                stream.flush()
            return
        if not is_folder(out):
            _replace(target, job["jobId"], lambda file: file.writelines(blocks))
            return
        target.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=target) as file:
            file.writelines(blocks)
            with zipfile.ZipFile(file) as packed:
                for name in packed.namelist():
                    with packed.open(name) as member:
                        _replace(target / name, job["jobId"], partial(shutil.copyfileobj, member))


# ---- Flags: made from the settings and from the models of the requests ----


class _Setting(click.Option):
    """The flag of a setting. Variables and the file are looked at where the program begins, before any command."""

    def __init__(self, name: str, hidden: bool = False):
        field = Settings.model_fields[name]
        default = f" (default: {shown})" if (shown := Settings.shown_default(name)) else ""
        words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        form: dict[str, Any] = {"metavar": "|".join(words) or "VALUE"}
        if field.annotation is bool:
            form = {"is_flag": True, "flag_value": "true"}
        super().__init__([name, flag_of(name)], type=click.UNPROCESSED, hidden=hidden, default=None, **form,
                         help=f"{field.description}{default}",
                         shell_complete=lambda _context, _option, text: [w for w in words if w.startswith(text)])

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """The variable's text, also of a flag, which click would take for unset where it is nonsense."""
        return self.resolve_envvar_value(ctx)


class _Argument(click.Argument):
    """A word that needs no flag, which --help explains."""

    def __init__(self, name: str, about: str, words: Collection[str] = (), **more: Any):
        super().__init__([name], shell_complete=lambda _context, _argument, text: [
            word for word in words if word.startswith(text)], **more)
        self.help = about  # before click 8.5 it took none

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Its row in the help."""
        return self.human_readable_name, str(self.help)


def _reader(kinds: set[str | None]) -> Callable[[str], Json]:
    """Reads text as a value of a JSON schema; what does not fit stays text, for the request's model to refuse."""
    def value(text: str) -> Json:
        if "array" in kinds and text[:1] != "[" and ("," in text or "string" not in kinds):
            return [part.strip() for part in text.split(",")]
        if kinds & {"integer", "number", "object"} or ("array" in kinds and text[:1] == "["):
            with suppress(ValueError, RecursionError):
                return json.loads(text)
        return text

    return value


def _option(name: str, schema: Mapping[str, Json]) -> click.Option:
    """The flag for a property of a JSON schema."""
    kinds = {choice.get("type") for choice in schema.get("anyOf", [schema])}
    flag, about = flag_of(name), schema.get("description", "")
    if "boolean" in kinds:
        off = f"/--no-{flag[2:]}" if schema.get("default") else ""
        return click.Option([name, flag + off], is_flag=True, default=None, help=about)
    if "enum" in schema:
        return click.Option([name, flag], type=click.Choice(schema["enum"]), help=about)
    metavar = "N" if "integer" in kinds else "A,B" if "array" in kinds else "JSON" if "object" in kinds else "TEXT"
    return click.Option([name, flag], type=_reader(kinds), metavar=metavar, help=about)


def _options(model: type[BaseModel], *without: str) -> list[click.Parameter]:
    """The properties of a request as flags."""
    return [_option(key, schema) for key, schema in model.model_json_schema()["properties"].items()
            if key not in without]


def _keys(model: type[BaseModel], *without: str) -> list[str]:
    """The names, on the wire, of a request's properties."""
    names = [field.alias or name for name, field in model.model_fields.items()]
    return [name for name in names if name not in without]


# ---- The commands ----

# Of the data folder: jobs are done, it is looked at, likewise but made if there is none, it is not needed.
Needs = Literal["workers", "data", "new", "nothing"]


class Command(NamedTuple):
    """A command: what it does with a client, the flags and words it takes, and what of a data folder it needs."""

    run: Callable[[Client], object]
    params: Callable[[], Sequence[click.Parameter]]
    needs: Needs


COMMANDS: dict[str, Command] = {}


def command(params: Callable[[], Sequence[click.Parameter]], needs: Needs = "workers") -> Callable[
        [Callable[[Client], object]], Callable[[Client], object]]:
    """Registers a function as the command of its name, and returns it unchanged."""
    def register(run: Callable[[Client], object]) -> Callable[[Client], object]:
        COMMANDS[run.__name__.removeprefix("do_")] = Command(run, params, needs)
        return run

    return register


_JSON = click.Option(["json", "--json"], is_flag=True, help="Print JSON instead of a table.")
_ID = _Argument("id", "A job's id; the command jobs lists them.", required=True)
_FILE = click.Path(readable=False)
_PROCESSES = click.Option(["processes", "--processes"], type=click.IntRange(1, 256), metavar="N",
                          help="Make the parts in so many processes at the same time (default: in this one).")
_OUT = click.Option(["out", "--out"], type=_FILE, metavar="FILE",
                    help="File to write; - is stdout. It is replaced once it is whole.")


def _making_options() -> list[click.Parameter]:
    """Of the commands that make a job with records or a file, and write these out."""
    return [_OUT, *_options(ExportRequest, "filters", "after"), _JSON,
            click.Option(["discard", "--discard"], is_flag=True,
                         help="Delete the records from the data folder after --out.")]


def _recipe_options() -> list[click.Parameter]:
    """Of the commands that say what records to make."""
    return [_Argument("type", "A preset, or a name for the records of a schema.", PRESETS, required=False),
            *_options(GenerateRequest, "recordType", "records", "schema"),
            click.Option(["schema", "--schema"], type=_FILE, metavar="FILE",
                         help="JSON file: a schema, or a whole /generate request; - is stdin.")]


def _check_out(out: str) -> None:
    """Raises SettingError unless a file can be written there, or in it, if it names a folder."""
    place = Path(os.path.realpath(out))
    if out != "-" and not place.parent.is_dir():
        raise SettingError(f"--out: there is no folder {place.parent}")
    if is_folder(out) and place.is_file():
        raise SettingError(f"--out: {place} is a file")
    if place.is_dir() and not is_folder(out):
        raise SettingError(f"--out: {out} is a folder; {out}/ gets one file a record type")


def _output(client: Client) -> dict[str, Json]:
    """The export that the flags ask for; SettingError if they do not fit, before any job is made."""
    request, out = client.body(*_keys(ExportRequest, "filters", "after")), str(client.flags["out"])
    name = Path(out).name.lower()
    if name.endswith(".gz"):
        name, request["gzip"] = name.removesuffix(".gz"), True
    by_suffix = {suffix: name for name, known in FORMATS.items() for suffix in known.suffixes}
    folder = is_folder(out)
    if folder:
        request["split"] = True
    told = "csv" if out == "-" or folder else by_suffix.get(name.rpartition(".")[2] if "." in name else "")
    if "format" not in request and not told:
        raise SettingError(f"--format is needed, since {out!r} does not tell: {', '.join(FORMATS)}")
    request.setdefault("format", told)
    if out == "-" and sys.stdout.isatty() and (
            FILE_TYPES[FORMATS[request["format"]].suffixes[0]].magic or request.get("gzip") or request.get("split")):
        raise SettingError("a terminal cannot show such a file; --out names one")
    _check_out(out)
    return request


def _types_of(request: Mapping[str, Json]) -> dict[str, Json]:
    """The filter on the record types that a /generate request makes."""
    name = str(request.get("recordType") or "")
    related = request.get("records") or ("schema" not in request and PRESETS.get(name, {}).get("records"))
    return {"recordType": [*related] if related else name or None}


def _recipe(client: Client) -> dict[str, Json]:
    """The /generate request that the file of --schema and the flags make."""
    chosen = client.body(*_keys(GenerateRequest, "recordType", "records", "schema"))
    if "type" in client.flags:
        chosen["recordType"] = client.flags["type"]
    path = client.flags.get("schema")
    if path is None:
        return chosen
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
        recipe = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise SettingError(f"--schema {path}: {error}") from None
    if not isinstance(recipe, dict):
        raise SettingError(f"--schema {path}: is not a JSON object")
    if not (recipe.keys() & {"schema", "records"} and recipe.keys() <= {*_keys(GenerateRequest)}):
        recipe = {"recordType": _type_named_like(Path(path).name), "schema": recipe}
    return recipe | chosen


def _print_json(value: Json) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _print_table(client: Client, items: Sequence[Json], cells: Callable[[Json], Sequence[object]],
                 names: Sequence[str] = ()) -> None:
    """Prints items as columns, or as JSON where that was asked for."""
    if client.flags.get("json"):
        _print_json(items)
        return
    rows = [[_printable(str(cell)) for cell in cells(item)] for item in items]
    if rows:
        print(tabulate(rows, names, tablefmt="plain", disable_numparse=True))


def _job_cells(job: Mapping[str, Json]) -> list[object]:
    request = job["request"]
    about = request.get("recordType") or request.get("filename") or request.get("format") or (
        json.dumps(job["result"], ensure_ascii=False) if job["result"] else "")
    changed = {name: (job["result"] or {}).get(name) for name in ("header", "encoding", "renamed")}
    said = [f"{name}: {told if isinstance(told, str) else len(told)}" for name, told in changed.items() if told]
    return [job["jobId"], job["type"], job["status"], f"{job['progress']['done']:,}", job["createdAt"], about,
            job["error"] or ", ".join(said)]


def _print_job(client: Client, job: Mapping[str, Json]) -> None:
    _print_table(client, [job], _job_cells)


def _hand_over(client: Client, job: Mapping[str, Json]) -> None:
    """Waits for an export, and writes its file to --out; the copy in the data folder goes."""
    done = client.follow(job["jobId"])
    try:
        client.save(done, client.flags["out"])
    except BrokenPipeError:
        client.ask("DELETE", f"/jobs/{job['jobId']}")
        raise
    client.ask("DELETE", f"/jobs/{job['jobId']}")
    if client.flags.get("discard") and job["after"]:
        client.ask("DELETE", f"/jobs/{job['after']}")


def _finish(client: Client, job: Mapping[str, Json], output: Mapping[str, Json] | None) -> None:
    """Waits for a job, and writes its records or its file to --out, if that was asked for."""
    if output is not None and _types_of(job["request"])["recordType"]:
        filters = {"jobId": job["jobId"], **_types_of(job["request"])}
        _hand_over(client, client.ask("POST", "/export", {**output, "filters": filters, "after": job["jobId"]}))
        return
    job = client.follow(job["jobId"])
    if output is None:
        _print_job(client, job)
    elif "download" in job["links"]:
        client.save(job, client.flags["out"])
    else:
        raise StartupError(f"{job['type']} jobs make neither records nor a file for --out")


def _insert(client: Client, job: Mapping[str, Json], path: Path) -> None:
    """Writes the records of a job into the tables of somebody's database, all or nothing."""
    client.follow(job["jobId"])
    filters = {"jobId": job["jobId"], **_types_of(job["request"])}
    done = client.follow(client.ask("POST", "/export", {"format": "sqlite", "filters": filters})["jobId"])
    with tempfile.TemporaryDirectory() as folder:
        client.save(done, str(Path(folder) / "made.sqlite"))
        try:
            counts = write_into(path, Path(folder) / "made.sqlite", _types_of_parts)
        except ValueError as error:
            raise StartupError(f"--into {path}: {error}; nothing was written") from None
        finally:
            client.ask("DELETE", f"/jobs/{done['jobId']}")
            if client.flags.get("discard"):
                client.ask("DELETE", f"/jobs/{job['jobId']}")
    _print_table(client, [*counts.items()], lambda item: item)


@command(lambda: [*_recipe_options(), *_making_options(), _PROCESSES, click.Option(
    ["into", "--into"], type=_FILE, metavar="FILE", help="SQLite database whose own tables get the records.")])
def do_generate(client: Client) -> None:
    """Makes records, of a preset or by a schema, and writes them to --out."""
    output, recipe = _output(client) if "out" in client.flags else None, _recipe(client)
    if client.flags.get("processes", 1) > 1 and not recipe.get("parts"):
        raise SettingError("--processes share out the parts of a request: give --parts too, some for each of them")
    if into := client.flags.get("into"):
        if output or not Path(into).is_file():
            raise SettingError(f"--into {into}: {'goes without --out' if output else 'there is no such database'}")
        _insert(client, client.ask("POST", "/generate", recipe), Path(into))
        return
    _finish(client, client.ask("POST", "/generate", recipe), output)


def _cells(record: Mapping[str, Json]) -> list[object]:
    return [cell if isinstance(cell, str) else "" if cell is None else json.dumps(cell, ensure_ascii=False)
            for cell in record.values()]


@command(lambda: [*_recipe_options(), _JSON], "nothing")
def do_preview(client: Client) -> None:
    """Prints some records, by default ten, and stores none."""
    records = client.ask("POST", "/preview", {"count": 10, **_recipe(client)})["records"]
    if client.flags.get("json"):
        _print_json(records)
        return
    by_type: dict[str, list[dict[str, Json]]] = records if isinstance(records, dict) else {"": records}
    for name, items in by_type.items():
        if name:
            print(f"{name}:")
        _print_table(client, items, _cells, [*items[0]] if items else ())


def _condition_options() -> list[click.Parameter]:
    about = "FIELD=VALUE or FIELD.OPERATOR=VALUE, such as age.gte=18 or plan.in=pro,team"
    return [click.Option(["where", "--where"], multiple=True, metavar="CONDITION", help=f"{about}; may be repeated."),
            click.Option(["or", "--or"], multiple=True, metavar="CONDITION",
                         help="Likewise, several joined with &; of those given one has to hold.")]


@command(lambda: [
    _Argument("type", "Record types, separated by commas; all if none is named.", required=False),
    *_options(Filters, "recordType", "where"), *_options(ExportRequest, "filters"), _OUT, *_condition_options()])
def do_export(client: Client) -> None:
    """Writes records to --out, by default to stdout."""
    client.flags = {"out": "-", **client.flags}
    filters = client.body(*_keys(Filters, "recordType", "where"))
    if "type" in client.flags:
        types = [name.strip() for name in client.flags["type"].split(",")]
        filters["recordType"] = types if len(types) > 1 else types[0]
    filters["where"] = where_of(pairs_in(client.flags.get("where", ())), client.flags.get("or", ()))
    request = {**_output(client), **client.body("after"), "filters": filters}
    _hand_over(client, {**client.ask("POST", "/export", request), "after": None})


def _reading_options() -> list[click.Parameter]:
    """Of the commands that read a file."""
    return [_Argument("file", f"File to read: {', '.join(INGEST_FORMATS)}, or .gz of these.", required=True,
                      type=_FILE),
            click.Option(["type", "--type"], metavar="TEXT", help="Record type (default: named like the file)."),
            *_options(IngestOptions, "recordType")]


def _send(client: Client, path: str) -> Json:
    file = Path(client.flags["file"])
    options = {"recordType": client.flags.get("type"), **client.body(*_keys(IngestOptions, "recordType"))}
    if not options["recordType"] and not options.get("split"):
        options["recordType"] = _type_named_like(file.name)
    return client.post_file(path, file, {name: str(value) for name, value in options.items() if value is not None})


@command(lambda: [*_reading_options(), _JSON])
def do_ingest(client: Client) -> None:
    """Makes records of a file."""
    _print_job(client, client.follow(_send(client, "/upload")["jobId"]))


@command(_reading_options, "nothing")
def do_infer(client: Client) -> None:
    """Prints a request that makes records like those of a file, for generate --schema."""
    _print_json(_send(client, "/infer"))


_ARCHIVE = _Argument("file", "A .tar.gz file.", required=True)


def _snapshots(client: Client) -> tuple[Snapshots, str]:
    """Those of the client's data folder, and a name for one more."""
    return Snapshots(DataFolder(client.folder)), f"backup-{secrets.token_hex(4)}"


@command(lambda: [_ARCHIVE], "data")
def do_backup(client: Client) -> None:
    """Writes all jobs, records and files of one moment to a .tar.gz file."""
    snapshots, name = _snapshots(client)
    client.ask("POST", "/snapshots", {"name": name})
    try:
        _replace(Path(str(client.flags["file"])), name, partial(snapshots.pack, name))
    finally:
        client.ask("DELETE", f"/snapshots/{name}")


@command(lambda: [_ARCHIVE], "new")
def do_restore(client: Client) -> None:
    """Makes all jobs, records and files those of a backup; what is there now is gone."""
    snapshots, name = _snapshots(client)
    try:
        snapshots.unpack(Path(str(client.flags["file"])), name)
    except StorageError as error:
        raise StartupError(str(error)) from None
    try:
        client.ask("POST", f"/snapshots/{name}/restore")
    finally:
        client.ask("DELETE", f"/snapshots/{name}")


def _get(client: Client, path: str, *keys: str) -> Json:
    return client.ask("GET", f"{path}?{urlencode(client.body(*keys))}")


@command(lambda: [_Argument("q", "Words to look for.", required=False), *_options(FieldsQuery, "q"), _JSON],
         "nothing")
def do_fields(client: Client) -> None:
    """Lists the types that a schema may use, those with a word in them, with a sample and their arguments."""
    answer = _get(client, "/fields", *_keys(FieldsQuery))
    if not answer["items"]:
        raise StartupError(f"no type has {client.flags['q']!r} in its name or its text")
    _print_table(client, answer["items"], lambda entry: (
        entry["type"], entry["kind"], json.dumps(entry["sample"], ensure_ascii=False)[:60],
        " ".join(arg["name"] for arg in entry["args"])))
    if answer.get("presets") and not client.flags.get("json"):
        print(f"presets: {' '.join(answer['presets'])}")


@command(lambda: [*_options(JobsQuery), _JSON], "data")
def do_jobs(client: Client) -> None:
    """Lists the jobs, newest first."""
    _print_table(client, _get(client, "/jobs", *_keys(JobsQuery))["items"], _job_cells)


@command(lambda: [_Argument("type", "A record type, to read its records.", required=False),
                  *_options(RecordsQuery, "or"), *_condition_options(), _JSON], "data")
def do_records(client: Client) -> None:
    """Lists the record types, with counts and fields; or the records of one."""
    if "type" not in client.flags:
        _print_table(client, client.ask("GET", "/records")["items"], lambda entry: (
            entry["recordType"], f"{entry['count']:,}", " ".join(entry["fields"])))
        return
    given = [*client.body(*_keys(RecordsQuery, "or")).items(), *pairs_in(client.flags.get("where", ())),
             *(("or", side) for side in client.flags.get("or", ()))]
    path = f"/records/{quote(client.flags['type'], safe='')}?{urlencode(given)}"
    if client.flags.get("format", "json") != "json":
        sys.stdout.buffer.writelines(client.send("GET", path, {}, io.BytesIO(), 0))
        return
    items = client.ask("GET", path)["items"]
    _print_table(client, items, _cells, [*items[0]] if items else ())


def _job_path(client: Client, form: str) -> str:
    return form.format(quote(client.flags["id"], safe=""))


@command(lambda: [_ID], "data")
def do_status(client: Client) -> None:
    """Prints a job, as JSON."""
    _print_json(client.ask("GET", _job_path(client, "/status/{}")))


@command(lambda: [_ID, _JSON], "data")
def do_cancel(client: Client) -> None:
    """Cancels a job that waits or runs."""
    _print_job(client, client.ask("POST", _job_path(client, "/jobs/{}/cancel")))


@command(lambda: [_ID], "data")
def do_delete(client: Client) -> None:
    """Deletes a finished job, its file and its records."""
    client.ask("DELETE", _job_path(client, "/jobs/{}"))


@command(lambda: [_ID, _JSON], "data")
def do_retry(client: Client) -> None:
    """Puts a job that failed or was canceled back to wait, for the server or resume to do it."""
    _print_job(client, client.ask("POST", _job_path(client, "/jobs/{}/retry")))


@command(lambda: [_ID, _OUT], "data")
def do_download(client: Client) -> None:
    """Writes the file of a job, an upload or an export, to --out, by default under its own name."""
    job = client.ask("GET", _job_path(client, "/status/{}"))
    if "download" not in job["links"]:
        raise StartupError(f"{job['type']} job {job['jobId']} is {job['status']} and has no file")
    out = client.flags.get("out") or file_label(job["result"]["filename"])
    if "out" not in client.flags and Path(out).exists():
        raise SettingError(f"{out} is there already; --out names another file, or this one to replace it")
    _check_out(out)
    client.save(job, out)


def _again(client: Client, job_id: str) -> Json:
    """A job, which waits again if it had failed; so does the one that it comes after."""
    job = client.ask("GET", f"/status/{job_id}")
    if job["status"] == JobStatus.COMPLETED:
        return job
    if job["after"]:
        _again(client, job["after"])
    return client.ask("POST", f"/jobs/{job_id}/retry") if JobStatus(job["status"]).finished else job


@command(lambda: [_ID, *_making_options(), _PROCESSES])
def do_resume(client: Client) -> None:
    """Goes on with a job that was interrupted, failed or canceled, and writes its file or records to --out."""
    output = _output(client) if "out" in client.flags else None
    job = _again(client, _job_path(client, "{}"))
    if output is not None and job["type"] == "export":
        _hand_over(client, job)
    else:
        _finish(client, job, output)


def all_commands() -> dict[str, Command]:
    """The commands above, and one for each other job type whose request is JSON, with the fields of that as flags."""
    def poster(kind: JobType) -> Callable[[Client], None]:
        def post_job(client: Client) -> None:
            job = client.ask("POST", f"/{kind.name}", client.body(*_keys(kind.model)))
            _finish(client, job, _output(client) if "out" in client.flags else None)

        post_job.__doc__ = kind.run.__doc__
        return post_job

    def params(kind: JobType) -> list[click.Parameter]:
        return [*_making_options(), *_options(kind.model)]

    own = {kind.name: Command(poster(kind), partial(params, kind), "workers")
           for kind in JOB_TYPES.values() if kind.posted and kind.name not in COMMANDS}
    return {**COMMANDS, **own}


# ---- The program: a command, or without one the server ----


class _NoWork(InlineRunner):
    """For commands that only look: jobs stay as they are."""

    def submit(self, call: Callable[[], None], /) -> None:
        """Leaves it undone."""


_LOCK_SECONDS = 3.0  # for a server that has the folder and is about to say where it serves, or is just leaving


def _open_or_url(settings: Settings, runner: Runner | None, processes: int) -> Service | str:
    """The data folder, opened; or where the server is that has it. StartupError if another process just keeps it."""
    until = monotonic() + _LOCK_SECONDS
    while True:
        try:
            return Service(settings, runner=runner, processes=processes)
        except InUse as held:
            about = held.holder
            if about and about["host"] != socket.gethostname():
                raise StartupError(f"{held}; run this on {about['host']}") from None
            if about.get("url"):
                return str(about["url"])
            if monotonic() > until:
                raise StartupError(f"{held}, which is no server; try again when it has ended") from None
            threading.Event().wait(0.05)


@contextmanager
def _signals(names: Sequence[str], handler: Callable[[], object]) -> Iterator[None]:
    """Calls `handler` on these signals, for as long as the block lasts."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda *_: handler()) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _client(needs: Needs, settings: Settings, flags: Mapping[str, Json], ended: list[bool]) -> Iterator[Client]:
    """A client of the data folder, or of the server that has it; `ended` gets False if a job came to no pause."""
    stopped = threading.Event()

    def stop(service: Service) -> None:
        if stopped.is_set():  # asked twice
            raise KeyboardInterrupt
        stopped.set()  # raising here could leave a lock taken, so the client raises at its next request
        service.queue.stopping.set()

    with ExitStack() as stack:
        # The limit, and the token, are for clients from elsewhere.
        local = settings.model_copy(update={"max_upload_bytes": 2**50, "token": None})
        if needs == "nothing":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="taskapi")))
            local = local.model_copy(update={"data_dir": folder, "database": None})
        elif needs == "data" and not local.database_path.exists():
            raise StartupError(f"there is no data folder {local.data_dir.absolute()}; --data-dir names another")
        processes = flags.get("processes", 1)
        opened = _open_or_url(local, None if needs == "workers" else _NoWork(), processes)
        if isinstance(opened, str):
            if processes > 1:
                raise SettingError(f"--processes: the server at {opened} has this data folder and makes its records "
                                   "itself, in one process; leave it out, or give another --data-dir")
            client = Client(_http_transport(opened, settings.token), flags, url=opened, folder=local.data_dir)
            if (client.ask("GET", "/health") or {}).get("service") != "taskapi":
                raise StartupError(f"what answers at {opened} is not taskapi")
            yield client
            return
        stack.enter_context(_signals(["SIGINT", "SIGTERM"], partial(stop, opened)))
        stack.callback(lambda: ended.append(opened.close(_DRAIN_SECONDS if needs == "workers" else 0)))
        yield Client(_app_transport(opened.app), flags, stopped.is_set, folder=local.data_dir)


def _goes_on(client: Client, settings_given: Sequence[str]) -> str:
    """What to tell somebody who has interrupted a command."""
    if client.job_id is None:
        return "interrupted"
    program = [sys.executable, sys.argv[0]] if sys.argv[0].endswith(".py") else ["taskapi"]
    out = [f"--out={client.flags['out']}"] if "out" in client.flags else []
    out += ["--discard"] if client.flags.get("discard") else []
    out += [f"--processes={client.flags['processes']}"] if "processes" in client.flags else []
    again = shlex.join([*program, "resume", client.job_id, *settings_given, *out])
    if client.url:
        return f"interrupted; the server at {client.url} goes on with job {client.job_id}. To wait for it:\n  {again}"
    return f"interrupted; job {client.job_id} is kept. To go on with it:\n  {again}"


def _leave(code: int, ended: bool) -> None:
    """Ends the process if a job came to no pause: the next start takes it up, but Python would wait for its thread."""
    if not ended:
        logging.shutdown()
        os._exit(code)


def _settings_of(context: click.Context) -> tuple[dict[str, Json], dict[str, str]]:
    """The settings that flags, variables and the file give, and what each is called there."""
    values: dict[str, Json] = {}
    sources: dict[str, str] = {}
    for level in filter(None, [context.parent, context]):  # a flag after the command wins over one before it
        for option in level.command.params:
            if isinstance(option, _Setting) and (value := level.params.get(name := str(option.name))) is not None:
                spelled = {ParameterSource.ENVIRONMENT: variable_of(name), ParameterSource.DEFAULT_MAP: name}
                values[name] = value
                source = level.get_parameter_source(name)
                sources[name] = spelled.get(source, flag_of(name)) if source else name
    return values, sources


def run_command(entry: Command, context: click.Context) -> int:
    """Runs a command with the flags of its context, and returns its exit code."""
    values, sources = _settings_of(context)
    if "log_level" not in values or not sources["log_level"].startswith("--"):
        values["log_level"] = "warning"  # that of the variable or the file is the server's
    settings = Settings.of(values, sources)
    _set_up_logging(settings)
    flags = {str(param.name): context.params[str(param.name)] for param in context.command.params
             if not isinstance(param, _Setting) and (
                 context.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE)}
    ended: list[bool] = []
    note = ""
    try:
        with _client(entry.needs, settings, flags, ended) as client:
            try:
                entry.run(client)
                sys.stdout.flush()
            except KeyboardInterrupt:
                note = _goes_on(client, [f"{source}={values[name]}" for name, source in sources.items()
                                         if source.startswith("--") and name != "token"])
                raise
        return 0
    except KeyboardInterrupt:
        print(f"taskapi: {note or 'interrupted'}", file=sys.stderr)
    except BrokenPipeError:  # whoever read stdout has seen enough; Python would complain when it flushes at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"taskapi: {error.filename or 'stdout'}: {error.strerror}", file=sys.stderr)
    _leave(1, all(ended) or entry.needs != "workers")
    return 1


def serve(settings: Settings) -> int:
    """Runs the server, and returns the exit code once it has stopped."""
    _set_up_process(settings)
    with Service(settings) as service:
        server = HttpServer(service, service.app, settings.host, settings.port)
        service.announce(server.url)
        with _signals(["SIGINT", "SIGTERM", "SIGBREAK"], server.stop):
            print(f"taskapi {__version__} at {server.url} with data in {service.folder.root} (Ctrl-C stops it)",
                  flush=True)
            server.run(leave=service.queue.halt)
            ended = service.close(_DRAIN_SECONDS)
    _leave(0, ended)
    return 0


def _start(**_: Json) -> int:
    """What the program does before any command: checks the settings' names, and serves if there is no command."""
    context = click.get_current_context()
    if isinstance(context.command, click.Group):
        refuse_unknown_settings(os.environ, context.default_map or {})
        if context.invoked_subcommand:
            return 0
    return serve(Settings.of(*_settings_of(context)))


class _Program(click.Group):
    """The commands; without one, the server."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return ["serve", *all_commands()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command with its flags, and those of the settings; the server's others too, though it is not told."""
        if cmd_name == "serve":
            return click.Command("serve", params=[_Setting(name) for name in Settings.model_fields], callback=_start,
                                 help="Starts the server, as the program does without a command.")
        entry = all_commands().get(cmd_name)
        if entry is None:
            return None
        settings = [_Setting(name, hidden=name not in ("data_dir", "database")) for name in Settings.model_fields]
        by_flag = {param.opts[-1]: param for param in (*settings, *entry.params())}  # the command's own win
        return click.Command(cmd_name, params=[*by_flag.values()], help=entry.run.__doc__,
                             callback=lambda **_: run_command(entry, click.get_current_context()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[
            str | None, click.Command | None, list[str]]:
        """The command that the first word names; SettingError with the nearest one if there is none."""
        names = self.list_commands(ctx)
        if args[0] not in names and not ctx.resilient_parsing:
            raise SettingError(f"there is no command {args[0]!r}{did_you_mean(args[0], names)}; there are: "
                               f"{', '.join(names)}; without one, the server starts")
        return super().resolve_command(ctx, args)


def _usage_error(error: click.UsageError) -> SettingError:
    """What click found wrong, as one line that names the nearest flag."""
    known = [flag for param in (error.ctx.command.params if error.ctx else ()) for flag in param.opts]
    if isinstance(error, click.NoSuchOption):
        return SettingError(f"unknown flag {error.option_name}{did_you_mean(error.option_name, known)}")
    if isinstance(error, click.MissingParameter) and isinstance(error.param, _Argument):
        return SettingError(f"{error.param.human_readable_name} is missing: {error.param.help}")
    return SettingError(" ".join(error.format_message().split()))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: runs a command, or without one the server; returns the exit code."""
    program = _Program(
        "taskapi", params=[*map(_Setting, Settings.model_fields)], callback=_start, invoke_without_command=True,
        help="A data task server: generates records, takes uploads and writes exports in the background.",
        epilog="Each setting is a variable too (--max-records: TASKAPI_MAX_RECORDS), or a key of taskapi.toml "
               "(max_records); flags win over variables, variables over the file. The commands work without a server "
               "and beside one.")
    program = click.version_option(__version__, prog_name="taskapi", message="%(prog)s %(version)s")(program)
    try:
        return int(program.main(
            [*(sys.argv[1:] if argv is None else argv)], "taskapi", standalone_mode=False,
            auto_envvar_prefix="TASKAPI", default_map=read_settings_file(os.environ, Path.cwd())) or 0)
    except click.UsageError as error:
        failure: StartupError = _usage_error(error)
    except StartupError as error:
        failure = error
    except BadRequest as error:  # conditions that are none
        failure = SettingError(str(error))
    print(f"taskapi: {failure}", file=sys.stderr)
    return failure.exit_code


# ---- pytest: fixtures, as a plugin where the package is installed, by import where this file is copied ----


class ServedUrl(str):
    """The URL of a service, with all that the service has."""

    _service: Service

    def __new__(cls, url: str, service: Service) -> Self:
        """The text that it is."""
        made = super().__new__(cls, url)
        made._service = service
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)


@lru_cache(maxsize=1)
def _fixtures() -> types.ModuleType:
    """The fixtures, in a module of their own, since pytest must not be imported with this one."""
    import pytest

    clock = partial(datetime, 2026, 1, 1, tzinfo=UTC)
    fixtures = types.ModuleType("taskapi_fixtures")

    options: Any = {"clock": clock, "seed": 1, "test_controls": True}

    @pytest.fixture
    def taskapi_service(tmp_path: Path) -> Iterator[Service]:
        """A service in a temporary folder whose jobs run at once; the same requests make the same records."""
        with open_service(tmp_path / "taskapi", inline=True, **options) as service, service.serving(port=0):
            yield service

    @pytest.fixture
    def taskapi_server(tmp_path: Path) -> Iterator[str]:
        """The URL of a live server in this process, on a free port, with its data in a temporary folder.

        It has the attributes of the Service too, for one `faults`.
        """
        with open_service(tmp_path / "taskapi-server", **options) as service, service.serving(port=0) as url:
            yield ServedUrl(url, service)

    vars(fixtures).update(taskapi_service=taskapi_service, taskapi_server=taskapi_server)
    return fixtures


def pytest_configure(config: Any) -> None:
    """Makes this module a pytest plugin."""
    config.pluginmanager.register(_fixtures(), "taskapi_fixtures")


def __getattr__(name: str) -> Any:
    """Lets a test module or conftest.py import the fixtures by name."""
    if name in ("taskapi_service", "taskapi_server"):
        return getattr(_fixtures(), name)
    raise AttributeError(f"module 'taskapi' has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
