"""Finding, gating and indexing plugins; what is told when one cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sky_core import API_VERSION, plugins
from sky_core.errors import PluginError
from sky_core.plugins import load_plugins

PLUGIN = f"""\
from typing import ClassVar
from sky_core import hookimpl, slots
sky_api = {API_VERSION}

class Mine(slots.Norm):
    "A norm."
    kind: ClassVar = "mine"
    def build(self, dim): ...

@hookimpl
def sky_norms():
    return [Mine]
"""


@pytest.fixture(autouse=True)
def sandbox(sky_sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SKY_PLUGINS")
    monkeypatch.syspath_prepend(sky_sandbox)
    return sky_sandbox


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """install(name, source, version): a plugin as an installed distribution would show it."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)

    def add(name: str, source: str, version: str = "0.1.0") -> None:
        Path(f"plugin_{name}.py").write_text(source)
        point = EntryPoint(name, f"plugin_{name}", "sky")
        points.append(point._for(SimpleNamespace(name=f"sky-{name}", version=version)))  # type: ignore[attr-defined]
        monkeypatch.delitem(sys.modules, f"plugin_{name}", raising=False)

    return add


def status(loaded: plugins.Plugins) -> dict[str, str]:
    return {plugin.name: plugin.status for plugin in loaded.plugins}


def test_an_installed_plugin_is_loaded_and_its_parts_are_offered(install: Any) -> None:
    install("mine", PLUGIN)
    loaded = load_plugins()
    assert "mine" in loaded.catalog["norm"]
    assert loaded.offered_by["norm", "mine"] == "mine"
    assert loaded.versions()["sky-mine"] == "0.1.0"
    assert next(plugin for plugin in loaded.plugins if plugin.name == "mine").hooks == ["sky_norms"]


def test_core_alone_when_the_list_is_empty_or_the_environment_says_so(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("mine", PLUGIN)
    assert status(load_plugins([])) == {"core": "active"}
    monkeypatch.setenv("SKY_PLUGINS", "")
    assert status(load_plugins()) == {"core": "active"}
    monkeypatch.setenv("SKY_PLUGINS", "mine")
    assert status(load_plugins())["mine"] == "active"


def test_what_is_installed_but_not_asked_for_is_listed_as_unused(install: Any) -> None:
    install("mine", PLUGIN)
    install("other", PLUGIN.replace("mine", "other"))
    assert status(load_plugins(["other"])) == {"core": "active", "mine": "unused", "other": "active"}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no such kernel')", "RuntimeError: no such kernel"),
        ("import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'"),
        ("x = 1", f"add: sky_api = {API_VERSION}"),
        (f"sky_api = {API_VERSION - 1}", "upgrade the plugin"),
        (f"sky_api = {API_VERSION + 1}", "upgrade sky-core"),
        (PLUGIN.replace("def sky_norms", "def sky_nroms"), "sky_nroms"),
        (PLUGIN.replace("def sky_norms()", "def sky_norms(extra)"), "extra"),
    ],
)
def test_a_broken_plugin_stops_the_run_that_names_it_and_only_that(install: Any, source: str, reason: str) -> None:
    install("mine", source)
    installed = load_plugins()
    assert status(installed) == {"core": "active", "mine": "broken"}
    assert reason in installed.plugins[1].reason
    assert "mine" not in installed.catalog["norm"]
    with pytest.raises(PluginError, match=r"plugin 'mine' \(sky-mine 0.1.0\) failed to load") as error:
        load_plugins(["mine"])
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plugin_that_is_not_installed_is_named_with_what_is(install: Any) -> None:
    install("mine", PLUGIN)
    with pytest.raises(PluginError, match=r"'mien' is not installed \(installed: mine\); did you mean 'mine'\?"):
        load_plugins(["mien"])


def test_a_version_that_does_not_satisfy_the_run_file_is_refused(install: Any) -> None:
    install("mine", PLUGIN, version="0.1.0")
    assert status(load_plugins(["mine>=0.1"]))["mine"] == "active"
    with pytest.raises(PluginError, match=r"asks for 'mine>=0.3' but sky-mine 0.1.0 is installed"):
        load_plugins(["mine>=0.3"])


def test_two_plugins_that_claim_one_name_are_both_named(install: Any) -> None:
    install("mine", PLUGIN)
    install("yours", PLUGIN.replace("Mine", "Yours"))
    with pytest.raises(PluginError, match=r"plugins 'mine' and 'yours' both offer the norm 'mine'"):
        load_plugins()


def test_a_plugin_cannot_replace_what_core_offers(install: Any) -> None:
    install("mine", PLUGIN.replace('"mine"', '"rmsnorm"'))
    with pytest.raises(PluginError, match=r"plugins 'core' and 'mine' both offer the norm 'rmsnorm'"):
        load_plugins()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PLUGIN.replace("return [Mine]", "return [int]"), "is no Norm component"),
        (PLUGIN.replace("return [Mine]", "return [Minus]"), "name 'Minus' is not defined"),
        (PLUGIN.replace("kind: ClassVar =", "kind: str ="), "has no kind"),
        (PLUGIN.replace('    kind: ClassVar = "mine"\n', ""), "has no kind"),
    ],
)
def test_wrong_offers_name_the_plugin(install: Any, source: str, message: str) -> None:
    install("mine", source)
    assert status(load_plugins())["mine"] == "broken"
    with pytest.raises(PluginError, match=message) as error:
        load_plugins(["mine"])
    assert "plugin 'mine'" in str(error.value)


def test_a_loose_file_is_a_plugin() -> None:
    Path("mine.py").write_text(PLUGIN)
    assert "mine" in load_plugins(["./mine.py"]).catalog["norm"]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "there is no file"), ("1/0", "ZeroDivisionError"), ("def (", "SyntaxError")]
)
def test_a_loose_file_that_cannot_be_used_is_named(content: str | None, message: str) -> None:
    if content is not None:
        Path("mine.py").write_text(content)
    with pytest.raises(PluginError, match=message) as error:
        load_plugins(["./mine.py"])
    assert "mine.py" in str(error.value)


def test_nothing_of_a_failed_plugin_stays_behind(install: Any) -> None:
    install("mine", PLUGIN.replace("def sky_norms()", "def sky_norms(extra)"))
    load_plugins()
    assert "mine" not in load_plugins([]).catalog["norm"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plugins"], ["schema"], ["check", "run.yaml"], ["show", "run.yaml", "--no-build"]]
)
def test_commands_that_need_no_torch_do_not_import_it(arguments: list[str]) -> None:
    Path("run.yaml").write_text(
        "data: {kind: tokens, path: x, sequence_length: 8}\ntrain: {steps: 1, batch_tokens: 8}\n"
    )
    code = (
        "import sys\nfrom sky_core.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert end.code in (0, None), end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    environment = os.environ | {"SKY_PLUGINS": ""}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
