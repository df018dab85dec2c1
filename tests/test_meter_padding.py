"""Tokens without padding: always of the same tokens that are counted, and None where nothing tells them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flopprof import Meter
from wrapped import Wrapper

# Two sequences of eight, of which four positions are padding.
IDS = torch.ones(2, 8, dtype=torch.long)
MASK = torch.tensor([[1] * 8, [1] * 4 + [0] * 4])


class Decoder(nn.Module):
    """One stack."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.embedding(input_ids)


class Both(Decoder):
    """An encoder beside the decoder, as its config says; the decoder's tokens are made of the labels."""

    class config:
        """As transformers has it."""

        is_encoder_decoder = True

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ids = decoder_input_ids
        if ids is None:
            assert labels is not None
            ids = labels.clamp(min=0)
        return self.embedding(input_ids).sum() + self.embedding(ids)


def sizes(model: nn.Module, *calls: Callable[[nn.Module], torch.Tensor]) -> tuple[int, int | None, int | None]:
    """Tokens, those without padding, and samples of a step of these calls; the same in each of four."""
    with Meter(model) as meter:
        for _ in range(4):
            with meter.step():
                for call in calls:
                    call(model).sum().backward()
        (found,) = {(record.tokens, record.effective_tokens, record.samples) for record in meter.records}
    return found


LABELS = torch.ones(2, 6, dtype=torch.long)
PADDED_LABELS = torch.tensor([[1] * 6, [1] * 3 + [-100] * 3])
DECODER_MASK = torch.tensor([[1] * 6, [1] * 5 + [0]])


@pytest.mark.parametrize(
    ("given", "tokens", "effective"),
    [
        ({"labels": IDS}, 16, 16),  # nothing of the decoder's is padding, whatever the encoder's is
        ({"labels": LABELS}, 12, 12),
        ({"labels": PADDED_LABELS}, 12, 9),
        ({"labels": PADDED_LABELS, "decoder_attention_mask": DECODER_MASK}, 12, 11),  # it says so itself
        ({"labels": PADDED_LABELS, "decoder_input_ids": LABELS}, 12, 9),
        ({"decoder_input_ids": LABELS, "decoder_attention_mask": DECODER_MASK}, 12, 11),
        ({"decoder_input_ids": LABELS}, 12, None),  # only the encoder's is told
        ({"decoder_input_ids": None, "labels": LABELS}, 12, 12),
    ],
    ids=str,
)
def test_of_two_stacks_those_of_the_decoder(given: dict[str, Any], tokens: int, effective: int | None) -> None:
    for model in (Both(), Wrapper(Both())):
        assert sizes(model, lambda model: model(IDS, attention_mask=MASK, **given)) == (tokens, effective, 2)


def test_labels_alone_tell_of_no_padding() -> None:
    assert sizes(Both(), lambda model: model(input_ids=IDS, labels=PADDED_LABELS)) == (12, None, 2)
    assert sizes(Decoder(), lambda model: model(input_ids=IDS, labels=IDS)) == (16, None, 2)


def test_a_micro_batch_without_a_mask_counts_whole() -> None:
    def masked(model: nn.Module) -> torch.Tensor:
        return model(input_ids=IDS, attention_mask=MASK)

    def plain(model: nn.Module) -> torch.Tensor:
        return model(input_ids=IDS)

    assert sizes(Decoder(), masked, plain) == (32, 12 + 16, 4)
    assert sizes(Decoder(), plain, masked, masked) == (48, 16 + 12 + 12, 6)
    assert sizes(Decoder(), plain, plain) == (32, None, 4)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper, lambda model: Wrapper(Wrapper(model))])
def test_a_mask_by_position(wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert sizes(wrap(Decoder()), lambda model: model(IDS, MASK)) == (16, 12, 2)
    assert sizes(wrap(Both()), lambda model: model(IDS, MASK, LABELS, DECODER_MASK)) == (12, 11, 2)


def test_a_mask_of_another_shape_tells_nothing() -> None:
    assert sizes(Decoder(), lambda model: model(IDS, MASK[:, None, None])) == (16, None, 2)


def test_a_wrapper_with_arguments_of_its_own() -> None:
    """What is called `module` in there is not what the arguments are given to."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Decoder()

        def forward(self, target: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.module(input_ids, attention_mask)

    assert sizes(WithLoss(), lambda model: model(torch.zeros(2), IDS, MASK)) == (16, 12, 2)
