"""`moe_ext.padding`: whose mask it is, and for which layers."""

import asyncio
import threading

import pytest
import torch
from torch import nn

import moe_ext
from support.layer_suite import H, make
from support.oracle import bits_equal, unit

MASK = torch.tensor([False, True, True])


@pytest.fixture
def layer_and_x():
    return make().eval(), unit(3, H, dtype=torch.float64)


def is_masked(layer, x):
    return not layer(x)[1:].any()


def test_a_mask_belongs_to_its_thread(layer_and_x):
    seen = {}
    entered, done = threading.Event(), threading.Event()

    def run():
        seen["before"] = is_masked(*layer_and_x)
        with moe_ext.padding(MASK):
            entered.set()
            done.wait(10)
            seen["inside"] = is_masked(*layer_and_x)

    thread = threading.Thread(target=run)
    with moe_ext.padding(None):
        thread.start()
        entered.wait(10)
        seen["here"] = is_masked(*layer_and_x)
        done.set()
        thread.join()
    assert seen == {"before": False, "inside": True, "here": False}


def test_a_mask_belongs_to_its_task(layer_and_x):
    async def masked():
        with moe_ext.padding(MASK):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return is_masked(*layer_and_x)

    async def plain():
        await asyncio.sleep(0)
        return is_masked(*layer_and_x)

    async def both():
        return await asyncio.gather(masked(), plain())

    assert asyncio.run(both()) == [True, False]


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(make()), nn.Sequential(make())

    def forward(self, source, target):
        return self.encoder(source), self.decoder(target)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_for_each_part(compiled):
    model = EncoderDecoder().eval()
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    source, target = (unit(2, n, H, dtype=torch.float64) for n in (7, 4))
    source_mask, target_mask = torch.rand(2, 7) < 0.4, torch.rand(2, 4) < 0.4
    expected = (
        model.encoder[0](source, padding_mask=source_mask),
        model.decoder[0](target, padding_mask=target_mask),
    )
    with moe_ext.padding(source_mask, model.encoder), moe_ext.padding(target_mask, model.decoder):
        assert bits_equal(run(source, target), expected)
    with moe_ext.padding(source_mask), moe_ext.padding(None, model.decoder):  # the innermost counts
        assert bits_equal(run(source, target), (expected[0], model.decoder[0](target)))
    plain = run(source, target)
    assert bits_equal(plain, (model.encoder[0](source), model.decoder[0](target)))


def test_a_part_is_a_module_with_layers():
    with pytest.raises(TypeError, match="padding: module must be a torch.nn.Module, got 'encoder'"):
        moe_ext.padding(MASK, "encoder").__enter__()
    with pytest.raises(ValueError, match="padding: module must hold an MoE, Linear has none"):
        moe_ext.padding(MASK, nn.Linear(2, 2)).__enter__()
