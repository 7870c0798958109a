"""Models and texts from the Hugging Face Hub by name, with the Hub's own cache, progress bars and tokens.

    python calibrate.py --model Qwen/Qwen3-0.6B --text wikitext2

A name that is a folder or a file here is taken as such. Once in the cache, nothing needs the network.
"""

import errno
import gzip
import io
import itertools
import json
import re
import zipfile
import zlib
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
    "c4": ("allenai/c4", "en/c4-{split}.00000-of-{shards}.json.gz"),
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
    split, shards = ("validation", "00008") if held_out else ("train", "01024")
    file = file.format(split=split, shards=shards)
    path = Path(fetch(hf_hub_download, repository, filename=file, repo_type="dataset")).resolve()
    try:
        if name == "wikitext2":
            with zipfile.ZipFile(path) as archive:
                raw = archive.read(f"wikitext-2-raw/wiki.{'test' if held_out else 'train'}.raw")
            return join_rows(raw.decode("utf-8"))
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            documents = itertools.islice(lines, 1_100 if held_out else 10_000)  # GPTQ evaluates on 1,100, too
            return " ".join(json.loads(document)["text"] for document in documents)
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise OSError(f"{path}: cannot be read ({error}); delete it, and it is downloaded again") from None


def join_rows(raw: str) -> str:
    """The lines of WikiText as GPTQ's loader and nearly every paper join them: a line is a row, a blank row is empty,
    and two line ends are put between rows.

    >>> join_rows(" = A = \\n \\n b \\n")
    ' = A = \\n\\n\\n\\n\\n b \\n'"""
    return "\n\n".join(row if row.strip() else "" for row in io.StringIO(raw, newline=None))


def fetch(download, repository: str, **more) -> str:
    """Call a function of huggingface_hub. Raises OSError with one line that says what to do."""
    try:
        return download(repository, **more)
    except hub.GatedRepoError:
        reason = f"is gated: accept its licence at huggingface.co/{repository}, then `hf auth login`"
    except hub.RevisionNotFoundError:
        reason = f"has no revision {more.get('revision')}; leave it out for the newest"
    except hub.RepositoryNotFoundError:
        reason = "is no folder here, and not on the Hub, or private: check the name, or `hf auth login`"
    except hub.HFValidationError:
        reason = "is no folder here, and no name that the Hub allows: check it"
    except hub.LocalEntryNotFoundError:
        reason = "is not in the cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is set): give a folder or file"
    except hub.EntryNotFoundError:
        reason = f"lacks {more.get('filename', 'a file')}: give a folder or file that you have"
    except Exception as error:  # httpx and the library have many
        said = next(iter(str(error).splitlines()), repr(error))
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in said:
            reason = "does not fit on the disk: make space, or set HF_HOME to a folder on a larger one"
        else:
            reason = f"could not be downloaded ({said:.120}); what has arrived is kept"
    raise OSError(f"{repository}: {reason}") from None
