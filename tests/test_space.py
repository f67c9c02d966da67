"""Search spaces: choices inside ordinary torch code, the domains that they give, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Knob
from trimtab.engine.elastic import Supernet, called, sized
from trimtab.space import Choice, Depth, Heads, OneOf, Resolution, Space, Width, open_space, pieces

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS = {
    "mobile-cnn": {"images": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
    "vit": {"images": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
    "tiny-llm": {"input_ids": torch.arange(24).reshape(2, 12)},
}


@st.composite
def domains(draw: st.DrawFn) -> Domain:
    """Trees of knobs."""
    knobs: list[Knob] = []
    for i in range(draw(st.integers(1, 5))):
        when: tuple[tuple[str, frozenset[int]], ...] = ()
        if knobs and draw(st.booleans()):
            above = draw(st.sampled_from(knobs))
            places = draw(st.sets(st.integers(0, len(above.options) - 1), min_size=1))
            when = (*above.when, (above.name, frozenset(places)))
        knobs.append(Knob(f"k{i}", tuple(range(draw(st.integers(1, 3)))), when=when))
    return Domain(tuple(knobs))


@settings(max_examples=200, deadline=None)
@given(domains(), st.integers(0, 1000))
def test_a_domain_counts_what_it_holds(domain: Domain, seed: int) -> None:
    from itertools import product

    every = {domain.canonical(g) for g in product(*(range(len(k.options)) for k in domain.knobs))}
    assert domain.count() == len(every)
    rng = random.Random(seed)
    genome = domain.random(rng)
    assert genome in every and domain.canonical(genome) == genome
    assert domain.genome(domain.setting(genome)) == genome
    assert domain.mutated(genome, rng, 0.3) in every and domain.crossed(genome, domain.random(rng), rng) in every
    assert set(domain.neighbours(genome)) <= every - {genome}
    assert len(every) == 1 or domain.mutated(genome, rng, 0.3) != genome or not any(domain.active(genome))


@settings(max_examples=100, deadline=None)
@given(domains(), st.data())
def test_what_is_offered_is_a_part_of_the_domain(domain: Domain, data: st.DataObject) -> None:
    offered = {
        k.name: sorted(data.draw(st.sets(st.integers(0, len(k.options) - 1), min_size=1)))
        for k in domain.knobs
        if data.draw(st.booleans())
    }
    small, rng = domain.within(offered), random.Random(0)
    for _ in range(5):
        whole = domain.genome(small.setting(small.random(rng)))
        assert all(
            place in offered.get(k.name, [len(k.options) - 1])
            for k, place, on in zip(domain.knobs, whole, domain.active(whole), strict=True)
            if on
        )


def net(classes: int = 4) -> nn.Module:
    width = Width(4, 6, 8)
    layers: list[nn.Module] = [nn.Linear(5, width)]
    for _ in Depth(1, 2, name="deep"):
        layers += [OneOf(nn.ReLU, nn.Tanh)(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def test_outside_of_a_search_a_space_is_its_largest_network() -> None:
    assert [tuple(p.shape) for p in net().parameters() if p.dim() == 2] == [(8, 5), (8, 8), (8, 8), (4, 8)]
    assert (Choice("a", "b"), Width(1, 2), Heads(2, 4), list(Depth(1, 3)), OneOf(int, str)) == (
        *("b", 2, 4, [0, 1, 2], str),
    )


def test_choices_are_named_by_what_they_are_given_to_and_hang_on_what_they_stand_in() -> None:
    space = Space(net)
    found = {k.name: (k.options, k.kind, dict(k.when)) for k in space.domain.knobs}
    assert found == {
        "width": ((4, 6, 8), "width", {}),
        "deep": ((1, 2), "depth", {}),
        "deep.0.block": (("ReLU", "Tanh"), "block", {}),
        "deep.1.block": (("ReLU", "Tanh"), "block", {"deep": frozenset({1})}),
    }
    assert space.domain.count() == 3 * (2 + 4)
    small = space.network(space.domain.genome({"width": 4, "deep": 1, "deep.0.block": "Tanh"}))
    assert [type(m).__name__ for m in small] == ["Linear", "Tanh", "Linear", "Linear"]
    assert small[3].weight.shape == (4, 4)


def test_a_flat_list_of_layers_shares_what_the_same_line_made() -> None:
    supernet = Supernet(Space(net))
    shallow = supernet.extract(supernet.domain.genome({"width": 8, "deep": 1, "deep.0.block": "ReLU"}))
    deep = supernet.extract(supernet.domain.largest())
    assert torch.equal(shallow[3].weight, deep[5].weight), "the last layer is the same, wherever in the list it stands"
    assert torch.equal(shallow[2].weight, deep[2].weight) and not torch.equal(deep[2].weight, deep[4].weight)


def test_blocks_to_choose_from_share_nothing() -> None:
    def blocks() -> nn.Module:
        return nn.Sequential(OneOf(nn.Linear, lambda a, b: nn.Linear(a, b, bias=False), name="block")(3, 3))

    supernet = Supernet(Space(blocks))
    one, other = (supernet.extract((place,)) for place in (0, 1))
    assert one[0].bias is not None and other[0].bias is None
    assert not torch.equal(one[0].weight, other[0].weight)


def test_smaller_kernels_are_the_middles_of_larger_ones() -> None:
    def conv() -> nn.Module:
        kernel = Choice(3, 5, 7)
        return nn.Sequential(nn.Conv2d(2, Width(2, 4), kernel, padding=kernel // 2))

    supernet = Supernet(Space(conv))
    large = supernet.extract(supernet.domain.largest())[0].weight
    small = supernet.extract(supernet.domain.smallest())[0].weight
    assert torch.equal(small, large[:2, :, 2:5, 2:5])


def kernels() -> nn.Module:
    layers = []
    for _ in Depth(1, 2, name="deep"):
        kernel, width = Choice(3, 5, 7), 2 * Width(1, 2, name="wide")
        layers += [nn.Conv2d(2, width, kernel, padding=kernel // 2), nn.Conv2d(width, 2, 1)]
    return nn.Sequential(*layers)


@pytest.fixture
def turned() -> Supernet:
    """Elastic kernels with matrices that are not the identity."""
    supernet, rng = Supernet(Space(kernels), transforms=True), torch.Generator().manual_seed(0)
    for p in supernet.parameters():
        if p.dim() == 2:
            p.data += 0.1 * torch.randn(p.shape, generator=rng)
    return supernet


def test_smaller_kernels_are_matrices_times_the_middles_of_larger_ones(turned: Supernet) -> None:
    made = {n: p for n, p in turned.named_parameters() if p.dim() == 2}
    assert sorted(p.numel() for p in made.values()) == 2 * [81] + 2 * [625], "25 x 25 and 9 x 9 for each layer"
    domain = turned.domain
    setting = {"deep": 2, "deep.0.wide": 2, "deep.0.kernel": 7, "deep.1.wide": 2, "deep.1.kernel": 7}
    large = turned.extract(domain.genome(setting))[0].weight
    middle = turned.extract(domain.genome({**setting, "deep.0.kernel": 5}))[0].weight
    small = turned.extract(domain.genome({**setting, "deep.0.kernel": 3, "deep.0.wide": 1}))[0].weight
    first, second = made["0/weight/5x5"], made["0/weight/3x3"]
    assert torch.allclose(middle.flatten(2), large[:, :, 1:6, 1:6].flatten(2) @ first.T, atol=1e-6)
    assert torch.allclose(small.flatten(2), middle[:2, :, 1:4, 1:4].flatten(2) @ second.T, atol=1e-6)
    plain = Supernet(Space(kernels)).extract(domain.smallest())
    fresh = Supernet(Space(kernels), transforms=True).extract(domain.smallest())
    assert torch.equal(plain[0].weight, fresh[0].weight), "the identity at first"


def test_transformed_kernels_are_taken_out_bit_for_bit_and_pass_their_gradients_on(turned: Supernet) -> None:
    inputs, rng, taught = {"input": torch.randn(2, 2, 8, 8)}, random.Random(0), set()
    for _ in range(20):
        genome = turned.domain.random(rng)
        plain = turned.extract(genome)
        shared = turned.bound(genome)[0]
        assert torch.equal(called(shared, inputs, {}), called(plain, inputs, {}))
        assert all(type(p) is nn.Parameter and p.is_leaf for p in plain.parameters())
        assert not any(n.endswith("x5") or n.endswith("x3") for n, _ in plain.named_parameters())
        turned.zero_grad()
        called(shared, inputs, {}).square().sum().backward()
        whole = {n: p.grad.clone() for n, p in turned.named_parameters() if p.grad is not None}
        turned.zero_grad()
        module, views = turned.bound(genome, leaves=True)
        called(module, inputs, {}).square().sum().backward()
        turned.gather(genome, views)
        found = {n: p.grad for n, p in turned.named_parameters() if p.grad is not None}
        assert whole.keys() == found.keys()
        assert all(torch.allclose(whole[n], found[n], rtol=1e-4, atol=1e-4) for n in whole)
        taught |= found.keys()
    assert taught == {n for n, _ in turned.named_parameters()}


def test_pieces_are_narrowed_one_by_one() -> None:
    def fused() -> nn.Module:
        inner = Width(2, 3)
        first = pieces(nn.Linear(4, 3 * inner, bias=False), outputs=[inner] * 3)
        return nn.Sequential(first, pieces(nn.Linear(3 * inner, 5, bias=False), inputs=[inner] * 3))

    supernet = Supernet(Space(fused))
    large, small = (supernet.extract((place,)) for place in (1, 0))
    kept = [0, 1, 3, 4, 6, 7]
    assert torch.equal(small[0].weight, large[0].weight[kept])
    assert torch.equal(small[1].weight, large[1].weight[:, kept])
    module, views = supernet.bound((0,), leaves=True)
    module(torch.ones(1, 4)).sum().backward()
    supernet.gather((0,), views)
    grads = [p.grad for p in supernet.parameters()]
    assert all(g is not None for g in grads)
    assert float(grads[0][[2, 5, 8]].abs().sum()) == 0 < float(grads[0][kept].abs().sum())


def test_a_resolution_changes_the_batch_and_no_weights() -> None:
    supernet, images = Supernet(open_space("mobile-cnn:resized", size=16)), INPUTS["mobile-cnn"]
    knob = next(k for k in supernet.domain.knobs if k.kind == "resolution")
    assert knob.options == (8, 10, 12, 14, 16) and knob.name == "resolution"
    largest = supernet.domain.setting(supernet.domain.largest())
    large, small = (supernet.extract(supernet.domain.genome({**largest, knob.name: n})).eval() for n in (16, 8))
    assert all(torch.equal(a, b) for a, b in zip(large.parameters(), small.parameters(), strict=True))
    shrunk = nn.functional.interpolate(images["images"], (8, 8), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert torch.equal(called(small, images, {}), small(shrunk.contiguous(memory_format=torch.channels_last)))
        assert torch.equal(called(large, {"images": shrunk}, {}), called(large, images, {})) is False
    assert sized(small, images)["images"].shape == (2, 3, 8, 8)
    wide = sized(small, {"images": torch.zeros(1, 3, 16, 24), "other": torch.zeros(1)})
    assert wide["images"].shape == (1, 3, 8, 12) and wide["other"].shape == (1,)


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_extracted_networks_compute_bit_for_bit_what_the_shared_weights_do(name: str) -> None:
    supernet, inputs = Supernet(open_space(name)), INPUTS[name]
    rng = random.Random(0)
    with torch.no_grad():
        for _ in range(100):
            genome = supernet.domain.random(rng)
            shared = called(supernet.bound(genome)[0].eval(), inputs, {})
            plain = supernet.extract(genome).eval()
            own = called(plain, inputs, {})
            assert torch.equal(getattr(shared, "logits", shared), getattr(own, "logits", own))
    assert all(type(p) is nn.Parameter for p in plain.parameters())
    held = {p.untyped_storage().data_ptr() for p in supernet.parameters()}
    assert not held & {p.untyped_storage().data_ptr() for p in plain.parameters()}


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_gradients_of_a_sub_network_are_those_of_its_plain_twin(name: str) -> None:
    supernet, inputs = Supernet(open_space(name)), INPUTS[name]
    genome = supernet.domain.random(random.Random(1))
    plain = supernet.extract(genome).eval()
    module, views = supernet.bound(genome, leaves=True)
    for network in (plain, module.eval()):
        output = called(network, inputs, {})
        getattr(output, "logits", output).float().square().mean().backward()
    own = [p.grad for p in plain.parameters()]
    assert all(torch.allclose(a, v.grad, atol=1e-7) for a, v in zip(own, views, strict=True))
    supernet.gather(genome, views)
    total = sum(float(p.grad.double().sum()) for p in supernet.parameters() if p.grad is not None)
    assert total == pytest.approx(sum(float(g.double().sum()) for g in own), abs=1e-5)


def test_switching_makes_nothing_new() -> None:
    supernet = Supernet(open_space("vit"))
    one, other = supernet.domain.smallest(), supernet.domain.largest()
    modules = [supernet.bound(genome)[0] for genome in (one, other, one, other)]
    assert modules[0] is modules[2] and modules[1] is modules[3]
    held = {p.untyped_storage().data_ptr() for p in supernet.parameters()}
    assert {t.untyped_storage().data_ptr() for m in modules for t in m.parameters()} <= held


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_sorting_keeps_the_largest_network_and_puts_strong_channels_first(name: str) -> None:
    supernet, inputs = Supernet(open_space(name)), INPUTS[name]
    largest, smallest = supernet.domain.largest(), supernet.domain.smallest()

    def outputs(genome: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            output = called(supernet.extract(genome).eval(), inputs, {})
        return getattr(output, "logits", output)

    before, small = outputs(largest), outputs(smallest)
    assert supernet.sort({k: v[:1] for k, v in inputs.items()}) > 0
    assert torch.allclose(outputs(largest), before, atol=1e-4)
    assert not torch.equal(outputs(smallest), small)
    assert supernet.sort({k: v[:1] for k, v in inputs.items()}) > 0
    assert torch.allclose(outputs(largest), before, atol=1e-4)


# ---- refusals


def test_spaces_that_cannot_be(tmp_path: Path) -> None:
    def refused(function: object, *words: str) -> None:
        with pytest.raises(UserError) as error:
            Supernet(Space(function)).network(tuple(0 for _ in Space(function).domain.knobs))  # type: ignore[arg-type]
        assert all(word in str(error.value) for word in words), str(error.value)

    refused(lambda: nn.Linear(2, 2), "no choices")
    refused(lambda: Width(2, 4), "int", "nn.Module")
    refused(lambda: nn.Linear(2, Width(4, 2)), "Width(4, 2)", "larger")
    refused(lambda: nn.Linear(2, len(list(Depth(2, 1)))), "Depth(2, 1)")
    refused(lambda: nn.Sequential(nn.Linear(2, Width(2, 3)), 3), "fails at", "TypeError")
    template = nn.Linear(2, 2)

    def copied() -> nn.Module:
        import copy

        return nn.Sequential(nn.Linear(2, Width(2, 3)), copy.deepcopy(template))

    refused(copied, "copying")

    def uneven() -> nn.Module:
        width = Width(2, 3)
        return nn.Sequential(nn.Linear(2, 6 // width), nn.Linear(6 // width, 2))

    refused(uneven, "0.weight", "do not fit")
    refused(lambda: nn.Linear(2, Resolution(8, 4)), "Resolution(8, 4)", "larger")
    refused(lambda: nn.Linear(Resolution(4, 8), Resolution(4, 16)), "of 8 and of 16 pixels", "one Resolution")
    text = Supernet(Space(lambda: nn.Linear(2, 0 * Resolution(4, 8) + 2)))
    with pytest.raises(UserError, match=r"for images .* the inputs are input \[1, 2\]"):
        called(text.extract((0,)), {"input": torch.zeros(1, 2)}, {})
    with pytest.raises(UserError, match="no space 'mobil-cnn'"):
        open_space("mobil-cnn")
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\nfrom trimtab.space import Width\n\n"
        "def network():\n    return nn.Linear(2, Width(2, 4))\n"
    )
    assert open_space(str(file)).domain.count() == 2
    file.write_text("raise RuntimeError('no')\n")
    with pytest.raises(UserError, match="cannot be opened: RuntimeError: no"):
        open_space(str(file))
