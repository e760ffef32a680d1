"""Working processes of another environment, for an engine whose packages conflict with this one's.

The environment's own interpreter runs this package's code; everything else that it imports is its own.
"""

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import MissingPackage, in_a_line
from compress.extras import line_into
from compress.packages import alternatives

if TYPE_CHECKING:
    from compress.process import Process

OLDEST = (3, 11)  # Python, as pyproject.toml has it
NEEDED = ("msgspec", "packaging", "psutil", "pydantic", "pyyaml", "transformers")  # the requirements of this package that measuring needs
LIMIT_S = 60
LOOK = """
import json, sys
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
print(json.dumps({"python": sys.version_info[:2], "versions": {name: version(name) for name in sys.argv[1:]}}))
"""
RUN = """
import importlib.util, runpy, sys
place, module = sys.argv[1:3]
sys.argv[:3] = [module]
spec = importlib.util.spec_from_file_location("compress", place + "/__init__.py", submodule_search_locations=[place])
sys.modules["compress"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def spawned(command: Sequence[str], pipes: tuple[int, int], log: Path, environment: Mapping[str, str]) -> "Process":
    """A new process that is told these ends of pipes as its last arguments, and prints into a log."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, *map(str, pipes)], pass_fds=pipes, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
            start_new_session=True,
        )  # fmt: skip


@dataclass(frozen=True)
class Interpreter:
    """A Python of another environment."""

    python: Path

    def start(self, module: str, pipes: tuple[int, int], log: Path, environment: Mapping[str, str]) -> "Process":
        """A process that runs a module of this package with these ends of pipes, as `compress.process.fresh` does."""
        return spawned([str(self.python), "-EP", "-c", RUN, str(Path(__file__).parent), module], pipes, log, environment)

    def versions(self, packages: Iterable[str]) -> dict[str, str]:
        """The versions of those distributions that are installed there.

        Raises MissingPackage for an interpreter that isn't there, doesn't run or is too old.
        """
        try:
            completed = subprocess.run(
                [self.python, "-E", "-c", LOOK, *alternatives(packages)], check=False, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, timeout=LIMIT_S,
            )  # fmt: skip
            answer = json.loads(completed.stdout) if completed.returncode == 0 else None
        except FileNotFoundError:
            raise MissingPackage(f"there is no interpreter {self.python}") from None
        except (OSError, subprocess.TimeoutExpired, ValueError) as error:
            raise MissingPackage(f"{self.python} doesn't run as a Python: {in_a_line(error)}") from None
        if answer is None:
            last = next((line for line in reversed(completed.stderr.splitlines()) if line.strip()), f"exit code {completed.returncode}")
            raise MissingPackage(f"{self.python} doesn't run; its last line: {last.strip()[:300]}")
        if tuple(answer["python"]) < OLDEST:
            installed, oldest = (".".join(map(str, version)) for version in (answer["python"], OLDEST))
            raise MissingPackage(f"{self.python} is Python {installed}; {oldest} or newer is needed")
        return {name: version for name, version in answer["versions"].items() if version is not None}

    def require(self, packages: Iterable[str]) -> None:
        """See that distributions are installed, and those without which nothing can be measured.

        Raises MissingPackage with the line that installs them.
        """
        required = (*NEEDED, *packages)
        here = self.versions(required)
        if missing := [package for package in required if not any(name in here for name in alternatives([package]))]:
            line = line_into(str(self.python), [alternatives([package])[-1] for package in missing])
            raise MissingPackage(f"{self.python} has no {', '.join(missing)}. Install with: {line}")
