"""What every room may import: strict configs and the errors that a person can mend. Imports nothing of safecl."""

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypeAliasType

# Not a plain alias: pydantic needs a *named* recursive type, or it recurses without end while building the schema.
Json = TypeAliasType("Json", "bool | int | float | str | list[Json] | dict[str, Json] | None")


class Strict(BaseModel):
    """A frozen config that refuses unknown keys, so that a misspelt key is never a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ConfigError(Exception):
    """The sweep file is wrong. Printed without a traceback; the command exits 2."""


class PrerequisiteError(Exception):
    """The machine lacks something (a model, data, disk, memory). One line with the remedy; the command exits 2."""


class Infrastructure(RuntimeError):
    """The machine failed, not what it was asked to do: a process was killed, memory or a disk was full, a node was lost."""


class Damaged(PrerequisiteError):
    """A finished stage's files are not what was written. `safecl run` makes it again."""
