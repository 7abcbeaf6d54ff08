"""Sphinx settings: plain Markdown through MyST, so that every page reads as well on the repository's own pages."""

project = "skyGPT"
author = "skyGPT contributors"
project_copyright = "2026, skyGPT contributors"

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "skyGPT"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
