"""Models to and from the Hugging Face Hub.

What `timm_ep.hub.export` writes is committed by `huggingface_hub.HfApi.create_commit`, as one commit is all there or
not at all. `timm.models.push_to_hf_hub` uploads pickles unless told not to, keeps the card of other weights if there is
one, and knows no dry run; `HfApi.upload_folder`, on which it builds, may make several commits of one folder.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from timm_ep.base.files import creating
from timm_ep.base.options import Options
from timm_ep.hub.cards import CARD_NAME, CURVES_NAME, LOG_NAME, RESULTS_NAME, TWIN_NAME
from timm_ep.hub.export import prepare
from timm_ep.hub.redaction import holds_secret, redacted
from timm_ep.hub.repository import (
    CONFIG_NAME,
    TEXT_LIMIT,
    WEIGHTS_NAME,
    verify_config,
    verify_weights,
    weights_limit,
)
from timm_ep.version import __version__

__all__ = ["Publish", "Pull"]

_TEXTS = (CARD_NAME, RESULTS_NAME, TWIN_NAME, LOG_NAME, CURVES_NAME)
# And what timm pushes beside safetensors: the old weights, pickled.
_REPLACED = (*_TEXTS, "pytorch_model.bin")
_ATTEMPTS = 5

T = TypeVar("T")


def _check_target(repo_id: str, revision: str | None, create_pr: bool = False) -> None:
    _check_repo_id(repo_id)
    if revision == "":
        raise ValueError("revision is empty; give a branch, tag or commit, or leave it out.")
    if holds_secret(revision or ""):
        raise ValueError("revision holds an access token; expected a branch, tag or commit.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request is to the main branch; drop revision={revision!r} or create_pr.")


def _client() -> HfApi:
    return HfApi(library_name="timm_ep", library_version=__version__)


def _check_repo_id(repo_id: str) -> None:
    try:
        if repo_id.count("/") != 1 or holds_secret(repo_id):
            raise HFValidationError
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = redacted(str(error))
        raise ValueError(
            f"repo_id={redacted(repo_id)!r:.200} is no repository's id; expected user/name. {reason}".rstrip()
        ) from None


def _check_existing(api: HfApi, repo_id: str, revision: str | None, private: bool, architecture: str) -> ModelInfo:
    """What the branch holds, or main where there is no such branch yet, of which it will be made."""
    try:
        info = _patiently(lambda: api.model_info(repo_id, revision=revision))
    except RevisionNotFoundError:
        info = _patiently(lambda: api.model_info(repo_id))
    if private and not info.private:
        raise FileExistsError(
            f"{repo_id} exists and is public; make it private in its settings on the Hub, or choose another name."
        )
    names = {sibling.rfilename for sibling in info.siblings or ()} - {".gitattributes", CARD_NAME}
    held = f"other files, such as {min(names)!r:.80}" if names else None
    if CONFIG_NAME in names:
        with tempfile.TemporaryDirectory() as temporary:
            config = Path(hf_hub_download(repo_id, CONFIG_NAME, revision=info.sha, local_dir=temporary))
            with suppress(ValueError, KeyError, TypeError, RecursionError):  # of something else it may be anything
                found = json.loads(config.read_text(encoding="utf-8"))["architecture"]
                held = None if found == architecture else f"the architecture {found!r:.80}"
    if held:
        raise FileExistsError(f"{repo_id} exists and holds {held}; choose another name.")
    return info


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
        and name.isprintable()
        and ":" not in name
    )


def _patiently(call: Callable[[], T]) -> T:
    """The call's result, asked again where the Hub says "too many requests": such a request was not carried out.

    The client itself repeats what is safe to repeat after other failures, and continues broken transfers.
    """
    for attempt in range(_ATTEMPTS - 1):
        try:
            return call()
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            response = getattr(_origin(error), "response", None)
            if response is None or response.status_code != 429:
                raise
            asked = response.headers.get("Retry-After", "")
            time.sleep(min(int(asked), 300) if asked.isdigit() else 2**attempt)
    return call()


def _origin(error: BaseException) -> BaseException:
    """What went wrong, of which the client may only say "not in the local cache either" or "error while uploading"."""
    wraps = isinstance(error, LocalEntryNotFoundError | RuntimeError)
    return error.__cause__ if wraps and isinstance(error.__cause__, HTTPError | OSError) else error


@contextmanager
def _plain_errors(doing: str) -> Iterator[None]:
    """The client's errors as built-in ones: one line that says what to do, free of tokens, without the client's own."""
    try:
        yield
    except json.JSONDecodeError:
        raise ConnectionError(
            f"{doing} failed: what answers is not the Hub, or it has an error of its own; check the network "
            "and HF_ENDPOINT, and repeat the command."
        ) from None
    except (HTTPError, OSError, RuntimeError) as error:
        if not isinstance(origin := _origin(error), HTTPError | OSError):
            raise
        raised = _explained(origin, doing)
        raise type(raised)(redacted(str(raised))) from None


def _explained(error: BaseException, doing: str) -> OSError:
    failed = f"{doing} failed"
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError(f"{failed}: HF_HUB_OFFLINE is set; unset it to reach the Hub.")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{failed}: the repository has no such revision.")
    if isinstance(error, EntryNotFoundError) and status == 404:
        return FileNotFoundError(f"{failed}: the repository lacks a file of its own list.")
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{failed}: the repository is gated; accept its conditions on its page, and log in with `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{failed}: no such repository, or a private one that this token may not read; see `hf auth whoami`."
        )
    if status == 401:
        return PermissionError(
            f"{failed}: the Hub refuses the access token; log in with `hf auth login`, or set HF_TOKEN."
        )
    if status == 403 and doing.startswith("Pulling"):
        return PermissionError(f"{failed}: this token may not read there; see `hf auth whoami`.")
    if status == 403:
        return PermissionError(f"{failed}: this token may not write there; see `hf auth whoami`, or use --create-pr.")
    if status == 429:
        return ConnectionError(f"{failed}: too many requests; wait a few minutes and repeat the command.")
    if status is not None and status >= 500:
        return ConnectionError(f"{failed}: the Hub has an error of its own ({status}); repeat the command later.")
    if status is not None:
        told = getattr(error, "server_message", None) or ""
        return OSError(" ".join(f"{failed}: {_first_line(error)} {told}".split()))
    if isinstance(error, HTTPError):
        return ConnectionError(f"{failed}: the connection broke ({_first_line(error)}); repeat the command.")
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(f"{failed}: {error.strerror}{f' ({error.filename})' if error.filename else ''}.")
    return type(error)(str(error)) if isinstance(error, OSError) else OSError(f"{failed}: {error}")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@dataclass
class Publish(Options):
    """Publish a run on the Hugging Face Hub: weights (safetensors), configuration, model card, log and curves.

    One commit holds it all, with the access token of `hf auth login`, or of the variable HF_TOKEN; it is no option, as
    options end in logs. The repository is created if need be. If it exists, the commit comes on top of what is there;
    it must be empty or hold the same architecture, and be private if `private` is asked for. Of an earlier training
    nothing is left, as its facts would be beside other weights.

    Args:
        run_or_checkpoint: folder that `timm-ep train` wrote, or a checkpoint beside its config.json.
        repo_id: user/name of the repository, such as user/ep_vgg9.cifar10; made if need be.
        private: create it for your eyes only.
        revision: branch to commit to, made if need be; main by default.
        create_pr: open a pull request instead of committing.
        dry_run: upload nothing, but write the folder exactly as it would appear.
        output: where a dry run writes; `hub/USER/NAME` by default.
        twin: folder of the same net's run by backprop, for comparison in the card.
        dataset_id: of the data on the Hub, such as uoft-cs/cifar10, where the run's dataset does not tell.
        license: of the weights, as the Hub names licences (mit, cc-by-nc-4.0, …); by default that of the
            weights that training started from, or else apache-2.0.
    """

    run_or_checkpoint: Path
    repo_id: str = ""
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    dry_run: bool = False
    output: Path | None = None
    twin: Path | None = None
    dataset_id: str | None = None
    license: str | None = None

    def run(self) -> str:
        """Publish, print and return the address of the commit or the pull request; of a dry run, the folder.

        Raises:
            ValueError: see `timm_ep.hub.export.prepare`; a repository id that is none; a pull request to a branch.
            FileExistsError: the repository holds something else, or is public where a private one is asked for.
            PermissionError: no token, a wrong one, or one that may not write there.
            ConnectionError: the Hub cannot be reached, or fails; nothing is published, and a repeat continues.
        """
        _check_target(self.repo_id, self.revision, self.create_pr)
        if self.dry_run:
            folder = self.output or Path("hub") / self.repo_id
            self._prepare(folder)
            print(f"dry run, nothing uploaded: {folder}")
            return str(folder)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "repository"
            architecture = self._prepare(folder)
            with _plain_errors(f"Publishing to {self.repo_id}"):
                address = self._commit(folder, architecture)
        print(f'published: {address}\ntimm.create_model("hf-hub:{self.repo_id}", pretrained=True)')
        return address

    def _prepare(self, folder: Path) -> str:
        return prepare(self.run_or_checkpoint, folder, self.repo_id, self.twin, self.dataset_id, self.license)

    def _commit(self, folder: Path, architecture: str) -> str:
        if get_token() is None:
            raise PermissionError("Publishing needs an access token; log in with `hf auth login` or set HF_TOKEN.")
        api, repo_id, revision = _client(), self.repo_id, self.revision
        _patiently(lambda: api.create_repo(repo_id, private=self.private or None, exist_ok=True))
        held = _check_existing(api, repo_id, revision, self.private, architecture).siblings or ()
        if revision and revision != "main":
            _patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        new = sorted(folder.iterdir())
        old = {sibling.rfilename for sibling in held}.intersection(_REPLACED) - {path.name for path in new}
        done = _patiently(
            lambda: api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(path.name, str(path)) for path in new),
                    *(CommitOperationDelete(name) for name in sorted(old)),
                ],
                commit_message=f"Add {repo_id.partition('/')[2]}",
                revision=revision,
                create_pr=self.create_pr,
            )
        )
        return redacted(str(done.pr_url or done.commit_url))


@dataclass
class Pull(Options):
    """Download a model from the Hugging Face Hub, check it, and only then put it in place.

    The configuration comes first: it says how large the weights may be. What is not part of a model is left out, and
    nothing is kept of a repository that is refused, or of a download that breaks.

    Args:
        repo_id: user/name of the repository.
        output: folder to make, which `timm.create_model("local-dir:…", pretrained=True)` reads; `hub/USER/NAME` by
            default.
        revision: branch, tag or commit.
    """

    repo_id: str
    output: Path | None = None
    revision: str | None = None

    def run(self) -> Path:
        """Pull, print and return the folder.

        Raises:
            FileExistsError: `output` has something in it.
            FileNotFoundError: no such repository or revision, none that this token may read, or no safetensors in it.
            ValueError: a repository that does not pass the checks of `timm_ep.hub.repository`.
            PermissionError: a wrong token.
            ConnectionError: the Hub cannot be reached, or fails.
            OSError: the disk is full, or other failures of writing.
        """
        _check_target(self.repo_id, self.revision)
        folder = self.output or Path("hub") / self.repo_id
        with creating(folder) as new, _plain_errors(f"Pulling {self.repo_id}"):
            self._fetch(new)
        print(f'pulled and checked: {folder}\ntimm.create_model("local-dir:{folder}", pretrained=True)')
        return folder

    def _fetch(self, folder: Path) -> None:
        api, repo_id = _client(), self.repo_id
        info = _patiently(lambda: api.model_info(repo_id, revision=self.revision, files_metadata=True))
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
        if strange := [name for name in sizes if not _is_inside(name)]:
            raise ValueError(f"{repo_id} has files that would leave its folder, such as {strange[0]!r:.80}; refused.")

        def fetch(name: str, limit: int) -> Path:
            size = sizes[name]
            if not isinstance(size, int) or not 0 <= size <= limit:
                raise ValueError(f"{repo_id}: {name} has {size!r:.80} bytes; expected 0 to {limit:,}.")
            # Of the one commit that was looked at; nothing enters the cache that other programs load from.
            return Path(_patiently(lambda: hf_hub_download(repo_id, name, revision=info.sha, local_dir=folder)))

        if CONFIG_NAME not in sizes:
            raise FileNotFoundError(f"{repo_id} has no {CONFIG_NAME}; expected a model that `timm-ep publish` wrote.")
        model = verify_config(fetch(CONFIG_NAME, TEXT_LIMIT))
        if WEIGHTS_NAME not in sizes:
            others = sorted(name for name in sizes if not name.endswith((".md", ".json", ".gitattributes")))
            raise FileNotFoundError(
                f"{repo_id} has no {WEIGHTS_NAME}; only safetensors are read, and none of {others!s:.200} is opened."
            )
        verify_weights(fetch(WEIGHTS_NAME, weights_limit(model)), model)
        for name in _TEXTS:
            if name in sizes:
                fetch(name, TEXT_LIMIT)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes on the download
