"""Gathering rows by Triton's interpreter: a program of its own, as Triton reads TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/gather_interpreted.py

Prints one JSON object: the cases, with what is wrong in them.
"""

from __future__ import annotations

import json

from gather_cases import CASES, faults


def main() -> None:
    print(json.dumps({"gather_rows": {str(case): faults(*case, "cpu") for case in CASES}}))


if __name__ == "__main__":
    main()
