"""Which model is meant, where it is, and what tells it from another. Nothing here needs torch."""

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from compress import exports
from compress.errors import ModelError, first_line
from compress.model.folder import CARD, check_folder, settings_in, weight_files_beside
from compress.phases import phase

BUILTIN = Path(__file__).parents[1] / "builtin" / "model"


@dataclass(frozen=True)
class Source:
    """A model: a folder, or a hub id with its revision; and how it is loaded.

    bits   4 or 8, in which bitsandbytes holds the weights; None leaves them as they are stored
    """

    id: str
    task: str
    dtype: str = "auto"
    revision: str | None = None
    bits: int | None = None

    @property
    def is_folder(self) -> bool:
        return Path(self.id).is_dir()


def locate(id: str, folder: Path) -> str:
    """The folder that an id in a recipe means, or the hub id as it stands. Folders are relative to the recipe.

    Raises ModelError for what can be neither.
    """
    if id == "builtin":
        check_folder(BUILTIN)
        return str(BUILTIN)
    place = folder / user_path(id)
    if place.is_dir():
        check_folder(place)
        return str(place.resolve())
    if id.startswith((".", "/", "~")) or place.exists() or id.count("/") > 1:
        raise ModelError(f"model {id!r}: there is no folder {place}")
    if not all(part and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in id.split("/")):
        raise ModelError(f"model {id!r}: neither a folder ({place}) nor a hub id such as google/flan-t5-small")
    return id


def user_path(text: str) -> Path:
    """A path as users write it: `~` stands for a home folder, if there is such a user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def pinned(source: Source) -> Source:
    """The source with the current commit of a hub id, so that both sides and every later stage have the same model.

    Raises ModelError when the hub doesn't answer and nothing is cached.
    """
    if source.is_folder:
        return source
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = huggingface_hub.HfApi().model_info(source.id, revision=source.revision, timeout=10).sha
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise ModelError(f"model {source.id!r}: neither a folder here nor on the hub (revision {source.revision or 'main'})") from None
    except Exception as error:  # offline in any of its ways
        cached = huggingface_hub.try_to_load_from_cache(source.id, "config.json", revision=source.revision)
        if not isinstance(cached, str):
            raise ModelError(
                f"model {source.id!r}: no folder of that name here, and the hub does not answer: {first_line(error)}"
            ) from None
        commit = Path(cached).parent.name
    return replace(source, revision=commit)


def settings(source: Source, name: str) -> dict[str, Any]:
    """A JSON file of a model, read without torch; empty where the model, or a hub that doesn't answer, has none.

    Raises ModelError where it holds something else than an object.
    """
    place = Path(source.id) / name
    if not source.is_folder:
        import huggingface_hub

        try:
            place = Path(huggingface_hub.hf_hub_download(source.id, name, revision=source.revision))
        except (OSError, ValueError):  # no such file, no network
            return {}
    return settings_in(place)


def fingerprint(source: Source) -> dict[str, Any]:
    """What tells one model from another: from the hub its id and commit; of a folder the content of its files.

    Its card and weights that transformers doesn't load are left out.
    """
    if not source.is_folder:
        return asdict(source)
    folder = Path(source.id)
    with phase("fingerprints"):
        unread = {CARD, *(f.name for f in weight_files_beside(folder))}
        export = exports.read(folder)
        own = [folder / name for name in export.files] if export else []
        files = sorted({*(f for f in folder.iterdir() if f.is_file() and f.name not in unread), *own})
        content = {str(file.relative_to(folder)): _digest(file.resolve(), (now := file.stat()).st_size, now.st_mtime_ns) for file in files}
    return {"files": content, "task": source.task, "dtype": source.dtype, "bits": source.bits}


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file; size and time of its last change are keys of the cache."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
