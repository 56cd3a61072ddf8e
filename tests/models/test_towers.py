"""Towers: copies of the decoder's last layers, apart from it."""

from __future__ import annotations

import pytest
import torch

from latent_rl.models.towers import final_norm, make_tower
from tests.tiny_models import ARCHITECTURES, tiny_vlm


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_last_layers_are_copied(name: str, layers: int) -> None:
    decoder = tiny_vlm(name).model.get_decoder()
    tower = make_tower(decoder, layers, dtype=torch.float32, init_from_backbone=True)
    assert type(tower) is type(decoder)
    assert len(tower.layers) == layers
    for own, source in zip(reversed(tower.layers), reversed(decoder.layers), strict=False):
        for key, weight in source.state_dict().items():
            assert torch.equal(own.state_dict()[key], weight), key
            assert own.state_dict()[key].data_ptr() != weight.data_ptr()
    assert torch.equal(final_norm(tower).weight, final_norm(decoder).weight)
    assert tower.embed_tokens is None
    assert all(p.requires_grad for p in tower.parameters())


def test_random_towers_differ_from_the_decoder() -> None:
    decoder = tiny_vlm("llava").model.get_decoder()
    tower = make_tower(decoder, 1, dtype=torch.float32, init_from_backbone=False)
    key = "self_attn.q_proj.weight"
    assert not torch.equal(tower.layers[-1].state_dict()[key], decoder.layers[-1].state_dict()[key])


def test_layer_kinds_follow_the_copied_layers() -> None:
    decoder = tiny_vlm("gemma3").model.get_decoder()
    kinds = decoder.config.layer_types
    for layers in (1, 2, 3, 4):
        tower = make_tower(decoder, layers, dtype=torch.float32, init_from_backbone=True)
        assert tower.config.layer_types[-3:] == kinds[-layers:] or layers > 3
        assert tower.config.layer_types[-min(3, layers) :] == kinds[-min(3, layers) :]
    assert tower.config.layer_types[0] == "full_attention"
    assert decoder.config.layer_types == kinds  # the decoder's own settings are left alone


def test_a_whole_copy_computes_what_the_decoder_does() -> None:
    decoder = tiny_vlm("qwen2_5_vl").model.get_decoder()
    layers = decoder.config.num_hidden_layers
    tower = make_tower(decoder, layers, dtype=torch.float32, init_from_backbone=True)
    x = torch.randn(1, 6, decoder.config.hidden_size)
    torch.testing.assert_close(
        tower(inputs_embeds=x).last_hidden_state, decoder(inputs_embeds=x).last_hidden_state
    )
