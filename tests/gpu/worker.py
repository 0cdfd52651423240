"""A process with a fake card: reads scenarios from its standard input, runs each in a fork of its own, writes what it found.

    python worker.py FOLDER_OF_THE_GUARD
    {"scenario": "train", "options": {"method": "lora"}}   ->   {"result": ...} or {"error": traceback}

A card cannot be taken out of a process again, and what one scenario caches another must not find: hence a process beside
pytest's, which imports everything once, and forks. `fixtures.py` is the other side.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def answer(scenario: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a scenario returns, or the traceback of what it raised."""
    import scenarios

    try:
        return {"result": getattr(scenarios, scenario)(**options)}
    except BaseException:
        return {"error": traceback.format_exc()}


def main(guard: str) -> None:
    sys.path[:0] = [guard, str(Path(__file__).parent)]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is for the log
    import fake_card

    for name in ("peft", "bitsandbytes"):  # neither believes in the card
        sys.modules[name] = None  # type: ignore[assignment]
    fake_card.install()
    import scenarios

    scenarios.warm_up()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.write(json.dumps(answer(asked["scenario"], asked["options"])) + "\n")
            answers.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            answers.write(
                json.dumps({"error": f"{asked['scenario']} died: {os.waitstatus_to_exitcode(status)}"}) + "\n"
            )
            answers.flush()
    os._exit(0)  # what is loaded takes seconds to tear down


if __name__ == "__main__":
    main(sys.argv[1])
