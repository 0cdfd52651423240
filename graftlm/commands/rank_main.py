"""One rank of `graft train --ranks N`: python -m graftlm.commands.rank_main FOLDER

FOLDER/config.json is the run's config. How the rank ended goes to FOLDER/ended-RANK.json: the run's summary, an error that
every rank met, a signal that stopped all, or an error of its own; only then its exit status is not 0, so that the launcher ends
the others.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from graftlm import progress
from graftlm.commands.rank import train_as_rank
from graftlm.commands.ranks import ENDED
from graftlm.config import TrainConfig
from graftlm.errors import GraftError, RunError, Stopped, TrainingError
from graftlm.files import write_json
from graftlm.jsonfile import read_json


def main(place: Path) -> int:
    """Train as this rank; returns the exit status."""
    ended = place / ENDED.format(os.environ["RANK"])

    told = False  # of a rank that hangs: the reason, which nothing that follows from its end replaces

    def tell(message: str) -> None:
        nonlocal told
        told = True
        write_json(ended, {"kind": TrainingError.__name__, "error": message, "own": True})

    try:
        with progress.shown():
            summary = train_as_rank(TrainConfig.build(read_json(place / "config.json", RunError)), tell)
    except Stopped as stopped:
        write_json(ended, {"stopped": stopped.signal_number, "error": str(stopped)})
    except GraftError as error:
        if told:
            return 2
        write_json(ended, {"kind": type(error).__name__, "error": str(error), "own": not error.everywhere})
        return 0 if error.everywhere else 2
    else:
        write_json(ended, {"summary": summary})
    return 0


if __name__ == "__main__":
    sys.stdout = sys.stderr  # `--json` has standard output to itself
    sys.exit(main(Path(sys.argv[1])))
