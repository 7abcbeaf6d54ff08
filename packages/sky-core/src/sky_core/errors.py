"""The errors a user sees. Each message is one line that says what, where and what to do."""

from __future__ import annotations


class SkyError(Exception):
    """The work failed for a reason outside the user's input (disk full, damaged file). Exit code 1."""

    exit_code = 1


class UserError(SkyError):
    """The user's input is at fault (a path, a key, an option). Exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """A run file is wrong. `problems` holds one line per problem, in the file's order."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class PluginError(UserError):
    """A plugin is missing, broken, of another version, or in conflict with another one."""


class DataError(UserError):
    """A corpus, shard or token file cannot be used as it is (empty, damaged, made by another tokenizer)."""


class CheckpointError(SkyError):
    """A checkpoint cannot be read or written."""


class Diverged(SkyError):
    """Training no longer produces finite losses. Exit code 3."""

    exit_code = 3


class CheckFailed(SkyError):
    """Something that was asked to be verified is not so. Exit code 4."""

    exit_code = 4
