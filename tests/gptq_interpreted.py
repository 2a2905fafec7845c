"""GPTQ's kernels by Triton's interpreter against their references: a program of its own, since Triton reads
TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/gptq_interpreted.py

Prints one JSON object: of each operation the cases, with what is wrong in them.
"""

from __future__ import annotations

import json

from gptq_cases import BLOCKS, SEARCHES, block_faults, search_faults


def main() -> None:
    found = {
        "quantize_block": {str(case): block_faults(*case, "cpu") for case in BLOCKS},
        "search_scales": {str(case): search_faults(*case, "cpu") for case in SEARCHES},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
