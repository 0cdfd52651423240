"""Where a sweep lies: the names in its folder, and Optuna's storage of its trials. This module imports no torch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from graftlm.errors import ConfigError, RunError
from graftlm.jsonfile import parse_json

MARK = "sweep.json"
JOURNAL = "sweep.journal"
IDENTITY, WANTED, SURPLUS = "sweep", "wanted", "surplus"
"""What the study keeps: its options, how many trials it has in the end, and which trial one worker too many has begun."""


def trial_folder(out: Path, number: int) -> Path:
    """The run folder of a trial."""
    return out / "trials" / f"{number:04d}"


def ended_early(why: object) -> Literal["pruned", "diverged"]:
    """What ended a trial before its last step, by the reason that is kept; the search is told `pruned` of both."""
    return "pruned" if str(why).startswith("pruned") else "diverged"


def import_optuna() -> Any:
    """Optuna, quiet. Raises ConfigError with the install command where it is missing."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "graft sweep searches with Optuna, which is not installed: pip install 'graftlm[sweep]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def open_storage(text: str | None, out: Path, *, read_only: bool = False) -> Any:
    """Optuna's storage of a URL, or of a journal file; the sweep's own journal where none is named.

    `read_only` is for journals: one that is not there is not made, and nothing is written.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if text is not None and "://" in text:
        patient = {"connect_args": {"timeout": 60}} if text.startswith("sqlite") else {"pool_pre_ping": True}
        return optuna.storages.RDBStorage(text, engine_kwargs=patient)
    path = Path(text or out / JOURNAL)
    return optuna.storages.JournalStorage(_reader(path) if read_only else JournalFileBackend(str(path)))


def _reader(path: Path) -> Any:
    """A journal that is only read: no file and no lock is made, which also works where nothing may be written."""
    from optuna.storages.journal import BaseJournalBackend

    class JournalReader(BaseJournalBackend):
        def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
            with path.open("rb") as stream:
                whole = stream.read().rpartition(b"\n")[0]  # the last line may be half written
            return [parse_json(line) for line in whole.split(b"\n")[log_number_from:] if line]

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            raise AssertionError(f"{path} is open for reading")

    return JournalReader()


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Raise RunError that names the storage instead of what its driver raises."""
    try:
        yield
    except ImportError as error:  # Optuna's own names none
        name = error.name or getattr(error.__cause__ or error.__context__, "name", None) or "of its driver"
        raise RunError(f"storage {where} needs the package {name}; install it, or take another --storage") from None
    except Exception as error:
        module = type(error).__module__.split(".")[0]
        if module not in ("sqlalchemy", "alembic", "optuna") and not isinstance(error, (OSError, ValueError)):
            raise
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RunError(
            f"storage {where} cannot be reached or read: {redacted(first_line)[:200]}; look at --storage"
        ) from None


def has_password(text: str | None) -> bool:
    """Whether a storage's URL holds a password."""
    return redacted(text or "") != (text or "")


def redacted(text: str) -> str:
    """A storage's URL without its password, which ends at the `@` and may hold a `/`, or is one of the parameters."""
    text = re.sub(r"(://[^/@:\s]*):(?!\*\*\*@)[^@\s]+@", r"\1:***@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|sslpassword)=)[^&\s\"']+", r"\1***", text)
