"""A repository on the Hub, before anything is sent there: may this token write, and is it the same model's?"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, constants, metadata_load
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from transformers import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME

from linearize import __version__
from linearize.recipes.schema import PushSection

# Fields of transformers' configurations that say how large weights are, whatever the family calls them.
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
CARD = "README.md"
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".onnx")


class PushError(ValueError):
    """A model cannot be pushed; one sentence says why. Nothing was changed, unless it says that the upload stopped."""


@dataclass(frozen=True)
class Remote:
    """A file in a repository: bytes, hexadecimal SHA-256 of LFS files, git's SHA-1 of others."""

    size: int
    lfs: bool
    digest: str


@dataclass(frozen=True)
class Repository:
    """What there is before anything is sent.

    Attributes:
        name: with its namespace.
        exists: whether it need not be created.
        private: whether it is, or will be; None leaves that to the Hub's default.
        revision: branch or pull request that is to be changed.
        new_branch: whether the branch is to be created, from `main`.
        commit: the revision's latest, None where there is none.
        files: in that commit, by path.
    """

    name: str
    exists: bool
    private: bool | None
    revision: str
    new_branch: bool
    commit: str | None
    files: dict[str, Remote]


def identity(config: dict[str, Any], metadata: dict[str, Any] | None) -> dict[str, Any]:
    """What a repository's model and the next one pushed there have in common: family, sizes of the weights, and the
    model that they come from, where the card names it. Weights, attention and heads may be others.

    Args:
        config: `config.json`, of the linearized model or of the one it comes from.
        metadata: of the card.

    Raises:
        ValueError: transformers cannot read the configuration.
    """
    family = str(config.get("model_type")).removeprefix("linearized_")
    found = {"model_type": family}
    if family in CONFIG_MAPPING:
        try:
            known = CONFIG_MAPPING[family].from_dict({**config, "model_type": family})
        except (StrictDataclassError, TypeError) as error:
            raise ValueError(str(error)) from error
        text = known.get_text_config(decoder=True)
        found = {"model_type": text.model_type}
        found |= {name: value for name in SHAPE if (value := getattr(text, name, None)) is not None}
    base = (metadata or {}).get("base_model")
    if base is None:
        return found
    return found | {"base_model": base if isinstance(base, str) else ", ".join(map(str, base))}


