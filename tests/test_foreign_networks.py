"""Other people's networks: kept activations, constants, state, numbers read off shapes."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions, nn
from torch.nn import functional as F

from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.allocation import make_plan
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.rules import _runs
from tdmpc_prune.pruning.surgery import SurgeryError, commit
from tests.test_groups import cut, one
from tests.test_surgery import make_plan as plan_of


class Net(nn.Module):
    """`body`, what a test does with its output and the module, `head`."""

    def __init__(self, between=lambda self, h: h, width=16):
        super().__init__()
        self.body, self.head = nn.Linear(5, width), nn.Linear(width, 2)
        self.between = between

    def forward(self, x):
        return self.head(self.between(self, torch.relu(self.body(x))))


# --- Kept activations ---------------------------------------------------------------------------


def keep_plainly(net, h):
    net.kept = h
    return h


def keep_nested(net, h):
    net.kept = {"distribution": [distributions.Normal(h, h.exp())], "pair": (h, h * 2)}
    return h


@pytest.mark.parametrize("keep", [keep_plainly, keep_nested])
def test_a_module_that_keeps_an_activation_can_be_traced_and_cut(keep):
    net = Net(keep)
    net(torch.randn(3, 5))
    kept = net.kept
    cut(one(net), {"body": [0, 3]})
    assert net.kept is kept  # the user's own is left alone
    assert net(torch.zeros(3, 5)).shape == (3, 2) and net.body.out_features == 14


def test_the_old_weight_norm_is_traced_and_its_outputs_are_cut_exactly():
    with pytest.warns(FutureWarning):
        first = nn.utils.weight_norm(nn.Linear(5, 16))
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(3, 5)
    hidden = net[0](x).relu().detach()
    cut(one(net), {"0": [2, 9]})
    kept = [unit for unit in range(16) if unit not in (2, 9)]
    torch.testing.assert_close(net[:2](x), hidden[:, kept])
    assert net[0].out_features == 14


def test_what_cannot_be_copied_is_said():
    net = Net()
    net.stream = (part for part in [1])  # a generator
    with pytest.raises(UserError, match=r"cannot be copied: .*generator") as error:
        find_groups(one(net))
    assert "\n" not in str(error.value)


# --- Tensors that have data, beside those that have none ------------------------------------


@pytest.mark.parametrize(
    "between",
    [
        lambda net, h: h + torch.zeros(len(h), 1),
        lambda net, h: h * torch.tensor(0.5),
        lambda net, h: h * net.scale,
        lambda net, h: torch.where(torch.rand(len(h), 1) < 2, h, 0 * h),
        lambda net, h: h * float(net.scale),
        lambda net, h: h if net.flag else -h,
        lambda net, h: h.to(net.scale.device),
        lambda net, h: h * torch.tensor([2.0]).item(),
        lambda net, h: h + distributions.Normal(h, h.exp()).log_prob(h),
        lambda net, h: h + distributions.Normal(h, h.exp(), validate_args=True).log_prob(h),
        lambda net, h: h + distributions.Normal(h.mean(-1, keepdim=True), 1.0).rsample(),
    ],
)
def test_constants_of_the_program_meet_tensors_without_data(between):
    net = Net(between)
    net.scale, net.flag = torch.tensor(3.0), torch.tensor(True)
    validated, state = distributions.Distribution._validate_args, torch.random.get_rng_state()
    left = cut(one(net), {"body": [1]})
    assert left.widths == {"body": 15}
    assert distributions.Distribution._validate_args == validated
    assert torch.equal(torch.random.get_rng_state(), state)  # training goes on as it would have


def test_a_whole_row_of_constants_keeps_the_width_and_says_so():
    net = Net(lambda net, h: h + torch.zeros(3, 16))
    structure = find_groups(one(net))
    assert structure.widths == {}
    assert "aten.add.Tensor in network 'model' ties it to a tensor" in structure.table()
    assert "made inside forward" in structure.table()
    net = Net(lambda net, h: h * net.row)
    net.row = torch.ones(16)
    assert find_groups(one(net)).widths == {}


@pytest.mark.parametrize(
    ("between", "what"),
    [
        (lambda h: h if h.sum() > 0 else -h, "item"),
        (lambda h: h * h.max().item(), "item"),
        (lambda h: h * float(h.detach().numpy().sum()), "numpy"),
        (lambda h: h[h > 0].sum() + h, ""),
        (lambda h: torch.zeros(3, 16).tolist() and h * len(h.tolist()), "tolist"),
        (lambda h: h @ torch.zeros(3, 3), "reduction dim"),
        (lambda h: [][1], "IndexError"),
        (lambda h: exec("assert False"), "AssertionError"),
    ],
)
def test_what_needs_values_is_one_line_that_names_the_module(between, what):
    class Bad(nn.Module):
        def forward(self, h):
            return between(h)

    net = nn.Sequential(nn.Linear(5, 16), nn.Sequential(nn.ReLU(), Bad()), nn.Linear(16, 2))
    validated = distributions.Distribution._validate_args
    with pytest.raises(UserError, match=what) as error:
        find_groups(one(net))
    assert "'1.1'" in str(error.value) and "\n" not in str(error.value)
    assert distributions.Distribution._validate_args == validated


# --- Widths in attributes -------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 5}])
def test_widths_of_torchs_attention_stay_and_those_beside_it_are_cut(sizes):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 16)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **sizes)
            self.feed = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 2))

        def forward(self, x):
            h = self.inner(x)
            seen = x if sizes else h
            return self.feed(h + self.attention(h, seen, seen)[0])

    net = Attending()
    ties = one(net, shape=(3, 7, 5))
    structure = find_groups(ties)
    assert structure.widths == {"feed.0": 12}
    assert "'inner' (16 units): nn.MultiheadAttention 'attention' keeps it" in structure.table()
    cut(ties, {"feed.0": [0]})
    assert net(torch.randn(2, 7, 5)).shape == (2, 7, 2)


def test_a_transformer_layer_is_cut_where_it_can_be():
    net = nn.Sequential(nn.Linear(5, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
    cut(one(net, shape=(3, 7, 5)), {"1.linear1": [*range(10)]})
    assert net(torch.randn(2, 7, 5)).shape == (2, 7, 16)
    assert net.eval()(torch.randn(2, 7, 5)).shape == (2, 7, 16)


# --- Sizes that enter the arithmetic ------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, weigh):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(5, 12)
        self.out, self.weigh = nn.Linear(12, 2), weigh

    def forward(self, x):
        return self.out(self.weigh(self.q(x), self.k(x), self.v(x)))


@pytest.mark.parametrize(
    "weigh",
    [
        lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT * k.size(-1) ** -0.5).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT / torch.tensor(q.shape[-1]).sqrt()).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT / torch.full((1, 1), q.shape[-1] * 1.0)).softmax(-1) @ v,
        lambda q, k, v: torch.add(q @ k.mT, q @ k.mT, alpha=1 / len(q[0, 0])).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT / (q.shape[-1] // 8)).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT / math.log2(q.shape[-1])).softmax(-1) @ v,
        lambda q, k, v: ((q * k).sum(-1, True) / q.shape[-1]).sigmoid() * v,
        lambda q, k, v: (q @ k.mT if q.shape[-1] > 20 else 2 * q @ k.mT).softmax(-1) @ v,
        F.scaled_dot_product_attention,
    ],
)
def test_a_size_that_enters_the_arithmetic_keeps_its_width_and_is_named(weigh):
    net = Attention(weigh)
    ties = one(net, shape=(3, 7, 5))
    structure = find_groups(ties)
    assert structure.widths == {"v": 12}
    (why,) = [line for line in structure.why_fixed() if line.startswith("'q'")]
    assert "its size" in why and "network 'model'" in why
    left = cut(ties, {"v": [0, 5]})
    assert left.widths == {"v": 10}
    assert left.table() == find_groups(ties).table()  # what was fixed stays so, for the same reason


@pytest.mark.parametrize(
    "weigh",
    [
        lambda q, k, v: (q @ k.mT / 4).softmax(-1) @ v,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.25),
        lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-2])).softmax(-1) @ v,  # the time stays
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v + 0 * random.random(),  # nothing to do with it
    ],
)
def test_a_number_that_is_kept_lets_the_width_be_cut(weigh):
    net = Attention(weigh)
    ties, x = one(net, shape=(3, 7, 5)), torch.randn(2, 7, 5)
    with torch.no_grad():
        for part in (net.q, net.k):  # units that carry nothing
            part.weight[[0, 7]] = part.bias[[0, 7]] = 0
    before = net(x)
    left = cut(ties, {"q+k": [0, 7]})
    assert left.widths == {"q+k": 14, "v": 12}
    torch.testing.assert_close(net(x), before)


def test_a_number_that_was_set_anew_before_the_cut_says_nothing():
    net = Net(lambda net, h: h * net.temperature)
    net.temperature = 1.0
    ties = one(net)
    structure = find_groups(ties)
    net.temperature = 0.5
    assert commit(plan_of(structure, {"body": [1]}), structure, ties).widths == {"body": 15}


def test_a_number_that_the_cut_changes_is_seen_whatever_was_set_before():
    net = Net(lambda net, h: h * net.temperature * (1.0 if h.shape[-1] >= 15 else 2.0))
    net.temperature = 1.0
    ties = one(net)
    structure = find_groups(ties)
    net.temperature = 0.5
    with pytest.raises(SurgeryError, match="another function: its size enters the arithmetic"):
        commit(plan_of(structure, {"body": [1, 2]}), structure, ties)
    assert commit(plan_of(structure, {"body": [1]}), structure, ties).widths == {"body": 15}


# --- Nothing to cut -------------------------------------------------------------------------


class Cell(nn.Module):
    """A recurrent network whose state starts as fresh zeros."""

    def __init__(self):
        super().__init__()
        self.inputs, self.state, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = torch.zeros(len(x), 8)
        for step in range(3):
            h = torch.tanh(self.inputs(x[:, step]) + self.state(h))
        return self.out(h)


def test_state_that_starts_as_fresh_zeros_is_not_passed_over_in_silence():
    structure = find_groups(one(Cell(), shape=(3, 4, 5)))
    assert structure.widths == {}
    assert "There is nothing to cut" in structure.table()
    (why,) = [line for line in structure.why_fixed() if line.startswith("'state'")]
    assert "a tensor made inside forward" in why and "aten.addmm" in why
    beside = nn.Sequential(Cell(), nn.Linear(2, 9), nn.Linear(9, 2))
    structure = find_groups(one(beside, shape=(3, 4, 5)))
    assert structure.widths == {"1": 9, "0.out": 2}
    assert "Widths that stay as they are" in structure.table() and "'0.state'" in structure.table()


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell])
def test_torchs_cells_say_why_they_stay(cell):
    structure = find_groups(one(cell(5, 8)))
    assert structure.widths == {} and structure.why_fixed()


def test_a_network_without_groups_says_so_when_it_is_to_be_pruned():
    structure = find_groups(one(nn.Sequential(nn.Linear(5, 2))))
    assert "There is nothing to cut" in structure.table()
    with pytest.raises(UserError, match=r"nothing to cut.*'0' .2 units.: it leaves") as error:
        make_plan(structure, torch.zeros(0).numpy(), PruneConfig(), 0.5, structure.parameters())
    assert "\n" not in str(error.value)


# --- Sizes of zero --------------------------------------------------------------------------

size = st.integers(0, 4)


@settings(max_examples=200, deadline=2000)
@given(st.lists(size, max_size=4), st.data())
def test_views_are_taken_apart_whatever_the_sizes(old, data):
    """Runs cover the dimensions in order, and hold equally many elements."""
    count = math.prod(old)
    if count == 0:
        new = data.draw(st.lists(size, min_size=1, max_size=4).filter(lambda s: 0 in s))
    else:
        new = data.draw(st.permutations([*old, 1, 1]))
    runs = list(_runs(old, list(new)))
    for side, sizes in enumerate((old, list(new))):
        covered = [d for run in runs for d in run[side]]
        assert covered == list(range(len(covered)))
        assert all(sizes[d] == 1 for d in range(len(covered), len(sizes)))
    for before, after in runs:
        assert math.prod(old[d] for d in before) == math.prod(new[d] for d in after)


def test_an_empty_batch_is_traced_like_a_full_one():
    net = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Unflatten(-1, (-1, 2)), nn.Flatten(-2))
    net.append(nn.Linear(8, 2))
    for shape in ((2, 0, 5), (0, 5), (0, 3, 5)):
        assert find_groups(one(net, shape=shape)).widths == find_groups(one(net)).widths
