"""The data set of a user's own in docs/data.md runs as it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_a_data_set_of_the_users_own() -> None:
    Path("hospitals").mkdir()
    Path("hospitals/sizes.json").write_text(json.dumps({"north": 10, "south": 5}))
    for name, number in (("north", 10), ("south", 5)):
        torch.save((torch.ones(number, 2), torch.zeros(number, dtype=torch.int64)), f"hospitals/{name}.pt")
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert code
    names: dict = {}
    exec(code[1], names)
    clients = names["Hospitals"]().train_dataloader()
    assert {client: clients.num_examples(client) for client in clients} == {"north": 8, "south": 4}
    assert next(iter(clients["south"]))[0].shape == (4, 2)
