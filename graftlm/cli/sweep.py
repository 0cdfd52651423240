"""`graft sweep`, and `graft sweep show`."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from graftlm import terminal
from graftlm.cli.app import Json, app, options, print_json, starting
from graftlm.config import ShowSweepConfig, SweepConfig

_RUN = "run"


class _RunByDefault(TyperGroup):
    """`graft sweep ...` runs a sweep, except for `graft sweep show`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = [_RUN, *args]
        return super().parse_args(ctx, args)


group = typer.Typer(
    cls=_RunByDefault, help="Search options: many trials trained at once on one base.", rich_markup_mode="rich"
)
app.add_typer(group, name="sweep")


@group.command(
    _RUN,
    hidden=True,
    epilog="Examples:\n\n"
    "graft sweep --model demo --data demo --steps 40 --search learning-rate=1e-3..3e-2,rank=4..32 --trials 8\n\n"
    'graft sweep --model M --data F --method qlora --search "targets=attention|all-linear,rank=4..64" --pruner asha\n\n'
    "graft sweep sweep.yaml --storage sqlite:///sweep.db      the same command elsewhere joins in\n\n"
    "graft sweep show runs/sweep",
)
@options(SweepConfig)
def run(config: SweepConfig, json: Json = False) -> None:
    """Search options: many trials trained at once on one base. `graft sweep show DIR` prints the result."""
    with starting():
        from graftlm.commands.sweep import sweep
        from graftlm.experiments.sweep.view import SweepView

    view = SweepView()
    found = sweep(config, view)
    view.found(found)
    view.note(f"report: {config.out / 'report.html'} and report.md")
    if json:
        print_json(found.to_json())


@group.command(epilog="Examples:\n\ngraft sweep show runs/sweep\n\ngraft sweep show runs/sweep --json")
@options(ShowSweepConfig)
def show(config: ShowSweepConfig, json: Json = False) -> None:
    """Show the trials of a sweep, best first, and write its report again."""
    from graftlm.commands.sweep import show
    from graftlm.experiments.sweep.view import print_table

    found = show(config)
    if json:
        print_json(found.to_json())
    else:
        print_table(terminal.console(), found, most=1000)
