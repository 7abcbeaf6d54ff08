"""Find plugins, check them, and index what they offer.

Core's own parts come through the same hooks (`sky_core.plugin`). A plugin asked for by name must load or the run
stops; one that is merely installed and broken is listed as broken and skipped. Three gates stand against version
drift: wheel metadata, `sky_api` against `API_VERSION`, and PEP 508 specifiers in the run file's `plugins:`.

Nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

import pluggy
from packaging.requirements import InvalidRequirement, Requirement

from sky_core import API_VERSION, __version__
from sky_core.component import Component, closest, set_active_catalog
from sky_core.errors import PluginError
from sky_core.hookspecs import SPECS
from sky_core.slots import HOOKS

GROUP = "sky"
"""Entry-point group of plugins."""

FIRST_PARTY: dict[str, dict[str, tuple[str, ...]]] = {}
"""Distribution -> slot -> kinds, for the hint where a missing kind is found. The one place where core names plugins."""


Offers = list[tuple[str, type[Component]]]
"""What one plugin offers: (slot, component class)."""


@dataclass
class Plugin:
    """One plugin as `sky plugins` lists it. `status` is active, broken or unused."""

    name: str
    distribution: str
    version: str
    status: str
    reason: str = ""
    hooks: list[str] = field(default_factory=list)


@dataclass
class Plugins:
    """The loaded plugins: pluggy's manager, the catalogue of components, and who offered each."""

    manager: pluggy.PluginManager
    plugins: list[Plugin]
    catalog: dict[str, dict[str, type[Component]]]
    offered_by: dict[tuple[str, str], str]

    @property
    def hook(self) -> pluggy.HookRelay:
        return self.manager.hook

    def versions(self) -> dict[str, str]:
        """{distribution: version} of the active plugins: what a checkpoint records."""
        return {plugin.distribution: plugin.version for plugin in self.plugins if plugin.status == "active"}


_loaded: Plugins | None = None


def loaded_plugins() -> Plugins:
    """The plugins in use; loads core and everything installed when none were chosen yet."""
    return _loaded if _loaded is not None else load_plugins()


def load_plugins(selection: list[str] | None = None) -> Plugins:
    """Load core and the selected plugins and make their catalogue the active one.

    `selection` is a run file's `plugins:`: names with optional version specifiers, or paths of loose files.
    None means every installed plugin, or those that the environment variable SKY_PLUGINS names (a comma
    list; empty: core alone). Raises `PluginError` when something asked for cannot be had.
    """
    global _loaded
    if selection is None and (chosen := os.environ.get("SKY_PLUGINS")) is not None:
        selection = [name.strip() for name in chosen.split(",") if name.strip()]
    manager = pluggy.PluginManager("sky")
    for spec in SPECS:
        manager.add_hookspecs(spec)

    import sky_core.plugin

    offers = {"core": _register(manager, sky_core.plugin, "core")}
    found = [Plugin("core", "sky-core", __version__, "active")]
    points = {} if selection == [] else {point.name: point for point in sorted(entry_points(group=GROUP))}
    if selection is None:
        found += [_load_installed(manager, offers, point, required=False) for point in points.values()]
    for asked in selection or []:
        if asked.endswith(".py"):
            found.append(_load_file(manager, offers, Path(asked)))
        else:
            found.append(_load_installed(manager, offers, _entry_point(asked, points), required=True))
    if selection is not None:
        used = {plugin.name for plugin in found}
        found += [_describe(point, "unused") for name, point in points.items() if name not in used]
    found[1:] = sorted(found[1:], key=lambda plugin: plugin.name)

    catalog, offered_by = _merge(offers)
    for plugin in found:
        if plugin.status == "active":
            callers = manager.get_hookcallers(manager.get_plugin(plugin.name)) or []
            plugin.hooks = sorted(caller.name for caller in callers)
    _loaded = Plugins(manager, found, catalog, offered_by)
    set_active_catalog(catalog)
    return _loaded


def where_to_find(slot: str, kind: str) -> str:
    """`; it is in sky-attention: pip install sky-attention` when a known package offers it, else nothing."""
    for distribution, kinds in FIRST_PARTY.items():
        if kind in kinds.get(slot, ()):
            return f"; it is in {distribution}: pip install {distribution}, or add it to plugins:"
    return ""


def _describe(point: EntryPoint, status: str, reason: str = "") -> Plugin:
    name, version = (point.dist.name, point.dist.version) if point.dist else (point.name, "?")
    return Plugin(point.name, name, version, status, reason)


