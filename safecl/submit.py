"""Submits a sweep to a Ray cluster as a job. The driver then runs there, and this terminal may be closed.

Files that the sweep file names by relative paths (plugins, data files, published numbers, a small model's folder) are
copied into the job's folder. An absolute path or a URL must exist on the cluster.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safecl.base import ConfigError, PrerequisiteError, expanded
from safecl.keep import readable, size_of
from safecl.nodes import token_help

LARGEST = 200 * 2**20  # bytes that are copied; Ray allows 500 MiB
ENDS = ("SUCCEEDED", "FAILED", "STOPPED")


def pack(raw: dict[str, Any], file: Path, folder: Path) -> None:
    """Write the sweep file and copies of the files that it names by relative paths into `folder`. `raw` is the sweep
    file's content; it is modified.

    Raises:
        ConfigError: a file does not exist, is too large, or cannot be on a cluster.
    """
    import yaml

    _refuse_local(raw)
    beside = file.absolute().parent
    data_dir = (raw.get("execution") or {}).get("data_dir")
    travels = [raw["published"]] if isinstance(raw.get("published"), dict) else []
    for entry in [*(raw.get("data") or []), *travels]:
        if isinstance(entry, dict) and isinstance(entry.get("file"), dict):
            entry["file"] = {part: _copied(each, beside, folder, data_dir) for part, each in entry["file"].items()}
        elif isinstance(entry, dict) and "file" in entry:
            entry["file"] = _copied(entry["file"], beside, folder, data_dir)
    if isinstance(raw.get("plugins"), list):
        raw["plugins"] = [_copied(each, beside, folder, None) for each in raw["plugins"]]
    if isinstance(data_dir, str) and not _is_elsewhere(data_dir):
        raw["execution"]["data_dir"] = _copied(data_dir, Path(), folder, None)
    _copy_models(raw, beside, folder)
    if (size := size_of(folder)) > LARGEST:
        raise ConfigError(
            f"what the sweep file names by relative places is {readable(size)}, at most {readable(LARGEST)} travel with a job: "
            "put large files where every node reaches them and name them by absolute places (models also by hub ids)"
        )
    (folder / "sweep.yaml").write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))


def _refuse_local(raw: dict[str, Any]) -> None:
    execution = raw.get("execution") or {}
    root = execution.get("root", "runs") if isinstance(execution, dict) else "runs"
    if not _is_elsewhere(str(root)):
        raise ConfigError(
            f"execution.root: {str(root)!r} would lie in the job's own folder, which goes with the job: name a URL or an "
            "absolute folder that every node reaches, as in --set execution.root=s3://BUCKET/safecl"
        )


def _is_elsewhere(place: str) -> bool:
    """Whether a path does not depend on the folder where a command is run."""
    return "://" in place or os.path.isabs(place) or place.startswith(("~", "$"))


def _copied(place: Any, beside: Path, folder: Path, data_dir: Any) -> Any:
    """Copy the file or folder at a relative path; returns its new path. Other paths, and values that are no text, are
    returned unchanged."""
    if not isinstance(place, str) or _is_elsewhere(place):
        return place
    for parent in (beside, *([Path(expanded(data_dir))] if isinstance(data_dir, str) else [])):
        source = parent / expanded(place)
        if source.exists():
            target = folder / "files" / f"{len(list((folder / 'files').glob('*'))):02d}" / source.name
            target.parent.mkdir(parents=True)
            if source.is_dir():
                if (size := size_of(source)) > LARGEST:
                    raise ConfigError(
                        f"{place!r} is {readable(size)}, at most {readable(LARGEST)} travel with a job: name it by an absolute "
                        "place that every node has, or a hub id"
                    )
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)
            return str(target.relative_to(folder))
    return place  # `safecl run` reports what is wrong with it


def _copy_models(given: Any, beside: Path, folder: Path) -> None:
    """Copy the folders of models and tokenizers, wherever a sweep names them (found as in sweepfile.py)."""
    for key, value in given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, list) else ():
        if key in ("source", "tokenizer") and isinstance(value, str) and not _is_elsewhere(value):
            for parent in (beside, Path()):
                if (parent / expanded(value)).is_dir():
                    given[key] = _copied(value, parent, folder, None)
                    break
        else:
            _copy_models(value, beside, folder)


def client(address: str) -> Any:
    """Ray's job client. Raises PrerequisiteError if no dashboard answers, or it needs a token."""
    if "://" not in address:  # Ray takes HOST:PORT for the address of its GCS, and waits a minute for one
        address = f"http://{address}"
    try:
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.ERROR)  # after the import, which sets it
        return JobSubmissionClient(address)
    except Exception as error:
        raise _unreached(address, error) from None


def _unreached(address: str, error: Exception) -> PrerequisiteError:
    told = " ".join(str(error).split())
    if type(error).__name__ == "AuthenticationError" or "401" in told or "403" in told:
        return PrerequisiteError(f"the Ray dashboard at {address} takes only who knows its token: {token_help()}")
    return PrerequisiteError(
        f"no Ray dashboard answers at {address} ({told[:200]}): name it with --address; of a cluster by `ray up`, "
        "`ray dashboard ray_cluster.yaml` brings it to http://127.0.0.1:8265"
    )


def submit(address: str, raw: dict[str, Any], file: Path, options: Sequence[str], env: dict[str, str]) -> str:
    """Submit `safecl run` of a sweep. Returns the job's id. `options`: options of `safecl run`."""
    jobs = client(address)
    command = ["safecl", "run", "sweep.yaml", "--set", "execution.address=auto", *options]
    with tempfile.TemporaryDirectory(prefix="safecl-job-") as made:
        pack(raw, file, Path(made))
        try:
            return str(
                jobs.submit_job(
                    entrypoint=shlex.join(command),
                    runtime_env={"working_dir": made, "env_vars": env},
                    metadata={"safecl_sweep": str(raw.get("name", ""))},
                )
            )
        except RuntimeError as error:
            raise _unreached(address, error) from None


def follow(address: str, job: str, write: Callable[[str], None]) -> str:
    """Print a job's output until the job ends. Returns its status: SUCCEEDED, FAILED or STOPPED."""
    jobs = client(address)

    async def tail() -> None:
        async for text in jobs.tail_job_logs(job):
            write(text)

    while True:
        asyncio.run(tail())  # ends with the job, or when the connection is lost
        status = str(jobs.get_job_status(job).value)
        if status in ENDS:
            return status
        time.sleep(1.0)
