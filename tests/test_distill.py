"""Losses of distillation: what they are made of, and what is kept of a teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from battery import METHODS, seeded
from torch.nn import functional

from trimtab.core.errors import UserError
from trimtab.core.method import Objective
from trimtab.distill.kd import KD
from trimtab.distill.nkd import NKD
from trimtab.distill.tinyvit import TinyViT
from trimtab.distill.uskd import USKD
from trimtab.parts.soft_targets import Kept, others, spread_out
from trimtab.tasks.students import School

OBJECTIVES = {name: cls for name, cls in METHODS.items() if issubclass(cls, Objective)}
LABELS = torch.tensor([0, 2, 4, 1, 3, 3])


def logits(seed: int) -> Any:
    return torch.randn(6, 5, generator=seeded(seed)) * 2


def settings(name: str) -> dict[str, Any]:
    return {"k": 3} if name == "tinyvit" else {}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_is_a_finite_number_with_a_gradient_for_the_student_alone(name: str) -> None:
    student, teacher, weak = (logits(i).requires_grad_(True) for i in range(3))
    method: Any = OBJECTIVES[name](**settings(name))
    given = {"weak": weak} if "weak" in method.needs() else {}
    loss = method.loss(student, teacher, LABELS, **given)
    assert loss.dim() == 0 and bool(loss.isfinite())
    loss.backward()
    assert student.grad is not None and bool(student.grad.isfinite().all()) and teacher.grad is None
    again = method.loss(student, teacher, LABELS, **given)
    assert torch.equal(again, loss)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    moved = method.loss(student[order], teacher[order], LABELS[order], **{k: v[order] for k, v in given.items()})
    assert torch.allclose(moved, loss), "the order of the items changes nothing"


def test_classic_distillation_splits_into_target_and_others() -> None:
    student, teacher = logits(0), logits(1)
    whole = -(teacher.softmax(1) * student.log_softmax(1)).sum(1)
    mine = teacher.softmax(1).gather(1, LABELS[:, None])[:, 0]
    log_s = student.log_softmax(1).gather(1, LABELS[:, None])[:, 0]
    rest = -(others(teacher, LABELS).softmax(1) * others(student, LABELS).log_softmax(1)).sum(1)
    joint = -mine * log_s - (1 - mine) * (1 - log_s.exp()).log() + (1 - mine) * rest
    assert torch.allclose(whole, joint, atol=1e-5), "NKD's parts are those of KD"
    wanted = functional.cross_entropy(student, LABELS) - (mine * log_s).mean() + 1.5 * rest.mean()
    assert torch.allclose(NKD().loss(student, teacher, LABELS), wanted, atol=1e-5)


def test_kd_is_zero_at_the_teacher_and_has_the_gradient_of_softened_outputs() -> None:
    student, teacher = logits(0).requires_grad_(True), logits(1)
    assert float(KD(1.0, 3.0).loss(teacher, teacher, LABELS)) == pytest.approx(0, abs=1e-6)
    KD(1.0, 3.0).loss(student, teacher, LABELS).backward()
    wanted = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / len(LABELS)
    assert torch.allclose(student.grad, wanted.detach(), atol=1e-6)


def test_soft_labels_of_a_network_s_own_follow_the_rank_of_what_it_says() -> None:
    student = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    label, weak = torch.tensor([1]), torch.tensor([[0.0, 0.0, 0.0, 9.0]])
    zipf = torch.tensor([1 / 2, 1 / 3, 1.0])  # the weak head puts the last class first
    zipf = zipf / zipf.sum()
    log_s = student.log_softmax(1)[0, 1]
    apart = -(zipf * student[:, [0, 2, 3]].log_softmax(1)).sum()
    own = functional.cross_entropy(weak, label, label_smoothing=0.1)
    wanted = -2 * log_s + 0.1 * apart + 0.005 * own  # of one item, the soft target is 1
    assert torch.allclose(USKD().loss(student, None, label, weak=weak), wanted)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_what_is_kept_of_a_teacher_gives_the_loss_of_the_teacher_itself(k: int) -> None:
    student, teacher = logits(0), logits(1)
    kept = Kept.of(teacher, k, torch.arange(6))
    assert kept.nbytes == 6 * (2 * k + 2 * k + 4)
    assert torch.allclose(kept.logits(torch.arange(6)).softmax(1).sum(1), torch.ones(6), atol=1e-3)
    fresh = TinyViT(k).loss(student, teacher, LABELS)
    assert torch.allclose(TinyViT(k).loss(student, kept.logits(torch.arange(6)), LABELS), fresh, rtol=2e-3)
    if k == 5:
        assert torch.allclose(fresh, -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean(), atol=1e-5)


def test_what_is_not_kept_is_shared_evenly() -> None:
    dense = spread_out(torch.tensor([[0.6]]), torch.tensor([[1]]), 5)
    assert torch.allclose(dense, torch.tensor([[0.1, 0.6, 0.1, 0.1, 0.1]]))


@pytest.mark.parametrize(
    ("method", "teacher", "said"),
    [
        (KD(), None, "NoneType"),
        (KD(weight=2.0), logits(1), "weight=2.0"),
        (NKD(temperature=0.0), logits(1), "temperature=0.0"),
        (TinyViT(k=9), logits(1), "9 largest of 5"),
        (TinyViT(), None, "without a teacher"),
    ],
)
def test_what_makes_no_sense_is_refused(method: Any, teacher: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        method.loss(logits(0), teacher, LABELS)


def test_two_students_of_one_seed_are_the_same() -> None:
    small = School(images=24, epochs=2, batch=12)
    assert small.teach(USKD()).accuracy == School(images=24, epochs=2, batch=12).teach(USKD()).accuracy
