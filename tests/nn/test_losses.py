"""The loss modules against torch's: state dicts, values and gradients."""

import pytest
import torch
from torch import nn

from liger_trainer.nn import LigerCrossEntropyLoss, LigerLinearCrossEntropyLoss

CLASSES, WIDTH = 11, 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHT = torch.rand(CLASSES, generator=torch.Generator().manual_seed(2)).to(DEVICE)
OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "weight": WEIGHT},
    {"weight": WEIGHT, "ignore_index": 3},
]


def make(shape, ignore_index=-100):
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    labels = torch.randint(CLASSES, (shape[0], *shape[2:]) if len(shape) > 1 else (), device=DEVICE)
    if labels.dim():
        labels[0] = ignore_index
    return x, labels


def assert_same(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs)
    grads = (torch.autograd.grad(loss.sum(), leaves, retain_graph=True) for loss in (ours, theirs))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o))
@pytest.mark.parametrize("shape", [(CLASSES,), (5, CLASSES), (3, CLASSES, 2), (2, CLASSES, 2, 3)], ids=str)
def test_cross_entropy_is_torchs(shape, options):
    x, labels = make(shape, options.get("ignore_index", -100))
    ours, theirs = (cls(**options).to(DEVICE) for cls in (LigerCrossEntropyLoss, nn.CrossEntropyLoss))
    assert isinstance(ours, nn.CrossEntropyLoss)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours(x, labels), theirs(x, labels), [x])


@pytest.mark.triton
def test_on_the_kernels():
    x, labels = make((4, CLASSES))
    assert_same(LigerCrossEntropyLoss()(x, labels), nn.CrossEntropyLoss()(x, labels), [x])


def plain_linear(loss, x, labels, options):
    return nn.CrossEntropyLoss(**options)(loss.linear(x), labels)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o))
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_is_torchs(bias, options):
    x, labels = make((5, WIDTH), options.get("ignore_index", -100))
    loss = LigerLinearCrossEntropyLoss(WIDTH, CLASSES, bias, device=DEVICE, **options)
    leaves = [x, *loss.parameters()]
    assert_same(loss(x, labels), plain_linear(loss, x, labels, options), leaves)
    rows = loss(x.view(1, 5, WIDTH), labels.view(1, 5))
    torch.testing.assert_close(rows.flatten(), loss(x, labels).flatten())


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch before 2.13")
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_state_dicts_go_both_ways(weight):
    theirs = nn.LinearCrossEntropyLoss(WIDTH, CLASSES, bias=True, weight=weight, device=DEVICE)
    ours = LigerLinearCrossEntropyLoss(WIDTH, CLASSES, bias=True, weight=weight, device=DEVICE)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x, labels = make((5, WIDTH))
    torch.testing.assert_close(ours(x, labels), theirs(x, labels))


def test_options_num_items_and_a_shared_weight():
    x, labels = make((5, WIDTH))
    head = nn.Linear(WIDTH, CLASSES, bias=False).to(DEVICE)
    settings = {"z_loss": 0.01, "softcap": 2.0, "logit_scale": 1.5}
    loss = LigerLinearCrossEntropyLoss(WIDTH, CLASSES, device=DEVICE, logits_budget_mib=1, low_memory=True, **settings)
    loss.linear.weight = head.weight
    ours = loss(x, labels, num_items=7)
    assert_same(ours, LigerCrossEntropyLoss(**settings)(head(x), labels, num_items=7), [x, head.weight])


@pytest.mark.parametrize(
    ("make_loss", "error", "message"),
    [
        (lambda: LigerCrossEntropyLoss(reduction="batchmean"), ValueError, "reduction: got 'batchmean'"),
        (lambda: LigerLinearCrossEntropyLoss(2, 3, reduction="all"), ValueError, "reduction: got 'all'"),
        (lambda: LigerLinearCrossEntropyLoss(2, 3, budget=1), TypeError, "LigerLinearCrossEntropyLoss: got an"),
        (lambda: LigerCrossEntropyLoss()(torch.zeros(2, 3), torch.zeros(2, 3)), TypeError, "labels: got dtype"),
        (lambda: LigerCrossEntropyLoss()(torch.zeros(2, 3), torch.zeros(3).long()), ValueError, "labels: got shape"),
    ],
)
def test_wrong_arguments(make_loss, error, message):
    with pytest.raises(error, match=message):
        make_loss()
