"""Models and texts from the Hugging Face Hub by name, with the Hub's own cache, progress bars and tokens.

    python calibrate.py --model Qwen/Qwen3-0.6B --text wikitext2

A name that is a folder or a file here is taken as such. Once in the cache, nothing needs the network.
"""

import errno
import gzip
import json
import re
import zipfile
from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download, snapshot_download

from support.checkpoint import SIDE_FILES

MODEL_FILES = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *(f"{name}*" for name in SIDE_FILES),
]
TEXTS = {  # name -> repository, file
    "wikitext2": ("ggml-org/ci", "wikitext-2-raw-v1.zip"),
    "c4": ("allenai/c4", "en/c4-{split}.00000-of-{shards}.json.gz"),  # the first shard, as everyone uses it
}


def model_folder(name: Path) -> Path:
    """The folder of a model: a folder of this name, or org/name or org/name@revision from the Hub.

    Raises OSError or ValueError with the remedy if there is neither."""
    repository, _, revision = name.as_posix().partition("@")
    if name.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or repository.startswith("."):
        return name
    return Path(fetch(snapshot_download, repository, revision=revision or None, allow_patterns=MODEL_FILES))


def named_text(name: str, held_out: bool) -> str:
    """A text of `TEXTS`: its training split, or the split that the field evaluates on. Raises OSError."""
    repository, file = TEXTS[name]
    if name == "wikitext2":
        path = fetch(hf_hub_download, repository, filename=file, repo_type="dataset")
        with zipfile.ZipFile(path) as archive:
            raw = archive.read(f"wikitext-2-raw/wiki.{'test' if held_out else 'train'}.raw").decode("utf-8")
        return join_rows(raw)

    split, shards = ("validation", "00008") if held_out else ("train", "01024")
    path = fetch(hf_hub_download, repository, filename=file.format(split=split, shards=shards), repo_type="dataset")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return "\n\n".join(json.loads(line)["text"] for line in lines)


def join_rows(raw: str) -> str:
    """The lines of WikiText as GPTQ's loader and nearly every paper join them: a line is a row, a blank row is empty,
    and two line ends are put between rows.

    >>> join_rows(" = A = \\n \\n b \\n")
    ' = A = \\n\\n\\n\\n\\n b \\n'"""
    return "\n\n".join(row if row.strip() else "" for row in raw.splitlines(keepends=True))


def fetch(download, repository: str, **more) -> str:
    """Call a function of huggingface_hub. Raises OSError with one line that says what to do."""
    try:
        return download(repository, **more)
    except hub.GatedRepoError:
        reason = f"is gated: accept its licence at huggingface.co/{repository}, then `hf auth login`"
    except hub.RevisionNotFoundError:
        reason = f"has no revision {more.get('revision')}; leave it out for the newest"
    except hub.RepositoryNotFoundError:
        reason = "is not on the Hub, or private: check the name, or `hf auth login`"
    except hub.LocalEntryNotFoundError:
        reason = "cannot be reached and is not in the cache: check the network, or give a folder"
    except hub.EntryNotFoundError:
        reason = "lacks a file that is needed: check the name"
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason = "does not fit on the disk: make space, or set HF_HOME to a folder on a larger one"
        else:
            reason = f"could not be downloaded ({str(error).splitlines()[0]:.120}); the same command resumes it"
    except Exception as error:  # httpx and the library have many
        reason = f"could not be downloaded ({str(error).splitlines()[0]:.120}); the same command resumes it"
    raise OSError(f"{repository}: {reason}") from None
