"""The laws, on every model of the zoo: sums conserved, devices agree, and a model is left as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from conservation import conserved
from flopprof import FlopCounter, count
from flopprof.profile import Profile
from zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs


def by_module(profile: Profile) -> dict[str, dict[str, int]]:
    return {phase: profile.by_module(phase) for phase in ("forward", "backward")}


def to_meta(tree: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), tree)


@pytest.mark.parametrize("name", ZOO)
def test_sums_are_conserved_and_meta_counts_as_cpu_does(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.eval()
    on_cpu = conserved(count(model, *inputs, backward=True))
    on_meta = conserved(count(copy.deepcopy(model).to("meta"), *to_meta(inputs), backward=True))
    assert on_cpu.exact
    assert on_meta.exact
    assert on_cpu.model_flops > 0
    assert by_module(on_meta) == by_module(on_cpu)
    assert on_meta.causal_flops == on_cpu.causal_flops


@pytest.mark.parametrize("name", ZOO)
def test_forward_is_the_same_with_and_without_gradients(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.eval()
    expected = count(model, *inputs).forward_flops
    with torch.no_grad():
        assert count(model, *inputs).forward_flops == expected
    with torch.inference_mode():
        assert count(model, *inputs).forward_flops == expected


def results(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    output = model(*inputs)
    leaves = [leaf for leaf in tree_leaves(dict(output) if hasattr(output, "keys") else output) if leaf is not None]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    sum(leaf.float().sum() for leaf in tensors if leaf.requires_grad).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return [*(leaf.detach() for leaf in tensors), *gradients]


@pytest.mark.parametrize("name", ZOO)
def test_results_are_bitwise_those_without_the_counter(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    twin = copy.deepcopy(model)
    bare = results(twin, inputs)
    with FlopCounter(model):
        counted = results(model, inputs)
    assert len(bare) == len(counted) > 0
    assert all(torch.equal(a, b) for a, b in zip(bare, counted, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_count_leaves_the_model_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.train()
    state = copy.deepcopy(model.state_dict())
    attributes = {fqn: set(vars(module)) for fqn, module in model.named_modules()}
    random_state = torch.get_rng_state()
    count(model, *inputs, backward=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {fqn: set(vars(module)) for fqn, module in model.named_modules()} == attributes
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
