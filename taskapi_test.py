"""The tests of taskapi: the tools, then the rooms of the module in their order, properties, crashes, the house."""
from __future__ import annotations

import ast
import base64
import contextlib
import csv
import datetime as dt
import enum
import gc
import gzip
import hashlib
import http.client
import http.server
import importlib.metadata
import inspect
import io
import itertools
import json
import logging
import lzma
import math
import multiprocessing
import os
import pickle
import random
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import tomllib
import types
import urllib
import urllib.request
import warnings
import wsgiref.util
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from symtable import SymbolTable, symtable
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit
from uuid import UUID

import bottle
import click
import faker
import hypothesis.strategies as st
import jsonschema
import pytest
import sqlite_utils
import webtest
from hypothesis import HealthCheck, Phase, example, given, settings, stateful
from pydantic import BaseModel, Field, ValidationError
from pydantic.alias_generators import to_camel

import taskapi
from taskapi import BadRequest, Kind, Plan, Recipe, RecordSpec, RowSource, TaskError, preset_records

# ==== Builders ====


HERE = Path(__file__).parent

PERSONS = {"recordType": "person", "count": 10, "seed": 1}
BUSY = {"recordType": "person", "count": 2_000_000, "seed": 1}  # more than any test waits for
settings.register_profile("quick", deadline=None, max_examples=25, suppress_health_check=list(HealthCheck),
                          derandomize="HYPOTHESIS_RANDOM" not in os.environ)  # with it, each run looks at others
settings.load_profile("quick")


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What `condition` returns once that is true; asks often, and gives up after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition has not come true"
        threading.Event().wait(0.01)
    return value


class Answer(NamedTuple):
    """A response, read to its end."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


SEEN: set[tuple[str, str, int]] = set()  # what the tests so far have met: method, path, status


def ask(url: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """One request on a connection of its own; a dict goes as JSON."""
    if isinstance(body, dict):
        body, headers = json.dumps(body), {"Content-Type": "application/json", **(headers or {})}
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        SEEN.add((method, urlsplit(path).path, response.status))
        return Answer(response.status, response.headers, response.read())


def items(url: str, path: str, most: int = 2**23) -> list[Any]:
    """All items of a list that comes in pages, none of which is longer than `most` bytes unless it has one item."""
    found, after = [], ""
    while after is not None:
        answer = ask(url, "GET", f"{path}{after and '&after=' + after}")
        assert len(answer.body) <= most or len(answer.json["items"]) == 1
        found += answer.json["items"]
        after = answer.json["next"]
    return found


@contextmanager
def plug(url: str) -> Iterator[socket.socket]:
    """A raw connection to the server."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        yield connection


def rest(connection: socket.socket) -> bytes:
    """All that still comes, until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def parsed(data: bytes) -> Answer:
    """The (final) response in what a raw connection brought."""
    class Wire:
        def makefile(self, _: str) -> io.BytesIO:
            return io.BytesIO(data)

    response = http.client.HTTPResponse(Wire())  # type: ignore[arg-type]
    response.begin()
    return Answer(response.status, response.headers, response.read())


def raw(url: str, data: bytes) -> Answer:
    """What the server answers to these bytes."""
    with plug(url) as connection:
        connection.sendall(data)
        return parsed(rest(connection))


def refused(answer: Answer, status: int, *words: str) -> dict[str, Any]:
    """Asserts an error of the contract's shape that says all of `words`; returns it."""
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json
    assert body["status"] == status
    assert isinstance(body["error"], str)
    assert 0 < len(body["error"]) < 1000
    assert body.keys() <= {"error", "status", "fields"}
    assert all(problem.keys() == {"field", "message"} for problem in body.get("fields", []))
    assert "Traceback" not in body["error"]
    assert not [word for word in words if word not in json.dumps(body, ensure_ascii=False)], body
    return body


FORM = {"Content-Type": "multipart/form-data; boundary=XX"}


def part(content: bytes = b"a,b\n1,2\n", name: str = "a.csv", field: str = "file", extra: str = "") -> bytes:
    """One file part of a form, without the end of the form."""
    label = name.replace('"', "%22")
    return f'--XX\r\nContent-Disposition: form-data; name="{field}"; filename="{label}"\r\n{extra}\r\n'.encode() + (
        content + b"\r\n")


def form(*args: Any, **kwargs: Any) -> bytes:
    """A whole form of one file."""
    return part(*args, **kwargs) + b"--XX--\r\n"


def text_part(name: str, value: str) -> bytes:
    """One text part of a form."""
    return f'--XX\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


INGESTED = 45
INGEST = part(b"n,text\n" + b"".join(b"%d,t%d\n" % (n, n) for n in range(INGESTED))) + (
    b'--XX\r\nContent-Disposition: form-data; name="recordType"\r\n\r\nthing\r\n--XX--\r\n')


class HeldRunner:
    """Keeps what is submitted until a test steps it."""

    def __init__(self) -> None:
        self.calls: deque[Callable[[], None]] = deque()

    def submit(self, call: Callable[[], None], /) -> None:
        self.calls.append(call)

    def step(self) -> None:
        self.calls.popleft()()

    def run(self) -> None:
        while self.calls:
            self.step()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.calls.clear()


@contextmanager
def held(folder: Path, **kwargs: Any) -> Iterator[tuple[taskapi.Service, HeldRunner]]:
    """A service whose jobs go on only when its runner is stepped."""
    runner = HeldRunner()
    service = taskapi.open_service(folder, runner=runner, **kwargs)
    try:
        yield service, runner
    finally:
        service.close(0)


def statuses(service: taskapi.Service) -> list[str]:
    """Of all jobs, the oldest first."""
    return [str(job.status) for job in reversed(service.queue.jobs.page(None, None, 100, None)[0])]


class FakeClock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class ScriptRequest(taskapi.JobRequest):
    """Names what a test has put into SCRIPTS."""

    script: str = Field("one", description="Which one.")


SCRIPTS: dict[str, Callable[[taskapi.JobContext], taskapi.JobSteps]] = {}


@taskapi.job_type("script", ScriptRequest)
def run_script(context: taskapi.JobContext, request: ScriptRequest) -> taskapi.JobSteps:
    """Does what the test wants."""
    return (yield from SCRIPTS[request.script](context))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Decorator: what jobs of type `script` do in this test."""
    def register(function: Callable[..., Any], name: str = "one") -> Callable[..., Any]:
        monkeypatch.setitem(SCRIPTS, name, function)
        return function

    @register
    def nothing(context: taskapi.JobContext) -> taskapi.JobSteps:
        yield
        return taskapi.JobResult({})

    return register


class RowsRequest(taskapi.JobRequest):
    """Records as they are."""

    record_type: str = Field("thing", description="Where they go.")
    columns: dict[str, str] = Field(description="Their kinds.")
    rows: list[list[Any]] = Field(description="Their values.")

    @property
    def makes(self) -> str:
        return self.record_type


@taskapi.job_type("rows", RowsRequest)
def run_rows(context: taskapi.JobContext, request: RowsRequest) -> taskapi.JobSteps:
    """Stores the rows it is given."""
    job, name, rows = context.job, request.record_type, [tuple(row) for row in request.rows]
    context.records.open_job(job, {name: request.columns}, {name: len(rows)})
    context.save(taskapi.Progress(done=len(rows), total=len(rows)), {"stored": len(rows)}, lambda connection: (
        context.records.append(connection, job, name, list(request.columns), rows)))
    yield
    return taskapi.JobResult({"records": len(rows)})


def store(service: taskapi.Service, columns: dict[str, str], rows: Sequence[Sequence[Any]],
          record_type: str = "thing") -> taskapi.Job:
    """Makes a completed job with these records, in a service that works inline."""
    job = service.enqueue("rows", {"recordType": record_type, "columns": columns, "rows": [list(row) for row in rows]})
    assert job.status == "completed", job.error
    return job


def exported(service: taskapi.Service, export_format: str, record_type: str | None = "thing", /, where: Any = None,
             filters: dict[str, Any] | None = None, **request: Any) -> bytes:
    """The file of an export, made inline."""
    chosen = {"recordType": record_type, "where": where or {}, **(filters or {})}
    job = service.enqueue("export", {"format": export_format, **request, "filters": {
        key: value for key, value in chosen.items() if value is not None}})
    assert job.status == "completed", job.error
    data = (service.folder.root / job.file.path).read_bytes()
    assert job.result | {} == {"filename": job.file.filename, "bytes": len(data), "records": job.result["records"],
                               "sha256": hashlib.sha256(data).hexdigest()}
    return data


def quoted(name: str) -> str:
    """A name as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


def plain(folder: Path, query: str, *values: Any) -> list[Any]:
    """What plain sqlite3 answers: rows, or values where rows have one."""
    with closing(sqlite3.connect(folder / "taskapi.db")) as connection:
        rows = connection.execute(query, values).fetchall()
    return [row[0] if len(row) == 1 else row for row in rows]


def leftovers(folder: Path) -> tuple[int, int, int]:
    """Threads, descriptors, and files that SQLite keeps beside an open database."""
    beside = [*folder.glob("*-wal"), *folder.glob("*-shm")]
    return threading.active_count(), len(os.listdir("/proc/self/fd")), len(beside)


def assert_sound(folder: Path) -> None:
    """Asserts that a data folder is whole: the database, one file a job that has one, and no leftovers."""
    assert plain(folder, "PRAGMA integrity_check") == ["ok"]
    files = plain(folder, "SELECT json_extract(file, '$.path'), json_extract(file, '$.sha256'), "
                          "json_extract(file, '$.bytes') FROM jobs WHERE file IS NOT NULL")
    stored = {f"{path.parent.name}/{path.name}": path.read_bytes() for kind in ("uploads", "exports")
              for path in (folder / kind).iterdir()}
    assert sorted(files) == sorted((path, hashlib.sha256(data).hexdigest(), len(data)) for path, data in stored.items())
    assert not [*(folder / "tmp").iterdir()]


def own_environ() -> dict[str, str]:
    """The environment of a program that is to find taskapi, and no settings."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TASKAPI_")}
    return environ | {"PYTHONPATH": str(Path(taskapi.__file__).parent)}


class Live:
    """A server in a process of its own, on a free port; its stderr is kept beside the data folder."""

    def __init__(self, folder: Path, *flags: str, wrap: Sequence[str] = (), program: str = taskapi.__file__):
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, folder.parent / "stderr.txt"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*wrap, sys.executable, program, "--data-dir", str(folder), "--port", "0", *flags],
                stdout=subprocess.PIPE, stderr=log, text=True, env=own_environ(), cwd=folder.parent)
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait(60)
            self.process.stdout.close()
            raise AssertionError(f"the server ended with {code}: {self.log.read_text()}")
        self.line, self.url = line, re.search(r"http://\S+", line)[0]

    def ask(self, *args: Any, **kwargs: Any) -> Answer:
        return ask(self.url, *args, **kwargs)

    def make(self, path: str, body: dict[str, Any]) -> str:
        """Posts a job; returns its id."""
        answer = self.ask("POST", path, body)
        assert answer.status == 202, answer.body
        return answer.json["jobId"]

    def job(self, job_id: str, wait: float = 0) -> dict[str, Any]:
        return self.ask("GET", f"/status/{job_id}?wait={wait}").json

    def end(self, how: int = signal.SIGTERM) -> int:
        """Sends a signal; returns the exit code."""
        self.process.send_signal(how)
        code = self.process.wait(60)
        self.process.stdout.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)
        self.process.stdout.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[taskapi.Service]:
    """A service that runs jobs inline."""
    with taskapi.open_service(tmp_path / "data", inline=True) as service:
        yield service


@pytest.fixture
def url(service: taskapi.Service) -> Iterator[str]:
    """The inline service, served."""
    with service.serving(port=0) as url:
        yield url


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server in a process of its own that the tests which leave nothing behind share."""
    with Live(tmp_path_factory.mktemp("live") / "data", "--max-upload-bytes", "200000") as live:
        yield live


POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has other signals, pipes and rights to make links")


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Ran(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command in this process, in `tmp_path`; its data folder is `data` there."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TASKAPI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # a command sets up its own

    def run(*argv: str) -> Ran:
        capsys.readouterr()
        return Ran(taskapi.main(argv), *capsys.readouterr())

    return run


SERVED = [entry for entry in taskapi.all_routes() if not getattr(
    entry.body, "__module__", "").startswith("taskapi_test")]  # by a Live, which does not know our job types


# ==== 1 Errors ====

JSON = {"Content-Type": "application/json"}
WRONG_REQUESTS = {
    "broken JSON": (400, "POST", "/generate", "{", JSON),
    "an empty body": (400, "POST", "/generate", "", JSON),
    "JSON that is no object": (400, "POST", "/generate", "[1]", JSON),
    "bytes that are not UTF-8": (400, "POST", "/generate", b'{"recordType": "\xff", "count": 1}', JSON),
    "NaN": (400, "POST", "/export", '{"format": "csv", "filters": {"where": {"a": {"gt": NaN}}}}', JSON),
    "a number that is infinite": (400, "POST", "/generate", ('{"count": 1, "schema": {"a": {"type": "const", "value": '
                                  '1e999}}}'), JSON),
    "a lone surrogate": (400, "POST", "/export", r'{"format": "csv", "orderBy": "\ud800"}', JSON),
    "deep nesting": (400, "POST", "/generate", '{"schema":' * 50_000, JSON),
    "an unknown field": (400, "POST", "/generate", {**PERSONS, "sead": 1}, None, "sead", "seed"),
    "no count": (400, "POST", "/generate", {"recordType": "person"}, None, "count"),
    "count as text": (400, "POST", "/generate", {"count": "10"}, None, "count"),
    "count as a float": (400, "POST", "/generate", {"count": 10.5}, None, "count"),
    "count zero": (400, "POST", "/generate", {"count": 0}, None, "count"),
    "count beyond 64 bits": (400, "POST", "/generate", {"count": 2**70}, None, "count"),
    "count over MAX_RECORDS": (400, "POST", "/generate", {"count": 10_000_001}, None, "count", "TASKAPI_MAX_RECORDS"),
    "a seed beyond 64 bits": (400, "POST", "/generate", {**PERSONS, "seed": 2**63}, None, "seed"),
    "a bad now": (400, "POST", "/generate", {**PERSONS, "now": "soon"}, None, "now"),
    "the record type jobs": (400, "POST", "/generate", {"recordType": "jobs", "count": 1}, None, "recordType"),
    "a record type sqlite...": (400, "POST", "/generate", {"recordType": "sqlite_x", "count": 1}, None, "recordType"),
    "a record type in capitals": (400, "POST", "/generate", {"recordType": "Person", "count": 1}, None, "recordType"),
    "a preset misspelt": (400, "POST", "/generate", {"recordType": "persno", "count": 1}, None, "person"),
    "a preview too long": (400, "POST", "/preview", {**PERSONS, "count": 101}, None, "count"),
    "an export without format": (400, "POST", "/export", {}, None, "format"),
    "a format misspelt": (400, "POST", "/export", {"format": "cvs"}, None, "csv"),
    **{f"the filters {filters}": (400, "POST", "/export", {"format": "csv", "filters": filters}, None, *words)
       for filters, *words in (
           ({"recordtype": "a"}, "filters.recordtype: is not known here; did you mean 'recordType'"),
           ({"type": "a"}, "filters.type: is not known here; did you mean 'recordType'"),
           ({"where": {"a": {"gtt": 1}}}, "filters.where.a: no such operator 'gtt'; did you mean 'gt'"),
           ({"where": json.loads('{"or": [' * 40 + '{"a": {"eq": 1}}' + "]}" * 40)}, "more than 5 deep"),
           ({"where": {"or": []}}, "filters.where.or: "), ({"where": {"or": [{}]}}, "an alternative under `or` names"),
           ({"where": {"or": [{"a": 1}]}}, r'filters.where.or.0.a: say {\"eq\": 1}'),
           ({"where": {"a": {"between": [1, 2]}}}, "there are: eq, ne, lt, lte, gt, gte, in, notIn, like, notLike"),
           ({"where": {"a": 18}}, r'filters.where.a: say {\"eq\": 18}'),
           ({"where": {"a": ["b"]}}, r'{\"eq\": [\"b\"]}'))},
    "a negative limit": (400, "POST", "/export", {"format": "csv", "limit": -1}, None, "limit"),
    "an unknown query": (400, "GET", "/jobs?stat=pending", None, None, "stat"),
    "an unknown status": (400, "GET", "/jobs?status=done", None, None, "status"),
    "a cursor that is none": (400, "GET", "/jobs?after=garbage", None, None, "after"),
    "a query given twice": (400, "GET", "/jobs?limit=1&limit=2", None, None, "limit"),
    "limit zero": (400, "GET", "/jobs?limit=0", None, None, "limit"),
    "a wait too long": (400, "GET", "/status/x?wait=31", None, None, "wait"),
    "a wait that is no number": (400, "GET", "/status/x?wait=nan", None, None, "wait"),
    "a path that is not UTF-8": (400, "GET", "/status/%ff", None, None),
    "an empty Idempotency-Key": (400, "POST", "/generate", PERSONS, {"Idempotency-Key": ""}, "Idempotency-Key"),
    "another site's origin": (403, "POST", "/generate", PERSONS, {"Origin": "http://evil.example"}),
    "an origin of null": (403, "POST", "/generate", PERSONS, {"Origin": "null"}),
    "another port's origin": (403, "POST", "/generate", PERSONS, {"Origin": "http://127.0.0.1:1"}),
    "a malformed origin": (403, "POST", "/generate", PERSONS, {"Origin": "http://[bad"}),
    "a cross-site fetch": (403, "DELETE", "/jobs/x", None, {"Sec-Fetch-Site": "cross-site"}),
    "a cross-site upload": (403, "POST", "/upload", form(), {**FORM, "Sec-Fetch-Site": "same-site"}),
    **{f"a cross-site look at {path}": (403, "GET", path, None, {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode})
       for path, site, mode in (("/fields?locale=de", "cross-site", "navigate"), ("/metrics", "same-site", "no-cors"),
                                ("/records", "cross-site", "cors"), ("/", "cross-site", "no-cors"))},
    "a look with another site's origin": (403, "GET", "/jobs", None, {"Origin": "http://evil.example"}),
    "a foreign host": (421, "GET", "/", None, {"Host": "evil.example"}),
    "a foreign host with our name": (421, "GET", "/", None, {"Host": "127.0.0.1.evil.example"}),
    "an unknown path": (404, "GET", "/statsu", None, None, "/statsu"),
    "an unknown job": (404, "GET", "/status/0192", None, None, "0192"),
    "an unknown job's file": (404, "GET", "/download/0192", None, None),
    "an unknown job to cancel": (404, "POST", "/jobs/0192/cancel", None, None),
    "an unknown job to retry": (404, "POST", "/jobs/0192/retry", None, None),
    "an unknown job to delete": (404, "DELETE", "/jobs/0192", None, None),
    "an unknown record type": (404, "GET", "/records/nobody", None, None, "nobody"),
    "a record type that is SQL": (404, "GET", "/records/%22%3B--", None, None),
    "a path upwards": (404, "GET", "/download/..%2F..%2Ftaskapi.db", None, None),
    "a NUL in an id": (404, "GET", "/status/%00", None, None),
    "a body over 1 MiB": (413, "POST", "/generate", b" " * (2**20 + 1), JSON),
    "JSON as plain text": (415, "POST", "/generate", "{}", {"Content-Type": "text/plain"}, "application/json"),
    "JSON as a form": (415, "POST", "/export", "{}", {"Content-Type": "application/x-www-form-urlencoded"}),
    "JSON without a type": (415, "POST", "/preview", b"{}", {}),
    "headers too large": (431, "GET", "/", None, {"X-Long": "x" * 70_000}),
}


def named(cases: dict[str, Any]) -> list[Any]:
    """The cases as parameters."""
    return [pytest.param(case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize("case", named(WRONG_REQUESTS))
def test_a_wrong_request_is_answered_in_the_one_shape_of_errors(live: Live, case: Any) -> None:
    """Every row of the contract's error table that a single request can meet."""
    status, method, path, body, headers, *words = case
    answer = refused(live.ask(method, path, body, headers), status, *words)
    assert not words or status != 400 or answer["fields"]


@pytest.mark.parametrize(("method", "path", "allow"), [
    ("PUT", "/generate", {"POST"}), ("GET", "/export", {"POST"}), ("POST", "/", {"GET", "HEAD"}),
    ("DELETE", "/status/x", {"GET", "HEAD"}), ("GET", "/jobs/x/cancel", {"POST"}),
    ("PATCH", "/jobs/x", {"DELETE", "GET", "HEAD"})])
def test_a_wrong_method_is_told_the_right_ones(live: Live, method: str, path: str, allow: set[str]) -> None:
    """405 carries Allow."""
    answer = live.ask(method, path)
    refused(answer, 405)
    assert set(answer.headers["Allow"].replace(" ", "").split(",")) == allow | {"OPTIONS"}


def test_conflicts_are_409(live: Live) -> None:
    """To cancel or retry a finished job, to delete a running one, to use a key for another request."""
    job_id = live.make("/generate", PERSONS)
    assert live.job(job_id, 30)["status"] == "completed"
    refused(live.ask("POST", f"/jobs/{job_id}/cancel"), 409, "completed")
    refused(live.ask("POST", f"/jobs/{job_id}/retry"), 409, "completed")
    key = {"Idempotency-Key": "conflict"}
    assert live.ask("POST", "/generate", PERSONS, key).status == 202
    refused(live.ask("POST", "/generate", {**PERSONS, "count": 11}, key), 409, "Idempotency-Key")
    refused(live.ask("POST", "/export", {"format": "csv"}, key), 409, "Idempotency-Key")
    job_id = live.make("/generate", BUSY)
    refused(live.ask("DELETE", f"/jobs/{job_id}"), 409, "cancel")
    assert live.ask("POST", f"/jobs/{job_id}/cancel").json["status"] == "canceled"
    assert live.ask("DELETE", f"/jobs/{job_id}").status == 204


@pytest.mark.parametrize(("error", "said"), [
    (ZeroDivisionError("secret of /etc/passwd"), r"internal error (\w{8}): the server's log has the details"),
    (taskapi.StorageError("no such luck"), r"no such luck \(error (\w{8}) in the server's log\)")])
def test_a_bug_or_a_failing_database_is_answered_with_the_entry_of_the_log(
        service: taskapi.Service, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        error: Exception, said: str) -> None:
    """500; of a bug that is all, and the log has its traceback."""
    monkeypatch.setattr(service.queue.jobs, "page", raising(error))
    body = refused(ask(url, "GET", "/jobs"), 500)
    number = re.fullmatch(said, body["error"])[1]
    entry, = (record for record in caplog.records if number in record.getMessage())
    assert "GET /jobs" in entry.getMessage()
    assert bool(entry.exc_info) == isinstance(error, ZeroDivisionError)


def test_a_full_queue_and_a_stopping_service_are_503_with_retry_after(tmp_path: Path, script: Any) -> None:
    """Refused inside the insert; reading goes on."""
    with held(tmp_path, max_pending=2) as (service, _), service.serving(port=0) as url:
        jobs = [ask(url, "POST", "/script", {}) for _ in range(3)]
        assert [answer.status for answer in jobs] == [202, 202, 503]
        refused(jobs[2], 503, "full")
        assert jobs[2].headers["Retry-After"].isdecimal()
        service.queue.stop(0)
        stopping = ask(url, "POST", "/script", {})
        refused(stopping, 503, "stopping")
        assert stopping.headers["Retry-After"].isdecimal()
        refused(ask(url, "POST", "/upload", form(), FORM), 503, "stopping")
        assert ask(url, "GET", "/jobs?status=pending").status == 200
        assert not [*(tmp_path / "tmp").iterdir()]


# ==== 2 Settings ====


@pytest.fixture
def load(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Callable[..., taskapi.Settings]:
    """What the server would be started with, from flags and TASKAPI_ variables and a file in `tmp_path`."""
    def load(*argv: str, **environ: str) -> taskapi.Settings:
        chosen: list[taskapi.Settings] = []
        with monkeypatch.context() as patch:
            patch.setattr(taskapi, "serve", lambda settings: chosen.append(settings) or 0)
            for name, value in environ.items():
                patch.setenv(f"TASKAPI_{name}", value)
            ran = run(*argv)
        if ran.code:
            raise AssertionError(ran)
        return chosen[0]

    return load


def test_flags_win_over_variables_over_the_file_over_defaults(
        tmp_path: Path, load: Callable[..., taskapi.Settings]) -> None:
    """Each source in turn; with the command serve and without it."""
    assert load() == load("serve") == taskapi.Settings()
    (tmp_path / "taskapi.toml").write_text('workers = 5\nthreads = 9\nport = 1\nupload_types = ["csv", "json"]\n')
    chosen = load("--workers", "7", WORKERS="6", THREADS="10")
    assert (chosen.workers, chosen.threads, chosen.port, chosen.upload_types) == (7, 10, 1, ("csv", "json"))
    assert load("--workers", "7", "serve", "--workers=8", WORKERS="6").workers == 8
    (tmp_path / "other.toml").write_text("workers = 8\n")
    chosen = load(CONFIG=str(tmp_path / "other.toml"))
    assert (chosen.workers, chosen.port) == (8, 8080)


def test_values_are_read_in_the_forms_people_write(tmp_path: Path, load: Callable[..., taskapi.Settings]) -> None:
    """Sizes with units, lists with commas, a path for the database."""
    chosen = load("--max-upload-bytes=2 MiB", "--upload-types", " csv, pdf ", "--data-dir", str(tmp_path))
    assert (chosen.max_upload_bytes, chosen.upload_types) == (2 * 2**20, ("csv", "pdf"))
    assert chosen.database_path == tmp_path / "taskapi.db"
    assert load(DATABASE="/x/y.db").database_path == Path("/x/y.db")
    assert load(HOST="0.0.0.0", ALLOWED_HOSTS="a.example", NO_TOKEN="1").allowed_hosts == ("a.example",)
    assert load("--no-token").no_token
    assert not load(NO_TOKEN="false").no_token


@pytest.mark.parametrize(("argv", "environ", "toml", "words"), [
    (["--wokers", "3"], {}, "", ["--wokers", "--workers"]),
    (["--wokers=3"], {}, "", ["--wokers", "--workers"]),
    (["serve", "--wokers=3"], {}, "", ["--wokers", "--workers"]),
    (["jobs", "--date-dir=x"], {}, "", ["--date-dir", "--data-dir"]),
    (["--work", "3"], {}, "", ["--work"]),
    (["workers"], {}, "", ["workers"]),
    ([], {"WOKERS": "3"}, "", ["TASKAPI_WOKERS", "'TASKAPI_WORKERS'"]),
    (["jobs"], {"WOKERS": "3"}, "", ["TASKAPI_WOKERS", "'TASKAPI_WORKERS'"]),
    ([], {"workers": "3"}, "", ["TASKAPI_workers", "'TASKAPI_WORKERS'"]),
    ([], {}, "wokers = 3", ["wokers", "'workers'"]),
    ([], {}, "max-records = 3", ["max-records", "'max_records'"]),
    ([], {}, "[generate]\ncount = 3", ["generate"]),
    (["--workers", "many"], {}, "", ["--workers", "integer"]),
    (["--workers", "0"], {}, "", ["--workers", "1"]),
    (["--workers"], {}, "", ["--workers", "requires an argument"]),
    ([], {"PORT": "65536"}, "", ["TASKAPI_PORT", "65535"]),
    ([], {}, "port = 65536", ["port: ", "65535"]),
    (["jobs"], {"PORT": "65536"}, "", ["TASKAPI_PORT", "65535"]),
    ([], {"LOG_LEVEL": "loud"}, "", ["TASKAPI_LOG_LEVEL", "debug"]),
    ([], {"MAX_UPLOAD_BYTES": "5 bits"}, "", ["TASKAPI_MAX_UPLOAD_BYTES"]),
    ([], {}, "workers = ", ["taskapi.toml"]),
    ([], {"CONFIG": "/nonexistent/a.toml"}, "", ["/nonexistent/a.toml"]),
    (["--host", "0.0.0.0"], {}, "", ["allowed_hosts"]),
    (["--host", "0.0.0.0"], {"ALLOWED_HOSTS": "a.example"}, "", ["a token", "no_token"]),
    (["--no-token"], {"TOKEN": "s3cret"}, "", ["no_token"]),
    (["--token", "s3cret word"], {}, "", ["--token"]),
    ([], {"NO_TOKEN": "maybe"}, "", ["TASKAPI_NO_TOKEN"]),
])
def test_a_wrong_setting_is_named_with_the_nearest_right_one(
        tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, argv: list[str],
        environ: dict[str, str], toml: str, words: list[str]) -> None:
    """From each source, in one line on stderr; the exit code is 2."""
    for name, value in environ.items():
        monkeypatch.setenv(f"TASKAPI_{name}", value)
    if toml:
        (tmp_path / "taskapi.toml").write_text(toml)
    ran = run(*argv)
    assert (*ran[:2], ran.err.count("\n")) == (2, "", 1)
    assert not [word for word in words if word not in ran.err], ran.err
    assert not (tmp_path / "data").exists()


def test_help_and_the_table_name_every_setting(run: Callable[..., Ran]) -> None:
    """One model is behind all of them."""
    assert run("--version") == (0, f"taskapi {taskapi.__version__}\n", "")
    shown = [run("--help"), run("serve", "--help")]
    for name, field in taskapi.Settings.model_fields.items():
        assert field.description
        assert f"`TASKAPI_{name.upper()}`" in taskapi.Settings.table()
        assert not [help for help in shown if f"--{name.replace('_', '-')}" not in help.out]
    assert {"host", "port", "data_dir", "database", "workers", "threads", "max_upload_bytes", "upload_types",
            "max_records", "max_pending", "max_attempts", "retention_days", "allowed_hosts", "log_level"
            } <= taskapi.Settings.model_fields.keys()


# ==== 3 Models ====


def test_ids_sort_by_creation_also_when_the_clock_goes_back_and_over_a_restart() -> None:
    """An id is never below one that was made before it."""
    clock = FakeClock()
    make = taskapi.JobIds(clock)
    ids = [make(), make()]
    clock.forward(-3600)
    ids += [make() for _ in range(1000)]
    ids.append(taskapi.JobIds(clock, ids[-1])())
    clock.forward(7200)
    ids.append(make())
    assert ids == sorted(set(ids))
    assert all(re.fullmatch(r"[\w-]+", job_id, re.ASCII) for job_id in ids)


@given(st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.timezones()))
def test_instants_are_utc_with_milliseconds_and_sort_as_text(moment: datetime) -> None:
    """RFC 3339, and nothing is lost but microseconds."""
    text = taskapi.instant(moment)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    assert timedelta(0) <= moment - datetime.fromisoformat(text) < timedelta(milliseconds=1)


def test_the_job_object_is_what_the_contract_shows(service: taskapi.Service, url: str) -> None:
    """Its keys, its links, its instants, and the request with its defaults filled in."""
    answer = ask(url, "POST", "/generate", {"recordType": "person", "count": 10})
    job = answer.json
    assert (answer.status, answer.headers["Location"]) == (202, f"/status/{job['jobId']}")
    assert {"jobId", "type", "status", "createdAt", "startedAt", "finishedAt", "attempt", "progress", "request",
            "result", "error", "links"} <= job.keys()
    assert (job["type"], job["status"], job["attempt"], job["error"]) == ("generate", "completed", 1, None)
    assert job["progress"] == {"done": 10, "total": 10}
    assert {"recordType": "person", "count": 10, "locale": "en_US"}.items() <= job["request"].items()
    assert isinstance(job["request"]["seed"], int)
    assert job["links"] == {"self": f"/status/{job['jobId']}", "records": f"/records/person?jobId={job['jobId']}"}
    assert [datetime.fromisoformat(job[key]).tzinfo for key in ("createdAt", "startedAt", "finishedAt")] == [UTC] * 3
    assert ask(url, "GET", job["links"]["self"]).json == job
    again = ask(url, "POST", "/generate", job["request"]).json
    records = [ask(url, "GET", made["links"]["records"]).json["items"] for made in (job, again)]
    assert records[0] == records[1]
    assert len(records[0]) == 10


# ==== 4 Store: jobs ====


@pytest.fixture
def database(tmp_path: Path) -> Iterator[taskapi.Database]:
    """A database in a folder of its own."""
    with closing(taskapi.Database(tmp_path / "taskapi.db")) as database:
        yield database


@pytest.fixture
def jobs(database: taskapi.Database) -> taskapi.JobStore:
    """The job table."""
    return taskapi.JobStore(database, FakeClock())


def threads(count: int, work: Callable[[int], Any], seconds: float = 60) -> list[Any]:
    """Runs `work` in `count` threads at once; returns what each returned or raised."""
    results: list[Any] = [None] * count

    def run(number: int) -> None:
        try:
            results[number] = work(number)
        except BaseException as error:
            results[number] = error

    crew = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join(seconds)
    return results


def test_every_job_is_claimed_once_and_the_oldest_first(jobs: taskapi.JobStore) -> None:
    """Many threads, one table."""
    ids = [jobs.insert("script", {})[0].job_id for _ in range(60)]
    taken = threads(8, lambda _: [task[0] for task in iter(jobs.claim, None)])
    claimed = [job.job_id for some in taken for job in some]
    assert sorted(claimed) == ids
    assert all([job.job_id for job in some] == sorted(job.job_id for job in some) for some in taken)
    assert {(job.attempt, job.status) for some in taken for job in some} == {(1, "in-progress")}


def test_jobs_of_few_records_go_first_and_those_of_many_wait_no_longer_than_is_said(
        database: taskapi.Database) -> None:
    """Ten seconds for each doubling of the records, whatever the clock then does."""
    clock = FakeClock()
    jobs = taskapi.JobStore(database, clock)

    def made(weight: int, after: float = 0) -> str:
        clock.forward(after)
        return jobs.insert("script", {}, weight=weight)[0].job_id

    few, many, most = made(4), made(1000), made(2**40)
    passes, comes_late, same = made(1, 69), made(1, 25), made(1000)
    clock.forward(-10**6)
    last = made(1)
    assert [claim.job.job_id for claim in iter(jobs.claim, None)] == [
        few, passes, many, comes_late, last, same, most]


@pytest.mark.parametrize("blocked", [False, True])
def test_a_claim_costs_the_same_however_many_jobs_wait(
        database: taskapi.Database, jobs: taskapi.JobStore, blocked: bool) -> None:
    """Counted in steps of SQLite's machine."""
    def steps() -> int:
        count = 0

        def step() -> int:
            nonlocal count
            count += 1
            return 0

        database.write(lambda connection: connection.set_progress_handler(step, 1))
        assert jobs.claim()
        database.write(lambda connection: connection.set_progress_handler(None, 0))
        return count

    def more(count: int) -> None:
        head = jobs.insert("script", {})[0].job_id
        database.write(lambda connection: connection.execute(
            "INSERT INTO jobs(id, type, status, created_at, request, claim_order, after, blocked) "
            "SELECT ? || value, 'script', 'pending', 'x', '{}', value % 97, ?, ? FROM json_each(?)",
            (head, head if blocked else None, blocked, json.dumps([*range(count)]))))

    more(10)
    few = steps()
    more(10_000)
    assert steps() < 1.5 * few


def changes(database: taskapi.Database, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each piece of work changes from now on."""
    counts: list[int] = []
    write = database.write

    def counted(work: Callable[[sqlite3.Connection], Any], durable: bool = False) -> Any:
        def piece(connection: sqlite3.Connection) -> Any:
            before = connection.total_changes
            try:
                return work(connection)
            finally:
                counts.append(connection.total_changes - before)

        return write(piece, durable)

    monkeypatch.setattr(database, "write", counted)
    return counts


def followers(database: taskapi.Database, head: str, count: int, chain: bool) -> list[str]:
    """Puts in jobs that follow this one, or each the one before it."""
    ids = [f"{head}{number:05}" for number in range(count)]
    before = [head, *ids] if chain else [head] * count
    database.write(lambda connection: connection.executemany(
        "INSERT INTO jobs(id, type, status, created_at, request, after, blocked) VALUES (?, 'script', 'pending', 'x', "
        "?, ?, 1)", [(job_id, json.dumps({"script": "x" * 100}), after)
                     for job_id, after in zip(ids, before, strict=False)]))
    return ids


@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("move", ["cancel", "fail", "remove"])
def test_those_that_follow_a_job_that_was_not_completed_fail_in_steps(
        database: taskapi.Database, jobs: taskapi.JobStore, monkeypatch: pytest.MonkeyPatch, chain: bool,
        move: str) -> None:
    """9,900 of them, some hundreds a transaction."""
    head = jobs.insert("script", {})[0].job_id
    waiting = followers(database, head, 9900, chain)
    counts = changes(database, monkeypatch)
    if move == "fail":
        jobs.finish(jobs.claim().job, taskapi.JobStatus.FAILED, error="x")
    else:
        jobs.cancel(head)
        if move == "remove":
            jobs.remove(head)
    failed = [(job.job_id, str(job.status), job.error) for job in jobs.fail_dependents()]
    assert sorted(failed) == [
        (job_id, "failed", f"job {before}, which this one was to follow, was not completed")
        for job_id, before in zip(waiting, [head, *waiting] if chain else [head] * 9900, strict=False)]
    assert max(counts) <= 500
    assert jobs.counts() == (0, 0)


def test_those_that_follow_a_completed_job_are_let_go_in_steps(
        database: taskapi.Database, jobs: taskapi.JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by the next start, if the process ends on the way."""
    head = jobs.insert("script", {})[0].job_id
    waiting = followers(database, head, 9900, chain=False)
    claim = jobs.claim()
    assert not claim.more
    assert jobs.claim() is None
    counts = changes(database, monkeypatch)
    write = database.write

    def crash(work: Any, durable: bool = False) -> Any:
        if len(counts) == 3:
            raise InterruptedError
        return write(work, durable)

    with monkeypatch.context() as patch:
        patch.setattr(database, "write", crash)
        with pytest.raises(InterruptedError):
            jobs.finish(claim.job, taskapi.JobStatus.COMPLETED, result={})
    assert jobs.recover(3) == []
    assert max(counts) <= 502
    assert {claim.job.job_id for claim in iter(jobs.claim, None)} == {*waiting}


def test_attempts_count_from_the_last_checkpoint_that_moved(
        database: taskapi.Database, jobs: taskapi.JobStore) -> None:
    """A job that gets further each time is not poison; one that does not is, after as many attempts as are allowed."""
    job_id = jobs.insert("script", {})[0].job_id

    def attempt(checkpoint: Any) -> str:
        job = jobs.claim().job
        database.write(lambda connection: jobs.save_progress(connection, job, taskapi.Progress(done=1), checkpoint))
        futile.append(jobs.futile_attempts(job))
        return str(jobs.recover(3)[0].status)

    futile: list[int] = []
    assert [attempt({"at": number}) for number in range(9)] == ["pending"] * 9
    assert [attempt({"at": 8}), attempt(None), attempt({"at": 8})] == ["pending"] * 3  # the last one moved again
    assert [attempt({"at": 8}) for _ in range(3)] == ["pending", "pending", "failed"]
    assert futile == [0] * 9 + [1, 2, 0, 1, 2, 3]
    job = jobs.get(job_id)
    assert (job.attempt, job.error) == (15, "interrupted 3 times: the server ended while the job ran")


def test_a_page_of_jobs_ends_early_when_they_are_long(service: taskapi.Service, url: str) -> None:
    """At four megabytes of text; `next` goes on from there."""
    long = [service.queue.jobs.insert("script", {"script": "x" * 10**6})[0].job_id for _ in range(12)]
    assert [job["jobId"] for job in items(url, "/jobs?limit=1000", 2**23)] == long[::-1]
    assert len(ask(url, "GET", "/jobs?limit=1000").json["items"]) in (4, 5)


def test_finished_jobs_cost_claims_counts_and_lists_nothing(
        jobs: taskapi.JobStore, database: taskapi.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every statement of them goes by key or by an index that holds only jobs of the status it asks for."""
    statements: list[str] = []
    connect = database._connect

    def traced(mode: str) -> sqlite3.Connection:
        connection = connect(mode)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(database, "_connect", traced)
    while database._readers:
        database._readers.pop().close()
    database._writer.set_trace_callback(statements.append)
    first, second = (jobs.insert("script", {}, max_pending=9)[0] for _ in range(2))
    jobs.finish(jobs.claim().job, taskapi.JobStatus.COMPLETED, result={})
    jobs.insert("script", {}, after=first.job_id)
    jobs.release(jobs.claim().job, "a test", charged=True)
    assert jobs.claim().job.job_id == second.job_id
    assert not [*jobs.fail_dependents()]
    for status in ("pending", "in-progress", "failed", "canceled"):
        jobs.page(status, None, 9, None)
    assert jobs.counts() == (1, 1)
    assert jobs.oldest_pending()
    with closing(sqlite3.connect(database.path)) as connection:
        plans = {row[3] for statement in statements if re.match("SELECT|UPDATE|INSERT", statement)
                 for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")}
    scans = {plan for plan in plans if re.match("SCAN (?!.*(CONSTANT ROW|VIRTUAL TABLE))", plan)}
    assert {"_jobs_pending", "_jobs_in-progress"} <= {plan.split(" INDEX ")[-1].split()[0] for plan in scans}
    assert not {plan for plan in scans if not re.search("USING (COVERING )?INDEX _jobs_(?!finished|key)", plan)}


def test_the_limit_of_pending_jobs_is_exact_whatever_moves_them(jobs: taskapi.JobStore) -> None:
    """Though they are not counted anew for each."""
    def room() -> int:
        before = len(ids)
        with suppress(taskapi.Unavailable):
            while True:
                ids.append(jobs.insert("script", {}, max_pending=3)[0].job_id)
        return len(ids) - before

    ids: list[str] = []
    assert room() == 3
    jobs.cancel(ids[0])
    assert room() == 1
    running = jobs.claim().job
    jobs.retry(ids[0])
    assert room() == 0
    jobs.claim()
    jobs.release(running, "a test", charged=False)
    assert room() == 0
    jobs.recover(9)
    assert room() == 0
    jobs.claim()
    jobs.claim()
    assert room() == 1


def test_only_the_current_attempt_can_finish_a_job(jobs: taskapi.JobStore) -> None:
    """The fence is id, attempt and status."""
    jobs.insert("script", {})
    first = jobs.claim().job
    jobs.release(first, charged=True, reason="a test")
    second = jobs.claim().job
    assert second.attempt == 2
    with pytest.raises(taskapi.LeaseLost):
        jobs.finish(first, taskapi.JobStatus.COMPLETED, result={})
    assert jobs.get(first.job_id).status == "in-progress"
    jobs.finish(second, taskapi.JobStatus.FAILED, error="it was not to be")
    with pytest.raises(taskapi.LeaseLost):
        jobs.finish(second, taskapi.JobStatus.COMPLETED, result={})
    with pytest.raises(taskapi.LeaseLost):
        jobs.release(second, charged=False, reason="a test")
    assert (jobs.get(first.job_id).status, jobs.get(first.job_id).error) == ("failed", "it was not to be")


def submit(database: taskapi.Database, work: Callable[[sqlite3.Connection], Any], durable: bool = True) -> Future[Any]:
    """Has a thread of its own write, while another one writes; it waits in line when this returns."""
    future, waiting = Future[Any](), len(database._waiting)

    def run() -> None:
        try:
            future.set_result(database.write(work, durable))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run).start()
    until(lambda: future.done() or len(database._waiting) > waiting)
    return future


@contextmanager
def busy_writer(database: taskapi.Database) -> Iterator[list[str]]:
    """Keeps the one that writes at work; gives the statements that are executed from then on, once it goes on."""
    statements: list[str] = []
    holding, go = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        holding.set()
        assert go.wait(60)
        connection.set_trace_callback(statements.append)

    holder = threading.Thread(target=database.write, args=[hold])
    holder.start()
    assert holding.wait(60)
    try:
        yield statements
    finally:
        go.set()
        holder.join(60)


def beat(number: int, connection: sqlite3.Connection) -> int:
    """Writes a heartbeat of this number; one in five comes to nothing."""
    connection.execute("INSERT INTO _heartbeat VALUES (?, 'x')", (number,))
    if number % 5 == 4:
        raise TaskError(f"no {number}")
    return number


def beats(database: taskapi.Database) -> list[int]:
    with database.read() as connection:
        return [row[0] for row in connection.execute("SELECT id FROM _heartbeat ORDER BY id")]


@pytest.mark.parametrize("durable", [0, 6, 9])
def test_works_that_wait_share_one_commit_and_one_that_fails_undoes_only_itself(
        database: taskapi.Database, durable: int) -> None:
    """Group commit: fsynced if any of them is durable."""
    with busy_writer(database) as statements:
        futures = [submit(database, partial(beat, number), number == durable) for number in range(1, 9)]
    assert [str(future.exception(60) or future.result()) for future in futures] == [*"123", "no 4", *"5678"]
    assert beats(database) == [1, 2, 3, 5, 6, 7, 8]
    assert statements.count("COMMIT") == 2  # the held one, and one for all eight
    assert ("PRAGMA synchronous = FULL" in statements) == (durable == 6)


def test_what_sqlite_rolls_back_by_itself_fails_all_that_shared_the_transaction(database: taskapi.Database) -> None:
    """As it does when the disk is full; what comes later is written."""
    def lose(connection: sqlite3.Connection) -> None:
        connection.execute("ROLLBACK")  # as SQLite does
        raise sqlite3.OperationalError("lost")

    with busy_writer(database):
        futures = [submit(database, work) for work in (partial(beat, 1), lose, partial(beat, 2))]
    assert [str(future.exception(60)) for future in futures] == ["lost"] * 3
    assert database.write(partial(beat, 3)) == 3
    assert beats(database) == [3]


def test_a_transaction_ends_when_it_has_taken_its_time(
        database: taskapi.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits then has the next one."""
    monkeypatch.setattr(taskapi, "_BATCH_SECONDS", 0)
    with busy_writer(database) as statements:
        futures = [submit(database, partial(beat, number)) for number in range(3)]
    assert [future.result(60) for future in futures] == [0, 1, 2]
    assert statements.count("COMMIT") == 4


def test_whoever_writes_gets_what_is_theirs_and_a_busy_database_is_said(
        database: taskapi.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen threads at once, some of whose work fails; then while nobody can write; then all goes on."""
    def write(number: int) -> str:
        try:
            return str(database.write(partial(beat, number), durable=number % 2 == 0))
        except TaskError as error:
            return str(error)

    met = threads(16, lambda first: [write(number) for number in range(first, 400, 16)])
    assert {*itertools.chain(*met)} == {f"no {number}" if number % 5 == 4 else str(number) for number in range(400)}
    with monkeypatch.context() as patch, busy_writer(database):
        patch.setattr(taskapi, "_BUSY_SECONDS", 0.05)
        refusals = threads(3, lambda number: database.write(partial(beat, 1000 + number)))
    assert [str(error) for error in refusals] == ["the database is busy"] * 3
    assert database.write(partial(beat, 1000)) == 1000
    assert len(beats(database)) == 321


def test_who_is_made_to_lead_before_it_waits_leads_once(
        database: taskapi.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between joining those who wait and waiting, a thread may be overtaken by all that is written before it."""
    written = threading.Event()

    class Overtaken(threading.Condition):
        first = 0

        def __enter__(self) -> bool:
            self.first = self.first or threading.get_ident()
            return super().__enter__()

        def __exit__(self, *raised: object) -> None:
            super().__exit__(*raised)
            assert threading.get_ident() != self.first or written.wait(60)

    with busy_writer(database):
        monkeypatch.setattr(database, "_turn", Overtaken(database._turn._lock))
        future = submit(database, partial(beat, 1))
    written.set()
    assert future.result(60) == 1
    assert database.write(partial(beat, 2)) == 2


def test_closing_fails_what_waits_and_leaves_no_thread(tmp_path: Path) -> None:
    """And all that comes later; closing again does nothing."""
    before = leftovers(tmp_path)
    database = taskapi.Database(tmp_path / "taskapi.db")
    with busy_writer(database):
        futures = [submit(database, partial(beat, number)) for number in range(3)]
        closer = threading.Thread(target=database.close)
        closer.start()
        until(lambda: submit(database, partial(beat, 9)).done())
    closer.join(60)
    database.close()
    for future in (*futures, submit(database, partial(beat, 3))):
        with pytest.raises(taskapi.StorageError, match="closed"):
            future.result(60)
    with pytest.raises(taskapi.StorageError, match="closed"), database.read():
        pass
    assert leftovers(tmp_path) == before
    assert plain(tmp_path, "SELECT count(*) FROM _heartbeat") == [0]


def test_what_a_client_is_told_survives_a_loss_of_power(
        database: taskapi.Database, jobs: taskapi.JobStore) -> None:
    """Each of these returns only when it is on the disk; a claim may be lazier, and comes along with the next."""
    statements: list[str] = []
    modes = ["NORMAL"]
    database.write(lambda connection: connection.set_trace_callback(statements.append))

    def synchronous() -> str:
        modes.extend(statement.split()[-1] for statement in statements if "synchronous" in statement)
        assert statements.count("COMMIT") == 1
        statements.clear()
        return modes[-1]

    statements.clear()
    job_id = jobs.insert("script", {})[0].job_id
    assert synchronous() == "FULL"
    claim = jobs.claim()
    assert synchronous() == "NORMAL"
    jobs.finish(claim.job, taskapi.JobStatus.COMPLETED, result={})
    assert synchronous() == "FULL"
    jobs.remove(job_id)
    assert synchronous() == "FULL"
    job_id = jobs.insert("script", {})[0].job_id
    statements.clear()
    for move in (jobs.cancel, jobs.retry, jobs.cancel):
        move(job_id)
        assert synchronous() == "FULL"


def test_the_jobs_list_goes_back_page_by_page_and_filters(tmp_path: Path, script: Any) -> None:
    """Newest first, with a cursor, over HTTP."""
    with held(tmp_path) as (service, runner), service.serving(port=0) as url:
        made = [service.enqueue("script", {}).job_id for _ in range(5)]
        ask(url, "POST", f"/jobs/{made[0]}/cancel")
        assert [job["jobId"] for job in items(url, "/jobs?limit=2")] == made[::-1]
        assert [job["jobId"] for job in ask(url, "GET", "/jobs?status=canceled").json["items"]] == made[:1]
        runner.run()
        assert len(ask(url, "GET", "/jobs?status=completed&type=script").json["items"]) == 4
        assert ask(url, "GET", "/jobs?type=export").json == {"items": [], "next": None}


def test_an_idempotency_key_answers_the_first_job_again(service: taskapi.Service, url: str) -> None:
    """Same id, same status code; for uploads too, and for several at once: the key is decided inside the insert."""
    for path, body, headers, status in (("/generate", PERSONS, {}, 202), ("/upload", form(), FORM, 201)):
        key = headers | {"Idempotency-Key": f"key of {path}"}
        answers = threads(6, lambda _, args=(path, body, key): ask(url, "POST", *args))
        assert {answer.status for answer in answers} == {status}
        assert len({answer.json["jobId"] for answer in answers}) == 1
    refused(ask(url, "POST", "/upload", form(b"a\n"), FORM | {"Idempotency-Key": "key of /upload"}), 409)
    assert len(ask(url, "GET", "/jobs").json["items"]) == 2
    assert_sound(service.folder.root)


def test_sqlites_own_locks_are_held_while_the_database_is_open(service: taskapi.Service) -> None:
    """To close any descriptor of a file drops them; another program would then cut the log's index off under us."""
    pytest.importorskip("fcntl", reason="such locks are a matter of POSIX")
    lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 128)"
    index = service.folder.root / "taskapi.db-shm"
    for _ in range(2):
        ran = subprocess.run([sys.executable, "-c", lock, index], capture_output=True, text=True, check=False)
        assert "BlockingIOError" in ran.stderr
        store(service, {"n": "int"}, [[1]])


def test_a_second_process_is_told_who_has_the_folder(live: Live, tmp_path: Path) -> None:
    """Exit 1, with process, host and URL; the first one does not notice."""
    with pytest.raises(AssertionError, match=f"(?s)ended with 1.*process {live.process.pid} .*{live.url}"):
        Live(live.folder)
    with pytest.raises(taskapi.StartupError, match=f"process {live.process.pid} "):
        taskapi.open_service(tmp_path, database=live.folder / "taskapi.db")
    assert live.ask("GET", "/").status == 200


def test_a_refused_second_database_leaves_the_folder_free(tmp_path: Path) -> None:
    """Two folders must not share a database, and the one that came second keeps no lock."""
    with taskapi.open_service(tmp_path / "a", inline=True):
        with pytest.raises(taskapi.StartupError, match=r"the database .* is in use by process") as error:
            taskapi.open_service(tmp_path / "b", inline=True, database=tmp_path / "a" / "taskapi.db")
        with taskapi.open_service(tmp_path / "b", inline=True) as service:  # while `error` keeps the traceback
            assert service.health().status == "ok", error


# ==== 4 Store: records ====


def test_a_table_grows_by_a_later_schema_and_widens_for_another_kind(service: taskapi.Service) -> None:
    """Old records have nulls in new columns, and every value keeps the type that it was stored with."""
    store(service, {"a": "int", "t": "date"}, [[1, "2026-01-01"], [2**63 - 1, None]])
    store(service, {"a": "int", "b": "text"}, [[3, "x"]])
    store(service, {"a": "text", "t": "text"}, [["01", "y"]])
    folder = service.folder.root
    assert plain(folder, "SELECT a, typeof(a), b, t FROM thing ORDER BY _id") == [
        (1, "integer", None, "2026-01-01"), (2**63 - 1, "integer", None, None), (3, "integer", "x", None),
        ("01", "text", None, "y")]
    assert [record["a"] for record in json.loads(exported(service, "json"))] == [1, 2**63 - 1, 3, "01"]
    assert plain(folder, "SELECT strict FROM pragma_table_list('thing')") == [1]
    store(service, {"A ": "int"}, [[1]])
    job = service.enqueue("rows", {"columns": {"B": "int"}, "rows": [[1]]})
    assert (job.status, "'b'" in job.error) == ("failed", True)


def test_records_are_seen_once_their_job_is_completed_and_not_before(
        service: taskapi.Service, url: str, script: Any) -> None:
    """Neither pages, counts nor exports show the records of a job that runs, and a job that fails leaves none."""
    store(service, {"n": "int"}, [[1]])
    shown = []

    @script
    def half(context: taskapi.JobContext) -> taskapi.JobSteps:
        yield from run_rows(context, RowsRequest(columns={"n": "int"}, rows=[[2], [3]]))
        assert plain(service.folder.root, "SELECT count(*) FROM thing") == [3]
        shown.append(ask(url, "GET", "/records/thing").json["items"])
        shown.append([item["count"] for item in ask(url, "GET", "/records").json["items"]])
        shown.append(ask(url, "GET", f"/records/thing?jobId={context.job.job_id}").status)
        with service.queue.records.query(taskapi.Selected(taskapi.Filters(record_type="thing"))) as query, query.blocks(
                CSV) as blocks:
            shown.append([*blocks])
        raise taskapi.JobFailed("half way is not enough")

    assert service.enqueue("script", {}).error == "half way is not enough"
    assert shown == [[{"n": 1}], [1], 404, [b"1"]]
    assert plain(service.folder.root, "SELECT n FROM thing") == [1]


def test_an_export_is_one_snapshot_whatever_happens_meanwhile(service: taskapi.Service) -> None:
    """The job that made the records is deleted, and another adds some, while they are read."""
    job = store(service, {"n": "int"}, [[n] for n in range(5000)])
    with service.queue.records.query(taskapi.Selected(taskapi.Filters(record_type="thing"))) as query, query.blocks(
            CSV) as blocks:
        texts = [next(blocks)]
        service.queue.remove(job.job_id)
        store(service, {"n": "int"}, [[n] for n in range(3)])
        texts += blocks
    assert [int(line) for text in texts for line in text.split()] == [*range(5000)]
    assert json.loads(exported(service, "json")) == [{"n": n} for n in range(3)]


CSV = taskapi.RecordText("\r\n", ",")
KINDS = {"n": "int", "x": "float", "price": "decimal", "ok": "bool", "name": "text", "day": "date",
         "at": "datetime", "tags": "json"}


def sample(count: int = 60) -> list[dict[str, Any]]:
    """Records of all kinds with nulls, the same each time."""
    random = Random(5)
    records = [{"n": number - 20, "x": random.uniform(-9, 9), "price": f"{random.randrange(-9999, 9999) / 100:.2f}",
                "ok": random.random() < 0.5, "name": random.choice(["Ann", "ann", "Bob", "O'Neil", "", "x%y", "Ünal"]),
                "day": str(date(2026, 1, 1) + timedelta(random.randrange(90))),
                "at": taskapi.instant(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=random.randrange(2000))),
                "tags": ["a", random.randrange(3)]} for number in range(count)]
    for record in records:
        for name in random.sample([*KINDS], 1):
            record[name] = None
    return records


def store_sample(service: taskapi.Service) -> list[dict[str, Any]]:
    """Stores the sample; returns it."""
    records = sample()
    store(service, KINDS, [[json.dumps(value, separators=(",", ":")) if name == "tags" and value else value
                            if not isinstance(value, bool) else int(value) for name, value in record.items()]
                           for record in records])
    return records


def price(record: dict[str, Any]) -> float:
    return float(record["price"] or "nan")


def test_booleans_are_told_from_all_that_looks_like_them(service: taskapi.Service) -> None:
    """By names that end alike or hold quotes, by texts that imitate JSON, in any place, and in long records."""
    names = ["on", 'x"on', 'x,"on', "{on", "on:1", "1", *(f"f{number}" for number in range(70))]
    kinds = {name: "bool" if number in (0, 2, 5, 40, 75) else "int" if number % 2 else "text"
             for number, name in enumerate(names)}
    kinds["nested"] = "json"
    texts = itertools.cycle(['on\x7f', '\x7f":1', '{"on\x7f":0', '\\",\\"on\x7f\\":1', '"on\x7f":1', '\x7f', ''])
    rows = [[{"bool": row % 2, "int": (row + 1) % 2, "text": next(texts), "json": '{"on\x7f":1,"\x7f":null}'}[kind]
             if (row + number) % 5 else None for number, kind in enumerate(kinds.values())] for row in range(30)]
    store(service, kinds, rows)
    read = {"bool": bool, "json": json.loads, "int": int, "text": str}
    expected = [{name: None if value is None else read[kind](value)
                 for (name, kind), value in zip(kinds.items(), row, strict=True)} for row in rows]
    assert json.loads(exported(service, "json")) == expected
    lines = exported(service, "ndjson").decode().splitlines()
    assert list(map(json.loads, lines)) == expected
    assert json.loads(exported(service, "json", orderBy="-_id")) == expected[::-1]
    assert json.loads(exported(service, "json", fields=["f3", "on"])) == [
        {name: record[name] for name in ("f3", "on")} for record in expected]
    assert json.loads(exported(service, "json", None)) == [{"recordType": "thing", **record} for record in expected]


WHERE: dict[str, tuple[Any, Callable[[dict[str, Any]], Any], str]] = {
    "eq": ({"n": {"eq": 3}}, lambda r: r["n"] == 3, "n = 3"),
    "eq null": ({"n": {"eq": None}}, lambda r: r["n"] is None, "n IS NULL"),
    "eq a float": ({"x": {"eq": sample()[4]["x"]}}, lambda r: r["x"] == sample()[4]["x"], f"x = {sample()[4]['x']!r}"),
    "ne": ({"name": {"ne": "Ann"}}, lambda r: r["name"] != "Ann", "name IS NOT 'Ann'"),
    "lt": ({"x": {"lt": 0}}, lambda r: (r["x"] or 0) < 0, "x < 0"),
    "lte": ({"n": {"lte": 0}}, lambda r: r["n"] is not None and r["n"] <= 0, "n <= 0"),
    "gt": ({"name": {"gt": "B"}}, lambda r: (r["name"] or "") > "B", "name > 'B'"),
    "gte and lt": ({"n": {"gte": -3, "lt": 9}}, lambda r: r["n"] is not None and -3 <= r["n"] < 9, "n >= -3 AND n < 9"),
    "a decimal as number": ({"price": {"gt": 10}}, lambda r: price(r) > 10, "CAST(price AS REAL) > 10"),
    "a decimal as text": ({"price": {"lte": "9.5"}}, lambda r: price(r) <= 9.5, "CAST(price AS REAL) <= 9.5"),
    "a boolean": ({"ok": {"eq": True}}, lambda r: r["ok"], "ok = 1"),
    "not a boolean": ({"ok": {"ne": True}}, lambda r: not r["ok"], "ok IS NOT 1"),
    "in": ({"name": {"in": ["Bob", "O'Neil", ""]}}, lambda r: r["name"] in ("Bob", "O'Neil", ""),
           "name IN ('Bob', 'O''Neil', '')"),
    "in numbers": ({"x": {"in": [r["x"] for r in sample()[:9] if r["x"]]}},
                   lambda r: r["x"] in [s["x"] for s in sample()[:9] if s["x"]],
                   f"x IN ({','.join(repr(r['x']) for r in sample()[:9] if r['x'])})"),
    "in nothing": ({"name": {"in": []}}, lambda r: False, "FALSE"),
    "like": ({"name": {"like": "a%"}}, lambda r: (r["name"] or "").lower().startswith("a"), "name LIKE 'a%'"),
    "like one": ({"name": {"like": "_ob"}}, lambda r: r["name"] == "Bob", "name LIKE '_ob'"),
    "null": ({"tags": {"null": True}}, lambda r: r["tags"] is None, "tags IS NULL"),
    "not null": ({"day": {"null": False}}, lambda r: r["day"] is not None, "day IS NOT NULL"),
    "a date": ({"day": {"gte": "2026-02-01"}}, lambda r: (r["day"] or "") >= "2026-02-01", "day >= '2026-02-01'"),
    "two fields": ({"n": {"gt": 0}, "ok": {"eq": False}}, lambda r: (r["n"] or 0) > 0 and r["ok"] is False,
                   "n > 0 AND ok = 0"),
    "beyond 64 bits": ({"n": {"lt": 2**70}}, lambda r: r["n"] is not None, "n IS NOT NULL"),
}


def test_each_filter_selects_what_python_and_plain_sqlite_select(service: taskapi.Service) -> None:
    """Every operator on every kind, with two referees."""
    records = store_sample(service)
    for title, (where, predicate, sql) in WHERE.items():
        expected = [record for record in records if predicate(record)]
        assert [*map(json.loads, exported(service, "ndjson", where=where).splitlines())] == [
            {**record, "price": record["price"] and float(record["price"])} for record in expected], title
        assert plain(service.folder.root, f"SELECT name FROM thing WHERE {sql} ORDER BY _id") == [
            record["name"] for record in expected], title


def test_without_a_date_field_from_and_to_mean_when_the_record_was_made(tmp_path: Path) -> None:
    """The job's clock decides."""
    clock = FakeClock()
    with taskapi.open_service(tmp_path, inline=True, clock=clock) as service:
        for number in range(5):
            store(service, {"n": "int"}, [[number]])
            clock.forward(86400)
        found = exported(service, "json", filters={"from": "2026-03-02", "to": "2026-03-04"})
        assert json.loads(found) == [{"n": 1}, {"n": 2}, {"n": 3}]


@pytest.mark.parametrize("field", [*KINDS][:-1])
@pytest.mark.parametrize("descending", [False, True])
def test_order_by_sorts_by_value_with_nulls_first_and_ties_as_stored(
        service: taskapi.Service, field: str, descending: bool) -> None:
    """Ascending and, with a minus, descending; the limit cuts after that."""
    records = store_sample(service)

    def key(record: dict[str, Any]) -> tuple[bool, Any]:
        value = float(record[field]) if field == "price" and record[field] else record[field]
        return value is not None, value.encode() if isinstance(value, str) else value or 0

    expected = sorted(records, key=key, reverse=descending)
    expected = expected if not descending else [r for _, r in sorted(enumerate(records), key=lambda p: (
        [-rank for rank in [sorted({key(r) for r in records}).index(key(p[1]))]], p[0]))]
    order = f"-{field}" if descending else field
    found = json.loads(exported(service, "json", orderBy=order, fields=["n", field], limit=17))
    assert [record["n"] for record in found] == [record["n"] for record in expected[:17]]


def test_pages_of_records_follow_the_cursor_and_the_job(service: taskapi.Service, url: str) -> None:
    """Oldest first; each once."""
    made = [store(service, {"n": "int"}, [[n] for n in range(start, start + 7)]) for start in (0, 7)]
    assert [record["n"] for record in items(url, "/records/thing?limit=4")] == [*range(14)]
    own = ask(url, "GET", made[1].links["records"]).json
    assert ([record["n"] for record in own["items"]], own["next"]) == ([*range(7, 14)], None)
    assert [(item["recordType"], item["count"], item["fields"]) for item in ask(url, "GET", "/records").json["items"]
            ] == [("thing", 14, {"n": "int"})]


def query(pairs: Any = (), **parameters: Any) -> str:
    """The path of the sample's records with such a query."""
    return f"/records/thing?{urllib.parse.urlencode([*pairs, *parameters.items()])}"


ODD_NAMES = ["Ann", "ann", "O'Neil", "", "x%y", "x_y", "xAy", "Ünal", "ünal", '"', "a,b", "!", "-1", "18", "true", "\\",
           "ß%"]


def plainly_like(text: str, pattern: str) -> bool:
    """LIKE, as a regular expression; only the letters of ASCII are alike in both cases."""
    parts = [".*" if c == "%" else "." if c == "_" else re.escape(c) for c in ascii_lower(pattern)]
    return re.fullmatch("".join(parts), ascii_lower(text), re.DOTALL) is not None


def ascii_lower(text: str) -> str:
    return "".join(c.lower() if c.isascii() else c for c in text)


MEANING: dict[str, Callable[[Any], Any]] = {  # what a text, or a value, of a kind is compared as
    "int": Decimal, "float": float, "decimal": Decimal, "text": str.encode, "date": str, "bool": lambda value: (
        value if isinstance(value, bool) else value == "true"), "datetime": datetime.fromisoformat}
COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b, "lt": lambda a, b: a < b, "lte": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b}
TEXTUAL: dict[str, Callable[[str, str], bool]] = {
    "like": plainly_like, "contains": lambda text, part: ascii_lower(part) in ascii_lower(text),
    "startsWith": lambda text, part: ascii_lower(text).startswith(ascii_lower(part)),
    "endsWith": lambda text, part: ascii_lower(text).endswith(ascii_lower(part))}
OPPOSITES = {"ne": "eq", "notIn": "in", "notLike": "like"}


def passes(record: dict[str, Any], field: str, sign: str, text: str) -> bool:
    """The referee: what a condition says, in Python."""
    if sign in OPPOSITES:
        return not passes(record, field, OPPOSITES[sign], text)
    value, meaning = record[field], MEANING.get(KINDS[field], str)
    if sign == "null":
        return (value is None) == (text == "true")
    if value is None:
        return False
    if sign in TEXTUAL:
        return TEXTUAL[sign](str(value), text)
    if sign == "in":
        return any(meaning(value) == meaning(each) for each in json.loads(text))
    return COMPARED[sign](meaning(value), meaning(text))


@st.composite
def conditions(draw: st.DrawFn) -> tuple[str, str, str]:
    """Field, operator and text; values are those that there are, or near them."""
    field = draw(st.sampled_from([*KINDS][:-1]))
    values = [str(record[field]).lower() if field == "ok" else str(record[field]) for record in sample(30)
              if record[field] is not None]
    one = st.sampled_from(ODD_NAMES if field == "name" else sorted({*values}))
    sign = draw(st.sampled_from(["null", "in", "notIn", "ne", *COMPARED, *([*TEXTUAL, "notLike"] * (field == "name"))]))
    if sign == "null":
        return field, sign, draw(st.sampled_from(["true", "false"]))
    if sign.lower().endswith("in"):
        return field, sign, json.dumps(draw(st.lists(one, max_size=4)))
    return field, sign, draw(one) + (draw(st.sampled_from(["", "%", "_", "y"])) if sign in TEXTUAL else "")


@pytest.fixture(scope="module")
def naughty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[webtest.TestApp, taskapi.Service, list[Any]]]:
    """A service with the sample, whose names are those that make trouble."""
    with taskapi.open_service(tmp_path_factory.mktemp("naughty"), inline=True) as service:
        records = sample()
        for record, name in zip(records, itertools.cycle([*ODD_NAMES, None])):
            record["name"] = name
        store(service, KINDS, [[json.dumps(value) if isinstance(value, list) else int(value) if isinstance(value, bool)
                                else value for value in record.values()] for record in records])
        yield webtest.TestApp(service.app), service, records


@given(tests=st.lists(conditions(), max_size=3, unique_by=lambda test: test[:2]),
       sides=st.lists(st.lists(conditions(), min_size=1, max_size=2, unique_by=lambda test: test[:2]), max_size=3))
def test_a_query_selects_what_python_selects_and_an_export_the_same(
        naughty: tuple[webtest.TestApp, taskapi.Service, list[Any]], tests: list[Any], sides: list[list[Any]]) -> None:
    """Any operator on any kind, of which all have to hold, and alternatives of which one has to."""
    app, service, records = naughty
    expected = [record["n"] for record in records if all(passes(record, *test) for test in tests) and (
        not sides or any(all(passes(record, *test) for test in side) for side in sides))]
    pairs = [(f"{field}.{sign}", text) for field, sign, text in tests]
    pairs += [("or", "&".join(f"{field}.{sign}={text}" for field, sign, text in side)) for side in sides]
    page = app.get(query(pairs, limit=1000, fields="n")).json
    assert ([item["n"] for item in page["items"]], page["total"]) == (expected, len(expected))

    def where(tests: list[Any]) -> dict[str, Any]:
        of: dict[str, Any] = {}
        for field, sign, text in tests:
            value = json.loads(text) if sign in ("null", "in", "notIn") else text
            of.setdefault(field, {})[sign] = value
        return of

    either = {"or": [*map(where, sides)]} if sides else {}
    for _ in range(3):
        either = either and {"or": [either]}
    for name in ("csv", "ndjson"):
        assert app.get(query(pairs, format=name)).body == exported(service, name, where=where(tests) | either)


@pytest.mark.parametrize(("order", "pages"), [
    ("-a,b", None), ("b,-a", {"a.null": "false"}), ("a", None), ("-b,-a,a" + ",-b" * 13, None),
    (None, {"b.ne": "1"})])
def test_pages_in_order_have_each_record_once(
        service: taskapi.Service, order: str | None, pages: dict[str, str] | None) -> None:
    """Also equal ones, nulls, and those of jobs that wrote other kinds."""
    for kind, values in (("int", [1, 2, None, 2]), ("text", ["1", "x", None, "1"]), ("float", [1.5, 2.0, None, 1.0])):
        rows = [[value, number % 3 or None] for number, value in enumerate(values * 3)]
        store(service, {"a": kind, "b": "int"}, rows)
    app = webtest.TestApp(service.app)
    ordered = {"orderBy": order} if order else {}
    whole = [json.loads(line) for line in app.get(query(
        (pages or {}).items(), format="ndjson", fields="_id,a,b", **ordered)).text.splitlines()]
    assert len(whole) == app.get(query((pages or {}).items())).json["total"]
    assert len({record["_id"] for record in whole}) == len(whole) > 20
    seen, link = [], query((pages or {}).items(), limit=4, fields="_id,a,b", **ordered)
    while link:
        page = app.get(link).json
        assert (page["next"] is None) == ("next" not in page["links"])
        assert 0 < len(page["items"]) <= 4
        seen, link = [*seen, *page["items"]], page["links"].get("next")
    assert seen == whole


def test_order_by_takes_several_fields_and_names_with_commas(service: taskapi.Service) -> None:
    """In an export, a query and a command alike."""
    rows = [[2, 1], [1, 1], [2, 3], [1, 2]]
    store(service, {"a": "int", "x,-y": "int", "-a": "int"}, [[*row, number] for number, row in enumerate(rows)])
    for order, expected in (("a,x,-y", [1, 3, 0, 2]), ("a,-x,-y", [3, 1, 2, 0]), ("-x,-y, a", [2, 3, 1, 0]),
                            ("a, -_id", [3, 1, 2, 0]), ("--a", [3, 2, 1, 0]), ("-a", [0, 1, 2, 3])):
        assert [record["-a"] for record in json.loads(exported(service, "json", orderBy=order))] == expected, order
        page = webtest.TestApp(service.app).get(query(orderBy=order)).json
        assert [record["-a"] for record in page["items"]] == expected, order


MISSPELLED = [
    ("agee=3", "agee: is no field and no parameter here; did you mean 'age'?"), ("age__gte=1", "'age.gte'"),
    ("age_gte=1", "'age.gte'"), ("age[gte]=1", "'age.gte'"), ("age.GTE=1", "'age.gte'"),
    ("name__isnull=1", "'name.null'"), ("name__startswith=a", "'name.startsWith'"),
    ("age.foo=1", "no operator of 'age'; there are: eq, "), ("_limit=3", "'limit'"), ("_sort=age", "'orderBy'"),
    ("order=age", "'orderBy'"), ("order_by=age", "'orderBy'"), ("_size=3", "'limit'"), ("page=2", "'after'"),
    ("_fields=age", "'fields'"), ("job_id=1", "'jobId'"), ("zzz=1", "there are: jobId, "), ("day=soon", "'day'"),
    ("age=abc", "filter on 'age': cannot be compared with \"abc\": its kind is int"), ("age.in=1,x", "'age'"),
    ("age=1&age=2", "age: is given twice"), ("age.null=1", "age.null: should be true or false"), ("ok=1", "'ok'"),
    ("day=2026-02-30", "'day'"), ("orderBy=agee", "'age'"), ("orderBy=,", "''"), ("fields=age,nmae", "'name'"),
    ("format=xml", "format: "), ("limit=0", "limit: "), ("after=-1", "after: "), ("limit=1001", "limit: should be at"),
    ("or=age", "FIELD.OPERATOR=VALUE"), ("or=agee=1", "'age'"), ("or=", "FIELD=VALUE"),
    ("name.like=" + "x" * 1001, "name"),
    ("orderBy=age&after=99", "after: is not the `next` of a page"), ("age.in=" + "1," * 1000, "age.in: "),
    ("&".join(f"or=age={number}" for number in range(101)), "100 conditions"),
    (f"orderBy={'age,' * 16}age", "orderBy: should be up to 16 fields")]


def test_a_query_of_records_says_what_was_meant(service: taskapi.Service) -> None:
    """What others call it, what is spelled wrongly, and values of another kind: 400 with the name of it."""
    store(service, {"age": "int", "name": "text", "ok": "bool", "day": "date", "limit": "int"},
          [[1, "a", 1, "2026-01-01", 7], [2, "b", 0, None, 8]])
    app = webtest.TestApp(service.app)
    for asked, words in MISSPELLED:
        answer = app.get(f"/records/thing?{urllib.parse.quote(asked, safe='=&')}", status=400).json
        assert words in answer["error"], asked
        assert asked.startswith("or=") or answer["fields"][0]["field"] in asked
    for asked in ("limit.eq=8", "_id=2", "age.gte=2", "ok=false", "day.null=true", 'name.in=["b"]', "age=2.0"):
        found = app.get(f"/records/thing?{urllib.parse.quote(asked, safe='=&')}").json["items"]
        assert [record["age"] for record in found] == [2], asked


def test_a_text_in_a_query_is_any_value_that_it_spells_among_several_kinds(service: taskapi.Service) -> None:
    """A number, a boolean or the text; and of jobs that wrote one kind each, likewise."""
    store(service, {"v": "any", "n": "int"}, [[5, 1], ["5", 2], ["x", 3], [None, 4], [7.5, 5]])
    store(service, {"v": "bool", "n": "int"}, [[1, 6], [0, 7]])
    store(service, {"v": "json", "n": "int"}, [["5", 8], ['"5"', 9], ["true", 10], ['"true"', 11], ["[5]", 12]])
    app = webtest.TestApp(service.app)
    for asked, found in (("v=5", [1, 2, 8, 9]), ("v=true", [6, 10, 11]), ("v.gte=6", [5]), ("v.in=x,7.5", [3, 5]),
                         ("v.ne=5&v.null=false", [3, 5, 6, 7, 10, 11, 12]), ("v.notIn=5,true,x", [4, 5, 7, 12])):
        assert [item["n"] for item in app.get(f"/records/thing?{asked}").json["items"]] == found, asked


def test_records_come_whole_as_csv_or_ndjson_as_an_export_has_them(service: taskapi.Service, url: str) -> None:
    """By `format` or by Accept, of any size, by way of a file that is gone then; a HEAD has the same headers."""
    store(service, {"n": "int", "t": "text"}, [[n, "ä" * 99] for n in range(2000)])
    chosen = {"n.gte": 3, "orderBy": "-n", "fields": "t,n"}
    for name, media in (("csv", "text/csv"), ("ndjson", "application/x-ndjson")):
        for limit in ({}, {"limit": 2}):
            file = exported(service, name, where={"n": {"gte": 3}}, orderBy="-n", fields=["t", "n"], **limit)
            answer = ask(url, "GET", query(**chosen, **limit, format=name))
            assert (answer.status, answer.body) == (200, file)
            assert answer.headers["Content-Type"].startswith(media)
            assert ask(url, "GET", query(**chosen, **limit), headers={"Accept": f"{media}, application/json;q=0.9"}
                       ).body == file
            assert webtest.TestApp(service.app).get(query(**chosen, **limit, format=name)).body == file
            head = ask(url, "HEAD", query(**chosen, **limit, format=name))
            assert (head.status, head.headers["Content-Length"], head.body) == (200, str(len(file)), b"")
    assert ask(url, "GET", query(format="json", limit=1), headers={"Accept": "text/csv"}).json["total"] == 2000
    for accept in ("*/*", "text/html", "application/json", "text/csv;q=0.5, */*", ""):
        assert ask(url, "GET", query(limit=1), headers={"Accept": accept}).json["items"] == [{"n": 0, "t": "ä" * 99}]
    assert ask(url, "GET", query(format="ndjson", n=-1)).body == b""
    assert ask(url, "GET", query(format="csv", n=-1)).body == b'"n","t"\r\n'
    until(lambda: not [*service.folder.tmp.iterdir()])
    with contextlib.ExitStack() as others:
        for _ in range(service.settings.threads // 4):
            others.enter_context(service.readings)
        refusal = ask(url, "GET", query(format="csv"))
        refused(refusal, 503, "a quarter of the threads")
        assert refusal.headers["Retry-After"] == "1"
        assert ask(url, "GET", query(limit=1)).status == 200
    assert ask(url, "GET", query(format="csv", limit=1)).status == 200


def test_one_record_has_a_path_of_its_own(service: taskapi.Service, url: str) -> None:
    """By its id, of any kind, else by its place in the list; what names none is 404, and says which."""
    store(service, {"id": "int", "n": "int"}, [[7, 1], [8, 2]], "numbered")
    store(service, {"id": "int", "n": "int"}, [[8, 3]], "numbered")
    store(service, {"id": "text"}, [["a/b"], ["ü&?"], ["07"]], "named")
    store(service, {"n": "int"}, [[10], [11]], "bare")
    gone = store(service, {"n": "int"}, [[12]], "bare")
    store(service, {"n": "int"}, [[13]], "bare")
    service.queue.remove(gone.job_id)
    for path, record in (("numbered/7", {"id": 7, "n": 1}), ("numbered/8", {"id": 8, "n": 2}), ("bare/3", {"n": 13}),
                         ("named/a%2Fb", {"id": "a/b"}), ("named/a/b", {"id": "a/b"}), ("bare/1", {"n": 10}),
                         ("named/%C3%BC%26%3F", {"id": "ü&?"}), ("numbered/8?fields=n", {"n": 2})):
        assert ask(url, "GET", f"/records/{path}").json == record, path
        assert ask(url, "HEAD", f"/records/{path}").status == 200
    for path in ("numbered/9", "numbered/x", "numbered/-1", "numbered/nan", "numbered/7_0", f"numbered/{10**400}",
                 "named/7", "named/%00", "bare/0", "bare/-1", "bare/4", "bare/01", "bare/x", f"bare/{10**400}",
                 "bare/1.0", "bare/1%2F", "bare/%F0%9F%98%80"):
        refused(ask(url, "GET", f"/records/{path}"), 404, path.partition("/")[0])
    refused(ask(url, "GET", "/records/nubmered/7"), 404, "'numbered'")
    refused(ask(url, "GET", "/records/bare/"), 404)
    refused(ask(url, "GET", "/records/bare/%FF"), 400)
    assert ask(url, "DELETE", "/records/bare/1").headers["Allow"] == "GET, HEAD, OPTIONS"


def test_the_total_is_of_the_records_that_there_are(service: taskapi.Service) -> None:
    """It is counted once for all pages, and again when a job has come or gone."""
    app, made = webtest.TestApp(service.app), [store(service, {"n": "int"}, [[n] for n in range(9)]) for _ in range(2)]
    asked = query([("n.gte", "3")], limit=2)
    first = app.get(asked).json
    assert (first["total"], app.get(first["links"]["next"]).json["total"]) == (12, 12)
    service.queue.remove(made[0].job_id)
    assert app.get(asked).json["total"] == app.get(first["links"]["next"]).json["total"] == 6
    store(service, {"n": "int"}, [[n] for n in range(9)])
    assert app.get(asked).json["total"] == 12


@pytest.mark.parametrize(("request_", "words"), [
    ({"filters": {"recordType": "thign"}}, ["'thign'", "thing"]),
    ({"filters": {"recordType": ["thing", "other"]}}, ["'other'", "thing"]),
    ({"filters": {"recordType": "thing", "where": {"nmae": {"eq": 1}}}}, ["'nmae'", "'name'", "price"]),
    ({"filters": {"recordType": "thing", "from": "2026-01-01", "dateField": "dya"}}, ["'dya'", "'day'"]),
    ({"filters": {"recordType": "thing", "from": "2026-01-01", "dateField": "n"}}, ["'n'", "date"]),
    ({"filters": {"recordType": "thing", "from": "yesterday"}}, ["'yesterday'"]),
    ({"filters": {"recordType": "thing", "to": "0001-01-01T00:00:00+14:00"}}, ["0001"]),
    *[({"filters": {"recordType": "thing", "from": text}}, [text, "is not a date such as"])
      for text in ("20261122", "2026-W01-1")],  # which could be misread
    *[({"filters": {"recordType": "thing", "where": {"n": {"eq": text}}}}, ["'n'", "int"]) for text in ("many", "nan")],
    ({"filters": {"recordType": "thing", "where": {"ok": {"eq": 1}}}}, ["'ok'", "bool"]),
    ({"filters": {"jobId": "0192"}}, ["'0192'"]),
    ({"filters": {"recordType": "thing"}, "fields": ["name", "nope"]}, ["'nope'", "name"]),
    ({"filters": {"recordType": "thing"}, "orderBy": "-nope"}, ["'nope'", "name"])])
def test_an_export_of_what_is_not_there_fails_and_says_what_is(
        service: taskapi.Service, request_: dict[str, Any], words: list[str]) -> None:
    """The message names the unknown, and what exists; no file is left."""
    store_sample(service)
    try:
        job = service.enqueue("export", {"format": "csv", **request_})
    except taskapi.BadRequest as error:
        message = str(error)  # at once is as good
    else:
        assert job.status == "failed"
        message = job.error
    assert not [word for word in words if word not in message], message
    assert "unexpected" not in message
    assert_sound(service.folder.root)


def test_a_field_that_is_in_none_of_several_types_or_of_no_type_is_told_as_that(service: taskapi.Service) -> None:
    """Also where each type is written by itself."""
    told = []
    for name in ("", "one", "two"):
        if name:
            store(service, {"n": "int"}, [[1]], name)
        told.append(service.enqueue("export", {"format": "sql", "orderBy": "x"}).error)
    assert [text.partition(";")[0] for text in told] == [
        f"orderBy: there is no field 'x' in {where}" for where in (
            "any of the record types", "record type 'one'", "any of the record types")]


HOSTILE = ['na"me', "it's", "new\nline", "a,b", "select", "{c}", "%w ?1 :x", "Ünï ☃", "tab\t", "ends\\", "x" * 64]
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8) | st.sampled_from(
    ["\r\n", '"', '""', ",", "=1+1", "null", "\\", "\u2028", "\ufeff", "\U0001f600", " ", "'", "1e5", "01234"])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(-2**63, 2**63 - 1), "float": st.floats(allow_nan=False, allow_infinity=False),
    "decimal": st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-10**9, max_value=10**9).map(str),
    "bool": st.integers(0, 1), "text": TEXTS, "date": st.dates().map(str),
    "json": st.recursive(st.none() | st.booleans() | st.integers(-2**60, 2**60) | TEXTS, lambda inner: st.lists(
        inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5).filter(
            lambda value: value is not None).map(json.dumps)}


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, str], list[list[Any]]]:
    """Columns with hostile names, and rows with hostile values."""
    names = draw(st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=8, unique=True))
    columns = {name: draw(st.sampled_from([*VALUES])) for name in names}
    row = st.tuples(*(st.none() | VALUES[kind] for kind in columns.values())).map(list)
    return columns, draw(st.lists(row, max_size=6))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[taskapi.Service]:
    """A service whose record types the examples of the properties share out."""
    with taskapi.open_service(tmp_path_factory.mktemp("archive"), inline=True) as service:
        yield service


def shown(kind: str, value: Any) -> Any:
    """A stored value as JSON shows it."""
    if value is None:
        return None
    return {"bool": bool, "json": json.loads, "decimal": float}.get(kind, lambda same: same)(value)


def in_table(kind: str, value: Any) -> Any:
    """A stored value as plain sqlite3 has it: a decimal as a number, but for -0, of which SQLite keeps no sign."""
    return float(value) if kind == "decimal" and value not in (None, "-0.000") else value


def cell(kind: str, text: str) -> Any:
    """A CSV cell as the stored value, but null and the empty string are the same."""
    if text == "":
        return None
    return {"int": int, "float": float, "bool": ("false", "true").index}.get(kind, str)(text)


@given(table=tables(), packed=st.booleans())
def test_what_is_written_reads_back_equal_in_every_format(
        archive: taskapi.Service, table: tuple[dict[str, str], list[list[Any]]], packed: bool) -> None:
    """read(write(x)) == x, with the readers of the standard library, and x is what plain sqlite3 has."""
    columns, rows = table
    name = f"t{len(archive.queue.records.types())}"
    store(archive, columns, rows, name)
    stored = plain(archive.folder.root, f"SELECT {', '.join(map(quoted, columns))}, 0 FROM {name} ORDER BY _id")
    assert [list(row[:-1]) for row in stored] == [
        [in_table(kind, value) for kind, value in zip(columns.values(), row, strict=True)] for row in rows]
    files = {kind: exported(archive, kind, name, gzip=packed) for kind in ("csv", "json", "ndjson")}
    csv_text, json_text, ndjson_text = (
        (gzip.decompress(data) if packed else data).decode() for data in files.values())
    expected = [{field: shown(kind, value) for (field, kind), value in zip(columns.items(), row, strict=True)}
                for row in rows]
    assert json.loads(json_text) == expected
    assert [json.loads(line) for line in ndjson_text.split("\n") if line] == expected
    header, *cells = csv.reader(io.StringIO(csv_text, newline=""), strict=True)
    assert header == [*columns]
    assert [[cell(kind, text) for kind, text in zip(columns.values(), line, strict=True)] for line in cells] == [
        [(json.loads(value) if str(value)[:1] == '"' and kind == "json" else value) or (value if value == 0 else None)
         for kind, value in zip(columns.values(), row, strict=True)] for row in rows]
    assert csv_text.endswith("\r\n")


@pytest.mark.parametrize(("kind", "values"), [
    ("int", [1, -5, 2**63 - 1]), ("float", [0.1, 2.0]), ("bool", [0, 1]), ("any", [1, 0.5, "x"]),
    ("decimal", ["1.50"]), ("text", ["a", 'b"']), ("json", ["[1]"])])
def test_a_csv_of_one_column_is_a_csv(service: taskapi.Service, kind: str, values: list[Any]) -> None:
    """Whatever its kind; a null is no empty line, which other readers skip."""
    store(service, {"v": kind, "w": "int"}, [[value, 1] for value in [*values, None]])
    for export_format in ("csv", "tsv"):
        text = exported(service, export_format, fields=["v"]).decode()
        assert text.endswith('\r\n""\r\n')
        assert [*csv.reader(io.StringIO(text))] == [
            ["v"], *([("false", "true")[value] if kind == "bool" else str(value)] for value in values), [""]]


def test_an_export_of_several_types_has_their_columns_together(service: taskapi.Service) -> None:
    """CSV gets a leading recordType; JSON records keep their own fields."""
    store(service, {"n": "int", "a": "text"}, [[1, "x"]], "one")
    store(service, {"n": "int", "b": "bool"}, [[2, 1]], "two")
    store(service, {"n": "int"}, [[3]], "zoo")
    expected = [["recordType", "n", "a", "b"], ["one", "1", "x", ""], ["two", "2", "", "true"], ["zoo", "3", "", ""]]
    assert [*csv.reader(io.StringIO(exported(service, "csv", None).decode()))] == expected
    some = [*csv.reader(io.StringIO(exported(service, "csv", None, filters={"recordType": ["one", "two"]}).decode()))]
    assert some == expected[:3]
    assert json.loads(exported(service, "json", None, where={"n": {"gt": 1}}, orderBy="-n")) == [
        {"recordType": "zoo", "n": 3}, {"recordType": "two", "n": 2, "b": True}]
    assert exported(service, "json", None, where={"n": {"gt": 9}}) == b"[]\n"
    assert exported(service, "ndjson", None, limit=0) == b""


def test_excel_safe_guards_formulas_and_leaves_numbers(service: taskapi.Service) -> None:
    """In names too, which may come from somebody's file; with a byte order mark; unasked, nothing changes."""
    values = ["=1+1", "@x", "+cmd|x", "-2+3", "\t=1", "-5", "+49 30", "plain", "", "a=b", "-1.5", " =1", "\n=1", "\r=1",
              "\uff1d1", "\uff0b1", "a b"]
    store(service, {"=v": "text", "+n": "int", "plain": "int"}, [[value, -1, 2] for value in values])
    data = exported(service, "csv", excelSafe=True)
    assert data.startswith(b"\xef\xbb\xbf")
    header, *found = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    assert header == ["'=v", "'+n", "plain"]
    assert [row[0] for row in found] == [
        "'=1+1", "'@x", "'+cmd|x", "'-2+3", "'\t=1", "-5", "'+49 30", "plain", "", "a=b", "-1.5", "' =1", "'\n=1",
        "'\r=1", "'\uff1d1", "'\uff0b1", "a b"]
    plainly = [row[0] for row in csv.reader(io.StringIO(exported(service, "csv").decode(), newline=""))]
    assert plainly == ["=v", *values]


def test_a_field_named_as_the_label_of_the_types_is_exported_beside_it(service: taskapi.Service) -> None:
    """The label gets an underscore, and nothing is lost."""
    store(service, {"recordType": "text"}, [["mine"]], "odd")
    store(service, {"n": "int"}, [[1]], "plain")
    assert exported(service, "ndjson", None) == (
        b'{"_recordType":"odd","recordType":"mine"}\n{"_recordType":"plain","n":1}\n')
    assert exported(service, "csv", None) == (
        b'"_recordType","recordType","n"\r\n"odd","mine",\r\n"plain",,1\r\n')
    assert rows_of_copy(exported(service, "sqlite", None), "odd") == [["recordType"], ("mine", "text")]


@pytest.mark.parametrize(("condition", "found"), [
    ({"null": True}, [None]), ({"like": "x%"}, ["x"]), ({"in": [True, "x", 1.5]}, [1.5, "x"]),
    ({"ne": 1.5}, ["x", None])])
def test_a_condition_holds_where_a_field_is_of_another_kind_or_missing(
        service: taskapi.Service, condition: dict[str, Any], found: list[Any]) -> None:
    """In records of another job, and of another type whose table has no such column."""
    store(service, {"v": "decimal"}, [["1.5"]], "one")
    store(service, {"v": "text"}, [["x"]], "one")
    store(service, {"n": "int"}, [[1]], "two")
    lines = exported(service, "ndjson", None, where={"v": condition}).splitlines()
    assert [json.loads(line).get("v") for line in lines] == found


# Kinds: no job changes what another one wrote


JOB_VALUES: dict[str, st.SearchStrategy[Any]] = {
    **VALUES, "datetime": st.datetimes().map(lambda moment: moment.isoformat() + "Z"), "none": st.none(),
    "any": st.integers(-2**63, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False).map(
        lambda value: value + 0.0) | TEXTS,
    "json": VALUES["json"] | st.sampled_from(["300", "1.10", "true", '"300"', '"true"', "[]"])}


@st.composite
def writings(draw: st.DrawFn) -> list[tuple[dict[str, str], list[list[Any]]]]:
    """Columns and rows of several jobs that share some fields, of any kinds."""
    jobs = []
    for _ in range(draw(st.integers(2, 4))):
        fields = draw(st.lists(st.sampled_from(["a", "b", 'c"%s']), min_size=1, max_size=3, unique=True))
        columns = {field: draw(st.sampled_from([*JOB_VALUES])) for field in fields}
        row = st.tuples(*(st.none() | JOB_VALUES[kind] for kind in columns.values())).map(list)
        jobs.append((columns, draw(st.lists(row, min_size=1, max_size=4))))
    return jobs


def rows_of_copy(data: bytes, record_type: str) -> list[Any]:
    """The rows of an exported database, with the type of each value."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(data)
        names = [row[1] for row in connection.execute(f"PRAGMA table_info({record_type})")]
        values = ", ".join(f"{quoted(name)}, typeof({quoted(name)})" for name in names)
        return [names, *connection.execute(f"SELECT {values} FROM {record_type}")]


@settings(max_examples=12)
@given(jobs=writings())
def test_each_jobs_records_read_back_as_they_were_alone(
        archive: taskapi.Service, jobs: list[tuple[dict[str, str], list[list[Any]]]]) -> None:
    """Whatever kinds other jobs write in fields of the same names: pages, every format, an export's database."""
    def seen(record_type: str, job: taskapi.Job) -> list[Any]:
        filters = taskapi.Filters(record_type=record_type, job_id=job.job_id)
        return [archive.queue.records.page(taskapi.Selected(filters, limit=1000))[0], *(
            exported(archive, export_format, record_type, filters={"jobId": job.job_id}, orderBy=order)
            for export_format in ("csv", "json", "ndjson") for order in (None, "-_id")),
            rows_of_copy(exported(archive, "sqlite", record_type, filters={"jobId": job.job_id}), record_type)]

    number = len(archive.queue.records.types())
    alone = []
    for place, (columns, rows) in enumerate(jobs):
        name = f"alone{number}_{place}"
        alone.append(seen(name, store(archive, columns, rows, name)))
    name = f"together{number}"
    made = [store(archive, columns, rows, name) for columns, rows in jobs]
    assert [seen(name, job) for job in made] == alone
    together = [json.loads(line) for line in exported(archive, "ndjson", name).splitlines()]
    for record, whole in zip(itertools.chain.from_iterable(json.loads(b"[%b]" % of[0]) for of in alone), together,
                             strict=True):
        assert {**dict.fromkeys(whole), **record} == whole


def test_jobs_of_files_and_of_schemas_leave_each_others_records_as_they_are(service: taskapi.Service, url: str) -> None:
    """Issue after issue of one kind: a null, another number, a text, a list, a boolean; the kinds join."""
    texts = ['[{"f":true}]', '[{"f":null}]', '[{"f":1.5}]', '[{"f":1.50}]', '[{"f":1.10}]', '[{"f":"1.10"}]',
             '[{"f":[1]}]', '[{"f":12345678901234567890}]']
    for number, text in enumerate(texts):
        made = ask(url, "POST", "/upload?recordType=thing&filename=a.json", text.encode(),
                   {"Content-Type": "application/json"})
        assert service.wait(made.json["jobId"]).status == "completed", number
    for value in (True, None, 1.5, "x"):
        schema = {"f": {"type": "const", "value": value}}
        service.enqueue("generate", {"recordType": "thing", "count": 1, "schema": schema})
    expected = [text[1:-1] for text in texts] + ['{"f":true}', '{"f":null}', '{"f":1.5}', '{"f":"x"}']
    assert exported(service, "ndjson").decode().splitlines() == expected
    assert ask(url, "GET", "/records").json["items"][0]["fields"] == {"f": "any"}
    for values, kind in (([None, 1], "int"), ([1, 1.5, "1.50"], "decimal"), (["x", None], "text")):
        for value in values:
            kinds = {int: "int", float: "float", str: "decimal" if kind == "decimal" else "text"}
            store(service, {"v": kinds.get(type(value), "none")}, [[value]], f"of_{kind}")
        assert {item["recordType"]: item["fields"] for item in ask(url, "GET", "/records").json["items"]}[
            f"of_{kind}"] == {"v": kind}
    assert exported(service, "ndjson", "of_decimal") == b'{"v":1}\n{"v":1.5}\n{"v":1.50}\n'
    for where, found in (({"gt": 1.2}, [1.5, 1.5]), ({"eq": "1.5"}, [1.5, 1.5]), ({"lte": 1}, [1])):
        assert [json.loads(line)["v"] for line in exported(
            service, "ndjson", "of_decimal", where={"v": where}, orderBy="v").splitlines()] == found


MOMENTS = ["2026-01-01T10:00:00Z", "2026-01-01T12:00:00+02:00", "2026-01-01 10:00:00.5", "2026-01-01T10:00:00.500001Z",
           "2026-01-01T10:00:00.123Z", "2026-01-02", "2025-12-31T23:59:59.999999-01:00", "2026-01-01T10:00",
           "0001-01-01", "9999-12-31T23:59:59Z", None]


def instant_of(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@pytest.mark.parametrize("kind", ["datetime", "text", "date"])
def test_instants_compare_as_such_however_they_are_spelled(service: taskapi.Service, kind: str) -> None:
    """Fractions, offsets, and a date as its whole day, in every operator, from and to, and the order."""
    moments = [text for text in MOMENTS if kind != "date" or not text or len(text) == 10]
    store(service, {"n": "int", "at": kind}, [[n, text] for n, text in enumerate(moments)])
    known = [(n, instant_of(text)) for n, text in enumerate(moments) if text]

    def found(**request: Any) -> list[int]:
        return [json.loads(line)["n"] for line in exported(service, "ndjson", **request).splitlines()]

    for bound in ["2026-01-01T10:00:00Z", "2026-01-01", "2026-01-01T05:00:00.500001-05:00", "2026-01-02"]:
        first = instant_of(bound)
        last = first + timedelta(days=1, microseconds=-1) if len(bound) == 10 else first
        expected = {"eq": [n for n, at in known if first <= at <= last], "lt": [n for n, at in known if at < first],
                    "lte": [n for n, at in known if at <= last], "gt": [n for n, at in known if at > last],
                    "gte": [n for n, at in known if at >= first]}
        for operator, numbers in expected.items() if kind == "datetime" else ():
            assert found(where={"at": {operator: bound}}) == numbers, (operator, bound)
        for end, operator in (("from", "gte"), ("to", "lte")):
            assert found(filters={end: bound, "dateField": "at"}) == expected[operator]
        assert found(filters={"from": bound, "to": bound, "dateField": "at"}) == expected["eq"]
    if kind == "datetime":
        assert found(where={"at": {"in": ["2026-01-02", "2026-01-01T11:00:00+01:00", None]}}) == [0, 1, 5, 7]
        assert found(where={"at": {"ne": "2026-01-01T10:00:00Z"}}) == [2, 3, 4, 5, 6, 8, 9, 10]
        assert found(orderBy="at") == [10, *(n for n, _ in sorted(known, key=lambda pair: pair[1]))]
        for wrong in (5, True, "soon", "20260101"):
            job = service.enqueue("export", {"format": "csv", "filters": {"recordType": "thing", "where": {
                "at": {"gte": wrong}}}})
            assert (job.status, "'at'" in job.error, "datetime" in job.error) == ("failed", True, True)


def test_a_mixed_column_is_compared_by_the_type_of_each_value(service: taskapi.Service) -> None:
    """Texts as texts, numbers as numbers, in one job and over several; CSV has no quotes of JSON."""
    values = [300, "300", "Alien", 2.5, True, "true", [1, 2], {"a": 1}, None, 12.5]
    store(service, {"v": "json"}, [[value if value is None else json.dumps(value)] for value in values], "film")
    for number, value in enumerate([300, "300", "Alien", 2.5]):
        store(service, {"v": {int: "int", str: "text", float: "float"}[type(value)]}, [[value]], "jobs_of_films")
        assert len(exported(service, "ndjson", "jobs_of_films").splitlines()) == number + 1

    def found(record_type: str, **where: Any) -> list[Any]:
        lines = exported(service, "ndjson", record_type, where={"v": where}).splitlines()
        return [json.loads(line)["v"] for line in lines]

    for record_type, rest in (("film", True), ("jobs_of_films", False)):
        assert found(record_type, eq=300) == [300]
        assert found(record_type, eq="300") == ["300"]
        assert found(record_type, like="3%") == [300, "300"]
        assert found(record_type, **{"in": ["Alien", 2.5]}) == ["Alien", 2.5]
        assert found(record_type, gt=2.5) == [300, *([12.5] if rest else [])]
        assert found(record_type, gte="Al") == ["Alien", *(["true", [1, 2], {"a": 1}][:1] if rest else []),
                                                *([[1, 2], {"a": 1}] if rest else [])]
    assert found("film", eq=True) == [True]
    assert [row[0] for row in csv.reader(io.StringIO(exported(service, "csv", "film").decode()))] == [
        "v", "300", "300", "Alien", "2.5", "true", "true", "[1, 2]", '{"a": 1}', "", "12.5"]


def test_decimals_compare_exactly(service: taskapi.Service) -> None:
    """Also where floats would be equal; a type that lacks the field has none."""
    values = ["12345678901234567890", "12345678901234567891", "-12345678901234567891", "0.1", "0.10", "-5.5", "1e3",
              None, "0.30000000000000000001"]
    store(service, {"v": "decimal"}, [[value] for value in values])
    numbers = [Decimal(value) for value in values if value]
    tests: dict[str, Callable[[Decimal, Decimal], bool]] = {
        "eq": lambda a, b: a == b, "lt": lambda a, b: a < b, "lte": lambda a, b: a <= b, "gt": lambda a, b: a > b,
        "gte": lambda a, b: a >= b}
    for bound in (12345678901234567890, "12345678901234567891", "0.1", 0.3, "-12345678901234567890", 1000, -5.5, "inf"):
        for operator, test in tests.items():
            found = exported(service, "csv", where={"v": {operator: bound}}).decode().split()[1:]
            assert list(map(Decimal, found)) == [n for n in numbers if test(n, Decimal(str(bound)))], (bound, operator)


@pytest.mark.parametrize("values", [
    ["12.50", "0.00", "-0.05", "99.90", None], ["1", "2.5", "0.1", None, "-3"], [None, "7", "2.50", "1e3", "-0.00"],
    ["0.10", "12345678901234.56", "123456789012345678.90"], ["1.000000000000000000001", "5"], ["9007199254740993"]])
def test_decimals_are_numbers_to_whoever_opens_a_database_and_come_back_as_written(
        service: taskapi.Service, values: list[str | None]) -> None:
    """In the record tables all that fit one way of writing; in an export's all, or none where a number would lose."""
    store(service, {"v": "decimal"}, [[value] for value in values])
    read = json.loads(exported(service, "json"), parse_float=str, parse_int=str)
    assert [record["v"] for record in read] == values
    assert exported(service, "csv").decode().split("\r\n")[1:-1] == [value or '""' for value in values]
    numbers = [Decimal(value) for value in values if value]
    for value, kind in plain(service.folder.root, "SELECT v, typeof(v) FROM thing WHERE v NOT NULL"):
        assert kind in ("integer", "real") or value in ("2.50", "1e3", "-0.00") or len(value) > 15
    _, *rows = rows_of_copy(exported(service, "sqlite"), "thing")
    kept = all(len(number.normalize().as_tuple().digits) <= 15 or number == int(number) < 2**63 for number in numbers)
    assert {kind for _, kind in rows} <= ({"integer", "real", "null"} if kept else {"text", "null"})
    assert [Decimal(str(value)) for value, _ in rows if value is not None] == numbers


def schema_of(data: bytes) -> list[str]:
    """What an exported database declares, which its rows have to keep."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(data)
        for check, sound in ("foreign_key_check", []), ("integrity_check", [("ok",)]):
            assert connection.execute(f"PRAGMA {check}").fetchall() == sound
        return [row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL")]


FLEET = {"seed": 3, "records": {
    "owner": {"count": 20, "schema": {"id": "sequence", "code": "uuid", "country": {"type": "const", "value": "FR"}}},
    "car": {"per": "owner", "count": [1, 3], "schema": {
        "id": "uuid", "owner": {"type": "ref", "field": "owner.id"},
        "country": {"type": "ref", "field": "owner.country"},
        "of": {"type": "ref", "field": "owner.code", "null": 0.2}, "price": {"type": "decimal", "max": "9.99"}}}}}


def test_an_exported_database_has_keys_and_references_where_the_records_allow_them(service: taskapi.Service) -> None:
    """Parents first; of a field that is not unique, a parent that is not there or that a limit left out, there is none.

    A second job's records have the same ids, and other codes.
    """
    owner = 'CREATE TABLE "owner"("id" INTEGER{}, "code" TEXT{}, "country" TEXT) STRICT'
    car = ('CREATE TABLE "car"("id" TEXT PRIMARY KEY NOT NULL, "country" TEXT, "owner" INTEGER{}, "of" TEXT{}, '
           '"price" NUMERIC)')
    index, key = 'CREATE INDEX "_car.{0}" ON "car"("{0}")'.format, " PRIMARY KEY NOT NULL"
    to_id, to_code = ' REFERENCES "owner"("id")', ' REFERENCES "owner"("code")'

    def made(record_type: str | None = None, **request: Any) -> list[str]:
        fields = request.pop("fields", ["id", "code", "country", "owner", "of", "price"])
        return schema_of(exported(service, "sqlite", record_type, fields=fields, **request))

    service.enqueue("generate", FLEET)
    whole = [owner.format(key, " UNIQUE"), car.format(to_id, to_code), index("owner"), index("of")]
    assert made() == made(orderBy="-country") == whole
    assert made("car", fields=["id", "country", "owner", "of", "price"]) == [car.format("", "")]
    assert made(limit=45)[:1] == [car.format("", "")]
    assert made(fields=["id", "owner"])[1:] == [f'CREATE TABLE "car"("id" TEXT{key}, "owner" INTEGER{to_id}) STRICT',
                                                index("owner")]
    service.enqueue("generate", {**FLEET, "seed": 4})
    assert made() == [owner.format("", " UNIQUE"), car.format("", to_code), index("of")]
    assert made(filters={"jobId": service.enqueue("generate", {**FLEET, "seed": 5}).job_id}) == whole


@pytest.mark.parametrize("ids", [[1, 2, 1], [1, None, 3], [3, 1, None], ["a", "b", "a"], ["a", None], [5, 2**63 - 1]])
def test_a_copy_is_whole_where_a_field_turns_out_to_be_no_key(service: taskapi.Service, ids: list[Any]) -> None:
    """The records stay in their order, whatever limit and order; a key is what has a value each, and no two the same.

    Records that came before in another table are counted once; `a.id` in a name is not the field `id`.
    """
    kind = "text" if "a" in ids else "int"
    store(service, {"id": "int", "n": "int"}, [[n, n] for n in range(3)], "before")
    store(service, {"n": "int", "a.id": "int", "id": kind}, [[n, n, value] for n, value in enumerate(ids)])
    for limit, order in ((None, None), (4, None), (99, "n")):
        data = exported(service, "sqlite", None, limit=limit, orderBy=order)
        kept = ids[:1] if limit == 4 else ids
        assert [row[0] for row in rows_of_copy(data, "thing")[1:]] == kept
        assert len(rows_of_copy(data, "before")) == 4
        sound = None not in kept and len({*kept}) == len(kept)
        assert (f'"id" {"TEXT" if kind == "text" else "INTEGER"} PRIMARY KEY' in schema_of(data)[1]) is sound
    job = service.enqueue("export", {"format": "sqlite"})
    assert (job.result["records"], job.progress.done, job.progress.total) == (3 + len(ids),) * 3


def test_no_record_type_can_meet_a_name_of_ours(service: taskapi.Service) -> None:
    """Tables, indexes, views, attached databases and aliases of our own, and keywords; ordered and not."""
    ours = {name.lstrip("_") for name in plain(service.folder.root, "SELECT name FROM sqlite_master")}
    more = ["chosen", "selected", "found", "copy", "temp", "main", "r", "s", "g", "select", "old", "line", "n"]
    names = [name for name in sorted({*ours, *more}) if re.fullmatch(r"(?!sqlite|jobs$)[a-z][a-z0-9_]{0,62}", name)]
    assert {"jobs_key", "id_ranges", "layouts"} <= {*names}
    for name in names:
        store(service, {"n": "int"}, [[2], [1]], name)
        store(service, {"n": "text"}, [["x"]], name)
        for order, expected in ((None, [2, 1, "x"]), ("n", [1, 2, "x"])):
            lines = exported(service, "ndjson", name, orderBy=order).splitlines()
            assert [json.loads(line)["n"] for line in lines] == expected
            assert rows_of_copy(exported(service, "sqlite", name, orderBy=order), quoted(name)) == [
                ["n"], *((n, "text" if n == "x" else "integer") for n in expected)]
    assert len(exported(service, "csv", None, orderBy="n").splitlines()) == 1 + 3 * len(names)


def test_the_last_job_of_a_type_takes_its_fields_kinds_and_spelling_along(service: taskapi.Service, url: str) -> None:
    """Likewise DELETE /records/{recordType}, which is 404 without such a type and 409 while a job is to write some."""
    first = store(service, {"Name": "text", "n": "int"}, [["x", 1]])
    kept = store(service, {"n": "int"}, [[1]])
    service.queue.remove(first.job_id)
    assert ask(url, "GET", "/records").json["items"] == [{"recordType": "thing", "count": 1, "fields": {"n": "int"}}]
    service.queue.remove(kept.job_id)
    assert (ask(url, "GET", "/records").json["items"], ask(url, "GET", "/records/thing").status) == ([], 404)
    assert plain(service.folder.root, "SELECT count(*) FROM sqlite_master WHERE name = 'thing'") == [0]
    for _ in range(2):
        store(service, {"name": "bool"}, [[1]] * 3)
        assert ask(url, "GET", "/records").json["items"][0]["fields"] == {"name": "bool"}
        assert ask(url, "DELETE", "/records/thing").status == 204
        assert ask(url, "GET", "/records").json["items"] == []
        assert ask(url, "DELETE", "/records/thing").status == 404
    assert_sound(service.folder.root)


def test_records_are_not_deleted_under_a_job_that_writes_some(tmp_path: Path, script: Any) -> None:
    """409 names the job; once it is over, all go."""
    @script
    def half(context: taskapi.JobContext) -> taskapi.JobSteps:
        yield from run_rows(context, RowsRequest(columns={"n": "int"}, rows=[[2]]))
        with pytest.raises(taskapi.Conflict, match=context.job.job_id):
            context.records.delete_type("thing")
        return taskapi.JobResult({})

    with taskapi.open_service(tmp_path, inline=True) as service:
        store(service, {"n": "int"}, [[1]])
        assert service.enqueue("script", {}).status == "completed"
        assert exported(service, "csv") == b'"n"\r\n1\r\n2\r\n'
        service.queue.records.delete_type("thing")
        assert service.queue.records.types() == []


def test_a_table_is_made_and_changed_by_one_statement_however_many_its_fields(service: taskapi.Service) -> None:
    """What reads the schema anew, once a change, must not do so for each field; no row is written anew."""
    def version() -> int:
        return int(plain(service.folder.root, "PRAGMA schema_version")[0])

    before = version()
    store(service, {f"f{n}": "int" for n in range(500)}, [[1] * 500])
    assert version() - before == 1
    store(service, {f"f{n}": "text" if n % 2 else "int" for n in range(900)},
          [["x" if n % 2 else 2 for n in range(900)]])
    assert version() - before <= 3
    rows = [json.loads(line) for line in exported(service, "ndjson").splitlines()]
    assert [rows[0][f] for f in ("f0", "f1", "f899")] == [1, 1, None]
    assert [rows[1][f] for f in ("f0", "f1", "f899")] == [2, "x", "x"]
    assert plain(service.folder.root, "PRAGMA integrity_check") == ["ok"]
    job = service.enqueue("rows", {"columns": {f"g{n}": "int" for n in range(1100)}, "rows": []})
    assert (job.status, "more than 1990 fields" in job.error) == ("failed", True)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="setconfig")
def test_a_table_changes_where_sqlite_guards_its_schema_too(service: taskapi.Service) -> None:
    """As Apple's SQLite does: the rows are copied then."""
    store(service, {"n": "int"}, [[1]])
    database = service.queue.records._database
    database.write(lambda connection: connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True))
    store(service, {"n": "text", "m": "int"}, [["x", 1]])
    assert exported(service, "ndjson") == b'{"n":1,"m":null}\n{"n":"x","m":1}\n'


def test_a_page_of_long_records_ends_early(service: taskapi.Service, url: str) -> None:
    """At 4 MiB, or after one record; the pages have all of them, in order."""
    sizes = [10, 3_000_000, 2_000_000, 5_000_000, *[100_000] * 60, 10]
    store(service, {"n": "int", "t": "text"}, [[n, "x" * size] for n, size in enumerate(sizes)])
    assert [(item["n"], len(item["t"])) for item in items(url, "/records/thing?limit=50", 2**22 + 100)] == [
        *enumerate(sizes)]


AWKWARD: dict[str, tuple[str, list[Any]]] = {
    "id": ("int", [2**63 - 1, -2**63, 0, None]), "x": ("float", [0.1 + 0.2, 1e300, 5e-324, None]),
    "price": ("decimal", ["12.50", "-1234567890123456789.01", "0", None]), "on": ("bool", [1, 0, 1, None]),
    "t": ("text", ["it's \\' \\\\n \"x\" `y`\r\nz\tend\\", "a\nb\rc", "", None]),
    "day": ("date", ["2024-02-29", "1970-01-01", "9999-12-31", None]),
    "at": ("datetime", ["2024-02-29T12:30:00.123Z", "2024-02-29 12:30:00+02:00", "1970-01-01T00:00:00Z", None]),
    "tags": ("json", ['["a\\\\b","c\'d"]', '{"k":[1,null]}', '"\\n"', None]),
    "mixed": ("any", [1, 0.5, "é😀;--", None]),
    'we"ird `né\\': ("text", ["<r>x</r>", "=1+1", "http://x.y", None]), "nothing": ("none", [None] * 4)}


def store_naughty(service: taskapi.Service) -> list[dict[str, Any]]:
    """Stores what breaks writers, and a second type; returns the values by field."""
    store(service, {name: kind for name, (kind, _) in AWKWARD.items()},
          [*zip(*(values for _, values in AWKWARD.values()), strict=True)], "naughty")
    store(service, {"n": "int"}, [[number] for number in range(3)], "other")
    rows = zip(*(values for _, values in AWKWARD.values()), strict=True)
    return [dict(zip(AWKWARD, row, strict=True)) for row in rows]


def test_sql_makes_the_same_tables_in_sqlite(service: taskapi.Service, tmp_path: Path) -> None:
    """Read by the module and by the shell; all or nothing."""
    expected = store_naughty(service)
    text = exported(service, "sql", None)
    shell = shutil.which("sqlite3")
    for number, load in enumerate([lambda db: db.executescript(text.decode()), lambda db: subprocess.run(
            [shell, tmp_path / "1.db"], input=text, check=True)] if shell else []):
        with closing(sqlite3.connect(tmp_path / f"{number}.db")) as db:
            load(db)
            types_ = dict(db.execute("SELECT name, type FROM pragma_table_info('naughty')").fetchall())
            assert [*types_.values()] == ["INTEGER", "REAL", "NUMERIC", "BOOLEAN", *["TEXT"] * 7]
            rows = [dict(zip(AWKWARD, row, strict=True)) for row in db.execute("SELECT * FROM naughty")]
            assert [n for n, in db.execute("SELECT n FROM other")] == [0, 1, 2]
        for row, wanted in zip(rows, expected, strict=True):
            mixed, price = wanted["mixed"], wanted["price"] and float(wanted["price"])
            assert row == {**wanted, "price": price, "mixed": mixed and json.dumps(mixed, ensure_ascii=False)}
    with closing(sqlite3.connect(":memory:")) as db:
        with pytest.raises(sqlite3.Error):
            db.executescript(text.decode().replace("COMMIT", "SELECT nonsense; COMMIT"))
        db.rollback()
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def test_sql_keeps_order_limit_and_fields_over_all_types(service: taskapi.Service) -> None:
    """As each format; a type without any of the fields has no table, one without records has."""
    store(service, {"n": "int", "a": "text"}, [[1, "x"], [3, "y"]], "one")
    store(service, {"n": "int", "b": "int"}, [[2, 1]], "two")
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(exported(service, "sql", None, orderBy="-n", limit=2).decode())
        assert [db.execute(f"SELECT n FROM {name}").fetchall() for name in ("one", "two")] == [[(3,)], [(2,)]]
    assert b'"two"' not in exported(service, "sql", None, fields=["a"])
    assert exported(service, "sql", "one", where={"n": {"gt": 9}}).count(b"INSERT") == 0
    for dialect, words in (("postgres", "63 bytes"), ("mysql", "64 characters")):
        store(service, {"é" * 70: "int"}, [[1]], "long")
        job = service.enqueue("export", {"format": "sql", "dialect": dialect, "filters": {"recordType": "long"}})
        assert words in job.error, job.error


@contextmanager
def as_servers_user(folder: Path) -> Iterator[dict[str, Any]]:
    """What starts a program that refuses to be root's."""
    folder.mkdir()
    if os.geteuid():
        yield {}
        return
    for parent in (folder, *folder.parents):
        if parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    shutil.chown(folder, "nobody")
    yield {"user": "nobody", "cwd": folder}


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Callable[[bytes], str]]:
    """Runs SQL in a PostgreSQL server of its own."""
    found = [*map(Path, filter(None, [shutil.which("initdb")])), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    found = [path for path in found if path.with_name("pg_ctl").exists()]
    if not found or not shutil.which("psql"):
        pytest.skip("there is no PostgreSQL (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a socket's path has to be short
    with as_servers_user(folder / "d") as user:
        data = folder / "d" / "data"
        run = partial(subprocess.run, check=True, capture_output=True, **user)
        run([found[-1], "-D", data, "-U", "test", "-A", "trust", "-E", "UTF8", "--locale=C"])
        control = [found[-1].with_name("pg_ctl"), "-D", data, "-w"]
        subprocess.run([*control, "-l", data / "log", "-o", f"-k {data} -c listen_addresses= -c timezone=UTC", "start"],
                       check=True, stdout=subprocess.DEVNULL, **user)  # the server would keep a pipe open
        try:
            yield lambda sql: run(["psql", "-h", data, "-U", "test", "-qAt", "-v", "ON_ERROR_STOP=1", "postgres"],
                                  input=sql).stdout.decode()
        finally:
            run([*control, "-m", "fast", "stop"])
            shutil.rmtree(folder)


@pytest.fixture
def mariadb(tmp_path: Path) -> Iterator[Callable[[bytes], str]]:
    """Runs SQL in a MariaDB server of its own."""
    programs = [*map(shutil.which, ("mariadb-install-db", "mariadbd", "mariadb", "mariadb-admin"))]
    if not all(programs):
        pytest.skip("there is no MariaDB (apt-get install mariadb-server)")
    install, server, shell, admin = programs
    folder = Path(tempfile.mkdtemp(prefix="my"))
    with as_servers_user(folder / "d") as user:
        data, socket_ = folder / "d" / "data", f"--socket={folder / 'd' / 's'}"
        run = partial(subprocess.run, check=True, capture_output=True, **user)
        run([install, "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal",
             "--skip-test-db"])
        with subprocess.Popen([server, "--no-defaults", f"--datadir={data}", socket_, "--skip-networking"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user) as process:
            try:
                run([admin, "--no-defaults", "-uroot", socket_, "--wait=60", "ping"])
                run([shell, "--no-defaults", "-uroot", socket_, "-e", "CREATE DATABASE test"])
                yield lambda sql: run([shell, "--no-defaults", "-uroot", socket_, "-N", "--raw", "test"],
                                      input=sql).stdout.decode()
            finally:
                process.terminate()
        shutil.rmtree(folder)


@pytest.mark.slow
def test_sql_makes_the_same_tables_in_postgresql(service: taskapi.Service, postgres: Callable[[bytes], str]) -> None:
    """With its types; every text as it was."""
    expected = store_naughty(service)
    postgres(exported(service, "sql", None, dialect="postgres"))
    types_ = postgres(b"SELECT data_type FROM information_schema.columns WHERE table_name = 'naughty' "
                      b"ORDER BY ordinal_position").splitlines()
    assert types_ == ["bigint", "double precision", "numeric", "boolean", "text", "date", "timestamp with time zone",
                      "jsonb", "jsonb", "text", "text"]
    rows = [json.loads(line, parse_float=str) for line in
            postgres(b"SELECT row_to_json(naughty) FROM naughty").splitlines()]
    moments = ["2024-02-29T12:30:00.123+00:00", "2024-02-29T10:30:00+00:00", "1970-01-01T00:00:00+00:00", None]
    for row, wanted, moment in zip(rows, expected, moments, strict=True):
        on, x = wanted["on"], row["x"] and float(row["x"])
        assert {**row, "x": x, "mixed": None, "price": None} == {
            **wanted, "on": None if on is None else bool(on), "at": moment, "mixed": None, "price": None,
            "tags": wanted["tags"] and json.loads(wanted["tags"])}
        assert row["price"] is None or Decimal(row["price"]) == Decimal(wanted["price"])
    assert [row["mixed"] for row in rows] == [1, "0.5", "é😀;--", None]
    assert postgres(b"SELECT sum(n) FROM other").split() == ["3"]


@pytest.mark.slow
def test_sql_makes_the_same_tables_in_mariadb(service: taskapi.Service, mariadb: Callable[[bytes], str]) -> None:
    """With its types; every text as it was."""
    expected = store_naughty(service)
    mariadb(exported(service, "sql", None, dialect="mysql"))
    types_ = mariadb(b"SELECT column_type FROM information_schema.columns WHERE table_name = 'naughty' "
                     b"ORDER BY ordinal_position").splitlines()
    assert types_ == ["bigint(20)", "double", "decimal(21,2)", "tinyint(1)", "longtext", "date", "datetime(6)",
                      *["longtext"] * 4]  # JSON is a longtext that is checked
    shown_ = ["2024-02-29 12:30:00.123000", "2024-02-29 10:30:00.000000", "1970-01-01 00:00:00.000000", None]

    def column(sql: str) -> list[str | None]:
        lines = mariadb(f"SELECT {sql} FROM naughty".encode()).splitlines()
        return [None if line == "NULL" else line for line in lines]

    def texts(field: str) -> list[str | None]:
        return [value and bytes.fromhex(value[1:]).decode() for value in column(f"concat('x', hex({field}))")]

    def wanted(field: str) -> list[Any]:
        return [row[field] for row in expected]

    assert (column("id"), column("`at`"), column("day")) == ([value and str(value) if value != 0 else "0" for value in
                                                             wanted("id")], shown_, wanted("day"))
    assert [value and float(value) for value in column("x")] == wanted("x")
    assert [value and Decimal(value) for value in column("price")] == [
        value and Decimal(value) for value in wanted("price")]
    assert column("`on`") == ["1", "0", "1", None]
    assert (texts("t"), texts("tags"), texts("`we\"ird ``né\\`")) == (
        wanted("t"), wanted("tags"), wanted('we"ird `né\\'))
    assert texts("mixed") == ["1", "0.5", '"é😀;--"', None]


def test_a_format_with_another_delimiter_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From which its export, upload and ingest follow."""
    for table in ("FORMATS", "INGEST_FORMATS", "FILE_TYPES", "RAW_TYPES"):
        monkeypatch.setattr(taskapi, table, dict(getattr(taskapi, table)))
    taskapi.file_format("bars", "bar", content_type="text/x-bars", write=taskapi._csv_writer("|"),
                        read=taskapi._CSV_FORMAT._replace(read=partial(taskapi._read_csv, likely="|")))
    with taskapi.open_service(tmp_path, inline=True, upload_types=["bar"]) as service, service.serving(port=0) as url:
        store(service, {"n": "int", "t": "text"}, [[1, 'a|b,"c"'], [None, ""]])
        data = exported(service, "bars")
        assert data == b'"n"|"t"\r\n1|"a|b,""c"""\r\n|""\r\n'
        body = text_part("recordType", "again") + form(data, "a.bar")
        assert ask(url, "POST", "/upload", body, FORM).status == 201
        assert exported(service, "bars", "again") == data
        raw_body = ask(url, "POST", "/upload?recordType=more&filename=a.bar", data, {"Content-Type": "text/x-bars"})
        assert raw_body.status == 201
    with pytest.raises(ValueError, match="already"):
        taskapi.file_format("csv", "csv", content_type="text/csv", write=taskapi._csv_writer(","))


# ==== 5 Generator ====

NOW = datetime(2026, 3, 15, 12, 30, 45, tzinfo=UTC)
EARLIER = datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC)
PERSON = ["name", "email", "address", "company", "job", "phone_number", "date"]
MORE = pytest.mark.slow
LOCALES = ["en_US", "ja_JP", "th_TH", *(pytest.param(locale, marks=MORE) for locale in ("de_DE", "es_ES", "hu_HU"))]
SOME = [  # all of them in the slow sweep
    "ar_SA", "cs_CZ", "de_DE", "el_GR", "en_GB", "en_IN", "en_US", "es_ES", "es_MX", "fa_IR", "fr_FR", "he_IL",
    "it_IT", "ja_JP", "ko_KR", "pl_PL", "pt_BR", "ru_RU", "sv_SE", "th_TH", "uk_UA", "zh_CN"]


def plan(schema: dict[str, Any], count: int = 10, **options: Any) -> Plan:
    """A plan of one record type, `thing`."""
    return related({"thing": {"count": count, "schema": schema}}, **options)


def related(records: Mapping[str, Any], seed: int = 1, now: datetime = NOW, **options: Any) -> Plan:
    """A plan of several record types."""
    specs = {name: RecordSpec.model_validate(spec) for name, spec in records.items()}
    return Recipe(specs, now=now, **{"locale": "en_US", **options}).plan(seed, now)


def rows(a_plan: Plan, size: int = 500) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of a plan, whose only use it is."""
    made = RowSource(a_plan.columns)
    with closing(a_plan):
        for _ in a_plan.chunks(made, size=size):
            pass
    return made.fresh


def column(a_plan: Plan, field: str, record_type: str = "thing") -> list[Any]:
    """One field of all rows of a plan."""
    slot = list(a_plan.columns[record_type]).index(field)
    return [row[slot] for row in rows(a_plan)[record_type]]


def things(schema: dict[str, Any], count: int = 10, **options: Any) -> list[tuple[Any, ...]]:
    """The rows of one record type."""
    return rows(plan(schema, count, **options))["thing"]


def problems(make: Any) -> dict[str, str]:
    """What a plan is refused for, by path."""
    with pytest.raises(BadRequest) as caught:
        make()
    assert caught.value.fields, "a refusal names its fields"
    return {problem.field: problem.message for problem in caught.value.fields}


class Kept:
    """Rows as the store keeps them; a plan goes on with `source`."""

    def __init__(self, a_plan: Plan) -> None:
        self.columns = a_plan.columns
        self.stored: dict[str, list[tuple[Any, ...]]] = {name: [] for name in self.columns}

    def source(self) -> RowSource:
        return RowSource(self.columns, {name: len(made) for name, made in self.stored.items()}, self.rows, self.column)

    def commit(self, source: RowSource) -> None:
        for name, made in source.fresh.items():
            self.stored[name] += made
        source.committed()

    def rows(self, record_type: str, fields: Sequence[str], ordinals: Sequence[int]) -> list[tuple[Any, ...]]:
        assert list(ordinals) == sorted(set(ordinals))
        slots = [list(self.columns[record_type]).index(field) for field in fields]
        return [tuple(self.stored[record_type][ordinal][slot] for slot in slots) for ordinal in ordinals]

    def column(self, record_type: str, field: str) -> Iterator[Any]:
        slot = list(self.columns[record_type]).index(field)
        return (row[slot] for row in self.stored[record_type])


# ---- Faker, fast and the same ----


class _Stopped(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.__mro__[1])


class _Instant(datetime, metaclass=_Stopped):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return NOW.astimezone(tz) if tz else NOW.replace(tzinfo=None)


class _Day(date, metaclass=_Stopped):
    @classmethod
    def today(cls) -> date:  # type: ignore[override]
        return NOW.date()


@contextlib.contextmanager
def stopped_clock() -> Iterator[None]:
    """Stop the clock that stock Faker sees at NOW."""
    module = types.SimpleNamespace(**{**vars(dt), "datetime": _Instant, "date": _Day})
    stopped = {id(datetime): _Instant, id(date): _Day, id(dt): module}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith("faker")]:
            for attribute, value in list(vars(sys.modules[name]).items()):
                if id(value) in stopped:
                    patch.setattr(sys.modules[name], attribute, stopped[id(value)])
        yield


def drawn(faker: Any, rng: random.Random, name: str, times: int) -> tuple[list[Any], Any]:
    """Some values of a method from one seed, or the error it ends with, and the state it leaves."""
    rng.seed(7)
    values: list[Any] = []
    try:
        for _ in range(times):
            values.append(getattr(faker, name)())
    except Exception as error:
        values.append(repr(error))
    return values, rng.getstate()


def compare(locale: str, times: int) -> tuple[int, list[str], list[str]]:
    """How many scalar methods of a locale were compared, which differ, and which ignore the seed in stock Faker.

    Ours were used before, at another instant, as a Faker that another plan has given back; all are the fast ones.
    """
    from faker.factory import Factory

    fast_rng, stock_rng, instants = random.Random(), random.Random(), [EARLIER]
    fast, stock = taskapi.FastFaker(locale, fast_rng, lambda: instants[0]), Factory.create(locale)
    stock.random = stock_rng
    compared, different, ignoring = 0, [], []
    for name in fast.names():
        if name in {"binary", "image", "json_bytes", "tar", "zip"}:
            continue  # bytes, and slow to make
        with stopped_clock():
            expected = drawn(stock, stock_rng, name, times)
            if type(expected[0][0]) not in taskapi._SCALARS:
                continue
            again = drawn(stock, stock_rng, name, times)
        instants[0] = EARLIER
        fast.quick(name)
        drawn(fast.generator, fast_rng, name, 1)
        instants[0] = NOW
        ours = drawn(fast.generator, fast_rng, name, times)
        compared += 1
        if ours != expected:  # the global Random may have given the same twice
            again = next((more for _ in range(9) if (more := drawn(stock, stock_rng, name, times)) != expected), again)
        if expected != again:
            ignoring.append(name)
            again = drawn(fast.generator, fast_rng, name, times)
            assert ours == again, f"{locale} {name} is not settled by the seed"
        elif ours != expected:
            different.append(name)
    return compared, different, ignoring


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("locale", SOME)
def test_every_scalar_method_gives_stock_fakers_values_and_leaves_its_state(locale: str) -> None:
    """Values and random state are stock's; what ignores the seed there uses the global Random, and not here."""
    compared, different, ignoring = compare(locale, times=4)
    assert compared > 200
    assert not different
    assert set(ignoring) <= set(IGNORE_THE_SEED)


# In stock Faker these draw from the random module itself, so `seed_instance` does not settle them.
IGNORE_THE_SEED = [
    *("cif", "curp", "diplomatic_license_plate", "doi", "elector_code", "license_plate", "nie", "nif", "nuss"),
    *("org_id", "passport_full", "passport_gender", "plate_letter_prefix", "plate_region_code", "rfc", "ssn", "tin"),
    "vat_id",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_method_of_every_locale_gives_stock_fakers_values() -> None:
    """The whole table: all locales, all scalar methods; printed with -s."""
    from faker.config import AVAILABLE_LOCALES

    total, found = 0, {}
    for locale in AVAILABLE_LOCALES:
        compared, different, ignoring = compare(locale, times=30)
        print(f"{locale:6} {compared:4} compared {len(different):3} differ; ignore the seed: {' '.join(ignoring)}")
        assert not different
        total += compared
        found[locale] = ignoring
    print(f"{len(found)} locales, {total} methods compared")
    assert {name for names in found.values() for name in names} <= set(IGNORE_THE_SEED)


@pytest.mark.parametrize("calls", [{name: {} for name in PERSON}, {"time_delta": {"end_datetime": "+90d"}}])
def test_a_schema_of_methods_gives_the_same_calls_made_record_by_record(calls: dict[str, dict[str, Any]]) -> None:
    """seed S is `f.seed_instance(S)` and the calls in schema order; what is no value of JSON is as it prints."""
    fake = faker.Faker("en_US")
    fake.seed_instance(42)
    with stopped_clock():
        expected = [tuple(str(getattr(fake, name)(**args)) for name, args in calls.items()) for _ in range(150)]
    schema = {name: {"type": name, "args": args} if args else name for name, args in calls.items()}
    assert things(schema, 150, seed=42) == expected


@pytest.mark.parametrize("count", [300, pytest.param(1500, marks=MORE)])
def test_a_unique_field_gives_what_fakers_unique_gives_while_values_last(count: int) -> None:
    """A taken value is drawn again, as stock does."""
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(5)
    expected = [(fake.unique.email(),) for _ in range(count)]
    assert things({"email": {"type": "email", "unique": True}}, count, seed=5) == expected


def test_faker_itself_is_left_alone() -> None:
    """Neither classes, modules nor the global Random change, and another Faker of this process draws as before."""
    from faker import Faker
    from faker.providers import date_time

    def trace() -> tuple[Any, ...]:
        fake = Faker("en_US")
        fake.seed_instance(3)
        classes = [cls for p in fake.factories[0].providers for cls in type(p).__mro__]
        names = [(cls, name, id(value)) for cls in classes for name, value in vars(cls).items()]
        return names, fake.name(), fake.email(), random.getstate(), vars(date_time)["datetime"]

    before = trace()
    things({**{name: name for name in PERSON}, "gender": "passport_gender", "born": "date_of_birth"}, 50)
    assert trace() == before


def test_relative_dates_of_fakers_methods_follow_now() -> None:
    """The clock of the machine is nowhere to be seen."""
    schema = {"a": "date_this_year", "b": "past_date", "c": "date_time_this_month", "d": "future_datetime"}
    a, b, c, d = zip(*things(schema, 200), strict=True)
    assert {day[:4] for day in a} == {"2026"}
    assert max(a) <= "2026-03-15"
    assert min(b) >= "2026-02-12"
    assert max(b) < "2026-03-15"
    assert all("2026-03-01" <= instant <= "2026-03-15T12:30:45Z" for instant in c)
    assert min(d) > "2026-03-15T12:30:45Z"
    assert things(schema, 20) != things(schema, 20, now=NOW - timedelta(days=900))


# ---- Field types ----

CONTRACT: dict[str, Any] = {
    "id": "sequence",
    "name": "name",
    "email": {"type": "email", "args": {"domain": "example.org"}, "unique": True},
    "phone": {"type": "phone_number", "null": 0.1},
    "age": {"type": "int", "min": 18, "max": 65},
    "spend": {"type": "float", "min": 0, "max": 500, "mean": 80, "sd": 30, "round": 2},
    "plan": {"type": "choice", "values": {"free": 80, "pro": 18, "team": 2}},
    "joined": {"type": "date", "from": "-1y", "to": "now"},
    "seenAt": {"type": "datetime", "from": "2024-01-01", "to": "2024-12-31"},
    "sku": {"type": "pattern", "pattern": "SKU-####-??"},
    "handle": {"type": "template", "template": "{plan}-{id}"},
    "tags": {"type": "list", "of": "word", "min": 0, "max": 3},
    "address": {"type": "object", "fields": {"city": "city", "zip": "postcode"}},
}


def test_the_contracts_example_makes_the_records_it_describes() -> None:
    """Every built-in of the contract's example, checked value by value."""
    a_plan = plan(CONTRACT, 1000)
    assert list(a_plan.columns["thing"].values()) == (
        ["int", "text", "text", "text", "int", "float", "text", "date", "datetime", "text", "text", "json", "json"]
    )
    made = [dict(zip(CONTRACT, row, strict=True)) for row in rows(a_plan)["thing"]]
    assert [r["id"] for r in made] == list(range(1, 1001))
    assert len({r["email"] for r in made}) == 1000
    assert all(r["email"].endswith("@example.org") for r in made)
    assert 50 < sum(r["phone"] is None for r in made) < 160
    assert {r["age"] for r in made} == set(range(18, 66))
    assert 75 < sum(r["spend"] for r in made) / 1000 < 85
    assert all(round(r["spend"], 2) == r["spend"] for r in made)
    assert 700 < sum(r["plan"] == "free" for r in made) < 900
    assert min(r["joined"] for r in made) >= "2025-03-15"
    assert max(r["joined"] for r in made) <= "2026-03-15"
    assert all(re.fullmatch(r"2024-\d\d-\d\dT\d\d:\d\d:\d\dZ", r["seenAt"]) for r in made)
    assert all(re.fullmatch(r"SKU-\d{4}-[A-Z]{2}", r["sku"]) for r in made)
    assert all(r["handle"] == f"{r['plan']}-{r['id']}" for r in made)
    assert {len(json.loads(r["tags"])) for r in made} == {0, 1, 2, 3}
    assert all(set(json.loads(r["address"])) == {"city", "zip"} for r in made)


@pytest.mark.parametrize(("field", "values"), [
    ({"type": "date", "from": "2026-01-01", "to": "2026-01-02"}, {"2026-01-01", "2026-01-02"}),
    ({"type": "date", "from": "-1d", "to": "today"}, {"2026-03-14", "2026-03-15"}),
    ({"type": "date", "from": "-1M", "to": "-1M+1d"}, {"2026-02-15", "2026-02-16"}),
    ({"type": "date", "from": "{start}", "to": "{start}+1d"}, {"2020-02-29", "2020-03-01"}),
    ({"type": "date", "from": "{start}+1y", "to": "{start}+1y"}, {"2021-02-28"}),
    ({"type": "date", "from": "{start}", "to": "2019-01-01"}, None),
    ({"type": "datetime", "from": "now", "to": "+1s"}, {"2026-03-15T12:30:45Z", "2026-03-15T12:30:46Z"}),
    ({"type": "datetime", "from": "2026-01-01T01:00:00+01:00", "to": "2026-01-01T00:00:00Z"}, {"2026-01-01T00:00:00Z"}),
    ({"type": "datetime", "from": "now", "to": "now", "ms": True}, {"2026-03-15T12:30:45.000Z"}),
    ({"type": "int", "min": 2**63 - 2, "max": 2**63 - 1}, {2**63 - 2, 2**63 - 1}),
    ({"type": "decimal", "min": "-0.01", "max": "0.01"}, {"-0.01", "0.00", "0.01"}),
    ({"type": "decimal", "min": "7", "max": 8, "places": 0}, {"7", "8"}),
    ({"type": "bool"}, {0, 1}),
    ({"type": "const", "value": [1, None]}, {"[1,null]"}),
    ({"type": "const", "value": None}, {None}),
    ({"type": "choice", "values": ["a", 1, None]}, {'"a"', "1", None}),
    ({"type": "choice", "values": [1, 2.5]}, {1, 2.5}),
    ({"type": "pattern", "pattern": r"\#%"}, {f"#{n}" for n in range(1, 10)}),
    ({"type": "template", "template": "100% {{{start|upper}}}"}, {"100% {2020-02-29}"}),
    ({"type": "int", "min": 1, "max": 2, "mean": 900, "sd": 1}, {2}),
    ({"type": "first_of", "of": ["no_such_method", {"type": "const", "value": "x"}]}, {"x"}),
    ({"type": "product", "of": ["price", "quantity"], "places": 2}, {"3.00"}),
    ({"type": "date_between", "args": {"start_date": "2026-01-01", "end_date": "{start}+0"}}, None),
    ({"type": "date_between", "args": {"start_date": "{start}", "end_date": "2020-02-29"}}, {"2020-02-29"}),
    ({"type": "random_element", "args": {"elements": {"x": 1, "y": 0}}}, {"x"})])
def test_a_field_reaches_all_of_its_values_and_no_other(field: dict[str, Any], values: set[Any] | None) -> None:
    """Both ends included."""
    others = {
        "start": {"type": "const", "value": "2020-02-29"},
        "price": {"type": "const", "value": "0"},
        "quantity": {"type": "int", "min": 2, "max": 2},
    }
    others["price"] = {"type": "decimal", "min": "1.50", "max": "1.50"}
    if "{start}" in str(field) and field["type"] == "date":
        others["start"] = {"type": "date", "from": "2020-02-29", "to": "2020-02-29"}
    if values is None:
        assert problems(lambda: plan({**others, "x": field}))
    else:
        assert set(column(plan({**others, "x": field}, 300), "x")) == values


@pytest.mark.parametrize(("low", "high", "digits"), [
    (0.001, 0.019, 2), (-0.019, -0.001, 2), (0.34, 0.36, 1), (0.5, 0.5, 0), (1e16, 1e16 + 4, 2), (0.1, 0.7, 1)])
def test_a_rounded_float_lies_between_its_bounds_or_is_refused(low: float, high: float, digits: int) -> None:
    """A bound that is no such number itself is not given; where there is none between them, that is said."""
    field = {"type": "float", "min": low, "max": high, "round": digits}
    if (low, high) in ((0.34, 0.36), (0.5, 0.5)):
        assert list(problems(lambda: plan({"x": field}))) == ["schema.x.round"]
        return
    values = [value for row in things({"x": field, "y": {**field, "mean": low, "sd": 1}}, 200) for value in row]
    assert all(low <= value <= high and round(value, digits) == value for value in values)


@pytest.mark.parametrize(("other", "field", "refused_at"), [
    ({"from": "2020-01-01", "to": "2020-12-31"}, {"from": "{a}", "to": "2020-06-30"}, "schema.b.from"),
    ({"from": "2020-01-01", "to": "2020-12-31"}, {"from": "2020-06-30", "to": "{a}"}, "schema.b.from"),
    ({"from": "2020-01-01", "to": "2020-12-31"}, {"from": "{a}+1y", "to": "2021-12-31"}, None),
    ({"from": "-1y", "to": "today"}, {"from": "{a}", "to": "now"}, None),
    ({"from": "-1y", "to": "today"}, {"from": "{a}+1d", "to": "now"}, "schema.b.from"),
    ({"from": "-1y", "to": "today", "null": 0.5}, {"from": "{a}+2d", "to": "{a}-2d"}, "schema.b"),
    ({}, {"from": "{a}", "to": "now"}, None)])
def test_a_date_that_another_one_bounds_keeps_both_its_bounds(
        other: dict[str, Any], field: dict[str, Any], refused_at: str | None) -> None:
    """What may leave no room is refused beforehand."""
    schema = {"a": {"type": "date", **other}, "b": {"type": "datetime", **field}}
    if refused_at:
        assert list(problems(lambda: plan(schema))) == [refused_at]
        return
    for a, b in things(schema, 300):
        assert b is None or a[:4] <= b[:4]
        assert b is None or "+" in field["from"] or a <= b <= NOW.isoformat()


@pytest.mark.parametrize(("schema", "message"), [
    ({**{name: {"type": "date", "from": "-9d", "to": "today"} for name in ("a", "b")},
      "c": {"type": "date", "from": "{a}", "to": "{b}"}}, "comes after"),
    ({"state": {"type": "choice", "values": {"CA": 300, "XX": 1}},
      "zip": {"type": "postcode_in_state", "args": {"state_abbr": "{state}"}}}, r"thing \d+: .*State Abbreviation")])
def test_a_value_that_fails_late_fails_the_job_with_its_record(schema: dict[str, Any], message: str) -> None:
    """Where two dates bound a third, or an argument does not show its fault in the trial, only the record tells."""
    with pytest.raises(TaskError, match=message):
        things(schema, 5000)


def test_a_template_has_values_as_json_writes_them() -> None:
    """Truth values, lists, objects, numbers; texts as they are and null as nothing."""
    values = {"a": True, "b": ["x", 1, None, False], "c": {"k": [1.5]}, "d": 2.0, "e": "é\"", "f": None, "g": 7}
    schema = {name: {"type": "const", "value": value} for name, value in values.items()}
    filled = {"type": "template", "template": "|".join(f"{{{name}}}" for name in values)}
    assert things({**schema, "all": filled, "up": {"type": "template", "template": "{a|upper}"}}, 1)[0][-2:] == (
        'true|["x",1,null,false]|{"k":[1.5]}|2.0|é"||7', "TRUE")


def test_a_null_chance_of_one_in_two_hundred_really_yields() -> None:
    """Faker's own `optional` never would; and a null takes exactly one draw."""
    nulls = sum(value is None for (value,) in things({"x": {"type": "name", "null": 0.005}}, 20_000))
    assert 50 < nulls < 160
    assert things({"x": {"type": "name", "null": 1}}, 3) == [(None,)] * 3


def test_several_locales_give_each_record_one_of_them() -> None:
    """A record is of one locale in all its fields."""
    made = things({"name": "name", "city": "city", "address": "address"}, 200, locale=["en_US", "ja_JP"])
    kinds = {tuple(value.isascii() for value in row) for row in made}
    assert kinds == {(True, True, True), (False, False, False)}


def test_a_field_of_two_kinds_in_two_locales_is_text() -> None:
    """The table has one type for a column."""
    a_plan = plan({"x": {"type": "first_of", "of": ["state_abbr", {"type": "int"}]}}, 50, locale=["en_US", "de_DE"])
    assert a_plan.columns == {"thing": {"x": "text"}}
    assert {type(value) for value in column(a_plan, "x")} == {str}


@given(st.decimals(-1000, 1000, places=3), st.decimals(0, 50, places=3), st.integers(0, 4), st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_decimals_are_exact_and_within_bounds(low: Decimal, span: Decimal, places: int, seed: int) -> None:
    """As many places as asked for, between the bounds, or refused if no such number lies there."""
    field = {"type": "decimal", "min": str(low), "max": str(low + span), "places": places}
    try:
        values = column(plan({"x": field}, 20, seed=seed), "x")
    except BadRequest:
        assert span < Decimal(1).scaleb(-places)
        return
    assert all(low <= Decimal(value) <= low + span and len(value.partition(".")[2]) == places for value in values)


def test_a_program_can_add_a_field_type_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One class, registered; a name is taken only once."""
    monkeypatch.setattr(taskapi, "FIELD_TYPES", dict(taskapi.FIELD_TYPES))

    @taskapi.field_type("dice")
    class Dice(taskapi.FieldType):
        """The eyes of some dice."""

        how_many: int = 1

        def draw(self, scope: taskapi.Scope) -> tuple[taskapi.Draw, Kind]:
            return lambda: sum(scope.rng.randint(1, 6) for _ in range(self.how_many)), "int"

    assert set(column(plan({"x": {"type": "dice", "howMany": 2}}, 500), "x")) == set(range(2, 13))
    assert set(column(plan({"x": {"type": "dice", "how_many": 2}}, 500), "x")) == set(range(2, 13))  # as in 1.x
    assert "did you mean 'howMany'" in problems(lambda: plan({"x": {"type": "dice", "howmny": 2}}))["schema.x.howmny"]

    @taskapi.field_type("when")
    class When(taskapi.FieldType):
        """The instant, looked at once."""

        def draw(self, scope: taskapi.Scope) -> tuple[taskapi.Draw, Kind]:
            now = scope.now.isoformat()
            return lambda: now, "text"

    recipe = Recipe({"thing": RecordSpec(count=1, schema={"x": "when"})}, now=NOW, locale="en_US")
    for now in (EARLIER, NOW):
        assert rows(recipe.plan(1, now))["thing"] == [(now.isoformat(),)]
    with pytest.raises(ValueError, match="already"):
        taskapi.field_type("dice")(type("Other", (taskapi.FieldType,), {}))


# ---- Unique ----


@pytest.mark.parametrize(("field", "count"), [
    ({"type": "int", "min": 1, "max": 3000}, 3000),
    ({"type": "bool"}, 2),
    ({"type": "choice", "values": {"a": 1, "b": 9}}, 2),
    ({"type": "date", "from": "2026-01-01", "to": "2026-12-31"}, 365),
    ({"type": "decimal", "min": "0.00", "max": "9.99"}, 1000),
    ({"type": "float", "min": 0, "max": 1, "round": 2}, 101),
    ({"type": "pattern", "pattern": "?#"}, 260),
    ({"type": "job"}, 639)])
def test_a_unique_field_gives_every_value_there_is_and_refuses_one_more(field: dict[str, Any], count: int) -> None:
    """The last value comes as easily as the first; one record more is refused up front, with the number there are."""
    field = {**field, "unique": True}
    values = column(plan({"x": field}, count), "x")
    assert len(set(values)) == count
    found = problems(lambda: plan({"x": field}, count + 1))
    assert f"only {count} different values" in found["schema.x.unique"]


@pytest.mark.parametrize("count", [1500, pytest.param(5000, marks=MORE)])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("field", [
    {"type": "word"},
    {"type": "email"},
    {"type": "template", "template": "{name}@example.com"},
    {"type": "uuid"},
    {"type": "float"},
    {"type": "first_of", "of": ["first_name"]}])
def test_unique_values_do_not_run_out(
        field: dict[str, Any], exact: bool, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken gets a number: before the @, or at its end. A Bloom filter in place of the set forgets nothing."""
    if not exact:
        monkeypatch.setattr(taskapi, "EXACT_SET", 0)
    values = column(plan({"name": "first_name", "x": {**field, "unique": True}}, count), "x")
    assert len(set(values)) == count
    if field["type"] == "template":
        assert all(re.fullmatch(r"\w+@example\.com", value) for value in values)


@pytest.mark.parametrize("name", ["random_int", "pyint", "date_of_birth", "date_time", "pydecimal", "latitude"])
def test_unique_values_that_are_no_text_are_drawn_until_they_are_new(name: str) -> None:
    """As stock Faker's `unique` does; after a thousand draws they have run out, and nothing is made up."""
    assert len(set(column(plan({"x": {"type": name, "unique": True}}, 300), "x"))) == 300
    with pytest.raises(TaskError, match="no new value in 1000 draws"):
        rows(plan({"x": {"type": "random_digit", "unique": True}}, 11))


@pytest.mark.parametrize(("schema", "field"), [
    ({"a": {"type": "float", "min": 1, "max": 1, "unique": True}}, "schema.a"),
    ({"a": {"type": "random_digit", "unique": True}}, "schema.a"),
    ({"a": {"type": "numerify", "args": {"text": "#"}, "unique": True}, "b": {"type": "boolean", "unique": True}},
     "schema.b")])
def test_a_preview_that_cannot_be_drawn_is_the_requests_fault(
        service: taskapi.Service, schema: dict[str, Any], field: str) -> None:
    """400, and the field; a job of it fails with the same words."""
    app, body = webtest.TestApp(service.app), {"recordType": "p", "count": 80, "schema": schema}
    answer = app.post_json("/preview", body, status=400).json
    assert [problem["field"] for problem in answer["fields"]] == [field]
    assert app.post_json("/generate", body).json["error"] == answer["error"]


# ---- Relations ----

SHOP: dict[str, Any] = {
    "review": {"count": [20, 30], "schema": {
        "by": {"type": "ref", "field": "customer.id"}, "name": {"type": "ref", "field": "customer.name"},
        "of": {"type": "ref", "field": "item.id"}}},
    "item": {"per": "order", "count": [0, 3], "schema": {
        "id": "sequence", "orderId": {"type": "ref", "field": "order.id"},
        "buyer": {"type": "template", "template": "{customer.name}/{order.id}"},
        "price": {"type": "decimal", "min": "0.10", "max": "9.99"}, "quantity": {"type": "int", "min": 1, "max": 3},
        "amount": {"type": "product", "of": ["price", "quantity"]}}},
    "customer": {"count": 40, "schema": {
        "id": "sequence", "name": {"type": "name", "unique": True}, "joined": {"type": "date"},
        "spent": {"type": "sum", "field": "order.total"}}},
    "order": {"per": "customer", "count": [0, 4], "schema": {
        "id": "sequence", "customerId": {"type": "ref", "field": "customer.id"},
        "placedAt": {"type": "datetime", "from": "{customer.joined}", "to": "now"},
        "label": {"type": "template", "template": "{total} EUR"},
        "total": {"type": "sum", "field": "item.amount", "places": 2}}},
    "payment": {"per": "customer", "count": 1, "schema": {
        "of": {"type": "ref", "field": "order.id"}, "by": {"type": "ref", "field": "customer.id"}}}}


def test_children_belong_to_their_parents_and_totals_to_their_items() -> None:
    """Foreign keys hold, sums are exact, dates come after the customer's, refs of one record read one row."""
    a_plan = related(SHOP)
    assert list(a_plan.columns)[:4] == ["customer", "order", "item", "payment"]
    kinds, all_rows = a_plan.columns, rows(a_plan)
    made = {name: [dict(zip(kinds[name], row, strict=True)) for row in some] for name, some in all_rows.items()}
    customers, orders = ({r["id"]: r for r in made[name]} for name in ("customer", "order"))
    for order in made["order"]:
        items = [item for item in made["item"] if item["orderId"] == order["id"]]
        assert Decimal(order["total"]) == sum(Decimal(item["amount"]) for item in items)
        assert len(items) <= 3
        assert all(item["buyer"] == f"{customers[order['customerId']]['name']}/{order['id']}" for item in items)
        assert order["placedAt"] >= customers[order["customerId"]]["joined"]
        assert order["label"] == f"{order['total']} EUR"
    for customer in made["customer"]:
        theirs = [Decimal(order["total"]) for order in made["order"] if order["customerId"] == customer["id"]]
        assert Decimal(customer["spent"]) == sum(theirs)
        assert len(theirs) <= 4
    assert all(Decimal(item["amount"]) == Decimal(item["price"]) * item["quantity"] for item in made["item"])
    assert all(customers[review["by"]]["name"] == review["name"] for review in made["review"])
    assert len({review["by"] for review in made["review"]}) > 5
    assert all(p["of"] is None or p["of"] in orders for p in made["payment"])
    assert len(made["payment"]) == 40


def test_lists_and_truth_values_come_through_a_reference_as_they_are() -> None:
    """By way of the parent at hand, and of a row read back."""
    fields = {"tags": {"type": "list", "of": "word"}, "ok": {"type": "bool"}}
    refs = {name: {"type": "ref", "field": f"a.{name}"} for name in fields}
    records = {"a": {"count": 9, "schema": fields}, "b": {"per": "a", "count": 1, "schema": refs}}
    made = rows(related({**records, "c": {"count": 20, "schema": {**refs, "all": {"type": "object", "fields": refs}}}}))
    assert made["a"] == made["b"]
    for tags, ok, everything in made["c"]:
        assert (tags, ok) in made["a"]
        assert json.loads(everything) == {"tags": json.loads(tags), "ok": bool(ok)}


@given(st.data())
@settings(max_examples=3, deadline=None)
def test_resuming_at_any_checkpoint_makes_exactly_the_rest(data: st.DataObject) -> None:
    """Killed and resumed over and over, with any chunk size: the rows are those of an uninterrupted run."""
    whole, part = Kept(one := related(SHOP)), Kept(related(SHOP))
    made = whole.source()
    for _ in one.chunks(made):
        pass
    whole.commit(made)
    checkpoint: Any = None
    for lives in [*data.draw(st.lists(st.integers(1, 4), max_size=10)), None]:
        source = part.source()
        a_plan = related(SHOP)
        for chunk in itertools.islice(a_plan.chunks(source, checkpoint, data.draw(st.integers(1, 120))), lives):
            if chunk.whole:
                part.commit(source)
                checkpoint = json.loads(json.dumps(a_plan.state()))
    assert part.stored == whole.stored


@pytest.mark.parametrize("exact", [True, False])
def test_unique_values_survive_a_restart(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been given is read back from the table, into a set as into a Bloom filter."""
    if not exact:
        monkeypatch.setattr(taskapi, "EXACT_SET", 0)
    schema = {"x": {"type": "word", "unique": True, "null": 0.1}, "y": {"type": "word", "unique": True}}
    a_plan = plan(schema, 600)
    past = Kept(a_plan)
    source = past.source()
    next(a_plan.chunks(source, size=250))
    past.commit(source)
    source = past.source()
    for _ in plan(schema, 600).chunks(source, a_plan.state(), 70):
        past.commit(source)
    assert past.stored == rows(plan(schema, 600))
    assert len({y for _, y in past.stored["thing"]}) == 600


CUT = {**SHOP, "rank": {"count": 3, "schema": {"name": {"type": "word", "unique": True}}}, "guest": {
    "count": 30, "schema": {"id": "sequence", "rank": {"type": "ref", "field": "rank.name"},
                            "mail": {"type": "email", "unique": True}}}}


@given(st.data(), st.integers(2, 12))
@settings(max_examples=5, deadline=None)
def test_resuming_in_any_part_makes_exactly_the_rest(data: st.DataObject, parts: int) -> None:
    """One after the other in one plan, killed and resumed with any chunk size, or each in a plan of its own."""
    def cut(part: int | None = None) -> Plan:
        specs = {name: RecordSpec.model_validate(spec) for name, spec in CUT.items()}
        return Recipe(specs, now=NOW, locale="en_US").plan(1, NOW, parts, part)

    whole, resumed = rows(cut()), Kept(cut())
    checkpoint: Any = None
    for lives in [*data.draw(st.lists(st.integers(1, 9), max_size=10)), None]:
        source, a_plan = resumed.source(), cut()
        for chunk in itertools.islice(a_plan.chunks(source, checkpoint, data.draw(st.integers(1, 120))), lives):
            if chunk.whole:
                resumed.commit(source)
                checkpoint = json.loads(json.dumps(a_plan.state()))
    assert resumed.stored == whole
    assert (chunk.done, chunk.total) == (sum(map(len, whole.values())),) * 2
    apart: dict[str, list[Any]] = {name: [] for name in whole}
    for part in range(parts):
        source, a_plan = RowSource(whole_columns := cut().columns, keep=cut().looked_up), cut(part)
        for chunk in a_plan.chunks(source, size=data.draw(st.integers(1, 120))):
            if chunk.whole:
                for name, made in source.made().items():
                    apart[name] += made
                source.committed()
        assert chunk.done == chunk.total
    assert list(whole_columns) == list(apart)
    assert apart == whole


def test_sequences_run_on_and_unique_values_are_unique_across_parts() -> None:
    """Where values can be counted, and where they are texts that get numbers; each number of children is as likely."""
    schema = {"id": {"type": "sequence", "start": 7, "step": 3}, "digit": {"type": "pattern", "pattern": "###"},
              "day": {"type": "date", "from": "2024-01-01", "to": "2026-12-31"}, "mail": "email", "word": "word",
              "site": {"type": "template", "template": "{word}.example"}, "first": "first_name"}
    unique = {name: field if name in ("id", "word") else {**(
        {"type": field} if isinstance(field, str) else field), "unique": True} for name, field in schema.items()}
    records = {"a": {"count": 700, "schema": unique}, "b": {"per": "a", "count": [0, 3], "schema": {
        "id": "sequence", "code": {"type": "int", "min": 1, "max": 2100, "unique": True}}}}
    with pytest.raises(BadRequest, match=r"first.*has only"):
        related(records)
    del unique["first"]
    specs = {name: RecordSpec.model_validate(spec) for name, spec in records.items()}
    for parts in (2, 9, 700):
        made = rows(Recipe(specs, now=NOW, locale="en_US").plan(1, NOW, parts))
        assert [row[0] for row in made["a"]] == list(range(7, 7 + 3 * 700, 3))
        assert [row[0] for row in made["b"]] == list(range(1, len(made["b"]) + 1))
        for slot, name in enumerate(unique):
            assert name == "word" or len({row[slot] for row in made["a"]}) == 700, name
        assert len({row[1] for row in made["b"]}) == len(made["b"])
        assert all(re.fullmatch(r"\w+\.example", row[5]) for row in made["a"])
        assert abs(len(made["b"]) - 1050) < 100


@pytest.mark.parametrize(("spec", "parts", "path", "words"), [
    ({"count": 5, "schema": {"id": "sequence"}}, 6, "parts", "at most 5"),
    ({"count": 5, "schema": {"x": {"type": "float", "unique": True}}}, 2, "schema.x.unique", "float with round"),
    ({"count": 1001, "schema": {"id": "sequence"}}, 2000, "parts", "at most 1001, the number of thing"),
])
def test_what_can_not_be_cut_is_refused(spec: Any, parts: int, path: str, words: str) -> None:
    """The field is named, and what would do."""
    records = {"thing": spec}
    if parts == 2000:
        records["reader"] = {"count": 3000, "schema": {"of": {"type": "ref", "field": "thing.id"}}}
    recipe = Recipe({name: RecordSpec.model_validate(each) for name, each in records.items()}, now=NOW, locale="en_US")
    found = problems(lambda: recipe.plan(1, NOW, parts))
    assert words in found[path]


def test_the_same_request_makes_the_same_records_whatever_python_hashes_to() -> None:
    """Another process with another hash seed, another chunk size and a used global Random."""
    script = (
        "import random, sys; from datetime import *; from taskapi import *; random.seed(int(sys.argv[1]));"
        "now, locale = datetime(2026, 1, 1, tzinfo=UTC), ['de_DE', 'uk_UA'];"
        "recipe = Recipe(preset_records('ticket', 30), now=now, locale=locale); rows = RowSource(recipe.columns);"
        "print([*recipe.plan(9, now).chunks(rows, size=int(sys.argv[1]))][-1].done, rows.fresh)"
    )
    here = Path(__file__).parent
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script, n], env={"PYTHONHASHSEED": n}, cwd=here, capture_output=True, check=True
        ).stdout
        for n in ("1", "77")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 500


def test_chunks_are_about_as_large_as_asked_and_checkpoints_small() -> None:
    """A chunk goes over by what one record brings along; a checkpoint is a few kilobytes a type."""
    a_plan, before = related(SHOP), 0
    for chunk in a_plan.chunks(RowSource(a_plan.columns), size=10):
        assert chunk.done - before <= 10 + 1 + 4 + 12 + 1
        assert len(json.dumps(a_plan.state())) < 4000 * len(SHOP)
        before = chunk.done
    assert chunk.done == chunk.total


def test_a_record_that_brings_many_along_is_made_with_pauses() -> None:
    """So that a job can be stopped there; only what is whole is to be stored."""
    schema = {"x": "uuid"}
    a_plan = related({"a": {"count": 2, "schema": schema}, "b": {"per": "a", "count": 30, "schema": schema},
                      "c": {"per": "b", "count": 200, "schema": schema}})
    source, before, whole = RowSource(a_plan.columns), 0, []
    for chunk in a_plan.chunks(source):
        made = sum(map(len, source.fresh.values()))
        assert made - before <= 60
        before = made
        whole += [chunk.done] if chunk.whole else []
    assert whole == [6031, 12062]


# ---- Refusals ----


@pytest.mark.parametrize(
    ("field", "path", "message"),
    [
        ("frist_name", "", "no such type 'frist_name'; did you mean 'first_name'"),
        ({"type": "int", "min": 5, "max": 1}, ".min", "more than max"),
        ({"type": "int", "max": 2**63}, ".max", "less than or equal"),
        ({"type": "int", "minimum": 5}, ".minimum", "'min'?; it takes mean, sd, min, max, multipleOf, null, unique"),
        ({"type": "int", "mean": 5}, ".sd", "go together"),
        ({"type": "decimal", "min": "0.001", "max": "0.009"}, ".min", "more than max"),
        ({"type": "decimal", "min": "1e999999999"}, ".min", "decimal number"),
        ({"type": "float", "max": "5"}, ".max", "valid number"),
        ({"type": "choice", "values": []}, ".values", ""),
        ({"type": "choice", "values": {"a": -1}}, ".values", "weight"),
        ({"type": "date", "from": "yesterday"}, ".from", "no date"),
        ({"type": "date", "from": "2026-02-30"}, ".from", "day is out of range"),
        ({"type": "date", "from": "now", "to": "-1d"}, ".from", "comes after"),
        ({"type": "datetime", "from": "-999999y"}, ".from", ""),
        ({"type": "template", "template": "{nme}"}, "", "no such field 'nme'"),
        ({"type": "template", "template": "{name|slugg}"}, ".template", "did you mean 'slug'"),
        ({"type": "template", "template": "{"}, ".template", "lone brace"),
        ({"type": "template", "template": "{x}"}, None, "need each other: x -> x"),
        ({"type": "list", "of": "nmae"}, ".of", "did you mean 'name'"),
        ({"type": "list", "of": {"type": "text", "args": {"max_nb_chars": 499}}, "max": 250}, ".max", "longer than"),
        ({"type": "list", "of": {"type": "list", "of": {"type": "list", "of": "word"}, "max": 99}, "max": 999}, "",
         "too much to try"),
        ({"type": "object", "fields": {"a": {"type": "int", "min": "x"}}}, ".fields.a.min", "valid integer"),
        ({"type": "list", "of": "word", "unique": True}, ".unique", ""),
        ({"type": "object", "fields": {"x": "bool"}, "unique": True}, ".unique", ""),
        ({"type": "object", "fields": {"x": {"type": "int", "unique": True}}}, ".fields.x.unique", ""),
        ({"type": "name", "null": 2}, ".null", "less than or equal to 1"),
        ({"type": "ref", "field": "nobody.id"}, "", "no such field"),
        ({"type": "product", "of": ["name"]}, "", "takes numbers"),
        ({"type": "sum", "field": "item.amount"}, "", "no such field"),
        ({"type": "sequence", "start": 2**63 - 5}, ".start", "goes past"),
        ({"type": "text", "args": {"max_nb_char": 5}}, ".args.max_nb_char", "it takes max_nb_chars"),
        ({"type": "text", "args": {"max_nb_chars": 10**9}}, ".args.max_nb_chars", "at most 4096"),
        ({"type": "text", "args": {"max_nb_chars": 1}}, ".args", "at least 5"),
        ({"type": "password", "args": {"length": 10**8}}, ".args.length", "at most"),
        ({"type": "pystr", "args": {"max_chars": 10**8}}, ".args.max_chars", "at most"),
        ({"type": "numerify", "args": {"text": "#" * 10**5}}, ".args.text", "at most"),
        ({"type": "paragraph", "args": {"nb_sentences": 4096}}, ".args.nb_sentences", "at most 500"),
        ({"type": "domain_name", "args": {"levels": 4000}}, ".args", ""),
        ({"type": "random_number", "args": {"digits": 4500}}, ".args.digits", "at most"),
        ({"type": "image_url", "args": {"placeholder_url": "{width.__class__}"}}, ".args.placeholder_url", "no such"),
        ({"type": "image_url", "args": {"placeholder_url": "{width:>99999999}!"}}, ".args.placeholder_url", "braces"),
        ({"type": "pystr_format", "args": {"string_format": "{{binary}}"}}, ".args.string_format", "braces"),
        ({"type": "url", "args": {"schemes": ["{{binary}}"]}}, ".args.schemes", "braces"),
        ({"type": "passport_gender", "args": {"seed": 5}}, ".args.seed", "no argument"),
        ({"type": "date_between", "args": {"start_date": "2026-13-01"}}, ".args.start_date", "month"),
        ({"type": "const", "value": "a\0b"}, "", "database"),
        ({"type": "const", "value": {"a": ["\ud800"]}}, "", "database"),
        ({"type": "json_bytes", "args": {"num_rows": 4000, "data_columns": [["x", "binary"]]}}, "", "no single value"),
        ({"type": "pylist", "args": {"nb_elements": 4000, "value_types": ["binary"]}}, "", "no single value"),
        ({"type": "texts", "args": {"nb_texts": 4000, "max_nb_chars": 4000}}, "", "no single value"),
        ("string", "", "no such type 'string'; say word, text or pattern"),
        *[({"type": name, "maxLength": 5}, "", meant) for name, meant in (
            ("number", "int, float or decimal"), ("integer", "int"), ("timestamp", "datetime"), ("regex", "pattern"),
            ("enum", "choice"), ("boolean", "or say bool"), ("text", "or say word, pattern or template"))],
        ({"type": "email", "domain": "x.org"}, ".domain", "takes args, null, unique; what Faker's method takes goes"),
        ({"type": "text", "args": {"max_nb_chars": 5, "ext_word_list": ["longer"]}}, ".args", "words of 1 to 4"),
        ({"type": "text", "args": {"max_nb_chars": 5, "ext_word_list": [""]}}, ".args", "words of 1 to 4"),
        ({"type": "file_path", "args": {"depth": 4096}}, ".args.depth", "at most 64"),
        ({"type": "choice", "values": ["x" * 70_000]}, ".values", "at most 65536"),
        (5, "", "name of a type"),
        ({"of": "word"}, "", "name of a type"),
        *[(name, "", "no s") for name in ("words", "profile", "binary", "json_bytes", "csv", "json", "seed_instance",
          "add_provider", "parse", "_random_color", "__class__", "random_elements", "pytimezone", "pyobject", "xml")],
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_its_path(field: Any, path: str | None, message: str) -> None:
    """Before there is a job, quickly, and in words that help."""
    found = problems(lambda: plan({"name": "name", "x": field}))
    if path is None:
        assert message in found["schema"]
    else:
        assert len(found) == 1
        ((where, what),) = found.items()
        assert where.startswith(f"schema.x{path}")
        assert message in what


def test_a_wrong_name_of_an_option_is_told_before_the_one_that_is_missing() -> None:
    """With the name that was meant, and in small letters, as part of the sentence."""
    found = problems(lambda: plan({"x": {"type": "choice", "value": [1]}}))
    assert [*found] == ["schema.x.value", "schema.x.values"]
    assert "did you mean 'values'" in found["schema.x.value"]
    assert found["schema.x.values"] == "field required"


class CountedRandom(random.Random):
    """A Random that ends what draws without end."""

    left = 0

    def random(self) -> float:
        return self.counted() or super().random()

    def getrandbits(self, k: int) -> int:
        return self.counted() or super().getrandbits(k)

    def counted(self) -> None:
        CountedRandom.left -= 1
        if CountedRandom.left < 0:
            raise KeyboardInterrupt("too many draws")


ARGUMENTS: list[Any] = [
    0, 1, 5, 24, 25, 99, 100, 1000, 4096, 400_000_000, 2**63 - 1, -1, 1e300, 0.5, "", "x", "#" * 4096, "{{binary}}",
    "{width:>99999999}", "%Y" * 2000, [], [""], ["a"], ["longer"], ["x" * 40], ["x" * 250] * 60, [[1] * 50] * 50, True]


def fuzz(locale_names: Sequence[str], share: float) -> int:
    """Gives methods a share of all arguments, as literals and from a field: a value has a ceiling in work and size."""
    chosen, seen, made = Random(1), set(), 0
    record_type = taskapi.RecipeType("thing", RecordSpec(count=1, schema={"v": "uuid", "x": "uuid"}), "")
    for locale in locale_names:
        generator = taskapi.RecordGenerator(record_type, {}, False, NOW)
        generator.rng, generator.kinds["v"] = CountedRandom(0), "json"
        fast = generator.faker(locale)
        words = ({}, {"max_nb_chars": 5}, {"max_nb_chars": 25})
        parameters = {name: [*fast.signature(name).parameters] for name in fast.names()}
        for name, value, way, more in itertools.product(parameters, ARGUMENTS, ("literal", "field"), words):
            for argument in parameters[name]:
                case = getattr(type(fast.provider(name)), name), argument, hash(str(value)), way, *more, (
                    locale if argument in ("max_nb_chars", "ext_word_list", "nb_sentences", "nb_words") else "")
                if case in seen or chosen.random() > share or (more and argument != "ext_word_list"):
                    continue
                seen.add(case)
                generator.values[0] = json.dumps(value)
                field = {"type": name, "args": {**more, argument: value if way == "literal" else "{v}"}}
                scope = taskapi.Scope(generator, locale, "x")
                CountedRandom.left = 10_000 * 50  # what the trial draws too
                with suppress(TaskError):
                    draw, _ = taskapi.parse_field(field, "x").draw(scope)
                    assert len(str(draw())) <= taskapi.MAX_TEXT, field
                    made += 1
    return made


@pytest.mark.parametrize("share", [0.01, pytest.param(1, marks=MORE)])
def test_no_argument_makes_faker_work_without_end(share: float) -> None:
    """Neither a literal nor one that is read from a field, in time (draws are counted) or in memory: of 1 GB of
    addresses this file, with all that it imports, reserves half."""
    script = (f"import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); import taskapi_test as t;"
              f"from faker.config import AVAILABLE_LOCALES; share = {share};"
              "print(t.fuzz(['en_US', 'de_DE'] if share < 1 else AVAILABLE_LOCALES, share))")
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=HERE, capture_output=True, text=True,
                           timeout=3600, check=False)
    assert not ended.returncode, ended.stderr[-3000:]
    assert int(ended.stdout) > 5000 * share


@pytest.mark.parametrize(("value", "field"), [
    (400_000_000, {"type": "random_number", "args": {"digits": "{n}"}}),
    (10**7, {"type": "password", "args": {"length": "{n}"}}),
    ("{width:>99999999}", {"type": "image_url", "args": {"placeholder_url": "{n}"}}),
    (["longer"], {"type": "text", "args": {"max_nb_chars": 5, "ext_word_list": "{n}"}}),
    (5, {"type": "text", "args": {"max_nb_chars": "{n}", "ext_word_list": ["longer"]}})])
def test_an_argument_that_is_read_from_a_field_is_held_to_the_same_limits(value: Any, field: dict[str, Any]) -> None:
    """At every draw: when the recipe is tried, and later too, where the value comes seldom."""
    assert set(problems(lambda: plan({"n": {"type": "const", "value": value}, "x": field}))) == {"schema.x.args"}
    harmless = "x.org" if isinstance(value, str) else ["ab"] if isinstance(value, list) else 9
    values = [harmless] * 400 + [value]
    with pytest.raises(TaskError, match=r"at most|words of"):
        things({"n": {"type": "choice", "values": values}, "x": field}, 5000)


FIELDS_400 = {f"f{number}": "name" for number in range(400)}


def nest(depth: int) -> Any:
    return {"type": "list", "of": nest(depth - 1) if depth else "word", "min": 4, "max": 4}


@pytest.mark.parametrize(("records", "locale_count", "path"), [
    ({"a": {"count": 1, "schema": FIELDS_400}}, 90, "schema"),
    ({"a": {"count": 1, "schema": {"x": nest(6)}}}, 1, "schema.x"),
    ({"a": {"count": 1, "schema": {"x": {"type": "object", "fields": {"y": nest(6)}}}}}, 1, "schema.x"),
    ({"a": {"count": 1, "schema": {f"f{n}": {"type": "paragraph", "args": {"nb_sentences": 500}} for n in range(400)}}},
     1, "schema"),
    ({f"t{n}": {"count": 1, "schema": {"x": "name"}} for n in range(50)}, 20, "records")])
def test_what_takes_long_to_try_is_refused_before_it_is_tried(
        records: Any, locale_count: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields, depth, locales, large arguments, types: the message says how much that is, and how much may be."""
    from faker.config import AVAILABLE_LOCALES

    def tried(*_: Any) -> Any:
        raise AssertionError("was tried")

    monkeypatch.setattr(taskapi, "RecordGenerator", tried)
    found = problems(lambda: related(records, locale=sorted(AVAILABLE_LOCALES)[:locale_count]))
    assert "of at most 3000" in found[path]


def test_every_problem_is_told_at_once() -> None:
    """Those of the description and those found by trying; not those that only follow from another."""
    schema = {
        "a": {"type": "int", "foo": 1}, "b": "nmae", "c": {"type": "bool", "unique": True}, "_ID": "uuid",
        "A": "name", "d": {"type": "template", "template": "{b}"},
    }
    assert set(problems(lambda: plan(schema))) == (
        {"schema.a.foo", "schema.b", "schema.c.unique", "schema._ID", "schema.A"}
    )
    assert set(problems(lambda: plan({"a": "nmae"}, where="records"))) == {"records.thing.schema.a"}
    assert set(problems(lambda: plan({"a": "name"}, locale="en_XX"))) == {"locale"}


@pytest.mark.parametrize("name", ["", " a", "a ", "a\n", "x" * 256, "_id", "_Job", "_CREATED"])
def test_field_names_that_a_table_can_not_have_are_refused(name: str) -> None:
    """Printable, 1 to 64 characters, not one of the store's own."""
    assert f"schema.{name}" in problems(lambda: plan({name: "name"}))


@pytest.mark.parametrize("name", ["Sqlite", "sqlite_x", "jobs", "1a", "a-b", "a" * 64, ""])
def test_record_types_that_are_reserved_are_refused(name: str) -> None:
    """So that no table is in the way of another."""
    spec = {"count": 1, "schema": {"a": "name"}}
    for body in ({"recordType": name, **spec}, {"records": {name: spec}}):
        with pytest.raises(ValidationError):
            taskapi.GenerateRequest.model_validate(body)


def _per(per: str, **schema: Any) -> dict[str, Any]:
    return {"per": per, "count": 1, "schema": {"id": "sequence", **schema}}


@pytest.mark.parametrize(("records", "path", "message"), [
    ({"a": _per("b"), "b": _per("a")}, "records", "a -> b -> a"),
    ({"a": _per("c")}, "per", "no such record type 'c'"),
    ({"a": {"count": 5, "schema": {"x": {"type": "ref", "field": "b.id"}}}, "b": _per("a")}, "records", "a -> b"),
    ({"a": {"count": [3, 1], "schema": {"x": "name"}}}, "count", "range"),
    ({"a": {"count": 0, "schema": {"x": "name"}}}, "count", "1 or more"),
    ({"a": {"count": 2, "schema": {"n": {"type": "sum", "field": "b.n"}}},
      "b": _per("a", n={"type": "ref", "field": "a.n"})}, "records.b.schema.n", "only known once"),
    ({"a": _per("b"), "b": {"count": 1, "schema": {"x": "name"}}, "c": {**_per("b"), "count": 10**6}},
     "records.c.count", "at most")])
def test_relations_that_can_not_be_are_refused_by_name(records: Any, path: str, message: str) -> None:
    """Cycles, unknown names, impossible numbers."""
    found = problems(lambda: related(records))
    assert message in found[path]


# ---- JSON Schema ----


def schema_records(schema: Any, count: int = 20, **options: Any) -> list[dict[str, Any]]:
    """What a preview makes of a JSON Schema, each record valid to the referee."""
    request = {"recordType": "thing", "count": count, "seed": 1, "now": "2026-01-01T00:00:00Z", "schema": schema}
    made = taskapi.preview(taskapi.GenerateRequest.model_validate({**request, **options}))
    records: list[dict[str, Any]] = json.loads(made)["records"]
    judge = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    for record in records:
        judge(schema, format_checker=judge.FORMAT_CHECKER).validate(record)
    assert len(records) == count
    return records


def shaped(**properties: Any) -> dict[str, Any]:
    """A JSON Schema of an object."""
    return {"type": "object", "properties": properties}


class Color(enum.Enum):
    """As a field of a model."""

    RED, BLUE = "red", "blue"


class Cat(BaseModel):
    """One of a union."""

    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    """The other."""

    kind: Literal["dog"]
    name: str


class Tree(BaseModel):
    """It holds itself."""

    name: str
    left: Tree | None = None
    children: list[Tree] = []


class Visit(BaseModel):
    """Much of what a pydantic model can say."""

    id: int
    key: UUID
    email: Annotated[str, Field(max_length=40, json_schema_extra={"format": "email"})]
    color: Color
    age: Annotated[int, Field(gt=17, lt=100)]
    score: float = Field(ge=0, le=10, multiple_of=0.5)
    at: datetime
    day: date
    length: timedelta
    zip: Annotated[str, Field(pattern=r"^\d{5}(-\d{4})?$")]
    pet: Cat | Dog = Field(discriminator="kind")
    tree: Tree
    words: set[str] = Field(min_length=1, max_length=3)
    counts: dict[str, int]
    pair: tuple[int, str]
    note: str | None = None
    either: int | str = 1


DRAFT_7, DRAFT_2020 = "http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2020-12/schema"
POINT = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3}
IN_USE: dict[str, dict[str, Any]] = {
    "package manifest": {"$schema": DRAFT_7, **shaped(
        name={"type": "string", "pattern": "^(?:@[a-z0-9-]+/)?[a-z0-9-]+$", "minLength": 1, "maxLength": 214},
        version={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"}, private={"type": "boolean"},
        keywords={"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        license={"anyOf": [{"enum": ["MIT", "ISC"]}, {"type": "string", "maxLength": 20}]},
        author={"$ref": "#/definitions/person"},
        contributors={"type": "array", "items": {"$ref": "#/definitions/person"}},
        dependencies={"type": "object", "additionalProperties": {"type": "string", "pattern": "^[~^]?[0-9.]+$"}},
        bugs={"type": ["object", "string"], "properties": {"url": {"type": "string", "format": "uri"}}}),
        "required": ["name", "version"], "definitions": {"person": {
            "type": ["object", "string"], "required": ["name"],
            "properties": {"name": {"type": "string"}, "email": {"type": "string", "format": "email"}}}}},
    "continuous integration": {"$schema": DRAFT_7, **shaped(
        name={"type": "string"}, on={"oneOf": [
            {"$ref": "#/definitions/event"},
            {"type": "array", "items": {"$ref": "#/definitions/event"}, "minItems": 1, "uniqueItems": True}]},
        env={"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}},
        jobs={"type": "object", "minProperties": 1, "propertyNames": {"pattern": "^[_a-zA-Z][a-zA-Z0-9_-]*$"},
              "additionalProperties": {"$ref": "#/definitions/job"}}),
        "required": ["on", "jobs"], "additionalProperties": False, "definitions": {
            "event": {"enum": ["push", "pull_request", "workflow_dispatch"]},
            "job": {**shaped(**{"runs-on": {"type": "string"}, "timeout-minutes": {"type": "number", "minimum": 1},
                               "steps": {"type": "array", "minItems": 1, "items": {"$ref": "#/definitions/step"}}}),
                    "required": ["runs-on", "steps"], "additionalProperties": False},
            "step": {"type": "object", "oneOf": [{"required": ["uses"]}, {"required": ["run"]}],
                     "properties": {"uses": {"type": "string"}, "run": {"type": "string"}, "name": {"type": "string"}},
                     "additionalProperties": False}}},
    "GeoJSON": {"$schema": DRAFT_2020, **shaped(
        type={"const": "FeatureCollection"}, features={"type": "array", "minItems": 1, "items": {
            "type": "object", "required": ["type", "properties", "geometry"],
            "properties": {"type": {"const": "Feature"}, "properties": {"type": ["object", "null"]}, "geometry": {
                "oneOf": [{"type": "null"}, *({
                    "type": "object", "required": ["type", "coordinates"],
                    "properties": {"type": {"const": name}, "coordinates": coordinates}} for name, coordinates in {
                        "Point": POINT, "LineString": {"type": "array", "minItems": 2, "items": POINT},
                        "Polygon": {"type": "array", "items": {"type": "array", "minItems": 4, "items": POINT}},
                    }.items())]}}}}), "required": ["type", "features"]},
    "pet of a store": {**shaped(
        id={"type": "integer", "format": "int64"}, name={"type": "string", "examples": ["Rex"]},
        category={"$ref": "#/components/schemas/Category"}, photoUrls={"type": "array", "items": {"type": "string"}},
        tags={"type": "array", "items": {"$ref": "#/components/schemas/Tag"}},
        nickname={"type": "string", "nullable": True},
        status={"type": "string", "description": "in the store", "enum": ["available", "pending", "sold"]}),
        "required": ["name", "photoUrls"], "xml": {"name": "pet"}, "components": {"schemas": {
            "Category": shaped(id={"type": "integer", "format": "int64"}, name={"type": "string"}),
            "Tag": shaped(id={"type": "integer", "format": "int32"}, name={"type": "string"})}}},
    "order of a store": shaped(
        id={"type": "integer", "format": "int64", "minimum": 1}, quantity={"type": "integer", "format": "int32"},
        shipDate={"type": "string", "format": "date-time"}, complete={"type": "boolean", "default": False}),
    "patient": {"$schema": DRAFT_2020, **shaped(
        resourceType={"const": "Patient"}, id={"type": "string", "pattern": r"^[A-Za-z0-9\-\.]{1,64}$"},
        gender={"enum": ["male", "female", "other", "unknown"]},
        birthDate={"type": "string", "pattern": "^([0-9]{4})(-(0[1-9]|1[0-2])(-(0[1-9]|[1-2][0-9]))?)?$"},
        name={"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/HumanName"}},
        contact={"type": "array", "items": shaped(
            relation={"$ref": "#/$defs/Coding"}, name={"$ref": "#/$defs/HumanName"})},
        multipleBirth={"oneOf": [{"type": "boolean"}, {"type": "integer", "minimum": 1, "maximum": 8}]},
        extension={"type": "array", "items": {"$ref": "#/$defs/Extension"}}),
        "required": ["resourceType", "name"], "$defs": {
            "HumanName": shaped(use={"enum": ["official", "usual"]}, family={"type": "string"},
                               given={"type": "array", "items": {"type": "string"}}),
            "Coding": shaped(system={"type": "string", "format": "uri"}, code={"type": "string"}),
            "Extension": {**shaped(url={"type": "string", "format": "uri"}, valueCode={"$ref": "#/$defs/Coding"},
                                  extension={"type": "array", "items": {"$ref": "#/$defs/Extension"}}),
                          "required": ["url"]}}},
    "pydantic: nested, enum, constrained, union": Visit.model_json_schema(),
    "pydantic: recursive": Tree.model_json_schema(),
    "pydantic: as it is serialized": Visit.model_json_schema(mode="serialization"),
    "zod: strict object": {"$schema": DRAFT_2020, **shaped(
        id={"type": "string", "format": "uuid", "pattern": "^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$"},
        email={"type": "string", "format": "email", "pattern": r"^[^@]+@[^@]+\.[a-z]+$"},
        age={"type": "integer", "minimum": 0, "maximum": 9007199254740991}, role={"type": "string", "enum": ["a", "b"]},
        tags={"maxItems": 5, "type": "array", "items": {"type": "string", "minLength": 1}},
        nick={"anyOf": [{"type": "string"}, {"type": "null"}]},
        pair={"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]}),
        "required": ["id", "email", "age", "role", "tags", "nick"], "additionalProperties": False},
    "zod: discriminated union": {"$schema": DRAFT_2020, **shaped(shape={"oneOf": [
        {**shaped(kind={"type": "string", "const": "circle"}, radius={"type": "number", "exclusiveMinimum": 0}),
         "required": ["kind", "radius"], "additionalProperties": False},
        {**shaped(kind={"type": "string", "const": "square"}, side={"type": "number", "exclusiveMinimum": 0}),
         "required": ["kind", "side"], "additionalProperties": False}]}), "required": ["shape"]},
    "editor settings": {"$schema": DRAFT_7, **shaped(**{
        "editor.tabSize": {"type": "integer", "minimum": 1, "default": 4}, "files.exclude": {
            "type": "object", "additionalProperties": {"type": "boolean"}},
        "editor.rulers": {"type": "array", "items": {"anyOf": [{"type": "number"}, shaped(column={"type": "number"})]}},
        "theme": {"oneOf": [{"const": "dark", "title": "Dark"}, {"const": "light", "title": "Light"}]}})},
    "web manifest": {"$schema": DRAFT_7, **shaped(
        name={"type": "string"}, start_url={"type": "string", "format": "uri-reference"},
        display={"enum": ["fullscreen", "standalone", "browser"], "default": "browser"},
        background_color={"type": "string", "pattern": "^#[0-9a-fA-F]{6}$"},
        icons={"type": "array", "items": {**shaped(src={"type": "string", "format": "uri-reference"}, sizes={
            "oneOf": [{"pattern": r"^\d+x\d+( \d+x\d+)*$", "type": "string"}, {"const": "any"}]}),
            "required": ["src"]}})},
    "event with metadata": {"$schema": DRAFT_2020, "allOf": [{"$ref": "#/$defs/base"}], **shaped(
        amount={"type": "number", "multipleOf": 0.01, "exclusiveMinimum": 0, "maximum": 100000},
        currency={"type": "string", "minLength": 3, "maxLength": 3, "pattern": "^[A-Z]+$"}), "required": ["amount"],
        "$defs": {"base": {**shaped(eventId={"type": "string", "format": "uuid"},
                                   occurredAt={"type": "string", "format": "date-time"}), "required": ["eventId"]}}},
    "expression tree": {"$schema": DRAFT_2020, **shaped(root={"$ref": "#/$defs/node"}), "required": ["root"], "$defs": {
        "node": {"oneOf": [{"type": "number"}, {**shaped(op={"enum": ["+", "*"]}, left={"$ref": "#/$defs/node"},
                                                       right={"$ref": "#/$defs/node"}),
                                               "required": ["op", "left", "right"]}]}}},
    "address with country rules": {"$schema": DRAFT_7, **shaped(country={"enum": ["US", "NL"]}),
                                   "if": {"properties": {"country": {"const": "US"}}}},
    "strict config": {"$schema": DRAFT_2020, **shaped(port={"type": "integer"}), "patternProperties": {"^x-": {}}},
}  # fmt: skip


def test_schemas_in_use_make_valid_records_or_are_refused_by_name() -> None:
    """Of what people have, most is honoured; the rest says what is not."""
    refused = {}
    for name, schema in IN_USE.items():
        try:
            assert schema_records(schema) == schema_records(schema), "the same seed makes the same"
        except BadRequest as refusal:
            refused[name] = refusal.fields[0].field
    print(f"{len(IN_USE)} schemas in use: {len(IN_USE) - len(refused)} valid, {len(refused)} refused: {refused}")
    assert refused == {"address with country rules": "schema#/if", "strict config": "schema#/patternProperties"}


def test_what_a_pydantic_model_makes_is_an_instance_of_it(service: taskapi.Service) -> None:
    """The class itself is a schema, alone or among related types."""
    alone = service.enqueue("generate", {"recordType": "visit", "count": 5, "schema": Visit})
    service.enqueue("generate", {"records": {
        "home": {"count": 2, "schema": Tree}, "call": {"per": "home", "count": 2, "schema": Visit}}})
    assert alone.error is None
    for record_type, count in (("visit", 5), ("home", 2), ("call", 4)):
        items = webtest.TestApp(service.app).get(f"/records/{record_type}").json["items"]
        assert len(items) == count
        for item in items:
            (Tree if record_type == "home" else Visit).model_validate_json(json.dumps(item))


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-20, 20), st.sampled_from(["a", "", "foo", "é", 0.5]))
NUMBERS = st.integers(-200, 200).map(lambda eighths: eighths / 8)
NAMES = st.sampled_from(["a", "b", "c", "email", "id", "firstName", "created_at"])
PATTERNS = st.sampled_from(["^[a-z]+$", "a", r"^\d{2,4}-[A-Z]$", "(foo|ba[rz])$", "^x?y*z", "[^abc]{2}", "^$", ""])
FORMATS = st.sampled_from(["date", "date-time", "email", "uuid", "ipv4", "uri", "time", "hostname", "ipv6", "other"])


def some(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas with some of these keywords."""
    return st.fixed_dictionaries({}, optional=keywords)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas that hold others."""
    return st.one_of(
        some(type=st.just("array"), items=inner, prefixItems=st.lists(inner, max_size=2), minItems=st.integers(0, 3),
             maxItems=st.integers(1, 4), uniqueItems=st.booleans()),
        some(type=st.just("object"), properties=st.dictionaries(NAMES, inner, max_size=3),
             minProperties=st.integers(0, 3), required=st.lists(NAMES, max_size=2, unique=True),
             additionalProperties=st.one_of(st.booleans(), inner), maxProperties=st.integers(2, 5),
             dependentRequired=st.dictionaries(NAMES, st.lists(NAMES), max_size=1),
             propertyNames=st.sampled_from([{"maxLength": 5}, {"pattern": "^[a-z]+$"}])),
        some(anyOf=st.lists(inner, min_size=1, max_size=3), oneOf=st.lists(inner, min_size=1, max_size=3)),
        some(type=st.sampled_from(["string", ["integer", "null"]]), allOf=st.lists(inner, min_size=1, max_size=2)))


SMALL = st.one_of(
    some(type=st.just("string"), minLength=st.integers(0, 6), maxLength=st.integers(4, 30), pattern=PATTERNS),
    some(type=st.just("string"), format=FORMATS, minLength=st.integers(0, 6), maxLength=st.integers(20, 60)),
    some(type=st.sampled_from(["integer", "number", ["integer", "null"], ["number", "string"]]), minimum=NUMBERS,
         maximum=NUMBERS, exclusiveMinimum=NUMBERS, multipleOf=st.sampled_from([1, 3, 0.5, 0.1, 0.01, 1.5])),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {}, True, False, {"$ref": "#/$defs/a"}, {"$ref": "#"}]),
    some(enum=st.lists(SCALARS, min_size=1, max_size=4), const=SCALARS))
JSON_SCHEMAS = st.builds(
    lambda properties, a, rest: {"$schema": DRAFT_2020, **shaped(**properties), "$defs": {"a": a}, **rest},
    st.dictionaries(NAMES, st.recursive(SMALL, larger, max_leaves=5), min_size=1, max_size=3),
    st.recursive(SMALL, larger, max_leaves=4),
    some(required=st.lists(NAMES, max_size=2, unique=True), additionalProperties=st.booleans()))


@given(JSON_SCHEMAS)
@settings(max_examples=100)
def test_every_record_is_valid_or_the_schema_refused(schema: dict[str, Any]) -> None:
    """Whatever the supported keywords say together, the referee agrees; a refusal has a JSON Pointer."""
    refused: list[Any] = []
    try:
        schema_records(schema, count=5)
    except BadRequest as refusal:
        refused = [*refusal.fields] or [("nothing", "")]
    assert all(field.startswith("schema#/") for field, _ in refused), refused


PIECES = st.sampled_from(
    ["^", "a", "[a-c]", "(a|bc)*", r"\d+", "x?", "(?:a|b|){2}", "[^a]", "$", "|", r"\w{1,3}?", "(b$|c)"])


@given(st.one_of(PATTERNS, st.lists(PIECES, max_size=5).map("".join)), st.integers(0, 5), st.integers(0, 20))
def test_texts_drawn_from_an_expression_are_found_by_it(source: str, low: int, more: int) -> None:
    """`re` finds what is drawn; the automaton finds in a text what `re` does."""
    regex = taskapi.Regex(source)
    with suppress(ValueError):  # no text has these lengths
        draw = regex.draw(Random(1), low, low + more)
        for text in [draw() for _ in range(10)]:
            assert re.search(source, text)
            assert low <= len(text) <= low + more
    for text in ("", "a", "abc", "xx-7", "bcbc", "12-Z", "foo"):
        assert regex.found_in(text) == bool(re.search(source, text)), text


@pytest.mark.parametrize(
    ("keywords", "test"),
    [
        ({"const": 5, "enum": [5, 6], "type": "integer"}, {5}.__contains__),
        ({"enum": ["x", 1], "x-faker": "name"}, ["x", 1].__contains__),
        ({"x-faker": "person.firstName", "format": "email"}, None),
        ({"x-faker": {"pystr_format": {"string_format": "A##"}}}, lambda v: re.fullmatch(r"A\d\d", v)),
        ({"faker": {"number.int": {"min": 3, "max": 4}}}, {3, 4}.__contains__),
        ({"faker": "internet.email", "type": "string"}, lambda v: "@" in v),
        ({"faker": "date.past", "type": "string", "format": "date"}, date.fromisoformat),
        ({"faker": "location.latitude", "type": "number"}, lambda v: abs(v) <= 90),
        ({"format": "ipv4", "pattern": "^1"}, lambda v: v.count(".") == 3),
        ({"type": "string", "pattern": "^(a+)+$", "minLength": 9, "maxLength": 9}, "aaaaaaaaa".__eq__),
        ({"type": "string", "maxLength": 3}, lambda v: 1 <= len(v) <= 3),
        ({"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 4}, (3).__eq__),
        ({"type": "number", "exclusiveMinimum": True, "minimum": 0, "maximum": 1, "multipleOf": 0.5}, None),
        ({"type": "integer", "multipleOf": 1.5, "minimum": 1, "maximum": 5}, (3).__eq__),
        ({"multipleOf": 0.01, "minimum": 0, "maximum": 1}, lambda v: round(v, 2) == v),
        ({"examples": ["ex"]}, "ex".__eq__),
        ({"type": "string", "examples": ["ex"]}, lambda v: v != "ex"),
        ({"type": ["integer", "string"], "minimum": 5, "maximum": 5}, lambda v: v == 5 or isinstance(v, str)),
        ({"prefixItems": [{"const": 1}, {"const": 2}], "items": False}, [1, 2].__eq__),
        ({"items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 3}, lambda v: sorted(v) == [1, 2, 3]),
        ({"type": "object", "required": ["q"], "additionalProperties": {"const": 1}}, lambda v: v["q"] == 1),
        ({"type": "object", "propertyNames": {"enum": ["u", "v"]}, "minProperties": 2}, lambda v: {*v} == {"u", "v"}),
        ({"type": "object", "dependentRequired": {"a": ["b"]}, "required": ["a"]}, lambda v: {*v} == {"a", "b"}),
    ],
)  # fmt: skip
def test_the_first_thing_that_tells_a_value_wins(keywords: dict[str, Any], test: Any) -> None:
    """const, enum, Faker, format, pattern, name, type and bounds, examples."""
    old = keywords.get("exclusiveMinimum") is True
    draft = jsonschema.Draft4Validator.META_SCHEMA["$schema"] if old else DRAFT_2020
    if test is None and "format" in keywords:
        with pytest.raises(BadRequest, match="valid value"):
            schema_records({"$schema": DRAFT_2020, **shaped(it=keywords)})
        return
    values = [record["it"] for record in schema_records({"$schema": draft, **shaped(it=keywords)})]
    assert test is None or all(map(test, values)), values


def test_names_of_properties_tell_values_where_these_fit() -> None:
    """As they do where a schema is inferred; a property may be null once in ten."""
    records = schema_records(shaped(
        id={"type": "integer"}, firstName={"type": "string", "maxLength": 6}, email={"type": "string"},
        created_at={"type": "string"}, city={"type": "integer"}, note={"type": ["string", "null"]}), count=1000)
    assert [record["id"] for record in records[:3]] == [1, 2, 3]
    assert all("@" in record["email"] and datetime.fromisoformat(record["created_at"]) for record in records)
    assert {"Amy", "David"} <= {record["firstName"] for record in records}
    assert 60 < sum(record["note"] is None for record in records) < 140
    assert [*records[0]] == ["id", "firstName", "email", "created_at", "city", "note"]


@pytest.mark.parametrize(
    ("keywords", "pointer"),
    [
        *(({keyword: {}}, f"/{keyword}") for keyword in (
            "not", "if", "dependentSchemas", "patternProperties", "contains", "unevaluatedProperties")),
        ({"$ref": "http://example.org/x.json"}, "/$ref"), ({"$ref": "#/$defs/none"}, "/$ref"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "/minimum"), ({"type": "text"}, "/type"),
        ({"minLength": 5, "maxLength": 3}, "/minLength"), ({"minItems": 2, "maxItems": 1}, "/minItems"),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1}, "/exclusiveMinimum"), ({"minimum": "x"}, "/minimum"),
        ({"pattern": "(?=a)b"}, "/pattern"), ({"pattern": r"(a)\1"}, "/pattern"), ({"pattern": "["}, "/pattern"),
        ({"pattern": r"\d{1000000}"}, "/pattern"), ({"pattern": r"((a{99}){99}){99}"}, "/pattern"),
        ({"items": {"properties": {"a/b~": {"not": {}}}}}, "/items/properties/a~1b~0/not"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "/allOf/1/type"), ({"enum": 5}, "/enum"), (5, ""),
        ({"$ref": "#/$defs/loop"}, ""), ({"pattern": "^a{9}$", "maxLength": 5}, "/pattern"),
        ({"type": "string", "enum": [1]}, "/enum"), ({"multipleOf": 0}, "/multipleOf"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_with_its_pointer(keywords: Any, pointer: str) -> None:
    """Before there is a job, also inside related types."""
    loop = {"type": "object", "properties": {"it": {"$ref": "#/$defs/loop"}}, "required": ["it"]}
    schema = {**shaped(it=keywords), "required": ["it"], "$defs": {"loop": loop}}
    pointer = "/$defs/loop/properties/it/$ref" if keywords == {"$ref": "#/$defs/loop"} else f"/properties/it{pointer}"
    assert next(iter(problems(lambda: schema_records(schema)))) == f"schema#{pointer}"
    related = taskapi.GenerateRequest.model_validate({"records": {"thing": {"count": 1, "schema": schema}}})
    assert next(iter(problems(related.recipe))) == f"records.thing.schema#{pointer}"


def hostile_schemas() -> Iterator[tuple[str, dict[str, Any]]]:
    """Small texts that mean very much."""
    names = [f"d{number}" for number in range(30)]
    double = {f"d{number}": {"allOf": [{"$ref": f"#/$defs/d{number + 1}"}] * 2} for number in range(40)}
    yield "doubled allOf", {**shaped(a={"$ref": "#/$defs/d0"}), "$defs": {**double, "d40": {"type": "string"}}}
    double = {f"d{number}": {**shaped(**{name: {"$ref": f"#/$defs/d{number + 1}"} for name in "xy"}),
                             "required": ["x", "y"]} for number in range(40)}
    yield "doubled properties", {**shaped(a={"$ref": "#/$defs/d0"}), "$defs": {**double, "d40": {"type": "string"}}}
    clique = {name: shaped(**{other: {"$ref": f"#/$defs/{other}"} for other in names}) for name in names}
    yield "all refer to all", {**shaped(a={"$ref": "#/$defs/d0"}), "$defs": clique}
    clique = {name: {"oneOf": [{"type": "string"}, inner]} for name, inner in clique.items()}
    yield "all refer to all, or not", {**shaped(a={"$ref": "#/$defs/d0"}), "$defs": clique}
    many = range(1000)
    yield "patterns", shaped(**{f"p{number}": {"pattern": "^[a-z]{1,5000}$", "type": "string"} for number in many})
    yield "long patterns", shaped(**{f"p{number}": {"pattern": "^(a|b)+$", "minLength": 4000} for number in range(99)})
    yield "a large enum", {**shaped(**{f"p{number}": {"$ref": "#/$defs/e"} for number in many}),
                           "$defs": {"e": {"enum": [*range(50_000)]}}}
    yield "a chain", {**shaped(a={"$ref": "#/$defs/d0"}), "$defs": {
        **{f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(5000)}, "d5000": {}}}
    yield "branches", shaped(a={"oneOf": [{**shaped(**{f"p{n}": {} for n in range(20)}), "required": [f"p{number}"]}
                                         for number in range(100)]})
    yield "numbers", shaped(a={"type": "number", "minimum": 10**400}, b={"minProperties": 10**9}, c={"minItems": 1e308})


@pytest.mark.parametrize(("name", "schema"), [*hostile_schemas()], ids=[name for name, _ in hostile_schemas()])
def test_a_schema_that_means_very_much_is_bounded(name: str, schema: dict[str, Any]) -> None:
    """It is made leaner, or refused: steps are counted, not seconds."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        assert calls < 3_000_000, name

    request = taskapi.GenerateRequest.model_validate({"recordType": "thing", "count": 1, "schema": schema})
    sys.setprofile(count)
    try:
        with suppress(BadRequest):
            taskapi.preview(request.model_copy(update={"now": "2026-01-01"}))
    finally:
        sys.setprofile(None)
    assert calls > 0


def test_nested_values_stay_nested_and_come_back(tmp_path: Path) -> None:
    """Objects and lists in JSON and NDJSON, JSON text in CSV; ingest brings them back."""
    with taskapi.open_service(data_dir=tmp_path, inline=True) as service:
        app = webtest.TestApp(service.app)
        tags = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
        schema = shaped(place=shaped(city={"type": "string"}), tags=tags)
        app.post_json("/generate", {"recordType": "thing", "count": 5, "seed": 1, "schema": schema})
        made = app.get("/records/thing").json["items"]
        assert isinstance(made[0]["place"]["city"], str)
        assert isinstance(made[0]["tags"][0], int)
        for name in ("json", "ndjson", "csv"):
            job = app.post_json("/export", {"format": name, "filters": {"recordType": "thing"}}).json
            data = app.get(app.get(f"/status/{job['jobId']}").json["links"]["download"]).body
            app.post("/upload", {"recordType": f"from_{name}"}, upload_files=[("file", f"x.{name}", data)])
            back = app.get(f"/records/from_{name}").json["items"]
            if name == "csv":  # a JSON text inside a cell stays the text that it was
                back = [{key: json.loads(value) for key, value in item.items()} for item in back]
            assert back == made


# ---- Presets and the catalogue ----


@pytest.mark.parametrize(("name", "locale"), [
    *((name, "en_US") for name in taskapi.PRESETS if name != "shop"),
    *(("person", locale) for locale in ("en_CA", "en_IN", "fil_PH", "ja_JP"))])
def test_a_preset_is_a_plain_schema_of_coherent_records(name: str, locale: str) -> None:
    """Copied through JSON it makes the same; times are in order, addresses are the name's own."""
    specs = preset_records(name, 60)
    copied = {key: RecordSpec.model_validate_json(spec.model_dump_json(by_alias=True)) for key, spec in specs.items()}
    a_plan, again = (Recipe(some, now=NOW, locale=locale).plan(3, NOW) for some in (specs, copied))
    made = rows(a_plan)[name]
    assert made == rows(again)[name]
    for row in made:
        record = dict(zip(a_plan.columns[name], row, strict=True))
        if "firstName" in record:
            slugs = f"{taskapi._slug(record['firstName'])}.{taskapi._slug(record['lastName'])}"
            assert record["email"].startswith(slugs)
        times = [record[k] for k, kind in a_plan.columns[name].items() if kind == "datetime" and record[k]]
        assert times == sorted(times)
        assert all(moment <= "2026-03-15T12:30:45Z" for moment in times)
        if name == "person" and locale == "en_US":
            from faker.providers.address.en_US import Provider

            low, high = Provider.states_postcode[record["state"]]
            assert low <= int(record["postcode"]) <= high


def test_every_american_state_has_postcodes() -> None:
    """No record of the preset can fail on an unlucky state."""
    schema = {name: taskapi.PRESETS["person"]["schema"][name] for name in ("state", "postcode")}
    assert len(set(column(plan(schema, 3000), "state"))) > 50


def test_the_catalogue_lists_what_a_schema_may_use() -> None:
    """Built-in types first, Faker's methods after them; every sample can be made from its entry."""
    entries = taskapi.catalogue("en_US", None)
    names = [entry["type"] for entry in entries]
    assert names[: len(taskapi.FIELD_TYPES)] == list(taskapi.FIELD_TYPES)
    assert len(names) > 230
    assert len(set(names)) == len(names)
    assert {"first_name", "ipv4", "date_of_birth"} < set(names)
    assert not {"profile", "words", "binary", "csv", "enum", "seed_instance"} & set(names)
    assert json.loads(json.dumps(entries)) == entries
    assert all(entry["doc"] for entry in entries[: len(taskapi.FIELD_TYPES)])
    assert [e["type"] for e in taskapi.catalogue("en_US", "postcode")]
    assert len(taskapi.catalogue("en_US", "postcode")) < 10
    assert "locale" in problems(lambda: taskapi.catalogue("xx_XX", None))


@pytest.mark.parametrize(("field", "builds"), [("sequence", 0), ({"type": "date", "from": "-1y"}, 0), ("name", 1)])
def test_faker_is_built_only_for_a_field_that_needs_it_and_used_again(
        field: Any, builds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building it takes most of a recipe's time; an unknown locale is refused all the same."""
    built = []

    class Counted(taskapi.FastFaker):
        def __init__(self, locale: str, *args: Any) -> None:
            built.append(locale)
            super().__init__(locale, *args)

    monkeypatch.setattr(taskapi, "FastFaker", Counted)
    spec = RecordSpec(count=5, schema={"a": field, "b": field})
    recipe = Recipe({"thing": spec}, now=NOW, locale="en_US")
    for seed in range(3):
        rows(recipe.plan(seed, NOW))
    assert len(built) == builds
    assert "locale" in problems(lambda: plan({"a": field}, locale="xx_XX"))


RECIPES: dict[str, Any] = {
    **{name: taskapi.PRESETS[name].get("records") or {name: taskapi.PRESETS[name]} for name in taskapi.PRESETS},
    "unique": {"thing": {"schema": {
        "day": {"type": "date", "from": "-2y", "to": "now", "unique": True}, "name": {"type": "name", "unique": True},
        "code": {"type": "pattern", "pattern": "##-##", "unique": True}, "born": "date_of_birth", "at": "date_time",
        "after": {"type": "datetime", "from": "{day}", "to": "now"},
        "late": {"type": "template", "template": "{after}"}}}},
    "related": {"a": {"schema": {"id": "sequence"}}, "b": {"count": 30, "schema": {
        "a": {"type": "ref", "field": "a.id"}, "since": {"type": "date", "from": "-9d", "to": "today"}}},
        "c": {"per": "a", "count": [0, 3], "schema": {"x": {"type": "datetime", "from": "-1h"}}}}}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_used_again_makes_what_a_new_one_makes(name: str) -> None:
    """For another seed and another instant, one after the other and in turns; and once more for the first ones."""
    def fresh(now: datetime) -> Recipe:
        specs = {key: RecordSpec.model_validate({"count": 25, **spec}) for key, spec in RECIPES[name].items()}
        return Recipe(specs, now=now, locale=["en_US", "de_DE"])

    recipe, uses = fresh(EARLIER), ((1, EARLIER), (2, NOW), (2, NOW), (1, EARLIER))
    expected = {(seed, now): rows(fresh(now).plan(seed, now)) for seed, now in uses}
    assert [rows(recipe.plan(*use)) for use in uses] == [expected[use] for use in uses]
    plans = [recipe.plan(*use) for use in uses]
    made = [RowSource(recipe.columns) for _ in uses]
    for _ in itertools.zip_longest(*(plans[n].chunks(made[n], size=7) for n in range(len(plans)))):
        pass
    assert [source.fresh for source in made] == [expected[use] for use in uses]
    assert expected[uses[0]] != expected[uses[1]]


def test_jobs_of_one_recipe_side_by_side_make_what_each_would_make_alone(tmp_path: Path) -> None:
    """The checked recipe is theirs together, what draws is each one's own."""
    with taskapi.open_service(tmp_path, workers=4) as service:
        jobs = [service.enqueue("generate", {**PERSONS, "seed": seed, "now": "2026-01-01T00:00:00Z"}).job_id
                for seed in (1, 2, 1, 2, 1, 2)]
        assert {service.wait(job_id, 30).status for job_id in jobs} == {"completed"}
        columns = ", ".join(map(quoted, taskapi.PRESETS["person"]["schema"]))
        made = [plain(tmp_path, f"SELECT json_array({columns}) FROM person WHERE _job = '{job}' ORDER BY _id")
                for job in jobs]
    assert made == [made[0], made[1]] * 3
    assert made[0] != made[1]


@pytest.mark.slow
def test_memory_stays_flat_and_cost_even() -> None:
    """300,000 rows with a unique field, a relation and a lookup take no more than a filter's memory."""
    import tracemalloc

    schema = {"id": "sequence", "email": {"type": "email", "unique": True}}
    records = {
        "user": {"count": 150_000, "schema": schema},
        "visit": {"per": "user", "count": 1, "schema": {"userId": {"type": "ref", "field": "user.id"}}},
    }
    a_plan = related(records)
    source = Kept(a_plan).source()
    tracemalloc.start()
    for chunk in a_plan.chunks(source):
        if chunk.whole:
            source.committed()
    assert tracemalloc.get_traced_memory()[1] < 60 * 2**20
    tracemalloc.stop()


warnings.filterwarnings("ignore", message="fr_QC")


# ==== 6 Files ====

GOOD_FILES = {
    "a.csv": b"a,b\r\n1,2\r\n", "bom.csv": b"\xef\xbb\xbfa\n1\n", "utf16.tsv": "a\tb\n\u2603".encode("utf-16"),
    "empty.txt": b"", "latin.csv": b"caf\xe9\n", "gbk.txt": "\u4e02\u5740\n".encode("gbk"),
    "a.json": b'{"a": 1}', "a.ndjson": b"{}\n{}\n", "a.xml": b"<a/>", "a.CSV": b"a\n",
    "a.csv.gz": gzip.compress(b"a\n"), "a.zip": b"PK\x05\x06" + b"\0" * 18, "a.pdf": b"%PDF-1.7\n",
    "a.jpg": b"\xff\xd8\xff\xe0",
    "a.jpeg": b"\xff\xd8\xff\xe0", "a.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a.xlsx": b"PK\x03\x04" + b"\0" * 20,
    "a.parquet": b"PAR1 PAR1"}
BAD_FILES = {
    "text.png": b"hello", "short.gz": b"\x1f", "empty.zip": b"", "zip.pdf": b"PK\x03\x04", "nul.csv": b"a\0b",
    "control.csv": b"caf\xe9\x07\n", "odd.csv": "ab".encode("utf-16") + b"c",
    "png.json": b"\x89PNG\r\n\x1a\n", "a.exe": b"MZ", "a.html": b"<p>", "noext": b"a", "a.": b"a", "a.csv.exe": b"a"}


def assert_nothing_left(folder: Path) -> None:
    """Asserts that a refused upload left neither a job nor a file."""
    assert plain(folder, "SELECT count(*) FROM jobs") == [0]
    assert_sound(folder)


@pytest.mark.parametrize(("name", "label"), [
    ("../../x.csv", "x.csv"), ("..\\..\\x.csv", "x.csv"), ("/etc/cron.d/x.csv", "x.csv"), ("C:\\a\\x.csv", "x.csv"),
    ("n" * 300 + ".csv", "n" * 196 + ".csv"), ("naïve ☃ \U0001f600.csv", "naïve ☃ \U0001f600.csv"),
    ("it's 100%, a;b.csv", "it's 100%, a;b.csv"), ("a\u202egpj.csv", "agpj.csv"), (".csv", ".csv"),
    ('quo"te.csv', None), ("a\x07b.csv", None), ("a\x00b.csv", None), ("a\x1b[31m.csv", None)])
def test_a_file_name_is_a_label_and_never_a_path(
        service: taskapi.Service, url: str, name: str, label: str | None) -> None:
    """Its last part, printable and short; what HTTP cannot carry is refused or cleaned."""
    answer = ask(url, "POST", "/upload", form(name=name), FORM)
    if label is None and answer.status == 400:
        refused(answer, 400)
        return assert_nothing_left(service.folder.root)
    job = answer.json
    found = job["result"]["filename"]
    assert found.isprintable()
    assert label in (None, found)
    assert [path.name for path in (service.folder.root / "uploads").iterdir()] == [f"{job['jobId']}.csv"]
    header = ask(url, "GET", job["links"]["download"]).headers["Content-Disposition"]
    assert header.startswith("attachment; filename=")
    assert header.isascii()
    assert header.count('"') == 2
    return assert_sound(service.folder.root)


HEAD = b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n'
BROKEN_FORMS = {
    "an empty body": b"", "no part": b"--XX--\r\n", "another boundary": form().replace(b"XX", b"YY"),
    "no end": part(), "an end in the middle": form()[:-4], "a header without end": HEAD,
    "a part without a name": form().replace(b'name="file"; ', b""),
    "a part without disposition": form().replace(b"Content-Disposition", b"Content-Location"),
    "another disposition": form().replace(b"form-data", b"attachment"),
    "a header without a colon": form().replace(b"form-data;", b"form-data;\r\nxx\r\n", 1),
    "a header too long": form(extra="X: " + "y" * 9000 + "\r\n"),
    "headers without number": form(extra="".join(f"X{n}: y\r\n" for n in range(500))),
    "junk before the first part": b"junk" + form(),
    "two files": part() + form(), "another field": form(field="upload"), "a file without a name": form(name=""),
    "a file that is a text": form().replace(b'; filename="a.csv"', b""),
    "an unknown text": part() + b'--XX\r\nContent-Disposition: form-data; name="colour"\r\n\r\nred\r\n--XX--\r\n',
    "no file": b'--XX\r\nContent-Disposition: form-data; name="colour"\r\n\r\nred\r\n--XX--\r\n',
    "a text without end": b'--XX\r\nContent-Disposition: form-data; name="recordType"\r\n\r\n' + b"x" * 100_000,
    "parts without number": b"".join(part(field=f"f{n}") for n in range(100)) + b"--XX--\r\n",
    "a declared type that the name denies": form(extra="Content-Type: image/png\r\n"),
    "line feeds alone": form().replace(b"\r\n", b"\n")}


@pytest.mark.parametrize(("content_type", "status"), [
    ("", 415), ("text/plain", 415), ("multipart/mixed; boundary=XX", 415), ("multipart/form-data", 400),
    ("multipart/form-data; boundary=", 400), ("multipart/form-data; boundary=" + "X" * 300, 400),
    ("multipart/form-data; boundary=\"X\x01X\"", 400)])
@pytest.mark.parametrize("path", ["/upload", "/infer"])
def test_an_upload_has_to_be_a_form_with_a_boundary_or_a_file_of_a_known_type(
        service: taskapi.Service, url: str, path: str, content_type: str, status: int) -> None:
    """Refused by the head."""
    refused(ask(url, "POST", path, form(), {"Content-Type": content_type}), status)
    assert_nothing_left(service.folder.root)


RAW_FILES = {"text/csv": ("body.csv", b"a,b\n1,2\n"), "text/tab-separated-values; charset=utf-8": (
    "body.tsv", b"a\tb\n1\t2\n"), "application/json": ("body.json", b'[{"a":1,"b":2}]'),
    "application/x-ndjson": ("body.ndjson", b'{"a":1,"b":2}\n')}


@pytest.mark.parametrize("content_type", RAW_FILES)
def test_a_body_that_is_the_file_is_taken_like_the_part(service: taskapi.Service, url: str, content_type: str) -> None:
    """Stored, made into records and inferred from, with its options in the query; gzipped too."""
    name, content = RAW_FILES[content_type]
    headers = {"Content-Type": content_type}
    stored_ = ask(url, "POST", "/upload", content, headers)
    assert (stored_.status, stored_.json["result"]["filename"]) == (201, name)
    for body, extra in ((content, {}), (gzip.compress(content), {"Content-Encoding": "gzip"})):
        made = ask(url, "POST", "/upload?recordType=thing&filename=c", body, headers | extra)
        assert (made.status, made.json["request"]["filename"]) == (201, f"c{name[4:]}")
        assert made.json["result"]["bytes"] == len(content)
        items = ask(url, "GET", made.json["links"]["records"]).json["items"]
        assert items == [{"a": 1, "b": 2}]
    assert ask(url, "POST", "/infer?filename=order", content, headers).json["recordType"] == "order"
    refused(ask(url, "POST", "/upload?recordtype=thing", content, headers), 400, "recordType")
    refused(ask(url, "POST", "/upload?filename=a.png", content, headers), 400, "is not png")
    assert_sound(service.folder.root)


@pytest.mark.parametrize(("label", "expected"), [
    (b"filename*=UTF-8''na%C3%AFve.csv", "naïve.csv"), (b"filename*=iso-8859-1'en'na%EFve.csv", "naïve.csv"),
    (b'filename="=?utf-8?B?bmHDr3ZlLmNzdg==?="', "naïve.csv"),
    (b'filename="=?utf-8?B?bmHDr3ZlLmNzdg==?="; filename*=utf-8\'\'na%C3%AFve.csv', "naïve.csv"),
    ("filename=\"naïve.csv\"".encode(), "naïve.csv"), ("filename=\"naïve.csv\"".encode("cp1252"), "naïve.csv"),
    (b'filename="=?x?=.csv"', "=?x?=.csv"), (b"filename*=nocode''%e9.csv; filename=b.csv", "b.csv")])
def test_a_file_name_comes_in_every_form_that_clients_send(url: str, label: bytes, expected: str) -> None:
    """As it is in UTF-8 or a Windows code page, as `filename*` alone, as the encoded word of .NET, or both."""
    body = part().replace(b'filename="a.csv"', label) + b"--XX--\r\n"
    assert ask(url, "POST", "/upload", body, FORM).json["result"]["filename"] == expected


@pytest.mark.parametrize(("body", "words"), [
    (form(field="f"), ["f: ", "the part is `file`"]),
    (text_part("recordtype", "x") + form(), ["did you mean 'recordType'"]),
    (text_part("colour", "x") + form(), ["known are: file, recordType"]), (part() + form(), ["one file too many"])])
def test_a_wrong_part_says_which_is_meant(url: str, body: bytes, words: list[str]) -> None:
    """By its name."""
    for path in ("/upload", "/infer"):
        refused(ask(url, "POST", path, body, FORM), 400, *words)


@pytest.mark.parametrize("packed", [gzip.compress(form(b"x" * 10**7, "a.txt")), gzip.compress(form() + b" " * 10**7),
                                    gzip.compress(form())[:-9], b"no gzip", b""],
                         ids=["a bomb", "a bomb behind the end", "cut off", "none", "empty"])
def test_a_packed_upload_is_unpacked_within_bounds(small: tuple[taskapi.Service, str], packed: bytes) -> None:
    """400 for one that is too large inside, or broken; nothing is left."""
    service, url = small
    refused(ask(url, "POST", "/upload", packed, FORM | {"Content-Encoding": "gzip"}), 400)
    assert_nothing_left(service.folder.root)


def test_a_packed_body_is_taken_and_another_coding_refused(url: str) -> None:
    """JSON likewise, with a limit on what is inside; 415 names what is understood."""
    body, packed = json.dumps(PERSONS).encode(), JSON | {"Content-Encoding": "gzip"}
    assert ask(url, "POST", "/generate", gzip.compress(body), packed).status == 202
    refused(ask(url, "POST", "/generate", gzip.compress(b" " * 2**24), packed), 413)
    refused(ask(url, "POST", "/generate", body, packed), 400, "Content-Encoding")
    for path, headers in (("/generate", JSON), ("/upload", FORM)):
        refused(ask(url, "POST", path, body, headers | {"Content-Encoding": "br"}), 415, "gzip")


def head(length: int | None, *lines: str, path: str = "/upload", version: str = "1.1") -> bytes:
    """The head of a raw upload; without a length it is chunked."""
    body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return "\r\n".join([f"POST {path} HTTP/{version}", "Host: localhost", f"Content-Type: {FORM['Content-Type']}", body,
                        "Connection: close", *lines, "", ""]).encode()


def chunks(data: bytes, size: int = 7) -> bytes:
    """`data` in the chunked transfer coding."""
    pieces = [data[at:at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x;ext=1\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[taskapi.Service, str]]:
    """A served service that takes files of 1,000 bytes, and its URL."""
    with taskapi.open_service(tmp_path, inline=True, max_upload_bytes=1000) as service, service.serving(port=0) as url:
        yield service, url


def test_the_limit_of_uploads_is_exact_with_a_declared_length_and_without(small: tuple[taskapi.Service, str]) -> None:
    """At the limit stored, one byte over refused; the envelope does not count."""
    service, url = small
    for content, status in ((b"x" * 1000, 201), (b"x" * 1001, 400), (b"x" * 50_000, 400)):
        body = form(content, "a.txt")
        assert ask(url, "POST", "/upload", body, FORM).status == status
        answer = raw(url, head(None) + chunks(body, 333))
        assert answer.status == status
        if status == 400:
            refused(answer, 400, "1000", "TASKAPI_MAX_UPLOAD_BYTES")
    assert plain(service.folder.root, "SELECT count(*) FROM jobs") == [2]
    assert_sound(service.folder.root)


@pytest.mark.parametrize("length", [8 * 2**20, None], ids=["declared", "chunked"])
def test_a_client_that_goes_on_sending_can_still_read_its_refusal(
        small: tuple[taskapi.Service, str], length: int | None) -> None:
    """The connection is not reset under it."""
    _, url = small
    body = b"x" * (8 * 2**20)
    with plug(url) as connection:
        connection.sendall(head(length))
        with suppress(BrokenPipeError):  # it is the answer that must not be lost
            connection.sendall(body if length else chunks(body, 2**16))
        refused(parsed(rest(connection)), 400)


@pytest.mark.parametrize(("broken", "status", "word"), [
    (taskapi.DiskFull("the disk is full"), 500, "full"), (ValueError("secret"), 500, "internal error")])
def test_what_fails_under_an_upload_is_answered(
        service: taskapi.Service, url: str, monkeypatch: pytest.MonkeyPatch, broken: Exception, status: int,
        word: str) -> None:
    """A full disk, or a bug; the server stays up, and nothing is left."""
    def fail(*_: Any) -> None:
        raise broken

    with monkeypatch.context() as patch:
        patch.setattr(taskapi.AtomicFile, "write", fail)
        answer = ask(url, "POST", "/upload", form(b"x" * 1_000_000, "a.txt"), FORM)
        assert "secret" not in refused(answer, status, word)["error"]
    assert_nothing_left(service.folder.root)
    assert ask(url, "POST", "/upload", form(), FORM).status == 201


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on files is set for a process")
def test_a_body_that_finds_no_room_is_refused_while_it_comes(tmp_path: Path) -> None:
    """500, and readable although the client goes on sending; the server stays up."""
    limited = ["prlimit", "--fsize=3000000"]
    if not shutil.which("prlimit"):
        pytest.skip("there is no prlimit")
    with Live(tmp_path / "data", wrap=limited) as live:
        with plug(live.url) as connection:
            connection.sendall(head(50_000_000) + part(b"x" * 4_000_000, "a.txt"))
            refused(parsed(rest(connection)), 500, "full")
        assert live.ask("GET", "/health").status == 200
        assert not [*(tmp_path / "data" / "tmp").iterdir()]


@pytest.mark.parametrize("how", ["close", "reset", "server"])
def test_an_upload_that_ends_early_leaves_nothing(service: taskapi.Service, how: str) -> None:
    """The client goes, or the server stops, in the middle of a body that waits on the disk."""
    with service.serving(port=0) as url, plug(url) as connection:
        connection.sendall(head(50_000_000) + part(b"x" * 3_000_000, "a.txt"))
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how != "server":
            connection.close()
            assert ask(url, "POST", "/upload", form(name="b.png"), FORM).status == 400
    assert_nothing_left(service.folder.root)


def test_requests_that_follow_an_upload_on_its_connection_are_answered_in_turn(
        service: taskapi.Service, url: str) -> None:
    """Sent at once: a large upload, a GET, one in chunks, one that the end of its body makes wrong, a GET."""
    large = form(b"x" * 2_000_000, "a.txt")
    kept = [head(len(large)) + large, b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n",
            head(None) + chunks(form(b"y" * 90_000, "b.txt"), 1000), head(len(form()) - 2) + form()[:-4] + b"--",
            head(len(part())) + part()]
    kept = [data.replace(b"Connection: close\r\n", b"") for data in kept]
    with plug(url) as connection:
        connection.sendall(b"".join(kept) + b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        data = rest(connection)
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", data)]
    assert statuses == [201, 200, 201, 201, 400, 200]
    assert len(parsed(data[data.rindex(b"HTTP/1.1 "):]).json["items"]) == 3
    assert_sound(service.folder.root)


EQUAL_FORMS = {
    **{name: form(content, name) for name, content in {**GOOD_FILES, **BAD_FILES}.items()}, **BROKEN_FORMS,
    "texts after the file": part() + text_part("recordType", "t") + text_part("delimiter", ",") + b"--XX--\r\n",
    "texts before the file": text_part("encoding", "latin-1") + text_part("recordType", "t") + form(b"caf\xe9\n1\n"),
    "a text twice": text_part("recordType", "t") + text_part("recordType", "u") + form(),
    "a text of a wrong kind": text_part("recordType", "T!") + form(),
    "something after the end": form() + b"epilogue" * 1000, "no line end after the end": form()[:-2],
    "something before the beginning": b"preamble\r\n" + form(),
    "a lot before the beginning": b"preamble" * 1000 + b"\r\n" + form(),
    "a line end before the beginning": b"\r\n" + form(),
    "the boundary in the content": form(b"\r\n--X\r\n\r\n--X-\r\nXX--", "a.txt"),
    "too large, and wrong at the end": form(b"x" * 100_000 + b"\0", "a.txt"),
    "too large, and wrong at the beginning": form(b"\0" + b"x" * 100_000, "a.txt")}


def gist(answer: Any) -> Any:
    """What two answers to one upload have in common."""
    body = answer.json
    return (answer.status, body.get("error"), body.get("fields"), body.get("type"), body.get("result"),
            {**body.get("request", {}), "draft": None})


@pytest.mark.parametrize("name", EQUAL_FORMS)
def test_an_upload_is_answered_alike_however_it_comes(tmp_path: Path, name: str) -> None:
    """Through another WSGI server at once, and through ours at once, in pieces, and in chunks.

    Content that is not what its name says, and every kind of broken form, are a 400 that leaves nothing.
    """
    body = EQUAL_FORMS[name]
    with taskapi.open_service(tmp_path, inline=True, max_upload_bytes=90_000) as service, (
            service.serving(port=0)) as url:
        answer = webtest.TestApp(service.app).post("/upload", body, headers=FORM, expect_errors=True)
        expected = gist(Answer(answer.status_int, answer.headers, answer.body))
        assert (expected[0] == 400) >= (name in BAD_FILES or name in BROKEN_FORMS)
        if name in GOOD_FILES:
            job, content = answer.json, GOOD_FILES[name]
            assert (answer.status_int, job["type"], job["status"]) == (201, "upload", "completed")
            assert answer.headers["Location"].endswith(job["links"]["self"])
            download = ask(url, "GET", job["links"]["download"])
            assert job["result"] == {
                "filename": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
                "contentType": download.headers["Content-Type"]}
            assert download.body == content
        assert name not in BAD_FILES or expected[2][0]["field"] == "file"
        assert gist(ask(url, "POST", "/upload", body, FORM)) == expected
        step = max(1, len(body) // 40)
        pieces = [body[at:at + step] for at in range(0, len(body), step)]
        for first, later in ((head(len(body)), pieces), (head(None), [chunks(body, step)])):
            with plug(url) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with suppress(OSError):
                    for piece in [first, *later]:
                        connection.sendall(piece)
                assert gist(parsed(rest(connection))) == expected
        (assert_nothing_left if expected[0] == 400 else assert_sound)(service.folder.root)


def test_a_body_is_asked_for_only_if_it_is_wanted(small: tuple[taskapi.Service, str]) -> None:
    """Expect: 100-continue, in its four cases: wanted, refused (as without it), without a body, sent already."""
    _, url = small
    expect = "Expect: 100-continue"
    with plug(url) as connection:
        connection.sendall(head(len(form()), expect))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(form())
        assert parsed(rest(connection)).status == 201
    for lines in ((), (expect,)):  # over the limit
        with plug(url) as connection:
            connection.sendall(head(10**9, *lines))
            answer = rest(connection)
            assert not answer.startswith(b"HTTP/1.1 100 ")
            refused(parsed(answer), 400, "TASKAPI_MAX_UPLOAD_BYTES")
    with plug(url) as connection:
        connection.sendall(head(0, expect))
        refused(parsed(rest(connection)), 400)
    assert raw(url, head(len(form()), expect) + form()).status == 201
    assert raw(url, head(len(form()), expect, version="1.0") + form()).status == 201


DOWNLOAD = bytes(range(256)) * 4
RANGES = {
    "bytes=0-9": (0, 10), "bytes=1000-": (1000, 1024), "bytes=-24": (1000, 1024), "bytes=0-": (0, 1024),
    "bytes=1023-1023": (1023, 1024), "bytes=0-99999": (0, 1024), "bytes=-99999": (0, 1024), "bytes= 5 - 6 ": (5, 7),
    "bytes=1024-": None, "bytes=9999-10000": None, "bytes=-0": None,
    "bytes=5-4": (), "bytes=-": (), "bytes=a-b": (), "lines=0-1": (), "bytes=0-1,3-4": (), "bytes=\u0663-": ()}


@pytest.fixture
def stored(url: str) -> tuple[str, str]:
    """A URL, and the path of a file to download."""
    return url, ask(url, "POST", "/upload", form(b"PK\x03\x04" + DOWNLOAD[4:], "ä.zip"), FORM).json["links"]["download"]


@pytest.mark.parametrize("wanted", RANGES)
def test_a_download_can_be_had_in_ranges(stored: tuple[str, str], wanted: str) -> None:
    """One range is served, one past the end refused, anything else ignored; GET and HEAD agree."""
    url, path = stored
    whole = ask(url, "GET", path).body
    answer = ask(url, "GET", path, None, {"Range": wanted.encode("utf-8").decode("latin-1")})
    span = RANGES[wanted]
    if span is None:
        refused(answer, 416)
        assert answer.headers["Content-Range"] == f"bytes */{len(whole)}"
        return
    first, end = span or (0, len(whole))
    assert answer.body == whole[first:end]
    assert answer.status == (206 if span else 200)
    assert answer.headers["Content-Range"] == (f"bytes {first}-{end - 1}/{len(whole)}" if span else None)
    bare = ask(url, "HEAD", path, None, {"Range": wanted.encode("utf-8").decode("latin-1")})
    assert (bare.status, bare.body, bare.headers["Content-Length"]) == (answer.status, b"", str(end - first))


def test_a_download_says_what_it_is_and_is_not_sent_twice(stored: tuple[str, str]) -> None:
    """Its headers, If-None-Match in its forms, If-Range."""
    url, path = stored
    answer = ask(url, "GET", path)
    headers = answer.headers
    assert (headers["Content-Type"], headers["Content-Length"]) == ("application/zip", "1024")
    assert (headers["Accept-Ranges"], headers["X-Content-Type-Options"]) == ("bytes", "nosniff")
    assert headers["Content-Disposition"] == "attachment; filename=\"_.zip\"; filename*=UTF-8''%C3%A4.zip"
    tag = headers["ETag"]
    for given_, status in ((tag, 304), (f"W/{tag}", 304), (f'"x", {tag}', 304), ("*", 304), ('"x"', 200)):
        again = ask(url, "GET", path, None, {"If-None-Match": given_})
        assert (again.status, len(again.body), again.headers["ETag"]) == (status, 1024 * (status == 200), tag)
    for given_, status in ((tag, 200), (f'"x", {tag}', 200), ("*", 200), ('"x"', 412), (f"W/{tag}", 412)):
        assert ask(url, "GET", path, None, {"If-Match": given_}).status == status
    for given_, status in ((tag, 206), (headers["Last-Modified"], 206), ('"x"', 200), (f"W/{tag}", 200)):
        assert ask(url, "GET", path, None, {"If-Range": given_, "Range": "bytes=0-9"}).status == status
    bare = ask(url, "HEAD", path)
    assert (bare.body, {**bare.headers} | {"Date": ""}) == (b"", {**headers} | {"Date": ""})


def test_a_job_without_a_file_has_no_download(service: taskapi.Service, url: str) -> None:
    """404, and 404 too when somebody took the file away."""
    made = service.enqueue("generate", PERSONS)
    refused(ask(url, "GET", f"/download/{made.job_id}"), 404)
    job = ask(url, "POST", "/upload", form(), FORM).json
    (service.folder.root / "uploads" / f"{job['jobId']}.csv").unlink()
    refused(ask(url, "GET", job["links"]["download"]), 404)


@pytest.mark.parametrize("name", ["nope", "hex", "rot13", "undefined", "zip", "a\0b", ""])
@pytest.mark.parametrize("path", ["/upload", "/infer"])
def test_an_encoding_that_is_none_is_named(url: str, name: str, path: str) -> None:
    """Whether it comes before the file or after it."""
    text, kind = text_part("encoding", name), text_part("recordType", "thing")
    for body in (kind + text + form(), part() + kind + text + b"--XX--\r\n"):
        refused(ask(url, "POST", path, body, FORM), 400, "encoding")


def test_utf_16_without_its_mark_is_refused(url: str) -> None:
    """Named as the encoding, it could be either order; with the order in the name it is read."""
    def asked(encoding: str) -> Answer:
        body = text_part("encoding", encoding) + form("a,b\n1,2\n".encode("utf-16-le"))
        return ask(url, "POST", "/infer", body, FORM)

    assert asked("utf-16-le").status == 200
    refused(asked("utf-16"), 400, "is not csv")


def test_a_file_type_that_the_settings_add_is_taken_as_it_is(tmp_path: Path) -> None:
    """Its content is not looked at; one that they leave out is refused."""
    with taskapi.open_service(tmp_path, inline=True, upload_types=["csv", "log"]) as service, service.serving(
            port=0) as url:
        job = ask(url, "POST", "/upload", form(b"\0\xff", "a.log"), FORM)
        assert (job.status, job.json["result"]["contentType"]) == (201, "application/octet-stream")
        assert ask(url, "GET", job.json["links"]["download"]).body == b"\0\xff"
        refused(ask(url, "POST", "/upload", form(b"a", "a.txt"), FORM), 400, "csv, log")


# ==== 7 Job types ====


def test_a_name_is_registered_once_and_the_function_stays_what_it_was() -> None:
    """A job type is one model and one function; a second of the same name is refused."""
    def run(context: taskapi.JobContext, request: ScriptRequest) -> taskapi.JobSteps:
        yield
        return taskapi.JobResult({})

    with pytest.raises(ValueError, match="'export'"):
        taskapi.job_type("export", ScriptRequest)(run)
    assert taskapi.JOB_TYPES["script"].run is run_script
    assert taskapi.JOB_TYPES.keys() >= {"generate", "upload", "export"}


def test_a_job_type_of_a_program_that_embeds_us_has_its_endpoint_too(url: str, script: Any) -> None:
    """POST /{name}, with the checks of its model."""
    assert ask(url, "POST", "/script", {"script": "one"}).json["status"] == "completed"
    refused(ask(url, "POST", "/script", {"scirpt": "one"}), 400, "'script'")


def test_a_preview_makes_what_generate_would_and_stores_nothing(service: taskapi.Service, url: str) -> None:
    """200 at once."""
    asked = {**PERSONS, "now": "2026-01-01T00:00:00Z"}
    shown_ = ask(url, "POST", "/preview", asked)
    assert (shown_.status, plain(service.folder.root, "SELECT count(*) FROM jobs")) == (200, [0])
    made = ask(url, "POST", "/generate", asked).json
    assert ask(url, "GET", made["links"]["records"]).json["items"] == shown_.json["records"]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with taskapi.open_service(data_dir=tmp_path_factory.mktemp("data"), inline=True) as service:
        yield webtest.TestApp(service.app)


def read(name: str, data: bytes, **options: str):
    """(kinds, rows) of a file, as ingest would store them."""
    reader = taskapi.RecordReader(name, taskapi.IngestOptions(**options))
    for cells in reader.read(io.BytesIO(data)):
        reader.learn(cells)
    kinds = reader.kinds()
    return kinds, [row for cells in reader.read(io.BytesIO(data)) for row in reader.rows(cells, kinds)]


def upload(app, name: str, data: bytes, **parts: str):
    job = app.post("/upload", params=[*parts.items()], upload_files=[("file", name, data)]).json
    return app.get(job["links"]["self"]).json


def export(app, record_type: str, export_format: str, **options) -> bytes:
    body = {"format": export_format, "filters": {"recordType": record_type}, **options}
    job = app.post_json("/export", body).json
    assert job["status"] == "completed", job["error"]
    return app.get(job["links"]["download"]).body


FILE_TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["", '"', '""', ",", "\r\n", "\r", "1", "01234", "true", "null", "2026-01-31", "[1]", "=1+1", "é😀", " ", "1e5",
     "\\", "\\n", '\\\\"', "\u2028", "\x01\x1f\x7f"])
NESTED = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | FILE_TEXTS,
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FILE_TEXTS, inner, max_size=3),
                      max_leaves=6)
FILE_VALUES = {
    "int": st.integers(-2**63, 2**63 - 1), "float": st.floats(allow_nan=False),
    "decimal": st.decimals(-10**12, 10**12, places=2).map(lambda value: taskapi._JSON_DECODER.decode(f"{value:f}")),
    "bool": st.booleans(), "text": FILE_TEXTS, "date": st.dates().map(str),
    "datetime": st.datetimes().map(lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")),
    "json": st.lists(NESTED, max_size=3) | st.dictionaries(FILE_TEXTS, NESTED, max_size=3),
}
FILE_VALUES["mixed"] = st.one_of(*FILE_VALUES.values())
COLUMNS = st.fixed_dictionaries({}, optional={name: st.just(name) for name in FILE_VALUES}).filter(len).flatmap(
    lambda kinds: st.lists(st.fixed_dictionaries({kind: st.none() | FILE_VALUES[kind] for kind in kinds}),
                           min_size=1, max_size=8))
_numbers = iter(range(10**6))


def json_line(record: dict[str, Any]) -> str:
    """A record as an upload has it, floats beyond the range of JSON too."""
    return "{" + ",".join(f'"{key}":' + (repr(value).replace("inf", "1e999") if isinstance(value, float) else
                                         taskapi._compact(value)) for key, value in record.items()) + "}"


def typed(value: Any) -> Any:
    """A value as columns of types keep it: a number as that, whatever digits it was written with."""
    return float(value) if isinstance(value, taskapi._JsonNumber) else value


def as_in_a_sheet(value: Any) -> Any:
    """A value as a sheet keeps it: no empty text, no long integer, no list, no instant with a zone, no midnight."""
    value = taskapi._compact(value) if isinstance(value, (list, dict)) else typed(value)
    if isinstance(value, str):
        return re.sub(r"^(\d{4}-\d\d-\d\d)(?:T00:00:00|(T\d\d:\d\d:\d\d))Z?$", r"\1\2", value) or None
    if value in (math.inf, -math.inf):
        return str(value).replace("inf", "Infinity")
    return str(int(value)) if isinstance(value, (int, float)) and abs(value) >= 10**15 and value % 1 == 0 else value


def as_in_parquet(value: Any) -> Any:
    """A value as Parquet keeps it, where a number that no decimal of 38 digits holds is a text."""
    value = typed(value)
    return float(value) if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", value) else value


KEPT = {"parquet": as_in_parquet, "xlsx": as_in_a_sheet}  # how, in formats that are not compared byte by byte


def kept(app, record_type: str, export_format: str) -> Any:
    """What an export and an upload in a format leave of the records; in a sheet, none of a record without values."""
    if export_format not in KEPT:
        return export(app, record_type, export_format)
    lines = export(app, record_type, "ndjson").decode().split("\n")
    records = [taskapi._JSON_DECODER.decode(line) for line in lines if line]
    records = [{key: KEPT[export_format](value) for key, value in record.items()} for record in records]
    return records if export_format != "xlsx" else [record for record in records if any(
        value is not None for value in record.values())]


@pytest.mark.parametrize("export_format", sorted({*taskapi.FORMATS} & {*taskapi.INGEST_FORMATS}))
@settings(max_examples=15, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink one would take minutes
@given(jobs=st.lists(COLUMNS, min_size=1, max_size=2))
@example(jobs=[[{"datetime": "2000-01-01T00:00:00Z"}, {"datetime": None}]])
@example(jobs=[[{"datetime": "2000-01-01T00:00:00Z"}, {"datetime": "2000-01-01T00:00:01Z"}]])
def test_what_is_exported_uploaded_and_exported_again_is_the_same_file(app, export_format, jobs):
    """Any kind, any value, of jobs that agree on a column or not: the second export equals the first byte by byte, or
    in what it holds."""
    number = next(_numbers)
    for records in jobs:
        lines = "\n".join(map(json_line, records)).encode()
        assert upload(app, "a.ndjson", lines, recordType=f"one{number}")["error"] is None
    first = export(app, f"one{number}", export_format)
    job = upload(app, f"a.{export_format}", first, recordType=f"two{number}")
    if job["error"] == "line 1: there are no records, so there are no fields":  # a sheet of nulls
        assert export_format == "xlsx"
        assert kept(app, f"one{number}", export_format) == []
        return
    assert job["error"] is None
    assert kept(app, f"two{number}", export_format) == kept(app, f"one{number}", export_format)


def test_tsv_survives_its_readers(service: taskapi.Service) -> None:
    """Tabs, line ends and backslashes, read as csvkit's in2csv reads them."""
    values = ["a\tb", "c\nd", "e\r\nf", 'g"h', "i\\tj\\", "\\N", ""]
    store(service, {"t": "text", "n": "int"}, [[value, 1] for value in values])
    data = exported(service, "tsv").decode()
    assert [row[0] for row in csv.reader(io.StringIO(data, newline=""), delimiter="\t")] == ["t", *values]


def test_xlsx_is_typed_and_runs_nothing(service: taskapi.Service) -> None:
    """Read by openpyxl: a sheet a type, its head frozen, days as days, text as text, what is too long as text."""
    openpyxl = pytest.importorskip("openpyxl")
    store_naughty(service)
    store(service, {"day": "date", "n": "decimal"}, [["1899-12-31", "0.1"], ["1900-03-01", "1234567890.12345678"]],
          "history")
    for name in ("a" * 40, "a" * 41):
        store(service, {"n": "int"}, [[1]], name)
    data = exported(service, "xlsx", None)
    book = openpyxl.load_workbook(io.BytesIO(data))
    assert book.sheetnames == ["a" * 31, "a" * 29 + "_2", "history_2", "naughty", "other"]
    assert [sheet.freeze_panes for sheet in book] == ["A2"] * 5
    old, new = [*book["history_2"].values][1:]
    assert (old, new) == (("1899-12-31", 0.1), (datetime(1900, 3, 1), "1234567890.12345678"))
    head, *rows = book["naughty"].iter_rows()
    assert [cell_.value for cell_ in head] == [*AWKWARD]
    first, second, third = (dict(zip(AWKWARD, row, strict=True)) for row in rows)  # the last has no value
    assert {cell_.data_type for row in rows for cell_ in row} <= {"s", "n", "b", "d", "inlineStr"}
    assert (first["id"].value, second["id"].value, third["id"].value) == (str(2**63 - 1), str(-2**63), 0)
    assert (first["x"].value, first["price"].value, first["on"].value) == (0.1 + 0.2, 12.5, True)
    assert (first["day"].value, first["day"].number_format) == (datetime(2024, 2, 29), "yyyy-mm-dd")
    assert first["at"].value.replace(microsecond=123_000) == datetime(2024, 2, 29, 12, 30, 0, 123_000)
    assert second["at"].value == datetime(2024, 2, 29, 10, 30)
    assert [row['we"ird `né\\'].value for row in (first, second, third)] == ["<r>x</r>", "=1+1", "http://x.y"]
    assert not any(cell_.hyperlink for row in rows for cell_ in row)
    assert (first["mixed"].value, second["mixed"].value, third["mixed"].value) == (1, 0.5, "é😀;--")
    assert exported(service, "xlsx", None) == data
    assert [*(service.folder.root / "tmp").iterdir()] == []


def failed(service: taskapi.Service, export_format: str, **request: Any) -> str:
    """Why an export fails; nothing may be left of it."""
    job = service.enqueue("export", {"format": export_format, **request})
    assert (job.status, [*(service.folder.root / "tmp").iterdir()]) == ("failed", [])
    return job.error


def test_what_a_sheet_cannot_hold_is_refused_by_name(service: taskapi.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text too long, rows too many: these before any work, also where a filter has to count them."""
    store(service, {"n": "int", "text": "text"}, [[1, "ok"], [2, "😀" * 16_383], [3, "😀" * 16_384]], "long")
    assert "'text' of record 3 of 'long'" in failed(service, "xlsx")
    assert exported(service, "xlsx", "long", limit=2)
    monkeypatch.setattr(taskapi, "_SHEET_ROWS", 2)
    for more in ({}, {"orderBy": "n"}, {"filters": {"where": {"n": {"gt": 0}}}}):
        assert "more than 2 records of type 'long'" in failed(service, "xlsx", **more)
    assert exported(service, "xlsx", "long", fields=["n"], limit=2)
    assert exported(service, "xlsx", "long", fields=["n"], where={"n": {"lt": 3}})


@pytest.mark.parametrize("export_format", [*taskapi.FORMATS])
def test_an_export_tells_how_many_records_it_has(service: taskapi.Service, export_format: str) -> None:
    """However few they are, of one type or of two."""
    for record_type, rows, made in (("one", 1, 1), ("two", 2, 3)):
        store(service, {"n": "int"}, [[1]] * rows, record_type)
        job = service.enqueue("export", {"format": export_format})
        assert (job.status, job.result["records"], job.progress.done) == ("completed", made, made)


def test_a_sheet_that_breaks_off_is_let_go_in_silence(
        service: taskapi.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """XlsxWriter's archive would write its end into a file that is gone, when it is collected, and complain of that."""
    store(service, {"n": "int"}, [[1]], "one")
    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    written, write = itertools.count(), taskapi.AtomicFile.write

    def break_off(file: taskapi.AtomicFile, block: bytes) -> None:
        if next(written):
            raise taskapi.JobFailed("no more")
        write(file, block)

    monkeypatch.setattr(taskapi.AtomicFile, "write", break_off)
    assert failed(service, "xlsx") == "no more"
    gc.collect()
    assert complaints == []


def test_parquet_is_typed_for_whoever_reads_it(service: taskapi.Service, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """By pyarrow, DuckDB and pandas; in row groups."""
    parquet = pytest.importorskip("pyarrow.parquet")
    expected = store_naughty(service)
    (tmp_path / "a.parquet").write_bytes(exported(service, "parquet", "naughty"))
    table = parquet.read_table(tmp_path / "a.parquet")
    assert [*map(str, table.schema.types)] == [
        "int64", "double", "decimal128(21, 2)", "bool", "string", "date32[day]", "timestamp[us, tz=UTC]",
        "extension<arrow.json>", "extension<arrow.json>", "string", "string"]
    moments = [datetime(2024, 2, 29, 12, 30, 0, 123_000, UTC), datetime(2024, 2, 29, 10, 30, tzinfo=UTC),
               datetime(1970, 1, 1, tzinfo=UTC), None]
    mixed = ["1", "0.5", '"é😀;--"', None]
    for row, wanted, *others in zip(table.to_pylist(), expected, moments, mixed, strict=True):
        assert row == {**wanted, "price": wanted["price"] and Decimal(wanted["price"]),
                       "on": None if wanted["on"] is None else bool(wanted["on"]),
                       "day": wanted["day"] and date.fromisoformat(wanted["day"]),
                       **dict(zip(("at", "mixed"), others, strict=True))}
    monkeypatch.setattr(taskapi, "_GROUP_ROWS", 2)
    for number in range(3):
        store(service, {"n": "decimal" if number else "int"}, [["1.5"] if number else [7]] * 2, "many")
    many = parquet.ParquetFile(io.BytesIO(exported(service, "parquet", "many", where={"n": {"gt": 0}})))
    assert (many.metadata.num_rows, str(many.schema_arrow.types[0])) == (6, "decimal128(2, 1)")
    assert many.metadata.num_row_groups == 2  # blocks of 2 and of 4
    both = parquet.read_table(io.BytesIO(exported(service, "parquet", None))).to_pydict()
    assert both["recordType"] == ["many"] * 6 + ["naughty"] * 4 + ["other"] * 3
    duckdb, pandas = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    with duckdb.connect() as db:
        found = db.sql(f"SELECT column_type FROM (DESCRIBE FROM '{tmp_path / 'a.parquet'}')").fetchall()
        assert [kind for kind, in found] == ["BIGINT", "DOUBLE", "DECIMAL(21,2)", "BOOLEAN", "VARCHAR", "DATE",
                                            "TIMESTAMP WITH TIME ZONE", "JSON", "JSON", "VARCHAR", "VARCHAR"]
        assert db.sql(f"SELECT t FROM '{tmp_path / 'a.parquet'}'").fetchall() == [(row["t"],) for row in expected]
    frame = pandas.read_parquet(tmp_path / "a.parquet")
    assert frame["t"].tolist()[:3] == [row["t"] for row in expected][:3]


def test_a_parquet_value_that_no_decimal_holds_is_a_text(service: taskapi.Service) -> None:
    """Without loss: beyond 38 digits, or with an exponent; and what jobs wrote with several kinds."""
    parquet = pytest.importorskip("pyarrow.parquet")
    for kinds, values, kind in ((["decimal"], ["9" * 40], "string"), (["decimal"], ["1e5"], "string"),
                                (["int", "float"], [3, 0.5], "double"),
                                (["int", "decimal"], [3, "-0.50"], "decimal128(3, 2)"),
                                (["float", "decimal"], [0.5, "0.10"], "extension<arrow.json>"),
                                (["text", "int"], ["x", 1], "extension<arrow.json>"),
                                (["date", "text"], ["2024-01-01", "x"], "string")):
        name = "_".join(["n", *kinds, str(len(str(values[0])))])
        for each, value in zip(kinds, values, strict=True):
            store(service, {"v": each}, [[value], [None]], name)
        table = parquet.read_table(io.BytesIO(exported(service, "parquet", name)))
        assert str(table.schema.types[0]).startswith(kind), name
        assert table.num_rows == 2 * len(kinds)


def test_a_split_export_is_a_zip_of_one_file_a_type(service: taskapi.Service, url: str) -> None:
    """Each as an export of that type alone; names that Windows keeps get another."""
    store(service, {"n": "int", "t": "text"}, [[1, "x"], [2, ""]], "con")
    store(service, {"b": "bool"}, [[1]], "flags")
    for export_format in ("csv", "tsv", "ndjson", "parquet"):
        data = exported(service, export_format, None, split=True)
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            assert packed.testzip() is None
            assert {name: packed.read(name) for name in packed.namelist()} == {
                f"_con.{export_format}": exported(service, export_format, "con"),
                f"flags.{export_format}": exported(service, export_format, "flags")}
        assert exported(service, export_format, None, split=True) == data
    for asked in ({"limit": 2}, {"limit": 1, "orderBy": "-b"}, {"fields": ["b"]}):
        with zipfile.ZipFile(io.BytesIO(exported(service, "ndjson", None, split=True, **asked))) as packed:
            lines = sum(packed.read(name).count(b"\n") for name in packed.namelist())
            assert lines == (1 if "fields" in asked else asked["limit"])
    job = ask(url, "POST", "/export", {"format": "csv", "split": True}).json
    answer = ask(url, "GET", job["links"]["download"])
    assert (job["result"]["filename"], answer.headers["Content-Type"]) == ("records.zip", "application/zip")


def test_objects_without_their_nulls(service: taskapi.Service) -> None:
    """Everything else as with them, in nested objects too."""
    kinds = {kind: kind for kind in ("int", "float", "decimal", "bool", "text", "date", "any", "none")}
    row = [1, 0.1, "12.50", 1, 'a"null\\', "2024-01-01", "null", None]
    many = {f"f{number}": "int" for number in range(200)}
    store(service, {**kinds, "json": "json", 'n"ull,': "text", **many},
          [[*row, '{"a":null,"b":[null,1.50],"c":{"d":null}}', "", *[None] * 200], [None] * 210], "sparse")
    full = json.loads(exported(service, "json", "sparse"))
    assert exported(service, "ndjson", "sparse", omitNull=True).splitlines()[1] == b"{}"
    found = json.loads(exported(service, "json", "sparse", omitNull=True))
    assert found == [{key: value for key, value in full[0].items() if value is not None} | {
        "json": {"b": [None, 1.5], "c": {}}}, {}]
    both = exported(service, "ndjson", None, omitNull=True, filters={"recordType": ["sparse"], "from": "2000-01-01"})
    assert json.loads(both.splitlines()[0]) == found[0]


def workbook(rows: Sequence[Sequence[Any]], *more: tuple[str, Sequence[Sequence[Any]]]) -> bytes:
    """What openpyxl, that is somebody else, writes."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for title, lines in (("First", rows), *more):
        sheet = book.active if title == "First" else book.create_sheet(title)
        sheet.title = title
        for line in lines:
            sheet.append(line)
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def test_a_sheet_is_read_by_the_types_of_its_cells() -> None:
    """Whole numbers, days and instants by column, errors and empty cells as nulls, empty rows not at all."""
    data = workbook([["a note above"], [], [" n ", "x", None, "day", "at", "ok", "code", "n"],
                     [1, 1, None, date(2024, 2, 29), datetime(2024, 2, 29), True, "01234", None], [],
                     [2, 0.5, None, None, datetime(2024, 2, 29, 12, 30), False, "=1", "x"], ["#N/A", None]],
                    ("Two", [["k"], [None], [5]]))
    kinds, rows = read("a.xlsx", data, skip="1")
    assert kinds == {"n": "int", "x": "float", "column_3": "none", "day": "date", "at": "datetime", "ok": "bool",
                     "code": "text", "n_2": "text"}
    assert rows[0] == (1, 1.0, None, "2024-02-29", "2024-02-29T00:00:00", 1, "01234", None)
    assert rows[1][:2] == (2, 0.5)
    assert read("a.xlsx", data, sheet="Two") == ({"k": "int"}, [(None,), (5,)])
    assert read("a.xlsx", data, sheet="Two", header="none") == ({"column_1": "any"}, [("k",), (None,), (5,)])
    assert read("a.xlsx", data, sheet="Two", header="x", comment="k") == ({"x": "int"}, [(5,)])
    bare = [[7, "Ann", 1.5], [8, "Bob", 2], [9, "Ann", 2]]
    assert read("a.xlsx", workbook(bare)) == (
        {"column_1": "int", "column_2": "text", "column_3": "float"}, [*map(tuple, bare)])
    assert read("a.xlsx", workbook([["of", 2019, 0.25], ["x", 1, 3]])) == (
        {"of": "text", "2019": "int", "0.25": "int"}, [("x", 1, 3)])
    with pytest.raises(taskapi.JobFailed, match=r"no sheet 'Tow'; did you mean 'Two'\?; there are: 'First', 'Two'"):
        read("a.xlsx", data, sheet="Tow")
    with pytest.raises(BadRequest, match="sheet: is for xlsx files, not for csv"):
        read("a.csv", b"a\n1\n", sheet="x")


def repacked(data: bytes, **parts: bytes) -> bytes:
    """A workbook with other parts."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in {*old.namelist(), *parts}:
            new.writestr(name, parts[name] if name in parts else old.read(name))
    return file.getvalue()


def test_damaged_and_hostile_workbooks_are_refused(app) -> None:
    """With what is wrong, and nothing left; none of them is unpacked further than it may be."""
    good = workbook([["a", "b"], [1, 2]])
    sheet = "xl/worksheets/sheet1.xml"
    far = b'<worksheet><sheetData><row r="1"><c r="A1"><v>1</v></c></row><row r="1048576"><c r="XFD1048576"><v>1</v>' \
          b"</c></row></sheetData></worksheet>"
    for name, data, words in (
            ("cut", good[:-200], "damaged or cut off"), ("half", good[:len(good) // 2], "damaged or cut off"),
            ("no workbook", repacked(good, **{"xl/workbook.xml": b"<x"}), "damaged"),
            ("bomb", repacked(good, **{sheet: b"<worksheet>" + b" " * 2**27}), "unpacks to too much"),
            ("macros", repacked(good, **{"xl/vbaProject.bin": b"x"}), "has macros"),
            ("far cell", repacked(good, **{sheet: far}), "row 1048576 and column 16384"),
            ("wide", workbook([[f"c{n}" for n in range(16_384)], [1]]), "more than 1990 fields"),
            ("empty", workbook([]), "the sheet is empty"), ("no header", workbook([[1, 2], [3, 4]]), "no header"),
            ("flipped", good.replace(b"PK\x01\x02", b"PK\x01\x03", 1), "damaged")):
        job = upload(app, "a.xlsx", data, recordType="broken")
        assert job["status"] == "failed", name
        assert words in job["error"], (name, job["error"])
        answer = app.post("/infer", upload_files=[("file", "a.xlsx", data)], status=400)
        assert words in answer.json["error"], (name, answer.json)
    for data, words in ((b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "password"), (b"a,b\n1,2\n", "begin")):
        answer = app.post("/upload", upload_files=[("file", "a.xlsx", data)], status=400)
        assert words in answer.json["error"]
    packed = ("file", "a.xlsx.gz", gzip.compress(good), "application/gzip")
    answer = app.post("/upload", upload_files=[packed], params=[("recordType", "x")], status=400)
    assert "unpack it" in answer.json["error"]
    assert "broken" not in [entry["recordType"] for entry in app.get("/records").json["items"]]


def test_a_parquet_of_somebody_else_is_read_by_its_types() -> None:
    """Everything that Arrow has a type for; what no record holds, and what is damaged, is refused by name."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    moment = datetime(2024, 2, 29, 12, 30, 0, 250_000)

    def file(columns: dict[str, Any], **options: Any) -> bytes:
        out = io.BytesIO()
        parquet.write_table(arrow.table(columns), out, **options)
        return out.getvalue()

    data = file({
        "i": arrow.array([1, None], arrow.uint8()), "big": arrow.array([2**64 - 1, None], arrow.uint64()),
        "f": [1.0, math.nan], "single": arrow.array([0.1, None], arrow.float32()), "b": [True, None],
        "dec": arrow.array([Decimal("1.50"), Decimal("2.00")]), "s": ["01234", ""],
        "cat": arrow.array(["x", None]).dictionary_encode(), "bytes": [b"text", b"more"],
        "day": [date(2024, 2, 29), None],
        "naive": [moment, None], "nano": arrow.array([moment, None], arrow.timestamp("ns", "Europe/Paris")),
        "time": [dt.time(1, 2), None], "list": [[1, None], None], "struct": [{"a": "x", "d": date(2024, 1, 1)}, None],
        "null": arrow.nulls(2)})
    kinds, rows = read("a.parquet", data)
    assert [*kinds.values()] == ["int", "decimal", "float", "float", "bool", "decimal", "text", "text", "text", "date",
                                 "datetime", "datetime", "text", "json", "json", "none"]
    assert [row[:10] for row in rows] == [
        (1, str(2**64 - 1), 1.0, 0.1, 1, "1.50", "01234", "x", "text", "2024-02-29"),
        (None, None, None, None, None, "2.00", "", None, "more", None)]
    assert rows[0][10:] == ("2024-02-29T12:30:00.250000", "2024-02-29T12:30:00.250000Z", "01:02:00", "[1,null]",
                            '{"a":"x","d":"2024-01-01"}', None)
    assert read("a.parquet", file({"a": arrow.array([], arrow.int64())})) == ({"a": "none"}, [])
    for bad, words in ((data[:-20], "damaged, cut off"), (b"PAR1" + bytes(50), "damaged, cut off"),
                       (file({"x": [b"\xff"]}), "field 'x'"), (file({"x": ["a\0b"]}), "NUL"),
                       (file({f"c{n}": [1] for n in range(2000)}), "more than 1990 fields"),
                       (file({"x": ["y" * 2**20] * 200}), "unpacks to too much"),
                       (file({"x": arrow.nulls(2**27, arrow.int8())}), "unpacks to too much")):
        with pytest.raises(taskapi.JobFailed, match=words):
            read("a.parquet", bad)


def test_without_its_packages_a_format_says_how_to_get_them(app, monkeypatch: pytest.MonkeyPatch) -> None:
    """To whoever asks for it, 400; /fields and /openapi.json tell beforehand; all else works."""
    data = workbook([["a"], [1]])
    for module in ("pyarrow", "xlsxwriter", "python_calamine"):
        monkeypatch.setitem(sys.modules, module, None)
    for export_format, name in (("parquet", "pyarrow"), ("xlsx", "XlsxWriter")):
        error = app.post_json("/export", {"format": export_format}, status=400).json
        assert error["fields"][0]["field"] == "format"
        assert f'needs {name}: pip install "taskapi[formats]", or "{name}>=' in error["error"]
        told = app.get("/openapi.json").json["components"]["schemas"]["ExportRequest"]["properties"]["format"]
        assert f"{export_format} needs {name}" in told["description"]
        assert f"needs {name}" in app.get("/fields").json["formats"][export_format]
    assert app.get("/fields").json["formats"]["csv"] == "at hand"
    for path in ("/upload", "/infer"):
        answer = app.post(path, params=[("recordType", "x")], upload_files=[("file", "a.xlsx", data)], status=400)
        assert 'python-calamine: pip install "taskapi[formats]"' in answer.json["error"]
    assert app.post("/upload", upload_files=[("file", "a.xlsx", data)]).status_int == 201  # to keep it needs nothing
    assert app.post_json("/export", {"format": "sql"}).json["request"]["dialect"] == "sqlite"


def test_the_packages_of_formats_are_imported_by_whoever_uses_them_only() -> None:
    """Not by a start, nor by an export to CSV."""
    code = """import sys
sys.modules["pandas"] = None  # which sqlite-utils imports where it is
import tempfile, taskapi
with taskapi.open_service(tempfile.mkdtemp(), inline=True) as service:
    service.enqueue("generate", {"count": 1})
    service.enqueue("export", {"format": "csv"})
print({*sys.modules} & {"pyarrow", "xlsxwriter", "python_calamine"})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE)
    assert done.stdout == "set()\n"


def test_options_that_do_not_go_with_a_format_are_refused_by_name(url: str) -> None:
    """With the formats that they go with; those that are not asked for say nothing."""
    for format_, option, value, words in (
            ("csv", "dialect", "mysql", "for sql"), ("sqlite", "split", True, "for csv, tsv, ndjson, parquet"),
            ("xlsx", "split", True, "ndjson"), ("sql", "split", True, "ndjson"), ("json", "split", True, "ndjson"),
            ("csv", "omitNull", True, "for json, ndjson"), ("parquet", "omitNull", True, "for json, ndjson")):
        body = refused(ask(url, "POST", "/export", {"format": format_, option: value}), 400, words)
        assert body["fields"][0]["field"] == option
    refused(ask(url, "POST", "/export", {"format": "sql", "dialect": "postgresql"}), 400, "mean 'postgres'")
    refused(ask(url, "POST", "/export", {"format": "csv", "split": True, "gzip": True}), 400, "gzip")
    assert ask(url, "POST", "/export", {"format": "xlsx", "split": False, "omitNull": False}).status == 202


def test_the_order_and_the_limit_of_an_export_hold_over_all_its_types(service: taskapi.Service, tmp_path: Path) -> None:
    """Python's sort is the referee; every format agrees, the database of several tables too."""
    values = {"one": [5, None, 1, 3], "two": [2, 5, 4], "three": []}
    for record_type, numbers in values.items():
        store(service, {"n": "int", "t": "text"}, [[n, f"{record_type}{n}"] for n in numbers], record_type)
    types = sorted(name for name in values if values[name])
    every = [(name, n) for name in types for n in values[name]]
    order = {"n": sorted(every, key=lambda row: row[1] or 0), None: every,
             "-n": sorted(every, key=lambda row: -(row[1] or 0))}
    for (order_by, rows), limit in itertools.product(order.items(), (1, 3, 5, 100)):
        asked = {"orderBy": order_by, "limit": limit}
        got = [json.loads(line) for line in exported(service, "ndjson", None, **asked).splitlines()]
        assert [(record["recordType"], record["n"]) for record in got] == rows[:limit]
        table = csv.DictReader(io.StringIO(exported(service, "csv", None, **asked).decode(), newline=""))
        assert [(row["recordType"], row["n"]) for row in table] == [(name, str(n or "")) for name, n in rows[:limit]]
        (tmp_path / "copy.db").write_bytes(exported(service, "sqlite", None, **asked))
        with closing(sqlite3.connect(tmp_path / "copy.db")) as db:
            for name in types:
                assert [row[0] for row in db.execute(f"SELECT n FROM {name}")] == [
                    n for other, n in rows[:limit] if other == name]


def test_an_export_never_sorts_what_lies_in_order_and_starts_where_it_was(service: taskapi.Service) -> None:
    """SQLite says how it would read: no sorter, and the records by their number, from the last on."""
    for _ in range(3):  # neighbours are read as one
        store(service, {"n": "int"}, [[1]])
    statements: list[str] = []
    with service.queue.records._database.read() as connection:
        connection.set_trace_callback(lambda sql: statements.append(sql) if sql.startswith("SELECT CAST") else None)
        for limit in (None, 9):
            statements.clear()
            query = taskapi.Query(connection, taskapi.Selected(taskapi.Filters(record_type="thing"), limit=limit))
            assert [*query.text_blocks(taskapi.RecordText())] == [(b'{"n":1}\n{"n":1}\n{"n":1}', 3, 3)]
            (statement,) = statements
            plan = " / ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}"))
            assert "B-TREE" not in plan
            search = r"SEARCH (TABLE \S+ AS )?r USING INTEGER PRIMARY KEY \(rowid>\? AND rowid<\?\)"
            assert re.search(search, plan), plan
        connection.set_trace_callback(None)


def test_conditions_on_the_id_say_where_reading_begins_and_ends(service: taskapi.Service) -> None:
    """In steps of SQLite's machine, which are few; and between two whole numbers there is none."""
    for _ in range(2):  # two layouts, and two ranges
        store(service, {"n": "int"}, [[n] for n in range(4000)])
        store(service, {"n": "int", "m": "int"}, [[n, n] for n in range(4000)])
    for where, ids in (
            ({"gte": 9001, "lt": 9003}, [9001, 9002]), ({"eq": 5}, [5]), ({"gt": 15_998.5}, [15_999, 16_000]),
            ({"gt": 1, "lte": "3"}, [2, 3]), ({"eq": 5.5}, []), ({"lt": 1}, []), ({"gt": math.inf}, [])):
        steps: list[int] = []
        with service.queue.records._database.read() as connection:
            connection.set_progress_handler(lambda counted=steps: counted.append(1), 100)
            wanted = taskapi.Selected(taskapi.Filters(record_type="thing", where={"_id": where}), ["_id"])
            query = taskapi.Query(connection, wanted)
            found = json.loads(b"[%b]" % b",".join(text for text, *_ in query.text_blocks(taskapi.RecordText(","))))
            assert ([record["_id"] for record in found], query.count()) == (ids, len(ids))
        assert len(steps) < 40


@pytest.mark.parametrize("order_by", [None, "-n"])
def test_the_text_that_is_made_at_a_time_is_bounded_in_bytes(
        service: taskapi.Service, monkeypatch: pytest.MonkeyPatch, order_by: str | None) -> None:
    """Long records after short ones, and one beyond the bound: nothing is lost, and no block of several exceeds it."""
    monkeypatch.setattr(taskapi, "_BLOCK_LIMIT", 20_000)
    sizes = [1] * 3000 + [3000] * 40 + [50_000] + [1] * 500
    store(service, {"n": "int", "t": "text"}, [[n, "x" * size] for n, size in enumerate(sizes)])
    wanted = taskapi.Selected(taskapi.Filters(record_type="thing"), order_by=order_by)
    with service.queue.records.query(wanted) as query:
        blocks = [*query.text_blocks(taskapi.RecordText(","))]
    assert all(len(text) <= 20_000 or count == 1 for text, count, _ in blocks)
    records = [record for text, *_ in blocks for record in json.loads(b"[%b]" % text)]
    assert records[::-1 if order_by else 1] == [{"n": n, "t": "x" * size} for n, size in enumerate(sizes)]


def test_a_filter_that_few_records_fit_is_not_read_in_small_steps(service: taskapi.Service) -> None:
    """As many statements as blocks of all the records would need, and not one more for each record found."""
    store(service, {"n": "int"}, [[n] for n in range(20_000)])
    filters = taskapi.Filters.model_validate({"recordType": "thing", "where": {"n": {"in": [7, 9999, 19_000]}}})
    statements: list[str] = []
    with service.queue.records._database.read() as connection:
        connection.set_trace_callback(lambda sql: statements.append(sql) if "group_concat" in sql else None)
        blocks = taskapi.Query(connection, taskapi.Selected(filters)).text_blocks(taskapi.RecordText(","))
        assert b",".join(text for text, *_ in blocks) == b'{"n":7},{"n":9999},{"n":19000}'
        connection.set_trace_callback(None)
    assert len(statements) < 20


def test_every_float_leaves_as_it_is_at_each_power_of_two(service: taskapi.Service) -> None:
    """And next to it, where the ways of writing one change, and anywhere; repr and float are the referees."""
    random = Random(3)
    near = [2.0**power for power in range(-1074, 1024)]
    values = [sign * value for middle in near for value in (
        middle, math.nextafter(middle, math.inf), math.nextafter(middle, 0), middle / 3) for sign in (1, -1)]
    values += [sign * n / 10**places for n in (1, 9, 99_999, 123_456_789) for places in range(12) for sign in (1, -1)]
    values += [-156347.27889654099, 1e15 + 0.5, -0.0, *(random.uniform(-1e6, 1e6) for _ in range(9999))]
    store(service, {"x": "float", "a": "any"}, [[value, value] for value in values])
    held = plain(service.folder.root, "SELECT x FROM thing ORDER BY _id")
    assert [[record["x"], record["a"]] for record in json.loads(exported(service, "json"))] == [[x, x] for x in held]
    rows = [*csv.reader(io.StringIO(exported(service, "csv").decode(), newline=""))][1:]
    assert rows == [[cell, cell] for cell in (str(float(cell)) for cell, _ in rows)]
    assert [float(cell) for cell, _ in rows] == held


def test_floats_nulls_and_the_endless_stand_where_they_were(service: taskapi.Service) -> None:
    """Among short floats and texts that look like marks, once there is one that SQLite would not print exactly."""
    values = [None, 0.1, 1 / 3, None, 5.0, -5.0, 1e-9, 0.0, None, -2 / 3]
    store(service, {"x": "float", "t": "text", "y": "float"}, [[x, '"\x7f,null"', x and -x] for x in values])
    store(service, {"x": "float"}, [[x] for x in values], "one")
    with closing(sqlite3.connect(service.folder.root / "taskapi.db")) as db:  # no request can say these
        for name in ("thing", "one"):
            db.execute(f"UPDATE {name} SET x = x * 9e999 WHERE abs(x) = 5")
        db.commit()
    values[4:6] = math.inf, -math.inf
    shown = ["", "0.1", "0.3333333333333333", "", "1e999", "-1e999", "1e-09", "0.0", "", "-0.6666666666666666"]
    assert exported(service, "csv", "one").decode().split() == ['"x"', *(x or '""' for x in shown)]
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        rows = [*csv.reader(io.StringIO(exported(service, name).decode(), newline=""), delimiter=delimiter)][1:]
        assert [row[:2] for row in rows] == [[x, '"\x7f,null"'] for x in shown]
        assert [y for *_, y in rows] == ["", "-0.1", "-0.3333333333333333", "", "-5.0", "5.0", "-1e-09", "0.0", "",
                                         "0.6666666666666666"]
    for omitted in (False, True):
        records = json.loads(exported(service, "json", omitNull=omitted))
        assert [record.get("x", "none") for record in records] == [
            "none" if x is None and omitted else x for x in values]
    for dialect, endless in (("postgres", "'{}Infinity'"), ("mysql", "NULL"), ("sqlite", "{}1e999")):
        lines = re.findall(r"^\((.+)\)[,;]$", exported(service, "sql", "one", dialect=dialect).decode(), re.MULTILINE)
        assert lines == [x.replace("-1e999", endless.format("-")).replace("1e999", endless.format("")) or "NULL"
                         for x in shown]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(FILE_TEXTS, min_size=2, max_size=2), max_size=6), delimiter=st.sampled_from(",;\t|"),
       end=st.sampled_from(["\n", "\r\n"]))
def test_csv_that_pythons_csv_writes_is_read_back(rows, delimiter, end):
    """csv.writer is the referee for quoting, delimiters and line ends inside cells."""
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
    assert read("a.csv", out.getvalue().encode())[1] == [tuple(row) for row in rows]


class Slow(io.BytesIO):
    """A file of which no more than `size` bytes come at a time."""

    def __init__(self, content: bytes, size: int):
        super().__init__(content)
        self.size = size

    def read(self, most: int | None = -1) -> bytes:
        """The next bytes."""
        return super().read(min(most or -1, self.size))


@settings(max_examples=50, deadline=None)
@given(records=st.lists(st.dictionaries(st.sampled_from("abc"), FILE_TEXTS), max_size=6).filter(any),
       indent=st.sampled_from([None, 1]), escaped=st.booleans(), piece=st.integers(1, 40))
def test_json_is_read_alike_however_it_is_laid_out_and_cut(records, indent, escaped, piece):
    """json.loads is the referee; pieces end anywhere."""
    text = json.dumps(records, indent=indent, ensure_ascii=escaped).encode()
    reader = taskapi.RecordReader("a.json")
    batches = [*reader.read(Slow(text, piece))]
    for batch in batches:
        reader.learn(batch)
    kinds = reader.kinds()
    assert reader.counts.total() == len(records)
    assert [{key: value for key, value in zip(kinds, row, strict=True) if value is not None}
            for batch in batches for row in reader.rows(batch, kinds)] == records


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(['a', '1', '"', '""', ",", "\n", "\r\n", " ", "#", '"q"', "é", "1,2\n", '"m\nn"']),
                     max_size=40).map("".join), size=st.integers(1, 16),
       options=st.sampled_from([{}, {"comment": "#"}, {"ragged": "pad"}, {"skip": 1}, {"header": "x,y"}]))
def test_csv_is_read_alike_however_it_is_cut(text, size, options):
    """Blocks end inside of cells, line ends, comments and characters; a refusal names the same line."""
    def outcome(stream: io.BytesIO) -> Any:
        reader = taskapi.RecordReader("a.csv", taskapi.IngestOptions(delimiter=",", **options))
        try:
            batches = [*reader.read(stream)]
        except taskapi.JobFailed as error:
            return str(error).split(":")[0]
        return reader.renamed(), [row for batch in batches if batch.length
                                  for row in zip(*batch.columns.values(), strict=True)]

    content = ("a,b\n" + text).encode()
    assert outcome(Slow(content, size)) == outcome(io.BytesIO(content))


NO_HEADER = "header=none"
CORPUS: dict[str, tuple[str, str | bytes, dict[str, Any], Any]] = {  # file, content, options; records or words
    # headers
    "R's write.csv": ("r.csv", '"","mpg","cyl"\n"Mazda",21,6\n"Datsun",22.8,4\n', {}, [
        {"column_1": "Mazda", "mpg": "21", "cyl": 6}, {"column_1": "Datsun", "mpg": "22.8", "cyl": 4}]),
    "R's write.csv2": ("r.csv", '"";"x"\n"1";1,5\n"2";2,25\n', {}, [
        {"column_1": "1", "x": "1,5"}, {"column_1": "2", "x": "2,25"}]),
    "R's write.table": ("r.txt", '"a" "b c"\n"1" 2 "x  y"\n', {}, [{"column_1": "1", "a": 2, "b c": "x  y"}]),
    "R's write.table without quotes": ("r.txt", "mpg\tcyl\nMazda RX4\t21\t6\nDatsun 710\t22\t4\n", {}, [
        {"column_1": "Mazda RX4", "mpg": 21, "cyl": 6}, {"column_1": "Datsun 710", "mpg": 22, "cyl": 4}]),
    "R's write.table with numbers": ("r.csv", "a,b\n1,5,x\n2,6,y\n", {}, [
        {"column_1": 1, "a": 5, "b": "x"}, {"column_1": 2, "a": 6, "b": "y"}]),
    "long rows, all of them": ("a.csv", "a,b\n1,2,3\n4,5,6\n", {}, ["line 1: the first line has 2 fields", "header"]),
    "a long row, the only one": ("a.csv", "a,b\n1,2,3\n", {}, ["line 1: the first line has 2 fields", "header"]),
    "names with commas": ("a.csv", "a,b\nLee, Ann,1\nRoy, Bob,2\n", {}, ["line 1: the first line has 2 fields"]),
    "R's write.table, named": ("r.txt", '"a" "b"\n"1" 2 3\n', {"delimiter": " ", "skip": 1, "header": "row,a,b"}, [
        {"row": "1", "a": 2, "b": 3}]),
    "pandas, with its index": ("p.csv", ",name\n0,Ann\n1,Bob\n", {}, [
        {"column_1": 0, "name": "Ann"}, {"column_1": 1, "name": "Bob"}]),
    "pandas, with a row of levels": ("p.csv", ",x,x\n,min,max\na,1,2\n", {}, [
        {"column_1": None, "x": "min", "x_2": "max"}, {"column_1": "a", "x": "1", "x_2": "2"}]),
    "spaces around names": ("a.csv", "a , b\n1,2\n", {}, [{"a": 1, "b": 2}]),
    "a name twice": ("a.csv", "a,a,a_2,A\n1,2,3,4\n", {}, [{"a": 1, "a_3": 2, "a_2": 3, "A_4": 4}]),
    "internal names": ("a.csv", "_id,_JOB,_created\n5f,1,2\n", {}, [{"_id_": "5f", "_JOB_": 1, "_created_": 2}]),
    "an empty last column": ("a.csv", "a,b,,\n1,2,,\n", {}, [{"a": 1, "b": 2}]),
    "a last column without a name": ("a.csv", "a,b,\n1,2,\n3,4,5\n", {}, [
        {"a": 1, "b": 2, "column_3": None}, {"a": 3, "b": 4, "column_3": 5}]),
    "a delimiter behind each row": ("a.csv", "a,b\n1,2,\n3,4,,\n", {}, [{"a": 1, "b": 2}, {"a": 3, "b": 4}]),
    "a name on two lines": ("a.csv", '"line one \r\n line two";b\n1;2\n', {}, [{"line one line two": 1, "b": 2}]),
    "names that do not print": ("a.csv", "a\u00a0b\u200b,\u00ad\n1,2\n", {}, [{"a b": 1, "column_2": 2}]),
    "spaces before the quotes": ("a.csv", '"Month", "1958"\n"JAN",  340\n', {}, [{"Month": "JAN", "1958": "  340"}]),
    "a name of 255 characters": ("a.csv", "x" * 255 + ",b\n1,2\n", {}, [{"x" * 255: 1, "b": 2}]),
    "no header": ("a.csv", "1,2\n3,4\n", {}, [NO_HEADER]),
    "no header: a text that comes again": ("a.csv", "5.1,3.5,setosa\n4.9,,setosa\n6.3,3.3,virginica\n", {}, [
        {"column_1": 5.1, "column_2": 3.5, "column_3": "setosa"},
        {"column_1": 4.9, "column_2": None, "column_3": "setosa"},
        {"column_1": 6.3, "column_2": 3.3, "column_3": "virginica"}]),
    "no header: days": ("a.csv", "Ann;31.01.2024\nBob;01.02.2024\n", {}, [
        {"column_1": "Ann", "column_2": "31.01.2024"}, {"column_1": "Bob", "column_2": "01.02.2024"}]),
    "no header: counted": ("a.txt", "1\tAnn\t\\N\n2\tBob\t7\n3\tEve\t5\n", {}, [
        {"column_1": 1, "column_2": "Ann", "column_3": None}, {"column_1": 2, "column_2": "Bob", "column_3": 7},
        {"column_1": 3, "column_2": "Eve", "column_3": 5}]),
    "no header: MySQL's OUTFILE": ("m.csv", '"1";"Ann";\\N\n"2";"Bob";"x"\n', {}, [
        {"column_1": "1", "column_2": "Ann", "column_3": None}, {"column_1": "2", "column_2": "Bob", "column_3": "x"}]),
    "no header: R's write.table": ("r.txt", '"1" 5.1 "setosa"\n"2" 4.9 "setosa"\n"3" 6.3 "virginica"\n', {}, [
        {"column_1": "1", "column_2": 5.1, "column_3": "setosa"},
        {"column_1": "2", "column_2": 4.9, "column_3": "setosa"},
        {"column_1": "3", "column_2": 6.3, "column_3": "virginica"}]),
    "no header: numpy's savetxt": ("n.csv", "1.50000000e+00,2.00000000e+00\n2.50000000e+00,1.00000000e+00\n", {}, [
        {"column_1": "1.50000000e+00", "column_2": "2.00000000e+00"},
        {"column_1": "2.50000000e+00", "column_2": "1.00000000e+00"}]),
    "no header: sqlite3's list": ("s.txt", "1|Ann|2.5\n2|Bob|3.5\n3|Ann|1.5\n", {}, [
        {"column_1": 1, "column_2": "Ann", "column_3": 2.5}, {"column_1": 2, "column_2": "Bob", "column_3": 3.5},
        {"column_1": 3, "column_2": "Ann", "column_3": 1.5}]),
    "an index without a name": ("a.csv", ",0\n1821,269\n1822,321\n", {}, [
        {"column_1": 1821, "0": 269}, {"column_1": 1822, "0": 321}]),
    "no header, told": ("a.csv", "1,x\n3,4\n", {"header": "none"}, [
        {"column_1": 1, "column_2": "x"}, {"column_1": 3, "column_2": "4"}]),
    "names, told": ("a.csv", "1,x\n", {"header": "id, text"}, [{"id": 1, "text": "x"}]),
    "too few names, told": ("a.csv", "1,x\n", {"header": "id"}, ["2 fields instead of the 1"]),
    "Postgres COPY": ("t.txt", "1\tAnn\t\\N\n", {"header": "none"},
        [{"column_1": 1, "column_2": "Ann", "column_3": None}]),
    "MySQL's OUTFILE": ("m.csv", 'id,name,born\n1,"Ann",\\N\n2,\\N,"1990-01-31"\n3,"\\N",\\N\n', {}, [
        {"id": 1, "name": "Ann", "born": None}, {"id": 2, "name": None, "born": "1990-01-31"},
        {"id": 3, "name": "\\N", "born": None}]),
    # encodings
    "windows-1252": ("a.csv", b"a,b\n1,caf\xe9 \x80\n", {}, [{"a": 1, "b": "café €"}]),
    "windows-1252, late": ("a.csv", b"b\n" + b"x\n" * 100_000 + b"caf\xe9\n", {},
        [*[{"b": "x"}] * 100_000, {"b": "café"}]),
    "windows-1252 behind UTF-8": ("a.csv", b"a\n\xc3\xa9\n\xe9\n", {}, [{"a": "\u00c3\u00a9"}, {"a": "é"}]),
    "no UTF-8, but told so": ("a.csv", b"a\ncaf\xe9\n", {"encoding": "utf-8"},
        ["line 2", "0xe9, is not utf-8", "encoding"]),
    "cp437, told": ("a.csv", b"a\ncaf\x82\n", {"encoding": "cp437"}, [{"a": "café"}]),
    "UTF-16 of a spreadsheet": ("a.txt", "\ufeffa\tb\r\n1\té\r\n".encode("utf-16-le"), {}, [{"a": 1, "b": "é"}]),
    "UTF-8 with its mark": ("a.csv", "\ufeffnäme,b\né,😀\n", {}, [{"näme": "é", "b": "😀"}]),
    "UTF-16 without its mark": ("a.txt", "a\tb\n1\té\n".encode("utf-16-le"), {}, ["line 1", "NUL", "encoding"]),
    "UTF-16, told": ("a.txt", "a\tb\n1\té\n".encode("utf-16-le"), {"encoding": "utf-16-le"}, [{"a": 1, "b": "é"}]),
    # rows
    "short rows": ("a.csv", "a,b,c\n1,2,3\n1,2\n", {}, ["line 3: 2 fields instead of 3", "ragged=pad"]),
    "short rows, padded": ("a.csv", 'a,b,c\n1,2,3\n"",2\n3\n4,5,6\n', {"ragged": "pad"}, [
        {"a": "1", "b": 2, "c": 3}, {"a": "", "b": 2, "c": None}, {"a": "3", "b": None, "c": None},
        {"a": "4", "b": 5, "c": 6}]),
    "long rows, not padded": ("a.csv", "a,b\n1,2\n1,2,3\n", {"ragged": "pad"}, ["line 3: 3 fields instead of 2"]),
    "blank lines": ("a.csv", "\r\n  \r\na,b\r\n\r\n1,2\r\n   \r\n\r\n", {}, [{"a": 1, "b": 2}]),
    "a source below": ("a.csv", "a,b\n1,2\nSource: somebody\n", {}, ["line 3", "ragged=pad", "comment"]),
    "a source below, left out": ("a.csv", "a,b\n1,2\nSource: you\n", {"comment": "Source"}, [{"a": 1, "b": 2}]),
    # what stands above, and between
    "a note": ("a.csv", "# note\na,b\n1,2\n", {}, ["line 1", "skip", "comment", "delimiter"]),
    "a note, left out": ("a.csv", "# note, and more\na,b\n# within\n1,2\n# end\n", {"comment": "#"},
        [{"a": 1, "b": 2}]),
    "notes in one column": ("a.csv", "# note\na\n# within\n1\n\n# end", {"comment": "#"}, [{"a": 1}, {"a": None}]),
    "a title": ("a.csv", "Sales, 2024\na;b;c\n1;2;3\n", {}, ["line 1", "2 fields", "3", "skip"]),
    "a title, left out": ("a.csv", "Sales, 2024\r\n\r\na;b;c\r\n1;2;3\r\n", {"skip": 2}, [{"a": 1, "b": 2, "c": 3}]),
    "a statistics office": (
        "a.csv", 'Table 1: people\n"Unit: 1,000"\n\nregion;2023;2024\nNorth;1,5;2,5\nSouth;3,5;4,5\n', {"skip": 2},
        [{"region": "North", "2023": "1,5", "2024": "2,5"}, {"region": "South", "2023": "3,5", "2024": "4,5"}]),
    "it too, as it came": ("a.csv", 'Table 1: people\n"Unit: 1,000"\n\nregion;2023\nNorth;1,5\nSouth;2,5\n', {},
        ["skip"]),
    "spaces instead of names": ("a.csv", " , \n1,2\n", {}, [NO_HEADER]),
    "decimal commas": ("a.csv", "a,x;b,y\n1,5;2,5\n3,5;4,0\n", {}, [
        {"a,x": "1,5", "b,y": "2,5"}, {"a,x": "3,5", "b,y": "4,0"}]),
    "two delimiters alike": ("a.csv", "a;b,c\nx;y,z\n", {}, ["line 1", "delimiter decides"]),
    "two alike, told": ("a.csv", "a;b,c\n1;2,3\n", {"delimiter": ","}, [{"a;b": "1;2", "c": 3}]),
    "a list with rules": ("s.txt", "-----\n|Plant|Qty|\n-----\n|0100 |  5|\n-----\n", {}, ["skip", "comment"]),
    "a list with rules, told": (
        "s.txt", "-----\n|Plant|Qty|\n-----\n|0100 |  5|\n-----\n", {"comment": "-", "delimiter": "|"}, [
            {"column_1": None, "Plant": "0100 ", "Qty": "  5"}]),
    "a list of SAP's, with a blank line": ("s.txt", b"\tWerk\tMenge\r\n\r\n\t0100\t1,5-\r\n\tM\xfc\t2\r\n", {}, [
        {"column_1": None, "Werk": "0100", "Menge": "1,5-"}, {"column_1": None, "Werk": "Mü", "Menge": "2"}]),
    "Eurostat": ("e.tsv", "freq,geo\\TIME\t2022 \t2023 \nA,AT\t1.5 p\t: \nA,BE\t2.5 \t3.1 e\n", {}, [
        {"freq,geo\\TIME": "A,AT", "2022": "1.5 p", "2023": ": "},
        {"freq,geo\\TIME": "A,BE", "2022": "2.5 ", "2023": "3.1 e"}]),
    "the World Bank": (
        "w.csv", '\ufeff"Source","X",\r\n\r\n"Name","Of","1960","1961",\r\n"Aruba","ABW","","1.5",\r\n', {"skip": 2}, [
            {"Name": "Aruba", "Of": "ABW", "1960": "", "1961": "1.5"}]),
    "it, as it came": (
        "w.csv", '\ufeff"Source","X",\r\n\r\n"Name","Of","1960","1961",\r\n"Aruba","ABW","","1.5",\r\n', {}, [
            "line 1", "skip"]),
    "psql's count of rows": ("p.txt", "id|name\n1|Ann\n(1 row)\n", {}, ["line 3", "comment"]),
    "that count, left out": ("p.txt", "id|name\n1|Ann\n(1 row)\n", {"comment": "("}, [{"id": 1, "name": "Ann"}]),
    "an SAP-like list": ("a.txt", "|Plant|Qty|\n|0100 |5  |\n", {"delimiter": "|"}, [
        {"column_1": None, "Plant": "0100 ", "Qty": "5  "}]),
    "Excel's sep": ("a.csv", "sep=;\r\na;b\r\n1;x,y\r\n", {}, [{"a": 1, "b": "x,y"}]),
    "carets": ("a.txt", "id^name\n1^Ann, B.\n2^Bob\n", {}, [{"id": 1, "name": "Ann, B."}, {"id": 2, "name": "Bob"}]),
    "tildes": ("a.csv", "id~name\n1~\n2~Bob\n", {}, [{"id": 1, "name": None}, {"id": 2, "name": "Bob"}]),
    "single blanks": ("a.txt", "id name\n1 Ann\n2 Bob\n", {}, [{"id": 1, "name": "Ann"}, {"id": 2, "name": "Bob"}]),
    "a report": ("a.txt", "  year    value \r\n  1990     1.5\r\n  1991\t\t22.25  \r\n", {}, [
        {"year": 1990, "value": 1.5}, {"year": 1991, "value": 22.25}]),
    "a report of texts": ("a.txt", "First name  City\nAnn Lee     Paris\nBob         Rome\n", {}, [
        "delimiter=' '", "delimiter=tab"]),
    "it, told": ("a.txt", "name    city\nAnn  Paris\nBob  Rome\n", {"delimiter": " "}, [
        {"name": "Ann", "city": "Paris"}, {"name": "Bob", "city": "Rome"}]),
    "full names": ("a.csv", "full name\nAnn Lee\nBob Roy\n", {}, [{"full name": "Ann Lee"}, {"full name": "Bob Roy"}]),
    "names with numbers": ("a.csv", "product name\niPhone 12\nPixel 9\n", {}, [
        {"product name": "iPhone 12"}, {"product name": "Pixel 9"}]),
    "backslashes before quotes": ("a.csv", 'a,b\n1,"say \\"hi\\""\n', {}, ["line 2", "written twice", "delimiter"]),
    "names in one column": ("a.csv", "name\nSmith, John\nDoe, Jane\n", {}, ["line 1", "delimiter"]),
    "names in one column, told": ("a.csv", "name\nSmith, John\n", {"delimiter": "tab"}, [{"name": "Smith, John"}]),
    "sentences in one column": ("a.txt", "text\nOne, two.\nThree\nFour\nFive, six, seven\n", {}, [
        {"text": "One, two."}, {"text": "Three"}, {"text": "Four"}, {"text": "Five, six, seven"}]),
    "commas in a .tsv": ("a.tsv", "a,b\n1,2\n", {}, [{"a": 1, "b": 2}]),
    "an old Mac": ("a.csv", "a,b\r1,2\r3,4\r", {}, [{"a": 1, "b": 2}, {"a": 3, "b": 4}]),
    "releases of a system": ("a.csv", "a,b,c\n1,2\n3,4\n5,6,7\n", {"ragged": "pad"}, [
        {"a": 1, "b": 2, "c": None}, {"a": 3, "b": 4, "c": None}, {"a": 5, "b": 6, "c": 7}]),
    # texts that stay what they are
    "quotes that tell texts from numbers": ("a.csv", '"n"\n300\n"title"\n1.5\n"7"\n', {}, [
        {"n": 300}, {"n": "title"}, {"n": 1.5}, {"n": "7"}]),
    "a zero with a sign among texts": ("a.csv", '"n"\n-0.0\n"x"\n', {}, [{"n": "-0.0"}, {"n": '"x"'}]),
    "quotes where they are needed": ("a.csv", 'n,m\n300,x\n"1,000",y\n', {}, [
        {"n": "300", "m": "x"}, {"n": "1,000", "m": "y"}]),
    "null and an empty text": ("a.csv", 'a,b\n,""\n', {}, [{"a": None, "b": ""}]),
    "null and an empty text in one column": ("a.csv", 'a\n\n""\nx\n\n', {}, [
        {"a": None}, {"a": ""}, {"a": "x"}, {"a": None}]),
    "nulls of an only field": ("a.csv", '"n"\n1\n""\n2\n', {}, [{"n": 1}, {"n": None}, {"n": 2}]),
    "JSON in a cell": ("a.csv", 'a,b\n"{""x"": 1.0}",[1]\n', {}, [{"a": '{"x": 1.0}', "b": "[1]"}]),
    "beyond 64 bits": ("a.csv", "n\n18446744073709551616\n-1\n", {}, [{"n": "18446744073709551616"}, {"n": "-1"}]),
    # JSON
    "an object with a list": ("a.json", '{"total": 2, "users": [{"a": 1}, {"a": 2}], "tags": ["x"]}', {},
        [{"a": 1}, {"a": 2}]),
    "GeoJSON": ("a.json", ('{"type": "FeatureCollection", "crs": {"type": "name"}, "features": [{"type": "Feature", '
                          '"properties": {"n": 1}, "geometry": null}]}'), {}, [
        {"type": "Feature", "properties": '{"n":1}', "geometry": None}]),
    "pandas' table": ("p.json", '{"schema": {"fields": [{"name": "index"}]}, "data": [{"index": 0, "a": 1}]}', {}, [
        {"index": 0, "a": 1}]),
    "CouchDB": ("c.json", '{"total_rows": 1, "offset": 0, "rows": [{"id": "a", "doc": {"n": 1}}]}', {}, [
        {"id": "a", "doc": '{"n":1}'}]),
    "DynamoDB": ("d.json", '{"Items": [{"id": {"S": "1"}}], "Count": 1}', {}, [{"id": '{"S":"1"}'}]),
    "a census": ("c.json", '[["NAME", "B01", "state"],\n["Alabama", "4903185", "01"]]', {}, [
        {"NAME": "Alabama", "B01": "4903185", "state": "01"}]),
    "objects by key": ("a.json", '{"u1": {"a": 1}, "u2": {"a": 2}}', {},
        [{"key": "u1", "a": 1}, {"key": "u2", "a": 2}]),
    "objects with their key": ("a.json", '{"u1": {"key": "u1", "a": 1}}', {}, [{"key": "u1", "a": 1}]),
    "objects with another key": ("a.json", '{"u1": {"key": 1}}', {}, ["line 1", "'key'"]),
    "lists with a header": ("a.json", '[["a", "b"], [1, 2.50]]', {}, [{"a": 1, "b": "2.50"}]),
    "lists without a header": ("a.json", "[[1, 2], [3, 4]]", {}, [NO_HEADER]),
    "lists, told": ("a.json", "[[1, 2], [3]]", {"header": "a,b", "ragged": "pad"},
        [{"a": 1, "b": 2}, {"a": 3, "b": None}]),
    "short lists": ("a.json", '[["a", "b"],\n[1, 2],\n[3]]', {}, ["line 3: 1 field instead of 2", "ragged=pad"]),
    "lines named .json": ("a.json", '{"a": 1}\n{"a": 2}\n', {}, [{"a": 1}, {"a": 2}]),
    "concatenated": ("a.txt", '{"a": 1}{"a":\n2} {"a": [{"b": 1}]}', {}, [{"a": "1"}, {"a": "2"}, {"a": '[{"b":1}]'}]),
    "an array named .ndjson": ("a.ndjson", '[{"a": 1},\n{"a": 2}]', {}, [{"a": 1}, {"a": 2}]),
    "an array named .csv": ("a.csv", ' [ {"a": 1}]', {}, [{"a": 1}]),
    "one line": ("a.ndjson", '{"a": [{"b": 1}]}', {}, [{"a": '[{"b":1}]'}]),
    "one object": ("a.json", '{"a": 1, "b": {"c": 1}}', {}, [{"a": 1, "b": '{"c":1}'}]),
    "lists of anything beside": ("a.json", '{"x": [1, 2.5, "a"], "grid": [[1], [1, 2]], "rows": [{"a": 1}]}', {}, [
        {"a": 1}]),
    "a MongoDB dump": ("a.json", '{"_id": {"$oid": "5f"}, "n": {"$numberLong": "1"}}\n{"_id": {"$oid": "60"}}\n', {}, [
        {"_id_": '{"$oid":"5f"}', "n": '{"$numberLong":"1"}'}, {"_id_": '{"$oid":"60"}', "n": None}]),
    "keys that differ by case": ("a.json", '[{"a": 1, "A": 2}]', {}, [{"a": 1, "A_2": 2}]),
    "several lists": ("db.json", '{"users": [{"a": 1}], "posts": [{"b": 2}]}', {},
        ["users", "posts", "path", "split=true"]),
    "one of several": ("db.json", '{"users": [{"a": 1}], "posts": [{"b": 2}]}', {"path": "/posts"}, [{"b": 2}]),
    "a deep one": ("a.json", '{"a/b": [0, {"~": [{"n": 1}]}]} ', {"path": "/a~1b/1/~0"}, [{"n": 1}]),
    "none at a path": ("a.json", '{"users": [{"a": 1}]}', {"path": "/user"}, ["'/user'"]),
    "lists in an object": ("a.json", '{"index": [0, 1], "data": [[1, 2]]}', {}, ["'data'", "path=/data"]),
    "pandas' split": ("a.json", '{"columns": ["a", "b"], "index": ["x", "y"], "data": [[1, "2"], [3, null]]}', {}, [
        {"a": 1, "b": "2"}, {"a": 3, "b": None}]),
    "pandas' split, told": ("a.json", '{"columns": ["a"], "index": [0], "data": [[1]]}', {"header": "c"}, [{"c": 1}]),
    "pandas' columns": ("a.json", '{"a": {"0": 1, "1": 2}, "b": {"0": "x", "1": null}}', {}, [
        {"a": 1, "b": "x"}, {"a": 2, "b": None}]),
    "one of its columns": ("a.json", '{"0": "x", "1": "y"}', {}, [{"0": "x", "1": "y"}]),
    "values": ("a.json", '["Oslo", null, "2"]', {}, [{"value": "Oslo"}, {"value": None}, {"value": "2"}]),
    "a value, then an object": ("a.json", '[null,\n{"a": 1}]', {}, ["line 2", "a plain value"]),
    "an object, then a value": ("a.json", '[{"a": 1},\n2]', {}, ["line 2", "a JSON object"]),
    "more keys than fields": ("a.json", json.dumps({f"k{n}": [n] for n in range(2000)}), {}, [
        {"key": f"k{n}", "value": f"[{n}]"} for n in range(2000)]),
    "exponents without a header": ("a.csv", "1e+01,2e+02,5e+00\n2e+01,1e+02,3e+00\n5e+00,3e+02,9e+00\n", {}, [
        {"column_1": "1e+01", "column_2": "2e+02", "column_3": "5e+00"},
        {"column_1": "2e+01", "column_2": "1e+02", "column_3": "3e+00"},
        {"column_1": "5e+00", "column_2": "3e+02", "column_3": "9e+00"}]),
    "a report without a header": ("a.txt", "   2.50000e+02   9.9e+01   5.6e+02\n   2.8e+02   9.1e+01   5.5e+02\n", {},
        [{"column_1": "2.50000e+02", "column_2": "9.9e+01", "column_3": "5.6e+02"},
         {"column_1": "2.8e+02", "column_2": "9.1e+01", "column_3": "5.5e+02"}]),
    "digits of numbers": ("a.ndjson", '{"a":12.50,"b":12345678901234567890,"c":1}\n{"c":"x"}', {}, [
        {"a": "12.50", "b": "12345678901234567890", "c": "1"}, {"a": None, "b": None, "c": '"x"'}]),
    "exponents, as they are written": ("a.ndjson", '{"a":-0.0,"b":1}\n{"a":1e+16,"b":1.5E-7}\n{"a":1e999}', {}, [
        {"a": "-0.0", "b": "1"}, {"a": "1e+16", "b": "1.5E-7"}, {"a": "1e999", "b": None}]),
    "a list in which one is no object": ("a.json", '{"users": [{"a": 1},\n2]}', {}, ["line 2", "object"]),
}


@pytest.mark.parametrize("case", CORPUS)
def test_files_as_they_are_in_the_world_go_in_or_say_how(case: str) -> None:
    """As spreadsheets, statistics programs, databases and offices write them."""
    name, content, options, expected = CORPUS[case]
    content = content.encode() if isinstance(content, str) else content
    if isinstance(expected[0], str):
        with pytest.raises(taskapi.JobFailed) as caught:
            read(name, content, **options)
        assert all(word in str(caught.value) for word in expected), caught.value
        return
    kinds, rows = read(name, content, **options)
    assert [dict(zip(kinds, row, strict=True)) for row in rows] == expected


FIRST_LINES = {
    "a record": [  # which nobody could take for names
        "3,-178,59\n17,303,-241\n159,-54,2\n2,-190,60\n", "315.58\n316.39\n315.01\n",
        "2091294\n100005\n99550568\n",
        "0.016449437,0.011889929\n0.04,0.03\n", "5.1,3.5,1.4,0.2,0\n4.9,3.0,1.3,0.2,0\n6,3,2,1,1\n",
        '"7","Ann"\n"8","Bob"\n"9","Ann"\n', "1700   5\n1701  11\n1702  16\n",
        "x,1,2024-01-01T10:00:00Z\ny,5,2024-01-02T10:00:00Z\n", '[["a", 2.5], ["b", 1.5], ["a", 3.5]]'],
    "names": [  # numbers though they are: years, sizes, quantiles, positions, samples
        "country,2019,2020\nFR,1,9000\nDE,5000,3\n", "country,2021,2020\nFR,1,9000\nFR,5000,3\n",
        "unit,2020,2018,2019\nkg,1,9000,2\nm,5000,3,3000\n", "date,0.5,0.1,0.9\n2024-01-01,1,0,2\n",
        "region,0.5,0.1,0.9\nN,1,0,2\nS,0,1,0\n", "id,7,3,5\n1,7,3,5\n2,8,1,9\n",
        "country,2024-01-31,2024-02-29\nFR,1,2\nFR,3,4\n", '"5","3","4"\n7,1,9\n2,8,1\n',
        '"","142.24","144.78"\n"9.4",150,140\n"9.5",1,160\n', ",2020,2019\nFR,1,9000\nDE,3000,3\n",
        "150,4,setosa,virginica\n5.1,3.5,1.4,0.2\n160,5,1,2\n", "sample,400.1234,401.2345\na,1,2\nb,900,1\n",
        "Ann,Paris\nBob,Rome\nAnn,Rome\n", "2019,label\n1,x\n2,y\n",
        "gene,94846,12345,55555\nX,100,90000,3\nY,99999,5,70000\n",
        "stop,09:00,10:00\nA,08:55,10:05\nB,09:10,10:00\n",
        "x,.03\n1.2,.28\n1.4,.02\nx,.1\n1.1,.7\n", '[["a", "2019"], ["b", 1.5], ["a", 3000]]'],
    "either": [
        "1,2\n3,4\n", "1,2,3\n2,3,5\n3,0,4\n4,9,1\n", "2019,2020\n1,9000\n5000,3\n", "0\n1\n0\n2\n",
        "2021,2020,2019\n1,9000,2\n5000,3,3000\n", "7,7\n", "0.5,0.1,0.9\n1,0,2\n0,1,0\n",
        "2020,2018,2019\n1,9000,2\n5000,3,3000\n", "10,20,30\n11,5,80\n2,90,7\n", ",,\n1,2,3\n"],
}


@pytest.mark.parametrize(("means", "text"), [(means, text) for means, texts in FIRST_LINES.items() for text in texts])
def test_a_first_line_is_a_record_only_beyond_doubt(means: str, text: str) -> None:
    """A header is never taken for a record; what may be either is refused with the part that decides."""
    name = "a.json" if text[0] == "[" else "a.csv"
    reader = taskapi.RecordReader(name)
    if means == "either":
        with pytest.raises(taskapi.JobFailed, match=NO_HEADER):
            read(name, text.encode())
        return
    count = sum(batch.length for batch in reader.read(io.BytesIO(text.encode())))
    lines = len(json.loads(text)) if text[0] == "[" else text.count("\n")
    assert (reader.names[""].headless, count) == (means == "a record", lines - (means == "names"))


def test_names_that_are_numbers_are_not_taken_for_a_record():
    """Whatever numbers stand below them: years, positions, sizes and quantiles, with labels before them or without."""
    draw = random.Random(1)
    for _ in range(1000):
        count, year = draw.randint(1, 9), draw.randint(1950, 2020)
        names = draw.choice([
            [year + n for n in range(count)], [year - n for n in range(count)], [*range(count)], [*range(1, count + 1)],
            draw.sample(range(year, year + count), count), [round((n + 1) / (count + 1), 3) for n in range(count)],
            [round(1 - n / 10, 1) for n in range(1, count + 1)], [10 * n for n in range(1, count + 1)],
            sorted(draw.sample(range(1900, 2030), count)), sorted(range(1, count + 1), key=str),
            [n - count // 2 for n in range(count)]])
        value = draw.choice([lambda: draw.randint(0, 1), lambda: draw.randint(1, 5), lambda: round(draw.gauss(0, 1), 4),
                             lambda: round(draw.random(), 3), lambda: draw.randint(0, 5000)])
        label, labels = draw.choice([([], [[]]), (["country"], [["FR"], ["DE"]]), (["id"], [["1"], ["2"], ["3"]]), (
            ["date"], [["2024-01-01"], ["2024-01-02"]]), (["unit", "of"], [["kg", "a"], ["m", "b"]]), ([""], [["a"]])])
        rows = [[*draw.choice(labels), *(str(value()) for _ in names)] for _ in range(draw.choice([3, 10, 50]))]
        lines = "\n".join(",".join(row) for row in [[*label, *map(str, names)], *rows])
        reader = taskapi.RecordReader("a.csv", taskapi.IngestOptions(delimiter=","), "utf-8")
        with suppress(taskapi.JobFailed):
            next(reader.read(io.BytesIO(lines.encode())))
        assert not reader.names[""].headless, lines[:300]


@pytest.mark.parametrize("large", [False, True])
def test_the_lists_in_a_json_file_become_record_types(app, large):
    """With split=true; named like them, however long they are, and what is no list of objects is left out."""
    users = [{"id": n, "name": "x" * 50} for n in range(20_000 if large else 2)]
    body = json.dumps({"profile": {"name": "x"}, "Users": users, "user posts": [{"_id": 1}], "tags": ["a"], "no": [],
                       "bare": [{}]})
    job = upload(app, "db.json", body.encode(), split="true")
    assert (job["error"], job["result"]["records"]) == (None, len(users) + 2)
    assert job["result"]["recordTypes"] == {"users": len(users), "user_posts": 1, "bare": 1}
    assert app.get(f"/records/bare?jobId={job['jobId']}").json["items"] == [{}]
    assert job["result"]["renamed"] == {"user posts._id": "_id_"}
    first, *_ = json.loads(export(app, "users", "json", filters={"recordType": "users", "jobId": job["jobId"]}))
    assert first == users[0]
    refused_ = app.post("/upload", [("recordType", "x"), ("split", "true")], upload_files=[("file", "a.json", b"{}")],
                        status=400).json
    assert refused_["fields"][0]["field"] == "split"


def test_the_result_of_an_ingest_says_what_was_changed(app):
    """The names that were, by position where two were equal, and an encoding that nobody told."""
    job = upload(app, "a.csv", b" a,a,,_id\n1,2,3,caf\xe9\n", recordType="changed")
    assert job["result"]["renamed"] == {" a": "a", "a": "a_2", "": "column_3", "_id": "_id_"}
    assert job["result"]["encoding"] == "windows-1252"
    job = upload(app, "a.csv", b"a,a\n1,2\n", recordType="changed_1")
    assert job["result"]["renamed"] == {"2": "a_2"}
    plain_ = upload(app, "a.csv", b"a,b,\n1,caf\xe9,\n", encoding="latin-1", recordType="changed_2")["result"]
    assert not plain_.keys() & {"encoding", "renamed", "header"}


def test_a_file_without_a_header_says_so(app):
    """In the result of the job, and in what /infer answers, which goes to /generate as it is."""
    body = b"7,Ann,2024-01-31\n8,Bob,2024-02-01\n"
    job = upload(app, "a.csv", body, recordType="bare")
    assert (job["result"]["header"], job["result"]["records"], "renamed" in job["result"]) == ("none", 2, False)
    assert app.get(f"/records/bare?jobId={job['jobId']}").json["items"] == [
        {"column_1": 7, "column_2": "Ann", "column_3": "2024-01-31"},
        {"column_1": 8, "column_2": "Bob", "column_3": "2024-02-01"}]
    assert "header" not in upload(app, "a.csv", body, recordType="bare", header="none")["result"]
    inferred = app.post("/infer", upload_files=[("file", "a.csv", body)]).json
    assert ("header=none" in inferred["notes"][0], [*inferred["schema"]]) == (
        True, ["column_1", "column_2", "column_3"])
    app.post_json("/generate", inferred, status=202)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "list.json", "keyed.json"])
def test_a_large_file_is_read_in_bounded_memory(name):
    """Batch by batch, also where the records are in an object that is longer than any record may be."""
    records = ({"id": n, "text": "x" * 40} for n in range(60_000))
    texts = {"a.csv": lambda: "id,text\n" + "".join(f"{n},{'x' * 40}\n" for n in range(60_000)),
             "a.json": lambda: "\n".join(map(json.dumps, records)),
             "list.json": lambda: json.dumps({"n": 1, "list": [*records]}),
             "keyed.json": lambda: json.dumps({f"k{record['id']}": record for record in records})}
    reader = taskapi.RecordReader(name)
    lengths = [batch.length for batch in reader.read(io.BytesIO(texts[name]().encode()))]
    assert (sum(lengths), max(lengths) <= 32_768) == (60_000, True)


HOSTILE_FILES: dict[str, list[tuple[bytes, bytes, int]]] = {  # what it begins with, what follows, and how often
    "a.json": [(b"", b"[", 10**6), (b"", b"{", 10**6), (b"", b'{"a":', 10**6), (b'[{"a": "', b"x", 10**7),
               (b"", b" ", 10**7), (b'{"a":[', b'{"b":1},', 10**6), (b'[{"a": [', b"1,", 5 * 10**6),
               (b"", b'{"a":1}', 10**6), (b'[{"a":' + b"[" * 700 + b"]" * 700 + b"}", b"]", 1)],
    "a.csv": [(b'a,b\n1,"', b'x,""\n', 10**6), (b"a,b\n", b'"1,x\n', 10**6), (b"", b'"', 10**7), (b"", b",", 10**7),
              (b"", b"\n", 10**7), (b"", b"a\n", 10**6), (b"", b"a", 10**7)]}


@pytest.mark.parametrize(("name", "number"), [(name, number) for name, files in HOSTILE_FILES.items()
                                              for number in range(len(files))])
def test_what_is_looked_at_of_a_bad_file_is_bounded(name: str, number: int) -> None:
    """A schema or a refusal, from the first megabytes: a counting stream is the referee, not the clock."""
    begin, more, times = HOSTILE_FILES[name][number]
    stream = io.BytesIO(begin + more * times)
    with suppress(BadRequest):
        taskapi.GenerateRequest.model_validate(taskapi.infer(stream, name, taskapi.IngestOptions()))
    assert stream.tell() < 2**24


@pytest.mark.parametrize(("column", "field"), [
    ("age\n41\n45", {"type": "int", "min": 41, "max": 45}),
    ("id\n1\n2\n3", {"type": "sequence", "start": 1, "step": 1}),
    ("userId\n1\n2", {"type": "sequence", "start": 1, "step": 1}), ("paid\n1\n2", {"type": "int", "min": 1, "max": 2}),
    ("id\n5\n6\n7", {"type": "int", "min": 5, "max": 7}),
    ("n\n" + "\n".join(map(str, range(5, 45, 2))), {"type": "sequence", "start": 5, "step": 2}),
    ("plan\n" + "free\npro\n" * 2, {"type": "choice", "values": {"free": 2, "pro": 2}}),
    ("size\n" + "10\n20\n50\n" * 7, {"type": "choice", "values": [10, 20, 50]}),
    ("stars\n" + "1\n2\n3\n" * 7, {"type": "int", "min": 1, "max": 3}),
    ("Postcode\n01234\n90210", {"type": "pattern", "pattern": "#####", "unique": True}),
    ("zip\n11234\n90210", {"type": "pattern", "pattern": "#####", "unique": True}),
    ("phone\n030123456\n030123457", {"type": "pattern", "pattern": "#########", "unique": True}),
    ("x\n1\n1.5e+18", {"type": "float", "min": 1.0, "max": 1.5e18}),
    ("amount\n11234\n90210", {"type": "int", "min": 11234, "max": 90210}), ("city\nOslo", "city"),
    ("mail\n1@x.org\n2@x.org", {"type": "email", "unique": True}),
    ("on\n2026-01-28\n2026-01-01", {"type": "date", "from": "2026-01-01", "to": "2026-01-28"}),
    ("sum\n1.50\n199.50", {"type": "decimal", "min": "1.50", "max": "199.50", "places": 2})])
def test_a_column_is_inferred_by_its_name_and_its_values(column: str, field: Any) -> None:
    """Few numbers in a row are no sequence, few values that come again are a choice, and some digits are no number."""
    inferred = taskapi.infer(io.BytesIO(column.encode()), "a.csv", taskapi.IngestOptions())
    assert [*inferred["schema"].values()] == [field]


def test_a_file_of_several_lists_is_inferred_as_related_types() -> None:
    """What /generate takes as `records`."""
    content = b'{"users": [{"id": 1}, {"id": 2}], "posts": [{"n": 5}, {"n": 7}]}'
    inferred = taskapi.infer(io.BytesIO(content), "db.json", taskapi.IngestOptions(split=True))
    assert {name: spec["count"] for name, spec in inferred["records"].items()} == {"users": 2, "posts": 2}
    taskapi.GenerateRequest.model_validate(inferred)


@pytest.mark.parametrize(("text", "kind"), [
    ("1\n-5\n", "int"), ("9223372036854775807", "int"), ("9223372036854775808", "decimal"),
    ("9" * 401, "text"), ("-0", "text"),
    ("01234", "text"),
    ("+1", "text"), ("1e5\n1e-04\n-2", "decimal"), ("1e-05", "float"), ("1e", "text"), ("1e998", "text"),
    ("1_000", "text"), ("٣", "text"), ("1\nx", "text"), ("1.5", "float"),
    ("12.50", "decimal"), ("1\n2.5", "decimal"), ("-0.0", "decimal"), ("0.1234567890123456789", "decimal"),
    ("true\nfalse", "bool"), ("True", "text"), ("2024-02-29", "date"), ("2023-02-29", "text"),
    ("2026-01-01T10:00:00Z", "datetime"), ("2026-01-01 10:00", "datetime"), ('"5"', "text"), ('"[1,2]"', "text"),
    ("[1\n", "text"), ("nan", "text"), ("inf", "text")])
def test_a_column_has_the_narrowest_kind_that_keeps_its_text(text, kind):
    """One case a line; whatever kind is found, no text is changed by it."""
    assert read("a.csv", f"x\n{text}".encode())[0] == {"x": kind}


@pytest.mark.parametrize(("name", "data", "error"), [
    ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', "line 3: the quote that opens field 1 is never closed"),
    ("a.csv", b'a,b\n"1"x,2\n', "line 2: there is text behind the closing quote"),
    ("a.csv", b",".join(b"c%d" % n for n in range(1991)) + b"\n", "line 1: there are more than 1990 fields"),
    ("a.csv", b"x" * 256 + b"\n1\n", "line 1: the name of a field is longer than 255 characters"),
    ("a.csv", b"", "line 1: there is no header"),
    ("a.csv", b"a\nx\n\xff\x81\n", "line 3: byte 5 of the text, 0x81, is not windows-1252"),
    ("a.csv", b"a,b\n1,\0\n", "line 2: there is a NUL"),
    ("a.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-4], "line 3: the gzip data is cut off"),
    ("a.csv.gz", b"\x1f\x8bnonsense", "line 1: the gzip data is broken"),
    ("a.json", b'[{"a": 1},\n2]', "line 2: a record must be a JSON object"),
    ("a.json", b'[{"a": 1}', "line 1: the file ends too early"),
    ("a.json", b"a,b\n1,2\n", "line 1: expected objects one after another"),
    ("a.json", b'[{"a": 1}]\n1', "line 2: there is text behind the records"),
    ("a.ndjson", b'{"a": 1}\n{"a": }\n', "line 2: Expecting value"), ("a.json", b'[{"a": NaN}]', "line 1: NaN"),
    ("a.ndjson", b'{"a": "\\u0000"}', "line 1: a text has a NUL"),
    ("a.ndjson", b'{"a": "\\ud800"}', "line 1: a text has"),
    ("a.ndjson", b'{"a": 1, "a": 2}', "line 1: an object has a key twice"),
    ("a.json", b'[{"a": ' + b"[" * 100_000, "line 1: the record is nested too deeply")])
def test_a_bad_file_is_refused_with_line_and_reason(name, data, error):
    """Whatever is wrong, the message begins with the line."""
    with pytest.raises(taskapi.JobFailed) as caught:
        read(name, data)
    assert str(caught.value).startswith(error)


def test_a_gzip_bomb_is_stopped_by_its_ratio(monkeypatch):
    """A hundred bytes out for each one in, beyond a free amount."""
    monkeypatch.setattr(taskapi, "_UNPACKED_FREE", 2**20)
    bomb = gzip.compress(b"a,b\n" + b"1,2\n" * 2_000_000)
    with pytest.raises(taskapi.JobFailed, match="unpacks to too much"):
        for _ in taskapi.RecordReader("a.csv.gz").read(io.BytesIO(bomb)):
            pass


def test_an_upload_that_fails_leaves_no_record_and_no_file(service: taskapi.Service) -> None:
    """The file of a bad upload is gone with its job's failure, so that it cannot be retried; no record is stored."""
    app = webtest.TestApp(service.app)
    job = upload(app, "a.csv", b"a,b\n1,2\n" * 30_000 + b"3\n", recordType="bad")
    assert (job["status"], job["error"][:5], "download" in job["links"]) == ("failed", "line ", False)
    assert [*(service.folder.root / "uploads").iterdir()] == []
    assert plain(service.folder.root, "SELECT count(*) FROM _id_ranges") == [0]
    assert "upload it again" in app.post(f"/jobs/{job['jobId']}/retry", status=409).json["error"]
    assert app.get(job["links"]["self"]).json == job


def test_an_ingest_goes_on_where_an_older_version_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped inside its fourth chunk, with the checkpoint that such a version leaves: each row once."""
    content = b"n,t\n" + b"".join(b"%d,some text %d\n" % (n, n) for n in range(60_000))
    append, calls = taskapi.RecordStore.append, []

    def stopping(*args: Any, **named: Any) -> None:
        calls.append(append(*args, **named))
        if len(calls) == 4:
            service.queue.halt()

    with held(tmp_path) as (service, runner), monkeypatch.context() as patch:
        patch.setattr(taskapi.RecordStore, "append", stopping)
        upload(webtest.TestApp(service.app), "a.csv", content, recordType="t")
        runner.run()
        assert statuses(service) == ["pending"]
    with closing(sqlite3.connect(tmp_path / "taskapi.db")) as db, db:
        state = {"kinds": {"n": "int", "t": "text"}, "total": 60_000, "done": 1}
        assert db.execute("UPDATE _progress SET checkpoint = ? WHERE done < 60000", (json.dumps(state),)).rowcount == 1
    with held(tmp_path) as (service, runner):
        runner.run()
        assert statuses(service) == ["completed"]
    assert plain(tmp_path, "SELECT count(*), count(DISTINCT n), sum(n) FROM t") == [(60_000, 60_000, 1_799_970_000)]


def test_the_sqlite_export_is_a_compact_database_of_the_selected_records(app, tmp_path):
    """Plain sqlite3 opens it: strict tables with the fields alone, in order, no free page."""
    upload(app, "a.csv", b"n,t\n" + b"".join(b"%d,x%d\n" % (n, n) for n in range(3000)), recordType="copied")
    (tmp_path / "a.db").write_bytes(export(app, "copied", "sqlite", orderBy="-n", limit=2000))
    with closing(sqlite3.connect(tmp_path / "a.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA freelist_count").fetchone() == (0,)
        assert db.execute("SELECT sql FROM sqlite_master").fetchall() == [
            ('CREATE TABLE "copied"("n" INTEGER, "t" TEXT) STRICT',)]
        assert db.execute("SELECT n FROM copied").fetchall() == [(n,) for n in range(2999, 999, -1)]
    assert gzip.decompress(export(app, "copied", "sqlite", gzip=True))[:15] == b"SQLite format 3"


def test_an_export_with_more_fields_than_a_function_has_arguments_is_whole(app):
    """250 fields: the line is made of pieces."""
    record = {f"f{n}%s": f'"{n}%' if n % 3 else None for n in range(250)}
    upload(app, "a.json", json.dumps([record]).encode(), recordType="wide")
    assert json.loads(export(app, "wide", "json")) == [record]
    header, row = csv.reader(io.StringIO(export(app, "wide", "csv").decode(), newline=""))
    assert dict(zip(header, (cell or None for cell in row), strict=True)) == record


def test_a_recipe_is_checked_against_its_own_now(service: taskapi.Service) -> None:
    """To the second, before a job exists; an instant that is none, and an empty schema, are refused."""
    schema = {"at": {"type": "datetime", "from": "2026-01-01T12:00:00Z", "to": "now"}}
    body = {"recordType": "thing", "count": 3, "schema": schema}
    assert service.enqueue("generate", {**body, "now": "2026-01-01T23:00:00Z"}).status == "completed"
    for wrong in ({"now": "2026-01-01T11:00:00Z"}, {"now": "2026-01-01Tgarbage"}, {"schema": {}}):
        with pytest.raises(BadRequest):
            service.enqueue("generate", {**body, **wrong})
    with pytest.raises(BadRequest, match="did you mean 'generate'"):
        service.enqueue("genrate", {})


LONG = {"type": "choice", "values": ["x" * 64_000 + str(n) for n in range(15)]}
LARGE = {"recordType": "large", "seed": 1, "schema": {"c": LONG, **{
    f"f{n}": {"type": "template", "template": "{c}"} for n in range(15)}}}


def test_large_records_take_bounded_memory(tmp_path: Path) -> None:
    """16 fields of 64,000 characters each: a job saves them by bytes, a preview is refused; under 300 MB."""
    with Live(tmp_path / "data") as live:
        refused(live.ask("POST", "/preview", {**LARGE, "count": 100}), 400, "16 MiB")
        assert live.ask("POST", "/preview", {**LARGE, "count": 5}).status == 200
        job_id = live.make("/generate", {**LARGE, "count": 300})
        until(lambda: live.job(job_id, 30)["result"])
        assert peak(live) < 300


def test_a_job_saves_large_records_sooner_and_refuses_a_family_that_is_too_large(
        service: taskapi.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 4 MiB; and what one record brings along is kept whole, so that has a bound."""
    saves: list[int] = []
    save = taskapi.JobContext.save
    monkeypatch.setattr(taskapi.JobContext, "save", lambda self, progress, *rest: (
        saves.append(progress.done), save(self, progress, *rest)))
    assert service.enqueue("generate", {**LARGE, "count": 10}).status == "completed"
    assert saves[:2] == [5, 10]
    schema = {"c": {"type": "ref", "field": "large.c"}, "d": {"type": "template", "template": "{c|upper}"}}
    job = service.enqueue("generate", {"records": {
        "large": {"count": 1, "schema": {"c": LONG}}, "child": {"per": "large", "count": 1000, "schema": schema}}})
    assert job.status == "failed"
    assert "32 MiB" in job.error


def test_a_generate_request_knows_how_many_records_it_makes() -> None:
    """The queue lets small jobs pass."""
    assert taskapi.GenerateRequest.model_validate(PERSONS).weight == 10
    shop = taskapi.GenerateRequest.model_validate({"recordType": "shop", "count": 100})
    assert shop.weight == 100 + 300 + 900


def test_a_job_remembers_the_versions_it_was_made_with(service: taskapi.Service) -> None:
    """Those that its values depend on."""
    job = service.enqueue("generate", PERSONS)
    assert job.result["versions"] == {"taskapi": taskapi.__version__, "faker": faker.VERSION}


SHOP_DDL = """
CREATE TABLE country (code TEXT PRIMARY KEY CHECK (length(code) = 2), name TEXT NOT NULL UNIQUE) WITHOUT ROWID;
CREATE TABLE customer (
  id INTEGER PRIMARY KEY, email VARCHAR(60) NOT NULL UNIQUE, "full name" TEXT NOT NULL, -- CHECK (not this)
  country TEXT REFERENCES country(code), status TEXT NOT NULL DEFAULT 'new' CHECK (status IN ('new', 'it''s gone')),
  score REAL CHECK (score >= 0 AND score < 10), created_at TEXT DEFAULT CURRENT_TIMESTAMP);
CREATE TABLE employee (
  id INTEGER PRIMARY KEY, manager_id INTEGER REFERENCES employee(id), age INT NOT NULL CHECK (age BETWEEN 18 AND 65));
CREATE TABLE product (
  sku TEXT PRIMARY KEY, price NUMERIC(10,2) NOT NULL CHECK (price > 0), odd INT CHECK (odd % 2 = 1 OR odd IS NOT 2),
  tax REAL GENERATED ALWAYS AS (price * 0.2) STORED, title TEXT, currency TEXT DEFAULT 'EUR');
CREATE TABLE "order" (
  id INTEGER PRIMARY KEY AUTOINCREMENT, customer_id INTEGER NOT NULL REFERENCES customer,
  seller_id INTEGER REFERENCES employee, checker_id INTEGER REFERENCES employee(id), placed DATE NOT NULL);
CREATE TABLE order_line (
  order_id INTEGER NOT NULL REFERENCES "order"(id), line_no INTEGER NOT NULL, sku TEXT NOT NULL REFERENCES product(sku),
  qty INTEGER NOT NULL CHECK (qty > 0), PRIMARY KEY (order_id, line_no));
CREATE TABLE shipment (order_id INTEGER NOT NULL, line_no INTEGER NOT NULL, at DATETIME,
  FOREIGN KEY (order_id, line_no) REFERENCES order_line(order_id, line_no));
CREATE TABLE tag (id INTEGER PRIMARY KEY, label TEXT NOT NULL);
CREATE TABLE product_tag (
  sku TEXT NOT NULL REFERENCES product, tag_id INTEGER NOT NULL REFERENCES tag(id), PRIMARY KEY (sku, tag_id));
CREATE TABLE profile (user_id INTEGER PRIMARY KEY REFERENCES customer(id), bio TEXT);
CREATE TABLE chicken (id INTEGER PRIMARY KEY, egg_id INTEGER REFERENCES egg(id));
CREATE TABLE egg (id INTEGER PRIMARY KEY, chicken_id INTEGER NOT NULL REFERENCES chicken(id));
"""


def inferred(data: bytes, filename: str) -> Any:
    """What /infer answers in this process."""
    with tempfile.NamedTemporaryFile(suffix=filename) as file:
        file.write(data)
        file.flush()
        with open(file.name, "rb") as stream:
            return taskapi.infer(stream, filename, taskapi.IngestOptions.model_validate({}))


def asked(path: Path, sql: str) -> list[Any]:
    """Rows of a database."""
    with closing(sqlite3.connect(path)) as database:
        return database.execute(sql).fetchall()


def test_records_of_an_inferred_script_fit_into_its_tables(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """Keys, pairs, trees, CHECKs and what is NOT NULL hold; twice over, since the filled database is inferred again."""
    answer = inferred(SHOP_DDL.encode() + b"CREATE VIEW v AS SELECT 1; INSERT INTO tag VALUES (1, 'x');", "shop.sql")
    assert {*answer["notes"]} == {
        "the view v is left out", "1 statements are no CREATE, and were not run",
        "product.tax is generated, and left out", "product: CHECK (odd % 2 = 1 OR odd IS NOT 2) is not understood",
        "chicken.egg_id is null: egg refers to it in turn"}
    records = answer["records"]
    assert records["order"]["per"] == "customer"
    assert records["customer"]["schema"]["status"] == {"type": "choice", "values": ["new", "it's gone"]}
    assert records["employee"]["schema"]["manager_id"]["field"] == "employee.id"
    for number in range(2):
        path = tmp_path / f"{number}.db"
        with closing(sqlite3.connect(path)) as database:
            database.executescript(SHOP_DDL)
        (tmp_path / "shop.json").write_text(json.dumps(answer))
        assert run("generate", "--schema", "shop.json", "--seed", "5", "--into", str(path)).code == 0
        assert asked(path, "PRAGMA foreign_key_check") == []
        counts = {name: asked(path, f'SELECT count(*) FROM "{name}"')[0][0] for name in records}
        assert min(counts.values()) >= 10
        assert asked(path, "SELECT count(*) FROM employee WHERE manager_id >= id") == [(0,)]
        assert asked(path, "SELECT manager_id FROM employee WHERE id = 1") == [(None,)]
        assert asked(path, "SELECT count(*) FROM 'order' WHERE seller_id <> checker_id")[0][0] > 0
        again = inferred(path.read_bytes(), "shop.db")
        told = {name: spec for name, spec in again["records"].items() if "per" not in spec}
        assert {name: spec["count"] for name, spec in told.items()} == {name: counts[name] for name in told}
        assert {"customer", "order", "employee"} <= told.keys()
        answer = again
    refused = run("generate", "--schema", "shop.json", "--seed", "5", "--into", str(path))
    assert "UNIQUE constraint failed" in refused.err
    assert counts == {name: asked(path, f'SELECT count(*) FROM "{name}"')[0][0] for name in records}, "all or nothing"


def test_tables_whose_names_are_spelled_alike_get_their_own_records(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """Those that SQLite keeps for itself are no tables."""
    path = tmp_path / "x.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript("""
            CREATE TABLE counted (id INTEGER PRIMARY KEY AUTOINCREMENT); CREATE TABLE jobs (a TEXT);
            CREATE TABLE "a b" (b TEXT); CREATE TABLE a_b (c TEXT); CREATE TABLE record (d TEXT);""")
    (tmp_path / "x.json").write_text(json.dumps(inferred(path.read_bytes(), "x.db")))
    assert run("generate", "--schema", "x.json", "--into", str(path)).code == 0
    for table in ("counted", "jobs", "a b", "a_b", "record"):
        assert asked(path, f'SELECT count(*) FROM "{table}"') == [(10,)]


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("ATTACH '{path}' AS x; CREATE TABLE x.t (a)", "unknown database"),
        ("ATTACH '{path}' AS x; VACUUM INTO '{path}'; PRAGMA writable_schema = 1; DROP TABLE t", "no tables"),
        ("CREATE TABLE t AS WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT n FROM c",
         "not authorized"),
        ("CREATE TABLE t AS SELECT load_extension('{path}')", "not authorized"),
        ("CREATE VIRTUAL TABLE f USING fts5(a)", "no tables"),
        ("CREATE TABLE t (" + "a," * 3000 + "b)", "duplicate|too many"),
        ("".join(f"CREATE TABLE t{number} (a);" for number in range(2000)), "more than 1000"),
        ("CREATE TABLE t (a CHECK (" + "(" * 3000 + "a" + ")" * 3000 + "))", "overflow|depth"),
        ("/*" * 200_000, "no tables"), ("'" * 200_001, "no tables"),
        ("CREATE TABLE t (a" + " " * 2**20 + ")", "characters"),
        ("CREATE TABLE t (a); CREATE TABLE t (a)", "already exists"), ("SELECT 1", "no tables"), ("", "no tables"),
    ],
    ids=range(14),
)  # fmt: skip
def test_a_hostile_script_does_nothing(script: str, told: str, tmp_path: Path) -> None:
    """Only CREATE TABLE and CREATE INDEX are run, in memory, and may read nothing."""
    with pytest.raises(BadRequest, match=told):
        inferred(script.replace("{path}", str(tmp_path / "made")).encode(), "x.sql")
    assert [*tmp_path.iterdir()] == []


def test_what_a_script_may_hold_is_left_out_by_name(tmp_path: Path) -> None:
    """Triggers, views and functions stand in it, and are never run."""
    endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT n FROM c"
    made = inferred(f"""
        CREATE TABLE t (a INT DEFAULT (load_extension('{tmp_path}/x')), "b;" TEXT CHECK ("b;" <> ';')); -- ;
        CREATE TRIGGER r AFTER INSERT ON t BEGIN DELETE FROM t; END;
        CREATE VIEW IF NOT EXISTS v AS {endless};
        INSERT INTO t {endless};""".encode(), "x.sql")
    assert made["records"]["t"]["schema"].keys() == {"a", "b;"}
    assert {"the trigger r is left out", "the view v is left out"} <= {*made["notes"]}


@pytest.mark.parametrize(
    ("check", "field"),
    [("= 3", {"minLength": 3, "maxLength": 3}), ("> 3", {"minLength": 4}), ("<= 3", {"minLength": 1, "maxLength": 3}),
     ("< 3", {"minLength": 1, "maxLength": 2}), ("BETWEEN 2 AND 3", {"minLength": 2, "maxLength": 3})])
def test_a_check_of_a_length_is_kept(check: str, field: Any) -> None:
    """As bounds of the text."""
    made = inferred(f"CREATE TABLE t (a TEXT CHECK (length(a) {check}))".encode(), "x.sql")
    assert made == {"records": {"t": {"count": 10, "schema": {"a": {"type": "phrase", **field}}}}}


@pytest.mark.parametrize("operator", ["<>", "!="])
def test_a_length_that_is_excluded_is_not_understood(operator: str) -> None:
    """Rather than taken for the length that a text has to have, or for the longest."""
    made = inferred(f"CREATE TABLE t (a TEXT CHECK (length(a) {operator} 5))".encode(), "x.sql")
    assert made["records"]["t"]["schema"] == {"a": "word"}
    assert made["notes"] == [f"t: CHECK (length ( a ) {operator} 5) is not understood"]


@pytest.mark.parametrize(
    ("script", "schema", "note"),
    [
        ("CREATE TABLE t (a INT, b INT AS (a) STORED REFERENCES t(a))", {"a"}, "the foreign key b is not understood"),
        ("CREATE TABLE t (a TEXT, b TEXT AS (lower(a)) UNIQUE)", {"a"}, "autoindex_t_1 is not understood"),
        ("CREATE TABLE t (a INT UNIQUE REFERENCES t(a))", {"a"}, "that a are unique is not understood"),
        ("CREATE TABLE t (d TEXT CHECK (d > '2020-01-01'), n INT)", {"d", "n"}, "t.d: its CHECK is not understood"),
    ],
    ids=["a generated key", "a generated column", "a tree of one branch", "texts compared"],
)  # fmt: skip
def test_what_a_table_asks_for_and_is_not_made_is_noted(script: str, schema: set[str], note: str) -> None:
    """The rest of it is made."""
    made = inferred(script.encode(), "x.sql")
    assert made["records"]["t"]["schema"].keys() == schema
    assert any(note in told for told in made["notes"]), made["notes"]


@pytest.mark.parametrize(("check", "start"), [("a > 100", 101), ("a < 0", -10001), ("a >= -5", 1), ("a <> 5", 1)])
def test_a_key_of_numbers_begins_where_its_check_admits_it(check: str, start: int) -> None:
    """At 1, where that is one."""
    made = inferred(f"CREATE TABLE t (a INT PRIMARY KEY CHECK ({check}))".encode(), "x.sql")
    assert made["records"]["t"]["schema"]["a"] == {"type": "sequence", "start": start}


def test_a_unique_column_may_have_nulls_and_any_numbers(tmp_path: Path) -> None:
    """A table of real use is inferred, whatever stands in it."""
    with closing(sqlite3.connect(tmp_path / "x.db")) as database:
        database.execute("CREATE TABLE t (a INT UNIQUE, b NUMERIC UNIQUE, c UNIQUE)")
        rows = [(number * 7919 % 1000 + 200 if number else None, number / 4, number if number % 2 else str(number))
                for number in range(30)]
        database.executemany("INSERT INTO t VALUES (?, ?, ?)", rows)
        database.commit()
    made = inferred((tmp_path / "x.db").read_bytes(), "x.db")["records"]["t"]["schema"]
    assert made["a"] == {"type": "sequence", "start": 228}
    assert made["b"] == {"type": "sequence", "start": 1}


def test_a_broken_or_hostile_database_is_refused_or_bounded(tmp_path: Path) -> None:
    """Nothing in it is run; what takes too many steps is given up."""
    with pytest.raises(BadRequest, match="no database"):
        inferred(b"SQLite format 3\0" + Random(1).randbytes(5000), "x.db")
    path = tmp_path / "x.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript("""
            CREATE TABLE "Odd Name" ("Id" INTEGER PRIMARY KEY, big BLOB, word TEXT);
            CREATE VIRTUAL TABLE f USING fts5(a);
            INSERT INTO "Odd Name" VALUES (7, x'00ff', CAST(x'ff' AS TEXT)), (8, NULL, 'b');
            CREATE VIEW v AS WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT n FROM c;""")
    made = inferred(path.read_bytes(), "x.db")
    assert made["records"].keys() == {"odd_name"}
    assert made["records"]["odd_name"]["count"] == 2
    assert "the table f is left out" in made["notes"]


def test_infer_takes_databases_scripts_and_documents_over_http(service: taskapi.Service) -> None:
    """As a part or as the body; what it answers is taken by /generate as it stands."""
    app = webtest.TestApp(service.app)
    made = app.post("/infer", upload_files=[("file", "shop.sql", SHOP_DDL.encode())]).json
    assert app.post_json("/generate", made, status=202).json["request"].get("notes") is None
    assert app.post("/infer?filename=x.sql", SHOP_DDL, content_type="application/sql").json == made
    data = sqlite3.connect(":memory:")
    with closing(data):
        data.execute("CREATE TABLE pet (id INTEGER PRIMARY KEY, name TEXT)")
        raw = app.post("/infer", data.serialize(), content_type="application/vnd.sqlite3").json
    assert raw["records"]["pet"]["schema"]["id"] == {"type": "sequence", "start": 1}
    assert app.post("/upload", upload_files=[("file", "x.sql", b"CREATE TABLE t (a)")], status=400)
    document = {"openapi": "3.1.0", "components": {"schemas": {
        "PetOrder": shaped(pets={"type": "array", "items": {"$ref": "#/components/schemas/Pet"}}),
        "Pet": {**shaped(tag={"$ref": "#/components/schemas/Tag"}, size={"$ref": "#/x~1y%20z/gr%C3%B6ße"}),
                "required": ["tag", "size"]},
        "Tag": {"allOf": [shaped(label={"type": "string"})]}, "Kind": {"enum": ["a"]}, "Bad": shaped(it={"not": {}}),
        "TAG": shaped(other={"type": "string"})}}, "x/y z": {"größe": {"const": 5}}}
    made = app.post("/infer", upload_files=[("file", "api.json", json.dumps(document).encode())]).json
    assert made["records"].keys() == {"pet_order", "pet", "tag", "tag_2"}, "also two names that are spelled alike"
    assert made["notes"] == ["Bad is left out: records.bad.schema#/properties/it/not: not cannot be honoured"]
    pet = app.post_json("/preview", made).json["records"]["pet"][0]
    assert pet["tag"]["label"]
    assert pet["size"] == 5
    one = json.dumps({"$schema": DRAFT_7, **shaped(a={"type": "integer"}), "title": "My Thing"}).encode()
    assert app.post("/infer", upload_files=[("file", "s.json", one)]).json["records"].keys() == {"my_thing"}


def test_a_ref_reads_the_own_type_another_row_or_each_row_once(tmp_path: Path) -> None:
    """A tree, two different friends, and pairs of which no two are equal; whatever is refused says why."""
    tree = {"id": "sequence", "up": {"type": "ref", "field": "node.id"}}
    friend = {"type": "ref", "field": "node.id"}
    person = {"id": "sequence", "a": friend, "b": {**friend, "row": "b"}}
    pair = {"who": {"type": "ref", "field": "person.id"}, "what": {"type": "ref", "field": "node.id", "once": True}}
    request = {"seed": 1, "records": {
        "node": {"count": 30, "schema": tree}, "person": {"count": 40, "schema": person},
        "pair": {"per": "person", "count": [0, 30], "schema": pair}}}
    made = json.loads(taskapi.preview(taskapi.GenerateRequest.model_validate(
        {**request, "now": "2026-01-01"})))["records"]
    assert made["node"][0]["up"] is None
    assert all(1 <= node["up"] < node["id"] for node in made["node"][1:])
    assert 0 < sum(each["a"] != each["b"] for each in made["person"]) <= 40
    pairs = [(each["who"], each["what"]) for each in made["pair"]]
    assert len({*pairs}) == len(pairs) > 300
    more = {**request["records"], "pair": {"per": "person", "count": [0, 31], "schema": pair}}
    assert "fewer than 31" in problems(taskapi.GenerateRequest.model_validate({"records": more}).recipe)[
        "records.pair.schema.what.once"]


# ==== 8 Queue ====


def test_a_job_interrupted_too_often_fails_and_says_so(tmp_path: Path, script: Any) -> None:
    """MAX_ATTEMPTS counts starts; a retry begins anew."""
    for _ in range(2):
        with held(tmp_path, max_attempts=2) as (service, _):
            if not statuses(service):
                service.enqueue("script", {})
            service.queue.jobs.claim()
    with held(tmp_path, max_attempts=2) as (service, runner):
        job = service.queue.jobs.page(None, None, 1, None)[0][0]
        assert (job.status, job.attempt) == ("failed", 2)
        assert "interrupted 2 times" in job.error
        assert job.finished_at
        runner.run()
        assert service.queue.retry(job.job_id).status == "pending"
        runner.run()
        job = service.queue.jobs.get(job.job_id)
        assert (job.status, job.attempt, job.error) == ("completed", 1, None)


def test_late_housekeeping_leaves_a_retried_job_alone(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any) -> None:
    """A failed job's leftovers are listed for deletion; before that happens, it is retried and completes."""
    rows = RowsRequest(columns={"n": "int"}, rows=[[1], [2]])
    with held(tmp_path) as (service, runner):
        queue = service.queue
        queue.enqueue("rows", rows)
        job = queue.jobs.claim().job
        assert len([*run_rows(queue.context(job, None), rows)]) == 1
        queue.jobs.finish(job, taskapi.JobStatus.FAILED, error="left rows behind")
        orphans = queue.records.orphans()
        assert orphans == [job.job_id]
        queue.retry(job.job_id)
        runner.run()
        monkeypatch.setattr(queue.records, "orphans", lambda: orphans)
        service.discard_orphans()
        assert statuses(service) == ["completed"]
        assert plain(tmp_path, "SELECT n FROM thing") == [1, 2]


def test_deleting_a_job_takes_its_file_and_its_records(service: taskapi.Service, url: str) -> None:
    """And nobody else's."""
    jobs = [store(service, {"n": "int"}, [[n]]) for n in range(3)]
    export = ask(url, "POST", "/export", {"format": "csv"}).json
    upload = ask(url, "POST", "/upload", form(), FORM).json
    for job_id in (jobs[1].job_id, export["jobId"], upload["jobId"]):
        assert ask(url, "DELETE", f"/jobs/{job_id}").status == 204
        for method, path in (("GET", "/status/"), ("GET", "/download/"), ("DELETE", "/jobs/")):
            refused(ask(url, method, path + job_id), 404)
    assert [record["n"] for record in ask(url, "GET", "/records/thing").json["items"]] == [0, 2]
    assert plain(service.folder.root, "SELECT n FROM thing") == [0, 2]
    assert not [*(service.folder.root / "exports").iterdir(), *(service.folder.root / "uploads").iterdir()]
    assert_sound(service.folder.root)


@pytest.mark.parametrize("step", [1, 3, 4, 8, 9])
def test_many_records_are_deleted_in_short_steps(
        service: taskapi.Service, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """All of the job's and none of its neighbours', whatever the size of a step."""
    jobs = [store(service, {"n": "int"}, [[start + n] for n in range(8)]) for start in (0, 10, 20)]
    monkeypatch.setattr(taskapi, "_DELETE_STEP", step)
    service.queue.remove(jobs[1].job_id)
    assert plain(service.folder.root, "SELECT n FROM thing") == [*range(8), *range(20, 28)]
    assert plain(service.folder.root, "SELECT job FROM _id_ranges") == [jobs[0].job_id, jobs[2].job_id]


def test_a_long_poll_answers_as_soon_as_the_job_has_finished(tmp_path: Path, script: Any) -> None:
    """Long before its time is over; at once for a finished job; with Retry-After while it is not finished."""
    with held(tmp_path) as (service, runner), service.serving(port=0) as url:
        job_id = service.enqueue("script", {}).job_id
        now = ask(url, "GET", f"/status/{job_id}")
        assert (now.json["status"], now.headers["Retry-After"]) == ("pending", "1")
        answers: list[Answer] = []
        poll = threading.Thread(target=lambda: answers.append(ask(url, "GET", f"/status/{job_id}?wait=30")))
        poll.start()
        until(lambda: service.queue._waiters)
        runner.run()
        until(lambda: answers, 25)
        assert answers[0].json["status"] == "completed"
        assert "Retry-After" not in answers[0].headers
        assert ask(url, "GET", f"/status/{job_id}?wait=30").json == answers[0].json
        assert ask(url, "GET", f"/status/{service.enqueue('script', {}).job_id}?wait=0.2").json["status"] == "pending"


def unprintable() -> Exception:
    """An exception that fails even when it is asked for its text."""
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise SystemExit

    return Unprintable()


def assert_at_work(service: taskapi.Service) -> None:
    """Asserts that the queue is as it should be: the next job is done, nothing is left, health is well."""
    assert service.wait(service.enqueue("generate", PERSONS).job_id, 60).status == "completed"
    assert service.drain(60)
    assert service.health().status == "ok"
    assert "stuck" not in service.health().checks
    service.queue.metrics.text(service.gauges())


@pytest.mark.parametrize(("error", "told"), [
    (ValueError("odd"), "ValueError: odd"), (KeyboardInterrupt(), "KeyboardInterrupt"),
    (SystemExit(3), "SystemExit: 3"), (MemoryError("no room"), "MemoryError: no room"),
    (GeneratorExit(), "GeneratorExit"), (StopIteration(taskapi.JobResult({})), "RuntimeError: generator raised"),
    (taskapi.Interrupted(), "Interrupted"), (taskapi.LeaseLost(), "LeaseLost"), (unprintable(), "Unprintable: (its"),
    (taskapi.JobFailed("as it should"), "as it should"), (taskapi.JobFailed("half \ud800"), "half \\ud800"),
    (BadRequest("x" * 10_000), "xxx")], ids=lambda value: type(value).__name__)
def test_whatever_a_job_raises_fails_that_job_alone(
        tmp_path: Path, script: Any, caplog: pytest.LogCaptureFixture, error: BaseException, told: str) -> None:
    """Its error is the message, with the type of what is no TaskError, whose traceback is logged under the job's id."""
    @script
    def broken(context: taskapi.JobContext) -> taskapi.JobSteps:
        yield from run_rows(context, RowsRequest(columns={"n": "int"}, rows=[[1]]))
        raise error

    with taskapi.open_service(tmp_path, workers=1) as service:
        job = service.wait(service.enqueue("script", {}).job_id, 60)
        assert (job.status, job.error[:len(told)], len(job.error) < 1000) == ("failed", told, True)
        bug = not isinstance(error, TaskError | taskapi.LeaseLost)
        assert bug == any(record.exc_info and job.job_id in record.getMessage() for record in caplog.records)
        until(lambda: plain(tmp_path, "SELECT count(*) FROM thing") == [0])
        assert_at_work(service)


DEEP: list[Any] = []
DEEP.append(DEEP)


@pytest.mark.parametrize("returned", [
    None, {"n": 1}, 7, object(), (yielded for yielded in "no steps"), taskapi.JobResult(None), taskapi.JobResult([1]),
    taskapi.JobResult({"when": datetime(2026, 1, 1)}), taskapi.JobResult({"nan": math.nan}),
    taskapi.JobResult({"deep": DEEP}), taskapi.JobResult({"half": "\ud800"}), taskapi.JobResult({"huge": "x" * 2**20}),
    taskapi.JobResult({}, "file.csv")], ids=lambda returned: str(returned).partition(" object at")[0][:30])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_job_function_that_returns_nonsense_fails_its_job(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any, returned: Any, at_once: bool) -> None:
    """Where it comes in, be the function a generator or not; nothing is left of the job."""
    @script
    def wrong(context: taskapi.JobContext) -> taskapi.JobSteps:
        yield from run_rows(context, RowsRequest(columns={"n": "int"}, rows=[[1]]))
        return returned

    if at_once:
        entry = taskapi.JOB_TYPES["script"]._replace(run=lambda context, request: returned)
        monkeypatch.setitem(taskapi.JOB_TYPES, "script", entry)
    with taskapi.open_service(tmp_path, workers=1) as service:
        job = service.wait(service.enqueue("script", {}).job_id, 60)
        assert (job.status, job.error.partition(":")[0] in ("TypeError", "ValueError", "UnicodeEncodeError")) == (
            "failed", True), job.error
        assert plain(tmp_path, "SELECT count(*) FROM _id_ranges") == [0]
        assert_at_work(service)


@pytest.mark.parametrize("records", [[1, 2], "3", None, True, 1.5, -4, {"n": 1}], ids=repr)
def test_a_number_of_records_that_is_none_is_not_counted(tmp_path: Path, script: Any, records: Any) -> None:
    """Nor does it touch the queue, though the job says that it makes records; its progress ends with its total."""
    @lambda function: taskapi.JOB_TYPES["rows"]._replace(run=function)
    def entry(context: taskapi.JobContext, request: RowsRequest) -> taskapi.JobSteps:
        context.save(taskapi.Progress(done=1, total=3))
        yield
        return taskapi.JobResult({"records": records})

    with taskapi.open_service(tmp_path, workers=1) as service, pytest.MonkeyPatch.context() as patch:
        patch.setitem(taskapi.JOB_TYPES, "rows", entry)
        job = service.wait(service.enqueue("rows", {"columns": {}, "rows": []}).job_id, 60)
        assert (job.status, job.result) == ("completed", {"records": records})
        assert job.progress == taskapi.Progress(done=3, total=3)
        assert_at_work(service)
        assert "taskapi_records_total 10\n" in service.queue.metrics.text({})


def raising(error: BaseException) -> Callable[..., Any]:
    """Something that raises `error` whatever it is called with."""
    def raises(*_: Any) -> Any:
        raise error

    return raises


@pytest.mark.parametrize("hook", [
    {"with_defaults": raising(SystemExit())}, {"with_defaults": raising(ValueError())},
    {"with_defaults": lambda *_: None}, {"makes": property(lambda _: ["thing"])},
    {"makes": property(raising(MemoryError()))}, {"weight": property(lambda _: "heavy")},
    {"weight": property(lambda _: 10**30)}, {"model_dump": lambda *_, **__: {"odd": object()}},
    {"model_dump": lambda *_, **__: {"half": "\ud800"}}], ids=lambda hook: next(iter(hook)))
def test_a_request_that_answers_nonsense_makes_no_job(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: dict[str, Any]) -> None:
    """Whoever posts it is told of a bug; the queue and what else is written are as before."""
    entry = taskapi.JOB_TYPES["script"]._replace(model=type("Nonsense", (ScriptRequest,), hook))
    monkeypatch.setitem(taskapi.JOB_TYPES, "script", entry)
    with taskapi.open_service(tmp_path, workers=1) as service:
        with service.serving(port=0) as url:
            assert ask(url, "POST", "/script", {}).status == 500
        assert statuses(service) == []
        assert_at_work(service)


NONSENSE: dict[str, Callable[..., Any]] = {
    "None": lambda *_: None, "object": lambda *_: object(), "deep": lambda *_: DEEP, "huge": lambda *_: "x" * 2**22,
    "generator": lambda *_: (yielded for yielded in ()), "half": lambda *_: "\ud800", "nan": lambda *_: math.nan,
    "SystemExit": raising(SystemExit()), "GeneratorExit": raising(GeneratorExit()),
    "MemoryError": raising(MemoryError("no room")), "ValueError": raising(ValueError())}


class Naught(taskapi.FieldType):
    """Always 0."""

    kind = "int"

    def domain(self, scope: taskapi.Scope) -> Any:
        """One value."""
        return 1, lambda n: n


@pytest.mark.parametrize("hook", sorted(
    {name for name, value in vars(taskapi.FieldType).items() if inspect.isfunction(value) and name[0] != "_"}
    | {"drawn", "drawn late"}))
def test_whatever_a_field_type_answers_touches_nothing_else(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    """Each of its functions, and those that these return: a request is refused or told of a bug, or its job fails."""
    late = 500 if hook == "drawn late" else 0
    body = {"recordType": "odd", "count": 1500, "schema": {"id": "sequence", "n": {"type": "naught", "null": 0.1}}}
    with taskapi.open_service(tmp_path, workers=1) as service, service.serving(port=0) as url:
        for name, answer in NONSENSE.items():
            calls = itertools.count()
            hooks = {hook: answer} if hook[:5] != "drawn" else {"draw": lambda *_, answer=answer, calls=calls: (
                lambda: 0 if next(calls) < late else answer(), "int")}
            monkeypatch.setitem(taskapi.FIELD_TYPES, "naught", type("Nonsense", (Naught,), hooks))
            preview = ask(url, "POST", "/preview", {**body, "locale": "en_GB", "count": 3})
            made = ask(url, "POST", "/generate?wait=30", body)
            taskapi._RECIPES.clear()
            assert {preview.status, made.status} <= {200, 202, 400, 500}, name
            assert made.status != 202 or made.json["status"] in ("completed", "failed"), made.json
        until(lambda: plain(tmp_path, "SELECT count(*) FROM _id_ranges AS g JOIN jobs ON jobs.id = g.job "
                                      "WHERE status <> 'completed'") == [0])
        assert_at_work(service)


@pytest.mark.parametrize("hook", ["write", "written", "read", "batch"])
def test_whatever_a_format_answers_touches_nothing_else(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    """Its writer and its reader, and what these yield: the job fails, or an export holds what was written."""
    formats = taskapi.FORMATS if hook in ("write", "written") else taskapi.INGEST_FORMATS
    entry = formats["csv"]
    with taskapi.open_service(tmp_path, workers=1) as service, service.serving(port=0) as url:
        for name, answer in NONSENSE.items():
            def yields(*_: Any, answer: Callable[[], Any] = answer) -> Iterator[Any]:
                yield answer()

            broken = yields if hook in ("written", "batch") else answer
            monkeypatch.setitem(formats, "csv", entry._replace(
                **{"write" if formats is taskapi.FORMATS else "read": broken}))
            asked = [ask(url, "POST", "/export?wait=30", {"format": "csv"})]
            for path in ("/upload?recordType=odd&filename=a.csv&wait=30", "/infer?filename=a.csv"):
                asked.append(ask(url, "POST", path, b"n\n1\n", {"Content-Type": "text/csv"}))
            for answered in asked:
                assert answered.status in (200, 201, 202, 400, 500), name
                assert answered.status == 200 or answered.status >= 400 or answered.json["status"] in (
                    "completed", "failed"), answered.json
        until(lambda: not [*(tmp_path / "tmp").iterdir()])
        monkeypatch.undo()
        assert_at_work(service)


def test_a_metric_that_is_not_declared_is_refused_at_the_call(service: taskapi.Service) -> None:
    """And so is a counter used as a histogram; what is told stays as it was."""
    metrics = service.queue.metrics
    before = metrics.text(service.gauges()).partition("taskapi_uptime")[0]
    for call in (partial(metrics.add, "job_total"), partial(metrics.add, "job_seconds"),
                 partial(metrics.text, {"x": 1}),
                 partial(metrics.observe, "jobs_total", 1.0), partial(metrics.observe, "nothing", 1.0)):
        with pytest.raises(ValueError, match="is declared"):
            call()
    assert metrics.text(service.gauges()).partition("taskapi_uptime")[0] == before


def stuck(service: taskapi.Service, script: Any, name: str = "one") -> tuple[str, threading.Event, list[BaseException]]:
    """A job that has saved a row, and then comes to no check until the event; what it raises after that."""
    begun, go_on, raised = threading.Event(), threading.Event(), []

    def never(context: taskapi.JobContext) -> taskapi.JobSteps:
        yield from run_rows(context, RowsRequest(columns={"n": "int"}, rows=[[1]]))
        begun.set()
        go_on.wait(60)
        try:
            context.save(taskapi.Progress(done=99), None, lambda connection: connection.execute("DELETE FROM jobs"))
        except BaseException as error:
            raised.append(error)
        return taskapi.JobResult({"came": "back"})

    script(never, name)
    job_id = service.enqueue("script", {"script": name}).job_id
    assert begun.wait(60)
    return job_id, go_on, raised


def test_a_stuck_job_is_told_and_a_canceled_one_is_given_up(
        tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Others compute meanwhile; a worker is put in its place; tried again, it is not touched by what still hangs."""
    monkeypatch.setattr(taskapi, "_STUCK_SECONDS", 0)
    monkeypatch.setattr(taskapi, "_TURN_SECONDS", 0)
    monkeypatch.setattr(taskapi, "_CANCEL_SECONDS", 0)
    with taskapi.open_service(tmp_path, workers=2) as service:
        job_id, go_on, raised = stuck(service, script)
        assert service.wait(service.enqueue("generate", PERSONS).job_id, 60).status == "completed"
        until(lambda: any("has not come to a check" in record.getMessage() for record in caplog.records))
        health = service.health()
        assert (health.status, job_id in health.checks["stuck"]) == ("ok", True)
        other, go_on_too, _ = stuck(service, script, "two")
        health = service.health()
        assert (health.status, health.queue) == ("unavailable", "unavailable")
        assert all(job in health.errors[0] for job in (job_id, other))
        job = service.queue.cancel(job_id)
        assert (job.status, "given up" in job.error) == ("canceled", True)
        assert plain(tmp_path, "SELECT count(*) FROM thing WHERE _job = ?", job_id) == [0]
        assert service.wait(service.enqueue("generate", PERSONS).job_id, 60).status == "completed"

        holding, finish = threading.Event(), threading.Event()

        @script
        def again(context: taskapi.JobContext) -> taskapi.JobSteps:
            while not finish.is_set():
                holding.set()
                yield
            return taskapi.JobResult({"went": "well"})

        assert service.queue.retry(job_id).status == "pending"
        assert holding.wait(60)
        assert service.queue.jobs.get(job_id).attempt == 1  # as the one had that still hangs
        go_on.set()
        until(lambda: raised and len(service.queue._abandoned) == 0)
        assert isinstance(raised[0], taskapi.LeaseLost)
        assert service.queue.jobs.get(job_id).status == "in-progress"
        finish.set()
        job = service.wait(job_id, 60)
        assert (job.status, job.result, job.progress.done) == ("completed", {"went": "well"}, 0)
        go_on_too.set()
        assert service.drain(60)
        monkeypatch.undo()
        assert_at_work(service)


def test_a_job_that_asks_whether_to_stop_is_not_stuck(tmp_path: Path, script: Any) -> None:
    """To ask is the sign of life."""
    asked = threading.Event()

    @script
    def busy(context: taskapi.JobContext) -> taskapi.JobSteps:
        while not context.interrupted():
            asked.set()
        yield

    with taskapi.open_service(tmp_path) as service:
        job_id = service.enqueue("script", {}).job_id
        assert asked.wait(60)
        assert [context.job.job_id for context in service.queue.stuck(-1)] == [job_id]
        assert service.queue.stuck(5) == []
        assert service.queue.cancel(job_id).status == "canceled"
        assert_at_work(service)


@pytest.mark.parametrize("how", ["cancel", "stop", "signal"])
@pytest.mark.parametrize("at", ["yield", "save"])
def test_an_interrupted_job_makes_no_further_chunk(tmp_path: Path, script: Any, how: str, at: str) -> None:
    """It ends at the yield or the save after it; what a stopped one has saved then is kept, a canceled one's goes."""
    made: list[int] = []
    others: list[threading.Thread] = []

    @script
    def endless(context: taskapi.JobContext) -> taskapi.JobSteps:
        for number in itertools.count(1):
            made.append(number)
            if number == 3:
                if how == "cancel":
                    others.append(threading.Thread(target=service.queue.cancel, args=[context.job.job_id]))
                    others[0].start()
                    until(context.interrupted)
                else:
                    {"stop": service.queue.halt, "signal": service.queue.stopping.set}[how]()
            if at == "save":
                context.save(taskapi.Progress(done=number), number)
            else:
                yield

    service = taskapi.open_service(tmp_path)
    with service:
        job = service.wait(service.enqueue("script", {}).job_id, 60)
        until(lambda: not service.queue._active)
        for other in others:
            other.join()
        assert service.queue.jobs.get(job.job_id).status == ("canceled" if how == "cancel" else "pending")
    assert made == [1, 2, 3]
    kept = [(3, "3")] if (at, how) in {("save", "stop"), ("save", "signal")} else []
    if how != "cancel":
        assert plain(tmp_path, "SELECT done, checkpoint FROM _progress") == kept
        assert plain(tmp_path, "SELECT attempt FROM jobs") == [0]


def test_a_wake_up_that_comes_while_a_run_finds_nothing_is_not_lost(tmp_path: Path, script: Any) -> None:
    """A job that is added just as the only worker has looked is taken by it, without housekeeping."""
    with held(tmp_path, workers=1) as (service, runner), pytest.MonkeyPatch.context() as patch:
        runner.run()
        late = iter(range(3))

        def and_then(look: Callable[..., Any], *args: Any, **more: Any) -> Any:
            found = look(*args, **more)
            claim = found[1] if type(found) is tuple else found  # a job that ends claims the next one
            if not claim and next(late, None) is not None:
                service.enqueue("script", {})
            return found

        for name in ("claim", "finish"):
            patch.setattr(service.queue.jobs, name, partial(and_then, getattr(service.queue.jobs, name)))
        service.queue.wake()
        runner.step()
        assert not runner.calls
        assert statuses(service) == ["completed"] * 3


@pytest.mark.parametrize("fresh", [60, -1])
def test_a_short_job_leaves_the_next_one_to_its_run_and_a_long_one_to_others(
        tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch, fresh: float) -> None:
    """Others are called where the job comes to a yield and has computed for longer."""
    monkeypatch.setattr(taskapi, "_FRESH_SECONDS", fresh)
    called = []

    @lambda function: script(function, "first")
    def first(context: taskapi.JobContext) -> taskapi.JobSteps:
        service.enqueue("script", {})
        called.append(len(runner.calls))
        yield
        yield
        called.append(len(runner.calls))
        return taskapi.JobResult({})

    with held(tmp_path) as (service, runner):
        runner.run()
        service.enqueue("script", {"script": "first"})
        runner.step()
        assert statuses(service) == ["completed"] * 2
        assert called == [0, int(fresh < 0)]


def test_a_run_that_was_called_and_never_began_is_made_up_for(
        tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And that jobs wait beside workers that are free is said, whatever keeps these from looking."""
    with held(tmp_path) as (service, runner):
        service.enqueue("script", {})
        runner.calls.clear()
        service.queue.wake()
        assert not runner.calls
        monkeypatch.setattr(taskapi, "_CALL_SECONDS", 0)
        service.queue.wake()
        runner.run()
        assert statuses(service) == ["completed"]
        monkeypatch.setattr(runner, "submit", raising(RuntimeError("can't start new thread")))
        assert service.enqueue("script", {}).status == "pending"
        assert "can't start new thread" in caplog.text
        assert "no worker looks for jobs" in service.health().errors[0]


def test_a_round_of_housekeeping_does_what_it_can(tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    """A task that fails keeps no other from its turn; what lasts is logged once."""
    with held(tmp_path) as (service, runner):
        service.enqueue("script", {})
        runner.calls.clear()
        monkeypatch.setattr(taskapi, "_CALL_SECONDS", 0)
        for owner, name, error in ((service.queue.records, "orphans", taskapi.StorageError("is away")),
                                   (service.queue, "fail_dependents", ValueError("a bug"))):
            monkeypatch.setattr(owner, name, raising(error))
        for _ in range(2):
            service.keep_house()
        assert len(runner.calls) == 2
        said = [record.getMessage() for record in caplog.records if "housekeeping" in record.getMessage()]
        assert sorted(said) == ["housekeeping has to wait: is away", *["housekeeping met a bug"] * 2]


def test_a_job_of_a_type_that_is_gone_fails_by_name(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any) -> None:
    """After an upgrade, say; so does one whose request is not understood any more."""
    with held(tmp_path) as (service, runner):
        service.enqueue("script", {})
        service.queue.jobs.insert("generate", {"count": "some"})
        monkeypatch.delitem(taskapi.JOB_TYPES, "script")
        runner.run()
        gone, unread = reversed(service.queue.jobs.page(None, None, 9, None)[0])
        assert (gone.status, "'script'" in gone.error) == ("failed", True)
        assert (unread.status, "count" in unread.error) == ("failed", True)


@pytest.mark.parametrize("error", [taskapi.DiskFull("the disk is full"), taskapi.StorageError("the database is busy")])
def test_a_job_that_meets_a_broken_storage_is_put_back_and_goes_on_when_it_is_well(
        tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """However often, without being charged; nothing else is begun meanwhile; job and health say why."""
    broken = [True]

    @script
    def unlucky(context: taskapi.JobContext) -> taskapi.JobSteps:
        yield from run_rows(context, RowsRequest(columns={"n": "int"}, rows=[[1]]))
        if broken:
            raise error
        return taskapi.JobResult({})

    with held(tmp_path, max_attempts=1) as (service, runner):
        probe = service.folder.probe
        monkeypatch.setattr(service.folder, "probe", lambda: raising(error)() if broken else probe())
        jobs = [service.enqueue("script", {}).job_id for _ in range(3)]
        for _ in range(3):
            service.queue.wake()
            runner.run()
        assert statuses(service) == ["pending"] * 3
        found = [service.queue.jobs.get(job_id) for job_id in jobs]
        assert [job.attempt for job in found] == [0] * 3
        assert [[entry.reason for entry in job.interruptions] for job in found] == [[str(error)], [], []]
        health = service.health()
        assert (health.database, str(error) in health.errors[0]) == ("unavailable", True)
        assert str(error) in health.checks["storage"]
        broken.clear()
        service.queue.wake()
        runner.run()
        assert [(job.status, job.attempt) for job in map(service.queue.jobs.get, jobs)] == [("completed", 1)] * 3


@pytest.mark.parametrize("error", [taskapi.DiskFull("the disk is full"), taskapi.StorageError("the disk is on fire")])
def test_a_storage_fault_that_is_the_jobs_own_counts_as_an_attempt(
        tmp_path: Path, script: Any, error: Exception) -> None:
    """The storage is well once the job has let go of it: it is tried again, MAX_ATTEMPTS times in all."""
    @script
    def greedy(context: taskapi.JobContext) -> taskapi.JobSteps:
        yield
        raise error

    with held(tmp_path, max_attempts=3) as (service, runner):
        job_id = service.enqueue("script", {}).job_id
        runner.run()
        job = service.queue.jobs.get(job_id)
        assert (job.status, job.attempt, job.error) == ("failed", 3, str(error))
        assert [entry.reason for entry in job.interruptions] == [str(error)] * 2


def test_how_a_job_ended_is_written_down_once_the_storage_takes_it(
        tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in progress until then, and completed afterwards, without a second attempt."""
    monkeypatch.setattr(taskapi, "_RETRY_SECONDS", 0)
    with taskapi.open_service(tmp_path, workers=1) as service:
        finish, tries = service.queue.jobs.finish, iter(range(3))

        def late(*args: Any, **kwargs: Any) -> Any:
            if next(tries, None) is not None:
                raise taskapi.StorageError("the database is busy")
            return finish(*args, **kwargs)

        monkeypatch.setattr(service.queue.jobs, "finish", late)
        job = service.wait(service.enqueue("script", {}).job_id, 60)
        assert (job.status, job.attempt) == ("completed", 1)
        assert_at_work(service)


def test_a_job_follows_another_and_fails_with_it(tmp_path: Path) -> None:
    """Posted in one go, an export waits, and has all the records; a chain fails to its end; `after` has to be a job."""
    with held(tmp_path) as (service, runner):
        get = service.queue.jobs.get
        first = service.enqueue("generate", PERSONS)
        after = {"format": "json", "filters": {"jobId": first.job_id}, "after": first.job_id}
        follower = service.enqueue("export", after)
        assert service.queue.jobs.claim()[0].job_id == first.job_id
        assert service.queue.jobs.claim() is None
        service.queue.jobs.release(get(first.job_id), "a test", charged=False)
        chain = [service.enqueue("export", {"format": "csv", "filters": {"recordType": "nobody"}})]
        for _ in range(2):
            chain.append(service.enqueue("generate", {**PERSONS, "after": chain[-1].job_id}))
        runner.run()
        done = get(follower.job_id)
        assert (done.status, done.after, done.result["records"]) == ("completed", first.job_id, 10)
        for before, job in itertools.pairwise(chain):
            ended = get(job.job_id)
            assert ended.status == "failed"
            assert ended.error.startswith(f"job {before.job_id}, which this one was to follow")
        with pytest.raises(taskapi.NotFound, match="after"):
            service.enqueue("export", {"format": "csv", "after": "nothing"})


def test_after_a_crash_suspects_run_one_at_a_time(jobs: taskapi.JobStore) -> None:
    """A job that was interrupted waits while another such job runs; fresh ones do not."""
    for _ in range(2):
        jobs.insert("script", {})
    suspects = [jobs.claim()[0] for _ in range(2)]
    for job in suspects:
        jobs.release(job, "a crash", charged=True)
    fresh = jobs.insert("script", {})[0]
    assert jobs.claim()[0].attempt == 2
    assert jobs.claim()[0].job_id == fresh.job_id
    assert jobs.claim() is None
    assert [entry.reason for entry in jobs.get(suspects[1].job_id).interruptions] == ["a crash"]


def test_retention_removes_what_is_old_and_nothing_in_use(tmp_path: Path) -> None:
    """Jobs, files and records; a file that is being downloaded stays until that ends."""
    clock = FakeClock()
    with taskapi.open_service(tmp_path, inline=True, clock=clock, retention_days=2) as service:
        old = service.enqueue("generate", PERSONS)
        export = service.enqueue("export", {"format": "csv"})
        clock.now += timedelta(days=3)
        young = service.enqueue("generate", {**PERSONS, "recordType": "company"})
        with service.folder.open(export.file):
            service.retire()
            assert {job.job_id for job in service.queue.jobs.page(None, None, 9, None)[0]} == {
                young.job_id, export.job_id}
        service.retire()
        assert [job.job_id for job in service.queue.jobs.page(None, None, 9, None)[0]] == [young.job_id]
        assert old.job_id != young.job_id
    assert not list((tmp_path / "exports").iterdir())
    assert plain(tmp_path, "SELECT record_type FROM _types") == ["company"]
    assert plain(tmp_path, "SELECT count(*) FROM company") == [10]


def test_metrics_count_what_happened(service: taskapi.Service, url: str) -> None:
    """Jobs, records, bytes and requests, exactly, in Prometheus' text format."""
    service.enqueue("generate", PERSONS)
    service.enqueue("export", {"format": "csv", "filters": {"recordType": "nobody"}})
    ask(url, "GET", "/nowhere")
    answer = ask(url, "GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in answer.body.decode().splitlines() if not line.startswith("#"))
    assert values['taskapi_jobs_total{type="generate",status="completed"}'] == "1"
    assert values['taskapi_jobs_total{type="export",status="failed"}'] == "1"
    assert values["taskapi_records_total"] == "10"
    assert values['taskapi_requests_total{method="GET",route="none",status="404"}'] == "1"
    assert values['taskapi_job_seconds_bucket{type="generate",le="+Inf"}'] == "1"
    assert values["taskapi_jobs_pending"] == "0"


def test_the_cpu_gate_is_fair_and_lets_one_compute_at_a_time() -> None:
    """In order of arrival; one whose turn is passed on holds nobody up; who waits may be told to stop."""
    gate, order = taskapi.CpuGate(), []

    def compute(number: int) -> None:
        with suppress(taskapi.Interrupted), gate.turn(number, raising(taskapi.Interrupted()) if number == 2 else bool):
            order.append(number)

    with gate.turn("first"):
        for number in range(5):
            crowd = threading.Thread(target=compute, args=[number])
            crowd.start()
            until(lambda number=number: number in gate._line or number == 2)
        until(lambda: 2 not in gate._line)
        assert order == []
        assert gate.pass_on("first")
        until(lambda: len(order) == 4)
    assert order == [0, 1, 3, 4]
    assert not gate.pass_on("first")
    crowd.join(60)


def test_computing_makes_room_only_while_requests_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond a chunk."""
    gate, slept = taskapi.CpuGate(), []
    monkeypatch.setattr(taskapi, "sleep", slept.append)
    gate.step_aside()
    with gate.request(), gate.request():
        gate.step_aside()
    gate.step_aside()
    assert slept == [0.001]


# ==== 9 HTTP ====


def test_health_says_what_the_contract_shows(service: taskapi.Service, url: str) -> None:
    """All keys, and links that answer; JSON also for a browser under its second name, and a job under its own."""
    health = ask(url, "GET", "/")
    assert health.status == 200
    assert {"service": "taskapi", "version": taskapi.__version__, "status": "ok", "database": "ok", "queue": "ok",
            "pending": 0, "inProgress": 0, "workers": 16}.items() <= health.json.items()
    assert health.json["uptime"] >= 0
    links = health.json["links"]
    assert {"generate", "upload", "export", "status", "jobs", "records", "fields", "preview"} <= links.keys()
    for name in ("jobs", "records"):
        assert ask(url, "GET", links[name]).status == 200
    assert (ask(url, "HEAD", "/").status, ask(url, "HEAD", "/").body) == (200, b"")
    second = ask(url, "GET", "/health", None, {"Accept": "text/html"})
    assert second.json | {"uptime": 0} == health.json | {"uptime": 0}
    job = ask(url, "POST", "/generate", PERSONS).json
    for path in ("/jobs", "/status"):
        assert ask(url, "GET", f"{path}/{job['jobId']}?wait=1").json == job


def test_health_is_503_when_no_worker_answers(tmp_path: Path) -> None:
    """It really asks them."""
    with held(tmp_path) as (service, _), service.serving(port=0) as url:
        health = ask(url, "GET", "/")
        assert (health.status, health.json["queue"], health.json["database"]) == (503, "unavailable", "ok")
        assert health.json["errors"]


@pytest.mark.parametrize("path", ["/", "/ui", "/docs", "/download/0192"])
def test_a_link_on_another_site_may_lead_to_a_page_and_to_a_file(url: str, path: str) -> None:
    """As a browser follows it."""
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Accept": "text/html"}
    assert ask(url, "GET", path, None, headers).status in (200, 404)


def test_pages_of_friends_may_use_the_server_and_no_others(tmp_path: Path) -> None:
    """The preflight, the answer and a refusal say so, for exact origins and for any port of localhost."""
    friends = ["https://app.example", "http://localhost:*"]
    with taskapi.open_service(tmp_path, inline=True, cors_origins=friends) as service, service.serving(port=0) as url:
        for origin, friend in (("https://app.example", True), ("http://localhost:5173", True),
                               ("http://localhost", True), ("https://app.example.evil.example", False),
                               ("http://localhost:5173.evil.example", False), ("null", False)):
            headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site", "Access-Control-Request-Method": "POST",
                       "Access-Control-Request-Headers": "content-type, idempotency-key"}
            allowed = origin if friend else None
            preflight = ask(url, "OPTIONS", "/generate", None, headers).headers
            assert preflight["Access-Control-Allow-Origin"] == allowed
            assert not friend or "POST" in preflight["Access-Control-Allow-Methods"]
            assert not friend or preflight["Access-Control-Allow-Headers"] == "content-type, idempotency-key"
            for path, body, status in (("/generate", PERSONS, 202), ("/generate", {"count": 0}, 400),
                                       ("/upload", b"", 415)):
                answer = ask(url, "POST", path, body, {"Origin": origin, "Sec-Fetch-Site": "cross-site"})
                assert (answer.status, answer.headers["Vary"].split(", ")[0]) == (status if friend else 403, "Origin")
                assert answer.headers["Access-Control-Allow-Origin"] == allowed
            for path in ("/records/person?limit=1", "/records/person?format=csv&id.lt=5", "/records/person/3"):
                answer = ask(url, "GET", path, None, {"Origin": origin, "Sec-Fetch-Site": "cross-site"})
                assert answer.status == (200 if friend else 403)
                assert answer.headers["Access-Control-Allow-Origin"] == allowed
                assert "Origin" in answer.headers["Vary"].split(", ")
                assert not friend or path[-1] == "3" or "Accept" in answer.headers["Vary"].split(", ")
    with taskapi.open_service(tmp_path, inline=True) as service, service.serving(port=0) as url:
        headers = ask(url, "OPTIONS", "/generate", None, {"Origin": friends[0]}).headers
        assert "Access-Control-Allow-Origin" not in headers
    for wrong in ("*", "app.example", "https://app.example/", "https://*.example", "https://app.example:*"):
        with pytest.raises(taskapi.SettingError, match="is not an origin"):
            taskapi.open_service(tmp_path, cors_origins=[wrong])


SECRET = "s3cret-of-ours"
BEARER = {"Authorization": f"Bearer {SECRET}"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that wants a token."""
    with Live(tmp_path_factory.mktemp("guarded") / "data", f"--token={SECRET}", "--cors-origins=https://a.example",
              "--log-level=debug") as live:
        yield live


def test_every_call_but_the_health_check_wants_the_token(guarded: Live) -> None:
    """Also what there is none of, in any form but the token's own; a refused body is not read."""
    wrong = [{}, {"Authorization": f"Bearer {SECRET}x"}, {"Authorization": SECRET}, {"Authorization": "Bearer"},
             {"Authorization": f"Basic {base64.b64encode(f'x:{SECRET}'.encode()).decode()}"},
             {"Authorization": "Bearer \xe9"}, {"Cookie": f"taskapi={SECRET}; token={SECRET}"}]
    calls = [*((entry.method, entry.path) for entry in SERVED), ("GET", "/nowhere"), ("OPTIONS", "/jobs"), ("PUT", "/")]
    for (method, path), headers in itertools.product(calls, wrong):
        answer = guarded.ask(method, f"{path}?token={SECRET}", None, headers)
        if (method, path) == ("GET", "/"):
            refused(answer, 400, "token")  # there is no such thing to ask for
            assert guarded.ask("GET", "/", None, headers).json == {"status": "ok"}
            continue
        assert refused(answer, 401).keys() == {"error", "status"}
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    for method, path in calls:
        assert guarded.ask(method, path, None, BEARER).status != 401
    assert SECRET not in guarded.log.read_text()


def test_the_token_opens_everything_and_stands_nowhere(guarded: Live, tmp_path: Path) -> None:
    """Any case of Bearer, a preflight without, the description, an upload refused by its head, HEAD, a child's log."""
    assert guarded.ask("GET", "/", None, BEARER).json["service"] == "taskapi"
    assert guarded.ask("GET", "/jobs", None, {"Authorization": f"bearer  {SECRET}"}).status == 200
    assert guarded.ask("HEAD", "/").status == 401
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization"}
    preflight = guarded.ask("OPTIONS", "/generate", None, asked)
    assert (preflight.status, preflight.headers["Access-Control-Allow-Headers"]) == (204, "authorization")
    assert guarded.ask("OPTIONS", "/generate", None, asked | {"Origin": "https://b.example"}).status == 401
    with plug(guarded.url) as connection:
        connection.sendall(head(90_000_000))
        refused(parsed(rest(connection)), 401)
    cookie = guarded.ask("POST", "/ui", None, BEARER).headers["Set-Cookie"].split("; ")
    assert cookie[1:] == ["Path=/", "HttpOnly", "SameSite=Strict"]
    assert guarded.ask("GET", "/jobs", None, {"Cookie": f"a=b; {cookie[0]}; c=d"}).status == 200
    assert guarded.ask("GET", "/jobs", None, {"Cookie": f"{cookie[0][:-1]}"}).status == 401
    document = guarded.ask("GET", "/openapi.json", None, BEARER).json
    assert document["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert document["security"] == [{"token": []}]
    assert "401" in document["paths"]["/jobs"]["get"]["responses"]
    texts = [json.dumps(document), guarded.log.read_text(), guarded.line]
    texts += [guarded.ask("GET", path, None, BEARER).body.decode() for path in ("/", "/health", "/docs", "/metrics")]
    texts += [path.read_text() for path in guarded.folder.glob("*.json")]
    job_id = guarded.ask("POST", "/generate", PERSONS, BEARER).json["jobId"]
    texts.append(guarded.ask("GET", f"/status/{job_id}?wait=9", None, BEARER).body.decode())
    assert not [text for text in texts if SECRET in text]
    assert SECRET not in repr(taskapi.Settings(token=SECRET))


def test_the_commands_bring_the_token(
        guarded: Live, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """By flag or variable; without it they say what is missing, and an interrupted one does not tell it."""
    for flags, environ, code in (([], {}, 1), (["--token=wrong"], {}, 1), ([f"--token={SECRET}"], {}, 0),
                                 ([], {"TASKAPI_TOKEN": SECRET}, 0)):
        ran = subprocess.run([sys.executable, taskapi.__file__, "jobs", "--data-dir", guarded.folder, *flags],
                             env=own_environ() | environ, capture_output=True, text=True, check=False, timeout=60)
        assert (ran.returncode, "TASKAPI_TOKEN" in ran.stderr) == (code, bool(code)), ran
    def interrupted(self: taskapi.Client, job_id: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(taskapi.Client, "_watch", interrupted)
    told = run("generate", "person", "--count", "5", "--workers=2", f"--token={SECRET}").err
    assert re.search("resume .* --workers=2", told)
    assert SECRET not in told


# Test controls


@pytest.fixture
def testing(tmp_path: Path) -> Iterator[taskapi.ServedUrl]:
    """A service under test controls with workers, served."""
    with taskapi.open_service(tmp_path / "data", seed=1, test_controls=True, retention_days=2) as service, \
            service.serving(port=0) as url:
        yield taskapi.ServedUrl(url, service)


def test_without_the_setting_there_are_no_test_controls(url: str, service: taskapi.Service) -> None:
    """Nor are they described; with it they are, and the service's own calls stay as they are."""
    for entry in taskapi.all_routes(test_controls=True):
        if entry.path.startswith("/test/"):
            refused(ask(url, entry.method, entry.path, {}), 404)
    assert "/test/" not in ask(url, "GET", "/openapi.json").body.decode()
    assert ask(url, "GET", "/docs").body.count(b"/test/") == 0
    with pytest.raises(taskapi.Conflict, match="test_controls"):
        service.faults.add(on={"path": "/jobs"}, then={"status": 500})
    with pytest.raises(taskapi.SettingError, match="loopback"):
        taskapi.open_service(service.folder.root, host="0.0.0.0", allowed_hosts=["a.example"], no_token=True,
                             test_controls=True)


MADE = {"recordType": "person", "count": 700, "seed": 5, "now": "2026-01-01T00:00:00Z"}
PATH, JOB = {"path": "/jobs"}, {"job": "generate"}


@pytest.mark.parametrize(("fault", "words"), [
    ({}, "on"), ({"on": PATH}, "then"), ({"on": {}, "then": {"status": 500}}, "on"),
    ({"on": {"paht": "/jobs"}, "then": {"status": 500}}, "did you mean 'path'"),
    ({"on": {"method": "PSOT"}, "then": {"status": 500}}, "did you mean 'POST'"),
    ({"on": {"job": "genrate"}, "then": {"pause": True}}, "did you mean 'generate'"),
    ({"on": {**JOB, **PATH}, "then": {"pause": True}}, "on.job"), ({"on": JOB, "then": {"status": 500}}, "then.status"),
    ({"on": JOB, "then": {"error": "x", "pause": True}}, "then"), ({"on": JOB, "then": {}}, "then"),
    ({"on": PATH, "then": {"interrupt": True}}, "then.interrupt"), ({"on": PATH, "then": {}}, "then"),
    ({"on": {**PATH, "done": 5}, "then": {"status": 500}}, "on.done"),
    ({"on": {"path": "jobs"}, "then": {"status": 500}}, "on.path"),
    ({"on": {"path": "/jobs?limit=1"}, "then": {"status": 500}}, "on.path"),
    ({"on": {"path": "/test/reset"}, "then": {"status": 500}}, "on.path"),
    ({"on": PATH, "then": {"status": 99}}, "then.status"), ({"on": PATH, "then": {"delay": -1}}, "then.delay"),
    ({"on": PATH, "then": {"status": 500, "headers": {"Content-Length": "1"}}}, "then.headers.Content-Length"),
    ({"on": PATH, "then": {"status": 500, "headers": {"A": "1\r\nB: 2"}}}, "then.headers.A"),
    ({"on": PATH, "then": {"status": 500}, "times": 0}, "times"),
    ({"on": PATH, "then": {"status": 500}, "probability": 1.1}, "probability"),
    ({"on": PATH, "then": {"status": 500}, "tiems": 1}, "did you mean 'times'")], ids=str)
def test_a_wrong_fault_is_refused_by_the_name_of_its_field(
        taskapi_service: taskapi.Service, fault: dict[str, Any], words: str) -> None:
    """And none is left."""
    refused(ask(taskapi_service.url, "POST", "/test/faults", fault), 400, words)
    with pytest.raises(BadRequest):
        taskapi_service.faults.add(fault)
    assert taskapi_service.faults.list() == []


def test_a_fault_answers_the_requests_that_it_is_about(testing: taskapi.ServedUrl) -> None:
    """By method and path, after those to skip, so many times; with status, headers and body; told how often."""
    made = ask(testing, "POST", "/test/faults", {
        "on": {"method": "post", "path": "/gen*"}, "skip": 1, "times": 2,
        "then": {"status": 503, "delay": 0.01, "headers": {"Retry-After": 7, "X-Of": "ours"}, "body": {"error": "no"}}})
    assert made.status == 201
    answers = [ask(testing, "POST", "/generate", PERSONS) for _ in range(4)]
    assert [answer.status for answer in answers] == [202, 503, 503, 202]
    assert (answers[1].headers["Retry-After"], answers[1].headers["X-Of"], answers[1].json) == (
        "7", "ours", {"error": "no"})
    assert ask(testing, "GET", "/jobs").status == 200
    [fault] = ask(testing, "GET", "/test/faults").json["items"]
    assert (fault["id"], fault["left"], fault["struck"]) == (made.json["id"], 0, 2)
    assert ask(testing, "DELETE", f"/test/faults/{fault['id']}").status == 204
    refused(ask(testing, "DELETE", f"/test/faults/{fault['id']}"), 404)
    testing.faults.add(on={"path": "*"}, then={"status": 500})
    testing.faults.add(on={"path": "/"}, then={"status": 204, "body": "x"}, times=1)
    assert refused(ask(testing, "GET", "/nowhere"), 500)
    assert [ask(testing, "GET", "/").status for _ in range(2)] == [204, 200]  # * is not about the health check
    SEEN.discard(("GET", "/", 204))  # which nobody else is to meet
    assert ask(testing, "DELETE", "/test/faults").status == 204
    assert ask(testing, "GET", "/jobs").status == 200
    testing.faults.add(on={"path": "/jobs"}, then={"headers": {"X-Of": "ours"}})  # the real answer, but for this
    assert ask(testing, "GET", "/jobs").headers["X-Of"] == "ours"
    testing.faults.clear()
    testing.faults.add(on={"path": "/jobs"}, then={"status": 200, "body": "{broken"})
    assert ask(testing, "GET", "/jobs").body == b"{broken"


def test_chances_are_drawn_alike_under_the_same_seed(testing: taskapi.ServedUrl, tmp_path: Path) -> None:
    """In another service too, and by a seed of the fault's own."""
    def drawn(url: taskapi.ServedUrl, **more: Any) -> list[int]:
        url.reset()
        url.faults.add(on={"path": "/jobs"}, then={"status": 500}, probability=0.5, **more)
        return [ask(url, "GET", "/jobs").status for _ in range(20)]

    first = drawn(testing)
    assert {*first} == {200, 500}
    with taskapi.open_service(tmp_path / "other", seed=1, test_controls=True) as other, other.serving(port=0) as url:
        assert drawn(taskapi.ServedUrl(url, other)) == first == drawn(testing)
    assert drawn(testing, seed=2) == drawn(testing, seed=2) != first


def test_a_fault_cuts_the_connection_before_or_in_the_middle_of_an_answer(testing: taskapi.ServedUrl) -> None:
    """Of a JSON answer and of a download, whole or a range; others stay whole."""
    testing.wait(testing.enqueue("generate", MADE).job_id, 20)
    job = testing.wait(testing.enqueue("export", {"format": "csv"}).job_id, 20)
    for path, after, range_ in ((f"/download/{job.job_id}", 7000, None), ("/fields", 500, None), ("/jobs", 0, None),
                                (f"/download/{job.job_id}", 10, "bytes=5-99"), ("/jobs", None, None)):
        then = {"close": True, "after": after} if after is not None else {"close": True}
        testing.faults.add(on={"path": path}, then=then, times=1)
        headers = {"Range": range_} if range_ else {}
        with pytest.raises((http.client.IncompleteRead, http.client.RemoteDisconnected)) as cut:
            ask(testing, "GET", path, None, headers)
        assert len(getattr(cut.value, "partial", b"")) == (after or 0)
        assert ask(testing, "GET", path, None, headers).status in (200, 206)
    assert [entry["status"] for entry in testing.requests(path="/jobs")] == [200, 200, None, 200]
    testing.faults.add(on={"path": "/jobs"}, then={"close": True})
    with pytest.raises(ConnectionResetError):
        webtest.TestApp(testing.app).get("/jobs")


def test_what_was_asked_is_remembered(tmp_path: Path) -> None:
    """Method, path, query, headers, a JSON body up to 64 KiB, status, time; the last 1,000; never the token."""
    with taskapi.open_service(tmp_path, test_controls=True, inline=True, token=SECRET) as service, \
            service.serving(port=0) as url:
        ask(url, "POST", "/generate?wait=0", PERSONS, BEARER | {"X-Of": "ours"})
        ask(url, "POST", "/generate", {"count": 0}, BEARER)
        ask(url, "GET", "/nowhere?a=%C3%A9")
        ask(url, "POST", "/preview", b'{"count": 1, "x": "' + b"y" * 2**16 + b'"}', JSON | BEARER)
        ask(url, "POST", "/generate", b"{", JSON | BEARER)
        first, *others = ask(url, "GET", "/test/requests", None, BEARER).json["items"]
        assert [entry["status"] for entry in others] == [400, 401, 400, 400]
        assert [entry["body"] for entry in others] == [{"count": 0}, None, None, None]
        assert others[1]["query"] == {"a": "é"}
        assert (first["method"], first["path"], first["query"], first["body"], first["status"]) == (
            "POST", "/generate", {"wait": "0"}, PERSONS, 202)
        assert (first["headers"]["X-Of"], first["headers"]["Authorization"]) == ("ours", "Bearer ***")
        assert 0 <= first["ms"] < 60_000
        assert [len(service.requests(**query)) for query in (
            {"status": 400}, {"method": "GET"}, {"path": "/gen*"}, {"path": "/x"})] == [3, 1, 3, 0]
        answer = ask(url, "GET", "/test/requests?status=400&path=*e*&method=POST", None, BEARER)
        assert len(answer.json["items"]) == 3
        service.seen.extend({**first, "n": n} for n in range(1200))
        assert len(ask(url, "GET", "/test/requests", None, BEARER).json["items"]) == 1000
        assert ask(url, "DELETE", "/test/requests", None, BEARER).status == 204
        assert service.requests() == []
        for odd in (b'{"count": NaN}', b'{"count": 1e999}', rb'{"recordType": "\ud800"}', b"[" * 300 + b"]" * 300):
            ask(url, "POST", "/generate", odd, JSON | BEARER)
        items = ask(url, "GET", "/test/requests?method=post", None, BEARER).json["items"]
        assert [(entry["status"], entry["body"]) for entry in items] == [(400, None)] * 4


def test_a_delay_holds_no_more_than_half_of_the_threads_and_ends_with_its_fault(tmp_path: Path) -> None:
    """A further request is answered at once; removing the fault lets all go."""
    with taskapi.open_service(tmp_path, test_controls=True, threads=4) as service, service.serving(port=0) as url, \
            ThreadPoolExecutor(2) as pool:
        service.faults.add(on={"path": "/records"}, then={"delay": 3000})
        held = [pool.submit(ask, url, "GET", "/records") for _ in range(2)]
        until(lambda: service.faults.list()[0]["struck"] == 2)
        until(lambda: ask(url, "GET", "/records").status == 200)
        assert ask(url, "GET", "/jobs").status == 200
        assert not any(waiting.done() for waiting in held)
        service.faults.clear()
        assert [waiting.result(20).status for waiting in held] == [200, 200]


def test_a_job_is_interrupted_as_by_a_crash_and_ends_with_the_same_records(testing: taskapi.ServedUrl) -> None:
    """The attempt is counted and noted, the checkpoint is where it goes on; without progress it fails in the end."""
    request = {**MADE, "recordType": "whole", "schema": {"id": "sequence", "n": "name"}}
    testing.wait(testing.enqueue("generate", request).job_id)
    ask(testing, "POST", "/test/faults", {"on": {"job": "generate", "done": 300}, "then": {"interrupt": True}})
    job = testing.wait(testing.enqueue("generate", {**request, "recordType": "broken"}).job_id, 20)
    assert (job.status, job.attempt, [entry.reason for entry in job.interruptions]) == (
        "completed", 2, ["the server ended while the job ran"])
    assert testing.records("broken") == testing.records("whole")
    assert testing.faults.list()[0]["left"] == 0
    testing.faults.clear()
    testing.faults.add(on={"job": "*"}, then={"interrupt": True}, times=9)
    job = testing.wait(testing.enqueue("generate", MADE).job_id, 20)
    assert (job.status, job.attempt) == ("failed", 3)
    assert testing.faults.list()[0]["struck"] == 3


def test_a_job_fails_or_stands_still_where_a_test_wants_it(testing: taskapi.ServedUrl) -> None:
    """At that progress; a job that stands still lets others run, and can be canceled and put back by a stop."""
    testing.faults.add(on={"job": "generate", "done": 300}, then={"error": "the disk is full"}, skip=1)
    jobs = [testing.wait(testing.enqueue("generate", MADE).job_id, 20) for _ in range(3)]
    assert [(job.status, job.error) for job in jobs] == [
        ("completed", None), ("failed", "the disk is full"), ("completed", None)]
    for end in ("removed", "canceled", "stopped"):
        testing.faults.clear()
        fault = testing.faults.add(on={"job": "generate", "done": 300}, then={"pause": True})["id"]
        job_id = testing.enqueue("generate", MADE).job_id
        until(lambda: testing.faults.list()[0]["struck"])
        job = testing.wait(job_id, 0)
        assert (job.status, 300 <= job.progress.done < 400) == ("in-progress", True)
        assert testing.wait(testing.enqueue("generate", MADE).job_id, 20).status == "completed"
        if end == "removed":
            ask(testing, "DELETE", f"/test/faults/{fault}")
            assert testing.wait(job_id, 20).status == "completed"
        elif end == "canceled":
            assert ask(testing, "POST", f"/jobs/{job_id}/cancel").json["status"] == "canceled"
        else:
            testing.queue.stopping.set()
            until(lambda paused=job_id: testing.wait(paused, 0).status == "pending")


def test_the_clock_is_the_tests(testing: taskapi.ServedUrl) -> None:
    """It stands where it is set, goes on from where it is put forward; what is past its retention goes at once."""
    assert ask(testing, "PUT", "/test/clock", {"now": "2026-01-01T00:00:00Z"}).json["now"] == "2026-01-01T00:00:00.000Z"
    job = testing.wait(testing.enqueue("generate", {"count": 3}).job_id, 20)
    assert {job.created_at, job.started_at, job.finished_at} == {"2026-01-01T00:00:00.000Z"}
    assert job.request["now"] == "2026-01-01T00:00:00.000Z"
    assert ask(testing, "PUT", "/test/clock", {"advance": "1d12h"}).json["now"] == "2026-01-02T12:00:00.000Z"
    assert testing.wait(job.job_id, 0)
    testing.clock.advance("1d")
    refused(ask(testing, "GET", f"/status/{job.job_id}"), 404)
    assert ask(testing, "GET", "/records").json["items"] == []
    for wrong, word in (({"now": "soon"}, "now"), ({"advance": "3 days"}, "advance"), ({}, "now"),
                        ({"now": "2026-01-01", "advance": "1d"}, "now"), ({"advance": "999999y"}, "advance"),
                        ({"now": "0001-01-01"}, "now"), ({"now": "1969-12-31T23:59:59Z"}, "now"),
                        ({"now": "9999-12-31"}, "now"), ({"advance": "-57y"}, "advance")):
        refused(ask(testing, "PUT", "/test/clock", wrong), 400, word)
    assert ask(testing, "DELETE", "/test/clock").status == 204
    now = datetime.fromisoformat(ask(testing, "GET", "/test/clock").json["now"])
    assert abs(now - datetime.now(UTC)) < timedelta(minutes=5)


def test_a_reset_makes_a_service_in_use_as_new(testing: taskapi.ServedUrl, tmp_path: Path) -> None:
    """With running, waiting and finished jobs, files, readers and long polls; nothing of before is written later."""
    folder = tmp_path / "data"
    done = ask(testing, "POST", "/generate", PERSONS, {"Idempotency-Key": "a"}).json["jobId"]
    ask(testing, "POST", "/upload", form(b"x" * 3000, "a.txt"), FORM)
    testing.wait(testing.enqueue("export", {"format": "csv", "after": done}).job_id, 20)
    running = [testing.enqueue("generate", BUSY | {"recordType": "other", "schema": {"n": "name"}}) for _ in range(3)]
    until(lambda: testing.wait(running[0].job_id, 0).progress.done)
    testing.faults.add(on={"path": "/jobs"}, then={"status": 500})
    testing.clock.set("2026-01-01")
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(ask, testing, "GET", f"/status/{running[0].job_id}?wait=30")
        assert ask(testing, "POST", "/test/reset").status == 204
        refused(poll.result(20), 404)
    assert (testing.requests(), testing.faults.list()) in (([], []), (testing.requests(), []))
    assert ask(testing, "GET", "/jobs").json["items"] == ask(testing, "GET", "/records").json["items"] == []
    assert plain(folder, "SELECT name FROM sqlite_master WHERE name IN ('person', 'other')") == []
    assert not [*(folder / "uploads").iterdir(), *(folder / "exports").iterdir()]
    again = ask(testing, "POST", "/generate?wait=20", PERSONS, {"Idempotency-Key": "a"})
    assert again.json["jobId"] != done
    assert again.json["createdAt"] > "2026-01-02"
    assert [item["count"] for item in ask(testing, "GET", "/records").json["items"]] == [10]
    testing.drain(20)
    assert plain(folder, "SELECT job FROM _id_ranges") == [again.json["jobId"]]
    assert_sound(folder)


# Snapshots


def state(service: taskapi.Service) -> Any:
    """What clients see of a service's data, with the content of its files."""
    jobs = service.queue.jobs.page(None, None, 1000, None)[0]
    files = {job.job_id: (service.folder.root / job.file.path).read_bytes() for job in jobs if job.file}
    types = [info.record_type for info in service.queue.records.types()]
    ends = [(job.job_id, job.status, job.result) for job in jobs]
    return ends, files, {name: service.records(name) for name in types}


def test_a_snapshot_taken_while_jobs_run_goes_on_as_it_was(testing: taskapi.ServedUrl, tmp_path: Path) -> None:
    """Four jobs stand in the middle: they end from there with the records they have without; files come back too."""
    shape = {"count": 900, "now": "2026-01-01T00:00:00Z", "schema": {"id": "sequence", "n": "name"}}
    done = testing.wait(testing.enqueue("generate", {**shape, "recordType": "done", "seed": 9}).job_id, 20)
    export = testing.wait(testing.enqueue("export", {"format": "csv"}).job_id, 20)
    testing.faults.add(on={"job": "generate", "done": 400}, then={"pause": True}, times=4)
    jobs = [testing.enqueue("generate", {**shape, "recordType": f"r{n}", "seed": n}).job_id for n in range(4)]
    until(lambda: testing.faults.list()[0]["struck"] == 4)
    made = ask(testing, "POST", "/snapshots", {"name": "half-way"})
    assert (made.status, made.json["jobs"], made.json["records"]) == (201, 6, 900)
    assert ask(testing, "GET", "/snapshots").json == {"items": [made.json]}
    folder = tmp_path / "data" / "snapshots" / "half-way"
    with closing(sqlite3.connect(folder / "taskapi.db")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert copy.execute("SELECT count(*) FROM jobs WHERE status = 'in-progress'").fetchall() == [(4,)]
    assert made.json["bytes"] >= (folder / "taskapi.db").stat().st_size + export.file.bytes
    testing.faults.clear()
    ends = [testing.wait(job_id, 20) for job_id in jobs]
    before = state(testing)
    assert ask(testing, "DELETE", f"/jobs/{done.job_id}").status == 204
    assert ask(testing, "DELETE", f"/jobs/{export.job_id}").status == 204
    later = testing.wait(testing.enqueue("export", {"format": "json"}).job_id, 20)
    for _ in range(2):
        testing.faults.add(on={"job": "generate", "done": 800}, then={"pause": True})
        running = testing.enqueue("generate", {**shape, "recordType": "other", "seed": 1}).job_id
        until(lambda: testing.faults.list()[0]["struck"])
        answer = ask(testing, "POST", "/snapshots/half-way/restore")
        assert (answer.status, answer.json) == (200, made.json)
        testing.faults.clear()
        refused(ask(testing, "GET", f"/status/{running}"), 404)
        refused(ask(testing, "GET", f"/download/{later.job_id}"), 404)
        again = [testing.wait(job_id, 20) for job_id in jobs]
        assert [(job.status, job.attempt, job.result) for job in again] == [
            ("completed", 2 - 1, job.result) for job in ends]
        assert state(testing) == before
        assert_sound(tmp_path / "data")
    assert ask(testing, "DELETE", "/snapshots/half-way").status == 204
    refused(ask(testing, "POST", "/snapshots/half-way/restore"), 404)
    assert not [*folder.parent.iterdir()]


def test_snapshots_have_names_and_are_whole_or_refused(taskapi_service: taskapi.Service) -> None:
    """A taken, bad or unknown name, a damaged, older or foreign database: all stays as it was."""
    service, root = taskapi_service, taskapi_service.folder.root / "snapshots"
    service.enqueue("generate", PERSONS)
    service.enqueue("export", {"format": "csv"})
    service.snapshot("one")
    before = state(service)
    refused(ask(service.url, "POST", "/snapshots", {"name": "one"}), 409, "'one'")
    for name in ("../one", "", ".", "a/b", "a b", "-a", "x" * 65, "é", 5, None):
        refused(ask(service.url, "POST", "/snapshots", {"name": name}), 400, "name")
    refused(ask(service.url, "POST", "/snapshots", {"nmae": "x"}), 400, "did you mean 'name'")
    for call in (("POST", "/snapshots/onee/restore"), ("DELETE", "/snapshots/onee")):
        refused(ask(service.url, *call), 404, "did you mean 'one'")
    refused(ask(service.url, "POST", "/snapshots/..%2F..%2Fx/restore"), 404)
    (root / "other").mkdir()
    (root / "other" / "snapshot.json").write_text("[]", encoding="utf-8")
    service.snapshot("gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.snapshots, "all", partial(list, service.snapshots.all()))  # as seen just before
        assert ask(service.url, "DELETE", "/snapshots/gone").status == 204
        refused(ask(service.url, "DELETE", "/snapshots/gone"), 404, "'gone'")
        refused(ask(service.url, "POST", "/snapshots/gone/restore"), 409, "'gone'")
    good = (root / "one" / "taskapi.db").read_bytes()
    with closing(sqlite3.connect(root / "one" / "taskapi.db")) as copy:
        copy.execute("PRAGMA user_version = 99")
    later = (root / "one" / "taskapi.db").read_bytes()
    for wrong, words in ((b"nonsense" * 999, "not a database"), (good[:len(good) // 2], "damaged"), (b"", "empty"),
                         (later, "later version"), (good[:9000] + b"\xff" * 4000 + good[13000:], "damaged")):
        (root / "one" / "taskapi.db").write_bytes(wrong)
        refused(ask(service.url, "POST", "/snapshots/one/restore"), 409, "'one'", words)
        assert state(service) == before
    (root / "one" / "taskapi.db").write_bytes(good)
    with closing(sqlite3.connect(root / "one" / "taskapi.db")) as copy, copy:
        copy.execute("UPDATE jobs SET file = json_set(file, '$.path', '../../evil.csv') WHERE file IS NOT NULL")
    refused(ask(service.url, "POST", "/snapshots/one/restore"), 409, "evil")
    assert state(service) == before
    assert_sound(service.folder.root)


def test_a_restore_that_finds_no_room_or_no_pause_leaves_all_as_it_was(
        testing: taskapi.ServedUrl, monkeypatch: pytest.MonkeyPatch, script: Callable[..., Any]) -> None:
    """The files that it had put there are gone again, and jobs go on."""
    testing.wait(testing.enqueue("generate", MADE).job_id, 20)
    testing.wait(testing.enqueue("export", {"format": "csv"}).job_id, 20)
    testing.snapshot("one")
    testing.wait(testing.enqueue("generate", MADE).job_id, 20)
    before, files = state(testing), sorted(testing.folder.kept())
    with monkeypatch.context() as patch:
        def full(*_: Any) -> None:
            raise taskapi.DiskFull("the disk is full")

        patch.setattr(taskapi.Database, "load", full)
        refused(ask(testing, "POST", "/snapshots/one/restore"), 500, "the disk is full")
        patch.setattr(taskapi.Database, "copy_to", full)
        refused(ask(testing, "POST", "/snapshots", {"name": "two"}), 500, "the disk is full")
    go = threading.Event()

    @script
    def one(context: taskapi.JobContext) -> taskapi.JobSteps:
        go.wait(20)
        yield
        return taskapi.JobResult({})

    stuck = testing.enqueue("script", {}).job_id
    until(lambda: testing.wait(stuck, 0).status == "in-progress")
    monkeypatch.setattr(taskapi, "_HELD_SECONDS", 0.05)
    refused(ask(testing, "POST", "/snapshots/one/restore"), 503, "pause")
    go.set()
    testing.queue.remove(testing.wait(stuck, 20).job_id)
    assert (state(testing), sorted(testing.folder.kept())) == (before, files)
    assert [item["name"] for item in ask(testing, "GET", "/snapshots").json["items"]] == ["one"]
    assert not [*testing.folder.tmp.iterdir()]


@pytest.mark.parametrize("live", [True, False], ids=["beside a server", "alone"])
def test_backup_and_restore_by_command(tmp_path: Path, run: Callable[..., Ran], live: bool) -> None:
    """One file, beside a server and without; into a new folder too."""
    with taskapi.open_service(tmp_path / "data") as service:
        service.wait(service.enqueue("generate", PERSONS).job_id, 20)
        service.wait(service.enqueue("export", {"format": "csv"}).job_id, 20)
        before = state(service)
        with service.serving(port=0) if live else contextlib.nullcontext():
            if not live:
                service.close()
            assert run("backup", "all.tar.gz") == (0, "", "")
            assert run("generate", "company", "--count", "3").code == 0
            assert run("restore", "all.tar.gz") == (0, "", "")
            assert "company" not in run("records").out
            assert run("restore", "all.tar.gz", "--data-dir", "new") == (0, "", "")
    for folder in ("data", "new"):
        with taskapi.open_service(tmp_path / folder, inline=True) as service:
            assert state(service) == before
            assert service.snapshots.all() == []
        assert_sound(tmp_path / folder)
    assert not [*tmp_path.glob(".*.part")]


def test_an_archive_that_is_not_a_whole_backup_touches_nothing(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """Names that lead out, links, devices, what is too much, missing, damaged, of another version or program."""
    with taskapi.open_service(tmp_path / "data", inline=True) as service:
        service.enqueue("generate", PERSONS)
        service.enqueue("export", {"format": "csv"})
        before = state(service)
    assert run("backup", "good.tar.gz").code == 0
    with tarfile.open(tmp_path / "good.tar.gz") as good:
        members = [(member, good.extractfile(member).read()) for member in good]
    note = json.loads(members[0][1])

    def packed(changed: dict[str, Any] | None, *extra: tuple[tarfile.TarInfo, bytes], skip: str = "") -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            about = json.dumps({**note, **(changed or {})}).encode()
            for member, data in [(members[0][0], about), *members[1:], *extra]:
                if member.name != skip:
                    entry = member.replace(deep=True)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        return out.getvalue()

    def entry(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
        made = tarfile.TarInfo(name)
        made.type, made.linkname = kind, to
        return made

    def listed(name: str, data: bytes = b"x") -> dict[str, Any]:
        return {"files": {**note["files"], name: [len(data), hashlib.sha256(data).hexdigest()]}}

    whole, export = (tmp_path / "good.tar.gz").read_bytes(), next(name for name in note["files"] if "exports" in name)
    wrong: dict[str, bytes] = {
        "cut": whole[:len(whole) // 2], "flipped": whole[:-4000] + bytes([whole[-4000] ^ 1]) + whole[-3999:],
        "empty": b"", "text": b"hello", "gzip": gzip.compress(b"hello"), "trailing": packed({"format": 2}),
        "no note": packed(None, skip="snapshot.json"), "no database": packed(None, skip="taskapi.db"),
        "a file missing": packed(None, skip=export), "a file twice": packed(None, (entry(export), b"x")),
        "another's": packed({"files": {}}), "note of nothing": packed({"files": None}),
        "a name": packed({"createdAt": 5})}
    for name in ("../evil", "/tmp/evil-of-taskapi", "uploads/../../evil", "evil", "uploads/a/b.txt", "exports/.."):
        wrong[f"out by {name}"] = packed(listed(name), (entry(name), b"x"))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        member = entry("uploads/x.txt", kind, "/etc/passwd"), b""
        wrong[f"kind {kind!r}"] = packed(listed("uploads/x.txt", b""), member)
    for name, data in wrong.items():
        (tmp_path / "wrong.tar.gz").write_bytes(data)
        ran = run("restore", "wrong.tar.gz")
        assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1), (name, ran)
        assert "wrong.tar.gz" in ran.err
    assert not [*tmp_path.rglob("*evil*")]
    assert not Path("/tmp/evil-of-taskapi").exists()
    with taskapi.open_service(tmp_path / "data", inline=True) as service:
        assert state(service) == before
        assert service.snapshots.all() == []
    assert_sound(tmp_path / "data")


# Three clients as people write them; each fails without what it is for


def test_a_poller_survives_a_cut_connection(testing: taskapi.ServedUrl) -> None:
    """It asks again, and does not post again."""
    def finished(url: str, job_id: str, careless: bool) -> str:
        while True:
            try:
                job = json.load(urllib.request.urlopen(f"{url}/status/{job_id}?wait=5"))
            except (OSError, http.client.HTTPException):
                if careless:
                    raise
                continue
            if job["status"] not in ("pending", "in-progress"):
                return job["status"]

    job_id = testing.enqueue("generate", MADE).job_id
    for then in ({"close": True}, {"close": True, "after": 20}):
        testing.faults.add(on={"path": "/status/*"}, then=then, times=1)
    with pytest.raises(OSError, match="closed connection"):
        finished(testing, job_id, careless=True)
    assert finished(testing, job_id, careless=False) == "completed"


def test_a_download_is_resumed_where_it_was_cut(testing: taskapi.ServedUrl) -> None:
    """With Range and If-Range; one that begins anew each time never comes to the end."""
    def download(url: str, resume: bool) -> bytes:
        data, tag = b"", ""
        for _ in range(6):
            headers = {"Range": f"bytes={len(data)}-", "If-Range": tag} if data else {}
            request = urllib.request.Request(url, headers=headers)
            with urllib.request.urlopen(request) as answer:
                tag, data = answer.headers["ETag"], data if answer.status == 206 else b""
                try:
                    return data + answer.read()
                except http.client.IncompleteRead as cut:
                    data = data + cut.partial if resume else b""
        raise TimeoutError

    testing.wait(testing.enqueue("generate", MADE).job_id, 20)
    job = testing.wait(testing.enqueue("export", {"format": "csv"}).job_id, 20)
    testing.faults.add(on={"path": "/download/*"}, then={"close": True, "after": job.file.bytes // 5}, times=20)
    with pytest.raises(TimeoutError):
        download(f"{testing}/download/{job.job_id}", resume=False)
    data = download(f"{testing}/download/{job.job_id}", resume=True)
    assert hashlib.sha256(data).hexdigest() == job.result["sha256"]


@pytest.mark.parametrize("entry", SERVED, ids=lambda entry: f"{entry.method} {entry.path}")
def test_an_unknown_name_in_a_query_is_refused_by_every_call(live: Live, entry: taskapi.Route) -> None:
    """With the nearest of those that there are."""
    known = [*(field.alias for field in entry.query.model_fields.values())] if entry.query else []
    path = re.sub("{[a-zA-Z]+}", "person", entry.path)
    body = PERSONS if entry.body else None
    if "{recordType}" in entry.path:  # its fields are names too
        live.job(live.make("/generate", PERSONS), 30)
    answer = refused(live.ask(entry.method, f"{path}?{known[0] if known else 'colou'}r=1", body), 400)
    assert answer["fields"][0]["field"].endswith("r")
    assert not known or f"did you mean {known[0]!r}" in answer["error"]


def test_a_post_may_wait_for_its_job(tmp_path: Path) -> None:
    """The same status code and object, once it has finished or when the time is over; for each call that makes one."""
    with taskapi.open_service(tmp_path) as service, service.serving(port=0) as url:
        for path, body, headers, status in (
                ("/generate", PERSONS, None, 202), ("/export", {"format": "csv"}, None, 202),
                ("/upload", INGEST, FORM, 201), ("/upload", form(), FORM, 201)):
            answer = ask(url, "POST", f"{path}?wait=30", body, headers)
            assert (answer.status, answer.json["status"]) == (status, "completed")
            assert answer.headers["Location"] == answer.json["links"]["self"]
    with held(tmp_path / "held") as (service, _), service.serving(port=0) as url:
        answer = ask(url, "POST", "/generate?wait=0.05", PERSONS)
        assert (answer.status, answer.json["status"]) == (202, "pending")
        refused(ask(url, "POST", "/generate?wait=31", PERSONS), 400, "wait")
        assert len(service.queue.jobs.page(None, None, 10, None)[0]) == 1


def test_at_most_half_of_the_threads_wait_for_jobs(tmp_path: Path) -> None:
    """A further one is answered at once, and so is everybody else; the others when the job ends."""
    with contextlib.ExitStack() as stack, held(tmp_path, threads=4) as (service, runner), (
            service.serving(port=0)) as url:
        job_id = ask(url, "POST", "/generate", PERSONS).json["jobId"]
        polls = [stack.enter_context(plug(url)) for _ in range(2)]
        for poll in polls:
            poll.sendall(f"GET /status/{job_id}?wait=30 HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        until(lambda: service._polls._value == 0)
        assert ask(url, "GET", f"/status/{job_id}?wait=30").json["status"] == "pending"
        assert ask(url, "POST", "/generate?wait=30", PERSONS).json["status"] == "pending"
        runner.run()
        assert [parsed(rest(poll)).json["status"] for poll in polls] == ["completed"] * 2


@pytest.mark.parametrize(("method", "path", "body", "headers"), [
    ("POST", "/generate", {"count": 1, "schema": {"turn": "name"}}, {}), ("POST", "/preview", PERSONS, {}),
    ("POST", "/infer", form(), FORM), ("GET", "/fields?locale=fi_FI", None, {})],
    ids=lambda value: value if isinstance(value, str) else None)
def test_what_computes_for_long_waits_for_its_turn_and_nothing_else_does(
        service: taskapi.Service, url: str, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: Any,
        headers: dict[str, str]) -> None:
    """Beside a computing job; and not for ever, but until 503."""
    monkeypatch.setattr(taskapi, "_LISTED", set())
    assert ask(url, "POST", "/generate", PERSONS).status == 202
    with ThreadPoolExecutor(1) as pool, service.queue.gate.turn():
        with monkeypatch.context() as patch:
            patch.setattr(taskapi, "_LONG_POLL_SECONDS", 0)
            refused(ask(url, method, path, body, headers), 503, "busy")
        waits = pool.submit(ask, url, method, path, body, headers)
        until(lambda: len(service.queue.gate._line) == 2)
        assert ask(url, "GET", "/jobs").status == 200
        assert not waits.done()
    assert waits.result(60).status in (200, 202)


def test_links_hold_only_what_answers(tmp_path: Path) -> None:
    """Records once there are some."""
    with held(tmp_path) as (service, runner), service.serving(port=0) as url:
        made = ask(url, "POST", "/generate", PERSONS).json
        assert made["links"].keys() == {"self"}
        runner.run()
        done = ask(url, "GET", made["links"]["self"]).json
        assert done["links"].keys() == {"self", "records"}
        assert len(ask(url, "GET", done["links"]["records"]).json["items"]) == 10
        for link in ask(url, "GET", "/health").json["links"].values():
            assert ask(url, "OPTIONS", link.replace("{jobId}", made["jobId"])).status == 204


def test_larger_answers_are_gzipped_for_who_takes_that(url: str) -> None:
    """But no download, and nothing for others; HEAD says the same."""
    job = ask(url, "POST", "/generate", {**PERSONS, "count": 100}).json
    path, takes = job["links"]["records"], {"Accept-Encoding": "br, gzip;q=0.5"}
    whole, packed = ask(url, "GET", path), ask(url, "GET", path, None, takes)
    assert (whole.headers["Content-Encoding"], packed.headers["Content-Encoding"]) == (None, "gzip")
    assert gzip.decompress(packed.body) == whole.body
    assert whole.headers["Vary"] == packed.headers["Vary"] == "Accept, Accept-Encoding"
    assert ask(url, "HEAD", path, None, takes).headers["Content-Length"] == str(len(packed.body))
    for accept in ("identity", "gzip;q=0", "*;q=0", "br"):
        assert ask(url, "GET", path, None, {"Accept-Encoding": accept}).headers["Content-Encoding"] is None
    file = ask(url, "POST", "/upload", form(b"x" * 10_000, "a.txt"), FORM).json
    assert ask(url, "GET", file["links"]["download"], None, takes).headers["Content-Encoding"] is None
    assert ask(url, "GET", file["links"]["self"], None, takes).headers["Content-Encoding"] is None  # short


def assert_down(url: str, *, reads: bool) -> None:
    """Asserts that health is 503 and that whatever needs the database answers 500."""
    health = ask(url, "GET", "/")
    assert (health.status, health.json["status"], health.json["database"]) == (503, "unavailable", "unavailable")
    assert health.headers["Retry-After"].isdecimal()
    assert health.json["errors"]
    for path, body in (("/generate", PERSONS), ("/export", {"format": "csv"})):
        refused(ask(url, "POST", path, body), 500)
    for path in ("/jobs", "/records", "/status/0192"):
        assert ask(url, "GET", path).status in ((200, 404, 500) if reads else (500,))


def assert_up(url: str) -> None:
    """Asserts that service is as it was before."""
    assert ask(url, "GET", "/").status == 200
    job = ask(url, "POST", "/generate", PERSONS).json
    assert ask(url, "GET", f"/status/{job['jobId']}?wait=30").json["status"] == "completed"


def test_a_database_locked_by_another_process_is_said_and_waited_out(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the busy timeout; reading goes on, and writing once it is free."""
    program = ("import sqlite3, sys; other = sqlite3.connect(sys.argv[1], isolation_level=None); "
               "other.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); sys.stdin.read()")
    with taskapi.open_service(tmp_path) as service, service.serving(port=0) as url:
        assert_up(url)
        with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "taskapi.db")], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == "locked\n"
            with monkeypatch.context() as patch:
                patch.setattr(taskapi, "_BUSY_SECONDS", 0.1)
                assert_down(url, reads=True)
            assert len(ask(url, "GET", "/jobs").json["items"]) == 1
            other.communicate("")
        assert_up(url)


def damage(path: Path, how: str) -> None:
    """Overwrites or cuts off a file where it is."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if how == "noise":
            file.seek(0)
            file.write(b"noise" * (size // 5))
        else:
            file.truncate(0 if how == "empty" else size // 2)


def checkpointed(folder: Path) -> Path:
    """A copy of a database that another connection has brought up to date."""
    with closing(sqlite3.connect(folder / "taskapi.db")) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return Path(shutil.copy(folder / "taskapi.db", folder.parent / "copy.db"))


@pytest.mark.skipif(os.name != "posix", reason="an open database cannot be replaced")
@pytest.mark.parametrize("how", ["noise", "empty", "half"])
def test_a_database_damaged_while_it_is_open_is_said_and_a_restart_takes_a_restored_copy(
        tmp_path: Path, how: str) -> None:
    """Health stays 503 once a request or a job has met the damage."""
    folder = tmp_path / "data"
    with Live(folder) as live:
        made = live.job(live.make("/generate", {**PERSONS, "count": 3000}), 30)
        copy = checkpointed(folder)
        damage(folder / "taskapi.db", how)
        for path in ("/records/person?limit=1", "/records/person?limit=1&after=2500"):
            assert live.ask("GET", path).status in (200, 500)
        until(lambda: live.ask("GET", "/").status == 503)
        assert re.search("damaged|overwritten", " ".join(live.ask("GET", "/").json["errors"]))
        assert live.end() == 0
    for beside in ("taskapi.db-wal", "taskapi.db-shm"):
        (folder / beside).unlink(missing_ok=True)
    copy.replace(folder / "taskapi.db")
    with taskapi.open_service(folder) as service, service.serving(port=0) as url:
        assert_up(url)
        assert ask(url, "GET", f"/status/{made['jobId']}").json == made
    assert_sound(folder)


@pytest.mark.parametrize("how", ["noise", "empty", "half", "removed"])
def test_a_database_damaged_while_nobody_runs_is_left_alone_and_so_are_its_files(tmp_path: Path, how: str) -> None:
    """StartupError that says what to do; with the copy back, everything is there."""
    path = tmp_path / "data" / "taskapi.db"
    with taskapi.open_service(path.parent, inline=True) as service:
        store(service, {"text": "text"}, [["x" * 1000]] * 500)
        exported(service, "csv")
    copy = checkpointed(path.parent)
    path.unlink() if how == "removed" else damage(path, how)
    left = path.read_bytes() if path.exists() else None
    with pytest.raises(taskapi.StartupError, match="restore"):
        taskapi.open_service(path.parent, inline=True)
    assert (path.read_bytes() if path.exists() else None) == left
    copy.replace(path)
    with taskapi.open_service(path.parent, inline=True) as service:
        assert statuses(service) == ["completed"] * 2
    assert_sound(path.parent)


def test_a_folder_that_version_1_wrote_opens_with_all_that_it_holds(tmp_path: Path) -> None:
    """Jobs, records and files as they were; what was interrupted ends with the records that it would have had."""
    packed = lzma.decompress(base64.b85decode("".join(VERSION_1.split())))
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(tmp_path, filter="data")
    before = plain(tmp_path, "SELECT id, request, result, file, created_at FROM jobs ORDER BY id")
    guests = plain(tmp_path, "SELECT * FROM guest ORDER BY _id")
    made, uploaded, exported_, interrupted = (row[0] for row in before)
    with taskapi.open_service(tmp_path, inline=True) as service:
        get = service.queue.jobs.get
        assert statuses(service) == ["completed"] * 4
        assert plain(tmp_path, "SELECT id, request, result, file, created_at FROM jobs ORDER BY id")[:3] == before[:3]
        assert plain(tmp_path, "SELECT * FROM guest ORDER BY _id LIMIT 5") == guests[:5]
        assert (get(made).progress.done, get(interrupted).attempt, get(exported_).after) == (5, 2, made)
        for job_id, content in ((uploaded, b"as they were\n"), (exported_, b'"recordType","id","name"')):
            with service.folder.open(get(job_id).file) as file:
                assert file.read().startswith(content)
        again = service.enqueue("generate", get(interrupted).request)
        rows = [[row[3:] for row in plain(tmp_path, "SELECT * FROM guest WHERE _job = ? ORDER BY _id", job_id)]
                for job_id in (interrupted, again.job_id)]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 30
        assert [row[3:] for row in guests[5:]] == rows[0][:20] or faker.VERSION != "40.63.0"
    assert_sound(tmp_path)


# A data folder of version 1.0.0, tar and xz: a generate job, an upload, an export after it, and a generate job that was
# killed after 20 of its 30 records.
VERSION_1 = """
{Wp48S^xk9=GL@E0stWa8~^|S5YJf5;gA0q=Uo6Yo(e?Ds_M7!ci=yY(Y^&rkL1ZTk2zBMuM~7}!{1lRhu4XzOilDtwj+s=D0p&Vvc*X;JL_GoaS!O>a=y
V&R3p1om2p4QX0MIxYL>)9lTNLpD4xlw;Ss1smc2eJp4+I3)){1#l43&JnPT4d4;KVJmC2^v_t~#D6&rIh;i>3S^q?FAq$~|c<HwsrL*i*lj4T#XiuXdzs
4_<~Jh_xYgtS(27G}$zz_6S`_i^^=r}Juq-`!=Zu|L8-hmat{O*_LQQ%BM&aKdu-hBzuwMp^$UVE`PNsxs_llRbs}7T08#mvtI*5YHWWCz7C&cd@Iij-g*
f;V2_)?1B>dh7nQvt*Qz;Tq2incn6)k^Zjnb(>QF=oU5j54H-J<YyOvdS#D2hkIf*T<Dbe#Ng*8q3>Lm=b%q?b6bZBf=2h7lZ0i+IX;NU$i<hhS(e8YI2z
y}o1Pi2I9&BrTiCygS5Y13=?0ot(ajj?+;r9_D(f@ylm^@C(fOz<0^D)E}Lu1xZ5zJu7{1dycL1R24pEcpfAN8en;!usr!QE<9rn9NA8%&t#$|(}K16@%Q
@G;x8071v@x35topwSR^wOZZdQqCDYOMjVi0_8m&bO(Aj8t8Jo1~Qw!Lh&S|S{1cq6h+q-e?Heb96jaEy^62xniV?bDE0as<-~wyr0X?*BmSW`a9j)sUaT
Fg^?IHR{pQ9P$h_K1EoXvfyCL(NFu;(|+F49JT)!ZAhC56{s$z8_S7Ka6G=pRIWv934;>by0CfW0lKqwyNu6U*}^(pkZs4~mzgy)M{R$5zqg<dFzVA{OFm
-#uhn}bW9w&=u>|0|4<POTf;Iwh36<)=kN={hK6^7H@$s}|(c2?C!!g{W$%H)@x<DQFSXBNg(~sS#~KX<ZA%iThPtu)?9rNu0s=B}si(u-J<S@-WJlTQro
Bln#%<$t6K(W@rYFp~WhSiAuF7zCOb1NMfUBS_y?gb?$C_f8!lDvIcbIxvl*!$?-vG8$TWc|CX<qGU$rI4>CH6bU|P3(*@+#H^yJvUB#+Zc~_ibMJh~m6^
ht^Y4evqLoJ^%3U(`_{g2ia(LL$h#F$!Adif=@>7jgk6?HWYR7c!sPmj#9?52vO%-vl*i<qc~K0yd6v09j%3~PmDM5d0`E+2x1o_RQ|6QZUyVH#>IA^&G$
<O?}xZkNh(aL8*$k!vResnCdP@msnokFYM77(tU^<RrphNFYKmoZ=7-l97xt7zVlJQ0`n6YLyu4!hqCmC8fdyiIWTnhXSh(hdYx+CR@cgGB)lA%Ku;(&1!
A9?3ZaT&7(h79y0DpSx8=}iWo(6Fp$GzxI8EovPDeA7>~WevK;s|J=E6WmFyM#XtYwRE=~z={9_P@m?e80m$9i!^o`!#geUEI<2;;5R!SPdxmEHVi1%nQa
6HXGT3@{JEng5;pUnAK%otr<Xy5HvH)vC3lk7m8Z#PwUixrr)L!8-4w;Yd`p0bvKQHSjJP!rzlR&}>-$6RNbwUTv|%wXziQHiKrNwnH26(&b1s4Ti=dMYV
-?5F$3D3UuRESOcKh##cxH7pp0iL_M%RyqTRj7yPoX@$Yi*n<R<%P-D$dv{mVI^FngGb(RsXFj<X7@l)4i8pyRbhU%0<vJvUk#h}3OdT27l!TCy%pIFDg-
h3nq0uaD9i%DA<^K@?0O#3)AqU=R^9yP6uk6<3mNITvOug!^%TtfrK*h3PKhKQFyn%4%kld_=#ws1qE69AW3Yz`SDMGyQM48^JU2Y6Sv)h-aecxJh!m?ZS
il5Orr8yQ|)Ydp16ZY+4)>UbA;*2>s#(txlz<)<H<G@1zs9yS(&;m6LgdFjUK<N~eVq({K1D8gWQ<j^Lns-`T`OX)G!7(h|x{VTzHV-x5Dh~Z>jE8*4keP
MBgFMQCRZ%)OHwv|>%Kn@<PymfgHy|x4@^!W1883G;mK1XP_B^fiNgaO-_pI-aU53!mpePquFBIwdI4xqeo08SE;^~U?zIUM+*vT{C{yiRVppwV^(B&TDk
0RQ>Q5m^21`BPT+(k*2bQicd^#7!7M*4zk^cG_%*XtQ|d&_&Jr42ZND`q&WMDDN)pLhl7sNkPSW{dQjAh7yXD9~nhBEK~6w^<e&BEI~7+4#;a&XAT$J|_o
QE%MyEoJ4FFg18cUX)KFa3L#|ehtTOj&H4x>9wN^fZ2-<6Q#hbW+oppM41Coj`u)*1NExlpFCAZ&Qa2In^vEpJgWC3#m!<-3cy}+)=U<9onhBLtMjqiO(H
>9WLx;qCjS3F3=Cyd8%~lzS=vKeq<tFZMH~%v?Z2{T6*GA@tW?YqYMTI0AF(y(9DhB0`9Pm<=f%Fp<SUhBG`KoZaSi1HHwCo7|1Uk1*7xeD~eK6}_5;Z^Z
UO_|VM5kWP4Vkcj;&>ZcskOXrjn<!%jfzO0<A@cg@yB-=%cnx#+fYoMXYe%KoRSLad&?OgNs%q&Gqnru-up~=deO0!f@@m)L5&CuiR6NTYvg52l=Wq6GzR
J#!|_MSiY%0F)UH7Lhj_&?@~*G0J^Q`f3e8)atVY-JSzm+)&*!4bNMe&(9yJSUb*U4`Lv}w<kW&ZHBd7GOJC%(!M2$v~@q`~0HOZvut~k0<=BNC|aBTpFw
lr4msoZ~v0oEACaiWGNUv3@0Yu4ti!2fQ+5msJLacZNYFrm#f^IT_oSkyz@g-s3K8jkdYYmk)};Hyc9(RWpaE3m~4qP*YB|LZ%e$Hmi6P_dR0TjVCE)(Xb
R{tfJZK6p+d7T}Fmb;R5Oopu{vvwP&Cwx2}wTklr21eNfPI3w)#rDPdmkqrN9?=l3d^sTC#CcU6KI7CMEK#gS>W~`GXH!SyA)s2>TW6H7}KO|Pn2{Ee%P&
_=pZ>C+hRd8dXXl5oTbYa6u8(%7}{IQQiEl-1?fp2bq;T<l`ONN*|D0!_*9!3a3KBCH<n93K!&VqG2Q>!+V;Qv(<h4E`1h<#Bbfy9jHW)UdskY-Y<U7s7&
nsg~_91$kT4q1e^%qU0xy^6eV{UxUkBp2DAcA;n91VK42E`@#d;Jt$WnKCCG6+K+t=UI>>f{*!@f$a(So3#@uEsOnNU9ti<MOX5!vxB=ZL`#C#wDZjfxkm
@9y(`GjbTpUBK0l<lm=>^sb&5tHq-qbA1gjOqRHD2o3^D;whIeU<{>jn;tz4`tHk9XtEeA@JEn!eVv83`0)(tq+;Xq&IPnO;v%gsdEd9bFkVECo@XkXhyX
a9pknIad5>u*o(8M{l@8Y?l8teMTm_dZ)T6rOgA^nqaB)d_S;K1%&PLdaevt)LV6`ebp!yvcSCn2B~ND>+_YB3t)|WUQUbIzI{o78<^-5?eG9%F`2MfGiM
Oxq{W@+^s?-6DiIE5PX`5*17_`KcoB=qo7_Ae3ci8Io9O;(oCR~7e<4`>4FH|0Wzb~oJ}V+l^e^_#J`vw^j0{ujvk^CtB|&?(LTYn2*?=DS3?1MQ&AQOVP
8&sNCxs@D++h$g;=-k6N>Gg(1<dXd7d`AFS~?`DyNyNf*3Abk*R%mEW7=JwE{{PEqh}U+g=$g|76-!w=%g><SUqF66=p1xi*T(vJ=MXd~|2wlkvPkx}+7T
W!tXk`})pe@B-M;GLoha^r5KRwCL=5)tAJ{TTsXIG7e_4c!8SCuS^MCpQ1tzrs^f{Ow|Uq2p(5l4exn*xaF!zMZNE6`Vk3!z1RVgPU4mweu<71UwFTGO@_
BE*PO!~0_Xos@#XTrY4AQ%ma;;+7uQ1O*=a3;psS3YXpWuc3fh8QJbq#>NX5rDzMOT|_w02$<Bob&0ob(HI~9p%a!TDoyS?{(N#W@t($w9Fl(~Rm&y&D5M
((}!FJx#`2?+aZkl^lr{C6$R$usL}*<-WbYHh_~_H(TIYYKyYvaE7mIM3U+CmDZ>Dm@N`Wm)$KdAG;LSZLHTS?I1S7xPZC@NYt8mqyLvHCc}Jn)Zn$Y_B{
h%HmbxsPU5`pv5&{0c+^tw;S;2_e4Z4{HX~k`F>=^fOB$_KM)P+Xu*LbN~jhYjCQ$pad^#jW#`ksJjb^>n}~7hz0#h+I2+Q(po3ga71FTu&7{(oxEF<+EH
{bPFbdPX27Nd1X|ig?<ar0nV)b=IKaNAj`Q$H}VhBAoKF#aD3C1Ip3O7ly(}K-sFxOLF_;YLn5v^D9EQJ+euMVk|KkjlX#5vGuAzBlCFze#|H^K3J87>LS
(Syd|Y=13&;PskRE4&-MEV!l*1g|aH`mQoPzgA^4VdDTbf~A^^Dkh~2`t*f7RGb_u<o%*h4JiFn$+Zn?aBAjwO~MkbqGW>y=f|r>!uT1Z^CzE-n0B7T!UI
{@GVb~aGFbq(bSzs!xhB5z%2$f)Py#nn=>Dv;)B$3%r+GXVCvIZICyf%MRsf_^>y|1~q^SCa5;}_-XsZwYLu5*~5OXFZyvbX3gGHbNx@|!&tQP;o_o{g=I
MM?^uT_28rzASGn$_#YsnsCxK06i;ZrhM3HxTx>_+cUI$+smZd`^aj1(o?+0_we2-7}|Wm%#1@s33$#1KmwX0-N%v?$)D6zq!Q>dsx@Tq4gy=j?7!jWt)j
}ediqgirhLxgC**9UeYOQGZSj$m@l9gPK;5*z64<&LkxY#^5aWps3(Z=N<dapCu!9kP|jEdre*M%ld&8^XO&G1B)yXRu8}0Anl3d{!h-y?DHuB!!G5Og<e
LrwR7^7&ct#rT9L<NZGMuG$-RLQziHvjDp|lx8Db9hE7~IrN{;z1(jlv+a*ieMz8p&%WDzRi?Z%X@@fWbm~oMn~1Vt2rH6ta=R9kZCK$qfk>c>3E(imaz{
I7r55)2v7Mx8YrXpsC?ZU0c4yvb%{J@3dNBj-Z>2h`l2mEXj`N4@;%?E8sxbos3T;e0(6Kyk#;Xfs>BrxvF-C3q4uNu$}0pm)}Alb(^f;-ab+Wno`a;YLh
qXc7;lSOa9c&o{!1~P%+IB&>Y`JWNKN0H<0ISie1FE?s_<pfMjZoo?t9*i^2Cu4&t6Nd@eL3e{u7b?C`AV3f~Dcg<Yk5R&c2jZ+Mtd<yo`*GKtluyS>Ar<
5qzC6mYg8Z{?xquxV|&B40JlBWde@&z|PF4Y02$1koN_fC5HHUSX>*MEWfHb3oz;FbJTcdD_|b|F9M&lYR9<hDYmZ>DdVb^YibKWer%WQ^-MTEj^HEwm+u
)pySfT<0Lnsh^!wd97Z9uM5%QW#_BuL?Op<G?;1NoYjB-74cEqAowT)Jiwu`3g$m@<^({KK7VBrOVIVPjl8MM`G-uv>tS`uDsUK-JEmBd{jLMU0tE0U>pu
Zvw*X~syTX}>;VGrh9in<d9SU<*Vn(}jab(dTZALRG2*6=2wJ_FQo6><9A&hv(JF<n?X2}<JRk#sb+?)&pm0~2q^Y+|;(%MVyh@6GuPN`9di*nJICIFp$w
4e$SGr6#nk!rnDpEZ|-Hr4orbqnH+ATm;(u*bCyx{0AInkfRCLH^R;-I0>*Bu~+`BVa4W;R5{!AE29U}0qI9}-+NG;B2LLrPr_8yiwYb7;*R;G2^d89nH=
{4j+kYYu`^7V7TL8NOWh?GRuS2<xG-?G9h#iNZ65`9bvq^5w|_)j?gH^2SwQ(o=H)B?${zKJI49TERg3Zdb)+k1c5PTIks*bW%*l%nu9s9Ho3blTvVI+N!
uY$pln82;o|29ZG<{Us8TSv)3n}r7Us(}aQA@Tg(77KVUeOwi9$&Kj9Wa%zDu3KXBgJ*o+$DE4XTfLwEl&m&flv_=ztyHWQ>N*g;@XOF?b1(ggA=kgS18`
|hIpsK!Q7nXqwPe}-0we%2Pvg>E_=2l_&&}~W!EZj%mVnQ_!B}+jGZc_6(1Y?N2Kqn_`Ar@^UCM4cT8O<d3r+r={Qg8sa%7x8V%jxfZOlSN9G=wD~8&Y7&
N)hXpU_ic0Qi9(<8q4!Ad>$ln~rhyI&aw_F22@+`HkHbzlZf1Ieh76@G2EGi~_p1u(1u0fFwy@5tou<Ze``n*hhtMQMlO2bOBJao4tkm2+T5#e1<gZQaBi
YvrF?*7$TM*k5k9Qu7`bwjFMPCh^8VlQEP@<O}V2QCvH&d2Vw;7&u&?D7KVqRBG1*&2dH%XRo6+Jf#-A-?hzlAW=c^=Lk*CUS5{v{LYtZuO+sfu7N+grnG
$Bj{<$?)e61rPBc3^cSYm9v2ErM0Xq?s+`$ZUXu5woyN~0qLLz@coEc4?GA*U#EucQ_KR!^y(MMe{5ad-ej&fyn2Ysn3`u~-9BJ!?*R<Cpd@fh)sx?|iG@
?1e~cd{<?ndp)EIPNq+GtXz%Zh8d139vCw8Ou13NN$iAULjf%VyM(jaI>9Ufi~YM*eEd(JjXkIkOi}J##<nWI2MBV%({X&+*Zu_hX1G6qhJ`AO3YV<q((v
ORnwb(I`WoyRRD;!lUU{6%b`MTthNI?rv;J5UZA_9P(S?;67o23fse@!nS!r`e5KP<?IiA}Zxxq9%LMH4HrS%4Cy*ob5?PCy)i!V*e)v5e)@BmWX&epY`D
8NN*`^wgb6DpG^}(w!*MmL~?;%}J@Ks*LDXCX4EE1Da7{#G%w=hF<uqc!^Z{<QnxQeU4t5(bkFN8S9h17*QNhg<3x4sic5%Fs6%iS$~k%N|=AIE3-zlw39
YZwvl3YMwbsdYloA(9OQapZIdq-2<vXcr%#MD`Wptgawn$V!3VZ=b%;@R5@d@ZpN^Z=!dmj&mu~`jTM9niCC*YE40LZD#{eBC-=9V>U_ez^UwXMoLGjV<y
GX?eu}q5k@MKkh8tkNXVunR6}#ib-#6D;>*jDCyZchkI8c;uriA%!*qOR^u~d|4#bYz&z*Wx8n<IpIqC3Y5f#T=L_V4ZV4Aa{I<X69{f;O31m=_!n7mzWq
&~&nRp}%NyaKW(wo#zUz%PTSHI%DVetQ*AinzOw*QT#~@RgyRkPh}sZ?zFJ^?7bk-_ZhP^FM^88-g2Rr5ElvD2YH28YNp!ED}XzrP<~LHt^H<S~v64H}}&
<e;dhO)^m>%b=xq`rkry$F@RG|tkArO=?HotG|>Q&LsP0UXjpvJt^zA<kxmN#UaPpkGMFpMc)c9oV%C&?mlBCbVACbwal5nPeOf_;n&AWnUiFK0b|Hc#CV
)?Myp9H)x`ZWpR_>$ZKbqUt4P^*ggAh2AcQ7vYf$^f=vj=rjzaeho7?se(jNN1Ehc*n8k@pz)N2=&^H}gDymfbG^iq0=al(Emv?D=*y&gw1AT^_DqN#a;x
Ioi<;Ofsjidvc%0x){oEtJ6FbKn5byx9t}R3Sl)(T#xQ#lXR<HD;7UZ3(GwT+D`33+B_j!o;~3JzXR2T^oJ1ky)l0PW7xN!w-r*F0`AT~5YA4tA>z^6?pv
2i^vafNI`S=Jz6TaYmXE0G3N0#O|FUY_)CVSWFG2Fe|9e<mLiJff5#7zdOYcNMGUri9b^x^?`xsHZI8J&<`=PjXGKQMsXzbqe?9s`c=2L_8sY_GuTD?4;-
A3d-GC6SfJ|t>`P_`_{cISs&h&(0*2FEED;1Oiy#fFyBu>;$`!W0RG&G0PFBC*w}tA?Erjp51_sNhGcGT5{SJ4*FIf~hN(h}$hIsJbJ|W_CsQwjd9m>qF(
v0f89kfizMJ7S~R*)@N9eTSHySVvn=YW`-G8^v|SuM}_2TaN`@tIwvutoScEv{>q+urB8%em15{oH$hR$v)6)!NSu7Rm$X$ru^QZv1xjn}Wkn!MT$^Tmm6
k*tP^$SAsx{CgyYtv+iPR~|3ZnmIsHUYK4)}!1+8|tZzxr(?>zyg<&GLHryM*;_#Kp;37qJ>bnP?TczTSo?vrg=HX?FUkr@GIQ|1bgRKMVs^F>z^6fys(R
lo__n99V)F)UwmBIsv&b3iA?PY_8+wj;bLpx=FnoRKrt<92yc)SlhZ)@GV1CPp_1+TetMnb#$YsBMe#=y8BY)roSigPhvBFM^q}nC;hS-$@~c`4jJ9JXlF
$12+%E)J!?&d==SVl@E9ayf&mr2mr|vj%S+18Xw(pNEtJE=Wa2!+egx6nMiCvgYu$=$gD;p#h$(8)T*!`WYO|)1icQk@YmKtY7dU_Ja-K~`<Jb;cVl8z-D
7#rKVgaJ-mjUx}Z25~M+%n2j7N;koQmhO?8#}9Rs6Pe>pJs7{S-A0zM;LOa*gfwC4>dPVGTcSs@5^L*a>C8w)AtA1l%m>SZ~K1boB#j-77zrz8O!DA00Dz
CfS?8dkQM9VvBYQl0ssI200dcD
"""


def copied(folder: Path) -> Path:
    """A whole copy of a database, made while it is in use."""
    copy = folder.parent / "copy.db"
    with closing(sqlite3.connect(folder / "taskapi.db")) as other:
        other.execute("VACUUM INTO ?", (str(copy),))
    return copy


def put_in_place(folder: Path, how: str) -> None:
    """Does to the files of a running server what somebody might who restores a copy, or who tidies up."""
    database, log = folder / "taskapi.db", folder / "taskapi.db-wal"
    if how == "log removed":
        log.unlink()
    elif how == "renamed":
        copied(folder).replace(database)
    elif how == "overwritten":
        shutil.copyfile(copied(folder), database)
    elif how == "restored":
        copy = copied(folder)
        log.unlink()
        shutil.copyfile(copy, database)


@pytest.mark.skipif(os.name != "posix", reason="an open database cannot be replaced")
@pytest.mark.parametrize(("how", "noticed", "end"), [
    ("log removed", True, signal.SIGKILL), ("renamed", False, signal.SIGTERM), ("overwritten", True, signal.SIGKILL),
    ("restored", False, signal.SIGKILL), *(pytest.param(*more, marks=MORE) for more in (
        ("log removed", False, signal.SIGTERM), ("renamed", True, signal.SIGKILL), ("renamed", False, signal.SIGKILL),
        ("overwritten", False, signal.SIGTERM), ("restored", True, signal.SIGTERM)))])
def test_files_that_are_not_ours_any_more_are_never_written_to(
        tmp_path: Path, how: str, noticed: bool, end: int) -> None:
    """503 that says what to do; the next start goes on with what is there, or says which log is not its own."""
    folder = tmp_path / "data"
    with Live(folder) as live:
        wide = {"recordType": "wide", "count": 3000, "schema": {"text": {"type": "const", "value": "x" * 2000}}}
        assert live.job(live.make("/generate", wide), 30)["status"] == "completed"  # long enough for a checkpoint
        before = [live.make("/generate", PERSONS) for _ in range(3)]
        assert {live.job(job_id, 30)["status"] for job_id in before} == {"completed"}
        if end == signal.SIGKILL and not noticed:
            live.process.send_signal(signal.SIGSTOP)  # so that it does not notice before the kill
        put_in_place(folder, how)
        content = (folder / "taskapi.db").read_bytes()
        if noticed:
            until(lambda: live.ask("GET", "/").status == 503)
            error = " ".join(live.ask("GET", "/").json["errors"])
            assert "restart" in error
            assert "taskapi.db-wal" in error
            refused(live.ask("POST", "/generate", PERSONS), 500, "restart")
            refused(live.ask("GET", "/jobs"), 500, "restart")
        live.end(end)
    if how != "log removed":
        assert (folder / "taskapi.db").read_bytes() == content
    if how == "overwritten" or (how == "renamed" and end == signal.SIGKILL and not noticed):
        with pytest.raises(taskapi.StartupError, match=r"was replaced.* remove it"):
            taskapi.open_service(folder)
        for beside in ("taskapi.db-wal", "taskapi.db-shm"):
            (folder / beside).unlink()
    with taskapi.open_service(folder) as service, service.serving(port=0) as url:
        assert {service.queue.jobs.get(job_id).status for job_id in before} == {"completed"}
        assert_up(url)
    assert_sound(folder)


def test_another_program_may_checkpoint_and_write_a_table_of_its_own(tmp_path: Path) -> None:
    """That is no reason to stop."""
    with taskapi.open_service(tmp_path) as service, service.serving(port=0) as url:
        for number, mode in enumerate(("PASSIVE", "TRUNCATE", "PASSIVE")):
            with closing(sqlite3.connect(tmp_path / "taskapi.db")) as other:
                other.execute(f"CREATE TABLE own{number}(x)")
                other.execute(f"INSERT INTO own{number} SELECT randomblob(9999) FROM json_each('[1,2,3,4,5]')")
                other.commit()
                other.execute(f"PRAGMA wal_checkpoint({mode})")
            assert_up(url)
    assert_sound(tmp_path)


@pytest.mark.parametrize("how", ["missing", "empty", "replaced"])
def test_a_log_beside_another_database_is_left_alone(tmp_path: Path, how: str) -> None:
    """After a kill the log holds what was acknowledged: a start says so, twice, and touches neither."""
    folder = tmp_path / "data"
    with Live(folder) as live:
        made = live.make("/generate", PERSONS)
        assert live.job(made, 30)["status"] == "completed"
        live.end(signal.SIGKILL)
    database, log, away = folder / "taskapi.db", folder / "taskapi.db-wal", tmp_path / "away.db"
    shutil.copy(database, tmp_path / "copy.db")
    database.rename(away)
    if how == "empty":
        database.touch()
    elif how == "replaced":
        shutil.copy(away, database)
    held = log.read_bytes()
    for _ in range(2):
        with pytest.raises(taskapi.StartupError, match=r"-wal.*nothing was changed"):
            taskapi.open_service(folder, inline=True)
    assert log.read_bytes() == held
    away.replace(database)
    with taskapi.open_service(folder, inline=True) as service:
        assert service.checks["lastStop"] == "unclean"
        assert service.queue.jobs.get(made).status == "completed"
    assert_sound(folder)


def test_a_folder_that_was_copied_with_its_log_opens(tmp_path: Path) -> None:
    """Other files, but each belongs to the other."""
    with taskapi.open_service(tmp_path / "data", inline=True) as service:
        made = service.enqueue("generate", PERSONS)
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
    with taskapi.open_service(tmp_path / "copy", inline=True) as service:
        assert service.queue.jobs.get(made.job_id).status == "completed"
    assert_sound(tmp_path / "copy")


@pytest.mark.parametrize(("change", "words"), [
    ("PRAGMA user_version = 99", "later version"),
    ("PRAGMA user_version = 0", "not one of taskapi's"),
    ("ALTER TABLE jobs ADD COLUMN priority TEXT", "not one of taskapi's .its table 'jobs'"),
    ("ALTER TABLE _id_ranges RENAME COLUMN size TO extent", "not one of taskapi's .its table '_id_ranges'"),
    ("DROP TABLE _types", "not one of taskapi's .its table '_types'"),
    ("PRAGMA user_version = 0; CREATE TABLE _sqlite_migrations AS SELECT 'taskapi' AS migration_set, 'x' AS name",
     "later version")])
def test_a_database_of_tomorrow_or_changed_by_somebody_is_refused_and_untouched(
        tmp_path: Path, change: str, words: str) -> None:
    """StartupError of one line."""
    with taskapi.open_service(tmp_path, inline=True):
        pass
    with closing(sqlite3.connect(tmp_path / "taskapi.db")) as connection:
        connection.executescript(change)
    content = (tmp_path / "taskapi.db").read_bytes()
    with pytest.raises(taskapi.StartupError, match=f"{words}.*; nothing was changed$"):
        taskapi.open_service(tmp_path, inline=True)
    assert (tmp_path / "taskapi.db").read_bytes() == content


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_database_of_somebody_else_is_refused_and_untouched(tmp_path: Path, mode: str) -> None:
    """Also where it has a table of jobs."""
    path = tmp_path / "taskapi.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute("CREATE TABLE jobs(id TEXT PRIMARY KEY, company TEXT)")
    content = path.read_bytes()
    with pytest.raises(taskapi.StartupError, match="not one of taskapi's"):
        taskapi.open_service(tmp_path)
    assert path.read_bytes() == content


def without_rights() -> list[str]:
    """A command prefix that takes root's right to write where it may not; skips where that cannot be."""
    wrap = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    try:
        subprocess.run([*wrap, "true"], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("this machine does not let us drop rights")
    return wrap


def test_what_a_start_without_rights_has_left_is_mended(tmp_path: Path) -> None:
    """It is told in one line; and a read-only index of the log, as other programs leave it, is made writable."""
    with taskapi.open_service(tmp_path, inline=True) as service:
        store(service, {"n": "int"}, [[1]])
    path, index = tmp_path / "taskapi.db", tmp_path / "taskapi.db-shm"
    program = "import sys, taskapi; taskapi.open_service(sys.argv[1], inline=True).close()"
    start = partial(subprocess.run, [*without_rights(), sys.executable, "-c", program, str(tmp_path)],
                    text=True, capture_output=True, timeout=60, check=False)
    path.chmod(0o444)
    refusal = start().stderr.splitlines()[-1]
    assert re.search("taskapi.db cannot be written to by this user", refusal), refusal
    path.chmod(0o644)
    index.touch()
    index.chmod(0o444)
    ran = start()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert_sound(tmp_path)


def test_the_sweep_removes_only_what_bears_our_names(tmp_path: Path) -> None:
    """At the start; a user's files, folders and links stay, and so does what links lead to."""
    name = f"{taskapi.JobIds(taskapi.utc_now)()}.csv"
    outside, data = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    taskapi.open_service(data, inline=True).close()
    for place in (outside / name, outside / "tmpabcdefgh", data / "exports" / name, data / "tmp" / "tmp_bcdefg1",
                  data / "exports" / "report.csv", data / "uploads" / ".DS_Store", data / "tmp" / "notes.txt"):
        place.write_text("x")
    (data / "exports" / "folder").mkdir()
    (data / "exports" / f"f{name[1:]}").symlink_to(outside / name)
    (data / "uploads" / ".DS_Store").unlink()
    (data / "uploads").rmdir()
    (data / "uploads").symlink_to(outside)
    with taskapi.open_service(data, inline=True) as service:
        assert service.checks["strayFiles"] == "2 removed"
    assert sorted(path.name for path in (data / "exports").iterdir()) == [f"f{name[1:]}", "folder", "report.csv"]
    assert [path.name for path in (data / "tmp").iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in outside.iterdir()) == sorted([name, "tmpabcdefgh"])


def test_a_clock_that_is_set_back_loses_no_order_and_no_job(tmp_path: Path) -> None:
    """Ids go on increasing, times are never negative, and what is young stays."""
    clock = FakeClock()
    with taskapi.open_service(tmp_path, clock=clock, retention_days=1) as service, service.serving(port=0) as url:
        made = []
        for hours in (0, -48, -1, 72, -72):
            clock.forward(hours * 3600)
            made.append(service.wait(service.enqueue("generate", PERSONS).job_id, 60))
        assert [job.status for job in made] == ["completed"] * 5
        assert [job.job_id for job in made] == sorted(job.job_id for job in made)
        assert ask(url, "GET", "/").status == 200
        assert not re.search(r"seconds(_sum)?\S* -", ask(url, "GET", "/metrics").body.decode())


@pytest.mark.parametrize("content", [None, b"noise" * 5000, b""], ids=["removed", "noise instead", "truncated"])
def test_a_database_file_that_is_taken_away_is_missed_and_found_again(
        tmp_path: Path, content: bytes | None, script: Any) -> None:
    """The jobs of before are there when it comes back, and the noise is not touched."""
    with taskapi.open_service(tmp_path) as service, service.serving(port=0) as url:
        assert_up(url)
        path, away = tmp_path / "taskapi.db", tmp_path / "away.db"
        with closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        path.rename(away)
        if content is not None:
            path.write_bytes(content)
        assert_down(url, reads=False)
        assert content is None or path.read_bytes() == content
        away.replace(path)
        until(lambda: ask(url, "GET", "/").status == 200)
        assert_up(url)
        assert len(ask(url, "GET", "/jobs").json["items"]) == 2
    assert_sound(tmp_path)


def test_a_read_only_database_is_said_and_recovers(tmp_path: Path) -> None:
    """The error that SQLite gives for a read-only file or mount."""
    with taskapi.open_service(tmp_path) as service, service.serving(port=0) as url:
        assert_up(url)
        service._database.write(lambda connection: connection.execute("PRAGMA query_only = ON"))
        assert_down(url, reads=True)
        service._database._writer.execute("PRAGMA query_only = OFF")
        assert_up(url)


def sandboxed(*command: str) -> list[str]:
    """A command prefix that runs a shell line first in a mount namespace of its own; skips where that cannot be."""
    try:
        works = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True,
                               timeout=60, check=False).returncode == 0
    except OSError:
        works = False
    if not works:
        pytest.skip("this machine lets us mount nothing")
    return ["unshare", "-m", "sh", "-c", f"{' '.join(command)} && exec \"$@\"", "sh"]


@pytest.fixture
def little(tmp_path: Path) -> Iterator[tuple[Live, Path]]:
    """A server whose data folder is on a disk of 32 MB, and that disk as seen from outside."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with Live(folder / "data", wrap=sandboxed("mount -t tmpfs -o size=32m tmpfs", str(folder))) as live:
        yield live, Path(f"/proc/{live.process.pid}/root{folder}")
        copy = tmp_path / "copy"  # SQLite does not follow the path through /proc
        live.process.send_signal(signal.SIGSTOP)  # for database and log as of one moment, while room is given back
        shutil.copytree(f"/proc/{live.process.pid}/root{folder}/data", copy, ignore=shutil.ignore_patterns("*-shm"))
        live.process.send_signal(signal.SIGCONT)
        assert_sound(copy)
        assert live.end() == 0


def test_a_job_that_fills_the_disk_waits_for_room_until_it_is_canceled(little: tuple[Live, Path]) -> None:
    """The job and health say why; canceled, it leaves the room that it took."""
    live, _ = little
    wide = {"recordType": "wide", "count": 1_000_000, "schema": {"text": {"type": "const", "value": "x" * 1000}}}
    job_id = live.make("/generate", wide)
    until(lambda: "full" in str(live.job(job_id)["interruptions"]))
    health = live.ask("GET", "/")
    assert (health.status, "full" in str(health.json["errors"])) == (503, True)
    # It goes on for as long as what the log gives back is enough to.
    until(lambda: (job := live.job(job_id)) and (job["status"], job["attempt"]) == ("pending", 0))
    assert live.ask("POST", f"/jobs/{job_id}/cancel").json["status"] == "canceled"
    until(lambda: live.ask("GET", "/").status == 200)
    assert live.job(live.make("/generate", PERSONS), 30)["status"] == "completed"


def test_a_full_disk_is_said_and_no_job_is_lost_or_failed_by_it(little: tuple[Live, Path]) -> None:
    """Health 503, uploads 500 whatever their size; sixty jobs that wait or run are completed once there is room."""
    live, disk = little
    jobs = [live.make("/generate", {**PERSONS, "count": 60, "seed": seed}) for seed in range(60)]
    until(lambda: live.job(jobs[5])["status"] == "completed")
    with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(b"x" * 4096)
    until(lambda: "full" in str(live.ask("GET", "/").json["checks"].get("storage")))
    health = live.ask("GET", "/")
    assert (health.status, health.json["status"]) == (503, "unavailable")
    assert "full" in " ".join(health.json["errors"])
    for size in (300_000, 3_000_000):
        refused(live.ask("POST", "/upload", form(b"x" * size, "a.txt"), FORM), 500, "full")
    assert live.ask("POST", "/export", {"format": "csv"}).status in (202, 500)
    assert {live.job(job_id)["status"] for job_id in jobs} <= {"pending", "in-progress", "completed"}
    (disk / "filler").unlink()
    until(lambda: live.ask("GET", "/").status == 200)
    assert [live.job(job_id, 30)["status"] for job_id in jobs] == ["completed"] * 60
    assert live.ask("GET", f"/records/person?jobId={jobs[-1]}").json["items"]


def test_a_read_only_folder_is_said_and_recovers(tmp_path: Path) -> None:
    """Uploads and exports cannot be written: 503 and 500 until they can; at start: exit 1."""
    folder, wrap = tmp_path / "data", without_rights()
    with Live(folder, wrap=wrap) as live:
        assert live.ask("GET", "/").json["checks"]["folders"] == "writable"
        for name in ("tmp", "uploads"):
            (folder / name).chmod(0o500)
            try:
                assert live.ask("GET", "/").status == 503
                refused(live.ask("POST", "/upload", form(), FORM), 500)
            finally:
                (folder / name).chmod(0o700)
            assert live.ask("GET", "/").status == 200
        assert live.ask("POST", "/upload", form(), FORM).status == 201
        assert live.end() == 0
    for unwritable in (folder, folder / "exports"):
        unwritable.chmod(0o500)
        try:
            with pytest.raises(AssertionError, match=r"(?s)ended with 1: .*taskapi: "):
                Live(folder, wrap=wrap)
        finally:
            unwritable.chmod(0o700)


@pytest.mark.parametrize("seconds", [1.5, pytest.param(60, marks=pytest.mark.slow)])
def test_many_clients_at_once_meet_nothing_but_what_is_promised(tmp_path: Path, seconds: float) -> None:
    """Sixteen of them do everything; no 5xx but a full queue, no deadlock, and nothing is left of it but the jobs."""
    deadline = time.monotonic() + seconds

    def client(number: int) -> list[str]:
        random, made, wrong = Random(number), ["0192"], []
        while time.monotonic() < deadline:
            job_id, count = random.choice(made), random.randrange(1, 900)
            kind = random.choice(["csv", "json", "sqlite"])
            method, path, body, headers, promised = random.choice([
                ("POST", "/generate", {**PERSONS, "count": count}, None, {202, 503}),
                ("POST", "/export", {"format": kind, "filters": {"jobId": job_id}}, None, {202, 503}),
                ("POST", "/upload", form(b"x" * count, "a.txt"), FORM, {201}),
                ("POST", "/upload", INGEST, FORM, {201, 503}),
                ("GET", "/", None, None, {200}), ("GET", "/records", None, None, {200}),
                ("GET", "/metrics", None, None, {200}), ("GET", "/jobs?limit=20", None, None, {200}),
                ("GET", f"/status/{job_id}?wait={random.random()}", None, None, {200, 404}),
                ("GET", f"/download/{job_id}", None, None, {200, 404}),
                ("GET", f"/records/person?jobId={job_id}", None, None, {200, 404}),
                ("DELETE", f"/jobs/{job_id}", None, None, {204, 404, 409}),
                ("POST", f"/jobs/{job_id}/cancel", None, None, {200, 404, 409}),
                ("POST", f"/jobs/{job_id}/retry", None, None, {202, 404, 409})])
            answer = ask(url, method, path, body, headers)
            if body and answer.status in (201, 202):
                made.append(answer.json["jobId"])
            if answer.status not in promised or (answer.status == 503 and not answer.headers["Retry-After"]):
                wrong.append(f"{method} {path}: {answer.status} {answer.body!r}")
        return wrong

    with taskapi.open_service(tmp_path, workers=3, max_pending=40) as service:
        with service.serving(port=0) as url:
            assert ask(url, "GET", "/").status == 200
            before = leftovers(tmp_path)
            assert threads(16, client, seconds + 60) == [[]] * 16
            assert service.drain(60)
        made = {job.job_id: job for job in service.queue.jobs.page(None, None, 100_000, None)[0]}
        assert {job.status for job in made.values() if job.type == "generate"} <= {"completed", "canceled"}
        done = {job_id: job.result["records"] for job_id, job in made.items() if job.record_type and job.result}
        assert all(job.request["count"] == done[job_id] for job_id, job in made.items()
                   if job.type == "generate" and job.status == "completed")
        until(lambda: dict(plain(tmp_path, "SELECT job, rows FROM _id_ranges")) == done)
        with service.serving(port=0):
            if Path("/proc/self/fd").exists():
                until(lambda: leftovers(tmp_path)[0] <= before[0] + 3)  # workers begin when they are first needed
                # Some connections for reading are kept, and SQLite keeps files of closed ones while others are locked.
                assert leftovers(tmp_path)[1] <= before[1] + 32
    assert_sound(tmp_path)


def test_the_openapi_document_has_every_route_and_resolves(url: str) -> None:
    """Each route and method, its path parameters, and nothing that points nowhere."""
    document = ask(url, "GET", "/openapi.json").json
    assert document["openapi"] == "3.1.0"
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(entry.method, entry.path) for entry in taskapi.all_routes()}
    schemas = document["components"]["schemas"]
    references = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= schemas.keys()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            told = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
            assert told == set(re.findall(r"{(\w+)}", path))
            assert {"400", "500", "503"} <= operation["responses"].keys()
            assert operation["summary"]


def test_the_openapi_document_bears_field_types_of_the_programs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the class is called like one of ours, and where pydantic knows no schema of an option."""
    monkeypatch.setattr(taskapi, "FIELD_TYPES", dict(taskapi.FIELD_TYPES))
    ours = taskapi.openapi(taskapi.all_routes())["components"]["schemas"]["IntField"]

    @taskapi.field_type("my int")
    class IntField(taskapi.FieldType):
        """One of somebody's own."""

        how_many: int = 1

    @taskapi.field_type("odd")
    class Odd(taskapi.FieldType):
        """Takes what no JSON is."""

        function: Callable[[], int] | None = None

    assert {IntField.__name__, Odd.__name__} == {"IntField", "Odd"}
    schemas = taskapi.openapi(taskapi.all_routes())["components"]["schemas"]
    assert schemas["IntField"] == ours
    assert schemas["my_int_Field"]["properties"].keys() == {"type", "null", "unique", "howMany"}
    assert schemas["odd_Field"]["properties"] == {"type": {"const": "odd"}}
    told = [option["$ref"].rpartition("/")[2] for option in schemas["Field"]["anyOf"] if "$ref" in option]
    assert {"my_int_Field", "odd_Field", "IntField"} <= {*told} <= schemas.keys()


def test_the_openapi_document_tells_headers_and_has_examples_that_are_right(url: str) -> None:
    """Where a made job is, what a file comes with, when to come again; a JSON body's example is accepted."""
    document = ask(url, "GET", "/openapi.json").json
    calls = {f"{method.upper()} {path}": operation for path, methods in document["paths"].items()
             for method, operation in methods.items()}
    for call, operation in calls.items():
        for status, answer in operation["responses"].items():
            job = status in ("201", "202") and call != "POST /snapshots"
            assert ("Location" in answer.get("headers", {})) == job
            assert ("Retry-After" in answer.get("headers", {})) == (status == "503")
    download = calls["GET /download/{jobId}"]["responses"]["206"]["headers"]
    assert download.keys() == {"ETag", "Last-Modified", "Accept-Ranges", "Content-Disposition"}
    for name in ("GenerateRequest", "ExportRequest", "Job", "ErrorBody"):
        for given_ in document["components"]["schemas"][name]["examples"]:
            links = given_.pop("links", None)
            shown = getattr(taskapi, name).model_validate_json(json.dumps(given_)).model_dump(mode="json")
            assert links is None or shown["links"].items() >= links.items()


def test_what_a_client_sends_is_described_as_the_server_takes_it(url: str) -> None:
    """jsonschema is the referee. A property with a default would be required of a generated TypeScript client."""
    jsonschema = pytest.importorskip("jsonschema")
    schemas = ask(url, "GET", "/openapi.json").json["components"]["schemas"]
    required = {"GenerateRequest": [], "PreviewRequest": [], "ExportRequest": ["format"], "UploadForm": ["file"],
                "InferQuery": [], "UploadQuery": [], "RecordsQuery": [], "Filters": [], "Where": [],
                "RecordSpec": ["count", "schema"]}
    assert {name: schemas[name].get("required", []) for name in required} == required
    for name in required:
        assert not any("default" in field for field in schemas[name].get("properties", {}).values()), name
    assert schemas["UploadForm"]["properties"]["file"]["format"] == "binary"
    field = {"schema": {"a": "int"}}
    told = jsonschema.Draft202012Validator({"$ref": "#/components/schemas/GenerateRequest",
                                            "components": {"schemas": schemas}})
    for body in ({"count": 1}, {"count": None}, {"count": 2.0}, {"count": 2.5},
                 {"records": {"a": {"count": 1, **field}}}, {"records": {"0": {"count": 1, **field}}},
                 {"records": {"a": {}}}, {"recordType": "jobs", "count": 1},
                 {"recordType": "sqlite_x", "count": 1, **field}, {"recordType": "jobs_x", "count": 1, **field},
                 {"count": 0}, {"count": 1, "seed": -1}, {"count": 1, "parts": 0}, {"count": 1, "recordType": "x"},
                 {"count": 1, "recordType": None}, {"count": 1, "schema": {}}, {"count": 1, "schema": None},
                 {"records": {"a": {"count": -1, **field}}}, {"records": {"a": {"count": [-1, 2], **field}}},
                 {"records": {"a": {"count": [1], **field}}}, {"records": {"a": {"count": 1, "schema": {}}}},
                 {"count": 1, "records": {"a": {"count": 1, **field}}}, {"count": None, "seed": None, "records": {
                     "a": {"count": [1, 2.0], **field}}}, {**field, "records": {"a": {"count": 1, **field}}}):
        assert told.is_valid(body) == (ask(url, "POST", "/generate", body).status == 202), body
    texts = {"delimiter": {"": 0, ",": 1, "tab": 1, "\\t": 1, "xy": 0, '"': 0, "\n": 0},
             "encoding": {"": 0, "nonsense": 0, "hex": 0, "utf-8": 1, "cp1252": 1}, "path": {"": 1, "/a": 1, "a": 0}}
    for name, values in texts.items():
        option = jsonschema.Draft202012Validator(schemas["InferQuery"]["properties"][name])
        for value, sound in values.items():
            query = urllib.parse.urlencode({name: value, "filename": "a.json"})
            answer = ask(url, "POST", f"/infer?{query}", b'[{"a": 1}]', {"Content-Type": "application/json"})
            problem = [each["field"] for each in answer.json.get("fields", [])] == [name]
            assert (option.is_valid(value), problem) == (bool(sound), not sound), (name, value)


@pytest.fixture
def told(app) -> Callable[[str], Any]:
    """What tells of a shape in the OpenAPI document whether it takes a value: jsonschema is the referee."""
    jsonschema, document = pytest.importorskip("jsonschema"), app.get("/openapi.json").json
    return lambda name: jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": document["components"]}).is_valid


def test_the_fields_of_a_schema_are_described_type_by_type(app, told: Callable[[str], Any]) -> None:
    """What the server takes always; and it takes none of what is not described. What only it can judge, such as a min
    over a max, is described more widely."""
    takes, inner = told("Schema"), {"a": "int", "b": {"type": "word", "null": 0.5}}
    for name, preset in taskapi.PRESETS.items():
        for schema in (spec["schema"] for spec in preset.get("records", {name: preset}).values()):
            assert takes(schema), name
    assert all(takes({"x": cls.example}) for cls in taskapi.FIELD_TYPES.values())
    assert takes({"type": "object", "properties": {"a": {"type": "integer"}}})
    assert takes({"$schema": "https://json-schema.org/draft/2020-12/schema", "properties": {}})
    assert takes({"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {}}}})
    fields = {
        True: ["int", "name", "date", {"type": "int", "min": 1, "max": 3, "unique": False}, {"type": "uuid"}, {
            "type": "list", "of": {"type": "object", "fields": inner}}, {"type": "float", "mean": 0.5, "sd": 0.1},
            {"type": "const", "value": None}, {"type": "pattern", "regex": "a+"}, {"type": "one_of", "of": ["int"]},
            {"type": "pydecimal", "args": {"right_digits": 2}}],
        False: [
            "choice", "Int", "", None, 5, [], {}, {"min": 1}, {"type": 1}, {"type": "int", "minimum": 1},
            {"type": "int", "min": "1"}, {"type": "int", "multipleOf": 0}, {"type": "int", "max": 2**63},
            {"type": "int", "null": -1}, {"type": "word", "min": 1}, {"type": "ref"}, {"type": "choice"},
            {"type": "choice", "values": []}, {"type": "choice", "values": {"a": -1}}, {"type": "float", "mean": 1},
            {"type": "float", "sd": 0, "mean": 1}, {"type": "list", "of": "list"}, {"type": "pattern"},
            {"type": "list", "of": "int", "max": 1001}, {"type": "object", "fields": {}}, {"type": "template"},
            {"type": "object", "fields": {"a": {"type": "int", "mx": 1}}}, {"type": "first_of", "of": []},
            {"type": "pattern", "pattern": "#", "regex": "a"}, {"type": "bool", "true": 2},
            {"type": "decimal", "places": 19}, *({"type": "one_of", "of": ["int"], "valid": valid} for valid in (
                [], False, "x", 0))]}
    for sound, specs in fields.items():
        for spec in specs:
            body = {"recordType": "x", "count": 2, "seed": 1, "schema": {"f": spec}}
            status = app.post_json("/preview", body, status="*").status_int
            assert (takes({"f": spec}), status) == (sound, 200 if sound else 400), spec
    names = {"a b": True, "é": True, "": False, " a": False, "a ": False, "_id": False, "x" * 256: False}
    for name, sound in names.items():
        body = {"recordType": "x", "count": 2, "schema": {name: "int"}}
        assert (takes({name: "int"}), app.post_json("/preview", body, status="*").status_int) == (
            sound, 200 if sound else 400), name


def test_the_options_of_an_export_are_described_with_what_they_go_with(app, told: Callable[[str], Any]) -> None:
    """Each format with each option, and with gzip; an option that is off goes with all."""
    takes, options = told("ExportRequest"), {
        "split": True, "omitNull": True, "dialect": "mysql", "excelSafe": True, "gzip": True}
    for export_format, option in itertools.product(taskapi.FORMATS, options):
        for gzip_ in (True, False):
            body = {"format": export_format, option: options[option], "gzip": gzip_ or option == "gzip", "limit": 1}
            assert takes(body) == (app.post_json("/export", body, status="*").status_int == 202), body
        assert takes({"format": export_format, "split": False, "omitNull": False, "dialect": None})
    assert not takes({"format": "csv", "limit": -1})
    unknown = app.post_json("/export", {"format": "csv", "after": "nothing"}, status=404).json
    assert unknown["fields"] == [{"field": "after", "message": "is no job"}]


def test_the_request_is_told_as_it_is_written(service: taskapi.Service, url: str) -> None:
    """Related types too have a `schema`; and names of Python are no keys."""
    body = {"records": {"customer": {"count": 2, "schema": {"id": "sequence"}},
                        "order": {"per": "customer", "count": [1, 2], "schema": {"n": "int"}}}}
    job = ask(url, "POST", "/generate", body)
    assert job.json["request"]["records"] == body["records"]
    again = {key: value for key, value in job.json["request"].items() if key in ("records", "seed", "now", "locale")}
    assert ask(url, "POST", "/generate", again).status == 202
    for path, wrong, field in (
            ("/generate", {"record_type": "person", "count": 1}, "record_type"),
            ("/generate", {"count": 1, "recordType": "x", "schema_": {"a": "int"}}, "schema_"),
            ("/generate", {"count": 1, "recordType": "x", "schema": {"a": {"type": "date", "from_": "-1d"}}}, "from_"),
            ("/export", {"format": "csv", "order_by": "name"}, "order_by"),
            ("/export", {"format": "csv", "filters": {"date_field": "joined"}}, "date_field"),
            ("/export", {"format": "csv", "filters": {"where": {"id": {"in_": [1]}}}}, "in_"),
            ("/export", {"format": "csv", "filters": {"from": "2026-02-30"}}, "from")):
        refused(ask(url, "POST", path, wrong), 400, field)


def test_no_value_of_a_condition_is_too_odd_to_be_answered(service: taskapi.Service) -> None:
    """Of every kind of field, by every operator: 200, or 400 with a reason; a job tells of no bug of ours."""
    app = webtest.TestApp(service.app)
    service.enqueue("generate", {"recordType": "odd", "count": 5, "schema": {
        "i": "int", "f": "float", "d": {"type": "decimal", "min": "0", "max": "9"}, "t": "word", "b": "bool",
        "at": "datetime", "l": {"type": "list", "of": "word"}, "n": {"type": "const", "value": None},
        "c": {"type": "choice", "values": [1, "x", True, None, [1]]}}})
    texts = ("", "1" * 400, "9" * 5000, "1e999999999", "nan", "\0", "[[[[", "[null]", ",")
    for field, operator, text in itertools.product("idtc", ("", *taskapi.Condition.operators()), texts):
        name = f"{field}.{operator}".strip(".")
        asked = app.get(f"/records/odd?{name}={urllib.parse.quote(text)}", status="*")
        assert asked.status_int in (200, 400), (name, text)
    for key in texts[1:]:
        assert app.get(f"/records/odd/{urllib.parse.quote(key, safe='')}", status="*").status_int in (400, 404), key
    for field, operator, text in itertools.product("idtbc", ("eq", "lt", "in", "contains"),
                                                   ("1" * 400, "-1e400", "null", "[null]", "true", '"x"')):
        body = f'{{"format": "csv", "filters": {{"where": {{"{field}": {{"{operator}": {text}}}}}}}}}'
        answer = app.post("/export", body, {"Content-Type": "application/json"}, status="*")
        assert answer.status_int in (202, 400), body
        assert "Error" not in str(answer.json["error"]), body


def test_every_status_that_the_tests_have_met_is_described() -> None:
    """Runs after the others: a status that a route may answer has to be in the OpenAPI document."""
    paths = taskapi.openapi(taskapi.all_routes(), secured=True)["paths"]
    for method, path, status in SEEN:
        for pattern, methods in paths.items():
            operation = methods.get(method.lower())
            if operation and re.fullmatch(re.sub("{[a-zA-Z]+}", "[^/]+", pattern), path):
                assert str(status) in operation["responses"], (method, path, status)


# ==== 10 Page ====

UI = "".join(getattr(taskapi, name) for name in ("_UI_BODY", "_UI_SCRIPT"))


class Outline(HTMLParser):
    """What a page is made of: its ids, what refers to an id, its form controls without a name, tags left open."""

    VOID = frozenset({"meta", "link", "input", "br", "option"})  # an option ends by itself

    def __init__(self, page: str):
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.refers: set[str] = set()
        self.nameless: list[Any] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.refers |= {given[name] for name in ("for", "list", "aria-labelledby", "aria-controls") if name in given}
        if tag in ("input", "select", "textarea") and "label" not in self.open and "aria-label" not in given:
            self.nameless.append(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())


def test_the_page_needs_nothing_from_outside_and_may_run_only_itself(url: str) -> None:
    """No other host, no handler in markup, no way for a string to become markup; hashes of its own two parts."""
    answer = ask(url, "GET", "/ui")
    page, policy = answer.body.decode(), answer.headers["Content-Security-Policy"]
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}
    assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function)\b|\son\w+=\"", page)
    for part in ("style", "script"):
        [text] = re.findall(rf"<{part}>(.*?)</{part}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{part}-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert "default-src 'none'; " in policy
    assert "require-trusted-types-for 'script'" in policy


def test_the_page_is_whole_html_in_which_every_reference_has_its_end(url: str) -> None:
    """Tags closed, ids unique, each control named; each id, section and part that the script asks for is there."""
    outline = Outline(ask(url, "GET", "/ui").body.decode())
    assert outline.open == []
    assert outline.nameless == []
    assert len(outline.ids) == len({*outline.ids})
    asked = set(re.findall(r'(?:\$|ticked)\("([\w-]+)"\)', UI)) | {f"view-{name}" for name in re.findall(
        r'(?:href="|hash = ")#(\w+)"', UI)} - {"view-main"} | {f"by-{name}" for name in ("type", "status")}
    asked |= {f"{form}-{part}" for form in re.findall(r'jobForm\("(\w+)"', UI)
              for part in ("form", "curl", "problem", "said")}
    assert len(asked) > 60
    assert asked | outline.refers <= {*outline.ids}


def test_every_path_that_the_page_asks_for_is_a_route() -> None:
    """With the method it uses."""
    def plain_path(text: str) -> str:
        return re.sub(r"\$?{[\w.()]+}", "{}", text.partition("?")[0]).removeprefix("./").removeprefix("/")

    calls = set(re.findall(r'(?:api|act)\("(\w+)", [`"]([^`"]+)[`"]', UI))
    calls |= {("POST", path) for path in [*re.findall(r'jobForm\("\w+", \(\) => "(\w+)"', UI), *re.search(
        r'send\(.* \? "(\w+)" : "(\w+)"', UI).groups()]}
    calls |= {("GET", path) for path in re.findall(r'href[=:] ?[`"]((?!#)[^`"]+)[`"]', UI)}
    routes = {(entry.method, plain_path(entry.path)) for entry in taskapi.all_routes()}
    asked = {(method, plain_path(path)) for method, path in calls if path}
    assert len(asked) > 12
    assert asked <= routes


def test_what_the_page_offers_comes_from_the_program(url: str) -> None:
    """Its forms are made from the schemas of the requests, which stand in it as data that cannot become markup."""
    page = ask(url, "GET", "/ui").body.decode()
    [text] = re.findall(r'<script id="shapes" type="application/json">(.*?)</script>', page)
    shapes = json.loads(text)
    posted = {name: kind.model for name, kind in taskapi.JOB_TYPES.items() if kind.posted and name != "generate"}
    assert shapes["jobs"] == {name: model.model_json_schema() for name, model in posted.items()}
    assert shapes["jobs"]["export"]["properties"]["format"]["enum"] == [*taskapi.FORMATS]
    assert (shapes["types"], shapes["statuses"]) == ([*taskapi.JOB_TYPES], [*taskapi.JobStatus])
    assert shapes["upload"]["properties"].keys() == {*map(to_camel, taskapi.IngestOptions.model_fields)}
    assert "<" not in text
    assert len(page.encode()) < 100_000


BROWSERS = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


@pytest.mark.parametrize(("accept", "page"), [
    (None, False), ("*/*", False), ("application/json", False), ("", False), ("application/*", False), (BROWSERS, True),
    ("text/html", True), ("TEXT/HTML; charset=utf-8", True), ("text/*", True), ("text/html, application/json", False),
    ("application/json;q=0.5, text/html;q=0.4", False), ("application/json;q=0.4, text/html;q=0.5", True),
    ("text/html;q=0", False), ("text/html;q=0, */*", False), ("text/html;q=0.9, */*", False),
    ("text/html;q=nan", False), ("application/json;q=0, */*", True), ("image/png", False),
    ("text/html ; q=0.3, application/json; Q=0.2", True)])
def test_a_browser_that_opens_the_root_gets_the_page_and_others_json(url: str, accept: str | None, page: bool) -> None:
    """By the weights of the Accept header; caches are told."""
    answer = ask(url, "GET", "/", headers={} if accept is None else {"Accept": accept})
    assert (answer.status, answer.headers["Vary"].split(", ")[0]) == (200, "Accept")
    assert answer.headers["Content-Type"].startswith("text/html" if page else "application/json")
    assert (answer.body == ask(url, "GET", "/ui").body) is page


def test_a_preview_is_bounded_also_for_related_types(url: str) -> None:
    """It is made while the client waits."""
    many = {"records": {"thing": {"count": 10_001, "schema": {"id": "sequence"}}}}
    refused(ask(url, "POST", "/preview", many), 400, "at most 10000 in a preview")
    assert len(ask(url, "POST", "/preview", {"recordType": "shop", "count": 100}).json["records"]["customer"]) == 100


def test_the_records_link_of_a_preset_of_several_types_leads_to_records(url: str) -> None:
    """To the first of them."""
    made = ask(url, "POST", "/generate", {"recordType": "shop", "count": 2}).json
    assert len(ask(url, "GET", made["links"]["records"]).json["items"]) == 2


CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"))), "")
browsing = pytest.mark.skipif(not CHROMIUM or os.name != "posix",
                              reason="needs Chromium, which is driven over file descriptors 3 and 4 as POSIX has them")


class Tab:
    """A tab of a headless Chromium of its own, driven over its debugging pipe: no driver, no port.

    What the page complains about (exceptions, errors on the console, violations of its policy) is kept.
    """

    LAUNCH = "import os, sys; [os.dup2(int(sys.argv[n]), n + 2) for n in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"

    def __init__(self, folder: Path):
        import fcntl

        pipes = [*os.pipe(), *os.pipe()]
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in pipes]  # out of the way of 3 and 4
        for end in pipes:
            os.close(end)
        theirs, self._out, self._in, ours = ends
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.LAUNCH, str(theirs), str(ours), CHROMIUM, "--headless", "--no-sandbox",
             "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage",
             "--host-resolver-rules=MAP *.example 127.0.0.1", f"--user-data-dir={folder}",
             "--window-size=1280,900", "--remote-debugging-pipe", "about:blank"],
            pass_fds=(theirs, ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(ours)
        self._buffer, self._number, self._session = b"", 0, {}
        self.complaints: list[Any] = []
        self.downloads = folder / "downloads"
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Audits", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], 60)[0], "the browser is silent"
            self._buffer += (data := os.read(self._in, 1 << 20))
            assert data, "the browser has ended"
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params: Any) -> Any:
        """One call of the DevTools protocol."""
        self._number += 1
        call = {"id": self._number, "method": method, "params": params, **self._session}
        data = memoryview(json.dumps(call).encode() + b"\0")
        while data:
            data = data[os.write(self._out, data):]
        while (message := self._next()).get("id") != self._number:
            kind, about = message["method"], message["params"]
            if (kind == "Runtime.exceptionThrown"
                    or (kind == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"))
                    or (kind == "Audits.issueAdded" and about["issue"]["code"] != "GenericIssue")  # autofill's advice
                    or (kind == "Log.entryAdded" and about["entry"]["level"] != "info"
                        and about["entry"]["source"] != "network")):  # a 400 is no fault here
                self.complaints.append(message)
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def js(self, expression: str) -> Any:
        """The value of an expression, or of its promise."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Returns once an expression is true."""
        try:
            until(lambda: self.js(f"Boolean({expression})"))
        except AssertionError:
            raise AssertionError(f"{expression} has not come true in\n{self.text('body')}") from None

    def text(self, selector: str) -> str:
        """All that a person can read there, once what is new has been drawn."""
        return self.js("new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn))).then(() => "
                       f"[...document.querySelectorAll({json.dumps(selector)})].map(n => n.innerText).join('\\n'))")

    def open(self, url: str) -> None:
        """Goes there, and waits for the first preview."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && document.querySelectorAll('#preview td').length")

    def click(self, selector: str, words: str = "") -> None:
        """A click of the mouse on what is there and says these words."""
        find = (f"() => [...document.querySelectorAll({json.dumps(selector)})].find(n => n.checkVisibility() && "
                f"n.textContent.includes({json.dumps(words)}))")

        def landed() -> bool:  # not where the page has moved meanwhile: then the next one does
            place = self.js(f"""(find => {{
                const node = find();
                if (!node) return null;
                node.scrollIntoView({{block: "center"}});
                landed = false;
                addEventListener("click", event => {{ landed = Boolean(find()?.contains(event.target)); }},
                                 {{capture: true, once: true}});
                const {{x, y, width, height}} = node.getBoundingClientRect();
                return [x + width / 2, y + height / 2]; }})({find})""")
            for kind in ("mousePressed", "mouseReleased") if place else ():
                self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)
            return bool(place) and self.js("landed")

        until(landed)

    def press(self, key: str, code: int, text: str = "", modifiers: int = 0) -> None:
        """A key; with Alt 1, Ctrl 2, Shift 8."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      modifiers=modifiers, **({"text": text} if text and kind == "keyDown" else {}))

    def type(self, selector: str, text: str) -> None:
        """Replaces what a field holds, as typing does."""
        self.js(f"document.querySelector({json.dumps(selector)}).select()")
        self.js(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def drop(self, *files: Path) -> None:
        """Drags files into the window and lets go."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=200, y=300, data=data)

    def window(self, width: int, height: int, scheme: str = "light") -> None:
        """Gives the window this size."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=features)

    def shot(self, file: Path, width: int, height: int, scheme: str = "light") -> None:
        """A picture of the window at this size."""
        self.window(width, height, scheme)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Ends the browser."""
        self.call("Browser.close")
        self._process.wait(60)
        os.close(self._in)
        os.close(self._out)


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    """A tab whose page must not complain."""
    if subprocess.run([CHROMIUM, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("there is a Chromium by name, but it does not run")  # such as one that wants to be installed first
    tab = Tab(tmp_path / "browser")
    try:
        yield tab
        assert tab.complaints == []
    finally:
        tab.close()


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[tuple[taskapi.Service, str]]:
    """A service with workers, served."""
    with taskapi.open_service(tmp_path / "data") as service, service.serving(port=0) as url:
        yield service, url


@browsing
def test_the_page_asks_for_the_token_once(guarded: Live, tab: Tab) -> None:
    """A wrong one is told; the right one opens the page, which then asks and downloads with its cookie."""
    tab.call("Page.navigate", url=guarded.url)
    for token in ("wrong", SECRET):
        tab.until("document.readyState === 'complete' && document.querySelector('[name=token]')")
        tab.type("[name=token]", token)
        tab.click("button", "Open")
        tab.until("document.querySelector('[role=alert]')?.textContent || document.querySelector('#preview td')")
    tab.until("document.querySelectorAll('#preview td').length")
    assert tab.js("fetch('/jobs').then(answer => answer.status)") == 200
    assert SECRET not in tab.js("location.href + document.documentElement.outerHTML")
    tab.open(f"{guarded.url}/ui")


@browsing
def test_the_page_bears_what_faults_do_to_it(testing: taskapi.ServedUrl, tab: Tab) -> None:
    """A refusal is told, a server that cuts connections counts as gone until it answers, a job that stands is shown."""
    tab.open(testing)
    tab.type("#count", "120")
    testing.faults.add(on={"method": "POST", "path": "/generate"}, times=1, then={
        "status": 503, "headers": {"Retry-After": "1"}, "body": {"error": "come back later", "status": 503}})
    tab.click("#go")
    tab.until("document.body.innerText.includes('come back later')")
    testing.faults.add(on={"path": "*"}, then={"close": True})
    tab.until("document.querySelector('#offline').checkVisibility()")
    testing.faults.clear()
    tab.until("!document.querySelector('#offline').checkVisibility()")
    testing.faults.add(on={"job": "generate", "done": 40}, then={"pause": True})
    tab.click("#go")
    tab.until("document.querySelector('#jobs .in-progress')?.innerText.includes('40')")
    testing.faults.clear()
    tab.until("document.querySelector('#jobs .completed')")
    assert [entry["status"] for entry in testing.requests(method="POST", path="/generate")] == [503, 202]


@browsing
def test_in_a_browser_from_a_preset_to_a_downloaded_file(at_work: tuple[taskapi.Service, str], tab: Tab) -> None:
    """Generate, watch, look, export with a filter, download."""
    service, url = at_work
    tab.open(url)
    assert "No jobs yet" in tab.text("#no-jobs")
    tab.click("#presets button", "company")
    tab.type("#count", "120")
    tab.until("document.querySelector('#go').textContent === 'Generate 120 records'")
    tab.until("document.querySelector('#preview th:nth-child(3)').textContent === 'domain'")
    promised = tab.js("[...document.querySelectorAll('#preview tbody td:nth-child(2)')].map(cell => cell.textContent)")
    tab.click("#go")
    tab.until("document.querySelector('#jobs .completed')")
    assert "120 records" in tab.text("#jobs")
    made = plain(service.folder.root, "SELECT name FROM company ORDER BY _id")
    assert (len(made), made[:8]) == (120, promised)
    tab.click("#jobs a", "Look at the records")
    tab.until("document.querySelectorAll('figure').length === 13")
    tab.until("document.querySelector('#records').innerText.includes('1 to 20 of 120')")
    drawn = tab.js("[...document.querySelectorAll('figure svg')].map(drawing => drawing.ariaLabel)")
    assert [text.partition(":")[0] for text in drawn] == ["id", "employees", "revenue", "founded"]
    assert re.fullmatch(r"employees: \d+ to [\d,]+, mean [\d,.]+", drawn[1])
    assert tab.js(f"{BUTTONS}.map(button => [button.textContent, button.disabled])")[:2] == [
        ["Previous", True], ["Next", False]]
    for start in range(21, 120, 20):
        tab.click("#records button", "Next")
        tab.until(f"document.querySelector('#records').innerText.includes('{start} to {start + 19} of 120')")
    assert tab.js(f"{BUTTONS}.map(button => button.disabled)")[:2] == [False, True]
    tab.click("#records button", "Export company")
    tab.click("#add-where")
    tab.js("{const [name, sign] = document.querySelector('#where .row').children; name.value = 'industry';"
           "sign.value = 'in'; sign.onchange()}")
    tab.click("#export-form .primary")
    assert tab.js("document.querySelector('#where :invalid').validity.valueMissing")  # asked for before there is a job
    tab.type("#where input", "retail, energy")
    tab.click("#export-form .primary")
    tab.click("#export-said a", "Download company.csv")
    assert len(ask(url, "GET", "/jobs").json["items"]) == 2
    expected = plain(service.folder.root, "SELECT name FROM company WHERE industry IN ('retail', 'energy')")
    file = tab.downloads / "company.csv"
    until(file.exists)
    with file.open(newline="", encoding="utf-8") as lines:
        assert [row["name"] for row in csv.DictReader(lines)] == expected


@browsing
def test_in_a_browser_records_are_filtered_sorted_opened_and_downloaded_by_keyboard_alone(
        at_work: tuple[taskapi.Service, str], tab: Tab) -> None:
    """The whole type as its header row says, page by page; a wrong value is told; no record type is too wide."""
    service, url = at_work
    service.wait(service.enqueue("generate", {**PERSONS, "count": 90}).job_id)
    rows = plain(service.folder.root, "SELECT id, city, birthDate FROM person ORDER BY city, _id")
    tab.open(f"{url}/ui#records/person")
    said = "document.querySelector('#records .row').innerText"
    first = "document.querySelector('#records tbody td').textContent"
    tab.until(f"{said}.includes('1 to 20 of 90') && document.querySelector('figure')")
    tab.js("document.querySelector('#records [name=city]').previousSibling.focus()")
    tab.press("Enter", 13, "\r")
    tab.until(f"{first} === '{rows[0][0]}'")
    assert tab.js("document.activeElement.parentNode.ariaSort") == "ascending"
    tab.press("Enter", 13, "\r")
    tab.until(f"{first} === '{max(rows, key=lambda row: (row[1].encode(), -row[0]))[0]}'")
    tab.press("Tab", 9)
    tab.call("Input.insertText", text="on")
    found = [row for row in rows if "on" in row[1].lower()]
    tab.until(f"{said}.includes('of {len(found)}')")
    assert tab.js("document.activeElement.name") == "city"
    tab.js("document.querySelector('#records [name=birthDate]').focus()")
    tab.call("Input.insertText", text=">= 1980-01-01")
    found = [row for row in reversed(found) if row[2] >= "1980-01-01"]
    tab.until(f"{said}.includes('of {len(found)}')")
    assert f"1 to {len(found)} of {len(found)}" in tab.js(said)
    assert not tab.js(f"{BUTTONS}.slice(0, 2).some(button => !button.disabled)")
    tab.click("#records a", "Download as CSV")
    until((tab.downloads / "person.csv").exists)
    with (tab.downloads / "person.csv").open(newline="", encoding="utf-8") as lines:
        assert sorted(int(row["id"]) for row in csv.DictReader(lines)) == sorted(row[0] for row in found)
    opened = tab.js(first)
    tab.js("document.querySelector('#records tbody button').focus()")
    tab.press("Enter", 13, "\r")
    assert tab.js("document.querySelector('dialog td').textContent") == opened
    assert tab.js("document.querySelector('dialog a').getAttribute('href')") == f"records/person/{opened}"
    tab.press("Escape", 27)
    tab.until("!document.querySelector('dialog')")
    assert tab.js("document.activeElement.textContent") == "1"
    tab.js("document.querySelector('#records [name=id]').focus()")
    tab.call("Input.insertText", text="many")
    tab.until(f"{said}.includes('cannot be compared with')")
    tab.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=False)
    assert tab.js("document.documentElement.scrollWidth") <= 390
    assert not tab.complaints


BUTTONS = "[...document.querySelectorAll('#records button')]"
EVIL = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"""


@browsing
def test_in_a_browser_what_others_named_is_only_ever_text(at_work: tuple[taskapi.Service, str], tab: Tab,
                                                          tmp_path: Path) -> None:
    """File names, fields, values and errors that are markup; dropped on the window, and chosen."""
    _, url = at_work
    good, bad = tmp_path / "good<b>&'.json", tmp_path / f"bad {EVIL.replace('/', '')}.csv"
    good.write_text(json.dumps([{EVIL[:60]: EVIL, "n": 2**60 + 1}] * 3), encoding="utf-8")
    bad.write_text(f'a,b\n1,2\n{EVIL.replace(",", "")},"', encoding="utf-8")
    tab.open(f"{url}/ui#upload")
    tab.drop(good)
    tab.until("document.querySelector('#jobs .completed')")
    chosen = tab.call("Runtime.evaluate", expression="document.querySelector('#files')")["result"]["objectId"]
    tab.call("DOM.setFileInputFiles", files=[str(bad)], objectId=chosen)
    tab.until("document.querySelector('#jobs .failed .problem')?.innerText.includes('line 3')")
    assert f"bad {EVIL.replace('/', '')}.csv" in tab.text("#jobs")
    tab.click("#jobs .completed a", "Look at the records")
    tab.until("document.querySelector('#records td')")
    assert EVIL in tab.text("#records td")
    assert str(2**60 + 1) in tab.text("#records td")
    assert EVIL[:60] in tab.text("#records th")
    assert tab.js("document.querySelectorAll('img, main script, main b b').length") == 0
    assert tab.js("document.title") == "taskapi"
    assert "TypeError" in tab.js("{try { document.body.innerHTML = '<p>'; 'open' } catch (error) { String(error) }}")
    tab.complaints = [entry for entry in tab.complaints if "TrustedTypes" not in json.dumps(entry)
                      and "TrustedHTML" not in json.dumps(entry)]  # of the line above
    tab.click("#jobs .failed button", "Delete")
    tab.click("#jobs .failed button", "Delete for good?")
    tab.until("!document.querySelector('#jobs .failed')")


@browsing
def test_in_a_browser_a_running_job_is_canceled_and_tried_again(at_work: tuple[taskapi.Service, str], tab: Tab) -> None:
    """With a progress bar on the way; the filter shows what it says; what is wrong is said at the field."""
    service, url = at_work
    tab.open(url)
    job = service.enqueue("generate", BUSY)
    tab.until("document.querySelector('#jobs .in-progress progress')?.value > 0")
    tab.until(r"/ of 2,000,000, \d+ %, about .+ left/.test(document.querySelector('#jobs .in-progress').textContent)")
    tab.until("/ 1 running/.test(document.querySelector('#health').textContent)")
    tab.click("#jobs button", "Cancel")
    tab.until("document.querySelector('#jobs .canceled')")
    assert service.queue.jobs.get(job.job_id).status == "canceled"
    assert tab.text("#jobs .canceled .problem") == ""  # who has pressed Cancel knows why
    tab.click("#jobs button", "Retry")
    tab.until("document.querySelector('#jobs .in-progress')")
    tab.click("#jobs button", "Cancel")
    tab.until("document.querySelector('#jobs .canceled')")
    tab.js("{const status = document.querySelector('#by-status'); status.value = 'failed'; status.onchange()}")
    tab.until("document.querySelector('#no-jobs').textContent === 'No job is like that.'")
    tab.type(".field input[list]", "sequenc")
    tab.until("document.querySelector('.field .problem').textContent.includes('sequence')")


@browsing
def test_in_a_browser_the_keyboard_is_enough(at_work: tuple[taskapi.Service, str], tab: Tab) -> None:
    """Related types of a preset, a field added from the list, and a request that is edited as JSON."""
    service, url = at_work
    tab.open(url)
    tab.js("document.querySelector('#presets button:last-child').focus()")
    tab.press("Enter", 13, "\r")
    tab.until("document.querySelectorAll('#preview table').length === 3")
    tab.js("document.querySelector('#as-json').focus()")
    tab.press("Enter", 13, "\r")
    shown = json.loads(tab.js("document.querySelector('#json').value"))
    assert [*shown["records"]] == ["customer", "order", "item"]
    tab.type("#json", "[1]")
    tab.until("document.querySelector('#generate-problem').textContent === 'The request has to be an object.'")
    tab.click("#go")
    tab.type("#json", json.dumps({"recordType": "thing", "count": 3, "seed": 5, "schema": {"id": "sequence"}}))
    tab.until("document.querySelectorAll('#preview th').length === 1")
    tab.js("document.querySelector('#as-fields').focus()")
    tab.press("Enter", 13, "\r")
    tab.js("document.querySelector('#adding').open = true")
    tab.type("#search", "ipv6")
    tab.press("Enter", 13, "\r")
    tab.until("document.querySelectorAll('#preview th').length === 2")
    assert tab.js("document.activeElement.value") == "ipv6"
    tab.call("Input.insertText", text="address")
    tab.until("document.querySelector('#preview th.now')?.textContent === 'address'")
    tab.press("ArrowUp", 38, modifiers=1)
    tab.until("document.querySelector('#preview th').textContent === 'address'")
    assert tab.js("document.activeElement.value") == "address"
    tab.js("document.querySelector('#count').focus()")
    tab.press("Enter", 13, "\r")
    tab.until("document.querySelector('#jobs .completed')")
    assert [*map(len, plain(service.folder.root, "SELECT * FROM thing"))] == [5] * 3


@browsing
def test_in_a_browser_the_page_outlives_the_server(tmp_path: Path, tab: Tab) -> None:
    """It says that the server is gone, keeps what was typed, and goes on by itself."""
    with Live(tmp_path / "data") as live:
        tab.open(live.url)
        tab.type("#count", "7")
        live.end()
        tab.until("document.querySelector('#offline').checkVisibility()")
        with Live(tmp_path / "data", "--port", str(urlsplit(live.url).port)) as again:
            tab.until("!document.querySelector('#offline').checkVisibility()")
            tab.click("#go", "Generate 7 records")
            tab.until("document.querySelector('#jobs .completed')")
            assert [job["progress"]["done"] for job in again.ask("GET", "/jobs").json["items"]] == [7]


WINDOWS = [(1280, 800), (1280, 640), (390, 844)]
COVERED = """(() => { const node = document.activeElement, {x, y, width, height} = node.getBoundingClientRect();
  const top = document.elementFromPoint(x + width / 2, y + Math.min(height / 2, 12));
  return node === document.body || node.contains(top) ? "" : node.outerHTML.slice(0, 99) + top?.outerHTML.slice(0, 99);
})()"""


@browsing
def test_in_a_browser_nothing_hides_what_has_the_focus(at_work: tuple[taskapi.Service, str], tab: Tab) -> None:
    """By Tab through the whole page of a large preset, on two screens; nothing is wider than the window."""
    service, url = at_work
    service.wait(service.enqueue("generate", {"recordType": "shop", "count": 30, "seed": 1}).job_id)
    long = {"long": {"type": "choice", "values": ["W" * 60, "a label of many words " * 5]}, "w" * 60: "word"}
    service.wait(service.enqueue("generate", {"recordType": "wide", "count": 30, "schema": long}).job_id)
    for size in WINDOWS[1:]:
        tab.window(*size)
        tab.open(f"{url}/ui#generate")
        tab.click("#presets button", "shop")
        tab.until("document.querySelectorAll('#preview table').length === 3")
        wide = size[0] > 1000
        tab.until("document.querySelector('#fields').getBoundingClientRect().right < "
                  f"document.querySelector('#preview').getBoundingClientRect().left === {str(wide).lower()}")
        tab.js("document.querySelector('#adding').open = true; document.querySelector('#recordType').focus()")
        for _ in range(90):
            tab.press("Tab", 9)
            assert tab.js(COVERED) == "", size
        for view in ("upload", "export", "records/wide", "jobs", "run"):
            tab.js(f"location.hash = '{view}'")
            tab.until(f"document.querySelector('main').className === '{view.partition('/')[0]}'")
            if view.startswith("records"):
                tab.until("document.querySelector('.bar')")
                assert tab.js("[...document.querySelectorAll('figure *')].every(node => node.getBoundingClientRect()"
                              ".right <= node.closest('figure').getBoundingClientRect().right)")
            assert tab.js("document.documentElement.scrollWidth <= innerWidth"), (view, size)
            assert tab.js("[...document.querySelectorAll('summary, button')].every(node => !node.checkVisibility() || "
                          "node.getBoundingClientRect().height >= 24)"), view


@browsing
def test_in_a_browser_a_schema_is_edited_undone_kept_and_opened(at_work: tuple[taskapi.Service, str], tab: Tab,
                                                                tmp_path: Path) -> None:
    """Rename with a conflict, copy, remove, undo; kept by name and as a file; a CSV header, a JSON Schema pasted."""
    _, url = at_work
    names = "[...document.querySelectorAll('#fields .field > input:first-child')].map(input => input.value)"
    tab.open(url)
    tab.click("#presets button", "event")
    tab.until(f"{names}[1] !== 'firstName'")
    start = tab.js(names)
    tab.type("#fields .field:nth-child(2) > input", start[0])
    assert tab.text("#fields .field:nth-child(2) .problem") == f"There is a field {start[0]} already."
    tab.type("#fields .field:nth-child(2) > input", "renamed")
    tab.until("document.querySelector('#preview th:nth-child(2)')?.textContent === 'renamed'")
    tab.click("#fields .field:nth-child(2) [title=Copy]")
    assert tab.js("document.activeElement.value") == "renamed_2"
    tab.until("document.querySelector('#preview th.now')?.textContent === 'renamed_2'")
    tab.click("#fields .field:nth-child(1) [title=Remove]")
    tab.click("#fields .field:nth-child(1) [title='Move down']")
    assert tab.js(names) == ["renamed_2", "renamed", *start[2:]]
    tab.press("z", 90, modifiers=2)
    tab.press("z", 90, modifiers=2)
    assert tab.js(names) == [start[0], "renamed", "renamed_2", *start[2:]]
    tab.click("#undo")
    tab.click("#undo")
    assert tab.js(names) == start
    for text in ("20", "30"):  # the keys typed into one field are one step, until that is undone
        tab.type("#count", text)
        tab.click("#undo")
        tab.click("#redo")
        assert tab.js("document.querySelector('#count').value") == text
    tab.click("#undo")
    tab.click("#undo")
    tab.type("#fields .field:nth-child(2) > input", "renamed")
    tab.press("Enter", 13, "\r")
    tab.js("document.querySelector('#keeping').open = true")
    tab.type("#keep-name", "mine")
    tab.click("#keep-form button", "Keep")
    tab.click("#keep-file")
    file = tab.downloads / "event.json"
    until(lambda: file.exists() and file.read_bytes())
    tab.type("#paste", 'id;"e-mail";customer_email;first name;first name;unheard')
    tab.click("#paste-form button")
    assert tab.js(names) == ["id", "e-mail", "customer_email", "first name", "first name_2", "unheard"]
    tab.until("document.querySelector('#preview td:nth-child(3)')?.textContent.includes('@')")
    tab.open(url)  # which forgets all but what is kept
    tab.js("document.querySelector('#keeping').open = true")
    tab.click("#kept button", "mine")
    assert tab.js(names) == [start[0], "renamed", *start[2:]]
    tab.click("#presets button", "person")
    chosen = tab.call("Runtime.evaluate", expression="document.querySelector('#keep-open')")["result"]["objectId"]
    tab.call("DOM.setFileInputFiles", files=[str(file)], objectId=chosen)
    tab.until(f"{names}[1] === 'renamed'")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Guest", "type": "object",
              "properties": {"age": {"type": "integer"}}}
    tab.type("#paste", json.dumps(schema))
    tab.click("#paste-form button")
    shown = json.loads(tab.js("document.querySelector('#json').value"))
    assert (shown["recordType"], shown["schema"]) == ("guest", schema)
    tab.click("#kept button", "✕")
    tab.until("!document.querySelector('#kept button')")
    assert ask(url, "GET", "/jobs").json["items"] == []


@browsing
def test_in_a_browser_jobs_of_every_type_are_used_again(at_work: tuple[taskapi.Service, str], tab: Tab, tmp_path: Path,
                                                        script: Callable[..., Any]) -> None:
    """An empty server is told of; a held job stands the same everywhere; each job fills the form that makes such."""
    service, url = at_work
    go = threading.Event()

    @script
    def halfway(context: taskapi.JobContext) -> taskapi.JobSteps:
        context.save(taskapi.Progress(done=3, total=8))
        while not go.is_set():
            go.wait(0.01)
            yield
        return taskapi.JobResult({})

    tab.open(f"{url}/ui#export")
    tab.until("document.querySelector('#view-export').innerText.includes('There are no records to export yet')")
    tab.click("nav a", "Run")
    tab.click("#run-types a", "script")
    tab.until("document.querySelector('#run-options input').placeholder === 'one'")
    tab.click("#run-form button", "Run")
    tab.until("/ 1 running/.test(document.querySelector('#health').textContent)")
    tab.until("document.querySelector('#run-said').textContent.includes('3 of 8, 37 %')")
    assert "3 of 8, 37 %" in tab.text("#jobs .in-progress")
    go.set()
    tab.until("document.querySelector('#run-said').textContent.includes('completed')")
    prices = {"price": {"type": "decimal", "min": "1.50", "max": "1.50"},
              "rate": {"type": "float", "max": 9, "round": 2}}
    service.wait(service.enqueue("generate", {"recordType": "thing", "count": 40, "seed": 1, "schema": prices}).job_id)
    export = service.enqueue("export", {"format": "ndjson", "gzip": True, "fields": ["price"], "orderBy": "-rate",
                                        "filters": {"recordType": "thing", "where": {"rate": {"gte": 0},
                                                                                     "price": {"null": False}}}})
    service.wait(export.job_id)
    file = tmp_path / "guests.csv"
    file.write_text("a;b\n1;2\n")
    tab.click("nav a", "Upload")
    tab.js("document.querySelector('#upload-how').open = true")
    tab.js("[...document.querySelectorAll('#upload-options label')].find(label => /delimiter/i.test(label.textContent))"
           ".querySelector('input').value = ';'")
    tab.drop(file)
    tab.until("document.querySelectorAll('#jobs .completed').length === 4")
    tab.js("location.hash = 'records/thing'")
    tab.until("document.querySelector('#records td')")
    rows = tab.js("[...document.querySelectorAll('#records td')].map(cell => cell.textContent)")
    assert {*rows[::2]} == {"1.50"}
    assert {len(text.partition(".")[2]) for text in rows[1::2]} == {2}
    tab.click("#jobs li:nth-child(1) button", "Use again")
    assert "guests.csv" in tab.text("#upload-said")
    assert ";" in tab.js("[...document.querySelectorAll('#upload-options input')].map(input => input.value)")
    tab.js("document.querySelector('#upload-form').reset(); location.hash = 'jobs'")
    for name, button in (("export", "Export"), ("script", "Run")):
        before = len(service.queue.jobs.page(None, name, 50, None)[0])
        tab.js(f"[...document.querySelectorAll('#jobs li')].find(card => card.textContent.startsWith('{name}'))"
               ".querySelector('.row button').click()")
        tab.click("section.shown form .primary", button)
        until(lambda name=name, before=before: len(service.queue.jobs.page(None, name, 50, None)[0]) == before + 1)
    again = service.queue.jobs.page(None, "export", 50, None)[0][0]
    assert again.request | {"filters": again.request["filters"] | {"where": None}} == export.request | {
        "filters": export.request["filters"] | {"where": None}}
    assert again.request["filters"]["where"] == {"rate": {"gte": "0"}, "price": {"null": False}}


AXE = next((file for file in map(Path, (os.environ.get("AXE", ""), HERE / "node_modules/axe-core/axe.min.js"))
            if file.is_file()), None)


@browsing
@pytest.mark.skipif(not AXE, reason="needs axe-core: npm install axe-core here, or AXE=axe.min.js")
def test_in_a_browser_axe_finds_nothing(at_work: tuple[taskapi.Service, str], tab: Tab) -> None:
    """WCAG 2.2 AA and best practices, on every view, light and dark, wide and narrow."""
    service, url = at_work
    service.wait(service.enqueue("generate", {"recordType": "event", "count": 50}).job_id)
    service.wait(service.enqueue("rows", {"columns": {"a": "int"}, "rows": [["no"]]}).job_id)
    check = ("axe.run(document, {resultTypes: ['violations'], rules: {'target-size': {enabled: true}}})"
             ".then(found => found.violations.map(({id, nodes}) => [id, nodes.map(node => node.html)]))")
    for view in ("ui#generate", "ui#upload", "ui#export", "ui#records/event", "ui#run/script", "ui#jobs", "docs"):
        tab.call("Page.navigate", url="about:blank")
        tab.call("Page.navigate", url=f"{url}/{view}")
        tab.until("location.protocol === 'http:' && document.readyState === 'complete'")
        if view != "docs":
            tab.until("document.querySelectorAll('#preview td').length && document.querySelector('#jobs li')")
        tab.js("for (const node of document.querySelectorAll('details')) node.open = true")
        tab.js(AXE.read_text(encoding="utf-8"))
        for scheme in ("light", "dark"):
            for size in WINDOWS[1:]:
                tab.window(*size, scheme)
                assert tab.js(check) == [], (view, scheme, size)


def test_the_documentation_page_needs_nothing_from_outside(url: str) -> None:
    """Every path is on it; no script but its own, no address of another host; references have their end."""
    answer = ask(url, "GET", "/docs")
    page = answer.body.decode()
    assert not [entry.path for entry in taskapi.all_routes() if entry.path not in page]
    assert len(re.findall(r"<script", page)) == 1
    assert "src=" not in page.replace(taskapi._ICON, "")
    assert {*re.findall(r"https?://[\w.:]+", page.replace(taskapi._ICON, ""))} == {url}
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    outline = Outline(page)
    assert outline.open == []
    assert len(outline.ids) == len({*outline.ids})
    assert "<th></th>" not in page


def test_the_documentation_page_shows_each_call_in_curl_python_and_javascript(service: taskapi.Service,
                                                                              script: Callable[..., Any]) -> None:
    """The curl ones are shell words whose JSON bodies are taken as they stand; the Python ones are Python."""
    with service.serving(port=0) as url:
        page = ask(url, "GET", "/docs").body.decode()
        examples = [unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", page, re.S)]
        assert len(examples) == 3 * len(taskapi.all_routes())
        answers = {}
        for curl, python, javascript in zip(examples[::3], examples[1::3], examples[2::3], strict=True):
            words = shlex.split(curl)
            address = next(word for word in words if word.startswith(url))
            assert all(address in text for text in (python, javascript))
            compile(python, "example", "exec")
            if "-d" in words:
                path, body = address.removeprefix(url), words[words.index("-d") + 1]
                answers[path] = ask(url, "POST", path, json.loads(body)).status
        posted = [f"/{kind.name}" for kind in taskapi.JOB_TYPES.values() if kind.posted]
        assert answers == {**dict.fromkeys(posted, 202), "/preview": 200, "/snapshots": 201}


@browsing
def test_in_a_browser_a_call_can_be_tried_from_the_documentation(at_work: tuple[taskapi.Service, str],
                                                                 tab: Tab) -> None:
    """A body, a path and a query as filled in; the answer stands below, an error's too."""
    _, url = at_work
    tab.call("Page.navigate", url=f"{url}/docs")
    tab.until("document.readyState === 'complete' && document.forms.length")

    def tried(call: str, **values: Any) -> tuple[str, Any]:
        form = f"document.getElementById({json.dumps(call)}).querySelector('form')"
        for name, value in values.items():
            tab.js(f"{form}.elements[{json.dumps(name)}].value = {json.dumps(value)}")
        tab.js(f"document.getElementById({json.dumps(call)}).open = true; {form}.querySelector('button').click()")
        tab.until(f"/^\\d/.test({form}.querySelector('output').textContent)")
        status, _, text = tab.js(f"{form}.querySelector('output').textContent").partition("\n")
        return status, json.loads(text)

    status, job = tried("post-generate", body='{"recordType": "person", "count": 3}', wait="30")
    assert (status, job["status"]) == ("202 Accepted", "completed")
    assert tried("get-status-jobId", jobId=job["jobId"])[1]["result"] == job["result"]
    status, page = tried("get-records-recordType", recordType="person", limit="2")
    assert (status, len(page["items"])) == ("200 OK", 2)
    assert tried("post-generate", body="{")[0] == "400 Bad Request"
    assert tried("get-status-jobId", jobId="a/b ?")[0] == "404 Not Found"
    assert tab.complaints == []


# ==== 11 Server ====


def test_a_server_says_where_it_is_in_one_line_and_stops_with_0(tmp_path: Path) -> None:
    """The URL, the data folder and the version; SIGINT and SIGTERM both end it.

    What was looked at is told by health, and logged where something is wrong, or with --log-level debug.
    """
    for flags, how in (((), signal.SIGKILL), (("--log-level", "debug"), signal.SIGINT), ((), signal.SIGTERM)):
        with Live(tmp_path / "data", *flags) as live:
            health = live.ask("GET", "/").json
            assert {"sqlite", "fileSystem", "freeSpace", "lastStop", "integrity"} <= health["checks"].keys()
            assert taskapi.__version__ in live.line
            assert str(tmp_path / "data") in live.line
            log = live.log.read_text()
            if how == signal.SIGKILL:
                assert log == ""
            elif flags:
                assert all(f"check {name}: " in log for name in health["checks"])
                assert "WARNING check lastStop: unclean" in log
            assert live.end(how) == (-how if how == signal.SIGKILL else 0)
    assert "Traceback" not in live.log.read_text()


def test_requests_in_flight_are_answered_when_the_server_stops(tmp_path: Path) -> None:
    """A long poll too, long before its time is over; running jobs go back to pending without a charge; exit 0."""
    with Live(tmp_path / "data") as live, plug(live.url) as upload, plug(live.url) as poll:
        job_id = live.make("/generate", BUSY)
        until(lambda: live.job(job_id)["progress"]["done"])
        poll.sendall(f"GET /status/{job_id}?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        body = form(b"x" * 100_000, "a.txt")
        upload.sendall(head(len(body)) + body[:50_000])
        assert live.ask("GET", "/").status == 200
        live.process.send_signal(signal.SIGTERM)
        upload.sendall(body[50_000:])
        assert parsed(rest(upload)).status == 201
        assert parsed(rest(poll)).json["status"] in ("in-progress", "pending")
        assert live.process.wait(25) == 0
    ended = plain(tmp_path / "data", "SELECT status, attempt FROM jobs ORDER BY id")
    assert ended == [("pending", 0), ("completed", 1)]
    assert_sound(tmp_path / "data")


def buggy(folder: Path, *work: str) -> str:
    """A program with a job type of its own, `buggy`, whose function has these lines."""
    program = folder / "buggy.py"
    program.write_text("\n".join([
        "import sys, taskapi", "class Request(taskapi.JobRequest): pass", "@taskapi.job_type('buggy', Request)",
        "def run(context, request):", *(f"    {line}" for line in work), "sys.exit(taskapi.main())"]))
    return str(program)


def test_a_job_that_never_pauses_cannot_keep_the_process(tmp_path: Path) -> None:
    """Exit 0 all the same, and the job is taken up by the next start."""
    program = buggy(tmp_path, "import os, threading", "if not os.path.exists('go'): threading.Event().wait()", "yield",
                    "return taskapi.JobResult({})")
    with Live(tmp_path / "data", program=program) as live:
        job_id = live.make("/buggy", {})
        until(lambda: live.job(job_id)["status"] == "in-progress")
        assert live.end() == 0
    (tmp_path / "go").touch()
    with Live(tmp_path / "data", program=program) as live:
        assert live.job(job_id, 30)["status"] == "completed"


def test_a_log_line_cannot_be_forged(live: Live) -> None:
    """Control characters of a request are escaped."""
    raw(live.url, b"GET /status/a%0a2026-01-01%20INFO%20forged%1b[31m HTTP/1.0\r\n\r\n")
    ask(live.url, "POST", "/upload", form(b"", "b\u2028forged\x85.zip"), FORM)
    log = live.log.read_text()
    assert not [line for line in log.splitlines() if line.startswith("2026-01-01 INFO")]
    assert "\x1b" not in log


def test_a_job_event_is_one_line_of_json_that_names_the_job(tmp_path: Path) -> None:
    """With --log-format json; a bug's traceback stays within the line of its job."""
    program = buggy(tmp_path, "yield 1 / 0")
    with Live(tmp_path / "data", "--log-format", "json", program=program) as live:
        jobs = [live.make("/generate", PERSONS), live.make("/buggy", {})]
        assert [live.job(job_id, 30)["status"] for job_id in jobs] == ["completed", "failed"]
        assert live.end() == 0
        events = [json.loads(line) for line in live.log.read_text().splitlines()]
    for job_id, ending in zip(jobs, ("completed", "failed"), strict=True):
        told = {event["message"].split()[3].rstrip(":,") for event in events if event.get("job") == job_id}
        assert told - {"met"} == {"pending", "in-progress", ending}
    assert [event["level"] for event in events if "Traceback" in event["message"]] == ["error"]
    assert {"at", "level", "logger", "message"} <= set.intersection(*map(set, events))


def test_a_traceback_is_real_lines_of_the_log_and_none_of_them_can_be_forged(tmp_path: Path) -> None:
    """Each indented, below the line that names the job."""
    program = buggy(tmp_path, "yield; raise ValueError('odd\\n2026-01-01 INFO forged\\x1b[31m')")
    with Live(tmp_path / "data", program=program) as live:
        job = live.job(live.make("/buggy", {}), 30)
        assert (job["status"], job["error"]) == ("failed", "ValueError: odd\n2026-01-01 INFO forged\x1b[31m")
        assert live.end() == 0
        lines = live.log.read_text().split("\n")
    at = next(number for number, line in enumerate(lines) if line.endswith(f"job {job['jobId']} buggy met a bug"))
    assert lines[at + 1] == "    Traceback (most recent call last):"
    assert f'      File "{program}", line 5, in run' in lines[at:]
    assert lines[lines.index("    ValueError: odd") + 1] == r"    2026-01-01 INFO forged\x1b[31m"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in /proc")
@pytest.mark.parametrize("inline", [True, False])
def test_leaving_the_with_leaves_nothing(tmp_path: Path, inline: bool) -> None:
    """No thread, descriptor or lock, after work, requests and a service that is opened again."""
    before = leftovers(tmp_path)
    for _ in range(2):
        with taskapi.open_service(tmp_path, inline=inline) as service, service.serving(port=0) as url:
            job = ask(url, "POST", "/generate", PERSONS).json
            assert ask(url, "GET", f"/status/{job['jobId']}?wait=30").json["status"] == "completed"
            export = service.wait(service.enqueue("export", {"format": "csv"}).job_id, 60)
            assert ask(url, "GET", f"/download/{export.job_id}").status == 200
        assert leftovers(tmp_path) == before
    with pytest.raises(taskapi.StorageError):
        service.queue.jobs.get(job["jobId"])


def test_two_services_live_side_by_side(tmp_path: Path) -> None:
    """Each with its own folder, jobs and port; the same folder twice is refused."""
    with taskapi.open_service(tmp_path / "a") as one, taskapi.open_service(tmp_path / "b") as two:
        with one.serving(port=0) as first, two.serving(port=0) as second:
            jobs = [ask(url, "POST", "/generate", {**PERSONS, "count": count}).json["jobId"]
                    for url, count in ((first, 3), (second, 5))]
            assert one.drain(60)
            assert two.drain(60)
            assert [len(ask(url, "GET", "/records/person").json["items"]) for url in (first, second)] == [3, 5]
            refused(ask(first, "GET", f"/status/{jobs[1]}"), 404)
        with pytest.raises(taskapi.StartupError, match=f"process {os.getpid()}"):
            taskapi.open_service(tmp_path / "a")


def test_enqueue_wait_and_drain_work_without_http(tmp_path: Path, script: Any) -> None:
    """The contract's section 9; wait gives up in time, and drain says whether it is done."""
    go = threading.Event()

    @script
    def waits(context: taskapi.JobContext) -> taskapi.JobSteps:
        yield
        assert go.wait(60)
        return taskapi.JobResult({"went": True})

    with taskapi.open_service(tmp_path) as service:
        job = service.enqueue("script", {})
        assert service.wait(job.job_id, 0.05).status in ("pending", "in-progress")
        assert service.drain(0.05) is False
        go.set()
        assert service.wait(job.job_id, 60).result == {"went": True}
        assert service.drain(60) is True
        with pytest.raises(taskapi.BadRequest, match="count"):
            service.enqueue("generate", {"cuont": 1})
        with pytest.raises(taskapi.NotFound):
            service.wait("0192", 0)


def test_a_wrong_setting_in_python_is_a_setting_error(tmp_path: Path) -> None:
    """With its name."""
    with pytest.raises(taskapi.SettingError, match="workers"):
        taskapi.open_service(tmp_path, workers=0)
    with pytest.raises(taskapi.SettingError, match="wokers"):
        taskapi.open_service(tmp_path, wokers=1)


# ==== 11 Server: the HTTP edge, what is broken, slow, hostile or cross-site ====

MAKING = [entry.path for entry in SERVED if entry.body and entry.path not in ("/upload", "/infer")]
STRANGE_BODIES = {
    "a name given twice": (b'{"count": 1, "count": 2}', "count"),
    "a name given twice within": (b'{"count": 1, "schema": {"a": {"type": "int", "min": 1, "min": 2}}}', "min"),
    "a name given twice as an escape": (rb'{"count": 1, "c\u006funt": 1}', "count"),
    "UTF-16": ('{"count": 1}'.encode("utf-16"), ""), "two marks": ('\ufeff\ufeff{"count": 1}'.encode(), ""),
    "Latin-1": ('{"recordType": "ä", "count": 1}'.encode("latin-1"), ""), "gzip": (gzip.compress(b'{"count": 1}'), ""),
    "a number of 5,000 digits": (b'{"count": ' + b"9" * 5000 + b"}", ""),
    "a value of 5,000 digits": (b'{"count": 1, "schema": {"a": {"type": "const", "value": ' + b"9" * 5000 + b"}}}", ""),
    "a float of 5,000 digits": (
        b'{"count": 1, "schema": {"a": {"type": "const", "value": 1' + b"0" * 5000 + b".5}}}", ""),
    "-Infinity": (b'{"count": 1, "schema": {"a": {"type": "const", "value": -Infinity}}}', ""),
    "lists in lists": (b'{"count": 1, "schema": {"a": ' + b"[" * 100_000, ""),
    "closed lists in lists": (b'{"count": 1, "schema": {"a": ' + b"[" * 150 + b"]" * 150 + b"}}", ""),
    "10,000 unknown names": (json.dumps({f"k{n}": n for n in range(10_000)}).encode(), ""),
    "a name of 100,000 characters": (json.dumps({"x" * 100_000: 1, "count": 1}).encode(), ""),
    "NUL": (b'{"count": 1, "recordType": "a\\u0000b"}', ""), "two values": (b'{"count": 1} {"count": 1}', ""),
    "a comment": (b'{"count": 1 /* one */}', ""), "null": (b"null", ""), "a text": (b'"{}"', ""),
    "a number": (b"1", ""),
    "spaces": (b" " * 1000, ""), "NULs": (b"\0" * 1000, "")}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose log has to stay free of errors."""
    with Live(tmp_path_factory.mktemp("edge") / "data") as live:
        yield live


@pytest.mark.parametrize("path", [entry.path for entry in SERVED if entry.method == "POST" and entry.path != "/ui"])
@pytest.mark.parametrize("case", named(STRANGE_BODIES))
def test_no_body_is_too_strange_to_be_refused(edge: Live, path: str, case: tuple[bytes, str]) -> None:
    """Each JSON endpoint names what is wrong; one that takes no body does not read it."""
    (body, word), entry_path = case, path
    path = path.replace("{jobId}", "0192")
    answer = edge.ask("POST", path, body, JSON)
    if path in ("/upload", "/infer") and answer.status in (200, 201):  # which take any text
        return
    refused(answer, 404 if "{" in entry_path else 400)
    if word and path in ("/generate", "/preview"):
        assert f"{word!r} is given twice" in answer.json["error"]


def test_a_name_given_twice_is_refused_in_every_model(edge: Live) -> None:
    """Deep in an export's filters too, where the model would have taken the last."""
    body = b'{"format": "csv", "filters": {"where": {"a": {"gte": 1, "gte": 2}}}}'
    assert "'gte' is given twice" in refused(edge.ask("POST", "/export", body, JSON), 400)["error"]


NAUGHTY = ["", " ", "%00", "%0d%0aX:%20y", "..%2f..%2fetc", "%2e%2e/", "%ff%fe", "%E2%80%AE", "'", "%22", "%22;DROP--",
           "%25s", "%7Bx%7D", "{jobId}", "null", "-1", "0", "1e999", "9" * 400, "%F0%9F%92%A9" * 50, "a" * 5000, "%",
           "%zz", "+", "*", "%5C", "%C0%AE", "%ED%A0%80", "$(id)", "%1b[31m", "true", "%EF%BB%BF", "CON", "?=", "?&&="]


def test_no_path_and_no_query_makes_the_server_fail(edge: Live) -> None:
    """Naughty strings in every place of every route: answers, no 5xx, and no line of the log that is not ours."""
    places: dict[str, None] = {}
    for entry, text in itertools.product(SERVED, NAUGHTY):
        shown = text.replace(" ", "%20")
        if "{" in entry.path:
            places[f"{entry.method} {re.sub('{[a-zA-Z]+}', lambda _, shown=shown: shown, entry.path)}"] = None
        for field in entry.query.model_fields.values() if entry.query else ():
            places[f"{entry.method} {re.sub('[{}]', '', entry.path)}?{field.alias}={shown}"] = None
    assert len(places) > 300
    with closing(http.client.HTTPConnection(urlsplit(edge.url).netloc, timeout=60)) as connection:
        for place in places:
            method, _, path = place.partition(" ")
            connection.putrequest(method, "")
            connection._buffer[0] = f"{place} HTTP/1.1".encode()  # as it is: http.client would refuse some
            connection.endheaders()
            response = connection.getresponse()
            response.read()
            assert 200 <= response.status < 500, (place, path)
    assert not [line for line in edge.log.read_text().splitlines() if not re.match(r"\d{4}-\d\d-\d\dT", line)]
    assert " ERROR " not in edge.log.read_text()


LOCAL = b"\r\nHost: localhost\r\nConnection: close\r\n"
POSTED = b"POST /generate HTTP/1.1" + LOCAL + b"Content-Type: application/json\r\n"
BROKEN_HTTP: dict[str, tuple[bytes, list[int]]] = {
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n", [400]),
    "a preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "HTTP/2.0": (b"GET / HTTP/2.0" + LOCAL + b"\r\n", [400]), "HTTP/0.9": (b"GET /\r\n\r\n", [400]),
    "HTTP/9.9": (b"GET / HTTP/9.9" + LOCAL + b"\r\n", [400]), "HTTP/1.2": (b"GET / HTTP/1.2" + LOCAL + b"\r\n", [400]),
    "no host": (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", [400]), "no request line": (b"GARBAGE\r\n\r\n", [400]),
    "a header without a colon": (b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n", [400]),
    "a space before the colon": (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", [400]),
    "a bare CR in a header": (b"GET / HTTP/1.1" + LOCAL + b"X: a\rb\r\n\r\n", [400]),
    "two spaces": (b"GET  / HTTP/1.1" + LOCAL + b"\r\n", [400]),
    "a method in lower case": (b"get / HTTP/1.1" + LOCAL + b"\r\n", [400]),
    "a method of 5,000 letters": (b"A" * 5000 + b" / HTTP/1.1" + LOCAL + b"\r\n", [405]),
    "a NUL in the method": (b"G\0T / HTTP/1.1" + LOCAL + b"\r\n", [400]),
    "a path of 60,000 characters": (b"GET /" + b"a" * 60_000 + b" HTTP/1.1" + LOCAL + b"\r\n", [404]),
    "a path of raw bytes": (b"GET /\xff\xfe HTTP/1.1" + LOCAL + b"\r\n", [400]),
    "a line of a log in the path": (b"GET /\n2026-01-01T00:00:00.000Z ERROR x HTTP/1.1" + LOCAL + b"\r\n", [400]),
    "a whole URL": (b"GET http://localhost/ HTTP/1.1" + LOCAL + b"\r\n", [200]),
    "a whole URL of another host": (b"GET http://evil.example/ HTTP/1.1" + LOCAL + b"\r\n", [421]),
    "a whole URL that is none": (b"GET http://[::1/ HTTP/1.1" + LOCAL + b"\r\n", [400]),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1" + LOCAL + b"\r\n", [204]),
    "CONNECT": (b"CONNECT evil.example:443 HTTP/1.1" + LOCAL + b"\r\n", [404]),
    "TRACE": (b"TRACE / HTTP/1.1" + LOCAL + b"\r\n", [405]),
    "an empty host": (b"GET / HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n", [421]),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n", [421]),
    "a host with a user": (b"GET / HTTP/1.1\r\nHost: evil.example@localhost\r\nConnection: close\r\n\r\n", [421]),
    "a host with a path": (b"GET / HTTP/1.1\r\nHost: localhost/../x\r\nConnection: close\r\n\r\n", [421]),
    "a host of raw bytes": (b"GET / HTTP/1.1\r\nHost: \xff\r\nConnection: close\r\n\r\n", [421]),
    "a transfer coding that nobody knows": (POSTED + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", [400]),
    "two ends": (POSTED + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", [400]),
    "chunks in HTTP/1.0": (POSTED.replace(b"/1.1", b"/1.0") +
                           b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", [400]),
    **{f"a length of {length}": (POSTED + b"Content-Length: %b\r\n\r\n{}" % length.encode(), [400])
       for length in ("ten", "-1", "+2", "2\r\nContent-Length: 3")},
    **{f"chunks of {data!r}": (POSTED + b"Transfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n" % data, [400])
       for data in (b"ten\r\n{}\r\n", b"2\r\n{}XX")},
    "a length of 23 digits": (POSTED + b"Content-Length: 99999999999999999999999\r\n\r\n", [413]),
    "a length of 5,000 digits": (POSTED + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", [400]),
    "a length in superscript": (POSTED + b"Content-Length: \xb2\r\n\r\n{}", [400]),
    "an empty length": (POSTED + b"Content-Length:\r\n\r\n{}", [400]),
    "a negative chunk": (POSTED + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n", [400]),
    "a chunk of 0x2": (POSTED + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n", [400]),
    "trailers without end": (POSTED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 300_000, [413]),
    "a folded first header": (b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n", [400]),
    "a folded header": (b"GET / HTTP/1.1" + LOCAL + b"X: a\r\n b\r\n\r\n", [200]),
    "a NUL in a header": (b"GET / HTTP/1.1" + LOCAL + b"X: a\0b\r\n\r\n", [400]),
    "a header without a name": (b"GET / HTTP/1.1" + LOCAL + b": x\r\n\r\n", [400]),
    "a name of raw bytes": (b"GET / HTTP/1.1" + LOCAL + b"X\xff: x\r\n\r\n", [400]),
    "12,000 headers": (b"GET / HTTP/1.1" + LOCAL + b"A: b\r\n" * 12_000 + b"\r\n", [431]),
    "a length with an underscore": (b"POST /generate HTTP/1.1" + LOCAL + b"Content_Length: 5\r\n\r\n", [415]),
    "an expectation that nobody knows": (POSTED + b"Expect: 200-ok\r\nContent-Length: 2\r\n\r\n{}", [400]),
    "a GET with a body": (b"GET / HTTP/1.1" + LOCAL + b"Content-Length: 5\r\n\r\nhello", [200]),
    "empty lines first": (b"\r\n\r\nGET / HTTP/1.1" + LOCAL + b"\r\n", [200]),
    "garbage after a request": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGARBAGE\r\n\r\n", [200, 400]),
    "a request behind a body": (POSTED.replace(b"Connection: close\r\n", b"") + b"Content-Length: 2\r\n\r\n{}"
                                b"GET /x HTTP/1.1" + LOCAL + b"\r\n", [400, 404]),
    "a query of raw bytes": (b"GET /jobs?after=\xff HTTP/1.1" + LOCAL + b"\r\n", [400]),
    "a key of raw bytes": (POSTED + b"Idempotency-Key: \xff\x01\r\nContent-Length: 11\r\n\r\n{\"count\":1}", [400])}


def statuses_in(data: bytes) -> list[int]:
    """The statuses of the answers that a raw connection brought."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d+) ", data)]


def test_empty_lines_are_taken_all_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair by itself, with a copy of what follows, would keep the loop busy for seconds."""
    looks, find = [], taskapi.waitress.parser.find_double_newline
    monkeypatch.setattr("waitress.parser.find_double_newline", lambda data: looks.append(1) or find(data))
    assert raw(url, b"\r\n" * 20_000 + b"GET /health HTTP/1.1" + LOCAL + b"\r\n").status == 200
    assert len(looks) < 1000


@pytest.mark.parametrize("case", named(BROKEN_HTTP))
def test_broken_http_is_answered_and_the_connection_closed(edge: Live, case: tuple[bytes, list[int]]) -> None:
    """No case is a 500, hangs, or leaves a line in the log that is an error's or not ours."""
    data, statuses = case
    with plug(edge.url) as connection:
        connection.sendall(data)
        answer = rest(connection)
    assert statuses_in(answer) == statuses
    if statuses[-1] >= 400:
        body = json.loads(answer.rpartition(b"\r\n\r\n")[2])
        assert body["status"] == statuses[-1]
        assert len(body["error"]) <= 1000
    log = edge.log.read_text()
    assert " ERROR " not in log
    assert not [line for line in log.splitlines() if not re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z (INFO|WARNING)", line)]


def on_one_connection(url: str, *requests: bytes) -> list[int]:
    """The statuses of what is asked on one connection, which has to stay open in between."""
    with plug(url) as connection:
        met = []
        for request in requests:
            connection.sendall(request)
            response = http.client.HTTPResponse(connection, method=request.split()[0].decode())
            response.begin()
            response.read()
            met.append(response.status)
    return met


def test_a_connection_stays_open_where_it_can(url: str) -> None:
    """After answers without a body, refusals that leave nothing unread, HEAD and OPTIONS."""
    job = ask(url, "POST", "/upload", form(), FORM).json
    tag = ask(url, "GET", job["links"]["download"]).headers["ETag"]

    def request(method: str, path: str, *lines: str) -> bytes:
        return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()

    download = job["links"]["download"]
    assert on_one_connection(
        url, request("GET", download, f"If-None-Match: {tag}"), request("HEAD", download), request("OPTIONS", "/jobs"),
        request("GET", "/nowhere"), request("PUT", "/generate"), request("POST", "/generate", "Content-Length: 0"),
        request("GET", "/", "Host: evil.example").replace(b"Host: localhost\r\n", b""),
        request("DELETE", f"/jobs/{job['jobId']}", "Sec-Fetch-Site: cross-site"),
        request("DELETE", f"/jobs/{job['jobId']}"), request("GET", "/", "Connection: close"),
    ) == [304, 200, 204, 404, 405, 415, 421, 403, 204, 200]


@pytest.mark.parametrize("path", [entry.path for entry in SERVED if "{" not in entry.path])
def test_head_and_options_answer_for_every_path(edge: Live, path: str) -> None:
    """HEAD with the headers of GET; OPTIONS with the methods."""
    methods = {entry.method for entry in SERVED if entry.path == path}
    options = edge.ask("OPTIONS", path)
    allowed = methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
    assert (options.status, options.body) == (204, b"")
    assert set(options.headers["Allow"].split(", ")) == allowed
    if "GET" in methods:
        bare, whole = edge.ask("HEAD", path), edge.ask("GET", path)
        assert (bare.status, bare.body, bare.headers.keys()) == (whole.status, b"", whole.headers.keys())
        assert whole.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in whole.headers["Content-Security-Policy"]
        assert whole.headers["Cache-Control"] in ("no-store", "private, no-cache")


@pytest.mark.parametrize("begun", [
    b"GET / HTTP/1.1\nHost: localhost\n\n", POSTED + b"Content-Length: 10\r\n\r\n{",
    POSTED + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n{"], ids=["head", "body", "chunk"])
def test_a_request_that_takes_too_long_is_refused(url: str, monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    """Whatever is missing: in total time, so that a byte now and then does not help."""
    monkeypatch.setattr(taskapi, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(taskapi, "_SLOWEST", 2**30)
    with plug(url) as connection:
        connection.sendall(begun)
        refused(parsed(rest(connection)), 400, "too long")


def cut_off(connection: socket.socket) -> bool:
    """True once the other side has closed."""
    try:
        connection.sendall(b" ")
    except ConnectionError:
        return True
    return False


def test_a_client_that_does_not_read_holds_no_thread_and_not_for_ever(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are threads ask for megabytes behind megabytes; another client is served, and they are cut."""
    with taskapi.open_service(tmp_path, inline=True, threads=2) as service, service.serving(port=0) as url, \
            contextlib.ExitStack() as slow:
        download = ask(url, "POST", "/upload", form(b"x" * 20_000_000, "a.txt"), FORM).json["links"]["download"]
        monkeypatch.setattr(taskapi, "_PATIENCE_SECONDS", 0.5)
        monkeypatch.setattr(taskapi, "_SLOWEST", 2**40)
        connections = [slow.enter_context(plug(url)) for _ in range(3)]
        for connection in connections:
            connection.sendall(f"GET {download} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 3)
            assert connection.recv(1) == b"H"
        until(lambda: ask(url, "GET", "/jobs").status == 200)  # which may take too long itself on a busy machine
        for connection in connections:
            until(lambda connection=connection: cut_off(connection))


def test_a_download_is_whole_however_slowly_it_is_read_behind_others(tmp_path: Path) -> None:
    """Three large answers asked for at once on one connection, read in small pieces."""
    content = Random(1).randbytes(9_000_000)
    with taskapi.open_service(tmp_path, inline=True, threads=2) as service, service.serving(port=0) as url:
        job = ask(url, "POST", "/upload", form(b"PK\x03\x04" + content, "a.zip"), FORM).json
        lines = f"GET {job['links']['download']} HTTP/1.1\r\nHost: localhost\r\n"
        with plug(url) as slow:
            slow.sendall(f"{lines}\r\n{lines}\r\n{lines}Connection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: slow.recv(4096), b""))
    assert answer.count(content) == 3


def test_a_large_download_takes_no_memory(tmp_path: Path) -> None:
    """The file leaves as the client takes it."""
    content = Random(1).randbytes(64 * 2**20)
    with Live(tmp_path / "data") as live:
        job = live.ask("POST", "/upload", form(b"PK\x03\x04" + content, "a.zip"), FORM).json
        before = peak(live)
        assert live.ask("GET", job["links"]["download"]).body[4:] == content
        assert peak(live) - before < 32


def test_a_client_that_goes_away_ends_its_long_poll_and_one_that_only_stops_sending_is_answered(tmp_path: Path) -> None:
    """So that a poll that perhaps nobody waits for holds no thread for thirty seconds."""
    with held(tmp_path) as (service, _), service.serving(port=0) as url:
        job_id = ask(url, "POST", "/generate", PERSONS).json["jobId"]
        poll = f"GET /status/{job_id}?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        with plug(url) as connection:
            connection.sendall(poll)
            until(lambda: service.queue._waiters)
        until(lambda: not service.queue._waiters, 25)
        with plug(url) as connection:
            connection.sendall(poll)
            until(lambda: service.queue._waiters)
            connection.shutdown(socket.SHUT_WR)
            assert parsed(rest(connection)).json["status"] == "pending"


def test_five_hundred_idle_connections_do_not_stop_the_next_one(tmp_path: Path) -> None:
    """They are only listened to."""
    resource = pytest.importorskip("resource", reason="limits of descriptors are a matter of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1000:
        pytest.skip("the test itself needs 600 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1000), hard))
    try:
        with Live(tmp_path / "data") as live, contextlib.ExitStack() as idle:
            for _ in range(500):
                idle.enter_context(plug(live.url))
            assert live.ask("GET", "/jobs").status == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_that_ask_nothing_make_room_for_new_ones(
        service: taskapi.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """When there are as many as the server takes; the ones that wait for an answer keep their place."""
    monkeypatch.setattr(taskapi, "_CONNECTIONS", 40)
    with service.serving(port=0) as url, contextlib.ExitStack() as idle:
        busy = idle.enter_context(plug(url))
        busy.sendall(b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nX: ")
        for _ in range(60):
            idle.enter_context(plug(url))
        assert ask(url, "GET", "/jobs").status == 200
        busy.sendall(b"y\r\nConnection: close\r\n\r\n")
        assert parsed(rest(busy)).status == 200


@pytest.mark.slow
@pytest.mark.parametrize("checks", [
    ["--exclude-checks", "positive_data_acceptance", "--max-time", "20", "--max-examples", "10"],
    ["--checks", "all", "--max-time", "90", "--max-examples", "40", "--exclude-path-regex",
     "^/(generate|preview|upload|infer)$"]], ids=["answers", "all"])
def test_schemathesis_finds_no_answer_that_is_not_described(tmp_path: Path, checks: list[str]) -> None:
    """No 5xx, no undocumented status, type or header, no answer that breaks its schema, nothing wrong accepted; and
    nothing right refused, but for bodies of which a schema cannot say all: files, and the fields of records."""
    with Live(tmp_path / "data", "--max-records", "1000") as live:
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", "--seed",
                   "1", *checks, "--no-color", "--generation-database", "none",
                   f"{live.url}/openapi.json"]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        print(found.stdout[-1500:])
        assert found.returncode == 0, found.stdout
        assert re.search(r"[1-9]\d* generated, [1-9]\d* passed", found.stdout)  # how many: as the time allows
        assert "Traceback" not in live.log.read_text()


@pytest.fixture
def stranger() -> Iterator[str]:
    """The URL of a server that is not taskapi."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"hello": 1}')

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


ATTACK = """(async () => {
  const target = TARGET, report = {};
  async function attempt(name, work) {
    try { report[name] = String(await work()); } catch (error) { report[name] = "refused: " + error.name; }
  }
  function form(path, type, name, value) {
    const frame = Object.assign(document.createElement("iframe"), {name: "f" + Math.random()});
    document.body.append(frame);
    const form = Object.assign(document.createElement("form"), {method: "post", action: target + path, enctype: type,
                                                               target: frame.name});
    form.append(Object.assign(document.createElement("input"), {name, value}));
    document.body.append(form);
    return new Promise(done => { frame.onload = () => done("sent"); form.submit(); });
  }
  for (const [method, path] of ROUTES) {
    const sends = method == "POST";
    await attempt(`read ${method} ${path}`, async () => (await fetch(target + path, {method})).text());
    if (!sends && method != "GET") continue;
    const body = sends ? '{"count": 1, "format": "csv"}' : undefined;
    await attempt(`blind ${method} ${path}`, async () =>
      (await fetch(target + path, {method, mode: "no-cors", body, headers: {"Content-Type": "text/plain"}})).type);
    if (!sends) continue;
    await attempt(`json ${path}`, async () =>
      (await fetch(target + path, {method, body, headers: {"Content-Type": "application/json"}})).text());
    const data = new FormData();
    data.append("file", new Blob(["a,b"]), "a.csv");
    await attempt(`upload ${path}`, async () =>
      (await fetch(target + path, {method, mode: "no-cors", body: data})).type);
    for (const type of ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
      await attempt(`form ${type} ${path}`, () => form(path, type, '{"count": 1, "x": "', '"}'));
  }
  return report; })()"""


@browsing
@pytest.mark.parametrize("rebound", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["origin", "rebound"])
def test_a_page_of_another_site_can_neither_read_nor_cause_anything(
        tmp_path: Path, tab: Tab, stranger: str, rebound: bool) -> None:
    """A real browser, every route: forms, blind fetches and uploads; and the same from a name that turns to us."""
    with Live(tmp_path / "data") as live:
        job_id = live.make("/generate", PERSONS)
        assert live.job(job_id, 30)["status"] == "completed"
        before = plain(tmp_path / "data", "SELECT id, status, attempt FROM jobs")
        routes = [(entry.method, entry.path.replace("{jobId}", job_id).replace("{recordType}", "person"))
                  for entry in SERVED]
        target = f"http://rebound.example:{urlsplit(live.url).port}" if rebound else live.url
        tab.call("Page.navigate", url=stranger.replace("127.0.0.1", "evil.example"))
        tab.until("location.hostname === 'evil.example' && document.readyState === 'complete'")
        report = tab.js(ATTACK.replace("TARGET", json.dumps(target)).replace("ROUTES", json.dumps(routes)))
        tab.complaints.clear()  # of what was refused
        assert report.keys() > {f"read {method} {path}" for method, path in routes}
        for attempt, result in report.items():
            assert result in ("refused: TypeError", "opaque", "sent"), (attempt, result)
        assert plain(tmp_path / "data", "SELECT id, status, attempt FROM jobs") == before
        assert live.ask("GET", "/records").json["items"][0]["count"] == 10
        assert not [*(tmp_path / "data" / "uploads").iterdir()]


# ==== 11 Server: the command line, fixtures, embedding ====


@pytest.fixture(params=["folder", "server"])
def either(request: pytest.FixtureRequest, tmp_path: Path, run: Callable[..., Ran]) -> Iterator[Callable[..., Ran]]:
    """`run`, once with the data folder to itself, once with a server that has it."""
    if request.param == "folder":
        yield run
        return
    with taskapi.open_service(tmp_path / "data") as service, service.serving(port=0):
        yield run


def test_each_command_does_the_same_in_the_folder_and_through_the_server_that_has_it(
        either: Callable[..., Ran], tmp_path: Path) -> None:
    """From generate to delete; stdout holds data alone, and a pipe sees no progress."""
    ran = either("generate", "person", "--count", "300", "--seed", "1", "--now", "2026-01-01", "--out", "people.csv")
    assert ran == (0, "", "")
    with (tmp_path / "people.csv").open(newline="", encoding="utf-8") as file:
        people = [*csv.DictReader(file)]
    stored = plain(tmp_path / "data", "SELECT name, email FROM person ORDER BY _id")
    assert [(person["name"], person["email"]) for person in people] == stored
    assert len(stored) == 300
    assert either("records", "person", "--or", "id=7", "--or", "id.in=2,3&id.gt=2", "--order-by=-id", "--fields", "id",
                  "--format", "csv").out == "\"id\"\r\n7\r\n3\r\n"
    assert json.loads(either("records", "person", "--where", "id.lt=3", "--fields", "id", "--json").out) == [
        {"id": 1}, {"id": 2}]
    assert either("records", "person", "--where", "id.lt=3", "--fields", "id").out.split() == ["id", "1", "2"]
    assert either("export", "person", "--or", "id=7", "--or", "id=3", "--fields", "id").out == '"id"\r\n3\r\n7\r\n'
    for wrong, told in (("idd=3", "did you mean 'id'"), ("id", "FIELD.OPERATOR=VALUE")):
        refusal = either("records", "person", "--where", wrong)
        assert (refusal.code, refusal.out) == (2, "")
        assert told in refusal.err
    ran = either("export", "person", "--where", "id.lte=20", "--where", "id.in=2,3,400", "--fields", "id,name",
                 "--order-by", "-id", "--format", "ndjson")
    assert [json.loads(line)["id"] for line in ran.out.splitlines()] == [3, 2]
    assert ran[::2] == (0, "")
    ran = either("ingest", "people.csv", "--type", "customer", "--json")
    assert json.loads(ran.out)[0]["result"]["records"] == 300
    assert plain(tmp_path / "data", "SELECT name, email FROM customer ORDER BY _id") == stored
    assert [line.split()[:2] for line in either("records").out.splitlines()] == [["customer", "300"], ["person", "300"]]
    jobs = json.loads(either("jobs", "--json").out)
    assert [job["type"] for job in jobs] == ["ingest", "generate"], "exports that were handed over are gone"
    assert [line.split()[:3] for line in either("jobs", "--type", "generate").out.splitlines()] == [
        [jobs[1]["jobId"], "generate", "completed"]]
    assert json.loads(either("status", jobs[0]["jobId"]).out) == jobs[0]
    assert either("cancel", jobs[0]["jobId"])[:2] == (1, "")
    assert either("delete", jobs[0]["jobId"]) == (0, "", "")
    assert [line.split()[0] for line in either("records").out.splitlines()] == ["person"]
    assert "no job" in either("status", jobs[0]["jobId"]).err
    assert_sound(tmp_path / "data")


def test_a_file_as_large_as_you_like_is_ingested_by_its_owner_but_not_through_a_server(
        tmp_path: Path, run: Callable[..., Ran]) -> None:
    """The limit is for clients from elsewhere; a refusal in the middle of the body is still read."""
    (tmp_path / "long.csv").write_text("a\n" + f"{'x' * 9999}\n" * 400)
    with taskapi.open_service(tmp_path / "data", max_upload_bytes=1000) as service, service.serving(port=0):
        code, out, err = run("ingest", "long.csv")
        assert (code, out) == (2, "")
        assert "larger than 1000 bytes" in err
    assert run("ingest", "long.csv", "--max-upload-bytes", "1000").code == 0
    assert plain(tmp_path / "data", "SELECT count(*), max(length(a)) FROM long") == [(400, 9999)]


def test_ingest_says_what_was_taken_otherwise_than_it_stands(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """Behind the job, where an error would be."""
    (tmp_path / "bare.csv").write_bytes(b"7,Ann\n8,Bob\n9,caf\xe9\n")
    (tmp_path / "named.csv").write_text("_id,_job\n1,2\n")
    assert run("ingest", "bare.csv").out.rstrip().endswith("bare  header: none, encoding: windows-1252")
    assert run("ingest", "named.csv").out.rstrip().endswith("named  renamed: 2")


def test_infer_gives_a_schema_that_generate_takes(
        tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """From stdin, from a file, and as a bare schema; --discard leaves the data folder as it was."""
    rows = "".join(f"{number},{'pro' if number % 3 else 'free'}\n" for number in range(1, 61))
    (tmp_path / "sample.csv").write_text(f"id,plan\n{rows}")
    inferred = run("infer", "sample.csv")
    assert inferred.code == 0
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr("sys.stdin", io.StringIO(inferred.out))
    ran = run("generate", "--schema", "-", "--count", "30", "--out", "-", "--format", "json", "--discard")
    assert {record["plan"] for record in json.loads(ran.out)} == {"pro", "free"}
    assert len(json.loads(ran.out)) == 30
    assert plain(tmp_path / "data", "SELECT count(*) FROM jobs") == [0]
    (tmp_path / "signup.json").write_text(json.dumps(json.loads(inferred.out)["schema"]))
    ran = run("generate", "--schema", "signup.json", "--count", "2", "--json")
    assert json.loads(ran.out)[0]["request"]["recordType"] == "signup"


@pytest.mark.parametrize(("out", "begins"), [
    ("a.csv", b'"recordType",'), ("a.csv.gz", b"\x1f\x8b"), ("a.json", b"[\n"), ("a.jsonl", b"{"),
    ("a.sql", b"BEGIN"), ("a.xlsx", b"PK"), ("a.parquet", b"PAR1"),
    ("a.db", b"SQLite format 3")])
def test_the_name_of_the_out_file_tells_its_format(
        tmp_path: Path, run: Callable[..., Ran], out: str, begins: bytes) -> None:
    """As --format would."""
    assert run("generate", "shop", "--count", "3", "--out", out).code == 0
    assert (tmp_path / out).read_bytes().startswith(begins)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out, "data"])


def test_a_folder_gets_one_file_a_record_type(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """Made if it is not there; each is what an export of that type would be; what is there else stays."""
    for _ in range(2):
        assert run("generate", "shop", "--count", "3", "--seed", "1", "--out", "shop/", "--discard").code == 0
        (tmp_path / "shop" / "mine").touch()
    assert sorted(path.name for path in (tmp_path / "shop").iterdir()) == ["customer.csv", "item.csv", "mine",
                                                                           "order.csv"]
    assert (tmp_path / "shop" / "customer.csv").read_text().count("\n") == 4
    assert run("generate", "shop", "--count", "3", "--out", "shop/", "--format", "parquet").code == 0
    assert (tmp_path / "shop" / "item.parquet").read_bytes()[:4] == b"PAR1"
    (tmp_path / "file").touch()
    for out, more, words in (("file/", [], "is a file"), ("no/shop/", [], "no folder"), ("shop", ["--format", "csv"],
                             "shop/ gets one file"), ("shop/", ["--format", "sqlite"], "split: does not go")):
        ran = run("generate", "shop", "--count", "3", "--out", out, *more)
        assert ran.code == 2, ran
        assert words in ran.err


@pytest.mark.parametrize(("argv", "code", "words"), [
    (["genrate"], 2, ["genrate", "'generate'", "without one, the server starts"]),
    (["generate", "--cuont", "3"], 2, ["--cuont", "'--count'"]),
    (["generate", "--count"], 2, ["--count", "requires an argument"]),
    (["generate", "person", "3"], 2, ["(3)"]),
    (["generate", "persn"], 2, ["did you mean 'person'"]),
    (["generate", "person"], 2, ["count", "required"]),
    (["generate", "person", "--count", "many"], 2, ["count", "integer"]),
    (["generate", "--schema", "no.json"], 2, ["no.json"]),
    (["generate", "person", "--count", "3", "--workers", "0"], 2, ["--workers"]),
    (["generate", "person", "--count", "3", "--out", "a.xyz"], 2, ["--format", "ndjson"]),
    (["generate", "person", "--count", "3", "--out", "no/a.csv"], 2, ["no folder"]),
    (["generate", "person", "--count", "3", "--out", "."], 2, ["--format"]),
    (["export", "nobody"], 1, ["nobody"]),
    (["export", "--where", "age"], 2, ["FIELD=VALUE", "gte"]),
    (["export", "--format", "docx"], 2, ["docx", "ndjson"]),
    (["ingest", "no.csv"], 1, ["no.csv"]),
    (["ingest"], 2, ["FILE is missing"]),
    (["resume"], 2, ["ID is missing", "jobs lists them"]),
    (["rows", "--columns", "{"], 2, ["columns"]),
    (["rows", "--columns", '{"a": "text"}', "--rows", "1"], 2, ["rows"]),
    (["jobs"], 1, ["no data folder", "--data-dir"]),
    (["jobs", "--status", "done"], 1, ["no data folder"]),
    (["fields", "--locale", "xx"], 2, ["xx"]), (["fields", "zzzqq"], 1, ["no type has 'zzzqq' in its name"]),
    (["--workers", "0", "generate"], 2, ["--workers"])], ids=lambda value: "_".join(value)[:40] if (
        isinstance(value, list)) else "")
def test_a_wrong_command_says_what_is_wrong_in_one_line_on_stderr(
        run: Callable[..., Ran], argv: list[str], code: int, words: list[str]) -> None:
    """Exit code 2 if it was used wrongly, 1 if it could not be done."""
    ran = run(*argv)
    assert ran[:2] == (code, "")
    assert not [word for word in words if word not in ran.err], ran.err
    assert ran.err.count("\n") == 1


@POSIX
def test_an_existing_out_file_is_replaced_only_by_a_whole_one(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """A job that fails leaves it, and nothing beside it; a link stays a link."""
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert run("export", "nobody", "--out", "link.csv").code == 1
    assert (tmp_path / "real.csv").read_text() == "old"
    assert run("generate", "person", "--count", "2", "--out", "link.csv").code == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert len((tmp_path / "real.csv").read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "link.csv", "real.csv"]


def test_a_terminal_sees_a_bar_with_rate_and_time_left(
        tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, script: Any) -> None:
    """It is drawn over itself; binary data is kept from a terminal."""
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    with taskapi._bar("generate") as show:
        show(0, None, None)
        show(25_000, 100_000, 5.0)
    waiting, half = re.findall(r"generate  \[.*?\][^\r\n\x1b]*", stream.getvalue())
    assert half.endswith("25000/100000  15,000/s  5 s left")
    assert half.count("#") == 9 > waiting.count("#")
    monkeypatch.setattr("sys.stdout", Terminal())
    assert taskapi.main(["generate", "person", "--count", "20", "--json"]) == 0
    assert re.search(r"generate \S+: 20 in \d+\.\d s", stream.getvalue())
    assert taskapi.main(["export", "person", "--format", "sqlite"]) == 2
    assert "a terminal cannot show such a file" in stream.getvalue()


def program(tmp_path: Path, *argv: str, file: str = taskapi.__file__) -> subprocess.Popen[bytes]:
    """A command in a process of its own."""
    return subprocess.Popen([sys.executable, file, *argv], cwd=tmp_path, env=own_environ(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


HELD = """
import pathlib, sys, threading, taskapi

class HeldRequest(taskapi.GenerateRequest):
    pass

@taskapi.job_type("held", HeldRequest)
def run_held(context, request):
    '''As generate, but waits after it has saved for the second time, for as long as there is a file named hold.'''
    save, saved = context.save, []
    context.save = lambda *args: saved.append(save(*args))
    steps = taskapi.run_generate(context, request)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        while len(saved) == 2 and pathlib.Path("hold").exists():
            pathlib.Path("held").touch()
            threading.Event().wait(0.01)
            yield
        yield

sys.exit(taskapi.main())
"""


@POSIX
def test_an_interrupted_command_leaves_a_job_that_goes_on_where_it_was(
        tmp_path: Path, run: Callable[..., Ran]) -> None:
    """It says how; the file is then the same as without the interruption."""
    (tmp_path / "yours.py").write_text(HELD)
    (tmp_path / "hold").touch()
    flags = ["--count", "20000", "--seed", "1", "--now", "2026-01-01", "--discard"]
    with program(tmp_path, "held", *flags, "--out", "people.csv", file="yours.py") as process:
        until((tmp_path / "held").exists)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    again = re.search(r"^  (.* resume (\S+) --out=people.csv --discard)$", err.decode(), re.M)
    assert err.decode() == f"taskapi: interrupted; job {again[2]} is kept. To go on with it:\n{again[0]}\n"
    jobs = json.loads(run("jobs", "--json").out)
    assert [(job["type"], job["status"], job["attempt"]) for job in jobs] == [
        ("export", "pending", 0), ("held", "pending", 0)]
    assert 0 < jobs[1]["progress"]["done"] < 20_000
    assert not (tmp_path / "people.csv").exists()
    (tmp_path / "hold").unlink()
    ended = subprocess.run(shlex.split(again[1]), cwd=tmp_path, env=own_environ(), capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    assert run("jobs") == (0, "", "")
    assert run("generate", "person", *flags, "--out", "whole.csv").code == 0
    assert (tmp_path / "people.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_who_stops_waiting_for_a_server_is_told_that_it_goes_on(
        tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """And how to wait again; the job is not canceled."""
    def interrupted(self: taskapi.Client, job_id: str) -> None:
        raise KeyboardInterrupt

    with taskapi.open_service(tmp_path / "data") as service, service.serving(port=0) as url:
        with monkeypatch.context() as patch:
            patch.setattr(taskapi.Client, "_watch", interrupted)
            ran = run("generate", "person", "--count", "50", "--out", "a.ndjson")
        assert ran[:2] == (1, "")
        assert f"the server at {url} goes on with job" in ran.err
        assert run(*re.search(r"resume \S+ --out=\S+", ran.err)[0].split()) == (0, "", "")
    assert len((tmp_path / "a.ndjson").read_text().splitlines()) == 50


@POSIX
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """As in `taskapi export | head -1`; the export leaves nothing behind."""
    assert run("generate", "person", "--count", "3000").code == 0
    with program(tmp_path, "export", "person") as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1
    assert plain(tmp_path / "data", "SELECT type FROM jobs") == ["generate"]
    assert_sound(tmp_path / "data")


def test_resume_starts_what_failed_or_was_canceled_again(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """And first the job that it comes after."""
    with held(tmp_path / "data") as (service, _):
        made = service.enqueue("generate", PERSONS)
        export = service.enqueue("export", {"format": "csv", "after": made.job_id})
        service.queue.cancel(made.job_id)
        service.queue.cancel(export.job_id)
    assert run("resume", export.job_id, "--out", "a.csv") == (0, "", "")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 11
    assert run("resume", made.job_id, "--out", "b.ndjson") == (0, "", "")
    assert len((tmp_path / "b.ndjson").read_text().splitlines()) == 10


def test_a_holder_that_is_no_server_of_ours_is_named(
        tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, stranger: str) -> None:
    """One that serves nothing, one that is gone, one on another machine, and something else at its address."""
    monkeypatch.setattr(taskapi, "_LOCK_SECONDS", 0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
    here, holder = tmp_path / "data", {"pid": 123456, "host": socket.gethostname(), "url": None}
    here.mkdir()
    cases = [(holder, "123456 .*is no server"), ({**holder, "url": gone}, "does not answer"),
             ({**holder, "url": stranger}, "is not taskapi"),
             ({**holder, "host": "far", "url": gone}, "run this on far")]
    for about, words in cases:
        lock = taskapi.FolderLock(here / "taskapi.lock", "the folder", about)
        ran = run("generate", "person", "--count", "1")
        assert ran[:2] == (1, "")
        assert re.search(words, ran.err), ran.err
        assert ran.err.count("\n") == 1
        lock.release()
    assert run("generate", "person", "--count", "1").code == 0


def test_a_holder_keeps_its_lock_while_it_tells_about_itself(tmp_path: Path) -> None:
    """Whoever tries all the time never gets in; and what a killed holder left is told as unclean."""
    lock = taskapi.FolderLock(tmp_path / "a.lock", "the folder", {"pid": 1, "host": "here"})
    assert not lock.unclean
    stop, got = threading.Event(), []

    def try_on() -> None:
        while not stop.is_set():
            with suppress(taskapi.InUse):
                got.append(taskapi.FolderLock(tmp_path / "a.lock", "the folder", {}))

    thread = threading.Thread(target=try_on)
    thread.start()
    for number in range(200):
        lock.describe(url=f"http://{number}")
    stop.set()
    thread.join()
    assert not got
    lock._connection.close()  # as the end of a process does
    lock = taskapi.FolderLock(tmp_path / "a.lock", "the folder", {"pid": 2, "host": "here"})
    assert lock.unclean
    lock.release()
    lock = taskapi.FolderLock(tmp_path / "a.lock", "the folder", {"pid": 3, "host": "here"})
    assert not lock.unclean
    lock.release()


def every_command() -> dict[str, click.Command]:
    """The commands as click has them."""
    program = taskapi._Program("taskapi")
    context = click.Context(program)
    return {name: program.get_command(context, name) for name in program.list_commands(context)}


def test_every_flag_and_word_of_a_command_is_explained_once(run: Callable[..., Ran]) -> None:
    """--help shows them all, and nothing twice; the settings that matter to a command are among them."""
    for name, entry in every_command().items():
        shown = run(name, "--help").out
        listed = re.findall(r"^  (?:(?:-\w, )?--)?([\w-]+)", shown.partition("\n\n")[2], re.M)
        for param in entry.params:
            if not getattr(param, "hidden", False):
                assert param.help, (name, param.name)
                assert listed.count(param.opts[-1].removeprefix("--")) + listed.count(param.opts[-1].upper()) == 1, (
                    name, param.name)
        assert "--data-dir" in shown
        assert entry.help.split()[0] in shown


def test_a_job_type_of_ones_own_is_a_command_with_its_fields_as_flags(
        tmp_path: Path, run: Callable[..., Ran]) -> None:
    """Texts, lists, and JSON for what is deeper."""
    ran = run("rows", "--record-type", "thing", "--columns", '{"a": "text"}', "--rows", '[["x"], ["y"]]', "--json")
    assert json.loads(ran.out)[0]["result"] == {"records": 2}
    assert plain(tmp_path / "data", "SELECT a FROM thing") == ["x", "y"]


def test_records_are_looked_at_before_any_is_stored(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """As a table for each type, or as JSON; no data folder is made."""
    ran = run("preview", "person", "--seed", "1", "--count", "3")
    assert ran.out.split()[:2] == ["id", "firstName"]
    assert len(ran.out.splitlines()) == 4
    assert len(json.loads(run("preview", "person", "--json").out)) == 10
    related = run("preview", "shop", "--count", "2").out
    assert [line for line in related.splitlines() if line.endswith(":")] == ["customer:", "order:", "item:"]
    assert not [*tmp_path.iterdir()]


def test_a_jobs_file_is_downloaded(tmp_path: Path, either: Callable[..., Ran]) -> None:
    """Under the name that the job gave it, which replaces nothing, or to --out."""
    (tmp_path / "two.csv").write_text("a,b\n1,2\n")
    job_id = json.loads(either("ingest", "two.csv", "--json").out)[0]["jobId"]
    ran = either("download", job_id)
    assert (ran.code, "two.csv is there already" in ran.err) == (2, True)
    (tmp_path / "two.csv").unlink()
    assert either("download", job_id) == (0, "", "")
    assert (tmp_path / "two.csv").read_text() == "a,b\n1,2\n"
    assert either("download", job_id, "--out", "-").out == "a,b\n1,2\n"
    made = json.loads(either("generate", "person", "--count", "1", "--json").out)[0]["jobId"]
    assert "has no file" in either("download", made).err
    assert "completed" in either("retry", made).err


def test_a_failed_job_is_put_back_to_wait(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """By retry alone it is not done."""
    with held(tmp_path / "data") as (service, _):
        job_id = service.enqueue("generate", PERSONS).job_id
        service.queue.cancel(job_id)
    assert json.loads(run("retry", job_id, "--json").out)[0]["status"] == "pending"
    assert json.loads(run("status", job_id).out)["status"] == "pending"


@pytest.mark.parametrize(("words", "completed"), [
    ("taskapi pre", {"preview"}), ("taskapi --log-level d", {"debug"}),
    ("taskapi generate t", {"transaction", "ticket"}), ("taskapi export --format nd", {"ndjson"}),
    ("taskapi generate --co", {"--count"})])
def test_a_shell_completes_commands_flags_and_values(
        run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        words: str, completed: set[str]) -> None:
    """By click's protocol."""
    for name, value in (("COMPLETE", "bash_complete"), ("WORDS", words), ("CWORD", str(len(words.split()) - 1))):
        monkeypatch.setenv("_TASKAPI_COMPLETE" if name == "COMPLETE" else f"COMP_{name}", value)
    with pytest.raises(SystemExit):
        run()
    assert {line.partition(",")[2] for line in capsys.readouterr().out.splitlines()} == completed


def test_the_setting_seed_is_for_requests_that_name_none(tmp_path: Path) -> None:
    """The same records each time."""
    with taskapi.open_service(tmp_path, inline=True, seed=7) as service:
        seeds = [service.enqueue("generate", body).request["seed"] for body in ({"count": 1}, {"count": 1, "seed": 3})]
    assert seeds == [7, 3]


FIXTURES_IN_USE = """
import json, urllib.request

def test_service(taskapi_service):
    job = taskapi_service.enqueue("generate", {"count": 3})
    assert (job.status, job.request["seed"], job.created_at) == ("completed", 1, "2026-01-01T00:00:00.000Z")

def test_server(taskapi_server, taskapi_service):
    assert json.load(urllib.request.urlopen(taskapi_server))["status"] == "ok"
"""


@pytest.mark.parametrize("how", ["plugins", "import", "installed"])
def test_the_fixtures_work_vendored_and_installed(tmp_path: Path, how: str) -> None:
    """By a line in conftest.py, by an import, and by the entry point of the package; without a warning."""
    text, path = FIXTURES_IN_USE, f"{tmp_path}{os.pathsep}{Path(taskapi.__file__).parent}"
    others = {entry.name for entry in importlib.metadata.entry_points(group="pytest11")} - {"taskapi"}
    without = [word for name in [*others, "cacheprovider"] for word in ("-p", f"no:{name}")]
    if how == "plugins":
        (tmp_path / "conftest.py").write_text('pytest_plugins = ["taskapi"]\n')
    if how == "import":
        text, without = f"from taskapi import taskapi_server, taskapi_service\n{text}", [*without, "-p", "no:taskapi"]
    if how == "installed":
        found = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
        info = tmp_path / "taskapi-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: taskapi\nVersion: 1.0\n")
        (info / "RECORD").write_text("taskapi.py,,\n")
        (info / "entry_points.txt").write_text(f"[pytest11]\ntaskapi = {found['taskapi']}\n")
    (tmp_path / "test_theirs.py").write_text(text)
    load = "import sys, taskapi; " if how == "installed" else "import sys; "  # before pytest: it is not to mind
    ended = subprocess.run(
        [sys.executable, "-c", load + "import pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q", "-W", "error",
         *without, "test_theirs.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 passed" in ended.stdout
    assert "warning" not in ended.stdout


def test_an_app_under_a_path_of_another_program_gives_links_that_work_there(service: taskapi.Service) -> None:
    """Links, Location, downloads, the document and its page; the path alone leads to the one with a slash."""
    def site(environ: dict[str, Any], start_response: Any) -> Any:
        wsgiref.util.shift_path_info(environ)
        return service.app(environ, start_response)

    other = bottle.Bottle()
    other.mount("/t%s/", service.app)
    for app, mount in ((webtest.TestApp(site), "/a b"), (webtest.TestApp(other), "/t%25s")):
        quoted = urllib.parse.quote(mount, safe="/%")
        made = app.post_json(f"{quoted}/export", {"format": "json"}, status=202)
        links = made.json["links"]
        assert made.headers["Location"].endswith(links["self"])
        assert links == {"self": f"{quoted}/status/{made.json['jobId']}",
                         "download": f"{quoted}/download/{made.json['jobId']}"}
        assert app.get(links["self"]).json == made.json
        assert app.get(links["download"]).body == b"[]\n"
        assert app.get(f"{quoted}/").json["links"]["jobs"] == f"{quoted}/jobs"
        assert app.get(app.get(f"{quoted}/").json["links"]["openapi"]).json["servers"] == [{"url": quoted}]
        assert 'href="/' not in app.get(f"{quoted}/docs").text
        app.get(f"{quoted}/nothing", status=404)
    moved = webtest.TestApp(site).get("/a%20b", status=308)
    assert moved.headers["Location"].endswith("/a%20b/")
    assert service.queue.jobs.get(made.json["jobId"]).links["self"] == f"/status/{made.json['jobId']}"


# ==== Properties: the queue against a dict ====


class QueueMachine(stateful.RuleBasedStateMachine):
    """The job table and a dict that says what it should hold, through every move and restart."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = FakeClock()
        self.model: dict[str, list[Any]] = {}  # id: [status, attempt, cancel requested]
        self.progressed: dict[str, int] = {}
        self.checkpoints: dict[str, Any] = {}
        self.running: dict[str, taskapi.Job] = {}
        self.stale: list[taskapi.Job] = []
        self.open()

    def open(self) -> None:
        self.database = taskapi.Database(Path(self.folder.name) / "taskapi.db")
        self.jobs = taskapi.JobStore(self.database, self.clock)

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()

    def pick(self, number: int, *wanted: str) -> str | None:
        ids = [job_id for job_id, (status, *_) in self.model.items() if status in wanted]
        return ids[number % len(ids)] if ids else None

    def move(self, job_id: str, status: str, attempt: int = 0) -> None:
        self.model[job_id] = [status, attempt, False]
        if job_id in self.running:
            self.stale.append(self.running.pop(job_id))

    numbers = st.integers(0, 9)

    @stateful.rule()
    def enqueue(self) -> None:
        job, new = self.jobs.insert("script", {})
        assert new
        assert job.job_id > max(self.model, default="")
        self.model[job.job_id] = ["pending", 0, False]

    @stateful.rule(seconds=st.integers(-9999, 9999))
    def the_clock_jumps(self, seconds: int) -> None:
        self.clock.forward(seconds)

    @stateful.rule()
    def claim(self) -> None:
        claim = self.jobs.claim()
        suspected = any(status == "in-progress" and attempt > 1 for status, attempt, _ in self.model.values())
        ready = sorted(job_id for job_id, (status, attempt, _) in self.model.items()
                       if status == "pending" and not (attempt and suspected))
        assert (claim.job.job_id if claim else None) == (ready[0] if ready else None)
        if claim:
            job_id = claim.job.job_id
            assert claim.checkpoint == self.checkpoints.get(job_id)
            self.model[job_id] = ["in-progress", self.model[job_id][1] + 1, False]
            self.running[job_id] = claim.job
            assert claim.more == ("pending" in [status for status, *_ in self.model.values()])

    @stateful.rule(number=numbers, status=st.sampled_from(["completed", "failed", "canceled"]))
    def finish(self, number: int, status: str) -> None:
        if job_id := self.pick(number, "in-progress"):
            self.jobs.finish(self.running[job_id], taskapi.JobStatus(status), error="x")
            self.checkpoints.pop(job_id, None)
            self.move(job_id, status, self.model[job_id][1])

    @stateful.rule(number=numbers, done=st.integers(1, 99))
    def progress(self, number: int, done: int) -> None:
        if job_id := self.pick(number, "in-progress"):
            self.database.write(lambda connection: self.jobs.save_progress(
                connection, self.running[job_id], taskapi.Progress(done=done, total=99), {"at": done}))
            self.progressed[job_id], self.checkpoints[job_id] = done, {"at": done}

    @stateful.rule(number=numbers, charged=st.booleans())
    def release(self, number: int, charged: bool) -> None:
        job_id = self.pick(number, "in-progress")
        if job_id and not self.model[job_id][2]:
            self.jobs.release(self.running[job_id], reason="a test", charged=charged)
            self.move(job_id, "pending", self.model[job_id][1] - (not charged))

    @stateful.rule(number=numbers)
    def a_stale_attempt_is_fenced(self, number: int) -> None:
        for job in self.stale[number:number + 1]:
            status, attempt, _ = self.model.get(job.job_id, ["gone", 0, False])
            if status != "in-progress" or attempt != job.attempt:  # an uncharged attempt has the same number again
                with pytest.raises(taskapi.LeaseLost):
                    self.jobs.finish(job, taskapi.JobStatus.COMPLETED, result={})

    @stateful.rule(number=numbers)
    def cancel(self, number: int) -> None:
        if job_id := self.pick(number, "pending", "in-progress"):
            job = self.jobs.cancel(job_id)
            if self.model[job_id][0] == "pending":
                assert job.status == "canceled"
                self.move(job_id, "canceled", self.model[job_id][1])
            else:
                assert job.cancel_requested
                self.model[job_id][2] = True

    @stateful.rule(number=numbers)
    def retry(self, number: int) -> None:
        if job_id := self.pick(number, "failed", "canceled"):
            assert self.jobs.retry(job_id).status == "pending"
            self.move(job_id, "pending")
            self.progressed.pop(job_id, None)
            self.checkpoints.pop(job_id, None)

    @stateful.rule(number=numbers)
    def delete(self, number: int) -> None:
        if job_id := self.pick(number, "completed", "failed", "canceled"):
            self.jobs.remove(job_id)
            del self.model[job_id]

    @stateful.rule(number=numbers)
    def what_is_not_allowed_is_a_conflict(self, number: int) -> None:
        for refuse, wanted in ((self.jobs.cancel, ("completed", "failed", "canceled")),
                               (self.jobs.retry, ("pending", "in-progress", "completed")),
                               (self.jobs.remove, ("pending", "in-progress"))):
            if job_id := self.pick(number, *wanted):
                with pytest.raises(taskapi.Conflict):
                    refuse(job_id)

    @stateful.rule()
    def restart(self) -> None:
        self.database.close()
        self.open()
        self.jobs.recover(3)
        for job_id in [*self.running]:
            _, attempt, asked = self.model[job_id]
            self.move(job_id, "canceled" if asked else "failed" if attempt >= 3 else "pending", attempt)

    @stateful.invariant()
    def the_table_is_the_model(self) -> None:
        found = {job.job_id: [str(job.status), job.attempt, job.progress.done]
                 for job in self.jobs.page(None, None, 1000, None)[0]}
        assert found == {job_id: [status, attempt, 99 if status == "completed" and job_id in self.progressed
                                  else self.progressed.get(job_id, 0)]
                         for job_id, (status, attempt, _) in self.model.items()}
        statuses_ = [status for status, *_ in self.model.values()]
        assert self.jobs.counts() == (statuses_.count("pending"), statuses_.count("in-progress"))


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


# ==== Determinism: the same request makes the same records, whatever happens on the way ====

RELATED = {"seed": 11, "now": "2026-01-01T00:00:00Z", "locale": ["en_US", "de_DE"], "records": {
    "customer": {"count": 3000, "schema": {
        "id": "sequence", "email": {"type": "email", "unique": True}, "name": {"type": "name", "null": 0.05},
        "score": {"type": "float", "min": 0, "max": 9, "mean": 4, "sd": 2}}},
    "order": {"per": "customer", "count": [0, 4], "schema": {
        "id": "uuid", "customerId": {"type": "ref", "field": "customer.id"}, "at": {"type": "datetime", "from": "-90d"},
        "number": {"type": "pattern", "pattern": "######", "unique": True}, "tags": {"type": "list", "of": "word"},
        "total": {"type": "sum", "field": "item.amount", "places": 2}}},
    "item": {"per": "order", "count": [1, 3], "schema": {
        "amount": {"type": "decimal", "min": "0.01", "max": "99.99"},
        "who": {"type": "ref", "field": "customer.email"}}},
    "visit": {"count": 2000, "schema": {"by": {"type": "ref", "field": "customer.email"}, "ip": "ipv4"}}}}


def dump(folder: Path, job_id: str) -> str:
    """The record tables as SQL text; what names the job and its time is made neutral."""
    with closing(sqlite3.connect(folder / "taskapi.db")) as connection:
        created, = connection.execute("SELECT created_at FROM jobs WHERE id = ?", (job_id,)).fetchone()
        statements = [statement for statement in connection.iterdump()
                      if re.match(rf'(INSERT INTO|CREATE TABLE) "({"|".join(RELATED["records"])})"', statement)]
    return "\n".join(statements).replace(job_id, "JOB").replace(created, "CREATED")


def run_killed(folder: Path, kills: int) -> str:
    """The dump after a generate job whose server was killed so many times at random points on the way."""
    chance, job_id = Random(kills), ""

    def goes_on(live: Live, before: int) -> bool:
        job = live.job(job_id)
        return job["progress"]["done"] > before or job["status"] == "completed"

    for _ in range(kills):
        with Live(folder, "--max-attempts", "99") as live:
            job_id = job_id or live.make("/generate", RELATED)
            until(partial(goes_on, live, live.job(job_id)["progress"]["done"]))
            threading.Event().wait(chance.random() / 10)
            live.end(signal.SIGKILL)
    with Live(folder, "--max-attempts", "99", "--workers", "1") as live:
        job_id = job_id or live.make("/generate", RELATED)
        assert until(lambda: live.job(job_id, 30)["result"])
        live.end()
    assert_sound(folder)
    return dump(folder, job_id)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_ends_equal_to_an_uninterrupted_one(tmp_path: Path, kills: int) -> None:
    """Byte for byte in a dump: related types, two locales, unique fields, refs to earlier rows."""
    whole, killed = run_killed(tmp_path / "whole", 0), run_killed(tmp_path / "killed", kills)
    assert len(whole) > 1_000_000
    assert hashlib.sha256(killed.encode()).hexdigest() == hashlib.sha256(whole.encode()).hexdigest()


def test_what_else_runs_changes_nothing(tmp_path: Path) -> None:
    """Four jobs at once on four workers make the tables that the same job alone makes; posting `request` again too."""
    with taskapi.open_service(tmp_path / "alone", inline=True) as service:
        job = service.enqueue("generate", RELATED)
        alone = dump(tmp_path / "alone", job.job_id)
    with taskapi.open_service(tmp_path / "busy", workers=4) as service:
        others = [{"recordType": f"other{number}", "count": 3000, "schema": {"n": "name"}} for number in range(3)]
        jobs = [service.enqueue("generate", body) for body in (job.request, *others)]
        assert service.drain(60)
    assert dump(tmp_path / "busy", jobs[0].job_id) == alone


def cut(request: dict[str, Any], service: taskapi.Service) -> tuple[dict[str, list[Any]], taskapi.Job]:
    """What the server makes of a request, by record type, as its JSON says, and the job."""
    job = service.enqueue("generate", request)
    assert job.status == "completed", job.error
    assert (job.progress.done, job.progress.total) == (job.result["records"],) * 2
    return {info.record_type: json.loads(exported(service, "json", info.record_type, filters={"jobId": job.job_id}))
            for info in service.queue.records.types()}, job


@pytest.mark.parametrize("request_", [
    {"recordType": "person", "count": 300}, {"recordType": "shop", "count": 60}, {**RELATED, "records": {
        **RELATED["records"], "customer": {**RELATED["records"]["customer"], "count": 90}}},
    {"recordType": "ticket", "count": 100, "locale": ["de_DE", "ja_JP"]}], ids=["person", "shop", "related", "ticket"])
def test_parts_made_apart_are_together_what_the_server_makes(request_: dict[str, Any], tmp_path: Path,
                                                            service: taskapi.Service) -> None:
    """In a process that was handed a pickled function and nothing else: no file, no thread, no log; and by a server
    that is asked for one part, whose records are the part's."""
    request = {"seed": 5, "now": "2026-01-01T00:00:00Z", **request_, "parts": 4}
    whole, _ = cut(request, service)
    (empty := tmp_path / "empty").mkdir()
    script = ("import pickle, sys, os, threading\nmake = pickle.load(sys.stdin.buffer)\n"
              "made = [list(make(number)) for number in (3, 1, 0, 2)]\n"
              "assert threading.active_count() == 1 and not os.listdir()\n"
              "sys.stdout.buffer.write(pickle.dumps(made))")
    made = pickle.loads(subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(partial(taskapi.part, request)), check=True,
        stdout=subprocess.PIPE, env=own_environ(), cwd=empty).stdout)
    asked = [json.loads(json.dumps(each)) for each in taskapi.parts(request)]
    assert [list(taskapi.part(each)) for each in asked] == [made[at] for at in (2, 1, 3, 0)]
    together: dict[str, list[Any]] = defaultdict(list)
    for name, record in itertools.chain.from_iterable(made[at] for at in (2, 1, 3, 0)):
        together[name].append(record)
    assert together == whole
    with taskapi.open_service(tmp_path / "third", inline=True) as other:
        third, job = cut(asked[2], other)
    assert third == {name: [record for of, record in made[3] if of == name] for name in third}
    assert job.result["records"] == len(made[3])


def test_one_part_is_the_request_as_it_is(service: taskapi.Service) -> None:
    """Value for value; and a preview of parts shows what the job makes."""
    asked = {"recordType": "shop", "count": 20, "seed": 5, "now": "2026-01-01T00:00:00Z"}
    plain_, _ = cut(asked, service)
    one = list(taskapi.part({**asked, "parts": 1}, 0))
    assert one == list(taskapi.part(asked))
    assert {name: [record for of, record in one if of == name] for name in plain_} == plain_
    app = webtest.TestApp(service.app)
    shown = app.post_json("/preview", {**asked, "parts": 4}).json["records"]
    made = [pair for number in range(4) for pair in taskapi.part({**asked, "parts": 4}, number)]
    assert shown == {name: [record for of, record in made if of == name] for name in shown}
    assert shown != {name: plain_[name][:len(records)] for name, records in shown.items()}
    assert len(app.post_json("/preview", {"recordType": "person", "count": 3, "parts": 1000}).json["records"]) == 3


@pytest.mark.parametrize(("request_", "number", "words"), [
    ({"parts": 4}, 0, ["seed: must be given"]), ({"parts": 4, "seed": 1}, 0, ["now: must be given"]),
    ({"parts": 4, "seed": 1, "recordType": "x", "schema": {"at": {"type": "date", "to": "today"}}}, 0, ["now: must"]),
    ({"parts": 4, "seed": 1, "now": "2026-01-01"}, 4, ["part: must be less than parts, which is 4"]),
    ({"parts": 4, "seed": 1, "now": "2026-01-01"}, -1, ["part: "]),
    ({"parts": 11, "seed": 1, "now": "2026-01-01"}, 0, ["parts: should be at most 10"]),
    ({"part": 1, "seed": 1, "now": "2026-01-01"}, None, ["part: must be less than parts, which is 1"]),
    ({"partz": 4, "seed": 1, "now": "2026-01-01"}, 0, ["partz: ", "'parts'"])])
def test_a_part_that_can_not_be_made_is_refused_at_once(request_: dict[str, Any], number: int | None,
                                                        words: list[str]) -> None:
    """Not when the first record is asked for."""
    with pytest.raises(BadRequest) as caught:
        taskapi.part({"recordType": "person", "count": 10, **request_}, number)
    assert not [word for word in words if word not in str(caught.value)], caught.value


def test_decimals_of_a_part_keep_their_digits_where_that_is_asked_for() -> None:
    """As numbers of JSON otherwise; nothing here depends on `now`, but Faker's own relative dates do."""
    asked = {"count": 50, "parts": 2, "seed": 1, "schema": {
        "on": {"type": "date", "from": "2026-01-01", "to": "2026-02-01"}, "name": "name",
        "price": {"type": "decimal", "min": "0.10", "max": "9.90", "null": 0.2}}}
    texts = [record["price"] for _, record in taskapi.part(asked, 1, str)]
    assert {len(text) for text in texts if text is not None} == {4}
    assert [text and json.loads(text) for text in texts] == [record["price"] for _, record in taskapi.part(asked, 1)]
    with pytest.raises(BadRequest, match="now: must be given"):
        [*taskapi.part({**asked, "schema": {"born": "date_of_birth"}}, 0)]


@POSIX
def test_child_processes_make_the_same_records_though_they_are_killed(tmp_path: Path, service: taskapi.Service,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them after the first batch; none is left, and no file. One that is killed ever again fails the job."""
    request = {**RELATED, "parts": 5, "records": {name: {**spec, "count": 600} if name != "order" and isinstance(
        spec["count"], int) else spec for name, spec in RELATED["records"].items()}}
    expected, _ = cut(request, service)
    killed: list[int] = []
    batches = taskapi._Makers._batches

    def killing(makers: Any, number: int) -> Iterator[Any]:
        for batch in batches(makers, number):
            if batch and len(killed) < 1:
                for process, _ in makers._makers.values():
                    killed.append(process.pid)
                    process.kill()
            yield batch

    monkeypatch.setattr(taskapi._Makers, "_batches", killing)
    with taskapi.open_service(tmp_path / "many", inline=True, processes=2) as many:
        made, _ = cut(request, many)
        assert made == expected
        assert len(killed) == 2
        assert not multiprocessing.active_children()
        assert not [*(many.folder.root / "tmp").iterdir()]

        def stillborn(makers: Any, number: int, start: Any = taskapi._Makers._start) -> None:
            start(makers, number)
            makers._makers[number % 2][0].kill()

        monkeypatch.setattr(taskapi._Makers, "_start", stillborn)
        failed = many.enqueue("generate", request)
        assert failed.status == "failed"
        assert "the process that makes part 0 was ended 3 times" in failed.error


@POSIX
def test_a_value_that_fails_in_a_child_process_fails_the_job_as_ever(tmp_path: Path) -> None:
    """With the message that one process gives."""
    schema = {"n": {"type": "int", "min": 1, "max": 3}, "at": {"type": "date", "from": "2026-01-01", "to": "today"},
              "then": {"type": "date", "from": "{at}", "to": "2026-01-01"}}
    request = {"count": 90, "parts": 3, "seed": 1, "now": "2026-03-01T00:00:00Z", "schema": {
        "n": schema["n"], "word": {"type": "word", "args": {"part_of_speech": "{kind}"}},
        "kind": {"type": "choice", "values": {"noun": 99, "nonsense": 1}}}}
    errors = []
    for processes in (1, 2):
        with taskapi.open_service(tmp_path / str(processes), inline=True, processes=processes) as service:
            errors.append(service.enqueue("generate", request).error)
    assert errors[0] == errors[1]
    assert "nonsense" in str(errors[0])


def on_a_cluster(folder: Path, script: str) -> None:
    """Runs a program that uses Dask; whatever that says at its end, it ends well."""
    for name in ("dask.dataframe", "distributed", "pyarrow"):
        pytest.importorskip(name, reason="not installed: what the README shows with Dask is not tried")
    (folder / "script.py").write_text(script)
    ran = subprocess.run([sys.executable, "script.py"], cwd=folder, env=own_environ(), check=False, timeout=300,
                         stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.slow
def test_the_readmes_dask_makes_what_the_server_makes(tmp_path: Path, service: taskapi.Service) -> None:
    """Related types, on a cluster of two processes, as Parquet and CSV; value for value."""
    code, = blocks("py")
    write = 'records.to_parquet(f"{name}.parquet", write_index=False)'
    changes = {"1_000_000": "400", '"parts": 64': '"parts": 8', "with Client():": (
        "with Client(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None):"), write: (
        f'{write}\n            records.to_csv(f"{{name}}.csv", index=False, single_file=True)')}
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    on_a_cluster(tmp_path, code)
    import pyarrow.parquet

    cut({"recordType": "shop", "count": 400, "parts": 8, "seed": 1, "now": "2026-01-01T00:00:00Z"}, service)
    for name in ("customer", "order", "item"):
        server = [*csv.DictReader(io.StringIO(exported(service, "csv", name).decode()))]
        files = sorted((tmp_path / f"{name}.parquet").glob("*.parquet"), key=lambda path: int(path.name.split(".")[1]))
        assert len(files) == 8
        stored = [record for file in files for record in pyarrow.parquet.read_table(file).to_pylist()]
        assert [{field: str(value) for field, value in record.items()} for record in stored] == server
        assert all(type(record["id"]) is int for record in stored)
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            assert [*csv.DictReader(file)] == server


@pytest.mark.slow
@POSIX
def test_a_killed_worker_of_a_cluster_changes_nothing(tmp_path: Path, service: taskapi.Service) -> None:
    """SIGKILL for one of two once the first part is there; the cluster makes the lost parts again."""
    request = {"recordType": "shop", "count": 1500, "parts": 8, "seed": 1, "now": "2026-01-01T00:00:00Z"}
    on_a_cluster(tmp_path, f"""
import json, os, signal, taskapi
from dask.distributed import Client, as_completed

def make(number):
    return [*taskapi.part({request!r}, number)]

if __name__ == "__main__":
    with Client(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as client:
        before = client.run(os.getpid)
        futures = client.map(make, range(8))
        next(iter(as_completed(futures)))
        os.kill(min(before.values()), signal.SIGKILL)
        made = client.gather(futures)
        assert set(client.run(os.getpid).values()) != set(before.values())
    with open("made.json", "w") as file:
        json.dump([pair for part in made for pair in part], file)
""")
    whole, _ = cut(request, service)
    made = json.loads((tmp_path / "made.json").read_text())
    assert {name: [record for of, record in made if of == name] for name in whole} == whole


def children(pid: int) -> list[int]:
    """The processes that a process has started, but for the one that tidies up after them."""
    found = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [int(child) for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def gone(pid: int) -> bool:
    """Whether a process has ended, if nobody has asked yet how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for the children of a process")
@pytest.mark.parametrize("installed", [False, True])
def test_a_command_with_child_processes_goes_on_wherever_it_is_killed(tmp_path: Path, installed: bool) -> None:
    """The parent, a child, or Ctrl-C for all of them as a terminal sends it: no child stays, and the file is the
    same; as a script, and as an installed module that another program starts."""
    program = [sys.executable, taskapi.__file__]
    if installed:
        (tmp_path / "run.py").write_text("import sys, taskapi\nif __name__ == '__main__': sys.exit(taskapi.main())")
        program = [sys.executable, "run.py"]

    def start(*argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*program, *argv], cwd=tmp_path, env=own_environ(), text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def done() -> int:
        try:
            return int(plain(tmp_path / "many", "SELECT max(done) FROM _progress")[0] or 0)
        except sqlite3.Error:
            return 0

    asked = ["generate", "shop", "--count", "6000", "--parts", "6", "--seed", "2", "--now", "2026-01-01T00:00:00Z"]
    assert start(*asked, "--data-dir", "one", "--out", "one.ndjson").communicate(timeout=120) == ("", "")
    command = [*asked, "--data-dir", "many", "--out", "many.ndjson", "--processes", "2"]
    reached = 0
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, None):
        process = start(*command)
        until(lambda reached=reached: done() > reached, 60)
        made = until(lambda process=process: children(process.pid))
        os.kill(made[0], signal.SIGKILL)
        until(lambda process=process, made=made: not {*children(process.pid)} <= {*made} or process.poll() is not None)
        reached = done()
        made = children(process.pid)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)
        elif how:
            process.send_signal(how)
        _, err = process.communicate(timeout=120)
        until(lambda made=made: all(map(gone, made)))
        if how == signal.SIGINT:
            assert process.returncode == 1
            assert "Traceback" not in err
            assert "--processes=2" in err
        job_id = plain(tmp_path / "many", "SELECT id FROM jobs WHERE type = 'generate'")[0]
        command = ["resume", job_id, "--data-dir", "many", "--out", "many.ndjson", "--processes", "2"]
    assert process.returncode == 0, err
    assert (tmp_path / "many.ndjson").read_bytes() == (tmp_path / "one.ndjson").read_bytes()
    assert not [*(tmp_path / "many" / "tmp").iterdir()]


# ==== Crashes ====


CRASHER = '''
import json, os, pathlib, re, shutil, signal, sqlite3, sys, tempfile
from collections import Counter, deque
from datetime import timedelta
import taskapi, webtest

FORM = {form!r}
class Steps:
    """Counts what reaches the disk for good, before and after; ends the process, as a crash would, at one of them."""
    count = last = 0
    def __call__(self):
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
    def around(self, call):
        def called(*args, **kwargs):
            self()
            result = call(*args, **kwargs)
            self()
            return result
        return called
steps = Steps()

class Connection(sqlite3.Connection):
    def execute(self, sql, *values):
        run = super().execute
        return (steps.around(run) if re.match("COMMIT|BEGIN IMMEDIATE|PRAGMA wal_checkpoint", sql) else run)(
            sql, *values)
    def backup(self, *args, **kwargs):
        return steps.around(super().backup)(*args, **kwargs)

connect = sqlite3.connect
sqlite3.connect = lambda *args, **kwargs: connect(*args, factory=Connection, **kwargs)
os.replace, os.fsync, os.unlink = map(steps.around, (os.replace, os.fsync, os.unlink))
pathlib.Path.unlink = steps.around(pathlib.Path.unlink)
taskapi._SAVE_ROWS = taskapi._CHUNK_ROWS = 20
taskapi._DELETE_STEP = 20
taskapi._LOG_PAGES = 30

class Held(deque):
    def submit(self, call):
        self.append(call)
    def run(self):
        while self:
            self.popleft()()
    def shutdown(self, wait=True, cancel_futures=False):
        self.clear()

GENERATE = {{"recordType": "person", "count": 50, "seed": 1}}
WORK = {{
    "generate": lambda app: [app.post_json("/generate", GENERATE)],
    "ingest": lambda app: [app.post("/upload", {ingest!r}, FORM)],
    "export": lambda app: [app.post_json("/export", {{"format": kind}}) for kind in ("csv", "sqlite")],
    "upload": lambda app: [app.post("/upload", {upload!r}, FORM)],
    "delete": lambda app: [app.delete("/jobs/" + job["jobId"]) for job in app.get("/jobs").json["items"]],
    "cancel": lambda app: [app.post("/jobs/" + job.json["jobId"] + "/cancel") for job in (
        app.post_json("/generate", GENERATE), app.post("/upload", {ingest!r}, FORM))],
    "retention": lambda app: [],
    "snapshot": lambda app: [app.post_json("/snapshots", {{"name": "one"}}), app.delete("/snapshots/zero")],
    "zero": lambda app: [app.post_json("/snapshots", {{"name": "zero"}})],
    "restore": lambda app: [app.post("/snapshots/zero/restore")],
}}

def work(folder, name, now=taskapi.utc_now):
    """The service does `name`, and says beside the folder what it has acknowledged."""
    held = Held()
    service = taskapi.open_service(folder, runner=held, clock=now, retention_days=1)
    app = webtest.TestApp(service.app)
    held.run()
    for answer in WORK[name](app) if name else ():
        with open(str(folder) + ".said", "a") as said:
            gone = answer.request.path.rpartition("/")[2] + " deleted"
            said.write((answer.json.get("jobId", " snapshot") if answer.body else gone) + "\\n")
    held.run()
    if name == "retention":
        service.retire()
    service.close(0)

def fork(*args, last=0):
    """Runs `work` in a process of its own; False if that was killed, as it may be where `last` is a step."""
    child = os.fork()
    if not child:
        steps.count, steps.last = 0, last
        try:
            work(*args)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL if last else 0), code
    return code == 0

root, name, every, first = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with tempfile.TemporaryDirectory() as warm:  # so that no child has to import what is imported late
    work(warm, "generate")
base = root / "base"
bases = {{"snapshot": "generate export zero upload", "restore": "generate export upload zero export ingest",
          **dict.fromkeys(("export", "delete", "retention"), "generate export upload ingest")}}
for before in bases.get(name, "").split(" "):
    fork(base, before)
late = lambda: taskapi.utc_now() + timedelta(days=2)
for last in range(first, 1000, every):
    folder = root / str(last)
    shutil.copytree(base, folder)
    ended = fork(folder, name, late if name == "retention" else taskapi.utc_now, last=last)
    fork(folder, "")
    if ended:
        break
'''


def assert_whole(folder: Path) -> None:
    """Asserts that after a crash and a restart nothing is lost, doubled, half done or left over."""
    assert_sound(folder)
    jobs = {row[0]: row for row in plain(
        folder, "SELECT id, type, status, record_type, result, request, file FROM jobs")}
    notes = Path(f"{folder}.said")
    said = notes.read_text().split("\n")[:-1] if notes.exists() else []
    assert {line for line in said if " " not in line} <= jobs.keys()
    assert not {line.partition(" ")[0] for line in said if " " in line} & jobs.keys()
    assert {row[2] for row in jobs.values()} <= {"completed", "canceled", "failed"}
    errors = plain(folder, "SELECT error FROM jobs WHERE status = 'failed'")  # of what was deleted before
    assert not [error for error in errors if not re.search("was to follow|upload it again|there is no", error)]
    made = {job_id: json.loads(row[4])["records"] for job_id, row in jobs.items() if row[3] and row[2] == "completed"}
    assert all(made[job_id] == json.loads(row[5]).get("count", INGESTED) for job_id, row in jobs.items()
               if job_id in made)
    types = plain(folder, "SELECT record_type FROM _types")
    assert made == Counter(dict(row for name in types for row in plain(
        folder, f'SELECT _job, count(DISTINCT _id) FROM "{name}" GROUP BY 1')))
    assert made == dict(plain(folder, "SELECT job, rows FROM _id_ranges"))
    for _, kind, status, _, result, _, file in jobs.values():
        if (kind, status) == ("export", "completed") and json.loads(file)["path"].endswith(".csv"):
            with (folder / json.loads(file)["path"]).open(newline="") as stream:
                assert len([*csv.DictReader(stream)]) == json.loads(result)["records"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a crash at a step is made in a fork")
@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["generate", "ingest", "export", "upload", "delete", "cancel", "retention",
                                  "snapshot", "restore"])
def test_a_crash_at_any_commit_rename_or_deletion_loses_and_doubles_nothing(
        tmp_path: Path, name: str, every: int) -> None:
    """SIGKILL before and after each of them; then a restart, and plain sqlite3 looks."""
    program = CRASHER.format(form=FORM, ingest=INGEST, upload=form(b"x" * 3000, "a.txt"))
    first = 1 if every == 1 else 1 + Random(name).randrange(every)
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path), name, str(every), str(first)], text=True,
                         capture_output=True, timeout=900, env={**os.environ, "PYTHONPATH": str(HERE)}, check=False)
    assert ran.returncode == 0, ran.stderr
    folders = [folder for folder in tmp_path.iterdir() if folder.is_dir()]
    assert len(folders) > 2
    for folder in folders:
        assert_whole(folder)
        if name in ("snapshot", "restore"):  # the old or the new one, and each snapshot whole or not there
            jobs = plain(folder, "SELECT count(*) FROM jobs")
            assert jobs in ([[4], [7]] if name == "restore" else [[4]])
            for snapshot in (folder / "snapshots").iterdir():
                assert plain(snapshot, "PRAGMA integrity_check") == ["ok"]
                paths = plain(snapshot, "SELECT json_extract(file, '$.path') FROM jobs WHERE file IS NOT NULL")
                assert [*paths] == [path for path in paths if (snapshot / path).exists()] != []
                assert json.loads((snapshot / "snapshot.json").read_text())["jobs"] == len(
                    plain(snapshot, "SELECT id FROM jobs"))


def press(url: str, random: Random, made: list[str], going: set[str], gone: set[str]) -> None:
    """A client that does everything, and notes what is acknowledged, until the server is killed."""
    with suppress(OSError, http.client.HTTPException):
        while True:
            known = random.choice(made or ["0192"])
            what = random.randrange(8)
            if what < 2:
                persons = {**PERSONS, "count": random.randrange(1, 3000)}
                made.append(ask(url, "POST", "/generate", persons).json["jobId"])
            elif what < 4:
                made.append(ask(url, "POST", "/upload", INGEST, FORM).json["jobId"])
            elif what == 4:
                made.append(ask(url, "POST", "/upload", form(b"x" * 40_000, "a.txt"), FORM).json["jobId"])
            elif what == 5:
                kind = {"format": random.choice(["csv", "sqlite"]), "filters": {"jobId": known}, "after": known}
                answer = ask(url, "POST", "/export", kind)
                made.extend([answer.json["jobId"]] if answer.status == 202 else [])
            elif what == 6:
                ask(url, "POST", f"/jobs/{known}/{random.choice(['cancel', 'retry'])}")
            elif len(made) > 60:
                going.add(known)
                if ask(url, "DELETE", f"/jobs/{known}").status == 204:
                    gone.add(known)


@pytest.mark.parametrize("kills", [2, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_again_and_again_under_load_loses_nothing_and_doubles_nothing(tmp_path: Path, kills: int) -> None:
    """Four clients do everything while the server is killed over and over, also while it recovers."""
    folder, random = tmp_path / "data", Random(200)
    made: list[str] = []
    going: set[str] = set()
    gone: set[str] = set()
    for number in range(kills):
        with Live(folder, "--max-attempts", "100", "--log-level", "warning") as live:
            assert plain(folder, "PRAGMA integrity_check") == ["ok"]
            assert {*made} - going <= {*plain(folder, "SELECT id FROM jobs")}
            if number % 8 == 3:
                until(lambda: not plain(folder, "SELECT 1 FROM jobs WHERE status IN ('pending', 'in-progress')"))
                until(lambda: not plain(folder, "SELECT 1 FROM _id_ranges LEFT JOIN jobs ON id = job "
                                                "WHERE coalesce(status, '') <> 'completed'"))
                Path(f"{folder}.said").write_text("".join(
                    f"{line}\n" for line in ({*made} - going) | {f"{job_id} deleted" for job_id in gone}))
                assert_whole(folder)
            crowd = [threading.Thread(target=press, args=(live.url, Random(number * 4 + n), made, going, gone))
                     for n in range(4)]
            for client in crowd:
                client.start()
            threading.Event().wait(random.random() * 0.8)  # the kill is to come at any moment
            live.end(signal.SIGKILL)
            for client in crowd:
                client.join(40)
    print(f"\n{kills} kills, {len(made)} jobs acknowledged, {len(gone)} deleted")


# ==== House ====

SOURCE = Path(taskapi.__file__).read_text(encoding="utf-8")
BANNERS = [*re.finditer(r"^# ==== (\d+) ([A-Z][\w ]*): (.+) ====$", SOURCE, re.M)]
ENDS = [*(banner.start() for banner in BANNERS[1:]), len(SOURCE)]
CODE = {int(banner[1]): re.sub(r'^\s*(?:r?""".*?"""|#.*?$)', "", SOURCE[banner.end():end], flags=re.M | re.S)
        for banner, end in zip(BANNERS, ENDS, strict=True)}  # by room, without docstrings and comments


def test_the_map_in_the_docstring_equals_the_banners() -> None:
    """Number, name and sentence, in order."""
    listed = re.findall(r"^ ?(\d+) ([A-Z]\w*(?: \w+)*)  +(\S.*)$", taskapi.__doc__, re.M)
    assert listed[0][:2] == ("0", "Head")
    assert listed[1:] == [banner.groups() for banner in BANNERS]
    assert [int(number) for number, *_ in listed] == [*range(len(listed))]


def referred(table: SymbolTable) -> set[str]:
    """Names that a statement and all within it take from the module."""
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced() and (
        symbol.is_global() or table.get_type() == "module")}
    return own.union(*map(referred, table.get_children()))


@pytest.mark.parametrize("path", [taskapi.__file__, __file__])
def test_no_name_is_given_twice(path: str) -> None:
    """A constant of one room would quietly change what another one means."""
    given: Counter[str] = Counter()
    for statement in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", statement)]
        given.update(getattr(target, "id", None) or getattr(target, "name", "") for target in targets)
    assert [name for name, times in given.items() if name and times > 1] == []


def test_no_definition_refers_to_a_later_one() -> None:
    """Neither at run time nor in annotations, across rooms and within each: the file reads top-down."""
    body, lines = ast.parse(SOURCE).body, SOURCE.split("\n")
    defined: dict[str, int] = {}
    for statement in body:
        for node in [statement] if not isinstance(statement, ast.Assign) else statement.targets:
            name = getattr(node, "name", None) or getattr(node, "id", None) or getattr(
                getattr(node, "target", None), "id", None)
            if name:
                defined.setdefault(name, statement.lineno)
    later = []
    for statement in body:
        start = min([statement.lineno, *(decorator.lineno for decorator in getattr(statement, "decorator_list", []))])
        names = referred(symtable("\n".join(lines[start - 1:statement.end_lineno]), "taskapi", "exec"))
        later += [f"line {statement.lineno}: {name}" for name in names if defined.get(name, 0) > statement.lineno]
    assert not later


@pytest.mark.parametrize(("owned", "rooms"), [
    (r"\bargparse\b", set()), (r"\bclick\.|\btabulate\(", {11}), (r"\bos\.environ\b", {11}),
    (r"\bsqlite3\.(?!Connection)", {4}),
    (r"\bsqlite_utils\b", {4}), (r"(import|from) faker|\bfaker\.", {5}), (r"\bmultipart\.", {6}),
    (r"\bThreadPoolExecutor\(", {4, 6, 8}),  # in 4 and 6 what waits without the interpreter lock
    (r"\bthreading\.Thread\(", {4, 8, 11}), (r"\bbottle\.", {9}),
    (r"\bwaitress\.", {11}), (r"\bsignal\.", {7, 11}),  # in 7 a child process, which leaves Ctrl-C to its parent
    (r"^    http_status = ", {1}),
    (r"\blogging\.(basicConfig|StreamHandler)", {11}),
    (r"\b(SELECT\b.*\bFROM|INSERT (OR \w+ )?INTO|DELETE FROM|UPDATE \w+ SET|PRAGMA)\b", {4}),
    (r"<(html|body|script)\b", {10})])
def test_what_a_room_owns_appears_there_alone(owned: str, rooms: set[int]) -> None:
    """The table of the design; comments and docstrings may speak of anything."""
    pattern = re.compile(owned, re.M)
    found = {number: pattern.findall(code) for number, code in CODE.items() if pattern.search(code)}
    assert found.keys() <= rooms, found


def test_one_list_of_packages_stands_in_three_places() -> None:
    """The project's, that of whoever runs the file alone, and the one that is checked; none has an upper limit."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    formats = [f"{name}>={least}" for name, least in taskapi.FORMAT_PACKAGES.items()]
    assert project["optional-dependencies"]["formats"] == formats
    assert {*formats} <= {*project["optional-dependencies"]["test"]}
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", SOURCE, re.M)[1]
    script = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    assert project["dependencies"] == script["dependencies"] == [
        f"{name}>={least}" for name, least in taskapi.PACKAGES.items()]
    assert project["requires-python"] == script["requires-python"]


@pytest.mark.parametrize("how", [["-c", "import taskapi"], [taskapi.__file__, "jobs"]])
@pytest.mark.parametrize(("found", "told"), [
    ({"Faker": "25.9"}, "taskapi needs Faker >= 30, found 25.9: pip install -U Faker\n"),
    ({"pydantic": "2.5.3", "sqlite_utils": "3.37"}, ("taskapi needs pydantic >= 2.11, found 2.5.3; sqlite-utils >= "
                                                    "3.38, found 3.37: pip install -U pydantic sqlite-utils\n")),
    (None, "taskapi needs bottle, click, Faker, multipart, pydantic, sqlite-utils, tabulate, waitress: pip install " +
     " ".join(f'"{name}>={least}"' for name, least in taskapi.PACKAGES.items()) + "\n")])
def test_missing_and_older_packages_are_told_in_one_line(
        tmp_path: Path, how: list[str], found: dict[str, str] | None, told: str) -> None:
    """With what installs them; as an ImportError where it is imported, and nothing else where it is run."""
    for name, version in (found or {}).items():
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    path = f"{tmp_path}{os.pathsep}{Path(taskapi.__file__).parent}"
    ended = subprocess.run([sys.executable, *(["-S"] if found is None else []), *how], cwd=tmp_path, text=True,
                           env=own_environ() | {"PYTHONPATH": path}, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == told if how[0] != "-c" else ended.stderr.endswith(f"\nImportError: {told}")


@pytest.mark.parametrize("tool", [["ruff", "check", "--isolated", "--no-cache"],
                                  ["mypy", "--strict", "--config-file=", "--cache-dir=.mypy_cache/host"]])
def test_a_copy_passes_a_hosts_checks_as_it_is(tool: list[str]) -> None:
    """By the defaults of ruff, and by mypy without the plugin of pydantic."""
    ended = subprocess.run([sys.executable, "-m", *tool, taskapi.__file__], cwd=HERE, capture_output=True, text=True,
                           check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_importing_does_nothing_but_define(tmp_path: Path) -> None:
    """No file, thread, log handler, descriptor or changed setting of the process."""
    probe = """if True:
        import logging, os, random, signal, sys, tempfile, threading
        def state():
            descriptors = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else ()
            return (threading.active_count(), len(descriptors), logging.getLogger().handlers, sys.getswitchinterval(),
                    tempfile.tempdir, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
                    random.getstate())
        before = state()
        import taskapi
        assert state() == before, (before, state())
        assert not {"pytest", "faker", "sqlite_utils", "pandas", "numpy"} & sys.modules.keys()  # slow ones
        assert not logging.getLogger("taskapi").handlers"""
    ended = subprocess.run([sys.executable, "-B", "-W", "error", "-c", probe], cwd=tmp_path, text=True, check=False,
                           env=os.environ | {"PYTHONPATH": str(Path(taskapi.__file__).parent)}, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout + ended.stderr == ""
    assert not [*tmp_path.iterdir()]


# ==== README: its commands, tables and examples are true ====

README = (HERE / "README.md").read_text(encoding="utf-8")


def between_marks(mark: str) -> str:
    """A part of the README."""
    return README.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]


def between_fence(mark: str) -> str:
    """The code block below a mark."""
    return re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)\n```", README, re.S)[1]


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_readme_lists_every_setting_type_and_command() -> None:
    """To renew the table of settings, paste what the call returns."""
    def names(mark: str) -> list[str]:
        return between_marks(mark).strip("`").split()

    assert between_marks("settings").strip() == taskapi.Settings.table()
    assert names("types") == [name for name, model in taskapi.FIELD_TYPES.items() if model.__module__ == "taskapi"]
    assert names("commands") == [name for name in every_command() if name == "serve" or name in taskapi.COMMANDS]


def test_the_readme_lists_every_call_link_format_and_package() -> None:
    """What the program answers, and what the README says of it, name the same things."""
    told = re.findall(r"`(GET|POST|PUT|DELETE) (/[^`?]*)`", README.split("| call |")[1].split("\n\n")[0])
    told += [("POST", "/jobs/{jobId}/retry")]  # written as .../retry
    routes = {(route.method, route.path) for route in taskapi.all_routes()} - {
        ("POST", f"/{name}") for name, kind in taskapi.JOB_TYPES.items() if kind.run.__module__ != "taskapi"}
    assert {*told} == routes
    linked = {*taskapi.LINKS.values()}
    assert linked <= {path for _, path in routes}
    unlinked = {path for _, path in routes if not any(path.startswith(link) for link in linked)}
    assert unlinked == {"/", "/download/{jobId}"}  # a job's own links have the latter
    row = next(line for line in README.splitlines() if line.startswith("| `POST /export`")).lower()
    assert [name for name in taskapi.FORMATS if name not in row] == []
    uploads = README.split("### Uploads that become records")[1].split("###")[0].lower()
    assert [name for name in (*taskapi.INGEST_FORMATS, *taskapi.INGEST_OPTIONS) if name.lower() not in uploads] == []
    assert between_fence("packages") == "pip install " + " ".join(
        f'"{name}>={least}"' for name, least in taskapi.PACKAGES.items())


def test_the_readme_sets_up_with_one_line_each_and_ci_runs_the_same() -> None:
    """Each command begins from nothing; CI reads its own out of the README."""
    start, test = (block.strip() for block in blocks("sh")[:2])
    assert start.startswith("python3 -m venv .venv && ")
    assert start.endswith("python taskapi.py")
    assert test.startswith("python3 -m venv .venv && ")
    assert test.endswith("-m pytest -n auto")
    assert "README.md" in (HERE / ".ci" / "run").read_text()


@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("bash"), reason="the README's journey is told in curl")
def test_the_readmes_journey_prints_what_it_says(tmp_path: Path) -> None:
    """Each command is run as it stands, but for the port and the job ids of this run; ... stands for anything."""
    ids: dict[str, str] = {}
    told = "\n".join(re.findall(r"<!-- journey -->\n```console\n(.*?)```", README, re.S))
    with Live(tmp_path / "data") as live:
        for command, expected in re.findall(r"^\$ (.*)\n((?:[^$\n].*\n)*)", told, re.M):
            for id_told, id_now in ids.items():
                command, expected = command.replace(id_told, id_now), expected.replace(id_told, id_now)
            command = command.replace("localhost:8080", live.url.removeprefix("http://"))
            printed = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
            for id_told in set(re.findall(r'"jobId":"([0-9a-f-]{36})"', expected)) - {*ids.values()}:
                ids[id_told] = json.loads(printed.stdout)["jobId"]
                expected = expected.replace(id_told, ids[id_told])
            pattern = ".*".join(map(re.escape, expected.strip().split("...")))
            assert re.fullmatch(pattern, printed.stdout.strip(), re.S), (command, printed.stdout)
    with (tmp_path / "people.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 1000


@pytest.mark.parametrize("text", re.findall(r"<!-- schema -->\n```json\n(.*?)```", README, re.S))
def test_the_readmes_schemas_work_as_they_stand(service: taskapi.Service, text: str) -> None:
    """Posted to /generate; the related records' totals are the sums of their items."""
    job = service.enqueue("generate", json.loads(text))
    assert (job.status, job.error) == ("completed", None)
    types = {info.record_type for info in service.queue.records.types()}
    if "item" in types:
        rows = plain(service.folder.root, 'SELECT total, (SELECT group_concat(amount) FROM item '
                                          'WHERE orderId = "order".id) FROM "order"')
        assert rows
        for total, amounts in rows:
            assert Decimal(str(total)) == sum(map(Decimal, amounts.split(",")))


@pytest.mark.skipif(not shutil.which("bash"), reason="the README's commands stand among others of a shell")
def test_the_readmes_commands_print_what_it_says(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """Ours are run in this process, the others in a shell; ... stands for anything, and a million for a thousand."""
    (tmp_path / "signup.json").write_text('{"id": "sequence", "plan": {"type": "choice", "values": ["free"]}}')
    (tmp_path / "customers.csv").write_text("name,age\nAda,41\nGrace,45\nAlan,39\n")
    for name in ("app.db", "copy.db"):
        with closing(sqlite3.connect(tmp_path / name)) as database:
            database.execute("CREATE TABLE author(id INTEGER PRIMARY KEY)")
            database.execute("CREATE TABLE book(author REFERENCES author)")
    told = "\n".join(re.findall(r"<!-- command -->\n```console\n(.*?)```", README, re.S))
    commands = re.findall(r"^\$ (.*)\n((?:[^$\n].*\n)*)", told, re.M)
    assert len(commands) >= 7
    for command, expected in commands:
        first, own, rest = command.partition(".venv/bin/python taskapi.py ")
        if own:
            assert not first
            words, _, target = rest.replace("1000000", "1000").partition(" > ")
            ran = run(*shlex.split(words))
            assert ran[::2] == (0, ""), (command, ran)
            if target:
                (tmp_path / target).write_text(ran.out)
                continue
        else:
            ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
            ran = Ran(0, ended.stdout, "")
        pattern = ".*".join(map(re.escape, re.sub(r"[0-9a-f-]{36}", "...", expected).strip().split("...")))
        assert re.fullmatch(pattern, ran.out.strip().replace("\r", ""), re.S), (command, ran.out)
    assert {"orders.parquet", "shop.xlsx", "customers.sql", "3.ndjson"} <= {file.name for file in tmp_path.iterdir()}


def test_the_readmes_recipe_for_a_front_end_lets_its_page_in(tmp_path: Path) -> None:
    """The setting as it stands lets a page of another port read what the line of JavaScript asks for."""
    (recipe,) = blocks("js")
    origins, path = re.search(r"CORS_ORIGINS='(.*)'(?s:.*)fetch\(\"http://localhost:8080(.*?)\"", recipe).groups()
    with taskapi.open_service(tmp_path, cors_origins=origins) as service, service.serving(port=0) as url:
        service.wait(service.enqueue("generate", {"recordType": "person", "count": 300}).job_id)
        answer = ask(url, "GET", path, headers={"Origin": "http://localhost:5173"})
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:5173"
    assert 0 < len(answer.json["items"]) <= 20


def test_the_readmes_contents_lead_to_its_headings() -> None:
    """Each link within it, by the anchor that a heading gets; and each heading is in the table of contents."""
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
               for title in re.findall(r"^##+ (.+)$", README, re.M)}
    links = set(re.findall(r"\]\(#([^)]+)\)", README))
    assert links <= anchors
    assert anchors - links <= {"records"}


def test_the_readmes_python_works_as_it_stands(tmp_path: Path) -> None:
    """All blocks, in order, in one module; what they leave is looked at."""
    space: dict[str, Any] = {"tmp_path": tmp_path, "urllib": urllib, "faker": faker, "json": json}
    for number, block in enumerate(blocks("python")):
        space["tmp_path"] = tmp_path / str(number)
        exec(block, space)
    assert len(space["people"]) == 10
    with taskapi.open_service(tmp_path / "own", inline=True) as service:
        job = webtest.TestApp(service.app).post_json("/count", {"to": 3}, status=202).json
        assert (job["status"], job["result"]) == ("completed", {"counted": 3})
        assert job["progress"] == {"done": 3, "total": 3}
        assert service.enqueue("generate", {"recordType": "player", "count": 50}).status == "completed"
        assert {*plain(tmp_path / "own", "SELECT strength FROM player")} <= {*range(1, 21)}
    with taskapi.open_service(tmp_path / "faults", test_controls=True) as service, service.serving(port=0) as url:
        served = taskapi.ServedUrl(url, service)
        space["test_the_client_is_patient"](served)
        space["patient"] = urllib.request.urlopen  # a client that is not fails its test
        with pytest.raises(urllib.error.HTTPError, match="503"):
            space["test_the_client_is_patient"](served)
    del taskapi.JOB_TYPES["count"], taskapi.FIELD_TYPES["die"], taskapi.PRESETS["player"]


# ==== Benchmarks: ratios within one run; pytest -m bench -s ====

SEVEN = {name: name for name in ("name", "email", "address", "company", "job", "phone_number", "date")}


def rate(work: Callable[[], int]) -> float:
    """How many a second `work` does; it returns how many it did."""
    begun = time.perf_counter()
    return work() / (time.perf_counter() - begun)


def through_a_job(folder: Path, count: int) -> int:
    """From enqueue to completed, on a worker of a service."""
    with taskapi.open_service(folder) as service:
        job = service.wait(service.enqueue("generate", {"recordType": "seven", "count": count, "schema": SEVEN}).job_id)
        assert job.status == "completed", job.error
    return count


def through_faker(folder: Path, count: int) -> int:
    """What Faker's and sqlite-utils' users write."""
    fake, db = faker.Faker("en_US"), sqlite_utils.Database(folder)
    fake.seed_instance(1)
    db["seven"].insert_all({name: getattr(fake, name)() for name in SEVEN} for _ in range(count))
    db.close()
    return count


def through_mimesis(folder: Path, count: int) -> int:
    """What mimesis' users write, with the fastest insertion that Python has."""
    from mimesis import Address, Datetime, Finance, Locale, Person

    person, address = Person(Locale.EN, seed=1), Address(Locale.EN, seed=1)
    day, finance = Datetime(Locale.EN, seed=1), Finance(Locale.EN, seed=1)
    with closing(sqlite3.connect(folder)) as connection:
        connection.execute("CREATE TABLE seven(name, email, address, company, job, phone, date)")
        connection.executemany("INSERT INTO seven VALUES (?, ?, ?, ?, ?, ?, ?)", (
            (person.full_name(), person.email(),
             f"{address.address()}\n{address.city()}, {address.state(abbr=True)} {address.postal_code()}",
             finance.company(), person.occupation(),
             person.telephone(), day.date().isoformat()) for _ in range(count)))
        connection.commit()
    return count


@pytest.mark.bench
def test_bench_generation(tmp_path: Path) -> None:
    """Seven Faker fields, through a real job, against stock Faker and mimesis; twice, the better of each."""
    runs = [(rate(partial(through_faker, tmp_path / f"f{turn}.db", 3000)),
             rate(partial(through_mimesis, tmp_path / f"m{turn}.db", 20_000)),
             rate(partial(through_a_job, tmp_path / f"j{turn}", 50_000))) for turn in range(2)]
    stock, mimesis, ours = map(max, zip(*runs, strict=True))
    print(f"\ngenerate: {ours / stock:.1f} times Faker + sqlite-utils (goal 15), {ours / mimesis:.2f} of mimesis + "
          f"executemany ({ours:.0f}, {stock:.0f}, {mimesis:.0f} records/s)")


def peak(live: Live) -> int:
    """The most memory that a server has used, in MB."""
    status = Path(f"/proc/{live.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024


@pytest.mark.bench
def test_bench_cost_and_memory_by_count(tmp_path: Path) -> None:
    """The cost of a record and the peak of memory, from 10,000 records to 1,000,000, and for related ones."""
    print()
    first = 0.0
    shop = {"recordType": "shop", "count": 20_000, "seed": 1}
    for body in ({"count": 10_000}, {"count": 100_000}, {"count": 1_000_000}, shop):
        with Live(tmp_path / str(body["count"])) as live:
            live.job(live.make("/generate", {"recordType": "warm", "count": 1, "schema": SEVEN}), 30)
            idle, begun = peak(live), time.perf_counter()
            job_id = live.make("/generate", {"recordType": "seven", "schema": SEVEN, "seed": 1, **body}
                               if "recordType" not in body else body)
            while not (job := live.job(job_id, 20))["result"]:
                assert job["status"] in ("pending", "in-progress"), job
            cost = (time.perf_counter() - begun) / job["result"]["records"] * 1e6
            first = first or cost
            print(f"{job['result']['records']:>9} records of {body.get('recordType', 'seven')}: {cost / first:.2f} of "
                  f"the first cost a record ({cost:.0f} us), {peak(live) - idle} MB over idle")


NINE = {"id": "sequence", "name": "name", "email": "email", "city": "city", "plan": {"type": "choice", "values": [
    "free", "pro"]}, "score": {"type": "float", "min": 0, "max": 500, "round": 2}, "active": "bool",
    "joined": {"type": "date", "from": "-1y", "to": "now"}, "note": {"type": "sentence", "null": 0.1}}


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def run_job(service: taskapi.Service, job_type: str, **request: Any) -> taskapi.Job:
    """Runs a job to its end."""
    job_id = service.enqueue(job_type, request).job_id
    while not (job := service.wait(job_id)).status.finished:
        pass
    assert job.status == "completed", job.error
    return job


@pytest.mark.bench
def test_bench_exports_and_ingest(tmp_path: Path) -> None:
    """300,000 records of nine fields: exports, through jobs, against the sqlite3 shell in turn, the best of five."""
    shell, tool = shutil.which("sqlite3"), Path(sys.executable).with_name("sqlite-utils")
    assert shell, "the sqlite3 shell is what exports are measured against"
    print()
    with taskapi.open_service(tmp_path / "data") as service:
        run_job(service, "generate", recordType="nine", count=300_000, schema=NINE, seed=1)
        exact = {**NINE, "score": {"type": "float", "min": 0, "max": 500}}
        run_job(service, "generate", recordType="exact", count=300_000, schema=exact, seed=1)

        def through_shell(mode: str, record_type: str) -> None:
            with (tmp_path / "shell.out").open("wb") as out:
                query = f"SELECT {', '.join(NINE)} FROM {record_type}"
                subprocess.run([shell, f"-{mode}", tmp_path / "data" / "taskapi.db", query], stdout=out, check=True)

        for record_type, export_format, mode, goal in (
                ("nine", "csv", "csv", 0.9), ("nine", "json", "json", 1.1), ("nine", "ndjson", "json", 1.1),
                ("exact", "csv", "csv", 0), ("exact", "json", "json", 0)):
            request = {"format": export_format, "filters": {"recordType": record_type}}
            pairs = [(seconds(partial(through_shell, mode, record_type)),
                      seconds(partial(run_job, service, "export", **request))) for _ in range(5)]
            theirs, ours = map(min, zip(*pairs, strict=True))
            print(f"export {export_format} of {record_type}: {theirs / ours:.2f} of sqlite3 -{mode} "
                  f"(goal {goal or 'none'}; {ours:.2f} s)", flush=True)
        job = run_job(service, "export", format="csv", filters={"recordType": "nine"})
        source = service.folder.root / job.file.path
        peer = [tool, "insert", tmp_path / "peer.db", "t", source, "--csv"]
        theirs = seconds(partial(subprocess.run, peer, check=True, capture_output=True))
    with Live(tmp_path / "live", "--max-upload-bytes", str(2**31)) as live:
        def ingest() -> None:
            body = b"".join(multipart_of(source, "recordType", "again"))
            job_id = live.ask("POST", "/upload", body, FORM).json["jobId"]
            while not live.job(job_id, 20)["result"]:
                pass

        print(f"ingest of {source.stat().st_size / 1e6:.0f} MB of CSV, from upload to end: "
              f"{theirs / seconds(ingest):.1f} times sqlite-utils insert --csv (goal 2)")


@pytest.mark.bench
def test_bench_reading_records(tmp_path: Path) -> None:
    """300,000 records of nine fields, filtered and sorted over HTTP, against Datasette (which wants an environment of
    its own: pipx install datasette) on a copy of the same database: as it answers by default, and without the facets
    that it suggests. Asked in turn, the median of nine, no question twice, since we keep the totals."""
    datasette, path = shutil.which("datasette"), tmp_path / "copy.db"
    if not datasette:
        pytest.skip("datasette is not there")
    print()
    with taskapi.open_service(tmp_path / "data") as service:
        run_job(service, "generate", recordType="nine", count=300_000, schema=NINE, seed=1)
        plain(tmp_path / "data", "VACUUM INTO ?", str(path))
    with Live(tmp_path / "data") as live, subprocess.Popen(
            [datasette, "serve", str(path), "--port", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True) as peer:
        address = next(found[1] for line in peer.stderr or () if (found := re.search(r"running on (http://\S+)", line)))

        def timed(url: str, path: str) -> tuple[Any, float]:
            begun = time.perf_counter()
            return json.loads(ask(url, "GET", path).body), time.perf_counter() - begun

        for what, ours, theirs in (
                ("a filter that many fit", "score.gte={}&plan=pro", "score__gte={}&plan=pro"),
                ("a filter that few fit", "name.contains=Zamora&score.lt={}", "name__contains=Zamora&score__lt={}"),
                ("a filter, sorted", "score.gte={}&orderBy=-joined", "score__gte={}&_sort_desc=joined")):
            times = []
            for bound in range(300, 309):
                peers = f"/copy/nine.json?{theirs.format(bound)}&_shape=objects"
                mine, default, bare = (timed(*asked) for asked in (
                    (live.url, f"/records/nine?{ours.format(bound)}"), (address, peers),
                    (address, f"{peers}&_nosuggest=1")))
                assert mine[0]["total"] == default[0]["filtered_table_rows_count"], what
                times.append([each[1] for each in (mine, default, bare)])
            mine, default, bare = (sorted(column)[4] for column in zip(*times, strict=True))
            print(f"{what}: {default / mine:.1f} times Datasette (goal 3), {bare / mine:.1f} without suggestions (goal "
                  f"0.8; {1000 * mine:.0f} ms)", flush=True)
        peer.terminate()


@pytest.mark.bench
def test_bench_formats(tmp_path: Path) -> None:
    """300,000 records of nine fields to Parquet and xlsx against pandas, to TSV against the sqlite3 shell."""
    pandas, shell = pytest.importorskip("pandas"), shutil.which("sqlite3")
    query = f"SELECT {', '.join(NINE)} FROM nine"
    print()
    with taskapi.open_service(tmp_path / "data") as service:
        run_job(service, "generate", recordType="nine", count=300_000, schema=NINE, seed=1)
        with closing(sqlite3.connect(tmp_path / "data" / "taskapi.db")) as db:
            peers: dict[str, tuple[int, float, Callable[[], object]]] = {
                "parquet": (3, 2, lambda: pandas.read_sql(query, db).to_parquet(tmp_path / "p.parquet")),
                "tsv": (3, 1 / 1.3, lambda: subprocess.run(
                    [shell, "-csv", "-header", "-separator", "\t", tmp_path / "data" / "taskapi.db", query],
                    stdout=subprocess.DEVNULL, check=True)),
                "xlsx": (1, 2, lambda: pandas.read_sql(query, db).to_excel(
                    tmp_path / "p.xlsx", index=False, engine="openpyxl"))}
            for export_format, (times, goal, peer) in peers.items():
                request = {"format": export_format, "filters": {"recordType": "nine"}}
                theirs, ours = map(min, zip(*((seconds(peer), seconds(partial(run_job, service, "export", **request)))
                                              for _ in range(times)), strict=True))
                print(f"export {export_format}: {theirs / ours:.2f} times (goal {goal:.2f}; {ours:.2f} s)", flush=True)


def multipart_of(path: Path, *text: str) -> Iterator[bytes]:
    """A multipart body with one file and perhaps a text part, a piece at a time."""
    if text:
        yield f'--XX\r\nContent-Disposition: form-data; name="{text[0]}"\r\n\r\n{text[1]}\r\n'.encode()
    yield f'--XX\r\nContent-Disposition: form-data; name="file"; filename="{path.name}"\r\n\r\n'.encode()
    with path.open("rb") as file:
        while block := file.read(2**20):
            yield block
    yield b"\r\n--XX--\r\n"


FLASK = """if True:
    import flask, sys, waitress
    app = flask.Flask("peer")

    @app.post("/upload")
    def upload():
        flask.request.files["file"].save(sys.argv[1])
        return {"bytes": 1}, 201

    server = waitress.create_server(app, host="127.0.0.1", port=0, max_request_body_size=2**31)
    print(f"http://127.0.0.1:{server.effective_port}", flush=True)
    server.run()
"""


def send_file(url: str, path: Path) -> dict[str, Any]:
    """Streams a file to /upload, which takes no memory here."""
    size = sum(map(len, multipart_of(path)))
    place = urlsplit(url)
    with closing(http.client.HTTPConnection(place.hostname, place.port, timeout=600)) as connection:
        connection.request("POST", "/upload", multipart_of(path), FORM | {"Content-Length": str(size)})
        response = connection.getresponse()
        body = response.read()
    assert response.status == 201, body
    return dict(json.loads(body))


@pytest.mark.bench
def test_bench_uploads(tmp_path: Path) -> None:
    """200 MB in turn to this server, which hashes, checks and fsyncs, and to Flask on Waitress, which saves them."""
    source = tmp_path / "a.csv"
    source.write_bytes(b"id,name,note\r\n" + b'1,"Anna Smith","of no note"\r\n' * (200 * 10**6 // 29))
    with Live(tmp_path / "live", "--max-upload-bytes", str(2**31)) as live, subprocess.Popen(
            [sys.executable, "-c", FLASK, str(tmp_path / "saved")], stdout=subprocess.PIPE, text=True) as peer:
        try:
            place = peer.stdout.readline().strip()
            pairs = [(seconds(lambda: send_file(place, source)), seconds(lambda: send_file(live.url, source)))
                     for _ in range(4)]
        finally:
            peer.kill()
    theirs, ours = map(min, zip(*pairs, strict=True))
    print(f"\nupload of 200 MB: {theirs / ours:.2f} times as fast as Flask on Waitress (goal 1.5; {ours:.2f} s)")


@pytest.mark.bench
def test_bench_memory_of_files(tmp_path: Path) -> None:
    """The peak of memory over idle for a million records exported and ingested, and for 1 GB uploaded and fetched."""
    print()
    with Live(tmp_path / "data", "--max-upload-bytes", str(2**31)) as live:
        live.job(live.make("/generate", {"recordType": "warm", "count": 1, "schema": NINE}), 30)
        idle = peak(live)

        def over(what: str, job_id: str) -> dict[str, Any]:
            while not (job := live.job(job_id, 20))["finishedAt"]:
                pass
            assert job["status"] == "completed", job
            print(f"{what}: {peak(live) - idle} MB over idle (goal 40)", flush=True)
            return job

        over("generate 1,000,000", live.make("/generate", {"recordType": "nine", "count": 10**6, "schema": NINE}))
        for export_format in ("csv", "json", "ndjson", "sqlite"):
            job = over(f"export {export_format}", live.make("/export", {"format": export_format}))
        over("export csv in order", live.make("/export", {"format": "csv", "orderBy": "name"}))
        job = over("export csv.gz", live.make("/export", {
            "format": "csv", "gzip": True, "filters": {"recordType": "nine"}}))
        packed = tmp_path / "nine.csv.gz"
        packed.write_bytes(live.ask("GET", job["links"]["download"]).body)
        body = b"".join(multipart_of(packed, "recordType", "again"))
        over("ingest csv.gz", live.ask("POST", "/upload", body, FORM).json["jobId"])
        big = tmp_path / "big.txt"
        with big.open("wb") as file:
            for _ in range(1024):
                file.write(b"0123456789abcde\n" * 2**16)
        job = over("upload 1 GB", send_file(live.url, big)["jobId"])
        with closing(http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=600)) as connection:
            connection.request("GET", job["links"]["download"])
            response = connection.getresponse()
            assert sum(len(block) for block in iter(partial(response.read, 2**20), b"")) == big.stat().st_size
        print(f"download 1 GB: {peak(live) - idle} MB over idle")


def through_the_queue(folder: Path, count: int, clients: int) -> int:
    """Jobs that do nothing, from enqueue to completed, each fsynced; no client: one after the other, each awaited."""
    with taskapi.open_service(folder, max_pending=count) as service:
        def enqueue() -> taskapi.Job:
            return service.enqueue("script", {"script": "nothing"})

        if clients:
            threads(clients, lambda _: [enqueue() for _ in range(count // clients)])
        else:
            assert {service.wait(enqueue().job_id).status for _ in range(count)} == {"completed"}
        assert service.drain(300)
        assert plain(folder, "SELECT count(*) FROM jobs WHERE status = 'completed'") == [count]
    return count


def through_huey(folder: Path, count: int, clients: int) -> int:
    """The same with huey and its SQLite storage, with fsync on and as many workers."""
    from huey import SqliteHuey

    huey = SqliteHuey(filename=str(folder), fsync=True)
    noop = huey.task()(lambda: True)
    consumer = huey.create_consumer(workers=4, worker_type="thread", initial_delay=0.01, max_delay=0.05, backoff=1.0)
    consumer.start()
    if clients:
        threads(clients, lambda _: [noop() for _ in range(count // clients)])
        until(lambda: huey.storage.result_store_size() == count, 300)
    else:
        assert all(noop()(blocking=True, backoff=1, max_delay=0.001) for _ in range(count))
    consumer.stop(graceful=True)
    return count


@pytest.mark.bench
@pytest.mark.parametrize(("clients", "count"), [(0, 200), (1, 2000), (8, 2000)])
@pytest.mark.filterwarnings("ignore")
def test_bench_jobs_that_do_nothing(tmp_path: Path, script: Any, clients: int, count: int) -> None:
    """Against huey, in turns; the better of each."""
    @lambda function: script(function, "nothing")
    def nothing(context: taskapi.JobContext) -> taskapi.JobSteps:
        yield
        return taskapi.JobResult({})

    runs = [(rate(partial(through_huey, tmp_path / f"h{turn}.db", count, clients)),
             rate(partial(through_the_queue, tmp_path / f"q{turn}", count, clients))) for turn in range(3)]
    theirs, ours = map(max, zip(*runs, strict=True))
    how = f"{clients} clients" if clients else "each awaited"
    print(f"\njobs that do nothing, {how}: {ours / theirs:.2f} times huey (goal 3) "
          f"({ours:.0f}, {theirs:.0f} jobs/s)")


def past(folder: Path, count: int) -> None:
    """Puts jobs that completed long ago into a job table."""
    with closing(sqlite3.connect(folder / "taskapi.db")) as connection, connection:
        connection.executemany(
            "INSERT INTO jobs(id, type, status, created_at, started_at, finished_at, attempt, request, result) "
            "VALUES (?, 'generate', 'completed', ?, ?, ?, 1, '{\"count\":10}', '{\"records\":10}')",
            ((f"0180{n:08x}", *["2025-01-01T00:00:00.000Z"] * 3) for n in range(count)))


@pytest.mark.bench
def test_bench_a_million_finished_jobs(tmp_path: Path, script: Any) -> None:
    """What a job and each look at the queue cost with them, against the same without."""
    print()
    costs: list[dict[str, float]] = []
    for count in (0, 1_000_000):
        folder = tmp_path / str(count)
        with taskapi.open_service(folder):
            past(folder, count)
        with taskapi.open_service(folder, max_pending=2000) as service, service.serving(port=0) as url:
            service.drain(60)
            cost = {"job": 1 / rate(lambda service=service: sum(
                service.wait(service.enqueue("script", {}).job_id).attempt for _ in range(300)))}
            job_id = service.enqueue("script", {}).job_id
            paths = ("/", f"/status/{job_id}", "/jobs", "/jobs?status=failed", "/metrics")
            with closing(http.client.HTTPConnection(urlsplit(url).netloc)) as connection:
                for path in paths:
                    def asked(path: str = path, connection: Any = connection) -> int:
                        connection.request("GET", path)
                        return len([connection.getresponse().read()])

                    cost[path.replace(job_id, "{jobId}")] = min(1 / rate(asked) for _ in range(200))
            costs.append(cost)
    for name, before in costs[0].items():
        print(f"{name:<22} {costs[1][name] / before:.2f} of the cost without ({costs[1][name] * 1e6:.0f} us)")


# A process of its own, so that it takes nothing from the server's interpreter: raw sockets, keep-alive, no parsing.
LOAD = """
import json, selectors, socket, sys, time
host, port, clients, seconds, pause, method, path, body = sys.argv[1:]
head = f"{method} {path} HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
data = f"{head}Content-Length: {len(body)}\\r\\n\\r\\n{body}".encode()
watch, took, wrong, begun = selectors.DefaultSelector(), [], 0, time.perf_counter()
for _ in range(int(clients)):
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    watch.register(connection, selectors.EVENT_READ, [b"", time.perf_counter()])
    connection.sendall(data)
while watch.get_map():
    for key, _ in watch.select():
        state, now = key.data, time.perf_counter()
        state[0] += key.fileobj.recv(65536)
        end = state[0].find(b"\\r\\n\\r\\n") + 4
        if end < 4 or len(state[0]) < end + int(state[0][:end].lower().split(b"content-length:")[1].split()[0]):
            continue
        wrong += state[0][9:10] != b"2"
        took.append(now - state[1])
        if now - begun > float(seconds):
            watch.unregister(key.fileobj)
            continue
        time.sleep(float(pause))
        state[:] = b"", time.perf_counter()
        key.fileobj.sendall(data)
took.sort()
print(json.dumps([len(took) / (time.perf_counter() - begun), took[len(took) // 2], took[len(took) * 99 // 100], wrong]))
"""
ONE = '{"recordType": "one", "count": 1, "schema": {"id": "sequence"}}'


class Load(NamedTuple):
    """What clients met: answers a second, seconds to an answer (median, 99th percentile), answers that were not 2xx."""

    rate: float
    p50: float
    p99: float
    wrong: int


def under_load(url: str, clients: int, method: str, path: str, body: str = "", seconds: float = 3,
               pause: float = 0) -> Load:
    """Lets so many keep-alive clients ask again and again."""
    parts = urlsplit(url)
    command = [sys.executable, "-S", "-E", "-c", LOAD, parts.hostname, parts.port, clients, seconds, pause, method,
               path, body]
    met = Load(*json.loads(subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=True).stdout))
    assert not met.wrong
    return met


@contextmanager
def bare_hello() -> Iterator[str]:
    """Bottle's hello on plain Waitress, with our settings."""
    program = textwrap.dedent("""
        import bottle, logging, waitress
        app = bottle.Bottle()
        app.route("/", callback=lambda: "hello")
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        server = waitress.create_server(app, host="127.0.0.1", port=0, threads=8, recv_bytes=65536,
                                        asyncore_use_poll=True, clear_untrusted_proxy_headers=True)
        print(server.effective_port, flush=True)
        server.run()
        """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@pytest.mark.bench
def test_bench_posts_a_second(tmp_path: Path) -> None:
    """POST /generate, durable, by 8 keep-alive clients, against a bare Bottle hello; three times, the medians."""
    with Live(tmp_path / "data", "--max-pending", "1000000") as live, bare_hello() as bare:
        runs = [(under_load(bare, 8, "GET", "/"), under_load(live.url, 8, "POST", "/generate", ONE)) for _ in range(3)]
    hello, posts = (sorted(run[at].rate for run in runs)[1] for at in (0, 1))
    print(f"\nPOST /generate: {posts / hello:.2f} of a bare hello (goal 0.6) ({posts:.0f} and {hello:.0f} a second)")


@pytest.mark.bench
def test_bench_responsive_while_working(tmp_path: Path) -> None:
    """One client and eight, idle and beside four large generate jobs; and how fast those go on meanwhile."""
    with Live(tmp_path / "data", "--max-pending", "1000000") as live:
        def made(during: Callable[[], Any]) -> tuple[float, Any]:
            """Records that the large jobs make a second, and what `during` returns."""
            begun, before = time.perf_counter(), sum(live.job(job)["progress"]["done"] for job in large)
            result = during()
            after = sum(live.job(job)["progress"]["done"] for job in large)
            return (after - before) / (time.perf_counter() - begun), result

        def one_client(status: str) -> tuple[Load, Load]:
            return (under_load(live.url, 1, "POST", "/generate", ONE, 4),
                    under_load(live.url, 1, "GET", status, seconds=4))

        status = f"/status/{live.make('/generate', json.loads(ONE))}"
        under_load(live.url, 1, "POST", "/generate", ONE, 1)
        idle, eight_idle = one_client(status), under_load(live.url, 8, "POST", "/generate", ONE)
        until(lambda: live.ask("GET", "/").json["pending"] == 0, 60)
        large = [live.make("/generate", {"recordType": f"big{n}", "count": 10**7, "schema": SEVEN}) for n in range(4)]
        until(lambda: all(live.job(job)["progress"]["done"] for job in large))
        alone, _ = made(lambda: time.sleep(4))
        polled, _ = made(lambda: under_load(live.url, 1, "GET", status, seconds=4, pause=0.05))
        busy = one_client(status)
        saturated, eight_busy = made(lambda: under_load(live.url, 8, "POST", "/generate", ONE, 4))
    print()
    for name, quiet, loud in zip(("POST /generate", "GET /status"), idle, busy, strict=True):
        print(f"{name} beside four large jobs: p50 {loud.p50 / quiet.p50:.1f} times idle (goal 3), p99 "
              f"{loud.p99 / quiet.p99:.1f} times (goal 5) ({loud.p50 * 1e3:.1f} and {loud.p99 * 1e3:.1f} ms)")
    print(f"eight clients: {eight_busy.rate / eight_idle.rate:.2f} of their idle rate (goal 0.6) "
          f"({eight_busy.rate:.0f} a second)")
    print(f"generation: {polled / alone:.2f} of its own speed beside 20 polls a second (goal 0.6), "
          f"{saturated / alone:.2f} under saturation (goal 0.15) ({alone:.0f} records/s)")


@browsing
@pytest.mark.bench
def test_bench_page(tmp_path: Path, tab: Tab) -> None:
    """A thousand jobs in the list, and a look at a type of 100,000 records, against what the server takes to answer."""
    with taskapi.open_service(tmp_path / "data", inline=True) as service, service.serving(port=0) as url:
        store(service, {"n": "int", "t": "text"}, [[number, f"text {number % 9}"] for number in range(100_000)])
        for number in range(1000):
            store(service, {"n": "int"}, [[number]], "small")
        tab.open(url)
        for _ in range(5):
            tab.until("!$('more').hidden || listed === 1000")
            tab.js("$('more').click()")
        tab.until("document.querySelectorAll('#jobs > li').length === 1000")
        answered, filled, renewed = tab.js("""(async () => {
            const timed = async work => {
                const begun = performance.now();
                await work();
                return performance.now() - begun; };
            let page;
            const answered = await timed(async () => { page = await api("GET", "jobs?limit=1000"); });
            cards.clear();
            $("jobs").replaceChildren();
            const show = () => { showJobs(page); return document.body.offsetHeight; };
            return [answered, await timed(show), await timed(show)]; })()""")
        sampled = tab.js("""(async () => { const begun = performance.now();
            const items = await sampled(types.find(type => type.recordType === "thing"));
            if (items.length !== 1000 || items.at(-1).n < 90000) throw new Error(items.length);
            return performance.now() - begun; })()""")
    print(f"\npage, 1,000 jobs, in the time that the server takes to answer them: shown first {answered / filled:.1f} "
          f"times, renewed {answered / renewed:.0f} times, 100,000 records sampled {answered / sampled:.1f} times")


@pytest.mark.bench
def test_bench_parts(tmp_path: Path) -> None:
    """A request in eight parts: in two processes against one, by Dask on two, what a part adds, and its memory."""
    import tracemalloc

    from dask.distributed import Client

    asked = {"recordType": "person", "count": 300_000, "seed": 1, "now": "2026-01-01T00:00:00Z", "parts": 8}

    def through(processes: int) -> int:
        with taskapi.open_service(tmp_path / str(processes), processes=processes) as service:
            return int(run_job(service, "generate", **asked).result["records"])

    def count(number: int | None, request: dict[str, Any] = asked) -> int:
        return sum(1 for _ in taskapi.part(request, number))

    one, two = (rate(partial(through, processes)) for processes in (1, 2))
    print(f"\nparts: {two / one:.2f} of one process with --processes 2 (goal 1.6; {one:.0f}, {two:.0f} records/s)")
    alone, whole = (max(rates) for rates in zip(*[(
        rate(lambda: sum(map(count, range(8)))), rate(lambda: count(None, {**asked, "parts": 1})))
        for _ in range(2)], strict=True))
    print(f"parts: {whole / alone:.3f} of the uncut request's time in eight parts (goal 1.03)")
    with Client(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as client:
        make = partial(taskapi.part, asked)
        assert client.gather(client.map(lambda number: len([*make(number)]), [0, 1])) == [37_500] * 2
        spread = rate(lambda: sum(client.gather(client.map(lambda number: sum(1 for _ in make(number)), range(8),
                                                           pure=False))))
    print(f"parts: {spread / alone:.2f} of one process by Dask on two (goal 1.5; {alone:.0f}, {spread:.0f} records/s)")
    for preset in ("person", "shop"):
        tracemalloc.start()
        made = count(3, {**asked, "recordType": preset, "count": 20_000})
        print(f"parts: {tracemalloc.get_traced_memory()[1] / 1e6:.0f} MB at most for a part of {made} of {preset}")
        tracemalloc.stop()
