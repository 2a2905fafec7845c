"""The published checkpoints of the family: how many parameters each has, and how each is planned for vLLM on 8 GPUs."""

from __future__ import annotations

import pytest
from family_configs import ROWS, language

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config


@pytest.mark.parametrize("name", ROWS)
def test_the_parameters_are_as_many_as_their_makers_say(name):
    row = ROWS[name]
    config = model_config(language(row.config), "config.json")
    made = architecture(config)
    # Layers of one kind are alike, and V3's have 46,000 tensors.
    of_kind = {config.is_moe(index): index for index in range(config.num_hidden_layers)}
    sizes = {kind: sum(spec.size for spec in made.layer(index)) for kind, index in of_kind.items()}
    main = sum(sizes[config.is_moe(index)] for index in range(config.num_hidden_layers))
    main += sum(spec.size for spec in (*made.before, *made.behind))
    for said, count in ((row.billions, main), (row.with_mtp, main + sum(spec.size for spec in made.prediction()))):
        if said is not None:
            # Some round, some cut off: the count agrees to within one of the last digit.
            assert count / 1e9 == pytest.approx(float(said), abs=10.0 ** -len(said.partition(".")[2]))
