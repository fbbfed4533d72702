"""What the backward pass needs, kept on the host: by stand-ins for a GPU's stream, and on one."""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from dpo import offload, rehearsal
from dpo.adapters import Adapter, add_adapter
from dpo.batching import collate
from dpo.config import RunConfig
from dpo.device import choose_device
from dpo.errors import InputError
from dpo.log_probs import completion_log_probs
from dpo.memory_tracker import ACTIVATIONS
from dpo.models import Decoder
from dpo.models.transforms import RECOMPUTED, compile_blocks, recompute
from dpo.offload import CudaLane, Lane, offload_activations
from dpo.prepare import prepare_policy
from dpo.rehearsal import Rows, peak, rehearse_step
from dpo.tokenization import TokenizedPairs
from dpo.train_config import Recompute, TrainConfig
from dpo.trainer import Trainer

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]


@pytest.fixture(autouse=True)
def tiny_tensors_are_worth_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)


@dataclass
class LateLane:
    """Copies nothing before it is waited for, as a stream may; then from what is still there."""

    copied: int = 0
    tasks: list[tuple[Tensor, weakref.ref[Tensor]]] = field(default_factory=list)

    def follow(self) -> None:
        pass

    def to_host(self, source: Tensor) -> Tensor:
        self.copied += source.nbytes
        return self._later(source)

    def to_device(self, source: Tensor) -> Tensor:
        return self._later(source)

    def mark(self) -> Callable[[], None]:
        count = len(self.tasks)

        def wait() -> None:
            for target, source in self.tasks[:count]:
                if (found := source()) is not None:
                    target.copy_(found)
                else:
                    target.fill_(math.nan)  # its memory is something else by now
            del self.tasks[:count]

        return wait

    def _later(self, source: Tensor) -> Tensor:
        target = torch.full_like(source, math.nan if source.is_floating_point() else -1)
        self.tasks.append((target, weakref.ref(source)))
        return target


def gradients(model: Decoder, pairs: TokenizedPairs) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        total = completion_log_probs(model, collate(list(pairs)).texts).log_probs.sum()
    total.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("part", [None, *RECOMPUTED])
