"""Publish an artifact on the Hugging Face hub: only on command, only its own files, only with the report that measured it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError, InputError, ReportError, RunError, in_a_line
from compress.model.folder import CARD, check_folder
from compress.report.card import RUN
from compress.results.report import Report, read_report


@dataclass(frozen=True)
class Parcel:
    """What is sent.

    report   that measured it
    files    of the artifact, name -> bytes
    """

    artifact: Path
    report: Report
    files: dict[str, int]


def pack(place: str | Path, failed_too: bool = False) -> Parcel:
    """What `publish` would send of an artifact's folder, or of a report's artifact. Nothing is sent.

    failed_too   publish although the report failed its gates

    Raises InputError where there is no whole artifact, no card or no report that measured it, or where that failed.
    """
    place = Path(place)
    asked = read_report(place) if place.name == "report.json" or (place / "report.json").is_file() else None
    artifact = _artifact_of(asked) if asked else place
    check_folder(artifact)
    report = _measured_by(artifact)
    if asked and asked.run != report.run:
        raise InputError(
            f"{place}: the card of {artifact} has the figures of a later run, {report.folder}; publish that, or run the recipe again"
        )
    if report.verdict == "fail" and not failed_too:
        raise InputError(f"{report.folder}: a gate failed ({report.decided_by}); publish another, or this one with --failed-too")
    files = {file.name: file.stat().st_size for file in sorted(artifact.iterdir()) if file.is_file() and not file.name.startswith(".")}
    return Parcel(artifact, report, files)


def publish(parcel: Parcel, repo: str, private: bool = False, revision: str | None = None) -> str:
    """Send it as one commit and return its address. The repository is made where there is none.

    repo      name, or owner/name
    private   the repository must be private, or is made so
    revision  the branch, made where there is none; None is main

    Raises InputError without a token, for a repository name that isn't valid, and for a public repository where a private one is asked for;
    RunError where the hub doesn't accept the files.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    if huggingface_hub.get_token() is None:
        raise InputError("the hub needs a token that may write: run `hf auth login`, or set the variable HF_TOKEN")
    hub = huggingface_hub.HfApi()
    try:
        home = hub.create_repo(repo, private=private or None, exist_ok=True)
        if private and not hub.model_info(home.repo_id).private:
            raise InputError(f"{home}: the repository exists and is public; make it private first, name another or leave --private out")
        if revision is not None:
            hub.create_branch(home.repo_id, branch=revision, exist_ok=True)
        hub.create_commit(
            home.repo_id,
            [huggingface_hub.CommitOperationAdd(name, parcel.artifact / name) for name in parcel.files],
            commit_message=f"{parcel.report.recipe}: {parcel.report.line}", revision=revision,
        )  # fmt: skip
    except CompressError:
        raise
    except HFValidationError as error:
        raise InputError(f"{repo}: {error}") from None
    except Exception as error:  # a network has many ways to fail
        raise RunError(f"{repo}: the hub ({hub.endpoint}) did not accept it: {in_a_line(error)}") from None
    return f"{home}/tree/{revision}" if revision else str(home)


def _artifact_of(report: Report) -> Path:
    """Where a report's artifact is: in `artifacts`, beside the folder of its recipe's reports."""
    if not report.stages:
        raise InputError(f"{report.folder}: its recipe has no stages, so there is no artifact to publish")
    return report.folder.resolve().parents[1] / "artifacts" / Path(report.stages[-1].artifact).name


def _measured_by(artifact: Path) -> Report:
    """The report that an artifact's card names."""
    run = _metadata(artifact / CARD).get(RUN)
    if not isinstance(run, str):
        raise InputError(f"{artifact / CARD}: names no run that measured the model; run its recipe again, which uses the artifact as it is")
    report = read_report(artifact.resolve().parents[1] / run)
    if not report.stages or Path(report.stages[-1].artifact).name != artifact.resolve().name:
        raise ReportError(f"{report.folder}: measured another artifact than {artifact}")
    return report


def _metadata(card: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    if not card.is_file():
        return {}
    try:
        return dict(ModelCard.load(card).data.to_dict())
    except Exception as error:  # whatever a person wrote into it
        raise InputError(f"{card}: its metadata can't be read: {in_a_line(error)}") from None
