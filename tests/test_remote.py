"""Remote files against real servers on loopback: fetched once, resumed, verified, without a trace
of credentials."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest
import web
from conftest import ROOT, clean_environment, load_rows
from hypothesis import given
from hypothesis import strategies as st

from sft.config.load import dump_config, load_config
from sft.data import cache, files, remote, stores
from sft.errors import DataError, hide_credentials, redact

pytestmark = pytest.mark.slow

ROWS = [{"question": f"q{n}", "answer": f"a{n} " + "x" * 100} for n in range(2000)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
SECRET = "s3cr3t-Pa55"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "PAUSES", (0, 0))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    new_process()


@pytest.fixture
def site():
    with web.serve(files={"/rows.jsonl": LINES}) as served:
        yield served


def new_process():
    """As if a new process asked."""
    files._fetched.clear()
    for kind in fsspec.registry.values():
        if hasattr(kind, "clear_instance_cache"):
            kind.clear_instance_cache()


def fetched(address):
    """The rows of an address, as a new process reads them."""
    new_process()
    return load_rows(address, cache_dir="cache")[0]


def refused(address):
    new_process()
    with pytest.raises(DataError) as caught:
        files.sources(address, "cache")
    return str(caught.value)


def copies():
    return sorted(p for p in Path("cache/remote").glob("*/*") if p.parent.name != "addresses")


def parts():
    return list(Path("cache/remote").glob("addresses/*.part"))


# --- the web -------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_named_by_its_address(site):
    address = f"{site.url}/rows.jsonl"
    rows = fetched(address)
    assert len(rows) == len(ROWS)
    assert rows[7].place == f"{address}:8"
    digest = hashlib.sha256(LINES).hexdigest()
    assert copies() == [Path("cache/remote", digest, "rows.jsonl")]
    assert files.file_digests(address, "cache") == [{"entry": 0, "name": address, "digest": digest}]
    assert len(site.asked) == 1  # one process asks once
    assert fetched(address) == rows
    assert len(site.asked) == 2
    assert site.sent < 2 * len(LINES) or len(copies()) == 1
    assert files.num_rows(address, "cache") == len(ROWS)


def test_a_changed_file_is_fetched_again(site):
    fetched(f"{site.url}/rows.jsonl")
    site.files["/rows.jsonl"] = LINES[: LINES.index(b"\n") + 1]
    assert len(fetched(f"{site.url}/rows.jsonl")) == 1
    assert len(copies()) == 2  # the other one may still be mapped by a run


def test_python_s_own_server_without_ranges(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served/rows.jsonl").write_bytes(LINES)
    os.utime(tmp_path / "served/rows.jsonl", (1, 1))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
        first = fetched(address)
        (made,) = copies()
        before = made.stat().st_ino
        assert fetched(address) == first
        assert made.stat().st_ino == before  # its time and size are the same
        assert "404" in refused(f"{address}x")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_ends_early_is_resumed(site, ranges):
    site.ranges, site.dies_after = ranges, [100_000, 50_000]
    assert len(fetched(f"{site.url}/rows.jsonl")) == len(ROWS)
    starts = [asked for _, asked, _ in site.asked]
    assert starts[0] == ""
    assert starts[1] == "bytes=100000-"
    if ranges:
        assert starts[2] == "bytes=150000-"
        assert site.sent == len(LINES)
    assert copies()[0].read_bytes() == LINES
    assert parts() == []


def test_what_a_killed_process_fetched_is_kept(site):
    site.dies_after = [90_000, 1000, 0, 0, 0, 0]
    message = refused(f"{site.url}/rows.jsonl")
    assert f"{site.url}/rows.jsonl: cannot be fetched: the connection failed (Remote" in message
    assert message.endswith("89 KiB of 275 KiB are kept: run again to resume")
    assert parts()[0].stat().st_size == 91_000
    site.dies_after.clear()
    site.asked.clear()
    assert len(fetched(f"{site.url}/rows.jsonl")) == len(ROWS)
    assert [asked for _, asked, _ in site.asked] == ["bytes=91000-"]


def test_the_rest_of_another_version_is_never_appended(site):
    site.dies_after = [90_000, 0, 0, 0]
    refused(f"{site.url}/rows.jsonl")
    other = LINES.replace(b"x", b"y")
    site.files["/rows.jsonl"] = other
    fetched(f"{site.url}/rows.jsonl")
    assert copies()[0].read_bytes() == other


def test_a_file_that_became_shorter_is_fetched_from_its_beginning(site):
    site.dies_after = [90_000, 0, 0, 0]
    refused(f"{site.url}/rows.jsonl")
    site.files["/rows.jsonl"] = LINES[: LINES.index(b"\n") + 1]
    assert len(fetched(f"{site.url}/rows.jsonl")) == 1


def test_without_a_version_nothing_is_resumed_or_reused(site):
    site.etags, site.dies_after = False, [90_000]
    fetched(f"{site.url}/rows.jsonl")
    assert [asked for _, asked, _ in site.asked] == ["", ""]
    fetched(f"{site.url}/rows.jsonl")
    assert site.sent == 90_000 + 2 * len(LINES)


@pytest.mark.parametrize(
    "header",
    [
        {"Content-MD5": base64.b64encode(hashlib.md5(LINES).digest()).decode()},
        {
            "x-goog-hash": "crc32c=AAAA,md5="
            + base64.b64encode(hashlib.md5(LINES).digest()).decode()
        },
    ],
    ids=lambda header: next(iter(header)),
)
def test_a_digest_of_the_server_is_verified(site, header):
    site.headers = header
    fetched(f"{site.url}/rows.jsonl")
    site.files["/rows.jsonl"] = LINES.replace(b"x", b"y")
    message = refused(f"{site.url}/rows.jsonl")
    assert "the file arrived damaged: its " in message
    assert (
        "digest is not the one that the server gives; an earlier copy is cache/remote/" in message
    )
    assert parts() == []


def test_a_damaged_copy_is_fetched_again(site):
    fetched(f"{site.url}/rows.jsonl")
    copies()[0].write_bytes(LINES.replace(b"x", b"y"))
    assert fetched(f"{site.url}/rows.jsonl")[0].messages[1]["content"] == ROWS[0]["answer"]
    copies()[0].write_bytes(b"")
    assert len(fetched(f"{site.url}/rows.jsonl")) == len(ROWS)
    for record in Path("cache/remote/addresses").glob("*.json"):
        record.write_text('{"sha256": "../../x", "file": "/etc/passwd", "size": 1, "checked": 0}')
    assert len(fetched(f"{site.url}/rows.jsonl")) == len(ROWS)


def test_what_a_server_without_sizes_sends(site, capsys):
    site.sizes = False
    assert len(fetched(f"{site.url}/rows.jsonl")) == len(ROWS)
    assert "the server gave no size" in " ".join(capsys.readouterr().out.split())


ANSWERS = {
    403: "access is denied (the server answered 403 Forbidden); check the credentials, https://${US",
    404: "no such file (the server answered 404 Not Found); correct the address",
    401: "access is denied (the server answered 401 Unauthorized); check the credentials, https://",
    503: "the connection failed (the server answered 503 Service Unavailable)",
}


@pytest.mark.parametrize("status", ANSWERS)
def test_what_a_server_refuses(site, status):
    site.statuses = [status] * 9
    assert f"/rows.jsonl: cannot be fetched: {ANSWERS[status]}" in refused(f"{site.url}/rows.jsonl")


def test_a_busy_server_is_asked_again(site):
    site.statuses = [503, 429]
    assert len(fetched(f"{site.url}/rows.jsonl")) == len(ROWS)


def test_a_server_that_cannot_be_reached(site):
    address = "http://127.0.0.1:9/rows.jsonl"
    assert "the server cannot be reached (ConnectError: [Errno 111] Connection refused)" in refused(
        address
    )
    assert "cannot be reached (ConnectError" in refused("http://[::1]:9/rows.jsonl")
    assert "the host is unknown" in refused("https://no-such-host.invalid/rows.jsonl")


def test_a_copy_is_used_while_the_server_cannot_be_reached(monkeypatch, capsys):
    with web.serve(files={"/rows.jsonl": LINES}) as site:
        address = f"{site.url}/rows.jsonl"
        fetched(address)
        site.statuses = [403]
        assert "403 Forbidden" in refused(address)  # but not where it says no
        assert "; an earlier copy is cache/remote/" in (
            site.statuses.append(404) or refused(address)
        )
    assert len(fetched(address)) == len(ROWS)
    assert "; using the copy of 2" in " ".join(capsys.readouterr().out.split())
    copies()[0].write_bytes(LINES.replace(b"x", b"y"))
    assert "is damaged; fetch it again" in refused(address)


def test_a_web_page_in_place_of_a_file(site):
    site.headers = {"Content-Type": "text/html; charset=utf-8"}
    assert "answered with a web page (HTML); give the address of the file itself" in refused(
        f"{site.url}/rows.jsonl"
    )


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"Content-Disposition": 'attachment; filename="rows.csv"'}, "rows.csv"),
        ({"Content-Disposition": 'attachment; filename="../../.evil.csv"'}, "evil.csv"),
        ({"Content-Type": "text/csv"}, "download.csv"),
    ],
)
def test_the_name_of_a_copy_keeps_its_ending(site, headers, name):
    site.files["/download"] = b"question;answer\na;b\n"
    site.headers = headers
    assert len(fetched(f"{site.url}/download?id=7")) == 1
    assert [path.name for path in copies()] == [name]


def test_an_error_in_the_rows_names_the_address(site):
    site.files["/rows.jsonl"] = b"BZh91AY&SY"
    new_process()
    with pytest.raises(DataError) as caught:
        load_rows(f"{site.url}/rows.jsonl", cache_dir="cache")
    assert str(caught.value).startswith(f"{site.url}/rows.jsonl: expected rows (docs/DATA.md), fou")


def test_no_room_for_a_file(site, monkeypatch):
    usage = remote.shutil.disk_usage("/")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "has 275 KiB, and cache/remote has room for 1 KiB; make room" in refused(
        f"{site.url}/rows.jsonl"
    )


def test_a_pattern_needs_a_server_that_lists(site):
    assert "a pattern, and the web lists no files" in refused(f"{site.url}/*.jsonl")
    assert "a chain of protocols" in refused("zip://a.jsonl::http://127.0.0.1:9/a.zip")
    assert "the protocol nope:// is unknown" in refused("nope://a/b.jsonl")


@pytest.mark.parametrize(
    "address",
    [
        "http://[::1/rows.jsonl",
        "https://[zz]/rows.jsonl",
        "s3://[bucket/rows.jsonl",
        "gs://[::1/x*.jsonl",
        "ftp://[1:2/x",
        "https://host:abc/rows.jsonl",
        "https://host:99999/rows.jsonl",
        f"https://me:{SECRET}[@host/rows.jsonl",
    ],
)
def test_an_address_that_is_none(address):
    message = refused(address)
    assert ": cannot be fetched: its host or port is not valid; correct it" in message
    assert SECRET not in message
    assert files._fetched == {}


def test_an_address_of_a_local_file(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    assert len(fetched(f"file://{tmp_path}/rows.jsonl")) == len(ROWS)


def test_a_server_whose_certificate_is_not_valid():
    error = stores.explain(ssl.SSLCertVerificationError(1, "self-signed certificate"), "https")
    assert (error.kind, str(error)) == (
        "unusable",
        "the certificate of the server is not valid (SSLCertVerificationError: self-signed "
        "certificate); correct the address, or set SSL_CERT_FILE",
    )


# --- how long copies stay ------------------------------------------------------------------------


def test_copies_that_nobody_uses_are_removed(site, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0,))
    site.files |= {f"/{name}.jsonl": LINES.replace(b"x", name.encode()) for name in "abc"}
    digests = {name: hashlib.sha256(site.files[f"/{name}.jsonl"]).hexdigest() for name in "abc"}
    for name in "abc":
        files.sources(f"{site.url}/{name}.jsonl", "cache")
    site.dies_after = [90_000, 0, 0, 0]
    refused(f"{site.url}/rows.jsonl")
    site.dies_after = []
    Path("cache/prepared").mkdir()
    used = {"train": [{"digest": digests["a"]}], "eval": []}
    Path("cache/prepared/audit.json").write_text(json.dumps({"inputs": used}))
    Path("cache/prepared/MANIFEST.json").write_text("{}")

    def left():
        return {path.parent.name for path in copies()}

    cache._prune(Path("cache"))
    assert (left(), len(parts())) == ({*digests.values()}, 1)
    long_ago = time.time() - (remote.KEPT_DAYS + 1) * 86_400
    for path in Path("cache/remote").glob("**/*"):
        os.utime(path, (long_ago, long_ago))
    fetched(f"{site.url}/b.jsonl")  # used again, and not fetched
    cache._prune(Path("cache"))
    assert (left(), len(parts())) == ({digests["a"], digests["b"]}, 0)
    assert len(list(Path("cache/remote/addresses").glob("*.json"))) == 2
    assert len(fetched(f"{site.url}/c.jsonl")) == len(ROWS)


# --- several processes ---------------------------------------------------------------------------

PROGRAM = """
import os, sys
from sft.data import files
print(files.file_digests(sys.argv[1], "cache")[0]["digest"])
"""


def test_one_process_of_a_machine_fetches(site, tmp_path):
    environment = clean_environment(PYTHONPATH=str(ROOT))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, f"{site.url}/rows.jsonl"],
            env=environment | {"LOCAL_RANK": str(rank), "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in range(3)
    ]
    printed = [process.communicate()[0].split()[-1] for process in started]
    assert printed == [hashlib.sha256(LINES).hexdigest()] * 3
    assert len(site.asked) == 1
    assert site.sent == len(LINES)


def test_ranks_do_not_take_one_address_for_another(site, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    site.files["/rows.jsonl"] = LINES
    fetched(f"{site.url}/rows.jsonl?token=one")
    site.files["/rows.jsonl"] = LINES[: LINES.index(b"\n") + 1]
    assert len(fetched(f"{site.url}/rows.jsonl?token=one")) == len(ROWS)  # what a sibling fetched
    assert len(fetched(f"{site.url}/rows.jsonl?token=two")) == 1


# --- credentials ---------------------------------------------------------------------------------

ADDRESSES = [
    f"https://me:{SECRET}@host/a.jsonl",
    f"https://{SECRET}@host:80/a.jsonl",
    f"https://host/a.jsonl?X-Amz-Algorithm=AWS4&X-Amz-Signature={SECRET}&download=true",
    f"https://host/a.jsonl?{SECRET}",
    f"https://host/a.jsonl?t={SECRET}#x",
    f"https://me:{SECRET}/x@host/a.jsonl",
    f"https://host/a.jsonl#access_token={SECRET}",
    f"sftp://me:{SECRET}@host/a.jsonl",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_shown_without_credentials(address):
    shown = hide_credentials(address)
    assert SECRET not in shown
    assert "<hidden>" in shown
    assert hide_credentials(shown) == shown
    assert shown.rstrip("/x") in redact(f"GET {address}: refused, see '{address}'.")
    assert SECRET not in redact(f"[{address}] ({address})")


@given(
    st.text(st.sampled_from("abcXYZ019:/?#&=%@$+.-_~!*'"), min_size=1, max_size=12),
    st.sampled_from(
        ["https://me:{}@host/a", "http://{}@h:80/a?b=c", "https://h/a?sig={}", "ftp://h/a?{}"]
    ),
)
def test_no_part_of_a_secret_is_shown(middle, form):
    secret = f"S3{middle.replace('@', '')}cr3t"
    unquoted = "/?:=#" if form.startswith("https://me:") else ":=" if "@" in form else "/?:@"
    address = form.format(quote(secret, safe=unquoted))
    shown = hide_credentials(address)
    assert "S3" not in shown
    assert "cr3t" not in shown
    assert hide_credentials(shown) == shown


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/a/b.jsonl",
        "hf://datasets/o/n@refs%2Fconvert/x.parquet",
        "http://[::1]:80/x@y",
        "https://h:8080/a@b?download=true&revision=main",
        "https://${USER}:${PASSWORD}@host/a?${QUERY}&sig=${SIG}",
        "http://localhost:6006/#scalars",
    ],
)
def test_an_address_without_credentials_stays(address):
    assert hide_credentials(address) == redact(address) == address


def config(address, *overrides):
    given = [f"model.name={ROOT}/nano/model", f"data.train_path={address}", "data.eval_path=null"]
    return load_config(ROOT / "configs/nano.yaml", [*given, "data.eval_fraction=0.1", *overrides])


def test_credentials_are_in_no_file_and_no_message(site, capsys, caplog):
    caplog.set_level("DEBUG")
    site.password = f"me:{SECRET}"
    bare = site.url.removeprefix("http://")
    address = f"http://me:{SECRET}@{bare}/rows.jsonl?sig={SECRET}2&download=true"
    shown = f"http://<hidden>@{bare}/rows.jsonl?sig=<hidden>&download=true"
    settings = config(address, "data.max_rows=40", "data.audit=warn")
    prepared = cache.prepare(settings)
    assert {row.file for row in prepared.train.rows()} == {shown}
    assert site.asked[-1][0] == f"/rows.jsonl?sig={SECRET}2&download=true"
    assert prepared.audit["inputs"]["train"][0]["name"] == shown
    written = dump_config(settings)
    assert f"train_path: {shown}" in written
    Path("config.yaml").write_text(written)
    with pytest.raises(DataError) as caught:
        files.check_column(address, "none", "a.key", cache_dir=settings.data.cache_dir)
    site.statuses = [403]
    messages = [str(caught.value), refused(address)]
    site.password = "another"
    messages.append(refused(address))
    printed = capsys.readouterr()
    kept = [path.read_bytes() for path in Path().rglob("*") if path.is_file()]
    texts = [json.dumps(prepared.audit), written, *messages, printed.out, printed.err, caplog.text]
    assert not any(SECRET in text for text in texts)
    assert not any(SECRET.encode() in content for content in kept)
    encoded = base64.b64encode(f"me:{SECRET}".encode())
    assert not any(encoded in content for content in kept)

    new_process()  # later, from the run's own configuration
    again = cache.prepare(load_config("config.yaml", []))
    assert list(again.train) == list(prepared.train)
    assert "no credentials are stored; using the copy in" in " ".join(
        capsys.readouterr().out.split()
    )
    message = refused(shown.replace("rows.jsonl", "other.jsonl"))
    assert "its credentials are not stored, and it has no copy in the cache" in message


def test_another_signature_is_the_same_file(site):
    fetched(f"{site.url}/rows.jsonl?X-Amz-Signature=one&X-Amz-Expires=1")
    sent = site.sent
    fetched(f"{site.url}/rows.jsonl?X-Amz-Signature=two&X-Amz-Expires=2")
    assert len(list(Path("cache/remote/addresses").glob("*.json"))) == 1
    fetched(f"{site.url}/rows.jsonl?id=3")
    assert len(list(Path("cache/remote/addresses").glob("*.json"))) == 2
    assert site.sent >= sent


def test_the_environment_gives_credentials(site, monkeypatch):
    site.password = f"me:{SECRET}"
    bare = site.url.removeprefix("http://")
    address = f"http://${{SFT_USER}}:${{SFT_PASS}}@{bare}/rows.jsonl"
    assert "the environment has no variable SFT_USER; set it" in refused(address)
    monkeypatch.setenv("SFT_USER", "me")
    monkeypatch.setenv("SFT_PASS", SECRET)
    assert fetched(address)[0].file == address
    assert f"train_path: {address}" in dump_config(config(address))


@pytest.mark.parametrize("password", ["p@ss/w[rd", "a:b?c#d", "%41 +", "ü"])
def test_a_password_from_the_environment_may_have_any_character(site, monkeypatch, password):
    site.password = f"me:{password}"
    monkeypatch.setenv("SFT_PASS", password.replace("%", "%25"))
    address = f"{site.url.replace('http://', 'http://me:${SFT_PASS}@')}/rows.jsonl"
    assert len(fetched(address)) == len(ROWS)


def test_credentials_do_not_follow_a_redirect_to_another_host(site):
    site.password = f"me:{SECRET}"
    with web.serve(files={"/rows.jsonl": LINES}) as other:
        site.redirects = {"/away": f"{other.url}/rows.jsonl", "/near": f"{site.url}/rows.jsonl"}
        address = site.url.replace("http://", f"http://me:{SECRET}@")
        assert len(fetched(f"{address}/away")) == len(ROWS)
        assert [authorization for *_, authorization in other.asked] == [""]
        assert len(fetched(f"{address}/near")) == len(ROWS)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1:9/x", "data:,x"])
def test_a_redirect_leads_to_the_web_alone(site, target):
    site.redirects = {"/rows.jsonl": target}
    assert "cannot be fetched" in refused(f"{site.url}/rows.jsonl")
    assert copies() == []


# --- object stores -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAtesting0000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    made = boto3.resource("s3").Bucket("rows")
    made.create()
    yield made
    made.objects.all().delete()
    made.delete()


def test_an_object_is_fetched_once_and_again_when_it_changed(bucket):
    bucket.put_object(Key="a/rows.jsonl", Body=LINES)
    address = "s3://rows/a/rows.jsonl"
    rows = fetched(address)
    assert (len(rows), rows[0].place) == (len(ROWS), f"{address}:1")
    (made,) = copies()
    before = made.stat().st_ino
    assert fetched(address) == rows
    assert copies()[0].stat().st_ino == before
    bucket.put_object(Key="a/rows.jsonl", Body=LINES[: LINES.index(b"\n") + 1])
    assert len(fetched(address)) == 1


def test_an_object_is_resumed(bucket, monkeypatch):
    monkeypatch.setattr(stores, "PART", 50_000)
    bucket.put_object(Key="rows.jsonl", Body=LINES)
    asked = []
    read = stores.FileSystem._read

    def dying(self, file, start, size):
        asked.append(start)
        if len(asked) in (3, 5, 6, 7, 8):
            raise stores.FetchError("transient", "died")
        return read(self, file, start, size)

    monkeypatch.setattr(stores.FileSystem, "_read", dying)
    assert "died; 146 KiB of 275 KiB are kept: run again to resume" in refused(
        "s3://rows/rows.jsonl"
    )
    assert len(fetched("s3://rows/rows.jsonl")) == len(ROWS)
    assert asked[:3] == [0, 50_000, 100_000]
    assert asked[3:8] == [100_000, *[150_000] * 4]
    assert asked[8:] == [150_000, 200_000, 250_000, len(LINES)]
    assert copies()[0].read_bytes() == LINES


def test_an_object_that_changes_while_it_is_fetched(bucket, monkeypatch):
    monkeypatch.setattr(stores, "PART", 100_000)
    bucket.put_object(Key="rows.jsonl", Body=LINES)
    other = LINES.replace(b"x", b"y")
    read = stores.FileSystem._read

    def changing(self, file, start, size):
        if start == 100_000:
            bucket.put_object(Key="rows.jsonl", Body=other)
        return read(self, file, start, size)

    monkeypatch.setattr(stores.FileSystem, "_read", changing)
    fetched("s3://rows/rows.jsonl")
    assert [path.read_bytes() == other for path in copies()] == [True]


def test_a_pattern_and_a_folder_of_a_bucket(bucket):
    for name in ("b.jsonl", "a.jsonl", ".ipynb_checkpoints/a.jsonl", "._a.jsonl", "README.md"):
        bucket.put_object(Key=f"data/{name}", Body=LINES[: LINES.index(b"\n") + 1])
    for address in ("s3://rows/data/*.jsonl", "s3://rows/data/", "s3://rows/data"):
        new_process()
        listed = files.list_files(address, "cache")
        names = [source.file for source in listed.sources]
        assert names == ["s3://rows/data/a.jsonl", "s3://rows/data/b.jsonl"], address
        assert "s3://rows/data/._a.jsonl" in listed.hidden
    bucket.put_object(Key="data/test.jsonl", Body=LINES)
    assert "expected files of one kind and one split" in refused("s3://rows/data")
    assert "no file fits the pattern" in refused("s3://rows/data/*.csv")


def test_what_a_bucket_refuses(bucket, monkeypatch):
    assert "s3://rows/none.jsonl: cannot be fetched: no such file" in refused(
        "s3://rows/none.jsonl"
    )
    assert "cannot be fetched: no such file" in refused("s3://no-such-bucket/rows.jsonl")
    # the bucket of the fixture keeps its credentials
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    bucket.put_object(Key="private.jsonl", Body=LINES, ACL="private")
    assert "access is denied without credentials, since none were found (Perm" in refused(
        "s3://rows/private.jsonl"
    )
    bucket.put_object(Key="rows.jsonl", Body=LINES, ACL="public-read")
    assert len(fetched("s3://rows/rows.jsonl")) == len(ROWS)  # a public one needs none
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # by default boto waits for half a minute
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "the server cannot be reached" in refused("s3://rows/other.jsonl")
    assert len(fetched("s3://rows/rows.jsonl")) == len(ROWS)  # its copy


@pytest.mark.parametrize(("scheme", "module"), [("s3", "s3fs"), ("gs", "gcsfs"), ("gcs", "gcsfs")])
def test_the_package_of_a_protocol_is_missing(monkeypatch, scheme, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    message = refused(f"{scheme}://rows/rows.jsonl")
    assert f"{scheme}:// needs a package: " in message
    assert message.endswith('pip install "sft[remote]"')


@pytest.fixture
def google(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # it has no such machine's credentials
    with web.serve_gcs(files={"rows/data/a.jsonl": LINES}) as served:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", served.url)
        yield served


def test_an_object_of_google_is_fetched_once_and_verified(google, monkeypatch):
    monkeypatch.setattr(stores, "PART", 100_000)
    address = "gs://rows/data/a.jsonl"
    rows = fetched(address)
    assert (len(rows), rows[0].place) == (len(ROWS), f"{address}:1")
    assert google.sent == len(LINES)
    assert fetched(address) == rows
    assert google.sent == len(LINES)
    google.files["rows/data/a.jsonl"] = LINES[: LINES.index(b"\n") + 1]
    assert len(fetched(address)) == 1
    google.files["rows/data/.b.jsonl"] = google.files["rows/data/c.jsonl"] = LINES
    for folder in (
        "gs://rows/data/*.jsonl",
        "gs://rows/data/",
        "gs://rows/data",
        "gcs://rows/data",
    ):
        new_process()
        listed = files.list_files(folder, "cache")
        scheme = folder.partition(":")[0]
        names = [f"{scheme}://rows/data/{name}.jsonl" for name in "ac"]
        assert [source.file for source in listed.sources] == names
        assert listed.hidden == [f"{scheme}://rows/data/.b.jsonl"]
    monkeypatch.setattr(stores, "_digests", lambda _: {"md5": "0" * 32})
    google.files["rows/data/d.jsonl"] = LINES
    assert "its md5 digest is not the one that the server gives" in refused(
        "gs://rows/data/d.jsonl"
    )


def test_what_google_refuses(google, capfd):
    assert "gs://rows/x.jsonl: cannot be fetched: no such file" in refused("gs://rows/x.jsonl")
    assert "cannot be fetched: no such file" in refused("gs://no-such-bucket/a.jsonl")
    for status in (401, 403):
        google.statuses = [status] * 9
        assert "access is denied (" in refused("gs://rows/data/a.jsonl")
        google.statuses = []
    assert capfd.readouterr().err == ""  # no log of the library


def test_an_object_of_google_is_resumed(google, monkeypatch):
    monkeypatch.setattr(stores, "PART", 50_000)
    asked, read = [], stores.FileSystem._read

    def dying(self, file, start, size):
        asked.append(start)
        if len(asked) in (3, 4, 5, 6):
            raise stores.FetchError("transient", "died")
        return read(self, file, start, size)

    monkeypatch.setattr(stores.FileSystem, "_read", dying)
    assert "died; 98 KiB of 275 KiB are kept: run again to resume" in refused(
        "gs://rows/data/a.jsonl"
    )
    assert len(fetched("gs://rows/data/a.jsonl")) == len(ROWS)
    assert google.sent == len(LINES)


HUB = """
import sys
from sft.data import files, stores
from sft.errors import DataError

