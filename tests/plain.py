"""Plain transformers: programs run in processes that never see this package. They are copies of one that has imported transformers."""

import json
import subprocess
import sys
import textwrap
from functools import cache

import torch

ALONE = 'import sys; assert not any(name.split(".")[0] == "compress" for name in sys.modules)'
SERVER = """
import json, os, sys, traceback
import bitsandbytes, compressed_tensors, torch, torchao, transformers
from transformers import BartModel, BertModel, GPT2Model, LlamaModel, T5Model
for line in sys.stdin:
    program, *arguments = json.loads(line)
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(write, 1)
        sys.argv, code = ["-", *arguments], 1
        try:
            exec(compile(program, "program", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            print(traceback.format_exc())
        sys.stdout.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as output:
        said = output.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]), flush=True)
"""


@cache
def _server():
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def plain(program, *arguments):
    """What a program prints, which finds `arguments` in sys.argv[1:]."""
    program = f"{textwrap.dedent(program)}\n{ALONE}"
    if torch.cuda.is_available():  # it doesn't survive a copy
        completed = subprocess.run([sys.executable, "-", *map(str, arguments)], input=program, capture_output=True, text=True)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout
    server = _server()
    server.stdin.write(json.dumps([program, *map(str, arguments)]) + "\n")
    server.stdin.flush()
    code, output = json.loads(server.stdout.readline())
    assert code == 0, output
    return output
