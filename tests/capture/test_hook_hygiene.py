"""Nothing of ours stays behind: after remove, after exceptions, after garbage collection, in copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

from saliency_reg import SaliencyRegularizer
from saliency_reg.errors import CaptureError
from tests.support.attachment import fingerprint
from tests.support.training import Net, batch, make_model, train


def test_remove() -> None:
    model, optimizer = make_model()
    before = fingerprint(model)
    regularizer = SaliencyRegularizer(model, optimizer=optimizer, feature="backbone", strength=0.1, metric="l1")
    assert fingerprint(model) != before
    regularizer.remove()
    regularizer.remove()
    assert fingerprint(model) == before
    assert not optimizer._optimizer_step_post_hooks


def test_context_manager_also_after_an_exception() -> None:
    model, _ = make_model()
    before = fingerprint(model)

    def interrupted() -> None:
        with SaliencyRegularizer(model, "heads", strength=0.1, metric="l1"):
            model(batch(0)[0])
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert fingerprint(model) == before


def test_garbage_collection() -> None:
    model, optimizer = make_model()
    before = fingerprint(model)
    regularizer = SaliencyRegularizer(model, optimizer=optimizer, strength=0.1, metric="l1")
    train(model, optimizer, range(2), regularizer)
    alive = weakref.ref(regularizer)
    del regularizer
    gc.collect()
    assert alive() is None
    assert fingerprint(model) == before
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer, range(2, 4))


def test_the_model_is_not_kept_alive_by_hooks() -> None:
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    model(batch(0)[0])
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    regularizer.remove()


class Fragile(Net):
    fail = ""

    def forward(self, x):
        feature = self.backbone(x)
        if self.fail == "before the heads":
            raise ValueError("broken input")
        outputs = {}
        for task, head in self.heads.items():
            if self.fail == task:
                raise ValueError("broken input")
            outputs[task] = head(feature)
        if self.fail == "after the heads":
            raise ValueError("broken input")
        return outputs


@pytest.mark.parametrize("place", ["before the heads", "right", "after the heads"])
def test_an_exception_in_a_forward_leaves_no_capture_and_the_next_forward_works(place: str) -> None:
    torch.manual_seed(0)
    model = Fragile()
    before = fingerprint(model)
    regularizer = SaliencyRegularizer(model, strength=1.0, metric="l1")
    model.fail = place
    with pytest.raises(ValueError, match="broken input"):
        model(batch(0)[0])
    with pytest.raises(CaptureError, match="latest forward raised an exception"):
        regularizer()
    model.fail = ""
    torch.manual_seed(1)
    model(batch(0)[0])
    found = regularizer()
    regularizer.remove()
    del model.fail
    assert fingerprint(model) == before

    with SaliencyRegularizer(model, strength=1.0, metric="l1") as fresh:
        torch.manual_seed(1)
        model(batch(0)[0])
        assert torch.equal(found, fresh())


@pytest.mark.filterwarnings("ignore:2 forwards ran before this call")
def test_an_interrupted_forward_does_not_break_the_next_ones() -> None:
    """A keyboard interrupt passes torch's own hooks for failed forwards."""

    class Interrupted(Net):
        interrupt = False

        def forward(self, x):
            outputs = {}
            feature = self.backbone(x)
            for task, head in self.heads.items():
                outputs[task] = head(feature)
                if self.interrupt:
                    raise KeyboardInterrupt
            return outputs

    torch.manual_seed(0)
    model = Interrupted().eval()
    regularizer = SaliencyRegularizer(model, strength=1.0, relations="fixed", metric="l1")
    model(batch(0)[0])
    expected = regularizer()
    model.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        model(batch(1)[0])
    model.interrupt = False
    for _ in range(3):
        model(batch(1)[0])  # not read
        model(batch(0)[0])
        assert torch.equal(regularizer(), expected)


def test_a_model_that_returns_nothing_inside_an_except_block() -> None:
    class Silent(Net):
        def forward(self, x):
            super().forward(x)

    torch.manual_seed(0)
    model = Silent()
    regularizer = SaliencyRegularizer(model, strength=1.0, metric="l1")
    try:
        raise ValueError
    except ValueError:
        model(batch(0)[0])
    assert regularizer() > 0


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.filterwarnings("ignore:the heads ran in 100 training forwards", "ignore:203 forwards ran before this call")
def test_forwards_without_a_call_leave_memory_flat() -> None:
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    for _ in range(3):
        model(batch(0)[0])
    before = tensors_alive()
    for _ in range(200):
        model(batch(0)[0])
    assert tensors_alive() == before
    regularizer()
    assert tensors_alive() < before + 20


def test_a_call_releases_the_forward() -> None:
    model, _ = make_model()
    regularizer = SaliencyRegularizer(model, strength=1.0, metric="l1")
    outputs = model(batch(0)[0])
    output = weakref.ref(outputs["left"])
    (sum(output.mean() for output in outputs.values()) + regularizer()).backward()
    del outputs
    gc.collect()
    assert output() is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "ema"])
def test_copies_of_an_attached_model_are_clean(way: str) -> None:
    model, optimizer = make_model()
    plain = fingerprint(model)
    regularizer = SaliencyRegularizer(model, strength=1.0, optimizer=optimizer, metric="l1")
    model(batch(0)[0])  # a forward that was not read: its graph must not travel
    attached = fingerprint(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = torch.optim.swa_utils.AveragedModel(model).module
    assert fingerprint(twin) == plain
    assert fingerprint(model) == attached
    regularizer()  # the original is still attached
    with SaliencyRegularizer(twin, strength=1.0, metric="l1") as second:  # and the copy can be
        twin(batch(0)[0])
        second()


def test_a_model_with_a_state_of_its_own_is_copied_its_own_way() -> None:
    class Own(Net):
        def __getstate__(self):
            return {**super().__getstate__(), "mark": 7}

    torch.manual_seed(0)
    model = Own()
    SaliencyRegularizer(model, strength=0.1, metric="l1").remove()
    regularizer = SaliencyRegularizer(model, strength=0.1, metric="l1")
    twin = copy.deepcopy(model)
    assert twin.mark == 7
    assert not twin._forward_hooks
    regularizer.remove()


def test_a_copied_regularizer_keeps_its_state_and_is_attached_to_nothing() -> None:
    model, optimizer = make_model()
    regularizer = SaliencyRegularizer(model, strength=1.0, optimizer=optimizer, metric="l1")
    train(model, optimizer, range(3), regularizer)
    for twin in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        assert torch.equal(twin.relations.matrix(), regularizer.relations.matrix())
        with pytest.raises(CaptureError, match="attached to no model"):
            twin()


def test_the_regularizer_can_be_a_part_of_the_model() -> None:
    model, optimizer = make_model()
    model.regularizer = SaliencyRegularizer(model, "heads", strength=1.0, optimizer=optimizer, metric="l1")
    train(model, optimizer, range(2), model.regularizer)
    twin = copy.deepcopy(model)
    assert not twin._forward_hooks
    twin.load_state_dict(model.state_dict())
    assert len(list(model.parameters())) == len(list(Net().parameters()))
