"""Publishing, against a stand-in for the hub that keeps what it is sent."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from compress import recipe
from compress.errors import CompressError, InputError, ReportError
from compress.model.folder import CARD
from compress.model.source import Source
from compress.publish import pack
from compress.report import card, write
from compress.results.stages import StageRecord
from tests.conftest import recipe_for
from tests.report.test_files import made


class Hub(ThreadingHTTPServer):
    """What the client needs of the hub's HTTP API to make a repository and to commit to it, large files by LFS."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Desk)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict] = {}  # name -> private, branches -> files
        self.large: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False


class Desk(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        name = self.path.split("?")[0].removeprefix("/api/models/")
        if name not in self.server.repos:
            return self.answer({"error": "not found"}, 404)
        return self.answer({"id": name, "private": self.server.repos[name]["private"], "siblings": [], "tags": []})

    def do_PUT(self):  # where an LFS object goes
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.rsplit("/", 1)[1]
        self.server.large[self.path.rsplit("/", 1)[1]] = content
        self.answer({})

    def do_POST(self):
        hub, path, body = self.server, self.path.split("?")[0], self.body()
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses:
            return self.answer({"error": "You have no right to write here"}, 403)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if name in hub.repos else 200
            hub.repos.setdefault(name, {"private": asked.get("visibility") == "private", "main": {}})
            return self.answer({"url": f"{hub.url}/{name}", "name": name}, status)
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return self.answer({"objects": [{**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in objects]})
        owner, name, what, branch = path.removeprefix("/api/models/").split("/")
        repo = hub.repos[f"{owner}/{name}"]
        if what == "branch":
            repo.setdefault(branch, {})
            return self.answer({})
        if what == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
            return self.answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]})
        assert what == "commit"
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo[branch][value["path"]] = hub.large[value["oid"]]
        return self.answer({"commitUrl": f"{hub.url}/{owner}/{name}/commit/1", "commitOid": "1", "pullRequestUrl": None})


@pytest.fixture
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def measured(toys, rows, write_recipe, tmp_path):
    """Leaves an artifact with a report and a card; gives the two folders."""

    def measured(run="r1", verdict="pass"):
        artifact = tmp_path / "reports" / "artifacts" / "llama-rtn-abc"
        if not artifact.exists():
            shutil.copytree(toys["llama"], artifact)
        loaded = recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, stages=[{"quantize": "rtn", "group_size": -1}])))
        stage = StageRecord(stage=loaded.stages[0].as_written(), artifact="reports/artifacts/llama-rtn-abc", seconds=1, reused=False)
        report = write.write(made(run=run, verdict=verdict, decided_by="as it is", stages=[stage]), tmp_path / "reports" / "toy" / run)
        here = [stage.model_copy(update={"artifact": str(artifact)})]
        card.write(loaded, Source(str(toys["llama"]), "causal-lm"), here, report)
        return artifact, report.folder

    return measured


def publish(hub, *arguments, token="hf_test"):
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": "/nowhere", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    command = [sys.executable, "-m", "compress", "publish", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home}, timeout=120)


def test_the_artifact_and_nothing_else_arrives(hub, measured):
    artifact, report = measured()
    (artifact / ".env").write_text("SECRET=1")
    (artifact / "sub").mkdir()
    (artifact / "sub" / "more.txt").write_text("?")
    done = publish(hub, report, "me/small", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/me/small\n"
    arrived = hub.repos["me/small"]["main"]
    assert arrived == {file.name: file.read_bytes() for file in artifact.iterdir() if file.is_file() and file.name != ".env"}
    assert b"r1" in arrived[CARD]
    assert hub.repos["me/small"]["private"] and hub.tokens == {"Bearer hf_test"}
    assert all(f"  {name}\n" in done.stderr for name in arrived) and "(pass)" in done.stderr

    again = publish(hub, artifact, "me/small", "--revision", "int4", "--json")
    assert json.loads(again.stdout)["url"] == f"{hub.url}/me/small/tree/int4", again.stderr
    assert hub.repos["me/small"]["int4"] == arrived


def test_a_public_repository_is_not_taken_for_a_private_one(hub, measured):
    hub.repos["me/open"] = {"private": False, "main": {}}
    done = publish(hub, measured()[0], "me/open", "--private")
    assert done.returncode == 2 and "exists and is public" in done.stderr
    assert hub.repos["me/open"]["main"] == {}


def test_without_a_token_nothing_is_asked(hub, measured):
    done = publish(hub, measured()[0], "me/small", token="")
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr
    assert not hub.tokens


def test_a_hub_that_refuses_is_said(hub, measured):
    hub.refuses = True
    done = publish(hub, measured()[0], "me/small")
    assert (
        done.returncode == 3
        and "me/small: the hub" in done.stderr
        and "no right to write here" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_name_that_no_repository_can_have_is_refused(hub, measured):
    done = publish(hub, measured()[0], "me/small/../x")
    assert done.returncode == 2 and "me/small/../x" in done.stderr and not hub.repos


def test_a_failed_one_is_published_only_when_told(measured):
    artifact, _ = measured(verdict="fail")
    with pytest.raises(InputError, match=r"a gate failed \(as it is\).*--failed-too"):
        pack(artifact)
    assert pack(artifact, failed_too=True).report.verdict == "fail"
    measured("r2", "cannot_tell")
    assert pack(artifact).report.run == "r2"


def test_a_report_and_the_card_must_be_of_one_run(measured):
    _, older = measured()
    artifact, newer = measured("r2")
    assert pack(older.with_name("r2")).artifact == artifact.resolve()
    with pytest.raises(InputError, match="figures of a later run"):
        pack(older)
    shutil.rmtree(newer)
    with pytest.raises(ReportError, match="there is no report here"):
        pack(artifact)


def test_what_no_report_measured_is_refused(measured, toys, tmp_path):
    artifact, report = measured()
    with pytest.raises(InputError, match="names no run that measured the model"):
        pack(toys["llama"])
    other = artifact.with_name("other")
    shutil.copytree(artifact, other)
    with pytest.raises(ReportError, match="measured another artifact"):
        pack(other)
    (artifact / CARD).write_text("---\n: [\n---\n")
    with pytest.raises(InputError, match="metadata can't be read"):
        pack(artifact)
    shutil.rmtree(artifact)
    with pytest.raises(CompressError, match="llama-rtn-abc"):
        pack(report)
    bare = write.write(made(stages=[]), Path(tmp_path / "reports" / "toy" / "bare"))
    with pytest.raises(InputError, match="no stages"):
        pack(bare.folder)
