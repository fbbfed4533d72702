"""Models and data sets from the Hugging Face Hub, at a pinned revision, and models to it.

Only files that cannot run code are fetched: safetensors, JSON, chat templates; never a pickle. The
environment is huggingface-hub's: ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo.errors import InputError, RunError

PAIR_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")

_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_MODEL_FILES += ["README.md"]  # the card names the licence
_NOT_MODEL_FILES = ["*/*", "consolidated*"]  # other formats, and a second copy of the weights
_NOT_PAIR_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_SHARD = re.compile(r"-\d+-of-(\d+)(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a model is pushed to.

    Attributes:
        name: ``owner/name``; made if it is not there.
        is_private: whether it is made for its owner's eyes alone.
        revision: a branch, which is made if it is not there; None: the main one.
    """

    name: str
    is_private: bool = False
    revision: str | None = None


def is_dataset_id(name: str) -> bool:
    """Tell whether a name could be ``owner/name``, a data set on the Hub."""
    return "/" in name and _HUB_ID.fullmatch(name) is not None and name[0] != "."


def commit_of(path: Path) -> str | None:
    """Return the commit that a fetched file or folder belongs to; None if it was not fetched."""
    parts = path.parts
    if "snapshots" not in parts[:-1]:
        return None
    return parts[parts.index("snapshots") + 1]