stores.PART = 100_000
for address in sys.argv[1:]:
    try:
        sources = files.sources(address, "cache")
        print(*[source.file for source in sources], sources[0].digest)
    except DataError as error:
        print(error)
"""


@pytest.mark.slow
def test_files_of_the_hub(tmp_path):
    """In a process of its own, since the library reads HF_ENDPOINT when it is imported."""
    with web.serve_hub({"owner/name": {"rows.jsonl": LINES, ".gitattributes": b"a"}}) as hub:
        base = "hf://datasets/owner"
        addresses = [f"{base}/name/rows.jsonl", f"{base}/name", f"{base}/name@main/*.jsonl"]
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": f"hf_{SECRET}", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", HUB, *addresses, f"{base}/gated/x", f"{base}/none/x"],
            env=clean_environment(PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path), **environment),
            capture_output=True,
            text=True,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if not line.startswith("fetched ")]
    digest = hashlib.sha256(LINES).hexdigest()
    assert lines[:3] == [
        f"{base}/name/rows.jsonl {digest}",
        f"{base}/name/rows.jsonl {digest}",
        f"{base}/name@main/rows.jsonl {digest}",
    ], done.stderr
    assert "x: cannot be fetched: the repository is gated; ask for access" in lines[3]
    assert "x: cannot be fetched: no such repository, or a private one" in lines[4]
    assert SECRET not in done.stdout + done.stderr
    assert hub.sent == 2 * len(LINES)  # each byte once for each of the two versions' addresses


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_what_it_fetched(site, tmp_path):
    site.delay = 0.05
    site.files["/rows.jsonl"] = LINES * 40
    command = [sys.executable, "-c", PROGRAM, f"{site.url}/rows.jsonl"]
    environment = clean_environment(PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (parts() and parts()[0].stat().st_size > 2**20):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    arrived = parts()[0].stat().st_size
    assert 2**20 < arrived < len(LINES) * 40
    site.delay = 0
    assert len(fetched(f"{site.url}/rows.jsonl")) == 40 * len(ROWS)
    assert site.asked[-1][1] == f"bytes={arrived}-"


def test_the_hub_is_offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused("hf://datasets/owner/name/rows.jsonl")
    assert message.startswith("hf://datasets/owner/name/rows.jsonl: cannot be fetched: ")


def test_any_protocol_of_fsspec():
    memory = fsspec.filesystem("memory")
    memory.pipe("/rows/a.jsonl", LINES)
    assert len(fetched("memory://rows/a.jsonl")) == len(ROWS)
    assert len(fetched("memory://rows/*.jsonl")) == len(ROWS)
    memory.rm("/rows", recursive=True)