def _entry_point(asked: str, points: dict[str, EntryPoint]) -> EntryPoint:
    """The installed plugin that `asked` (a name or a PEP 508 requirement) means."""
    try:
        requirement = Requirement(asked)
    except InvalidRequirement as error:
        raise PluginError(f"plugins: {asked!r} is not a plugin name, a requirement or a .py file ({error})") from error
    if requirement.name not in points:
        known = f"sky-{requirement.name}"
        hint = f"; try: pip install {known}" if known in FIRST_PARTY else closest(requirement.name, points)
        installed = ", ".join(points) or "none"
        raise PluginError(f"plugins: {requirement.name!r} is not installed (installed: {installed}){hint}")
    point = points[requirement.name]
    plugin = _describe(point, "active")
    if not requirement.specifier.contains(plugin.version, prereleases=True):
        raise PluginError(
            f"plugins: this run asks for '{asked}' but {plugin.distribution} {plugin.version} is installed"
        )
    return point


def _load_installed(
    manager: pluggy.PluginManager, offers: dict[str, Offers], point: EntryPoint, *, required: bool
) -> Plugin:
    plugin = _describe(point, "active")
    try:
        module = point.load()
        _check_api(module)
        offers[point.name] = _register(manager, module, point.name)
    except Exception as error:  # whatever a stranger's module raises on import, the run must name the plugin
        reason = _one_line(error)
        if required:
            label = f"{plugin.distribution} {plugin.version}"
            raise PluginError(f"plugin '{point.name}' ({label}) failed to load: {reason}") from error
        return _describe(point, "broken", reason)
    return plugin


def _load_file(manager: pluggy.PluginManager, offers: dict[str, Offers], path: Path) -> Plugin:
    """A loose file `./my_attention.py`: the way from a notebook to a plugin."""
    if not path.is_file():
        raise PluginError(f"plugins: there is no file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(f"sky_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        offers[path.stem] = _register(manager, module, path.stem)
    except Exception as error:  # a user's own file: any failure is reported with the file's name
        del sys.modules[spec.name]
        reason = _one_line(error)
        raise PluginError(f"plugin file {str(path)!r} failed to load: {reason}") from error
    return Plugin(path.stem, str(path), "file", "active")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_api(module: ModuleType) -> None:
    written_for = getattr(module, "sky_api", None)
    if written_for is None:
        raise PluginError(f"its plugin module does not say which API it was written for; add: sky_api = {API_VERSION}")
    if written_for != API_VERSION:
        which = "upgrade the plugin" if written_for < API_VERSION else "upgrade sky-core"
        raise PluginError(f"it was written for sky API {written_for}, this sky-core has API {API_VERSION}; {which}")


def _register(manager: pluggy.PluginManager, module: ModuleType, name: str) -> Offers:
    """Register a plugin and take its offers; one that fails leaves no trace in the manager."""
    if manager.has_plugin(name):
        raise PluginError(f"two plugins are called {name!r}; rename one of them")
    try:
        manager.register(module, name)
        manager.check_pending()
        return _offers(manager, module, name)
    except Exception as error:  # re-raised at once: only the half-registered plugin is taken back
        if manager.is_registered(module):
            manager.unregister(module)
        if isinstance(error, pluggy.PluginValidationError):
            raise PluginError(f"{error} (is it written for a newer sky-core?)") from error
        raise


def _offers(manager: pluggy.PluginManager, module: ModuleType, name: str) -> Offers:
    """Call the plugin's offer hooks, each once."""
    offers: Offers = []
    for caller in manager.get_hookcallers(module) or []:
        base = HOOKS.get(caller.name)
        if base is not None:
            function = next(impl.function for impl in caller.get_hookimpls() if impl.plugin is module)
            components: Iterable[type[Component]] = function()  # type: ignore[assignment]  # pluggy's hooks are untyped
            for component in components:
                _check_offer(component, base, caller.name, name)
                offers.append((base.slot, component))
    return offers


def _check_offer(component: object, base: type[Component], hook: str, plugin: str) -> None:
    if not (isinstance(component, type) and issubclass(component, base)):
        raise PluginError(f"plugin {plugin!r}: {hook} returned {component!r}, which is no {base.__name__} component")
    if "kind" in component.model_fields or not isinstance(getattr(component, "kind", None), str):
        raise PluginError(
            f'plugin {plugin!r}: {component.__name__} has no kind; write `kind: ClassVar = "..."` in its body'
        )


def _merge(offers: dict[str, Offers]) -> tuple[dict[str, dict[str, type[Component]]], dict[tuple[str, str], str]]:
    """One catalogue of all offers, and who offered what; a name that two plugins claim is an error naming both."""
    catalog: dict[str, dict[str, type[Component]]] = {base.slot: {} for base in HOOKS.values()}
    offered_by: dict[tuple[str, str], str] = {}
    for plugin, components in offers.items():
        for slot, component in components:
            first = offered_by.setdefault((slot, component.kind), plugin)
            if catalog[slot].setdefault(component.kind, component) is not component:
                raise PluginError(
                    f"plugins {first!r} and {plugin!r} both offer the {slot} {component.kind!r};"
                    " leave one out with plugins:, or rename one"
                )
    return catalog, offered_by
