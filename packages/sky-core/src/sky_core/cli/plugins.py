"""`sky plugins`: what is installed, what it offers, what is broken and why. Torch-free."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from sky_core.plugins import Plugins, loaded_plugins


@click.command()
@click.option("--hooks", is_flag=True, help="Also list the hooks that each plugin implements.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(hooks: bool, as_json: bool) -> None:
    """List plugins, their versions and state, and the components that they offer."""
    loaded = loaded_plugins()
    rows = [asdict(plugin) | {"offers": _offers(loaded, plugin.name)} for plugin in loaded.plugins]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        click.echo(
            f"{row['name']:<14} {row['distribution']} {row['version']}  {row['status']}{_because(row['reason'])}"
        )
        for slot, kinds in row["offers"].items():
            click.echo(f"  {slot:<12} {', '.join(kinds)}")
        if hooks and row["hooks"]:
            click.echo(f"  hooks        {', '.join(row['hooks'])}")


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _offers(loaded: Plugins, name: str) -> dict[str, Any]:
    offers: dict[str, list[str]] = {}
    for (slot, kind), plugin in loaded.offered_by.items():
        if plugin == name:
            offers.setdefault(slot, []).append(kind)
    return offers
