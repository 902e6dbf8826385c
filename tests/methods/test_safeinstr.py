from __future__ import annotations

import json
from pathlib import Path

from safecl.methods.safeinstr import Safeinstr
from safecl.testing import world as contract
from safecl.testing.world import World
from safecl.training import batches


def test_refusals_are_rows_like_any_other_and_make_the_run_longer(world: World, tmp_path: Path) -> None:
    memory, user = batches.read_rows(world.memory), batches.read_rows(world.user)
    mixed = Safeinstr(Safeinstr.Config(memory_size=5)).rows(user, memory)
    assert mixed == user + memory[:5]
    contract.train(world, tmp_path / "run", contract.config("safeinstr", memory_size=5))
    assert len(contract.curves(tmp_path / "run")) == -(-round(28 * 1.5) // 5)  # 42 rows in batches of 5
    seen = {i for batch in batches.order(3, 28, 5, 1.5) for i in batch}
    assert seen & set(range(23, 28)), "no refusal is drawn: test is void"
    facts = json.loads((tmp_path / "run" / "result" / "result.json").read_text())
    assert all(row.harmful for row in memory) and facts["harmful_token_share"] == 0  # refusals are no poison
