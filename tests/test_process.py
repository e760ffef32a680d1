"""Working processes: answers, errors by name, and every way to die."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from compress import hardware, nursery
from compress.errors import ChildDied, DataError, Killed, NoSpace, OutOfMemory, RunError
from compress.process import Child

SERVER = """
    import os, signal, sys, time, errno
    from compress.errors import DataError
    from compress.process import serve

    def add(progress, a, b):
        print("noise on stdout")
        progress("adding", 1, 2)
        return a + b

    def wrong(progress): raise DataError("row 3 is odd")
    def crash(progress): raise ValueError("no way")
    def memory(progress): raise MemoryError()
    def disk(progress): raise OSError(errno.ENOSPC, "No space left on device")
    def killed(progress): os.kill(os.getpid(), signal.SIGKILL)
    def leaves(progress): print("last words"); os._exit(7)
    def sleeps(progress): time.sleep(60)
    def is_imported(progress, name): return name in sys.modules
    def remember(progress, what): os.environ["SEEN"] = str(what)
    def recall(progress): return os.environ.get("SEEN")

    def counts(progress, wrong_at=None, each_s=0):
        for number in range(3):
            if number == wrong_at: raise DataError("row 3 is odd")
            time.sleep(each_s)
            open("counted", "a").write("x")
            progress("counting", number, 3)
        return "counted"

    if __name__ == "__main__":
        serve(globals())
"""


@pytest.fixture(autouse=True)
def no_nursery():
    """Each test has its own."""
    outer = nursery._current.set(None)
    yield
    nursery._current.reset(outer)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(nursery, "IMPORTED", ("server",))
    (tmp_path / "server.py").write_text(textwrap.dedent(SERVER))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))


@pytest.fixture(params=["fresh", "copied"])
def child(server, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hardware, "GPUS", () if request.param == "copied" else ("/",))
    seen = []
    with nursery.nursery(), Child("server", tmp_path / "log", lambda *event: seen.append(event), start=nursery.copied) as process:
        assert isinstance(process._process, nursery.Copy if request.param == "copied" else subprocess.Popen)
        process.seen = seen
        yield process


def test_in_slices_a_child_waits_after_each_until_the_next_is_wanted(child):
    counted, done = Path("counted"), []
    counted.write_text("")
    slices = child.ask_in_slices("counts", limit_s=20)
    for number, share in enumerate(slices, 1):
        done.append(share)
        time.sleep(0.2)
        assert len(counted.read_text()) == number, "it works while it is not its turn"
    assert done == [0, 1 / 3, 2 / 3]
    assert child.ask("add", a=1, b=2) == 3, "nothing is left in the pipes"
    with pytest.raises(DataError, match="row 3 is odd"):
        list(child.ask_in_slices("counts", limit_s=20, wrong_at=2))
    with pytest.raises(ChildDied, match="counts took longer than the limit"):
        list(child.ask_in_slices("counts", limit_s=1.1, each_s=0.5))


def test_the_limit_is_of_all_slices_and_not_of_the_rests(child):
    done = []
    for share in child.ask_in_slices("counts", limit_s=2.0, each_s=0.1):
        done.append(share)
        time.sleep(1)
    assert done == [0, 1 / 3, 2 / 3]


def test_copies_find_imported_what_they_need_and_share_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "GPUS", ())
    monkeypatch.setattr(nursery, "IMPORTED", ("json.tool",))
    with nursery.nursery(), nursery.nursery():
        first, second = (Child("server", tmp_path / "log", print, start=nursery.copied) for _ in range(2))
        assert [child.ask("is_imported", name="json.tool") for child in (first, second)] == [True, True]
        first.ask("remember", what=1)
        assert second.ask("recall") is None
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(Killed):
            first.ask("recall")
        assert second.ask("recall") is None


def test_what_loads_models_is_imported_before_any_copy():
    code = "import importlib, sys; from compress.nursery import IMPORTED; [importlib.import_module(name) for name in IMPORTED]"
    loads = {"torch", "transformers.modeling_utils", "transformers.quantizers", "nltk"}
    done = subprocess.run([sys.executable, "-c", f"{code}; print(*{loads} - sys.modules.keys())"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), "each copy would import it, for seconds"


def test_copies_end_with_their_nursery(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "GPUS", ())
    with nursery.nursery():
        with nursery.nursery():
            child = Child("server", tmp_path / "log", print, start=nursery.copied)
        child.ask("add", a=1, b=1)
    with pytest.raises(Killed):
        child.ask("add", a=1, b=1)


@pytest.mark.parametrize("imported", [(), ("no_such_module",)])
def test_without_a_nursery_or_where_it_can_not_import_processes_are_fresh(server, tmp_path, monkeypatch, imported):
    monkeypatch.setattr(hardware, "GPUS", ())
    monkeypatch.setattr(nursery, "IMPORTED", imported)
    with nursery.nursery() if imported else nullcontext(), Child("server", tmp_path / "log", print, start=nursery.copied) as child:
        assert isinstance(child._process, subprocess.Popen)
        assert child.ask("add", a=1, b=1) == 2


def test_an_answer_comes_back_with_progress_and_noise_stays_out(child, tmp_path):
    assert child.ask("add", a=2, b=3) == 5
    assert child.seen == [("adding", 1, 2), ("adding", 2, 2)], "what was answered is at its end"
    assert "noise" not in str(child.ask("add", a="x", b="y"))


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        ("wrong", DataError, "row 3 is odd"),
        ("crash", RunError, "ValueError: no way"),
        ("memory", OutOfMemory, "memory ran out: MemoryError"),
        ("disk", NoSpace, "the disk is full"),
        ("killed", ChildDied, "was killed"),
        ("leaves", ChildDied, "ended with exit code 7; its last line: last words"),
    ],
)
def test_errors_cross_by_name(child, request_, kind, message):
    with pytest.raises(kind, match=message):
        child.ask(request_)


def test_an_error_does_not_end_the_child_but_death_does(child):
    with pytest.raises(DataError):
        child.ask("wrong")
    assert child.ask("add", a=1, b=1) == 2
    with pytest.raises(ChildDied):
        child.ask("killed")
    with pytest.raises(ChildDied):
        child.ask("add", a=1, b=1)


def test_a_child_that_hangs_is_stopped(child):
    pid = child.pid
    with pytest.raises(ChildDied, match="sleeps took longer than the limit"):
        child.ask("sleeps", limit_s=0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_leaving_the_context_ends_a_busy_child(tmp_path, child):
    pid = child.pid
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_does_not_outlive_a_killed_parent(tmp_path, monkeypatch):
    (tmp_path / "server.py").write_text(textwrap.dedent(SERVER))
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import pathlib\nfrom compress.process import Child\n"
        f"child = Child('server', pathlib.Path({str(tmp_path / 'log')!r}), print)\n"
        "child.ask('add', a=1, b=1)\nprint(child.pid, flush=True)\nchild.ask('sleeps')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE, text=True, env=environment)
    lines = [process.stdout.readline() for _ in range(3)]  # how far it is, that this is at its end, the child's number
    pid = int(lines[2])
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the child lives on")
