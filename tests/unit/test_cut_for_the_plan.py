"""Where images are decoded, the processor cuts them in the size that their step trains at."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2ft_hpc import results
from d2ft_hpc.config import RunConfig, read_config
from d2ft_hpc.launch.control import SoloControl
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.training.job import set_up
from d2ft_hpc.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Two epochs of four steps, three of two micro-batches of four images and one with what is left."""
    random = np.random.default_rng(0)
    for split, kind in itertools.product(("train", "test"), ("cat", "dog")):
        (tmp_path / "data" / split / kind).mkdir(parents=True)
        for index in range(14):
            picture = Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8))
            picture.save(tmp_path / "data" / split / kind / f"{index}.png")
    model = ("model.weights=null", "model.options.depth=1", "data.micro_batch_size=4", "data.slots=2")
    data = ("data.name=image_folder", f"data.root={tmp_path / 'data'}", "data.classes=null")
    run = (f"run.folder={tmp_path}", "engine.name=plain", "engine.device=cpu", "train.epochs=2")
    plan = ("plan.compute_budget=0.5", "train.evaluate_at_start=false")
    return read_config(Path("configs/demo.yaml"), [*model, *data, *run, *plan])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.full)])
def test_each_step_has_images_of_its_size(config: RunConfig, workers: int) -> None:
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    job = set_up(config, SoloControl(), CPU)
    assert job.curve is not None
    assert job.executor.images.may_come_scaled  # whoever is the first to read images
    assert sum(count > 0 for count in job.curve.steps) == 3
    sides = [4 * job.curve.grid_at(step)[0] for step in range(8)]
    assert sides[0] == 16
    assert sides[-1] == 32
    seen = []
    for epoch, start in ((0, 0), (1, 2)):  # the second as after a resume in its middle
        job.sampler.set_epoch(epoch, start_batch=start)
        seen += [tuple(images.shape[1:]) for images, _ in job.train_batches]
    assert seen == [(3, side, side) for side in sides[:4] + sides[6:] for _ in range(2)]


@pytest.mark.parametrize("augment", ["timm", "resized_crop", "shift", "none"])
def test_workers_can_have_every_transform(config: RunConfig, augment: str) -> None:
    """They are started afresh and get it as bytes."""
    of_sample = set_up(
        config.model_copy(update={"data": config.data.model_copy(update={"augment": augment})}),
        SoloControl(),
        CPU,
    ).train_set._of_sample
    assert of_sample is not None
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    sent = pickle.loads(pickle.dumps(of_sample))
    assert torch.equal(sent(image, [7], (32, 32)), of_sample(image, [7], (32, 32)))


def test_a_run_executes_what_was_planned(config: RunConfig) -> None:
    with Watch(SoloControl(), run_folder=config.run_folder) as watch:
        assert train(config, SoloControl(), CPU, "single process", watch)
    with results.open(config.run_folder) as run:
        steps = run.table("steps")
    assert len(steps["step"]) == 8
    np.testing.assert_allclose(steps["executed_flops"], steps["planned_flops"], rtol=1e-6)
    assert 0.4 < steps["planned_flops"].sum() / steps["dense_flops"].sum() <= 0.5