def test_gradients_are_bit_equal(
    make_model: MakeModel, make_pairs: MakePairs, part: Recompute | None, adapted: bool
) -> None:
    found, lane = [], LateLane()
    for goes in (False, True):
        model = make_model(num_hidden_layers=4)
        if adapted:
            add_adapter(model, Adapter(3))
        if part is not None:
            recompute(model, part)
        if goes:
            offload_activations(model, lane)
        found.append(gradients(model, make_pairs()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert lane.copied > 0


@pytest.mark.slow
@pytest.mark.parametrize("part", [None, *RECOMPUTED])
def test_gradients_of_compiled_blocks_are_bit_equal(
    make_model: MakeModel, make_pairs: MakePairs, part: Recompute | None
) -> None:
    torch._dynamo.reset()  # what was compiled before counts against the same limit
    found, lane = [], LateLane()
    for goes in (False, True):
        model = make_model(num_hidden_layers=3)
        compile_blocks(model)
        if part is not None:
            recompute(model, part)
        if goes:
            offload_activations(model, lane)
        found.append(gradients(model, make_pairs()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert lane.copied > 0


@pytest.mark.parametrize("part", [None, "layer"])
def test_what_goes_are_activations_of_all_blocks_but_the_last_each_once(
    make_model: MakeModel,
    make_pairs: MakePairs,
    bytes_kept: Callable[..., int],
    part: Recompute | None,
) -> None:
    pairs, copied, kept = make_pairs(), [], []
    stream = collate(list(pairs)).texts.stream
    for layers in (2, 3):
        model, lane = make_model(num_hidden_layers=layers), LateLane()
        if part is not None:
            recompute(model, part)
        kept.append(bytes_kept(lambda model=model: model(stream), beside=[*model.parameters()]))
        offload_activations(model, lane)
        model(stream).sum().backward()
        copied.append(lane.copied)
    assert copied[1] == 2 * copied[0]
    assert copied[0] == kept[1] - kept[0]


@pytest.mark.slow
def test_memory_of_the_device_does_not_grow_with_the_layers(
    make_model: MakeModel, make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainConfig(batch_size=8, steps=2, offload_activations=True)
    config = RunConfig(model="M", data="D", out="O", train=train)
    rows = Rows(make_pairs(), range(8))
    three, six = (
        rehearse_step(config, make_model(num_hidden_layers=layers).config, rows)
        for layers in (3, 6)
    )
    assert three["head"][ACTIVATIONS] == six["head"][ACTIVATIONS]
    kept = replace(config, train=replace(train, offload_activations=False))
    peaks = rehearse_step(kept, make_model(num_hidden_layers=6).config, rows)
    assert six["head"][ACTIVATIONS] < peaks["head"][ACTIVATIONS] / 3
    monkeypatch.setattr(rehearsal, "over_layers", lambda model, rehearse, **_: rehearse(model))
    whole = rehearse_step(config, make_model(num_hidden_layers=6).config, rows)
    assert sum(peak(whole).values()) == sum(peak(six).values())


def test_pass_without_gradients_takes_nothing_away(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    model, lane = make_model(num_hidden_layers=3), LateLane()
    offload_activations(model, lane)
    with torch.no_grad():
        model(collate(list(make_pairs())).texts.stream)
    assert lane.copied == 0


def test_training_goes_on_after_a_pass_that_broke_off(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    plain, model = (make_model(num_hidden_layers=4) for _ in range(2))
    offload_activations(model, LateLane())
    stream = collate(list(make_pairs())).texts.stream
    last = model.model.layers[2]
    usual, last.forward = last.forward, lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(stream)
    last.forward = usual
    found, expected = gradients(model, make_pairs()), gradients(plain, make_pairs())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_trained_weights_are_bit_equal(make_model: MakeModel, make_pairs: MakePairs) -> None:
    trained = []
    for goes in (False, True):
        model = make_model(num_hidden_layers=3)
        if goes:
            offload_activations(model, LateLane())
        config = TrainConfig(batch_size=4, micro_batch_size=2, steps=3, learning_rate=5e-3)
        Trainer(model, make_pairs(), config).train()
        trained.append([*model.parameters()])
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)


def test_it_is_refused_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=r"train\.offload_activations needs a GPU"):
        TrainConfig(offload_activations=True, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"train\.offload_activations needs a GPU"):
        choose_device(TrainConfig(offload_activations=True))


def test_run_asks_for_it_by_the_option(make_model: MakeModel, make_pairs: MakePairs) -> None:
    lane = LateLane()
    model = make_model(num_hidden_layers=3)
    train = TrainConfig(offload_activations=True, recompute="layer")
    prepare_policy(model, RunConfig(model="M", data="D", out="O", train=train), lane)
    gradients(model, make_pairs())
    assert lane.copied > 0


def test_lane_of_cuda_orders_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for torch.cuda that writes down what is asked of it."""
    asked: list[str] = []

    class Stream:
        device = torch.device("cpu")  # where the stand-in copies to

        def __init__(self, _device: object = None) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            asked.append("copies wait for computing")

        def wait_event(self, event: object) -> None:
            asked.append(f"computing waits for {event}")

        def record_event(self) -> str:
            asked.append("mark")
            return "mark"

    class Inside:
        def __init__(self, _stream: object) -> None:
            pass

        def __enter__(self) -> None:
            asked.append("in the lane")

        def __exit__(self, *_: object) -> None:
            asked.append("out")

    def empty_like(source: Tensor, *, device: str, pin_memory: bool) -> Tensor:
        assert (device, pin_memory) == ("cpu", True)
        asked.append("pinned")
        return torch.zeros(source.shape)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    lane: Lane = CudaLane(torch.device("cuda"))
    lane.follow()
    host = lane.to_host(torch.ones(3))
    wait = lane.mark()
    wait()
    assert host.tolist() == lane.to_device(host).tolist() == [1, 1, 1]
    assert asked == [
        "copies wait for computing", "in the lane", "pinned", "out", "mark",
        "computing waits for mark", "in the lane", "out",
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("part", [None, *RECOMPUTED])
def test_gradients_on_cuda_are_equal_and_memory_is_less(
    make_model: MakeModel, make_pairs: MakePairs, part: Recompute | None
) -> None:
    stream = collate(list(make_pairs(256, longest=64))).texts.stream.to(torch.device("cuda"))
    found, peaks = [], []
    for goes in (False, True):
        model = make_model(num_hidden_layers=8, hidden_size=64, intermediate_size=512).cuda()
        if part is not None:
            recompute(model, part)
        if goes:
            offload_activations(model, CudaLane(torch.device("cuda")))
        for _ in range(2):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                model(stream).sum().backward()
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):  # the sums of some kernels are in any order
        torch.testing.assert_close(one, other, rtol=0, atol=0.01 * other.abs().max().item())
    assert peaks[1] < peaks[0]


def test_policy_is_prepared_without_a_gpu_where_nothing_is_run(make_model: MakeModel) -> None:
    """As an export does, and the check of names before a run."""
    train = TrainConfig(offload_activations=True)
    config = RunConfig(model="M", data="D", out="O", train=train)
    prepare_policy(make_model(), config)
