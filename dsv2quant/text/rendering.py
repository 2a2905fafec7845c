"""A program of its own that renders chats: chat.py starts it, and the system ends it where it takes too much.

A chat template is a downloaded program that nobody vouches for. Jinja's sandbox keeps it from the machine but not from
endless loops and strings of gigabytes, most of which are single operations in C that nothing in Python interrupts.

stdin: a line of JSON, {"template", "seconds", "memory", "characters"}, then one for each chat: a list of variables'
sets to try in turn. stdout: a line for each chat, {"text"}; the last may be {"error"}, or {"broken"}, if no template.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LONGEST = 1000  # characters of an error


class _Generation(Extension):
    """{% generation %} marks what the model itself said: for training, and nothing here."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up (utils/chat_template_utils.py)."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return found


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    """Render what stdin holds."""
    first = json.loads(sys.stdin.readline())
    _limit(resource.RLIMIT_CPU, first["seconds"])
    _limit(resource.RLIMIT_AS, first["memory"])
    _limit(resource.RLIMIT_CORE, 0)
    left = first["characters"]
    try:
        template = environment().from_string(first["template"])
    except MemoryError:
        raise  # the end of this program
    except Exception as error:  # noqa: BLE001 - deep nesting, for one, is no TemplateSyntaxError
        print(json.dumps({"broken": str(error)[:_LONGEST]}))
        return
    for line in sys.stdin:
        answer: dict[str, str] = {}
        for given in json.loads(line):
            try:
                answer = {"text": template.render(**given)}
                break
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - a program of somebody else's fails in any way
                answer = answer or {"error": f"{type(error).__name__}: {error}"[:_LONGEST]}
        left -= len(answer.get("text", ""))
        if left < 0:
            answer = {"error": f"it writes more than {first['characters']:,} characters"}
        print(json.dumps(answer), flush=True)
        if "error" in answer:
            return


if __name__ == "__main__":
    main()
