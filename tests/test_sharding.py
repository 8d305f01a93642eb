"""A rank's part of a step's memory, against tables that were written out by hand.

The model has 1,000 parameters in 4 layers, 200 of them outside of layers, and 800 are trained. 100
of them are in ten tensors of 10, and the rest in tensors of 100. 100 parameters are looked up only.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from sft.plan import sharding
from sft.plan.allocator import MIB
from sft.plan.counts import CastCounts, Counts

COUNTS = Counts(
    parameters=1000,
    trained=800,
    multiplied=900,
    largest=100,
    layers=4,
    outside=200,
    sizes=(100,) * 9 + (10,) * 10,
)
WHOLE = {"weights": 4000, "gradients": 3200, "optimizer": 6400, "activations": 400}
LORA = {"weights": 2000, "adapters": 3200, "gradients": 3200, "optimizer": 6400, "activations": 400}
BUCKET = {"reduce_bucket_size": 500}  # elements, of 4 bytes
ZERO3 = {
    "stage": 3,
    "stage3_prefetch_bucket_size": 100,
    "stage3_param_persistence_threshold": 50,  # the ten small tensors stay whole
    "stage3_max_live_parameters": 600,
} | BUCKET
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.fixture(autouse=True)
def model(monkeypatch):
    info = SimpleNamespace(mode="full", sizes=SimpleNamespace(hidden_size=8))
    monkeypatch.setattr(sharding, "count_parameters", lambda _: COUNTS)
    monkeypatch.setattr(sharding, "count_casts", lambda *_: CastCounts())
    monkeypatch.setattr(sharding, "task_of", lambda _: SimpleNamespace(info=lambda _: info))
    return info


TRAIN = {"offload": False, "trained_bytes": 4, "optimizer_in_backward": False}
TRAIN |= {"keep_whole": False, "reduce_dtype": "fp32"}
CONFIG = SimpleNamespace(train=SimpleNamespace(**TRAIN))


def on_rank(phase, group, parts=WHOLE, precision="fp32", on_gpu=False, **train):
    config = SimpleNamespace(train=SimpleNamespace(**TRAIN | train))
    return sharding.parts_on_rank(phase, parts, config, precision, group, on_gpu)


@pytest.mark.parametrize(
    ("world_size", "accumulates", "added"),
    [(4, True, {"communication": 3200}), (4, False, {}), (1, True, {})],
)
def test_ddp_keeps_the_sum_of_earlier_gradients_beside_its_buckets(world_size, accumulates, added):
    group = sharding.Group(world_size, "ddp", accumulates)
    assert on_rank("backward", group) == WHOLE | added


FSDP2 = [  # gathered: weights outside of layers 800, a layer 800; a layer's gradients 600
    ("forward", 800, 800 + 2 * 800),
    ("loss", 800, 800 + 800),  # the last layer stays
    ("backward", 800, 800 + 400 + 3 * 800 + (600 - 400 // 4)),  # 400: the head's gradients
    ("backward of the embedding", 800, 800 + 2 * 800),
    ("update", 800, 0),
]


@pytest.mark.parametrize(("phase", "gradients", "gathered"), FSDP2)
def test_fsdp2_of_a_full_fine_tuning(phase, gradients, gathered):
    split = {"weights": 1000, "optimizer": 1600, "activations": 400, "gradients": gradients}
    expected = split | ({"communication": gathered} if gathered else {})
    assert on_rank(phase, sharding.Group(4, "fsdp", True)) == expected


@pytest.mark.parametrize(
    ("phase", "keeps", "gradients", "gathered"),
    [  # gradients of 800 x 4 bytes are whole; with `all`, so are four layers of 800
        ("forward", "gradients", 3200, 800 + 2 * 800),
        ("backward", "gradients", 3200, 800 + 400 + 3 * 800 + 500),
        ("forward", "all", 3200, 800 + 5 * 800),
        ("loss", "all", 3200, 800 + 4 * 800),
        ("backward", "all", 3200, 800 + 400 + 4 * 800 + 500),
        ("update", "all", 800, 0),
    ],
)
def test_fsdp2_keeps_whole_what_it_is_told(phase, keeps, gradients, gathered):
    found = on_rank(phase, sharding.Group(4, "fsdp", True), keep_whole=keeps)
    assert (found["gradients"], found.get("communication", 0)) == (gradients, gathered)


@pytest.mark.parametrize(
    ("phase", "keeps", "on_gpu"),
    [("backward", False, 0), ("backward", "gradients", 3200), ("update", "gradients", 0)],
)
def test_offloading_leaves_gradients_on_the_gpu_while_they_are_whole(phase, keeps, on_gpu):
    group = sharding.Group(4, "fsdp", True)
    found = on_rank(phase, group, on_gpu=True, offload=True, keep_whole=keeps)
    assert found.get("gradients", 0) == on_gpu
    assert not {"weights", "optimizer"} & set(found)


def test_fsdp2_within_groups_has_larger_shards():
    group = sharding.Group(4, "fsdp", True, within=2)
    found = on_rank("backward", group)
    assert [found[key] for key in ("weights", "optimizer", "gradients")] == [2000, 3200, 1600]


def test_fsdp2_gathers_rounded_weights_in_two_bytes_and_copies_them_no_more(monkeypatch):
    casts = CastCounts(outside=50, inside=400, others=10)
    monkeypatch.setattr(sharding, "count_casts", lambda *_: casts)
    parts = WHOLE | {"weight copies": 1000}
    found = on_rank("forward", sharding.Group(4, "fsdp"), parts, "bf16")
    assert found["weight copies"] == 2 * 10
    assert found["communication"] == (800 - 2 * 50) + 2 * (3200 - 2 * 400) // 4


def test_fsdp2_without_accumulation_has_no_gradients_in_the_forward_pass():
    assert on_rank("forward", sharding.Group(4, "fsdp")) == {
        "weights": 1000,
        "optimizer": 1600,
        "activations": 400,
        "communication": 2400,
    }
    assert on_rank("forward", sharding.Group(1, "fsdp")) == WHOLE  # one process shares nothing


@pytest.mark.parametrize(
    ("phase", "gathered"),
    [  # outside of layers 200 parameters of 2 bytes; a layer (2000 + 3200 - 400) / 4
        ("forward", 400 + 2 * 1200),
        ("backward", 400 + 3 * 1200 + (800 - 400 // 4)),
        ("backward of the embedding", 400),
    ],
)
def test_fsdp2_of_adapters_has_no_gradients_outside_of_layers(model, phase, gathered):
    model.mode = "lora"
    found = on_rank(phase, sharding.Group(4, "fsdp", True), LORA, "bf16")
    assert found == {
        "weights": 500,
        "adapters": 800,
        "gradients": 800,
        "optimizer": 1600,
        "activations": 400,
        "communication": gathered,
    }


SHARE, BUCKETS = 800, 2000  # a rank's part of the trained weights; one bucket
ZERO12 = [
    ({"stage": 2}, True, "forward", {"gradients": SHARE}),
    ({"stage": 2}, False, "forward", {}),
    ({"stage": 1}, True, "forward", {"gradients": 3200, "communication": BUCKETS}),
    ({"stage": 1}, False, "forward", {}),
    ({"stage": 2}, True, "update", {"gradients": 2 * SHARE}),
    ({"stage": 2} | OFFLOAD, True, "update", {"gradients": 3 * 800 + 400 + 2 * SHARE}),
    # When the first bucket is full, 2,000 of 3,200 bytes of gradients are there, and so 3/8 of the
    # activations; the bucket is copied.
    ({"stage": 2}, True, "backward", {"gradients": SHARE, "communication": 2 * BUCKETS}),
    ({"stage": 1}, True, "backward", {"gradients": 3200, "communication": 2 * BUCKETS}),
    (
        {"stage": 2, "overlap_comm": True},
        False,
        "backward",
        {"communication": 3 * BUCKETS},
    ),
    (
        {"stage": 2} | OFFLOAD,
        False,
        "backward",
        {"gradients": 2800, "communication": 400 + 2 * BUCKETS},  # 400: the largest, in transit
    ),
]


@pytest.mark.parametrize(("zero", "accumulates", "phase", "expected"), ZERO12)
def test_zero_1_and_2(zero, accumulates, phase, expected):
    found = on_rank(phase, sharding.Group(4, "deepspeed", accumulates, zero | BUCKET))
    kept = {"communication": 400} if OFFLOAD.keys() & zero.keys() else {}  # in transit
    activations = 150 if phase == "backward" else 400
    whole = {"weights": 4000, "optimizer": 1600 + SHARE, "activations": activations}
    assert found == whole | kept | expected


def test_zero_2_peaks_before_its_first_bucket_is_full_if_activations_are_large():
    group = sharding.Group(4, "deepspeed", False, {"stage": 2} | BUCKET)
    found = on_rank("backward", group, WHOLE | {"activations": 10_000})
    assert found["activations"] == 10_000
    assert found["communication"] == BUCKETS + 400  # the largest gradient


@pytest.mark.parametrize(
    ("phase", "changed", "transient"),
    [  # beside them: small tensors 400, a bucket 2,000
        ("forward", {}, 2400 + 400),  # 600 live parameters, 100 that are fetched
        ("forward", {"stage3_max_live_parameters": 5000}, 3600 + 400),  # all that are not small
        ("backward of the embedding", {}, 2 * 2000),
        ("backward", {}, 2400 + 400 + 2 * 2000),
        ("backward", {"reduce_bucket_size": 800}, 2400 + 400 + (3200 - 2000)),  # it never fills
        ("update", {}, 2 * 400),
    ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_zero_3(phase, changed, transient, offload):
    zero = ZERO3 | changed | (OFFLOAD if offload else {})
    assert on_rank(phase, sharding.Group(4, "deepspeed", True, zero)) == {
        "weights": 1000,
        "optimizer": 1600 + SHARE,
        "gradients": SHARE * (2 if offload else 1),
        "activations": 400,
        "communication": 400 + 2000 + transient,
    }


def test_what_is_in_host_memory_does_not_count_on_a_gpu():
    one, zero = sharding.Group(), sharding.Group(4, "deepspeed", True, ZERO3 | OFFLOAD)
    assert on_rank("forward", one, LORA, on_gpu=True, offload=True) == {"activations": 400}
    assert on_rank("forward", one, LORA, on_gpu=False, offload=True) == LORA
    found = on_rank("forward", zero, on_gpu=True)
    assert found.keys() == {"weights", "activations", "communication"}


@pytest.mark.parametrize(
    ("outside", "gathering"),
    [
        (100, 400 + 900 + 900),  # the second layer does not fit where the weights outside were
        (300, 1200 + 700),  # it does, and so does any later one
    ],
)
@pytest.mark.parametrize("phase", ["forward", "loss", "backward", "update"])
def test_streams_of_fsdp2_have_pools_of_their_own(phase, outside, gathering, monkeypatch):
    numbers = {"parameters": 1000, "trained": 800, "multiplied": 900, "outside": outside}
    large = {key: size * MIB for key, size in numbers.items()}  # no tensor of the small pool
    monkeypatch.setattr(sharding, "count_parameters", lambda _: replace(COUNTS, **large))
    group, whole = sharding.Group(4, "fsdp"), {key: size * MIB for key, size in WHOLE.items()}
    parts = on_rank(phase, group, whole)
    gradients = 800 * MIB if phase in ("backward", "update") else 0  # a quarter of 800 x 4 bytes
    layer = 1000 - outside if phase in ("forward", "backward") else 0
    assert sharding.pools(phase, whole, parts, CONFIG, "fp32", group) == {
        "computing": sum(parts.values()) - gradients - layer * MIB,
        "gathering": gathering * MIB,
        "reducing": gradients,
    }


@pytest.mark.parametrize("group", [sharding.Group(4), sharding.Group(1, "fsdp")])
def test_other_engines_compute_and_exchange_on_one_pool(group):
    parts = on_rank("backward", group)
    found = sharding.pools("backward", WHOLE, parts, CONFIG, "fp32", group)
    assert found == {"computing": sum(parts.values())}


@pytest.mark.parametrize(
    ("engine", "splits", "most"),
    [  # weights of 4,000 bytes, and a layer of 200 parameters
        (sharding.Group(4, "fsdp"), True, 1000 + 800),
        (sharding.Group(4, "fsdp", within=2), True, 2000 + 800),
        (sharding.Group(4, "deepspeed", zero={"stage": 3}), True, 1000 + 2 * 800 + 800),
        (sharding.Group(4, "deepspeed", zero={"stage": 2}), True, 4000),
        (sharding.Group(4, "ddp"), True, 4000),
        (sharding.Group(4, "fsdp"), False, 4000),  # such as PiSSA, computed from whole weights
    ],
)
def test_a_rank_starts_with_its_elements_and_a_layer(engine, splits, most):
    assert sharding.start_bytes(4000, CONFIG, splits, engine) == most


COPIES = [  # (group, processes on a machine, mode): bytes of weights 3200, of state 6400
    (sharding.Group(1), 1, "full", 9600),
    (sharding.Group(4), 4, "full", 9600 / 4),  # the main process copies all
    (sharding.Group(4), 2, "full", 9600 / 2),
    (sharding.Group(4, "fsdp"), 2, "full", 9600 / 4),  # each its part, on any machine
    (sharding.Group(4, "fsdp"), 2, "lora", 6400 / 4 + 3200 / 2),  # the main process has adapters
    (sharding.Group(4, "fsdp", within=2), 2, "full", 6400 / 2 + 3200 / 4),  # state: one group
    (sharding.Group(4, "fsdp", within=2), 4, "full", 6400 / 4 + 3200 / 4),
    (sharding.Group(4, "deepspeed", zero={"stage": 2}), 2, "full", 6400 / 4 + 3200 / 2),
    (sharding.Group(4, "deepspeed", zero={"stage": 3}), 2, "full", 9600 / 4),
]


@pytest.mark.parametrize(("group", "here", "mode", "expected"), COPIES)
def test_copies_of_a_checkpoint_are_on_the_machines_of_those_that_save_it(
    model, monkeypatch, group, here, mode, expected
):
    model.mode = mode
    monkeypatch.setattr(sharding, "saved_state_bytes", lambda *_: 6400)
    for behind in (True, False):
        config = SimpleNamespace(train=SimpleNamespace(**TRAIN | {"checkpoint_async": behind}))
        assert sharding.copy_bytes(config, group, here) == (expected if behind else 0)
