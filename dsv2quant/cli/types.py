"""Types of parameters: what a shell completes, and what can be told wrong without importing torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import click
from click.shell_completion import CompletionItem

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


class Path(click.ParamType):
    """A path, as text. The shell completes it; whether it exists is for those to say who read it."""

    name = "path"

    def __init__(self, *, folder: bool = False) -> None:
        self.folder = folder

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir" if self.folder else "file")]


class Kind(click.Choice):
    """A choice that MODEL may follow instead: a shell completes names of files where no choice begins so."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        # Files come first: click's script for bash forgets what came before them.
        return [CompletionItem(incomplete, type="file"), *super().shell_complete(ctx, param, incomplete)]


class Names(click.ParamType):
    """Text of which a shell completes what `names` lists, which is called only then."""

    name = "text"

    def __init__(self, names: Callable[[], Sequence[str]]) -> None:
        self.names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete.upper())]


class Device(click.ParamType):
    """The name of a device that the code supports."""

    name = "device"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not _DEVICE.fullmatch(value):
            self.fail(f"{value!r} is none of cpu, cuda and cuda:N, as cuda:1.", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in ("cpu", "cuda") if name.startswith(incomplete)]
