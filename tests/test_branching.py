"""Models that choose which modules run: an expert may get no token on a rank, or on any of them.

`branch_worker` has the network. One process in fp64 is the reference.
"""

from __future__ import annotations

import json
from typing import Any

import branch_worker
import forked
import pytest
import torch
from branch_worker import ENGINES, EXPERTS, RATE, STEPS, TOKENS
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Norms, losses and weights of all tokens in one process."""
    net = branch_worker.make_net().double()
    ids = torch.tensor(TOKENS)
    found: dict[str, Any] = {"norms": [], "losses": []}
    for _ in range(STEPS):
        net.zero_grad()
        loss = branch_worker.loss_of(net(ids).logits, ids)
        loss.backward()
        given = [(p, p.grad) for p in net.parameters() if p.grad is not None]
        found["losses"].append(loss.item())
        found["norms"].append(float(torch.cat([grad.flatten() for _, grad in given]).norm()))
        for parameter, grad in given:
            parameter.data -= RATE * grad
    return found | {"weights": {name: p.detach() for name, p in net.named_parameters()}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("branching")
    for stage in (1, 2, 3):
        settings = json.loads((ROOT / f"configs/deepspeed_z{max(stage, 2)}.json").read_text())
        settings["zero_optimization"]["stage"] = stage
        (out / f"zero{stage}.json").write_text(json.dumps(settings))
    printed = forked.launch(2, ["tests/support/branch_worker.py", str(out)])
    files = sorted(out.glob("rank*.pt"))
    assert len(files) == 2, printed
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("engine", [each for each in ENGINES if each != "zero3"])
def test_an_expert_without_a_token_on_a_rank_changes_nothing(ranks, alone, engine):
    """FSDP2 gave wrong norms without an error, ZeRO-2 mixed up gradients."""
    for own, rank in zip(TOKENS, ranks, strict=True):
        found = rank[engine]
        routes = [sorted({token % EXPERTS for token in part}) for part in (own[:2], own[2:])]
        assert found["ran"] == [routes * STEPS] * 2
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert found["weights"].keys() == alone["weights"].keys()
        for name, value in alone["weights"].items():
            assert torch.allclose(found["weights"][name].double(), value, rtol=1e-5, atol=1e-6)
    losses = torch.tensor([rank[engine]["losses"] for rank in ranks]).sum(0).tolist()
    assert losses == pytest.approx(alone["losses"], rel=1e-5)


def test_zero_3_needs_the_same_modules_on_all_ranks(ranks):
    for rank in ranks:
        assert "all ranks have to run the same modules" in rank["zero3"]["refused"]