def fetch_model(name: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a model: a local one as it is, one of the Hub out of the cache.

    Raises:
        InputError: there is no such model or revision, it is gated, or it cannot be reached.
        RunError: the Hub answered with an error of its own.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise InputError(f"revision {revision!r} has no meaning for the local folder {name}")
        _refuse_links_out(Path(name))
        return Path(name)
    if not _HUB_ID.fullmatch(str(name)) or str(name)[0] == ".":
        raise InputError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download

    with _explained("model", str(name), revision):
        folder = snapshot_download(
            str(name),
            revision=revision,
            allow_patterns=_MODEL_FILES,
            ignore_patterns=_NOT_MODEL_FILES,
        )
    return Path(folder)


def _refuse_links_out(folder: Path) -> None:
    """Refuse links to texts elsewhere: they would be copied with a model that is trained on this.

    Weights may lie anywhere, and whatever is linked to in the Hub's own cache.

    Raises:
        InputError: there is one.
    """
    here = folder.resolve()
    for path in sorted(folder.iterdir()):
        if not path.is_symlink() or path.suffix == ".safetensors":
            continue
        target = path.resolve()
        is_cached = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
        if not target.is_relative_to(here) and not is_cached:
            raise InputError(f"{path} is a link out of its folder, to {target}: copy what you mean")


def fetch_dataset_files(
    name: str, revision: str | None = None, split: str | None = None
) -> list[Path]:
    """Return the files of one split of a data set on the Hub, fetching what the cache lacks.

    Raises:
        InputError: there is no such data set, revision or split, or it is closed or out of reach.
        RunError: the Hub answered with an error of its own.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    with _explained("data set", name, revision):
        try:
            info = HfApi().dataset_info(name, revision=revision)
        except HfHubHTTPError:
            raise
        except Exception:  # no answer: which class says so depends on the HTTP library beneath
            folder = snapshot_download(
                name,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[],  # any snapshot will do: choose_split looks for what is missing
                local_files_only=True,
            )
            return split_files(Path(folder), split)
        files = choose_split([file.rfilename for file in info.siblings or ()], split, name)
        folder = snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=files
        )
    return [Path(folder, file) for file in files]


def split_files(folder: Path, split: str | None) -> list[Path]:
    """Return the files of one split of a data set in a local folder.

    Raises:
        InputError: the folder has no such split, or several and none is asked for.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [folder / name for name in choose_split(names, split, str(folder))]


def choose_split(names: Iterable[str], split: str | None, where: str) -> list[str]:
    """Choose the files of a split by their names.

    A file's split is its path without suffix, shard number and a leading ``data/``:
    ``data/train-00000-of-00002.parquet`` is of "train", ``harmless-base/test.jsonl.gz`` of
    "harmless-base/test". It can be asked for in full, by its last part if only one split ends so,
    or by its folder for all that lies therein. Without ``split``: the only one, else "train".

    Raises:
        InputError: no split or no single one is meant; the message lists those there are.
    """
    files_by_split = _group_by_split(names)
    if not files_by_split:
        raise InputError(f"{where}: no files of pairs; known types are {', '.join(PAIR_SUFFIXES)}")
    wanted = next(iter(files_by_split)) if len(files_by_split) == 1 and not split else split
    wanted = wanted or "train"
    within = [key for key in files_by_split if key == wanted] or [
        key for key in files_by_split if key.startswith(f"{wanted}/")
    ]
    ending = [key for key in files_by_split if key.endswith(f"/{wanted}")]
    keys = within or ending[: len(ending) == 1]
    if not keys:
        raise InputError(
            f"{where}: {'several splits' if ending else 'no split'} {wanted!r}; there are "
            f"{', '.join(sorted(files_by_split))}"
        )
    for key in keys:
        _refuse_missing_shards(files_by_split[key], f"{where}: split {key!r}")
    return [name for key in keys for name in files_by_split[key]]


def _group_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    files_by_split: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        suffix = next((suffix for suffix in PAIR_SUFFIXES if name.lower().endswith(suffix)), None)
        path = Path(name)
        if suffix and path.name not in _NOT_PAIR_FILES and not path.parts[0].startswith("."):
            stem = _SHARD.sub("", name[: -len(suffix)])
            files_by_split[stem.removeprefix("data/")].append(name)
    return files_by_split


def _refuse_missing_shards(names: list[str], what: str) -> None:
    """Compare the number of files with what their names say, as in ``-00000-of-00002``."""
    counts = [int(found[1]) for found in map(_SHARD.search, names) if found]
    if counts and len(names) != max(counts):
        raise InputError(f"{what} has {len(names)} of {max(counts)} files")


def push_files(folder: Path, destination: Destination) -> str:
    """Upload the files of a folder as one commit, and return its address.

    The token is that of huggingface-hub: ``HF_TOKEN``, or what ``hf auth login`` has stored.

    Raises:
        InputError: there is no token, it may not write there, the name is none of the Hub's, the
            card is not valid, or a public repository was asked to be private.
        RunError: the Hub cannot be reached, or answered with an error of its own.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    _refuse_links_out(folder)
    if get_token() is None:
        raise InputError("there is no token for the Hub: set HF_TOKEN, or call hf auth login")
    name, api = destination.name, HfApi()
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    with _explained_push(name):
        if not api.repo_exists(name):
            api.create_repo(name, private=destination.is_private)
        elif destination.is_private and not api.model_info(name).private:
            raise InputError(f"{name} is there already and public: nothing was pushed")
        if destination.revision is not None:
            api.create_branch(name, branch=destination.revision, exist_ok=True)
        commit = api.create_commit(
            name,
            [
                CommitOperationAdd(path_in_repo=file, path_or_fileobj=path)
                for file, path in files.items()
                if not any(part.startswith(".") for part in file.split("/"))
            ],
            commit_message="Upload a model trained with dpo-engine",
            revision=destination.revision,
        )
    return str(commit.commit_url)


@contextmanager
def _explained_push(name: str) -> Iterator[None]:
    """Turn what huggingface-hub raises into errors that say what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(
                f"the Hub lets this token not write to {name} ({status}): give one that may"
            ) from error
        raise RunError(f"push to {name}: the Hub answered: {error}") from error
    except InputError:
        raise
    except ValueError as error:  # of an id, or of the card's metadata
        raise InputError(f"push to {name}: {error}") from error
    except Exception as error:
        # no answer: which class says so depends on the HTTP library beneath
        if not isinstance(error, ConnectionError) and not _is_of_http(error):
            raise
        raise RunError(f"push to {name}: the Hub cannot be reached") from error


def _is_of_http(error: Exception) -> bool:
    return type(error).__module__.startswith(("httpx", "httpcore", "requests"))


@contextmanager
def _explained(what: str, name: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface-hub raises into errors that say what to do."""
    from huggingface_hub import errors

    there = f"{what} {name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"{there} is gated: accept its terms on its page and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{there}: the Hub has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{there} is neither here nor on the Hub (if it is private, set HF_TOKEN)"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{there} is neither here nor a valid id on the Hub: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise InputError(
            f"{there} is neither here nor in the cache, and the Hub cannot be reached"
        ) from error
    except errors.HfHubHTTPError as error:
        raise RunError(f"{there}: the Hub answered: {error}") from error