def read_identity(config: Path, card: Path | None) -> tuple[dict[str, Any], bool]:
    """The `identity` that stands in these files, and whether it is a linearized model's.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        found = json.loads(config.read_text("utf-8"))
        return identity(found, metadata_load(card) if card else None), "linear_attention" in found
    except (ValueError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def look(section: PushSection, model: dict[str, Any], card: str) -> Repository:
    """Whether a model may go where `section` says, as far as the Hub tells without being changed.

    Args:
        model: its `identity`.
        card: README.md, or its metadata alone.

    Raises:
        PushError: naming what is in the way.
    """
    api = hub_api()
    with answers_named(section.repo):
        account = api.whoami()
        name = section.repo if "/" in section.repo else f"{account['name']}/{section.repo}"
        token = account.get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise PushError(f"{name}: the token {token.get('displayName', '')} may only read; use one that may write")
        try:
            ModelCard(card).validate(repo_type="model")
        except ValueError as error:
            raise PushError(f"{name}: the Hub refuses the card's metadata: {' '.join(str(error).split())}") from error
        try:
            info = api.model_info(name)
        except RepositoryNotFoundError:
            _check_creation(section, name, account, token)
            revision = section.revision or constants.DEFAULT_REVISION
            new_branch = revision != constants.DEFAULT_REVISION
            return Repository(name, False, section.private or None, revision, new_branch, None, {})
        if section.private and not info.private:
            raise PushError(f"{name}: exists and is public, but is to be private; make it so in its settings")
        if not section.create_pr:
            with answers_named(name, denied=f"{name}: the token has no right to write there"):
                api.auth_check(name, write=True)
        revision, new_branch = _find_branch(api, name, section.revision)
        start = constants.DEFAULT_REVISION if new_branch else revision
        info = api.model_info(name, revision=start, files_metadata=True)
        files = {
            file.rfilename: Remote(file.size, file.lfs is not None, file.lfs.sha256 if file.lfs else file.blob_id)
            for file in info.siblings
        }
        _check_same_model(api, name, info.sha, files, model)
        return Repository(name, True, info.private, revision, new_branch, info.sha, files)


def hub_api() -> HfApi:
    return HfApi(library_name="linearize", library_version=__version__)


@contextmanager
def answers_named(name: str, denied: str | None = None) -> Iterator[None]:
    """What the Hub refuses inside, as a sentence; `denied` says it where rights are missing.

    Raises:
        PushError
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PushError(f"{name}: there is no token for the Hub; run `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise PushError(f"{name}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = error.server_message or " ".join(str(error).split())
        if denied is not None and status in (401, 403):
            raise PushError(denied) from error
        if status == 401:
            raise PushError(
                f"{name}: the Hub does not accept the token; run `hf auth login`, or set HF_TOKEN to a valid one"
            ) from error
        if status == 403:
            raise PushError(f"{name}: the token has no right to do this ({said})") from error
        raise PushError(f"{name}: the Hub answers {status} ({said})") from error
    except (HTTPError, OSError) as error:
        said = " ".join(str(error).split())
        raise PushError(f"{name}: {constants.ENDPOINT} cannot be reached ({said}); is HF_ENDPOINT right?") from error
    except json.JSONDecodeError as error:
        raise PushError(
            f"{name}: {constants.ENDPOINT} does not answer as the Hub does; is HF_ENDPOINT right?"
        ) from error


def _check_creation(section: PushSection, name: str, account: dict[str, Any], token: dict[str, Any]) -> None:
    if section.create_pr:
        raise PushError(f"{name}: does not exist, so a pull request has nothing to be made to; push without one")
    namespace = name.partition("/")[0]
    writable = [account["name"], *(org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read")]
    if namespace not in writable:
        raise PushError(
            f"{name}: does not exist, and {account['name']} has no right to create it; "
            f"there is such a right in {', '.join(writable)}"
        )
    if token.get("role") == "fineGrained":
        scopes = token.get("fineGrained", {}).get("scoped", [])
        granted = [scope["permissions"] for scope in scopes if scope["entity"].get("name") == namespace]
        if not any("repo.write" in rights for rights in granted):
            raise PushError(
                f"{name}: does not exist, and the token has no right to create repositories of {namespace}"
            )


def _find_branch(api: HfApi, name: str, revision: str | None) -> tuple[str, bool]:
    """The revision to commit to, and whether it has to be created.

    Raises:
        PushError: it is a tag, or a pull request that there is not.
    """
    if revision is None:
        return constants.DEFAULT_REVISION, False
    refs = api.list_repo_refs(name, include_pull_requests=True)
    if any(ref.name == revision for ref in refs.branches) or any(ref.ref == revision for ref in refs.pull_requests):
        return revision, False
    if any(ref.name == revision for ref in refs.tags):
        raise PushError(f"{name}: {revision} is a tag, which stays where it is; name a branch")
    if revision.startswith("refs/"):
        raise PushError(f"{name}: has no pull request {revision}")
    return revision, True


def _check_same_model(api: HfApi, name: str, commit: str, files: dict[str, Remote], model: dict[str, Any]) -> None:
    elsewhere = "choose another repository, or remove what it holds"
    if CONFIG_NAME not in files:
        weights = sorted(path for path in files if path.endswith(WEIGHTS))
        if weights:
            raise PushError(f"{name}: holds {weights[0]}, but no linearized model; {elsewhere}")
        return
    with tempfile.TemporaryDirectory() as folder:
        config, card = (
            Path(api.hf_hub_download(name, file, revision=commit, local_dir=folder)) if file in files else None
            for file in (CONFIG_NAME, CARD)
        )
        try:
            found, linear = read_identity(config, card)
        except ValueError as error:
            raise PushError(f"{name}: its {CONFIG_NAME} or {CARD} cannot be read ({error}); {elsewhere}") from error
    if not linear:
        raise PushError(f"{name}: holds a model that is not a linearized one ({found['model_type']}); {elsewhere}")
    differing = [
        f"{field} {found.get(field)} instead of {value}"
        for field, value in model.items()
        if found.get(field) != value and (field != "base_model" or field in found)
    ]
    if differing:
        raise PushError(f"{name}: holds another model ({', '.join(differing)}); {elsewhere}")
