"""A skyGPT plugin. Importing this package imports no torch."""

from importlib.metadata import version

__version__ = version("__DIST__")
